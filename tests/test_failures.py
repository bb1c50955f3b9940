"""Ranks that are killed, stopped, interrupted or broken at the worst moment: no mix, no hang, and the next save works."""

from __future__ import annotations

import errno
import itertools
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from forgather_ckpt import CheckpointCoordinator, SharingPattern, StateComponent, discovery, files
from tests.components import Box, Refusal, Trainer, is_same, listing, refusal, sample, the_same
from tests.ranks import run_ranks, values

pytestmark = pytest.mark.multiprocess

REPLICATED, GLOBAL, PER_RANK = SharingPattern.REPLICATED, SharingPattern.GLOBAL, SharingPattern.PER_RANK

# ---- SIGKILL before every call to the file system

FILE_SYSTEM_CALLS = [
    *((os, name) for name in ("open", "posix_fallocate", "ftruncate", "pwrite", "fsync", "mkdir", "rename")),
    *((os, name) for name in ("unlink", "rmdir")),
    (files, "exchange"),
]
BATCH = 6


def die_before_call(number: int) -> None:
    """SIGKILL this process before its `number`-th file-system call from now on, counted from 1."""
    calls = itertools.count(1)

    def counted(call: Any) -> Any:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if next(calls) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)

        return wrapper

    for owner, name in FILE_SYSTEM_CALLS:
        setattr(owner, name, counted(getattr(owner, name)))


def components_of(label: str, rank: int) -> list[StateComponent]:
    """State of one moment, to which every rank contributes, and that one process alone can load."""
    return [
        StateComponent("model", Box(sample(f"model {label}")), REPLICATED),
        StateComponent("progress", Box({"label": label}), GLOBAL),
        StateComponent("own", Box({f"own {rank}": sample(f"{label} {rank}")}), PER_RANK, names="global"),
    ]


def loaded_alone(run: Path) -> tuple[int, str]:
    """Step and label of what a fresh process loads; AssertionError where it is not the whole state of one moment."""
    components = [
        StateComponent("model", Box({}), REPLICATED),
        StateComponent("progress", Box({}), GLOBAL),
        StateComponent("own", Box({}), PER_RANK, names="global"),
    ]
    report = CheckpointCoordinator(components, run).load_checkpoint()
    model, progress, own = (component.stateful.items for component in components)
    label = progress["label"]
    assert is_same(model, sample(f"model {label}"))
    assert sorted(own) == ["own 0", "own 1"]
    assert all(is_same(own[f"own {rank}"], sample(f"{label} {rank}")) for rank in (0, 1))
    return report.step, label


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize(
    ("step", "can_exchange"),
    [(2, True), (1, True), (1, False)],
    ids=["new_step", "same_step_again", "same_step_without_exchange"],
)
def test_a_rank_killed_before_any_file_system_call_leaves_the_old_or_the_new_checkpoint(
    step: int, can_exchange: bool, victim: int, tmp_path: Path
):
    """Several jobs of two ranks run side by side, and die at calls of different numbers."""

    def case(number: int, _: int) -> Any:
        job, rank = divmod(number, 2)
        os.environ.update(RANK=str(rank), WORLD_SIZE="2")
        discovery._connections = itertools.count(1000 * job)
        if not can_exchange:
            mock.patch.object(files, "exchange", lambda one, other: False).start()
        trainer = Trainer(components_of("old", rank))
        with CheckpointCoordinator(trainer, tmp_path / str(first + job), timeout_seconds=600) as coordinator:
            coordinator.save_checkpoint(1)
            trainer.components = components_of("new", rank)
            if rank == victim:
                die_before_call(first + job)
                return coordinator.save_checkpoint(step).name
            try:
                return coordinator.save_checkpoint(step).name
            except Exception as err:
                return type(err).__name__, str(err)

    first = 1
    num_survived = 0
    while num_survived == 0:
        outcomes = run_ranks(2 * BATCH, case, backend=None, expect_dead=range(2 * BATCH))
        for job in range(BATCH):
            run = tmp_path / str(first + job)
            died, survived = outcomes[2 * job + victim], outcomes[2 * job + 1 - victim]
            assert survived.error is None
            assert not survived.is_dead
            loaded = loaded_alone(run)
            if not died.is_dead:  # its save takes fewer calls than that
                num_survived += 1
                assert died.value == f"checkpoint-{step}"
            if survived.value == f"checkpoint-{step}":
                assert loaded == (step, "new")
            else:
                assert died.is_dead
                kind, message = survived.value
                assert kind == "RankTimeout"
                assert f"rank {victim} (pid " in message
                assert message.endswith("died")
                assert loaded in ((1, "old"), (step, "new"))
            with CheckpointCoordinator(components_of("newer", 0), run) as coordinator:  # the next job
                coordinator.save_checkpoint(step)
            assert not [name for name in listing(run) if name.startswith(".")]
        first += BATCH
    assert first > 2 * BATCH  # rank 0 and rank 1 make more calls than the first batch


# ---- stopped and interrupted


@pytest.mark.parametrize("culprit", [0, 1, 2])
def test_a_rank_stopped_while_it_writes_fails_the_save_at_the_deadline(culprit: int, tmp_path: Path):
    def case(rank: int, world_size: int) -> Any:
        pids: list[Any] = [None] * world_size
        dist.all_gather_object(pids, os.getpid())
        trainer = Trainer([StateComponent("own", Box({"rank": torch.tensor(rank)}), PER_RANK)])
        with CheckpointCoordinator(trainer, tmp_path, timeout_seconds=1) as coordinator:
            coordinator.save_checkpoint(1)
            fsync, stops = os.fsync, [signal.SIGSTOP]

            def stop(descriptor: int) -> None:
                if stops:
                    os.kill(os.getpid(), stops.pop())
                fsync(descriptor)

            with mock.patch.object(os, "fsync", stop) if rank == culprit else nullcontext():
                error = refusal(lambda: coordinator.save_checkpoint(2))
            if rank == (culprit + 1) % world_size:
                time.sleep(0.5)  # so that every other rank has given up by itself
                os.kill(pids[culprit], signal.SIGCONT)
            dist.barrier()
            left = listing(tmp_path)
            dist.barrier()
            return error, left, coordinator.save_checkpoint(2).name

    error, left, after = the_same(values(run_ranks(3, case)))
    assert error[0] == "RankTimeout"
    assert ("rank 0" if culprit == 0 else f"no answer from rank {culprit} within 1 s") in error[1]
    assert (left, after) == (["checkpoint-1"], "checkpoint-2")


@pytest.mark.parametrize("culprit", [0, 1])
def test_a_keyboard_interrupt_in_a_save_ends_it_on_all_ranks(culprit: int, tmp_path: Path):
    def outcome_of(coordinator: CheckpointCoordinator, step: int) -> Any:
        try:
            return coordinator.save_checkpoint(step).name
        except KeyboardInterrupt:
            return "interrupted"
        except Exception as err:
            return type(err).__name__, str(err)

    def case(rank: int, world_size: int) -> Any:
        box = Box({"rank": torch.tensor(rank)})
        with CheckpointCoordinator(
            [StateComponent("own", box, PER_RANK)], tmp_path, timeout_seconds=600
        ) as coordinator:
            coordinator.save_checkpoint(0)
            interrupted = mock.patch.object(os, "fsync", side_effect=KeyboardInterrupt)
            with interrupted if rank == culprit else nullcontext():
                writing = outcome_of(coordinator, 1)
            box.fail_save = KeyboardInterrupt() if rank == culprit else None
            taking = outcome_of(coordinator, 1)
            box.fail_save = None
            dist.barrier()
            left = listing(tmp_path)
            dist.barrier()
            return taking, writing, left, outcome_of(coordinator, 1)

    results = values(run_ranks(3, case))
    clean = ["checkpoint-0"]
    assert results.pop(culprit) == ("interrupted", "interrupted", clean, "checkpoint-1")
    taking, writing, left, after = the_same(results)
    assert (left, after) == (clean, "checkpoint-1")
    for (kind, message), phase in ((taking, "comparing structures"), (writing, "writing the checkpoint")):
        assert kind == "RankFailed"
        assert message.startswith(f"{phase} failed on rank {culprit}: KeyboardInterrupt")


def test_a_keyboard_interrupt_in_a_load_leaves_the_state_torn(tmp_path: Path):
    def case(rank: int, world_size: int) -> Any:
        box = Box({"rank": torch.tensor(rank)})
        with CheckpointCoordinator(
            [StateComponent("own", box, PER_RANK)], tmp_path, timeout_seconds=600
        ) as coordinator:
            coordinator.save_checkpoint(1)
            box.fail_load = KeyboardInterrupt() if rank == 1 else None
            try:
                coordinator.load_checkpoint()
            except (KeyboardInterrupt, Exception) as err:
                outcome = type(err).__name__
            box.fail_load = None
            torn = refusal(lambda: coordinator.save_checkpoint(2))
            coordinator.load_checkpoint()
            return outcome, torn[0], coordinator.save_checkpoint(2).name

    results = values(run_ranks(2, case))
    assert results == [("RankFailed", "TornState", "checkpoint-2"), ("KeyboardInterrupt", "TornState", "checkpoint-2")]


# ---- the file system fails, or other ranks are slow


def test_a_directory_that_cannot_be_synced_after_the_rename_fails_the_save_and_harms_nothing(tmp_path: Path):
    """The rename may or may not survive power loss then: the caller is told, and a load gives one whole state."""

    def case(rank: int, world_size: int) -> Any:
        box = Box(sample("old"))
        results = []
        with CheckpointCoordinator(
            [StateComponent("model", box, REPLICATED)], tmp_path, timeout_seconds=30
        ) as coordinator:
            coordinator.save_checkpoint(1)
            box.items = sample("new")
            sync = files.sync_directory

            def fail(path: Path) -> None:
                if path == tmp_path:
                    raise OSError(errno.EIO, "Input/output error", str(path))
                sync(path)

            for step in (1, 2):  # exchanged; renamed
                with mock.patch.object(files, "sync_directory", fail) if rank == 0 else nullcontext():
                    results.append(refusal(lambda step=step: coordinator.save_checkpoint(step)))
                box.items = {}
                coordinator.load_checkpoint(1)
                results.append(is_same(box.items, sample("new")) or is_same(box.items, sample("old")))
                box.items = sample("new")
                results.append(coordinator.save_checkpoint(step).name)
        return results

    first, is_whole, after, second, *rest = the_same(values(run_ranks(2, case)))
    assert first[0] == second[0] == "StorageError"
    assert first[1].startswith("committing the checkpoint failed at ")
    assert (is_whole, after, *rest) == (True, "checkpoint-1", True, "checkpoint-2")
    # the exchanged one, which may be the only durable one, is kept until the next job has the run directory
    assert [name for name in listing(tmp_path) if not name.startswith(".tmp-checkpoint-1-")] == [
        "checkpoint-1",
        "checkpoint-2",
    ]
    with CheckpointCoordinator([], tmp_path) as coordinator:
        coordinator.save_checkpoint(3)
    assert listing(tmp_path) == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]


def test_a_rank_that_still_writes_while_a_failed_save_is_swept_leaves_nothing_behind(tmp_path: Path):
    """Rank 0 sweeps as soon as rank 1 has failed; rank 2 creates a file just then."""

    def case(rank: int, world_size: int) -> Any:
        signs = tmp_path.parent / "signs"
        signs.mkdir(exist_ok=True)
        rmdir, create = os.rmdir, files.create

        def rmdir_late(path: Any, **where: Any) -> None:
            (signs / "sweeping").touch()
            wait_for(signs / "created")
            rmdir(path, **where)

        def create_late(path: Path, size: int) -> int:
            wait_for(signs / "sweeping")
            try:
                return create(path, size)
            finally:
                (signs / "created").touch()

        own = Box({"rank": torch.tensor(rank)})
        with CheckpointCoordinator([StateComponent("own", own, PER_RANK)], tmp_path, timeout_seconds=30) as coordinator:
            coordinator.save_checkpoint(1)
            broken = OSError(errno.EIO, "Input/output error")
            patches = {
                0: mock.patch.object(os, "rmdir", rmdir_late),
                1: mock.patch.object(os, "fsync", side_effect=broken),
                2: mock.patch.object(files, "create", create_late),
            }
            with patches[rank]:
                error = refusal(lambda: coordinator.save_checkpoint(2))
            dist.barrier()
            return error, listing(tmp_path)

    (kind, message), left = the_same(values(run_ranks(3, case)))
    assert (kind, left) == ("StorageError", ["checkpoint-1"])
    assert "failed on rank 1: " in message


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 20
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.01)


# ---- loads


class Collective(Box):
    """A stateful like those of FSDP or ZeRO: taking and giving its state is a collective of all ranks."""

    def state_dict(self) -> dict[Any, Any]:
        self.meet()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[Any, Any]) -> None:
        self.meet()
        super().load_state_dict(state_dict)

    def meet(self) -> None:
        total = torch.ones(())
        dist.all_reduce(total)
        assert total.item() == dist.get_world_size()


@contextmanager
def broken_reads(name: str) -> Iterator[None]:
    open_to_read = files.open_to_read

    def fail(path: Path) -> int:
        if path.name.startswith(name):
            raise OSError(errno.EIO, "Input/output error", str(path))
        return open_to_read(path)

    with mock.patch.object(files, "open_to_read", fail):
        yield


def test_collectives_in_loading_are_entered_by_all_ranks_or_by_none(tmp_path: Path):
    """Whatever fails on one rank before, after, or instead of them."""

    def case(rank: int, world_size: int) -> Any:
        before, collective, after = Box(sample("a")), Collective(sample("b")), Box(sample("c"))
        boxes = {"before": before, "collective": collective, "after": after}
        components = [StateComponent(key, box, REPLICATED) for key, box in boxes.items()]
        results: list[Any] = []
        with CheckpointCoordinator(components, tmp_path, timeout_seconds=600) as coordinator:
            coordinator.save_checkpoint(1)
            for culprit, staged in itertools.product(range(world_size), (False, True)):
                for box in (before, after):
                    box.fail_load = RuntimeError("it does not fit") if rank == culprit else None
                    results.append(refusal(lambda staged=staged: coordinator.load_checkpoint(1, staged=staged)))
                    box.fail_load = None
                for what in ("index", "small"):
                    with broken_reads(what) if rank == culprit else nullcontext():
                        results.append(refusal(lambda staged=staged: coordinator.load_checkpoint(1, staged=staged)))
                results.append(coordinator.load_checkpoint(1).step)
            results.append(
                [is_same(box.items, sample(label)) for box, label in zip(boxes.values(), "abc", strict=True)]
            )
        return results

    *results, are_same = the_same(values(run_ranks(3, case)))
    assert are_same == [True, True, True]
    for number, (culprit, _) in enumerate(itertools.product(range(3), (False, True))):
        early, late, index, data, step = results[5 * number : 5 * number + 5]
        assert [error[0] for error in (early, late, index, data)] == ["LoadMismatch"] * 2 + ["StorageError"] * 2
        assert all(f"failed on rank {culprit}: " in error[1] for error in (early, late, index, data))
        assert step == 1


def test_a_fallback_that_lacks_a_component_which_was_touched_leaves_it_torn(tmp_path: Path):
    """It would otherwise hold bytes of the damaged checkpoint beside the older one's: a mix."""

    def case(rank: int, world_size: int) -> Any:
        model, extra = Box(sample("model 1")), Box(sample("extra 1"))
        components = [
            StateComponent("extra", extra, REPLICATED, required=False),
            StateComponent("model", model, REPLICATED),
        ]
        results: list[Any] = []
        with CheckpointCoordinator(components, tmp_path, timeout_seconds=30) as coordinator:
            extra.fail_save = RuntimeError("not now")
            coordinator.save_checkpoint(1)
            extra.fail_save = None
            model.items, extra.items = sample("model 2"), sample("extra 2")
            coordinator.save_checkpoint(2)
            with broken_in_checkpoint_2() if rank == 1 else nullcontext():
                results.append(refusal(coordinator.load_checkpoint))
                results.append(refusal(lambda: coordinator.save_checkpoint(3)))
                # staged, nothing of the damaged one is touched: the older one is all there is to it
                results.append(coordinator.load_checkpoint(1).skipped)
                results.append(refusal(lambda: coordinator.save_checkpoint(3))[0])
            coordinator.load_checkpoint(2)
            with broken_in_checkpoint_2() if rank == 1 else nullcontext():
                report = coordinator.load_checkpoint(staged=True)
            results += [report.step, report.skipped, is_same(model.items, sample("model 1"))]
            results += [is_same(extra.items, sample("extra 2")), coordinator.save_checkpoint(3).name]
        return results

    @contextmanager
    def broken_in_checkpoint_2() -> Iterator[None]:
        open_to_read = files.open_to_read

        def fail(path: Path) -> int:
            if path.parent.name == "checkpoint-2" and path.suffix == ".safetensors":
                raise OSError(errno.EIO, "Input/output error", str(path))
            return open_to_read(path)

        with mock.patch.object(files, "open_to_read", fail):
            yield

    load, save, skipped, again, *staged = the_same(values(run_ranks(2, case)))
    assert load[0] == "TornState"
    assert "step 1 was loaded instead of a damaged one, but does not have extra" in load[1]
    assert (save[0], "extra is torn" in save[1]) == ("TornState", True)
    assert "left out when it was saved" in skipped["extra"]
    assert again == "TornState"
    step, told, *rest = staged
    assert (step, list(told), rest) == (1, ["extra"], [True, True, "checkpoint-3"])


def test_a_torn_load_is_the_same_error_on_ranks_that_hold_nothing(tmp_path: Path):
    def case(rank: int, world_size: int) -> list[Refusal]:
        reader = Box(sample("data"))
        model = Box(sample("model"))
        components = [
            StateComponent("data", reader if rank == 0 else None, GLOBAL),
            StateComponent("model", model, REPLICATED),
        ]
        with CheckpointCoordinator(components, tmp_path, timeout_seconds=30) as coordinator:
            coordinator.save_checkpoint(1)
            model.fail_load = RuntimeError("it does not fit") if rank == 2 else None
            return [refusal(coordinator.load_checkpoint), refusal(lambda: coordinator.save_checkpoint(2))]

    (load, message), (save, _) = the_same(values(run_ranks(3, case)))
    assert (load, save) == ("LoadMismatch", "TornState")
    assert "The live state of data, model is now torn" in message
