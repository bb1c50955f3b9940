"""What the earlier system did wrong, by the numbers of its list of bugs. The docstrings say what happened there."""

from __future__ import annotations

import json
import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist

from forgather_ckpt import (
    CheckpointCoordinator,
    CheckpointManifest,
    NamedOptimizer,
    SharingPattern,
    StateComponent,
    bulk,
    catalog,
    files,
)
from forgather_ckpt.comm import Comm
from forgather_ckpt.errors import DeclarationError, RankFailed
from tests.components import Box, is_same, listing, refusal, sample, the_same
from tests.ranks import run_ranks, values

pytestmark = pytest.mark.multiprocess

GLOBAL, PER_RANK, REPLICATED = SharingPattern.GLOBAL, SharingPattern.PER_RANK, SharingPattern.REPLICATED
PER_GROUP, PER_NODE = SharingPattern.PER_GROUP, SharingPattern.PER_NODE


def coordinator_of(run: Path, components: Any, **options: Any) -> CheckpointCoordinator:
    """With a deadline that no test may ever wait for."""
    return CheckpointCoordinator(components, run, timeout_seconds=600, **options)


def groups_of(rank: int, members: list[list[int]]) -> dict[str, Any]:
    made = [dist.new_group(ranks) for ranks in members]
    return {"dp": next((group for group, ranks in zip(made, members, strict=True) if rank in ranks), None)}


# ---- A. deadlocks and desynchronisation


@pytest.mark.parametrize(
    "members", [[[0, 1], [2, 3]], [[0], [1], [2], [3]], [[1, 2], [3]]], ids=["pairs", "singletons", "without_rank_0"]
)
def test_b1_per_group_is_saved_and_loaded(members: list[list[int]], tmp_path: Path):
    """Every PER_GROUP save hung with more than one rank: only the leaders entered a collective of all."""

    def case(rank: int, world_size: int) -> bool:
        label = f"group {[rank in ranks for ranks in members]}"
        is_member = any(rank in ranks for ranks in members)
        box = Box(sample(label))
        component = StateComponent("part", box if is_member else None, PER_GROUP, "dp")
        with coordinator_of(tmp_path, [component], process_groups=groups_of(rank, members)) as coordinator:
            coordinator.save_checkpoint(1)
            box.items = {}
            coordinator.load_checkpoint()
        return is_same(box.items, sample(label)) if is_member else box.items == {}

    assert values(run_ranks(4, case)) == [True] * 4
    record = CheckpointManifest.load(tmp_path / "checkpoint-1").components["part"]
    assert [entry.ranks for entry in record.entries.values()] == [tuple(ranks) for ranks in members]


def test_b2_per_node_is_saved_and_loaded(tmp_path: Path):
    """Every PER_NODE save hung with more than one rank, for the same reason."""

    def case(rank: int, world_size: int) -> int:
        box = Box({"rank": rank})
        with coordinator_of(tmp_path, [StateComponent("cache", box, PER_NODE)]) as coordinator:
            coordinator.save_checkpoint(1)
            box.items = {}
            coordinator.load_checkpoint()
        return box.items["rank"]

    assert values(run_ranks(4, case, nodes=[2, 2])) == [0, 0, 2, 2]


def test_b3_every_member_of_a_group_gets_its_own_groups_state(tmp_path: Path):
    """Rank 0 of group 0 was given group 1's state, the other members nothing, and the load "succeeded"."""

    def case(rank: int, world_size: int) -> int:
        box = Box({"group": rank // 2})
        component = StateComponent("part", box, PER_GROUP, "dp", required=False)
        with coordinator_of(tmp_path, [component], process_groups=groups_of(rank, [[0, 1], [2, 3]])) as coordinator:
            coordinator.save_checkpoint(1)
            box.items = {}
            coordinator.load_checkpoint()
        return box.items["group"]

    assert values(run_ranks(4, case)) == [0, 0, 1, 1]


@pytest.mark.parametrize("level", ["quick", "tensor", "full"])
def test_b4_the_verdict_on_copies_is_the_same_on_all_ranks(level: str, tmp_path: Path):
    """Only the divergent rank raised; rank 0 wrote its file and then waited for it in a barrier for ever."""

    def case(rank: int, world_size: int) -> Any:
        component = StateComponent("model", Box({"w": torch.tensor([rank == 2])}), REPLICATED, validation_level=level)
        with coordinator_of(tmp_path, [component]) as coordinator:
            return refusal(lambda: coordinator.save_checkpoint(1))

    kind, message = the_same(values(run_ranks(4, case)))
    assert kind == "ReplicaMismatch"
    assert "'model' differs between ranks [0-1, 3] and rank 2 at 'w'" in message
    assert listing(tmp_path) == ["replication-report-1.json"]


@pytest.mark.parametrize("required", [True, False])
def test_b5_a_state_dict_that_raises_on_one_rank_hangs_nobody(required: bool, tmp_path: Path):
    """The rank left the replication check, the others waited in its all_gather, even for an optional component."""

    def case(rank: int, world_size: int) -> Any:
        box = Box({"x": 1})
        box.fail_save = RuntimeError("broken") if rank == 1 else None
        with coordinator_of(tmp_path, [StateComponent("extra", box, REPLICATED, required=required)]) as coordinator:
            if required:
                return refusal(lambda: coordinator.save_checkpoint(1))
            return coordinator.save_checkpoint(1).name

    result = the_same(values(run_ranks(3, case)))
    if required:
        assert "on rank 1: component 'extra': state_dict() raised RuntimeError: broken" in result[1]
    else:
        assert result == "checkpoint-1"
        manifest = CheckpointManifest.load(tmp_path / result)
        assert (list(manifest.components), list(manifest.omitted)) == ([], ["extra"])


def test_b6_a_required_per_rank_component_that_fails_on_one_rank_fails_all(tmp_path: Path):
    """It raised there, while its peers waited in the barrier."""

    def case(rank: int, world_size: int) -> Any:
        box = Box({"callback": print} if rank == 1 else {"x": 1})
        with coordinator_of(tmp_path, [StateComponent("rng", box, PER_RANK)]) as coordinator:
            return refusal(lambda: coordinator.save_checkpoint(1))

    kind, message = the_same(values(run_ranks(3, case)))
    assert kind == "StructureError"
    assert "on rank 1: component 'rng': callback: " in message


def test_b7_a_load_that_fails_on_one_rank_fails_all_and_leaves_them_in_step(tmp_path: Path):
    """The rank skipped a barrier and swallowed the error: it trained on, one barrier ahead, with nothing restored."""

    def case(rank: int, world_size: int) -> Any:
        box = Box({"rank": rank})
        with coordinator_of(tmp_path, [StateComponent("rng", box, PER_RANK)]) as coordinator:
            coordinator.save_checkpoint(1)
            box.fail_load = RuntimeError("broken") if rank == 1 else None
            results: list[Any] = [refusal(coordinator.load_checkpoint), refusal(lambda: coordinator.save_checkpoint(2))]
            box.fail_load = None
            results += [coordinator.load_checkpoint().step, coordinator.save_checkpoint(2).name]
        return results

    load, save, step, after = the_same(values(run_ranks(3, case)))
    assert "on rank 1: component 'rng': load_state_dict() raised RuntimeError: broken" in load[1]
    assert (save[0], step, after) == ("TornState", 1, "checkpoint-2")


def test_b8_an_old_checkpoint_that_cannot_be_removed_hangs_nobody(tmp_path: Path):
    """An error while rank 0 removed old ones was raised before the last barrier; the others waited there."""

    def case(rank: int, world_size: int) -> str:
        with coordinator_of(tmp_path, [StateComponent("own", Box({"rank": rank}), PER_RANK)]) as coordinator:
            coordinator.save_checkpoint(1)
            with mock.patch.object(files, "delete", side_effect=PermissionError(13, "Permission denied")):
                return coordinator.save_checkpoint(1).name

    assert the_same(values(run_ranks(3, case))) == "checkpoint-1"
    assert CheckpointManifest.load(tmp_path / "checkpoint-1").sequence == 2


def test_b9_components_that_only_some_ranks_declare_are_an_error(tmp_path: Path):
    """`if self.optimizer:` differed between ranks, so that their collectives did not match."""

    def case(rank: int, world_size: int) -> Any:
        components = [StateComponent("model", Box({}), REPLICATED)]
        if rank != 2:
            components.append(StateComponent("optimizer", Box({}), REPLICATED))
        with coordinator_of(tmp_path, components) as coordinator:
            return refusal(lambda: coordinator.save_checkpoint(1))

    kind, message = the_same(values(run_ranks(3, case)))
    assert kind == "DeclarationError"
    assert "component 'optimizer' is declared on rank 0 and not on rank 2" in message


def test_b10_rank_0_chooses_the_checkpoint_for_all(tmp_path: Path):
    """Every rank looked for the newest directory by itself, by modification time; they need not find the same."""

    def case(rank: int, world_size: int) -> tuple[int, int]:
        box = Box({"step": 0})
        with coordinator_of(tmp_path, [StateComponent("progress", box, REPLICATED)]) as coordinator:
            for step in (1, 2, 3):
                box.items = {"step": step}
                coordinator.save_checkpoint(step)
            if rank == 0:
                os.utime(tmp_path / "checkpoint-1", (2**31, 2**31))
            dist.barrier()
            nothing = catalog.Catalog((), (), ())
            with mock.patch.object(catalog, "scan", catalog.scan if rank == 0 else lambda run: nothing):
                report = coordinator.load_checkpoint()
        return report.step, box.items["step"]

    assert the_same(values(run_ranks(3, case))) == (3, 3)


# ---- B. validation that does not validate


LEVELS = ("quick", "tensor", "full")


def told_at_every_level(run: Path, state_of: Any, num_ranks: int = 2, stateful: Any = Box) -> Any:
    """The error of a save at each level, the same on all ranks, of states that `state_of(rank)` makes."""

    def case(rank: int, world_size: int) -> list[Any]:
        told = []
        for level in LEVELS:
            component = StateComponent("part", stateful(state_of(rank)), REPLICATED, validation_level=level)
            with coordinator_of(run, [component]) as coordinator:
                told.append(refusal(lambda c=coordinator: c.save_checkpoint(1)))
        return told

    told = the_same(values(run_ranks(num_ranks, case)))
    assert [name for name in listing(run) if name.startswith(("checkpoint", "."))] == []
    return told


def stepped(rank: int, *, seed: int = 0) -> torch.optim.Optimizer:
    parameter = torch.nn.Parameter(torch.zeros(20))
    optimizer = torch.optim.AdamW([parameter])
    parameter.grad = torch.randn(20, generator=torch.Generator().manual_seed(seed))
    optimizer.step()
    parameter.grad = None
    return optimizer


@pytest.mark.parametrize("is_named", [True, False])
def test_b11_the_state_of_a_real_optimizer_is_compared_at_every_level(is_named: bool, tmp_path: Path):
    """TENSOR and FULL looked at two levels of nesting, and an optimizer's tensors lie at the third: they saw none."""

    class Taken:
        def __init__(self, optimizer: torch.optim.Optimizer) -> None:
            self.optimizer = optimizer

        def state_dict(self) -> dict[str, Any]:
            if not is_named:
                return self.optimizer.state_dict()
            module = torch.nn.Module()
            module.weight = self.optimizer.param_groups[0]["params"][0]
            return NamedOptimizer(self.optimizer, [module]).state_dict()

        def load_state_dict(self, state: dict[str, Any]) -> None: ...

    def state_of(rank: int) -> torch.optim.Optimizer:
        optimizer = stepped(rank)
        [state] = optimizer.state.values()
        state["exp_avg"][17] += rank
        state["step"] += rank
        return optimizer

    prefix = "state.weight." if is_named else "state/~i0/"
    for kind, message in told_at_every_level(tmp_path, state_of, stateful=Taken):
        assert kind == "ReplicaMismatch"
        assert f"at '{prefix}exp_avg' (first at [17], max |Δ| 1), '{prefix}step' (max |Δ| 1); expected" in message


def test_b12_numbers_are_compared_at_every_level(tmp_path: Path):
    """TENSOR and FULL left out what is no tensor: another last_epoch or learning rate passed."""

    def state_of(rank: int) -> Any:
        optimizer = stepped(rank)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1 if rank else 2)
        optimizer.step()
        schedule.step()
        return schedule.state_dict()

    for kind, message in told_at_every_level(tmp_path, state_of):
        assert kind == "ReplicaMismatch"
        assert "'_last_lr' ([0.001] against [0.0001]), 'step_size' (2 against 1); expected" in message


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_b13_types_that_numpy_lacks_are_compared_and_saved(dtype: torch.dtype, tmp_path: Path):
    """The check of a bfloat16 model ended in a TypeError: it was saved unchecked, or never."""

    def state_of(rank: int) -> dict[str, Any]:
        return {"weight": torch.tensor([1.0, 2.0 + 2 * rank]).to(dtype)}

    for kind, message in told_at_every_level(tmp_path, state_of):
        assert kind == "ReplicaMismatch"
        assert "at 'weight' (first at [1], max |Δ| 2)" in message

    def case(rank: int, world_size: int) -> str:
        component = StateComponent("part", Box(state_of(0)), REPLICATED, validation_level="full")
        with coordinator_of(tmp_path, [component]) as coordinator:
            return coordinator.save_checkpoint(1).name

    assert the_same(values(run_ranks(2, case))) == "checkpoint-1"


def test_b14_everything_counts_and_only_what_it_is(tmp_path: Path):
    """QUICK took ten elements and str() of objects: more was not seen, addresses were, and some keys were a TypeError."""
    differing: list[tuple[Any, Any]] = [
        (torch.arange(12.0), torch.cat([torch.arange(11.0), torch.tensor([12.0])])),
        (np.zeros(5000), np.r_[np.zeros(2500), 1.0, np.zeros(2499)]),  # whose repr is the same
        (torch.tensor([1 + 1j]), torch.tensor([1 - 1j])),
        ([1, 2], (1, 2)),
    ]

    def case(rank: int, world_size: int) -> Any:
        box = Box({})
        told: list[Any] = []
        with coordinator_of(tmp_path, [StateComponent("part", box, REPLICATED)]) as coordinator:
            for pair in differing:
                box.items = {("a", 1): pair[rank], 1: 0, "x": 0}
                told.append(refusal(lambda: coordinator.save_checkpoint(1)))
            box.items = {"x": {1: 0}} if rank else {"x": {"1": 0}}
            told.append(refusal(lambda: coordinator.save_checkpoint(1)))
            box.items = {"x": object()}  # with an address: it is refused, not compared
            told.append(refusal(lambda: coordinator.save_checkpoint(1)))
            box.items = {("a", 1): [torch.ones(1)], 1: {"1": 0, 1: 0}, "x": complex(1, 2)}
            told.append(coordinator.save_checkpoint(1).name)
        return told

    *different, keys, unstorable, saved = the_same(values(run_ranks(2, case)))
    for kind, message in different:
        assert kind == "ReplicaMismatch"
        assert "'~k{\"$tuple\":[\"a\",1]}'" in message
    assert keys[0] == "StructureError"
    assert unstorable[0] == "StructureError"
    assert "object objects cannot be checkpointed" in unstorable[1]
    assert saved == "checkpoint-1"


def test_b15_full_sees_the_smallest_drift_and_hangs_at_no_other_structure(tmp_path: Path):
    """It had a tolerance, failed on equal NaNs, saw no nested tensors and no types, and another shape or an extra key on
    one rank left the collectives unmatched."""
    one = torch.tensor([1.0])
    nan = torch.tensor([float("nan")])
    pairs: list[tuple[Any, Any, str | None]] = [
        (one, torch.nextafter(one, one + 1), "'deep/~l0/weight' (first at [0], max |Δ| 1.19e-7)"),
        (torch.tensor([1e-9]), torch.tensor([2e-9]), "max |Δ| 1e-9"),
        (nan, nan.clone(), None),
        (torch.zeros(3), torch.zeros(3, dtype=torch.int32), "a tensor float32 [3] on rank 0 and a tensor int32 [3]"),
        (torch.zeros(3), torch.zeros(4), "a tensor float32 [3] on rank 0 and a tensor float32 [4] on rank 1"),
        (torch.zeros(6)[::2], torch.zeros(3), None),
        ({}, {"extra": torch.zeros(3)}, "'deep/~l0/weight' is a value on rank 0 and absent on rank 1"),
    ]

    def case(rank: int, world_size: int) -> Any:
        box = Box({})
        told: list[Any] = []
        component = StateComponent("part", box, REPLICATED, validation_level="full")
        with coordinator_of(tmp_path, [component]) as coordinator:
            for mine, others, text in pairs:
                box.items = {"deep": [{"weight": others if rank else mine}]}
                if text is None:
                    told.append(coordinator.save_checkpoint(1).name)
                else:
                    told.append(refusal(lambda: coordinator.save_checkpoint(1)))
        return told

    for told, (_, _, text) in zip(the_same(values(run_ranks(2, case))), pairs, strict=True):
        if text is None:
            assert told == "checkpoint-1"
        else:
            assert text in told[1]


@pytest.mark.parametrize("level", LEVELS)
def test_b16_an_exchange_that_fails_is_a_failure(level: str, tmp_path: Path):
    """A gather that failed gave the own value alone, which is equal to itself: "all equal", and saved."""

    def case(rank: int, world_size: int) -> Any:
        component = StateComponent("part", Box({"w": torch.tensor(rank)}), REPLICATED, validation_level=level)
        post = Comm._post
        told = []
        with coordinator_of(tmp_path, [component]) as coordinator:

            def fail(comm: Comm, key: str, message: dict[str, Any]) -> None:
                if '"0": ["' in json.dumps(message):  # the root of the portion
                    message = {"error": RankFailed("the network is down", rank=rank).to_wire()}
                post(comm, key, message)

            with mock.patch.object(Comm, "_post", fail if rank == 1 else post):
                told.append(refusal(coordinator.validate_replication))
                told.append(refusal(lambda: coordinator.save_checkpoint(1)))
        return told

    for kind, message in the_same(values(run_ranks(2, case))):
        assert kind == "RankFailed"
        assert "comparing the copies failed on rank 1: the network is down" in message
    assert not [name for name in listing(tmp_path) if name.startswith("checkpoint")]


def test_b16_bytes_that_cannot_be_sent_are_not_equal(tmp_path: Path):
    """FULL skipped the tensors whose collective had failed."""

    def case(rank: int, world_size: int) -> Any:
        component = StateComponent("part", Box({"w": torch.zeros(3)}), REPLICATED, validation_level="full")
        with coordinator_of(tmp_path, [component]) as coordinator:
            broken = mock.patch.object(bulk.Channel, "broadcast", side_effect=ConnectionError("reset by peer"))
            with broken if rank == 1 else nullcontext():
                error = refusal(lambda: coordinator.save_checkpoint(1))
            return error, coordinator.save_checkpoint(2).name

    (kind, message), after = the_same(values(run_ranks(3, case)))
    assert (kind, after) == ("RankFailed", "checkpoint-2")
    assert message == "comparing all bytes failed on rank 1: ConnectionError: reset by peer"
    assert "checkpoint-1" not in listing(tmp_path)


def test_b17_what_differs_by_design_can_be_left_out(tmp_path: Path):
    """DDP with BatchNorm could not be saved after one step: its running statistics differ, and there was no exception."""

    def case(rank: int, world_size: int) -> Any:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3))
        model(torch.full((4, 3), float(rank)) * torch.arange(4.0)[:, None])
        told = []
        for exclude in ((), ("*.running_*",)):
            component = StateComponent("model", model, REPLICATED, validation_level="full", validation_exclude=exclude)
            with coordinator_of(tmp_path, [component]) as coordinator:
                told.append(coordinator.validate_replication()["model"].is_equal)
                if exclude:
                    told.append(coordinator.save_checkpoint(1).name)
                else:
                    told.append(refusal(lambda c=coordinator: c.save_checkpoint(1))[0])
        return told

    assert the_same(values(run_ranks(2, case))) == [False, "ReplicaMismatch", True, "checkpoint-1"]


@pytest.mark.parametrize("level", LEVELS)
def test_b18_an_optional_component_that_differs_is_not_saved(level: str, tmp_path: Path):
    """It was logged and saved; later every rank loaded rank 0's."""

    def case(rank: int, world_size: int) -> Any:
        extra = Box({"w": torch.tensor(float(rank))})
        component = StateComponent("extra", extra, REPLICATED, required=False, validation_level=level)
        model = StateComponent("model", Box({"w": 1}), REPLICATED)
        with coordinator_of(tmp_path, [component, model]) as coordinator:
            coordinator.save_checkpoint(1)
            coordinator.load_checkpoint(strict=False)
            return extra.items["w"].item()

    assert values(run_ranks(3, case)) == [0.0, 1.0, 2.0]
    manifest = CheckpointManifest.load(tmp_path / "checkpoint-1")
    assert (list(manifest.components), list(manifest.omitted)) == (["model"], ["extra"])
    assert not [name for name in manifest.files if name.startswith("extra")]
    assert "'extra' differs between rank 0 and ranks [1-2] at 'w'" in manifest.omitted["extra"]


# ---- C. atomicity, integrity


def test_b22_the_manifest_says_what_was_stored(tmp_path: Path):
    """It listed rank 1, which had failed; took rank 0's size for everybody's; had no entry if rank 0 held nothing."""

    def case(rank: int, world_size: int) -> Any:
        failing = Box({"x": 1})
        failing.fail_save = RuntimeError("broken") if rank == 1 else None
        sized = Box({"data": torch.zeros(10 if rank == 0 else 100_000)})
        without_0 = Box({"rank": rank})
        components = [
            StateComponent("failing", failing, PER_RANK, required=False),
            StateComponent("sized", sized, PER_RANK),
            StateComponent("without_0", without_0 if rank else None, PER_RANK),
        ]
        with coordinator_of(tmp_path, components) as coordinator:
            coordinator.save_checkpoint(1)
            failing.fail_save = None
            without_0.items = {}
            coordinator.load_checkpoint()
        return without_0.items

    assert values(run_ranks(3, case)) == [{}, {"rank": 1}, {"rank": 2}]
    path = tmp_path / "checkpoint-1"
    manifest = CheckpointManifest.load(path)
    assert "failing" not in manifest.components
    assert "ranks 1: component 'failing': state_dict() raised RuntimeError: broken" in manifest.omitted["failing"]
    sized = manifest.components["sized"].entries
    assert {name: (entry.ranks, entry.num_bytes) for name, entry in sized.items()} == {
        "rank=0": ((0,), 40),
        "rank=1": ((1,), 400_000),
        "rank=2": ((2,), 400_000),
    }
    assert list(manifest.components["without_0"].entries) == ["rank=1", "rank=2"]
    assert {name: record.size for name, record in manifest.files.items()} == {
        file.name: file.stat().st_size for file in path.iterdir() if file.name != "checkpoint_manifest.json"
    }


def test_b28_a_step_saved_again_replaces_the_earlier_one_whole(tmp_path: Path):
    """It was written over in place: files of the earlier save stayed, such as those of a larger world."""

    def case(rank: int, world_size: int) -> None:
        components = [StateComponent("own", Box({"rank": rank, "data": torch.zeros(300_000)}), PER_RANK)]
        with coordinator_of(tmp_path, components) as coordinator:
            coordinator.save_checkpoint(1)

    for world_size in (4, 2):
        values(run_ranks(world_size, case))
        manifest = CheckpointManifest.load(tmp_path / "checkpoint-1")
        assert manifest.world_size == world_size
        assert {record.writer for record in manifest.files.values()} == set(range(world_size))
        assert listing(tmp_path / "checkpoint-1") == sorted([*manifest.files, "checkpoint_manifest.json"])


def test_b29_a_failed_save_leaves_nothing_and_is_nobodys_parent(tmp_path: Path):
    """It left an empty directory, and its path in the list of the best."""

    def case(rank: int, world_size: int) -> list[str]:
        box = Box({"x": 1})
        with coordinator_of(tmp_path, [StateComponent("own", box, PER_RANK)]) as coordinator:
            coordinator.save_checkpoint(1)
            box.fail_save = RuntimeError("broken") if rank == 1 else None
            refusal(lambda: coordinator.save_checkpoint(2))
            dist.barrier()
            left = listing(tmp_path)
            dist.barrier()
            box.fail_save = None
            coordinator.save_checkpoint(3)
        return left

    assert the_same(values(run_ranks(2, case))) == ["checkpoint-1"]
    parent = CheckpointManifest.load(tmp_path / "checkpoint-3").parent
    assert parent is not None
    assert (parent["step"], parent["sequence"]) == (1, 1)


def test_b30_every_file_has_one_writer_and_the_manifest_is_rank_0s(tmp_path: Path):
    """The first rank of every node wrote the same shard and metadata file of a shared directory; so did all stages."""

    def case(rank: int, world_size: int) -> list[str]:
        components = [
            StateComponent("model", Box({"w": torch.zeros(600_000)}), REPLICATED),
            StateComponent("node", Box({"w": torch.zeros(600_000)}), PER_NODE),
            StateComponent("stage", Box({f"w{rank}": torch.zeros(600_000)}), PER_RANK, names="global"),
            StateComponent("progress", Box({"step": 1}), GLOBAL),
        ]
        created: list[str] = []
        create = files.create

        def record(path: Path, size: int, **options: Any) -> int:
            created.append(path.name)
            return create(path, size, **options)

        with mock.patch.object(files, "create", record), coordinator_of(tmp_path, components) as coordinator:
            coordinator.save_checkpoint(1, metrics={"loss": 1.0})
        return created

    created = values(run_ranks(4, case, nodes=[2, 2]))
    names = [name for part in created for name in part]
    assert len(names) == len(set(names))
    assert [("checkpoint_manifest.json" in part) for part in created] == [True, False, False, False]
    manifest = CheckpointManifest.load(tmp_path / "checkpoint-1")
    for name, record in manifest.files.items():
        assert name in created[record.writer]


HOSTILE_KEYS = [
    "../../evil",
    "/etc/evil",
    "a*?[b]",
    "nul\0byte",
    "..",
    "CON",
    "a/b\\c",
    "é\ud800",
    "x" * 300,
    "index",
    "small",
]


def test_b31_a_key_may_be_any_text_and_goes_nowhere(tmp_path: Path):
    """Keys were used raw in paths: `../../evil` was written outside of the checkpoint, and `*` was a pattern."""
    run = tmp_path / "deep" / "down" / "run"

    def case(rank: int, world_size: int) -> list[Any]:
        results: list[Any] = []
        boxes = {key: Box({"key": key, "data": torch.full((300_000,), float(rank))}) for key in HOSTILE_KEYS}
        with coordinator_of(run, [StateComponent(key, box, PER_RANK) for key, box in boxes.items()]) as coordinator:
            coordinator.save_checkpoint(1)
            for box in boxes.values():
                box.items = {}
            coordinator.load_checkpoint()
        for key, box in boxes.items():
            results.append(box.items["key"] == key and bool((box.items["data"] == rank).all()))
        return results

    assert values(run_ranks(2, case)) == [[True] * len(HOSTILE_KEYS)] * 2
    outside = [path for path in tmp_path.rglob("*") if path.is_file() and run not in path.parents]
    assert outside == []
    assert {path.parent.name for path in run.rglob("*") if path.is_file()} == {"run", "checkpoint-1"}


@pytest.mark.parametrize("metadata", [{"when": object()}, {"fn": print}, {1: "x"}, {"t": torch.ones(1)}])
def test_b32_metadata_that_the_manifest_cannot_hold_is_refused_when_declared(metadata: dict[Any, Any]):
    """It failed after all files had been written, and there was no manifest."""
    with pytest.raises(DeclarationError, match="metadata"):
        StateComponent("model", Box({}), REPLICATED, metadata=metadata)


# ---- D. restoring


@pytest.mark.parametrize("strict", [True, False])
def test_b34_a_pattern_that_has_changed_between_runs_drops_no_state(strict: bool, tmp_path: Path):
    """Saved GLOBAL and loaded PER_RANK, even strictly, it was passed over: the data began at position 0."""

    def case(rank: int, world_size: int) -> Any:
        box = Box({"position": 7})
        with coordinator_of(tmp_path, [StateComponent("dataset", box, GLOBAL)]) as coordinator:
            coordinator.save_checkpoint(1)
        loading = coordinator_of(tmp_path, [StateComponent("dataset", box, PER_RANK, required=strict)])
        return refusal(lambda: loading.load_checkpoint(strict=strict))

    kind, message = the_same(values(run_ranks(2, case)))
    assert kind == "LoadMismatch"
    assert "component 'dataset' was saved as GLOBAL with global names, and is declared PER_RANK with local" in message


@pytest.mark.parametrize(("old", "new"), [(4, 2), (2, 4)])
def test_b35_another_world_size_is_resharded_or_refused(old: int, new: int, tmp_path: Path):
    """Nothing looked at it: from 4 to 2 ranks the state of two was lost, from 2 to 4 two started fresh."""

    def save(rank: int, world_size: int) -> None:
        components = [
            StateComponent("model", Box(sample("model")), REPLICATED),
            StateComponent("data", Box({"rank": rank}), PER_RANK),
        ]
        with coordinator_of(tmp_path, components) as coordinator:
            coordinator.save_checkpoint(1)

    def load(rank: int, world_size: int) -> Any:
        model, data = Box({}), Box({})
        loading = coordinator_of(
            tmp_path, [StateComponent("model", model, REPLICATED), StateComponent("data", data, PER_RANK)]
        )
        error = refusal(loading.load_checkpoint)
        untouched = (model.items, data.items)
        merge = StateComponent(
            "data", data, PER_RANK, on_resize=lambda saved, old, new: {"all": [state["rank"] for state in saved]}
        )
        coordinator_of(tmp_path, [StateComponent("model", model, REPLICATED), merge]).load_checkpoint()
        return error, untouched, is_same(model.items, sample("model")), data.items

    values(run_ranks(old, save))
    (kind, message), untouched, is_exact, data = the_same(values(run_ranks(new, load)))
    assert kind == "LoadMismatch"
    assert f"component 'data' (PER_RANK): it was saved by {old} ranks, now there are {new}" in message
    assert (untouched, is_exact, data) == (({}, {}), True, {"all": list(range(old))})


def test_b37_an_optional_component_that_fails_half_way_through_its_load_is_not_left_like_that(tmp_path: Path):
    """It stayed half-loaded, without an error."""

    class HalfWay(Box):
        def load_state_dict(self, state_dict: dict[Any, Any]) -> None:
            self.items["first"] = state_dict["first"]
            if self.fail_load:
                raise self.fail_load
            self.items["second"] = state_dict["second"]

    def case(rank: int, world_size: int) -> Any:
        box = HalfWay({"first": 1, "second": 1})
        component = StateComponent("extra", box, PER_RANK, required=False)
        with coordinator_of(tmp_path, [component]) as coordinator:
            coordinator.save_checkpoint(1)
            box.items = {"first": 2, "second": 2}
            box.fail_load = RuntimeError("half-way") if rank == 1 else None
            errors = [
                refusal(lambda: coordinator.load_checkpoint(strict=False)),
                refusal(lambda: coordinator.save_checkpoint(2)),
            ]
            box.fail_load = None
            coordinator.load_checkpoint()
        return errors, box.items

    (load, save), items = the_same(values(run_ranks(2, case)))
    assert "on rank 1: component 'extra': load_state_dict() raised RuntimeError: half-way" in load[1]
    assert "The live state of extra is now torn" in load[1]
    assert save[0] == "TornState"
    assert items == {"first": 1, "second": 1}


def test_b38_what_goes_wrong_on_any_rank_is_heard_on_all(tmp_path: Path):
    """The loggers were those of rank 0 alone: a file that rank 3 missed was logged nowhere."""

    def case(rank: int, world_size: int) -> Any:
        extra = Box({"x": 1})
        own = Box({"rank": torch.tensor(rank)})
        components = [
            StateComponent("extra", extra, PER_RANK, required=False),
            StateComponent("own", own, PER_RANK),
        ]
        with coordinator_of(tmp_path, components) as coordinator:
            coordinator.save_checkpoint(1)
            extra.fail_save = RuntimeError("only here") if rank == 3 else None
            coordinator.save_checkpoint(2)
            extra.fail_save = None
            open_to_read = files.open_to_read

            def fail(path: Path) -> int:
                if rank == 3 and path.name == "small-00003.safetensors":
                    raise FileNotFoundError(2, "No such file or directory", str(path))
                return open_to_read(path)

            with mock.patch.object(files, "open_to_read", fail):
                return refusal(lambda: coordinator.load_checkpoint(2)), dist.barrier()

    outcomes = run_ranks(4, case)
    (kind, message), _ = the_same(values(outcomes))
    assert kind == "StorageError"
    assert "failed on rank 3: " in message
    assert "small-00003.safetensors: No such file or directory" in message
    for outcome in outcomes:
        assert (
            "component 'extra' is left out of the checkpoint: on ranks 3: component 'extra': state_dict() raised "
            "RuntimeError: only here" in outcome.output
        )
