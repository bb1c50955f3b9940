"""The one rule of "committed", and what a run directory holds by it."""

import os
import shutil

import pytest

from forgather_ckpt import catalog, commit, paths
from forgather_ckpt.errors import CheckpointNotFound, FormatError, StorageError
from tests.checkpoints import DATA_FILE, commit_one, fill


def steps(run) -> list[int]:
    return [checkpoint.manifest.step for checkpoint in catalog.scan(run).checkpoints]


def test_a_run_that_does_not_exist_yet_holds_nothing(tmp_path):
    found = catalog.scan(tmp_path / "nothing")
    assert (found.checkpoints, found.rejected, found.unfinished, found.next_sequence) == ((), (), (), 1)


def test_checkpoints_are_numbered_in_the_order_of_their_saves(tmp_path):
    for step in (20, 5, 100):
        commit_one(tmp_path, step)
    assert [(one.manifest.step, one.manifest.sequence) for one in catalog.scan(tmp_path).checkpoints] == [
        (100, 3),
        (5, 2),
        (20, 1),
    ]
    assert catalog.scan(tmp_path).next_sequence == 4


@pytest.mark.parametrize("touched", [1, 2, 3])
def test_b23_b10_times_of_files_decide_nothing(tmp_path, touched):
    for step in (1, 2, 3):
        commit_one(tmp_path, step)
    os.utime(tmp_path / f"checkpoint-{touched}", (2**33, 2**33))
    os.utime(tmp_path / f"checkpoint-{touched}" / paths.MANIFEST, (0, 0))
    assert steps(tmp_path) == [3, 2, 1]


def test_names_of_directories_decide_nothing(tmp_path):
    commit_one(tmp_path, 9)
    commit_one(tmp_path, 10)
    (tmp_path / "checkpoint-9").rename(tmp_path / "my favourite")
    assert steps(tmp_path) == [10, 9]
    shutil.copytree(tmp_path / "my favourite", tmp_path / "checkpoint-9")
    assert [one.path.name for one in catalog.scan(tmp_path).checkpoints] == [
        "checkpoint-10",
        "checkpoint-9",
        "my favourite",
    ]


def shorten(file):
    os.truncate(file, 3)


def lengthen(file):
    with file.open("ab") as stream:
        stream.write(b"x")


def make_link(file):
    file.rename(file.with_name("elsewhere"))
    file.symlink_to("elsewhere")


def make_directory(file):
    file.unlink()
    file.mkdir()


def make_pipe(file):
    file.unlink()
    os.mkfifo(file)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (os.unlink, "is missing; the manifest expects 7 bytes"),
        (shorten, "has 3 bytes; the manifest expects 7 bytes"),
        (lengthen, "has 8 bytes; the manifest expects 7 bytes"),
        (make_link, "is missing"),
        (make_directory, "is missing"),
        (make_pipe, "is missing"),
    ],
)
def test_a_file_that_is_not_there_in_its_size_uncommits(tmp_path, damage, reason):
    good = commit_one(tmp_path, 1)
    damage(commit_one(tmp_path, 2) / DATA_FILE)
    found = catalog.scan(tmp_path)
    assert [one.path for one in found.checkpoints] == [good]
    [rejected] = found.rejected
    assert rejected.path == tmp_path / "checkpoint-2"
    assert f"{DATA_FILE} {reason}" in rejected.reason
    with pytest.raises(FormatError, match=reason):
        catalog.read_checkpoint(tmp_path / "checkpoint-2")


@pytest.mark.parametrize("damage", [shorten, lengthen, make_link, make_directory, make_pipe])
def test_b20_a_manifest_that_is_damaged_uncommits(tmp_path, damage):
    good = commit_one(tmp_path, 1)
    damage(commit_one(tmp_path, 2) / paths.MANIFEST)
    found = catalog.scan(tmp_path)
    assert [one.path for one in found.checkpoints] == [good]
    assert [one.path for one in found.rejected] == [tmp_path / "checkpoint-2"]
    with pytest.raises(FormatError):
        catalog.read_checkpoint(tmp_path / "checkpoint-2")


def test_b19_b20_without_a_manifest_there_is_no_checkpoint(tmp_path):
    good = commit_one(tmp_path, 1)
    (commit_one(tmp_path, 2) / paths.MANIFEST).unlink()
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-backup-mine").mkdir()
    (tmp_path / "checkpoint-4").touch()
    found = catalog.scan(tmp_path)
    assert [one.path for one in found.checkpoints] == [good]
    assert (found.rejected, found.unfinished) == ((), ())
    with pytest.raises(CheckpointNotFound, match=r"is not a checkpoint: it has no checkpoint_manifest\.json"):
        catalog.read_checkpoint(tmp_path / "checkpoint-2")


def test_files_that_the_manifest_does_not_know_do_no_harm(tmp_path):
    path = commit_one(tmp_path, 1)
    (path / paths.ANNOTATIONS).write_text("{}")
    (path / "my notes").mkdir()
    assert steps(tmp_path) == [1]


def test_unfinished_saves_are_no_checkpoints_even_when_complete(tmp_path):
    draft = commit.begin(tmp_path, 1)
    manifest = fill(draft, b"content")
    (draft.directory / paths.MANIFEST).write_bytes(manifest.to_bytes())
    found = catalog.scan(tmp_path)
    assert (found.checkpoints, found.unfinished) == ((), (draft.directory,))


def test_a_checkpoint_that_was_moved_away_and_linked_to_is_found(tmp_path):
    commit_one(tmp_path / "elsewhere", 1)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoint-1").symlink_to(tmp_path / "elsewhere" / "checkpoint-1")
    (tmp_path / "run" / "latest").symlink_to("checkpoint-1")
    assert [found.path.name for found in catalog.scan(tmp_path / "run").checkpoints] == ["checkpoint-1"]


def test_a_small_file_is_read_in_exactly_its_size(tmp_path):
    (tmp_path / "file").write_bytes(b"0123456789")
    assert catalog.read_file(tmp_path / "file", 10) == b"0123456789"
    with pytest.raises(FormatError, match="file has 10 bytes; the manifest expects 11"):
        catalog.read_file(tmp_path / "file", 11)
    (tmp_path / "link").symlink_to("file")
    for name in ("link", "nothing"):
        with pytest.raises(StorageError, match="reading the checkpoint failed at"):
            catalog.read_file(tmp_path / name, 10)
