"""Ranks that break, die or stop in each phase of the replication check: one error for all that names them, no hang, and
the next check works."""

from __future__ import annotations

import itertools
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from forgather_ckpt import (
    CheckpointCoordinator,
    SharingPattern,
    StateComponent,
    bulk,
    bytewise,
    check,
    digests,
    discovery,
    elements,
    mismatch,
)
from tests.components import Box, listing, refusal, the_same
from tests.ranks import run_ranks, values

pytestmark = pytest.mark.multiprocess

REPLICATED, PER_GROUP = SharingPattern.REPLICATED, SharingPattern.PER_GROUP

PLACES: dict[str, tuple[Any, str, str]] = {
    "roots": (digests, "begin", "comparing the copies"),
    "making a group": (bulk, "_group", "comparing all bytes"),
    "all bytes": (bytewise, "_bytes", "comparing all bytes"),
    "leaves": (mismatch, "_leaf_column", "finding the items that differ"),
    "items": (mismatch, "_description", "describing the items that differ"),
    "measuring": (elements, "measure", "measuring the differences"),
}
"""Where things go wrong: what is called in each phase, and what errors call the phase."""

NUM_RANKS = 4


@contextmanager
def happening(place: str, what: Callable[[], None]) -> Iterator[None]:
    """`what` happens at the first call in a place."""
    owner, name, _ = PLACES[place]
    call, left = getattr(owner, name), [what]

    def wrapper(*args: Any, **options: Any) -> Any:
        if left:
            left.pop()()
        return call(*args, **options)

    with mock.patch.object(owner, name, wrapper):
        yield


def differing(rank: int, culprit: int) -> list[Box]:
    """States that are equal, and that differ on the culprit, so that it has a part in every phase."""
    return [Box({"same": torch.arange(100_000.0)}), Box({"weight": torch.full((5,), float(rank == culprit))})]


def components(boxes: list[Box]) -> list[StateComponent]:
    return [
        StateComponent(key, box, REPLICATED, validation_level="full")
        for key, box in zip(("equal", "model"), boxes, strict=True)
    ]


# ---- exceptions


@pytest.mark.parametrize("backend", ["gloo", None])
def test_what_is_raised_in_any_phase_is_everybodys_error_and_the_next_check_works(backend: str | None, tmp_path: Path):
    culprits = (0, 2)

    def case(rank: int, world_size: int) -> Any:
        boxes = differing(rank, culprits[0])
        results: list[Any] = []

        def fail() -> None:
            raise ValueError("a broken rank")

        with CheckpointCoordinator(components(boxes), tmp_path, timeout_seconds=600) as coordinator:
            for culprit, place in itertools.product(culprits, PLACES):
                if place == "measuring":
                    continue
                boxes[1].items = differing(rank, culprit)[1].items
                coordinator._job.channels.close()  # so that each case makes its own
                with happening(place, fail) if rank == culprit else nullcontext():
                    results.append(refusal(lambda: coordinator.save_checkpoint(1)))
                results.append(len(coordinator.validate_replication()["model"].differences))
            boxes[1].items["weight"] = torch.zeros(5)
            results.append(coordinator.validate_replication("full")["model"].is_equal)
            results.append(coordinator.save_checkpoint(2).name)
        return results

    *failed, is_equal, after = the_same(values(run_ranks(NUM_RANKS, case, backend=backend)))
    assert (is_equal, after) == (True, "checkpoint-2")
    places = [place for place in PLACES if place != "measuring"]
    for (culprit, place), (kind, message), num_sets in zip(
        itertools.product(culprits, places), failed[::2], failed[1::2], strict=True
    ):
        assert kind == "RankFailed"
        assert message == f"{PLACES[place][2]} failed on rank {culprit}: ValueError: a broken rank"
        assert num_sets == 1  # the next check went through all phases
    assert listing(tmp_path) == ["checkpoint-2", "replication-report.json"]


@pytest.mark.parametrize("culprit", [0, 2])
def test_figures_that_cannot_be_taken_do_not_hide_what_differs(culprit: int, tmp_path: Path):
    def case(rank: int, world_size: int) -> Any:
        boxes = differing(rank, culprit)

        def fail() -> None:
            raise MemoryError("no room for figures")

        with CheckpointCoordinator(components(boxes), tmp_path, timeout_seconds=600) as coordinator:
            with happening("measuring", fail) if rank == culprit else nullcontext():
                error = refusal(lambda: coordinator.save_checkpoint(1))
            with happening("measuring", fail) if rank == culprit else nullcontext():
                report = coordinator.validate_replication()["model"]
            [difference] = report.differences
            again = coordinator.validate_replication()["model"].differences[0]
            told = [(copy.ranks, copy.elements) for item in difference.items for copy in item.minorities]
            measured = [copy.elements.max_abs for item in again.items for copy in item.minorities]
            return error, told, difference.num_not_measured, "1 tensor not compared" in report.text(), measured

    outcomes = run_ranks(NUM_RANKS, case)
    (kind, message), told, num_not_measured, is_said, measured = the_same(values(outcomes))
    assert kind == "ReplicaMismatch"
    majority = "ranks [1-3]" if culprit == 0 else "ranks [0-1, 3]"
    assert f"'model' differs between {majority} and rank {culprit} at 'weight'; expected" in message
    assert told == [((culprit,), None)]
    assert (num_not_measured, is_said) == (1, True)
    assert measured == [1.0]
    for outcome in outcomes:
        assert "the differences could not be measured" in outcome.output
        assert f"failed on rank {culprit}: MemoryError: no room for figures" in outcome.output


@pytest.mark.parametrize("decision", [(check, "_decide"), (mismatch, "_differing_places"), (mismatch, "_items")])
def test_a_decision_that_fails_on_rank_0_fails_on_all(decision: tuple[Any, str], tmp_path: Path):
    def case(rank: int, world_size: int) -> Any:
        with CheckpointCoordinator(components(differing(rank, 1)), tmp_path, timeout_seconds=600) as coordinator:
            with mock.patch.object(*decision, side_effect=KeyError("weight")):
                error = refusal(coordinator.validate_replication)
            return error, coordinator.validate_replication()["model"].is_equal

    (kind, message), is_equal = the_same(values(run_ranks(3, case)))
    assert (kind, is_equal) == ("RankFailed", False)
    assert "failed on rank 0: KeyError: 'weight'" in message


@pytest.mark.parametrize("culprit", [0, 2])
def test_an_interrupt_in_any_phase_ends_the_check_on_all_ranks(culprit: int, tmp_path: Path):
    """Also where an error would not hide what differs: nobody may wait for a rank that has left."""
    places = list(PLACES)

    def case(rank: int, world_size: int) -> Any:
        boxes = differing(rank, culprit)
        results: list[Any] = []

        def interrupt() -> None:
            raise KeyboardInterrupt

        with CheckpointCoordinator(components(boxes), tmp_path, timeout_seconds=600) as coordinator:
            for place in places:
                coordinator._job.channels.close()
                with happening(place, interrupt) if rank == culprit else nullcontext():
                    try:
                        results.append(coordinator.validate_replication())
                    except KeyboardInterrupt:
                        results.append("interrupted")
                    except Exception as err:
                        results.append((type(err).__name__, str(err)))
                results.append(coordinator.validate_replication()["model"].differences[0].majority)
        return results

    others = tuple(rank for rank in range(NUM_RANKS) if rank != culprit)
    results = values(run_ranks(NUM_RANKS, case, timeout=60))
    assert results.pop(culprit) == ["interrupted", others] * len(places)
    told = the_same(results)
    assert told[1::2] == [others] * len(places)
    for place, (kind, message) in zip(places, told[::2], strict=True):
        assert kind == "RankFailed"
        assert f"on rank {culprit}: " in message
        assert "KeyboardInterrupt" in message, place


@pytest.mark.parametrize("what", ["disk", "bug"])
def test_a_report_that_cannot_be_written_does_not_hide_what_differs(what: str, tmp_path: Path):
    def case(rank: int, world_size: int) -> Any:
        error = OSError(28, "No space left on device") if what == "disk" else ValueError("a surprise")
        coordinator = CheckpointCoordinator(components(differing(rank, 1)), tmp_path, timeout_seconds=600)
        with coordinator, mock.patch.object(check.files, "replace", side_effect=error):
            return refusal(lambda: coordinator.save_checkpoint(1))

    kind, message = the_same(values(run_ranks(NUM_RANKS, case)))
    if what == "disk":
        assert (kind, "at 'weight'" in message) == ("ReplicaMismatch", True)
    else:
        assert (kind, "failed on rank 0: ValueError: a surprise" in message) == ("RankFailed", True)
    assert listing(tmp_path) == []


# ---- dead and stopped ranks


def in_jobs(case: Callable[[str, Path, int], Any], run: Path, *, timeout_seconds: float) -> dict[str, list[Any]]:
    """Run `case(place, run, rank)` as one job for each place, side by side; outcomes by place."""
    places = list(PLACES)

    def rank_of_job(number: int, _: int) -> Any:
        job, rank = divmod(number, NUM_RANKS)
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(NUM_RANKS))
        discovery._connections = itertools.count(1000 * job)
        return case(places[job], run / str(job), rank)

    num_processes = NUM_RANKS * len(places)
    outcomes = run_ranks(
        num_processes, rank_of_job, backend=None, expect_dead=range(num_processes), timeout=timeout_seconds
    )
    return {place: outcomes[NUM_RANKS * job : NUM_RANKS * (job + 1)] for job, place in enumerate(places)}


@pytest.mark.parametrize("culprit", [0, 1])
def test_a_rank_killed_in_any_phase_is_named_by_all_others(culprit: int, tmp_path: Path):
    """With a deadline that nobody may wait for."""

    def case(place: str, run: Path, rank: int) -> Any:
        def die() -> None:
            os.kill(os.getpid(), signal.SIGKILL)

        coordinator = CheckpointCoordinator(components(differing(rank, culprit)), run, timeout_seconds=600)
        with coordinator, happening(place, die) if rank == culprit else nullcontext():
            return refusal(lambda: coordinator.save_checkpoint(1))

    for place, outcomes in in_jobs(case, tmp_path, timeout_seconds=60).items():
        died = outcomes.pop(culprit)
        assert died.exitcode == -signal.SIGKILL, place
        kind, message = the_same(values(outcomes))
        assert kind == "RankTimeout", (place, message)
        assert f"rank {culprit} (pid " in message, (place, message)
        assert message.endswith("died"), (place, message)
    for number in range(len(PLACES)):
        assert not [name for name in listing(tmp_path / str(number)) if name.startswith(("checkpoint-", ".tmp"))]


@pytest.mark.parametrize("culprit", [0, 1])
def test_a_rank_stopped_in_any_phase_is_named_at_the_deadline_and_may_go_on_later(culprit: int, tmp_path: Path):
    def case(place: str, run: Path, rank: int) -> Any:
        def stop() -> None:
            os.kill(os.getpid(), signal.SIGSTOP)

        boxes = differing(rank, culprit)
        with CheckpointCoordinator(components(boxes), run, timeout_seconds=2) as coordinator:
            with happening(place, stop) if rank == culprit else nullcontext():
                error = refusal(lambda: coordinator.save_checkpoint(1))
            if rank == (culprit + 1) % NUM_RANKS:
                time.sleep(1.0)  # so that every other rank has given up by itself
                os.kill(coordinator._job.comm._processes[culprit].pid, signal.SIGCONT)
            boxes[1].items = {"weight": torch.zeros(3)}
            return error, coordinator.save_checkpoint(2).name

    for place, outcomes in in_jobs(case, tmp_path, timeout_seconds=100).items():
        (kind, message), after = the_same(values(outcomes))
        assert after == "checkpoint-2"
        assert kind == "RankTimeout", (place, message)
        assert f"from rank {culprit} within" in message, (place, message)


@pytest.mark.parametrize("culprit", [2, 3])
def test_a_member_that_dies_in_a_transfer_is_named_and_not_the_one_whose_connection_broke(culprit: int, tmp_path: Path):
    """Rank 2 sends and rank 3 receives; rank 0 hears of it from the survivor, who sees a connection closed."""

    def case(rank: int, world_size: int) -> Any:
        def die() -> None:
            os.kill(os.getpid(), signal.SIGKILL)

        part = Box({"stage": rank // 2, "weight": torch.zeros(5)})
        component = StateComponent("part", part, PER_GROUP, "pair", validation_level="full")
        groups = {"pair": [dist.new_group([0, 1]), dist.new_group([2, 3])][rank // 2]}
        coordinator = CheckpointCoordinator([component], tmp_path, process_groups=groups, timeout_seconds=600)
        with coordinator, happening("all bytes", die) if rank == culprit else nullcontext():
            return refusal(coordinator.validate_replication)

    kind, message = the_same(values(run_ranks(NUM_RANKS, case, expect_dead=[culprit])))
    assert kind == "RankTimeout"
    assert f"rank {culprit} (pid " in message
    assert message.endswith("died")


@pytest.mark.parametrize("place", ["making a group", "all bytes"])
def test_of_a_group_that_waits_for_a_stopped_member_the_member_is_named(place: str, tmp_path: Path):
    """Not the one that waits for it, whom rank 0, of another group and done, hears nothing from either."""
    culprit = 3

    def case(rank: int, world_size: int) -> Any:
        def stop() -> None:
            os.kill(os.getpid(), signal.SIGSTOP)

        part = Box({"stage": rank // 2, "weight": torch.zeros(5)})
        component = StateComponent("part", part, PER_GROUP, "pair", validation_level="full")
        groups = {"pair": [dist.new_group([0, 1]), dist.new_group([2, 3])][rank // 2]}
        with CheckpointCoordinator([component], tmp_path, process_groups=groups, timeout_seconds=2) as coordinator:
            with happening(place, stop) if rank == culprit else nullcontext():
                error = refusal(coordinator.validate_replication)
            if rank == 2:
                time.sleep(1.0)  # so that every other rank has given up by itself
                os.kill(coordinator._job.comm._processes[culprit].pid, signal.SIGCONT)
            return error, coordinator.validate_replication()["part"].is_equal

    (kind, message), is_equal = the_same(values(run_ranks(NUM_RANKS, case, timeout=60)))
    assert (kind, is_equal) == ("RankTimeout", True)
    assert f"from rank {culprit} within" in message
