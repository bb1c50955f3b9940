"""Several nodes, simulated by the launcher's group rank: owners, loads, and what happens when sets are not found again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from forgather_ckpt import CheckpointCoordinator, CheckpointManifest, SharingPattern, StateComponent, Topology
from tests.components import Box, Refusal, is_same, refusal, sample, the_same
from tests.ranks import run_ranks, values

pytestmark = pytest.mark.multiprocess

GLOBAL, PER_NODE, PER_GROUP, PER_RANK = (
    SharingPattern.GLOBAL,
    SharingPattern.PER_NODE,
    SharingPattern.PER_GROUP,
    SharingPattern.PER_RANK,
)


def across(rank: int) -> dict[str, Any]:
    """Groups (0, 2) and (1, 3): one member on each of two nodes of two ranks."""
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    return {"across": groups[rank % 2]}


@pytest.mark.parametrize(
    ("nodes", "leaders"), [([2, 2], [0, 0, 2, 2]), ([3, 1], [0, 0, 0, 3]), ([1, 1, 2], [0, 1, 2, 2])]
)
def test_each_pattern_has_the_right_owners_and_gives_the_right_state_back(
    nodes: list[int], leaders: list[int], tmp_path: Path
):
    def case(rank: int, world_size: int) -> list[bool]:
        own, group = sample(f"rank {rank}"), sample(f"group {rank % 2}")
        boxes = {"global": Box(own), "node": Box(own), "group": Box(group), "rank": Box(own)}
        components = [
            StateComponent("global", boxes["global"], GLOBAL),
            StateComponent("node", boxes["node"], PER_NODE),
            StateComponent("group", boxes["group"], PER_GROUP, "across"),
            StateComponent("rank", boxes["rank"], PER_RANK),
        ]
        with CheckpointCoordinator(
            components, tmp_path, process_groups=across(rank), timeout_seconds=30
        ) as coordinator:
            coordinator.save_checkpoint(1)
            for box in boxes.values():
                box.items = sample("before")
            coordinator.load_checkpoint()
        expected = {"global": sample("rank 0"), "node": sample(f"rank {leaders[rank]}"), "group": group, "rank": own}
        return [is_same(boxes[key].items, state) for key, state in expected.items()]

    assert values(run_ranks(4, case, nodes=nodes)) == [[True] * 4] * 4
    manifest = CheckpointManifest.load(tmp_path / "checkpoint-1")
    of_nodes = [[rank for rank in range(4) if leaders[rank] == leader] for leader in sorted(set(leaders))]
    assert manifest.topology.node_source == "torchrun group rank"
    assert manifest.topology.nodes == tuple(map(tuple, of_nodes))
    owners = {
        key: {name: (list(entry.ranks), list(entry.writers)) for name, entry in record.entries.items()}
        for key, record in manifest.components.items()
    }
    assert owners["global"] == {"all": ([0, 1, 2, 3], [0])}
    assert owners["node"] == {f"node={n}": (ranks, ranks[:1]) for n, ranks in enumerate(of_nodes)}
    assert owners["group"] == {"across=0": ([0, 2], [0, 2]), "across=1": ([1, 3], [1, 3])}
    assert owners["rank"] == {f"rank={rank}": ([rank], [rank]) for rank in range(4)}


def test_a_node_whose_leader_holds_nothing_has_no_entry(tmp_path: Path):
    def case(rank: int, world_size: int) -> Any:
        box = Box({"rank": rank})
        holding = [StateComponent("cache", box if rank != 2 else None, PER_NODE)]
        with CheckpointCoordinator(holding, tmp_path, timeout_seconds=30) as coordinator:
            coordinator.save_checkpoint(1)
            error = refusal(coordinator.load_checkpoint)  # rank 3 wants what its node has not stored
        holding = [StateComponent("cache", box if rank < 2 else None, PER_NODE)]
        with CheckpointCoordinator(holding, tmp_path, timeout_seconds=30) as coordinator:
            coordinator.load_checkpoint()
        return error, box.items["rank"]

    results = values(run_ranks(4, case, nodes=[2, 2]))
    assert [rank for _, rank in results] == [0, 0, 2, 3]
    kind, message = the_same([error for error, _ in results])
    assert kind == "LoadMismatch"
    assert "on rank 3: component 'cache': the checkpoint has no state for 'node=1'" in message


# ---- sets that are not found again


def saved_by(ranks: int, nodes: list[int] | None, pattern: SharingPattern, run: Path) -> None:
    """A checkpoint of one component whose entries say which rank they come from, and a second, global one."""

    def case(rank: int, world_size: int) -> None:
        components = [
            StateComponent("part", Box({"rank": rank, "tensor": torch.full((2,), rank)}), pattern),
            StateComponent("progress", Box({"step": 1}), GLOBAL),
        ]
        with CheckpointCoordinator(components, run, timeout_seconds=30) as coordinator:
            coordinator.save_checkpoint(1)

    values(run_ranks(ranks, case, nodes=nodes, backend=None))


def gather_ranks(saved: Any, old: Topology, new: Topology) -> dict[str, Any]:
    return {
        "ranks": [state["rank"] for state in saved],
        "tensors": [state["tensor"].tolist() for state in saved],
        "old": (old.world_size, old.nodes),
        "new": (new.world_size, new.nodes, new.rank),
    }


RESIZES = [
    (PER_NODE, (4, [2, 2]), (4, [4]), [0, 2], "it was saved on 2 nodes, now there are 1"),
    (PER_NODE, (4, [2, 2]), (4, [1, 1, 2]), [0, 2], "it was saved on 2 nodes, now there are 3"),
    (PER_NODE, (3, [1, 1, 1]), (2, [1, 1]), [0, 1, 2], "it was saved on 3 nodes, now there are 2"),
    (PER_RANK, (4, [4]), (2, [2]), [0, 1, 2, 3], "it was saved by 4 ranks, now there are 2"),
    # in the order of ranks, where the names of the entries would sort as 0, 1, 10, 11, 2, …
    (PER_RANK, (12, [12]), (1, [1]), list(range(12)), "it was saved by 12 ranks, now there are 1"),
]


@pytest.mark.parametrize(
    ("pattern", "saved", "now", "ranks", "reason"),
    RESIZES,
    ids=[f"{pattern}-{saved[1]}-to-{now[1]}".replace(" ", "") for pattern, saved, now, _, _ in RESIZES],
)
def test_on_resize_decides_where_the_number_of_sets_has_changed(
    pattern: SharingPattern,
    saved: tuple[int, list[int]],
    now: tuple[int, list[int]],
    ranks: list[int],
    reason: str,
    tmp_path: Path,
):
    saved_by(*saved, pattern, tmp_path)

    def fail(*_: Any) -> Any:
        raise KeyError("cannot merge")

    def case(rank: int, world_size: int) -> Any:
        box, progress = Box({"fresh": rank}), Box({})
        results: list[Any] = []
        for rule in ("error", "drop", gather_ranks, fail):
            components = [
                StateComponent("part", box, pattern, on_resize=rule),
                StateComponent("progress", progress, GLOBAL),
            ]
            coordinator = CheckpointCoordinator(components, tmp_path, timeout_seconds=30)
            if rule in ("error", fail):
                results.append(refusal(coordinator.load_checkpoint))
            else:
                report = coordinator.load_checkpoint()
                results.append((report.loaded, dict(report.skipped), progress.items, box.items))
        return rank, results

    outcomes = run_ranks(now[0], case, nodes=now[1])
    for outcome in outcomes:
        assert f"component 'part' was not loaded: starts fresh (on_resize='drop'): {reason}" in outcome.output
    for rank, (error, drop, merged, failed) in values(outcomes):
        assert error[0] == "LoadMismatch"
        assert f"component 'part' ({pattern.name}): {reason}. Choose on_resize" in error[1]
        loaded, skipped, progress, items = drop
        assert (loaded, progress, items) == (("progress",), {"step": 1}, {"fresh": rank})
        assert skipped == {"part": f"starts fresh (on_resize='drop'): {reason}"}
        loaded, skipped, progress, items = merged
        assert (loaded, skipped) == (("part", "progress"), {})
        assert items["ranks"] == ranks
        assert items["tensors"] == [[old, old] for old in ranks]
        assert items["old"][0] == saved[0]
        assert items["old"][1] == node_ranks(saved[1])
        assert items["new"] == (now[0], node_ranks(now[1]), rank)
        assert failed[0] == "LoadMismatch"
        assert "component 'part': on_resize() raised KeyError: 'cannot merge'" in failed[1]


def node_ranks(nodes: list[int]) -> tuple[tuple[int, ...], ...]:
    starts = [sum(nodes[:number]) for number in range(len(nodes))]
    return tuple(tuple(range(start, start + count)) for start, count in zip(starts, nodes, strict=True))


def test_the_same_number_of_nodes_with_other_ranks_is_no_resize(tmp_path: Path):
    saved_by(4, [3, 1], PER_NODE, tmp_path)

    def case(rank: int, world_size: int) -> int:
        box = Box({})
        components = [StateComponent("part", box, PER_NODE), StateComponent("progress", Box({}), GLOBAL)]
        CheckpointCoordinator(components, tmp_path, timeout_seconds=30).load_checkpoint()
        return box.items["rank"]

    assert values(run_ranks(3, case, nodes=[1, 2])) == [0, 3, 3]


def test_a_rank_that_holds_nothing_is_not_asked_to_resize(tmp_path: Path):
    saved_by(2, None, PER_RANK, tmp_path)

    def case(rank: int, world_size: int) -> Any:
        box = Box({"fresh": rank})
        components = [
            StateComponent("part", box if rank else None, PER_RANK, on_resize=gather_ranks),
            StateComponent("progress", Box({}), GLOBAL),
        ]
        CheckpointCoordinator(components, tmp_path, timeout_seconds=30).load_checkpoint()
        return box.items.get("ranks", box.items)

    assert values(run_ranks(3, case)) == [{"fresh": 0}, [0, 1], [0, 1]]


def test_bare_process_groups_are_found_again_by_their_exact_members_only(tmp_path: Path):
    def case(rank: int, world_size: int) -> list[Any]:
        def groups(*members: list[int]) -> dict[str, Any]:
            made = [dist.new_group(ranks) for ranks in members]
            return {"dp": next(group for group, ranks in zip(made, members, strict=True) if rank in ranks)}

        def coordinator(process_groups: dict[str, Any], on_resize: Any = "error") -> CheckpointCoordinator:
            components = [StateComponent("part", box, PER_GROUP, "dp", on_resize=on_resize)]
            return CheckpointCoordinator(components, tmp_path, process_groups=process_groups, timeout_seconds=30)

        box = Box({"group": rank // 2})
        with coordinator(groups([0, 1], [2, 3])) as saving:
            saving.save_checkpoint(1)
        results: list[Any] = []
        box.items = {}
        coordinator(groups([2, 3], [0, 1])).load_checkpoint()  # in another order
        results.append(box.items == {"group": rank // 2})
        other = groups([0, 2], [1, 3])
        results.append(refusal(coordinator(other).load_checkpoint))
        coordinator(other, lambda saved, old, new: {"saved": [one["group"] for one in saved]}).load_checkpoint()
        results.append(box.items)
        return results

    found, (kind, message), merged = the_same(values(run_ranks(4, case)))
    assert (found, kind, merged) == (True, "LoadMismatch", {"saved": [0, 1]})
    own = ("'dp=0' (ranks 0, 2)", "'dp=1' (ranks 1, 3)")  # of the rank that was first to say so
    assert any(f"no saved group is {group}; saved: dp=0 (ranks 0-1); dp=1 (ranks 2-3)" in message for group in own)


def test_a_resize_on_one_rank_only_is_an_error_on_all(tmp_path: Path):
    """Uneven groups of which one is found again: no rank goes on with a part."""

    def case(rank: int, world_size: int) -> tuple[Refusal, dict[str, Any]]:
        first, second = dist.new_group([0, 1]), dist.new_group([2])
        box = Box({"group": rank // 2})
        components = [StateComponent("part", box, PER_GROUP, "dp")]
        groups = {"dp": first if rank < 2 else second}
        with CheckpointCoordinator(components, tmp_path, process_groups=groups, timeout_seconds=30) as coordinator:
            coordinator.save_checkpoint(1)
        small, rest = dist.new_group([0]), dist.new_group([2])
        box.items = {}
        components = [StateComponent("part", None if rank == 1 else box, PER_GROUP, "dp")]
        groups = {"dp": small if rank == 0 else rest if rank == 2 else None}
        loading = CheckpointCoordinator(components, tmp_path, process_groups=groups, timeout_seconds=30)
        return refusal(loading.load_checkpoint), box.items

    (kind, message), items = the_same(values(run_ranks(3, case)))
    assert (kind, items) == ("LoadMismatch", {})
    assert "component 'part' (PER_GROUP): no saved group is 'dp=" in message
