"""How much room checkpoints take, and a word before the disk is full."""

import dataclasses
import os
from pathlib import Path

import pytest

from forgather_ckpt import catalog, commit, files, paths, space
from forgather_ckpt.annotations import annotate
from forgather_ckpt.space import Role, Storage, line, shortage, storage
from tests.checkpoints import fill

KB = 1000


def save(run: Path, step: int, size: int = 10, kind: str = "periodic") -> Path:
    draft = commit.begin(run, step)
    path, _ = commit.publish(draft, dataclasses.replace(fill(draft, b"x" * size), kind=kind))
    return path


def on_disk(path: Path) -> int:
    """What the files of a checkpoint hold, as the file system has it."""
    return sum(file.stat().st_size for file in path.iterdir())


def made(free: int | None, largest: int | None = 40 * KB, deleting: int = 0) -> Storage:
    return Storage(Path("runs/a"), {"periodic": Role(3, 100 * KB)}, largest, deleting, free)


# ---- what is there


def test_each_checkpoint_counts_once_with_all_its_files(tmp_path):
    saved = {
        kind: [save(tmp_path, 10 * number + step, 100 * (number + 1), kind) for step in range(number + 1)]
        for number, kind in enumerate(["final", "emergency", "periodic", "epoch"])
    }
    found = storage(tmp_path)
    expected = {kind: Role(len(each), sum(map(on_disk, each))) for kind, each in saved.items()}
    assert found.roles == expected
    assert list(found.roles) == ["periodic", "epoch", "emergency", "final"]
    assert found.num_bytes == sum(on_disk(path) for each in saved.values() for path in each)


def test_pinned_ones_are_told_apart(tmp_path):
    path = save(tmp_path, 1, kind="epoch")
    save(tmp_path, 2)
    annotate(path, lambda noted: dataclasses.replace(noted, is_pinned=True))
    assert {name: role.count for name, role in storage(tmp_path).roles.items()} == {"periodic": 1, "pinned": 1}
    (path / paths.ANNOTATIONS).write_text("damaged")
    assert {name: role.count for name, role in storage(tmp_path).roles.items()} == {"periodic": 1, "epoch": 1}


def test_a_kind_of_a_newer_version_has_its_own_name(tmp_path):
    save(tmp_path, 1, kind="archive")
    assert list(storage(tmp_path).roles) == ["archive"]


def test_what_lies_elsewhere_takes_no_room_here(tmp_path):
    run, other = tmp_path / "run", tmp_path / "other"
    save(run, 1)
    (run / "checkpoint-9").symlink_to(save(other, 9, 5000))
    assert storage(run).roles["periodic"].count == 1


def test_the_newest_say_how_large_the_next_one_will_be(tmp_path):
    sizes = [9000, 20, 50, 30]
    paths_of = [save(tmp_path, step, size) for step, size in enumerate(sizes, start=1)]
    assert storage(tmp_path).largest_recent_bytes == on_disk(paths_of[2])


def test_what_is_being_deleted_is_measured(tmp_path):
    path = save(tmp_path, 1, 5000)
    size = on_disk(path)
    path.rename(tmp_path / paths.trash(path.name, "abc"))
    (tmp_path / paths.temporary(7, "abc")).mkdir()
    (tmp_path / paths.temporary(7, "abc") / "half").write_bytes(b"x" * 100)
    found = storage(tmp_path)
    assert (found.deleting_bytes, found.roles, found.largest_recent_bytes) == (size, {}, None)


def test_a_catalog_that_was_made_already_is_not_made_again(tmp_path):
    save(tmp_path, 1)
    found = catalog.scan(tmp_path)
    save(tmp_path, 2)
    assert storage(tmp_path, found).roles["periodic"].count == 1


def test_free_room_is_what_the_file_system_says_or_nothing(tmp_path, monkeypatch):
    assert 0 < storage(tmp_path).free_bytes <= os.statvfs(tmp_path).f_blocks * os.statvfs(tmp_path).f_frsize

    def refuse(path):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(files, "free_bytes", refuse)
    assert storage(tmp_path).free_bytes is None


# ---- what is told


@pytest.mark.parametrize(
    ("roles", "free", "told"),
    [
        (
            {"periodic": Role(10, 30_000 * KB**2), "epoch": Role(5, 15_200 * KB**2), "emergency": Role(3, 0)},
            12_300 * KB**2,
            "checkpoint storage: 45.2 GB (10 periodic, 5 epoch, 3 emergency), 12.3 GB free",
        ),
        ({"periodic": Role(1, 400)}, None, "checkpoint storage: 400 B (1 periodic)"),
        ({}, 5 * KB, "checkpoint storage: 0 B, 5.00 kB free"),
    ],
)
def test_the_line(roles, free, told):
    assert line(Storage(Path("run"), roles, None, 0, free)) == told


@pytest.mark.parametrize(
    ("found", "removed", "fits"),
    [
        (made(free=80 * KB), 0, True),
        (made(free=80 * KB - 1), 0, False),
        (made(free=0), 0, False),
        (made(free=40 * KB), 40 * KB, True),  # what one save needs, retention gives back after it
        (made(free=40 * KB - 1), 40 * KB, False),
        (made(free=40 * KB - 1), 400 * KB, False),
        (made(free=60 * KB), 20 * KB, True),
        (made(free=10 * KB, deleting=70 * KB), 0, True),
        (made(free=10 * KB, deleting=69 * KB), 0, False),
        (made(free=None), 0, True),
        (made(free=0, largest=None), 0, True),
    ],
)
def test_two_saves_fit_or_there_is_a_warning(found, removed, fits):
    assert (shortage(found, removed_per_save_bytes=removed) is None) == fits


def test_the_warning_says_what_is_missing_and_what_to_do():
    assert shortage(made(free=30 * KB)) == (
        "the next 2 saves will not fit: they need 80.0 kB, and 30.0 kB are free for runs/a. Make room, as with `fgckpt prune "
        "--keep-last 3`, and keep fewer (save_total_limit, now 3 checkpoints in 100 kB)"
    )


def test_a_run_that_does_not_exist_yet_has_room(tmp_path):
    found = storage(tmp_path / "none")
    assert (found.roles, found.num_bytes, shortage(found)) == ({}, 0, None)
    assert found.free_bytes == pytest.approx(files.free_bytes(tmp_path), rel=0.5)
    assert space.NUM_SAVES_AHEAD == 2
