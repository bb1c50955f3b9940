"""Every sharing pattern, on 1 to 8 ranks: exact saves and loads, changed patterns, and a failure of any rank in any phase."""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist

from forgather_ckpt import CheckpointCoordinator, CheckpointManifest, SharingPattern, StateComponent
from forgather_ckpt import files as files_module
from forgather_ckpt.container import header_size
from tests.components import Box, Refusal, Trainer, is_same, label_of, listing, refusal, sample, the_same
from tests.ranks import run_ranks, values

pytestmark = pytest.mark.multiprocess

PATTERNS = list(SharingPattern)
WORLD_SIZES = [1, 2, 4, 8]
GROUP = {SharingPattern.PER_GROUP: "half"}


def component(key: str, box: Any, pattern: SharingPattern) -> StateComponent:
    return StateComponent(key, box, pattern, GROUP.get(pattern))


def halves(rank: int, world_size: int) -> dict[str, Any]:
    """The process groups of the first and of the second half of the ranks; one group where there is one rank."""
    groups = {}
    for part in sorted({2 * other // world_size for other in range(world_size)}):
        members = [other for other in range(world_size) if 2 * other // world_size == part]
        group = dist.new_group(members)
        if rank in members:
            groups["half"] = group
    return groups


def owner(pattern: SharingPattern, rank: int) -> int:
    """Whose state a rank is given on load, on one node; its own unless the first rank's counts for all."""
    return 0 if pattern in (SharingPattern.GLOBAL, SharingPattern.PER_NODE) else rank


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_save_and_load_are_exact_on_every_rank(pattern: SharingPattern, world_size: int, tmp_path: Path):
    def case(rank: int, world_size: int) -> Any:
        box = Box(sample(label_of(pattern, rank, world_size)))
        trainer = Trainer([component("part", box, pattern)], halves(rank, world_size))
        expected = sample(label_of(pattern, owner(pattern, rank), world_size))
        with CheckpointCoordinator(trainer, tmp_path, timeout_seconds=30) as coordinator:
            path = coordinator.save_checkpoint(3, epoch=0.5, metrics={"loss": 1.0})
            results = [path.name]
            for items in (sample("other content"), {}):  # filled in place; made anew
                box.items = items
                for staged in (False, True):
                    report = coordinator.load_checkpoint(staged=staged)
                    results += [is_same(box.items, expected), report.step, report.epoch, report.loaded]
        return results

    results = the_same(values(run_ranks(world_size, case)))
    assert results == ["checkpoint-3", *[True, 3, 0.5, ("part",)] * 4]
    record = CheckpointManifest.load(tmp_path / "checkpoint-3").components["part"]
    num_sets = {SharingPattern.PER_RANK: world_size, SharingPattern.PER_GROUP: min(2, world_size)}.get(pattern, 1)
    assert len(record.entries) == num_sets
    assert (record.pattern, record.num_items) == (pattern, num_sets * 15)


def is_readable_as(saved: SharingPattern, declared: SharingPattern) -> bool:
    """Global names may be read under any pattern with global names (DESIGN section 4)."""
    with_global_names = {SharingPattern.GLOBAL, SharingPattern.REPLICATED}
    return saved is declared or {saved, declared} <= with_global_names


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_a_changed_pattern_is_an_error_that_names_component_and_both_patterns(world_size: int, tmp_path: Path):
    pairs = [pair for pair in itertools.product(PATTERNS, PATTERNS) if pair[0] is not pair[1]]

    def case(rank: int, world_size: int) -> dict[tuple[str, str], Refusal | None]:
        groups = halves(rank, world_size)
        labels = {pattern: label_of(pattern, rank, world_size) for pattern in PATTERNS}
        saved = Trainer([component(str(p), Box(sample(labels[p])), p) for p in PATTERNS], groups)
        with CheckpointCoordinator(saved, tmp_path, timeout_seconds=30) as coordinator:
            coordinator.save_checkpoint(1)
        results: dict[tuple[str, str], Refusal | None] = {}
        box = Box({})
        loading = Trainer([], groups)
        coordinator = CheckpointCoordinator(loading, tmp_path, timeout_seconds=30)
        for was, now in pairs:
            box.items = sample("before")
            loading.components = [component(str(was), box, now)]
            if is_readable_as(was, now):
                coordinator.load_checkpoint(components=[str(was)])
                assert is_same(box.items, sample(label_of(was, owner(was, rank), world_size)))
                results[was, now] = None
            else:
                results[was, now] = refusal(lambda: coordinator.load_checkpoint(strict=False))
                assert is_same(box.items, sample("before"))  # a failure in prepare changes nothing
        return results

    results = the_same(values(run_ranks(world_size, case)))
    for (was, now), result in results.items():
        if is_readable_as(was, now):
            assert result is None
        else:
            kind, message = result
            assert kind == "LoadMismatch"
            assert f"component {str(was)!r} was saved as {was.name} " in message
            assert f"is declared {now.name} " in message


# ---- one rank fails


class Saboteur:
    """What can fail on one rank: one method a phase, each a context in which this rank's next call fails there."""

    def __init__(self, trainer: Trainer, box: Box) -> None:
        self.trainer = trainer
        self.box = box

    @contextmanager
    def declaring(self) -> Iterator[None]:
        self.trainer.fail_declare = RuntimeError("no components today")
        yield
        self.trainer.fail_declare = None

    @contextmanager
    def taking_state(self) -> Iterator[None]:
        self.box.fail_save = RuntimeError("state is on strike")
        yield
        self.box.fail_save = None

    @contextmanager
    def holding_a_function(self) -> Iterator[None]:
        self.box.items["callback"] = print
        yield
        del self.box.items["callback"]

    def creating(self) -> AbstractContextManager[Any]:
        return mock.patch.object(files_module, "create", side_effect=OSError(errno.ENOSPC, "No space left on device"))

    def writing(self) -> AbstractContextManager[Any]:
        return mock.patch.object(os, "pwrite", side_effect=OSError(errno.EIO, "Input/output error"))

    def syncing(self) -> AbstractContextManager[Any]:
        return mock.patch.object(os, "fsync", side_effect=OSError(errno.EIO, "Input/output error"))

    def running_out_of_memory(self) -> AbstractContextManager[Any]:
        return mock.patch.object(files_module, "write_at", side_effect=MemoryError("no memory"))

    def sealing(self) -> AbstractContextManager[Any]:
        write_new = files_module.write_new

        def fail(path: Path, data: bytes) -> None:
            if path.name == "checkpoint_manifest.json":
                raise OSError(errno.EDQUOT, "Disk quota exceeded")
            write_new(path, data)

        return mock.patch.object(files_module, "write_new", fail)

    def renaming(self) -> AbstractContextManager[Any]:
        rename = os.rename

        def fail(source: Any, target: Any, **where: Any) -> None:
            if Path(target).name.startswith("checkpoint-"):
                raise OSError(errno.EROFS, "Read-only file system")
            rename(source, target, **where)

        return mock.patch.object(os, "rename", fail)


ON_ANY_RANK = {
    "declaring": ("RankFailed", "comparing declarations failed on rank {}: RuntimeError: no components today"),
    "taking_state": (
        "RankFailed",
        "on rank {}: component 'part': state_dict() raised RuntimeError: state is on strike",
    ),
    "holding_a_function": ("StructureError", "on rank {}: component 'part': callback: "),
    "creating": ("NoSpace", "writing the checkpoint failed on rank {}: "),
    "writing": ("StorageError", "writing the checkpoint failed on rank {}: "),
    "syncing": ("StorageError", "writing the checkpoint failed on rank {}: "),
    "running_out_of_memory": ("RankFailed", "writing the checkpoint failed on rank {}: MemoryError: no memory"),
}
ON_RANK_0 = {
    "sealing": ("NoSpace", "committing the checkpoint failed"),
    "renaming": ("StorageError", "committing the checkpoint failed"),
}


def scenarios(pattern: SharingPattern, world_size: int) -> list[tuple[str, int]]:
    """Phase and failing rank: every rank up to world size 4, then the first and the last."""
    culprits = list(range(world_size)) if world_size <= 4 else [0, world_size - 1]
    chosen = [(phase, rank) for phase in ON_ANY_RANK for rank in culprits] + [(phase, 0) for phase in ON_RANK_0]
    # Of states that are not this rank's to store nothing is looked at.
    return [(p, r) for p, r in chosen if p != "holding_a_function" or owner(pattern, r) == r]


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_save_that_fails_on_one_rank_fails_alike_on_all_and_leaves_nothing(
    pattern: SharingPattern, world_size: int, tmp_path: Path
):
    chosen = scenarios(pattern, world_size)

    def case(rank: int, world_size: int) -> list[Any]:
        box = Box(sample(label_of(pattern, rank, world_size)))
        own = Box({"rank": rank})  # so that every rank has something to write
        trainer = Trainer(
            [component("part", box, pattern), StateComponent("own", own, SharingPattern.PER_RANK)],
            halves(rank, world_size),
        )
        saboteur = Saboteur(trainer, box)
        results = []
        with CheckpointCoordinator(trainer, tmp_path, timeout_seconds=30) as coordinator:
            coordinator.save_checkpoint(0)
            for step, (phase, culprit) in enumerate(chosen, start=1):
                before = listing(tmp_path)
                dist.barrier()
                with getattr(saboteur, phase)() if rank == culprit else nullcontext():
                    error = refusal(lambda step=step: coordinator.save_checkpoint(step))
                dist.barrier()
                results.append((error, listing(tmp_path) == before))
                dist.barrier()
                coordinator.save_checkpoint(step)
            box.items = {}
            report = coordinator.load_checkpoint()
            expected = sample(label_of(pattern, owner(pattern, rank), world_size))
            results.append((report.step, is_same(box.items, expected)))
        return results

    *failures, end = the_same(values(run_ranks(world_size, case)))
    assert end == (len(chosen), True)
    assert listing(tmp_path) == sorted(f"checkpoint-{step}" for step in range(len(chosen) + 1))
    for (phase, culprit), ((kind, message), is_clean) in zip(chosen, failures, strict=True):
        expected_kind, expected_text = (ON_ANY_RANK | ON_RANK_0)[phase]
        assert kind == expected_kind, (phase, culprit, message)
        assert expected_text.format(culprit) in message
        assert is_clean, (phase, culprit)


# ---- loads


@contextmanager
def unreadable(name: str) -> Iterator[None]:
    """This rank gets an I/O error from every file of the newest checkpoint whose name begins with `name`."""
    open_to_read = files_module.open_to_read

    def fail(path: Path) -> int:
        if path.parent.name == "checkpoint-2" and path.name.startswith(name):
            raise OSError(errno.EIO, "Input/output error", str(path))
        return open_to_read(path)

    with mock.patch.object(files_module, "open_to_read", fail):
        yield


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_load_that_fails_on_one_rank_falls_back_or_fails_alike_on_all(
    pattern: SharingPattern, world_size: int, tmp_path: Path
):
    culprits = list(range(world_size)) if world_size <= 4 else [0, world_size - 1]

    def case(rank: int, world_size: int) -> dict[str, Any]:
        def state(step: int, of: int = rank) -> dict[Any, Any]:
            return sample(f"{label_of(pattern, of, world_size)} at {step}")

        box = Box(state(1))
        trainer = Trainer([component("part", box, pattern)], halves(rank, world_size))
        results: dict[str, Any] = {}
        with CheckpointCoordinator(trainer, tmp_path, timeout_seconds=30) as coordinator:
            coordinator.save_checkpoint(1)
            box.items = state(2)
            coordinator.save_checkpoint(2)
            for culprit in culprits:
                for what in ("index", "small"):  # while preparing; while filling live tensors
                    for staged in (False, True):
                        box.items = sample("before")
                        with unreadable(what) if rank == culprit else nullcontext():
                            report = coordinator.load_checkpoint(staged=staged)
                        exact = is_same(box.items, state(1, owner(pattern, rank)))
                        [(path, reason)] = report.fell_back_from
                        results[f"{what} {culprit} {staged}"] = (report.step, exact, path.name, reason)
                        with unreadable(what) if rank == culprit else nullcontext():
                            error = refusal(lambda staged=staged: coordinator.load_checkpoint(2, staged=staged))
                        results[f"{what} {culprit} {staged} asked for"] = error
                coordinator.load_checkpoint()
                if rank == culprit:
                    box.fail_load = RuntimeError("it does not fit")
                results[f"loading {culprit}"] = refusal(coordinator.load_checkpoint)
                box.fail_load = None
                results[f"saving torn {culprit}"] = refusal(lambda: coordinator.save_checkpoint(3))
                report = coordinator.load_checkpoint(2)
                results[f"healed {culprit}"] = is_same(box.items, state(2, owner(pattern, rank)))
                coordinator.save_checkpoint(2)
        return results

    results = the_same(values(run_ranks(world_size, case)))
    for culprit in culprits:
        for what, staged in itertools.product(("index", "small"), (False, True)):
            step, exact, passed_over, reason = results[f"{what} {culprit} {staged}"]
            assert (step, exact, passed_over) == (1, True, "checkpoint-2")
            assert f"failed on rank {culprit}: " in reason
            kind, message = results[f"{what} {culprit} {staged} asked for"]
            assert kind == "StorageError"
            assert f"failed on rank {culprit}: " in message
            assert ("torn" in message) == (what == "small" and not staged)
        kind, message = results[f"loading {culprit}"]
        assert kind == "LoadMismatch"
        assert f"on rank {culprit}: component 'part': load_state_dict() raised RuntimeError: it does not fit" in message
        assert "The live state of part is now torn" in message
        kind, message = results[f"saving torn {culprit}"]
        assert (kind, "part is torn" in message) == ("TornState", True)
        assert results[f"healed {culprit}"]
    assert listing(tmp_path) == ["checkpoint-1", "checkpoint-2"]


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_damage_on_disk_is_found_and_all_ranks_take_the_older_checkpoint(
    pattern: SharingPattern, world_size: int, tmp_path: Path
):
    def damage(path: Path, at: int) -> None:
        data = bytearray(path.read_bytes())
        data[at] ^= 1
        path.write_bytes(data)

    def damages() -> list[tuple[Path, str, bytes]]:
        """Every file of the newest checkpoint missing, and every one that a load reads flipped."""
        newest = tmp_path / "checkpoint-2"
        indexes = CheckpointManifest.load(newest).indexes
        chosen = []
        for path in sorted(newest.iterdir()):
            data = path.read_bytes()
            chosen.append((path, "missing", data))
            is_index_of_nothing = indexes.get(path.name) == []
            has_only_a_header = path.suffix == ".safetensors" and header_size(data, what=path.name) == len(data)
            if not (is_index_of_nothing or has_only_a_header):
                chosen.append((path, "flipped", data))
        return chosen

    def case(rank: int, world_size: int) -> dict[str, Any]:
        box = Box(sample(f"{label_of(pattern, rank, world_size)} at 1"))
        trainer = Trainer([component("part", box, pattern)], halves(rank, world_size))
        results: dict[str, Any] = {}
        with CheckpointCoordinator(trainer, tmp_path, timeout_seconds=30) as coordinator:
            coordinator.save_checkpoint(1)
            box.items = sample(f"{label_of(pattern, rank, world_size)} at 2")
            coordinator.save_checkpoint(2)
            expected = sample(f"{label_of(pattern, owner(pattern, rank), world_size)} at 1")
            for path, kind, data in damages():
                dist.barrier()
                if rank == 0:
                    damage(path, len(data) - 1) if kind == "flipped" else path.unlink()
                dist.barrier()
                box.items = sample("before")
                report = coordinator.load_checkpoint()
                results[f"{path.name} {kind}"] = (report.step, is_same(box.items, expected))
                dist.barrier()
                if rank == 0:
                    path.write_bytes(data)
            dist.barrier()
            report = coordinator.load_checkpoint()
            results["repaired"] = (report.step, report.fell_back_from)
        return results

    results = the_same(values(run_ranks(world_size, case)))
    assert results.pop("repaired") == (2, ())
    assert {name.split("-")[0].split(" ")[0] for name in results} == {
        "checkpoint_manifest.json",
        "index",
        "small",
    }
    assert set(results.values()) == {(1, True)}
