"""What is noted beside a checkpoint: whole or none at all, of this very checkpoint, and never what commits it."""

import dataclasses
import errno
import fcntl
import json
import math
import os
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forgather_ckpt import annotations, catalog, commit, hashtree, paths, strict_json
from forgather_ckpt.annotations import Annotations, annotate
from forgather_ckpt.errors import CheckpointNotFound, FormatError, StorageError, UnsupportedVersion
from tests.checkpoints import commit_one, fill
from tests.golden_files import golden
from tests.json_mutations import mutated
from tests.system_calls import num_open_files, watched

CHECKPOINT = "0123456789abcdef" * 2
FULL = Annotations(
    True, "a flipped byte in model.safetensors", ("first", "zweite Notiz – ü"), {"eval_loss": 2.5, "n": 3}
)


def pin(noted: Annotations) -> Annotations:
    return dataclasses.replace(noted, is_pinned=True)


def load(path) -> Annotations:
    return annotations.load(path, catalog.read_checkpoint(path).manifest.digest)


def read(path) -> Annotations:
    return annotations.read(path, catalog.read_checkpoint(path).manifest.digest)


def sealed(said: dict[str, object]) -> bytes:
    """The bytes of a file that says this, with the digest that goes with it."""
    digest = hashtree.digest(strict_json.dumps(said)).hex()
    return json.dumps({**said, "digest": digest}).encode()


def fields(noted: Annotations) -> dict[str, object]:
    return {key: value for key, value in json.loads(noted.to_bytes(CHECKPOINT)).items() if key != "digest"}


# ---- the file


@pytest.mark.parametrize("noted", [Annotations(), FULL, Annotations(quarantined="")])
def test_what_is_written_is_read(noted):
    assert Annotations.from_bytes(noted.to_bytes(CHECKPOINT), CHECKPOINT) == noted


def test_the_format_is_the_one_that_was_agreed():
    data = FULL.to_bytes(CHECKPOINT)
    assert data == golden("annotations.json", data)


def test_a_metric_that_is_not_finite_is_written_as_in_the_manifest_and_stays_so():
    noted = Annotations(metrics={"eval_loss": math.nan})
    for _ in range(2):
        noted = Annotations.from_bytes(noted.to_bytes(CHECKPOINT), CHECKPOINT)
        assert noted.metrics == {"eval_loss": {"$float": "nan"}}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format": "forgather_ckpt"}, "is of format 'forgather_ckpt'; expected 'forgather_ckpt.annotations'"),
        ({"checkpoint": "f" * 32}, "is about another checkpoint than the one that it lies in"),
        ({"pinned": 1}, "'pinned' is a int; expected bool"),
        ({"quarantined": True}, "'quarantined' is a bool; expected str"),
        ({"notes": "one"}, "'notes' is a str; expected list"),
        ({"notes": [1]}, "'notes' holds a int"),
        ({"metrics": []}, "'metrics' is a list; expected dict"),
    ],
)
def test_a_file_that_is_wrong_is_refused_with_what_is_wrong(change, said):
    with pytest.raises(FormatError, match=said):
        Annotations.from_bytes(sealed({**fields(FULL), **change}), CHECKPOINT)


def test_a_newer_minor_version_may_say_more():
    data = sealed({**fields(FULL), "version": "1.7", "starred": True})
    assert Annotations.from_bytes(data, CHECKPOINT) == FULL


def test_any_flipped_byte_is_found_or_changes_nothing():
    data = FULL.to_bytes(CHECKPOINT)
    for place in range(len(data)):
        flipped = bytearray(data)
        flipped[place] ^= 1
        try:
            assert Annotations.from_bytes(bytes(flipped), CHECKPOINT) == FULL
        except FormatError:
            continue


@given(st.data())
def test_whatever_the_fields_hold_it_is_annotations_or_a_format_error(data):
    try:
        read = Annotations.from_bytes(sealed(mutated(data, fields(FULL))), CHECKPOINT)
    except FormatError:
        return
    assert Annotations.from_bytes(read.to_bytes(CHECKPOINT), CHECKPOINT).notes == read.notes


@given(st.binary(max_size=200))
def test_bytes_of_any_kind_are_a_format_error(data):
    with pytest.raises(FormatError):
        Annotations.from_bytes(data, CHECKPOINT)


# ---- beside a checkpoint


def test_a_checkpoint_of_which_nothing_was_noted_has_no_annotations(tmp_path):
    assert load(commit_one(tmp_path, 1)) == Annotations()


def test_what_was_said_of_a_checkpoint_is_not_noted_of_another_in_its_place(tmp_path):
    path = commit_one(tmp_path, 1)
    digest = catalog.read_checkpoint(path).manifest.digest
    assert annotate(path, pin, digest=digest) == Annotations(is_pinned=True)
    with pytest.raises(CheckpointNotFound, match="is another checkpoint by now"):
        annotate(path, pin, digest="0" * 32)


def test_annotations_are_changed_one_after_the_other(tmp_path):
    path = commit_one(tmp_path, 1)
    assert annotate(path, pin) == Annotations(is_pinned=True)
    annotate(path, lambda noted: dataclasses.replace(noted, notes=(*noted.notes, "good"), metrics={"eval_loss": 2.0}))
    assert load(path) == Annotations(True, None, ("good",), {"eval_loss": 2.0})
    assert not [file for file in path.iterdir() if paths.is_temporary(file.name)]


def test_only_a_committed_checkpoint_can_be_annotated(tmp_path):
    (tmp_path / "checkpoint-1").mkdir()
    with pytest.raises(CheckpointNotFound):
        annotate(tmp_path / "checkpoint-1", pin)
    assert not list((tmp_path / "checkpoint-1").iterdir())


def cut(file):
    os.truncate(file, 20)


def make_link(file):
    file.rename(file.with_name("elsewhere"))
    file.symlink_to("elsewhere")


def make_directory(file):
    file.unlink()
    file.mkdir()


def make_pipe(file):
    file.unlink()
    os.mkfifo(file)


def make_huge(file):
    os.truncate(file, annotations.MAX_BYTES + 1)


def make_unreadable(file):
    file.write_bytes(b"\xff\xfe")


DAMAGES = [cut, make_link, make_directory, make_pipe, make_huge, make_unreadable]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damaged_annotations_are_none_and_uncommit_nothing(tmp_path, caplog, damage):
    path = commit_one(tmp_path, 1)
    annotate(path, pin)
    damage(path / paths.ANNOTATIONS)
    assert [found.path for found in catalog.scan(tmp_path).checkpoints] == [path]
    assert read(path) == Annotations()
    assert f"{path / paths.ANNOTATIONS}: ignored: " in caplog.text
    with pytest.raises(FormatError) as caught:
        load(path)
    assert caught.value.path == str(path / paths.ANNOTATIONS)


@pytest.mark.parametrize(
    "damage", [cut, make_link, make_pipe, make_huge, make_unreadable], ids=lambda one: one.__name__
)
def test_damaged_annotations_are_replaced_by_the_next(tmp_path, caplog, damage):
    path = commit_one(tmp_path, 1)
    annotate(path, lambda noted: FULL)
    damage(path / paths.ANNOTATIONS)
    annotate(path, pin)
    assert load(path) == Annotations(is_pinned=True)
    assert "is replaced: " in caplog.text


def test_what_could_not_be_read_back_is_refused_and_the_old_ones_stay(tmp_path):
    path = commit_one(tmp_path, 1)
    annotate(path, lambda noted: FULL)
    with pytest.raises(FormatError, match="field 'notes' holds a int"):
        annotate(path, lambda noted: dataclasses.replace(noted, notes=(5,)))
    with pytest.raises(FormatError, match=f"at most {annotations.MAX_BYTES} are read"):
        annotate(path, lambda noted: dataclasses.replace(noted, notes=("x" * annotations.MAX_BYTES,)))
    assert load(path) == FULL


def test_a_file_that_is_too_large_is_not_read_at_all(tmp_path):
    path = commit_one(tmp_path, 1)
    (path / paths.ANNOTATIONS).touch()
    os.truncate(path / paths.ANNOTATIONS, 1 << 40)
    with pytest.raises(FormatError, match=r"annotations\.json has 1099511627776 bytes; at most 4194304 are read"):
        load(path)


def test_annotations_of_a_newer_format_are_not_overwritten(tmp_path):
    path = commit_one(tmp_path, 1)
    digest = catalog.read_checkpoint(path).manifest.digest
    data = sealed({**fields(FULL), "checkpoint": digest, "version": "2.0"})
    (path / paths.ANNOTATIONS).write_bytes(data)
    with pytest.raises(UnsupportedVersion, match=r"format version '2\.0'"):
        annotate(path, pin)
    assert (path / paths.ANNOTATIONS).read_bytes() == data


def test_what_was_said_of_a_checkpoint_is_not_said_of_the_one_that_took_its_place(tmp_path):
    path = commit_one(tmp_path, 1, b"old")

    def replace_meanwhile(noted: Annotations) -> Annotations:
        draft = commit.begin(tmp_path, 1)
        commit.publish(draft, fill(draft, b"new"))
        return dataclasses.replace(noted, metrics={"eval_loss": 0.1})

    annotate(path, replace_meanwhile)
    assert read(path) == Annotations()
    with pytest.raises(FormatError, match="is about another checkpoint"):
        load(path)


def test_at_every_instant_the_old_or_the_new_annotations_are_found(tmp_path):
    path = commit_one(tmp_path, 1)
    annotate(path, lambda noted: FULL)
    found = []
    for fail_at in range(100):
        with watched(tmp_path) as calls:
            calls.fail_at = fail_at
            calls.after = lambda: found.append(load(path))
            try:
                annotate(path, pin if fail_at % 2 else lambda noted: FULL)
                is_done = True
            except StorageError:
                is_done = False
        assert load(path).is_pinned
        if len(calls.seen) <= fail_at:
            assert is_done
            break
    else:
        pytest.fail("more calls than there can be")
    assert len(found) > 20
    assert set(map(str, found)) <= {str(FULL), str(pin(FULL))}
    assert not [file for file in path.iterdir() if paths.is_temporary(file.name)]


def test_annotations_are_durable_before_they_take_the_name_and_the_name_before_the_end(tmp_path):
    path = commit_one(tmp_path, 1)
    with watched(tmp_path) as calls:
        annotate(path, pin)
    [temporary] = [call[1] for call in calls.seen if call[0] == "rename"]
    assert [call for call in calls.seen if call[0] in ("fsync", "rename")] == [
        ("fsync", temporary),
        ("rename", temporary, str(path / paths.ANNOTATIONS)),
        ("fsync", str(path)),
    ]


def test_who_annotates_at_the_same_time_takes_turns(tmp_path, monkeypatch):
    monkeypatch.setattr(annotations, "PATIENCE_SECONDS", 60.0)
    path = commit_one(tmp_path, 1)

    def note(number: int) -> None:
        annotate(path, lambda noted: dataclasses.replace(noted, notes=(*noted.notes, str(number))))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(note, range(40)))
    assert sorted(map(int, load(path).notes)) == list(range(40))


def test_somebody_who_does_not_finish_is_not_waited_for_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr(annotations, "PATIENCE_SECONDS", 0.0)
    path = commit_one(tmp_path, 1)
    before = num_open_files()
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        with pytest.raises(StorageError, match=r"another process has been annotating .* try again"):
            annotate(path, pin)
    finally:
        os.close(descriptor)
    annotate(path, pin)
    assert num_open_files() == before


def test_a_file_system_without_such_locks_will_do(tmp_path, monkeypatch):
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.EBADF, "not on this file system")

    monkeypatch.setattr(fcntl, "flock", refuse)
    path = commit_one(tmp_path, 1)
    annotate(path, pin)
    assert load(path).is_pinned
