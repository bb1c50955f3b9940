"""Who is in the job: topology from what the ranks say, and what happens where they do not say the same."""

from __future__ import annotations

import itertools
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from forgather_ckpt import CheckpointCoordinator, SharingPattern, StateComponent, discovery
from forgather_ckpt.discovery import assemble, connect
from forgather_ckpt.errors import DeclarationError, RankTimeout
from forgather_ckpt.topology import Group, sets_of
from tests.components import Box, Refusal, Trainer, listing, refusal, the_same
from tests.ranks import run_ranks, values

# ---- the topology from the hellos: pure


def hello(node: dict[str, Any], **groups: Any) -> dict[str, Any]:
    meshes = groups.pop("meshes", [])
    return {"node": node, "groups": groups, "meshes": meshes}


def mesh(shape: dict[str, int]) -> dict[str, Any]:
    """A mesh over ranks 0, 1, …, as `DeviceMesh` lays them out: the last axis runs fastest."""
    places = list(itertools.product(*(range(size) for size in shape.values())))
    return {"axes": list(shape), "places": [[list(place), rank] for rank, place in enumerate(places)]}


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [
        ([0, 0, 1, 1], ((0, 1), (2, 3))),
        ([1, 1, 0, 0], ((2, 3), (0, 1))),  # in the order of node numbers, not of ranks
        ([0, 1, 0, 1], ((0, 2), (1, 3))),
        ([7, 7, 7, 7], ((0, 1, 2, 3),)),
    ],
)
def test_nodes_are_those_of_the_launcher(nodes: list[int], expected: tuple[tuple[int, ...], ...]):
    topology = assemble([hello({"torchrun group rank": node}) for node in nodes], rank=2)
    assert (topology.nodes, topology.node_source, topology.rank) == (expected, "torchrun group rank", 2)


def test_nodes_by_boot_id_are_in_the_order_of_their_first_ranks():
    topology = assemble([hello({"boot id": realm}) for realm in ("zz", "aa", "zz")], rank=0)
    assert topology.nodes == ((0, 2), (1,))


def test_ranks_that_name_their_nodes_differently_are_refused():
    with pytest.raises(DeclarationError, match=r"in different ways: \['boot id', 'slurm node id'\]"):
        assemble([hello({"slurm node id": 0}), hello({"boot id": "x"})], rank=0)


def test_bare_groups_may_be_uneven_and_need_not_hold_every_rank():
    members = [None, (1, 2), (1, 2), (3,)]
    topology = assemble([hello({"boot id": "x"}, dp=ranks) for ranks in members], rank=0)
    assert topology.groups == {"dp": Group(((1, 2), (3,)))}
    assert [group.id for group in sets_of(SharingPattern.PER_GROUP, "dp", topology)] == ["dp=0", "dp=1"]


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([{"dp": (0, 1)}, {}], "rank 1 gives no process group 'dp', other ranks do"),
        ([{}, {"dp": (0, 1)}], "rank 0 gives no process group 'dp', other ranks do"),
        ([{"dp": (0, 1)}, {"dp": (1,)}], "the process groups 'dp' overlap"),
    ],
)
def test_groups_that_contradict_each_other_are_refused(groups: list[dict[str, Any]], message: str):
    with pytest.raises(DeclarationError, match=message):
        assemble([hello({"boot id": "x"}, **own) for own in groups], rank=0)


def test_every_axis_of_a_mesh_is_a_group_with_its_place_on_the_other_axes():
    topology = assemble([hello({"boot id": "x"}, meshes=[mesh({"dp": 2, "pp": 1, "tp": 2})])] * 4, rank=0)
    assert topology.groups["dp"].sets == ((0, 2), (1, 3))
    assert topology.groups["dp"].coordinates == (
        (("pp", 0, 1), ("tp", 0, 2)),
        (("pp", 0, 1), ("tp", 1, 2)),
    )
    assert topology.groups["tp"].sets == ((0, 1), (2, 3))
    assert topology.groups["pp"].sets == ((0,), (1,), (2,), (3,))
    assert [group.id for group in sets_of(SharingPattern.PER_GROUP, "tp", topology)] == [
        "dp=0/2,pp=0/1",
        "dp=1/2,pp=0/1",
    ]


def test_two_meshes_may_share_an_axis_only_if_it_means_the_same_ranks():
    same = [mesh({"dp": 2, "tp": 2}), mesh({"dp": 2, "tp": 2})]
    assert set(assemble([hello({"boot id": "x"}, meshes=same)] * 4, rank=0).groups) == {"dp", "tp"}
    other = [mesh({"dp": 2, "tp": 2}), mesh({"dp": 4})]
    with pytest.raises(DeclarationError, match="two meshes have an axis 'dp' of different ranks"):
        assemble([hello({"boot id": "x"}, meshes=other)] * 4, rank=0)


def line(**lines: Any) -> dict[str, Any]:
    """What a rank says of meshes of one axis, given under the names of their axes."""
    return hello({"boot id": "x"}, **lines) | {"lines": lines}


def test_slices_of_a_mesh_are_bare_groups_and_one_mesh_of_all_ranks_is_a_mesh():
    slices = assemble([line(dp=(0, 2)), line(dp=(1, 3)), line(dp=(0, 2)), line(dp=(1, 3))], rank=0)
    assert slices.groups == {"dp": Group(((0, 2), (1, 3)))}
    whole = assemble([line(dp=(0, 1))] * 2, rank=0)
    assert whole.groups == {"dp": Group(((0, 1),), ((),))}


def test_a_mesh_goes_before_its_slices_which_must_mean_the_same_ranks():
    whole = {"meshes": [mesh({"dp": 2, "tp": 2})]}
    slices = [line(dp=(0, 2)), line(dp=(1, 3)), line(dp=(0, 2)), line(dp=(1, 3))]
    topology = assemble([one | whole for one in slices], rank=0)
    assert topology.groups["dp"].coordinates == ((("tp", 0, 2),), (("tp", 1, 2),))
    with pytest.raises(DeclarationError, match=r"'dp' is the axis of a mesh, with the groups \[\[0, 2\], \[1, 3\]\]"):
        assemble([one | whole for one in [line(dp=(0, 1)), line(dp=(0, 1)), line(dp=(2, 3)), line(dp=(2, 3))]], rank=0)


# ---- connecting


@pytest.mark.multiprocess
@pytest.mark.parametrize("key", ["dp", "data"])
@pytest.mark.parametrize("name", ["dp", "data"])
def test_slices_of_a_mesh_serve_as_groups(key: str, name: str, tmp_path: Path):
    def case(rank: int, world_size: int) -> Any:
        whole = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        box = Box({"place": rank % 2})
        components = [StateComponent("part", box, SharingPattern.PER_GROUP, name)]

        def coordinator() -> CheckpointCoordinator:
            groups = {key: whole["dp"]}
            return CheckpointCoordinator(components, tmp_path, process_groups=groups, timeout_seconds=30)

        if name not in ("dp", key):
            with coordinator() as unknown:
                return refusal(lambda: unknown.save_checkpoint(1))[0]
        with coordinator() as saving:
            saving.save_checkpoint(1)
        box.items = {}
        with coordinator() as loading:
            loading.load_checkpoint()
            return box.items == {"place": rank % 2}, loading.topology.groups[name]

    result = the_same(values(run_ranks(4, case)))
    known = (True, Group(((0, 2), (1, 3))))
    assert result == ("DeclarationError" if name not in ("dp", key) else known)


@pytest.mark.multiprocess
def test_a_mesh_with_its_slice_bare_slices_and_ranks_that_are_in_none(tmp_path: Path):
    def case(rank: int, world_size: int) -> Any:
        whole = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        everybody = init_device_mesh("cpu", (4,), mesh_dim_names=("dp",))
        given: list[Any] = [
            whole["tp"],
            {"mesh": whole, "dp": whole["dp"]},
            {"ring": whole["dp"] if rank % 2 else None},
            everybody,
        ]
        return [
            CheckpointCoordinator([], tmp_path, process_groups=one, timeout_seconds=30).topology.groups for one in given
        ]

    sliced, both, partly, whole = the_same(values(run_ranks(4, case)))
    assert sliced == {"tp": Group(((0, 1), (2, 3)))}
    assert both["dp"] == Group(((0, 2), (1, 3)), ((("tp", 0, 2),), (("tp", 1, 2),)))
    assert partly == {"ring": Group(((1, 3),)), "dp": Group(((1, 3),))}
    assert whole == {"dp": Group(((0, 1, 2, 3),), ((),))}


@pytest.mark.multiprocess
@pytest.mark.parametrize("backend", ["gloo", "cuda:gloo", None])
def test_save_and_load_with_any_default_group_or_none(backend: str | None, tmp_path: Path):
    def case(rank: int, world_size: int) -> tuple[Any, ...]:
        box = Box({"rank": rank})
        components = [StateComponent("own", box, SharingPattern.PER_RANK)]
        with CheckpointCoordinator(components, tmp_path, timeout_seconds=30) as coordinator:
            coordinator.save_checkpoint(1)
            box.items = {}
            coordinator.load_checkpoint()
        return box.items["rank"], coordinator.topology.world_size, coordinator.topology.node_source

    results = values(run_ranks(3, case, backend=backend, nodes=[2, 1]))
    assert results == [(rank, 3, "torchrun group rank") for rank in range(3)]


@pytest.mark.multiprocess
def test_ranks_started_in_different_directories_use_that_of_rank_0(tmp_path: Path):
    def case(rank: int, world_size: int) -> str:
        own = tmp_path / str(rank)
        own.mkdir()
        os.chdir(own)
        components = [StateComponent("own", Box({"rank": rank}), SharingPattern.PER_RANK)]
        with CheckpointCoordinator(components, "run", timeout_seconds=30) as coordinator:
            return str(coordinator.save_checkpoint(1))

    assert the_same(values(run_ranks(2, case))) == str(tmp_path / "0" / "run" / "checkpoint-1")


@pytest.mark.multiprocess
def test_what_fails_on_one_rank_while_connecting_fails_on_all(tmp_path: Path):
    class NoGroups(Trainer):
        def get_process_groups(self) -> Any:
            raise RuntimeError("no groups today")

    def case(rank: int, world_size: int) -> list[Refusal]:
        good: dict[str, Any] = {"timeout_seconds": 600}
        unnamed = init_device_mesh("cpu", (2, 2))
        wrong: list[tuple[Any, dict[str, Any]]] = [
            ([], {"on_mismatch": "ignore"}),
            ([], {"shared_filesystem": False}),
            (object(), {}),
            (NoGroups([]), {}),
            ([], {"process_groups": {"dp": unnamed}}),
        ]
        results = []
        for culprit, (source, options) in itertools.product((0, 3), wrong):
            given, options = (source, options) if rank == culprit else ([], {})
            results.append(refusal(lambda s=given, o=options: CheckpointCoordinator(s, tmp_path, **good, **o)))
        with CheckpointCoordinator([], tmp_path, **good) as coordinator:  # nothing is left broken behind
            coordinator.save_checkpoint(1)
        return results

    results = the_same(values(run_ranks(4, case)))
    expected = [
        ("DeclarationError", "on_mismatch is 'ignore'"),
        ("DeclarationError", "shared_filesystem=False is not available yet"),
        ("DeclarationError", "object has no get_state_components()"),
        ("RankFailed", "RuntimeError: no groups today"),
        ("DeclarationError", "the device mesh 'dp' has no axis names"),
    ]
    for (culprit, (kind, text)), result in zip(itertools.product((0, 3), expected), results, strict=True):
        assert result[0] == kind
        assert result[1].startswith(f"connecting failed on rank {culprit}: {text}")


@pytest.mark.multiprocess
@pytest.mark.parametrize("missing", [0, 2])
def test_a_rank_that_makes_no_coordinator_is_named_at_the_deadline(missing: int):
    def case(rank: int, world_size: int) -> Refusal | None:
        if rank == missing:
            time.sleep(6)
            return None
        return refusal(lambda: connect(lambda: None, timeout_seconds=1))

    results = values(run_ranks(3, case))
    results.pop(missing)
    kind, message = the_same(results)
    assert kind == "RankTimeout"
    assert message.startswith(f"connecting failed: no answer from ranks {missing} within 1 s")


@pytest.mark.multiprocess
@pytest.mark.parametrize("late", [None, 0, 1, 2])
def test_messages_of_an_earlier_generation_in_the_same_store_confuse_nobody(late: int | None):
    """An elastic restart: new processes, which count their connections from 0 again, and the agent's old store."""

    def case(rank: int, world_size: int) -> list[Any]:
        results = []
        for generation in range(4):
            discovery._connections = itertools.count()
            dist.barrier()
            if rank == late:
                time.sleep(0.2)
            comm, topology = connect(lambda: None, timeout_seconds=30)
            comm.begin_operation()
            results.append(
                comm.agree("counting", lambda generation=generation, comm=comm: [generation, comm.rank], list)
            )
            assert topology.rank == rank
            if generation == 1:  # this one dies in the middle of an operation
                comm.agree("half", lambda: None)
                comm._post("1/3/0", {"ok": "stale"})
                comm._post("1/3/verdict", {"ok": "stale"})
        return results

    results = the_same(values(run_ranks(3, case)))
    assert results == [[[generation, rank] for rank in range(3)] for generation in range(4)]


@pytest.mark.multiprocess
def test_generations_of_other_sizes_with_other_ranks_in_the_same_store_confuse_nobody():
    """An elastic restart with fewer machines, and with more again: who lives on has another rank."""
    sizes = [4, 3, 4, 2, 4]

    def case(process: int, num_processes: int) -> list[list[int]]:
        store = dist.TCPStore("127.0.0.1", int(os.environ["MASTER_PORT"]))
        results = []
        for generation, size in enumerate(sizes):
            store.add(f"ready/{generation}", 1)
            while store.add(f"ready/{generation}", 0) < num_processes:
                time.sleep(0.01)
            rank = (process + generation) % num_processes
            if rank >= size:
                continue
            discovery._connections = itertools.count()
            os.environ.update({"RANK": f"{rank}", "WORLD_SIZE": f"{size}"})
            comm, topology = connect(lambda: None, timeout_seconds=30)
            assert (topology.rank, topology.world_size) == (rank, size)
            comm.begin_operation()
            results.append(comm.agree("counting", lambda generation=generation, rank=rank: [generation, rank], list))
            if rank == 0:  # it dies when it has spoken once more, and the others have not heard it
                comm._post("1/2/0", {"ok": "stale"})
                comm._post("1/2/verdict", {"ok": "stale"})
        return results

    for process, results in enumerate(values(run_ranks(4, case, backend=None))):
        took_part = [generation for generation, size in enumerate(sizes) if (process + generation) % 4 < size]
        assert results == [[[generation, rank] for rank in range(sizes[generation])] for generation in took_part]


@pytest.mark.multiprocess
def test_an_earlier_generation_that_was_killed_while_connecting_confuses_nobody():
    def case(rank: int, world_size: int) -> list[int]:
        store = dist.PrefixStore("forgather_ckpt/0", dist.distributed_c10d._get_default_store())
        stale = {"token": "0" * 16, "node": {"boot id": "old"}, "groups": {}, "meshes": [], "process": ["", 1, ""]}
        if rank != 2:  # which had not come that far
            store.set(f"hello/{rank}", json.dumps(stale))
        if rank == 0:
            store.set("welcome", json.dumps({"nonce": "old", "hellos": [stale] * 3}))
            store.set("accept/old/1", "1")
            store.set("given up", json.dumps({"error": RankTimeout("old").to_wire(), "tokens": [stale["token"]]}))
        dist.barrier()
        time.sleep(0.3 if rank == 1 else 0)
        comm, _ = connect(lambda: None, timeout_seconds=30)
        comm.begin_operation()
        return comm.agree("counting", lambda: comm.rank, lambda ranks: ranks)

    assert the_same(values(run_ranks(3, case))) == [0, 1, 2]


@pytest.mark.multiprocess
def test_a_rank_that_is_stopped_while_connecting_is_named():
    def case(rank: int, world_size: int) -> Refusal:
        pids: list[Any] = [None] * world_size
        dist.all_gather_object(pids, os.getpid())

        def groups() -> None:
            if rank == 1:
                os.kill(os.getpid(), signal.SIGSTOP)

        error = refusal(lambda: connect(groups, timeout_seconds=1))
        if rank == 2:
            os.kill(pids[1], signal.SIGCONT)
        return error

    results = values(run_ranks(3, case))
    del results[1]  # it comes when the others have gone, and waits for them until its own deadline
    kind, message = the_same(results)
    assert (kind, "no answer from ranks 1 within 1 s" in message) == ("RankTimeout", True)


# ---- the ranks must declare, and want, the same


def refused_declarations(rank: int) -> list[tuple[list[StateComponent], list[StateComponent], str]]:
    """What rank 1 declares, what the others do, and the error."""
    own = Box({"rank": rank})
    dp = {"process_group_name": "dp"}

    def one(key: str, pattern: SharingPattern = SharingPattern.PER_RANK, **options: Any) -> StateComponent:
        return StateComponent(key, own, pattern, **options)

    return [
        ([one("a")], [one("a"), one("b")], "component 'b' is declared on rank 0 and not on rank 1"),
        ([one("a"), one("b")], [one("a")], "component 'b' is declared on rank 1 and not on rank 0"),
        ([one("b"), one("a")], [one("a"), one("b")], "rank 1 declares its components in another order than rank 0"),
        (
            [one("a", SharingPattern.PER_NODE)],
            [one("a")],
            "component 'a': pattern is 'per_rank' on rank 0 and 'per_node' on rank 1",
        ),
        (
            [one("a", SharingPattern.REPLICATED, validation_level="full")],
            [one("a", SharingPattern.REPLICATED)],
            "component 'a': level is 'quick' on rank 0 and 'full' on rank 1",
        ),
        ([one("a", required=False)], [one("a")], "component 'a': required is True on rank 0 and False on rank 1"),
        ([one("a", names="global")], [one("a")], "component 'a': names is 'local' on rank 0 and 'global' on rank 1"),
        (
            [one("a", on_resize="drop")],
            [one("a")],
            "component 'a': on_resize is 'error' on rank 0 and 'drop' on rank 1",
        ),
        (
            [one("a", SharingPattern.PER_GROUP, process_group_name="tp")],
            [one("a", SharingPattern.PER_GROUP, **dp)],
            "component 'a': group is 'dp' on rank 0 and 'tp' on rank 1",
        ),
        ([one("a"), one("a")], [one("a")], "component 'a' is declared twice"),
        ([Box({})], [one("a")], "get_state_components() returned a Box; return a list of StateComponent"),
        ({"a": one("a")}, [one("a")], "get_state_components() returned a dict; return a list of StateComponent"),  # type: ignore[list-item]
        (None, [one("a")], "get_state_components() returned a NoneType; return a list of StateComponent"),  # type: ignore[list-item]
        ([one("a", SharingPattern.PER_GROUP, process_group_name="nn")], [one("a")], "there is no process group 'nn'"),
    ]


@pytest.mark.multiprocess
def test_ranks_that_declare_different_components_are_told_which(tmp_path: Path):
    def case(rank: int, world_size: int) -> list[Refusal]:
        everybody = dist.new_group(list(range(world_size)))
        trainer = Trainer([], {"dp": everybody, "tp": everybody})
        results = []
        with CheckpointCoordinator(trainer, tmp_path, timeout_seconds=600) as coordinator:
            for on_rank_1, elsewhere, _ in refused_declarations(rank):
                trainer.components = on_rank_1 if rank == 1 else elsewhere
                results.append(refusal(lambda: coordinator.save_checkpoint(1)))
                assert refusal(coordinator.load_checkpoint) == results[-1]
                assert refusal(coordinator.validate_replication) == results[-1]
            trainer.components = elsewhere
            dist.barrier()
            assert listing(tmp_path) == []
        return results

    results = the_same(values(run_ranks(3, case)))
    for (kind, message), (_, _, expected) in zip(results, refused_declarations(0), strict=True):
        assert kind == "DeclarationError"
        assert expected in message


@pytest.mark.multiprocess
def test_ranks_that_ask_for_different_things_are_told_which(tmp_path: Path):
    def case(rank: int, world_size: int) -> list[Refusal]:
        with CheckpointCoordinator([], tmp_path, timeout_seconds=600) as coordinator:
            coordinator.save_checkpoint(1)
            calls = {
                "save 1": lambda: coordinator.save_checkpoint(1),
                "save 2": lambda: coordinator.save_checkpoint(2),
                "final": lambda: coordinator.save_checkpoint(1, kind="final"),
                "epoch": lambda: coordinator.save_checkpoint(1, epoch=0.5),
                "load": lambda: coordinator.load_checkpoint(),
                "load 1": lambda: coordinator.load_checkpoint(1),
                "staged": lambda: coordinator.load_checkpoint(staged=True),
                "some": lambda: coordinator.load_checkpoint(components=[]),
                "lenient": lambda: coordinator.load_checkpoint(strict=False),
                "validate": lambda: coordinator.validate_replication(),
            }
            results = [refusal(other if rank == 2 else one) for one, other in itertools.permutations(calls.values(), 2)]
            dist.barrier()
            assert listing(tmp_path) == ["checkpoint-1"]
            coordinator.save_checkpoint(1)
        return results

    results = the_same(values(run_ranks(3, case)))
    assert {kind for kind, _ in results} == {"DeclarationError"}
    for _, message in results:
        assert "the ranks ask for different things: " in message
        assert message.index(" on rank 0, ") < message.index(" on rank 2")
    assert "'step': 1" in results[0][1]
    assert "'step': 2" in results[0][1]


@pytest.mark.multiprocess
def test_a_step_or_kind_that_is_none_is_refused_on_all_ranks(tmp_path: Path):
    def case(rank: int, world_size: int) -> list[Refusal]:
        with CheckpointCoordinator([], tmp_path, timeout_seconds=600) as coordinator:
            return [
                refusal(lambda step=step: coordinator.save_checkpoint(step if rank == 1 else 7))
                for step in (-1, 1.5, True, "7")
            ] + [refusal(lambda: coordinator.save_checkpoint(7, kind="hourly" if rank == 1 else "periodic"))]

    results = the_same(values(run_ranks(2, case)))
    assert [kind for kind, _ in results] == ["DeclarationError"] * 5
    for (_, message), wrong in zip(results, ("-1", "1.5", "True", "'7'", "'hourly'"), strict=True):
        assert message.startswith("comparing declarations failed on rank 1: ")
        assert f" is {wrong}; use " in message
