"""The log of digests: its bytes, what a writer that died leaves, and what damage is."""

from __future__ import annotations

import errno
import json
import os
import signal
import struct
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from xxhash import xxh3_64_intdigest

from forgather_ckpt import digest_log, digest_writer, files
from forgather_ckpt.digest_log import Column, DigestLog, Header, Part
from forgather_ckpt.digest_writer import LogWriter
from forgather_ckpt.errors import (
    CheckpointError,
    CheckpointNotFound,
    FormatError,
    NoSpace,
    RunDirectoryInUse,
    StorageError,
    UnsupportedVersion,
)
from tests.golden_files import golden
from tests.json_mutations import mutated
from tests.ranks import errors, run_ranks, values

PARTS = [Part("model", "replicated", ("*.running_mean",)), Part("optimizer", None)]
WEIGHT = Column("model", "linear.weight", "float32", (1, 4), "xxh3_128")
SCALAR = Column("model", "größe", "bfloat16", (), "multilinear61x2")
RATE = Column("optimizer", "groups.linear.weight.lr", None, None, "xxh3_128")
MOMENT = Column("optimizer", "state.linear.weight.exp_avg", "float32", (1, 4), "xxh3_128")

Frames = list[tuple[int, tuple[Column, ...], bytes]]


def digests(step: int, count: int) -> bytes:
    return b"".join(bytes([step % 256, number % 256]) * 8 for number in range(count))


def write(path: Path, *frames: tuple[int, Sequence[Column]], rank: int = 3) -> None:
    writer = LogWriter(path, rank=rank, world_size=4, exclude=("*.step",))
    for step, columns in frames:
        writer.write(step, PARTS, columns, digests(step, len(columns)))
    writer.close()


def read(path: Path) -> Frames:
    with DigestLog(path) as log:
        return [(frame.step, frame.header.columns, frame.digests) for frame in log.frames()]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "digests" / digest_log.file_name(3)


@pytest.fixture
def sample(path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """State that appears after the first step, a job that resumes from step 1, and columns of two algorithms."""
    monkeypatch.setattr(digest_writer, "_now", lambda: "2026-11-22T06:00:00+00:00")
    write(path, (1, [WEIGHT, SCALAR, RATE]), (2, [WEIGHT, SCALAR, RATE, MOMENT]), (3, [WEIGHT, SCALAR, RATE, MOMENT]))
    write(path, (2, [WEIGHT, SCALAR, RATE, MOMENT]))
    return path


# ---- the format


def test_what_is_written_comes_back(sample: Path) -> None:
    with DigestLog(sample) as log:
        frames = list(log.frames())
        assert [frame.step for frame in frames] == list(log.steps) == [1, 2, 3, 2]
        assert log.by_step == {1: 0, 2: 3, 3: 2}
        assert [frame.header_number for frame in frames] == [0, 1, 1, 2]
        assert [len(frame.header.columns) for frame in frames] == [3, 4, 4, 4]
        assert [frame.digests for frame in frames] == [digests(1, 3), digests(2, 4), digests(3, 4), digests(2, 4)]
        header = log.last_header()
        assert log.num_torn_bytes == 0
    assert header == Header(
        3, 4, "2026-11-22T06:00:00+00:00", ("*",), ("*.step",), tuple(PARTS), (WEIGHT, SCALAR, RATE, MOMENT)
    )


def test_the_bytes_are_those_of_version_1(sample: Path) -> None:
    data = sample.read_bytes()
    assert data == golden("digests-rank00003.fgdl", data)


def test_a_reader_written_from_the_description_reads_it(sample: Path) -> None:
    data = sample.read_bytes()
    found = []
    at = 0
    columns: list[tuple[str, str]] = []
    while at < len(data):
        magic, kind, number, length, check = struct.unpack_from("<4s4sQQQ", data, at)
        end = at + 32 + length
        assert (magic, check) == (b"FGDL", xxh3_64_intdigest(data[at : at + 24]))
        assert struct.unpack_from("<Q", data, end) == (xxh3_64_intdigest(data[at:end]),)
        payload = data[at + 32 : end]
        if kind == b"HEAD":
            head, head_check = json.loads(payload), data[end : end + 8]
            columns = [(part["key"], name) for part in head["components"] for name in part["names"]]
            assert number == len(columns)
        else:
            assert (kind, payload[:8]) == (b"STEP", head_check)
            digests = [payload[8 + 16 * i : 24 + 16 * i] for i in range(len(columns))]
            found.append((number, dict(zip(columns, digests, strict=True))))
        at = end + 8
    assert [(step, len(digests)) for step, digests in found] == [(1, 3), (2, 4), (3, 4), (2, 4)]
    assert found[1][1]["optimizer", "state.linear.weight.exp_avg"] == bytes([2, 3]) * 8


def test_records_of_other_kinds_are_skipped(sample: Path) -> None:
    before = read(sample)
    with sample.open("ab") as stream:
        stream.write(digest_log.encoded(b"NOTE", 7, b"from a newer version"))
    assert read(sample) == before
    write(sample, (4, [WEIGHT]))
    assert read(sample) == [*before, (4, (WEIGHT,), digests(4, 1))]


def test_a_newer_major_version_is_told(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digest_log, "VERSION", "2.0")
    write(path, (1, [WEIGHT]))
    monkeypatch.undo()
    with DigestLog(path) as log, pytest.raises(UnsupportedVersion, match=r"version '2\.0'"):
        log.frame(0)


def test_what_the_format_cannot_hold_is_refused(path: Path) -> None:
    writer = LogWriter(path, rank=3, world_size=4)
    for step in (-1, 1 << 63):
        with pytest.raises(ValueError, match="count steps from 0 up"):
            writer.write(step, PARTS, [WEIGHT], digests(0, 1))
    with pytest.raises(ValueError, match="16 bytes of digests for 2 columns"):
        writer.write(1, PARTS, [WEIGHT, RATE], digests(0, 1))
    with pytest.raises(ValueError, match="must lie together, in the order of the parts"):
        writer.write(1, PARTS, [RATE, WEIGHT], digests(1, 2))
    with pytest.raises(ValueError, match="name a component twice"):
        writer.write(1, [*PARTS, PARTS[0]], [WEIGHT], digests(1, 1))
    writer.close()
    assert path.read_bytes() == b""


def test_reading_takes_the_memory_of_a_frame_not_of_the_log(path: Path) -> None:
    columns = [Column("model", f"layers.{number}.weight", "float32", (4, 4), "xxh3_128") for number in range(2000)]
    write(path, *((step, columns) for step in range(300)))
    assert path.stat().st_size > 9_600_000
    tracemalloc.start()
    try:
        with DigestLog(path) as log:
            assert sum(len(frame.digests) for frame in log.frames()) == 300 * 2000 * 16
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 3_000_000


# ---- cut off


def test_a_log_that_is_cut_off_anywhere_gives_the_frames_before_and_can_be_continued(sample: Path) -> None:
    data = sample.read_bytes()
    whole = read(sample)
    counts = []
    for length in range(len(data)):
        sample.write_bytes(data[:length])
        with DigestLog(sample) as log:
            counts.append(log.num_frames)
            is_whole = log.num_torn_bytes == 0
        assert read(sample) == whole[: counts[-1]]
        assert is_whole == any(length == end for end in record_ends(data))
        write(sample, (9, [RATE]))
        assert read(sample) == [*whole[: counts[-1]], (9, (RATE,), digests(9, 1))]
    assert counts == sorted(counts)
    assert set(counts) == {0, 1, 2, 3}


def record_ends(data: bytes) -> list[int]:
    ends = [0]
    while ends[-1] < len(data):
        ends.append(ends[-1] + 40 + struct.unpack_from("<Q", data, ends[-1] + 16)[0])
    return ends


@pytest.mark.parametrize("num_zeros", [1, 31, 32, 5000, 3 << 20])
def test_zeros_at_the_end_are_what_a_machine_that_died_leaves(sample: Path, num_zeros: int) -> None:
    before = read(sample)
    with sample.open("ab") as stream:
        stream.write(bytes(num_zeros))
    assert read(sample) == before
    write(sample, (9, [RATE]))
    assert read(sample) == [*before, (9, (RATE,), digests(9, 1))]


@pytest.mark.multiprocess
def test_a_writer_that_is_killed_within_a_frame_loses_that_frame_only(path: Path) -> None:
    def case(rank: int, world_size: int) -> None:
        writer = LogWriter(path, rank=3, world_size=4)
        for step in range(1, 4):
            writer.write(step, PARTS, [WEIGHT, MOMENT], digests(step, 2))

        def write_half(descriptor: int, data: memoryview | bytes, offset: int) -> None:
            os.pwrite(descriptor, data[: len(data) // 2], offset)
            os.kill(os.getpid(), signal.SIGKILL)

        files.write_at = write_half
        writer.write(4, PARTS, [WEIGHT, MOMENT], digests(4, 2))

    run_ranks(1, case, backend=None, expect_dead=[0])
    with DigestLog(path) as log:
        assert (list(log.steps), log.num_torn_bytes) == ([1, 2, 3], 40)
    write(path, (4, [WEIGHT, MOMENT]))
    with DigestLog(path) as log:
        assert (list(log.steps), log.num_torn_bytes) == ([1, 2, 3, 4], 0)


# ---- damaged


def outcome(path: Path) -> Frames | FormatError:
    try:
        return read(path)
    except FormatError as err:
        assert err.path == str(path)
        return err


@pytest.mark.parametrize("bit", [0, 7])
def test_a_flipped_bit_anywhere_is_an_error_that_says_where(sample: Path, bit: int) -> None:
    data = sample.read_bytes()
    ends = record_ends(data)
    for place in range(len(data)):
        damaged = bytearray(data)
        damaged[place] ^= 1 << bit
        sample.write_bytes(damaged)
        found = outcome(sample)
        assert isinstance(found, FormatError), f"byte {place}"
        start = max(end for end in ends if end <= place)
        assert f"damaged at byte {start}:" in found.message


def test_frames_before_a_damaged_one_can_be_read(sample: Path) -> None:
    data = bytearray(sample.read_bytes())
    data[-20] ^= 1
    sample.write_bytes(data)
    with DigestLog(sample) as log:
        assert [log.frame(number).step for number in range(3)] == [1, 2, 3]
        with pytest.raises(FormatError, match="step 2 does not have the check"):
            log.frame(3)


@given(st.binary(max_size=200), st.binary(max_size=60))
def test_no_bytes_raise_anything_else(tmp_path_factory: pytest.TempPathFactory, begin: bytes, tail: bytes) -> None:
    path = tmp_path_factory.mktemp("log") / "log"
    for data in (begin, digest_log.encoded(b"HEAD", 1, begin) + tail, digest_log.encoded(b"STEP", 1, begin) + tail):
        path.write_bytes(data)
        found = outcome(path)
        assert isinstance(found, FormatError) or found == []


@given(st.data())
def test_a_header_is_read_strictly(data: st.DataObject) -> None:
    header = Header(3, 4, "", ("*",), (), tuple(PARTS), (WEIGHT, SCALAR, RATE, MOMENT))
    assert Header.from_bytes(header.to_bytes()) == header
    try:
        found = Header.from_bytes(json.dumps(mutated(data, json.loads(header.to_bytes()))).encode())
    except FormatError:
        return
    assert Header.from_bytes(found.to_bytes()) == found


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda head: head.update(format="forgather_ckpt"), "format 'forgather_ckpt'"),
        (lambda head: head["components"][0]["names"].pop(), "its lists differ in length"),
        (lambda head: head["components"][0]["names"].__setitem__(1, "linear.weight"), "names an item twice"),
        (lambda head: head["components"][1].update(key="model"), "names a component twice"),
        (lambda head: head["components"][0]["shapes"].__setitem__(0, None), "dtype 'float32' and shape None"),
        (lambda head: head["components"][0]["shapes"].__setitem__(0, [True]), r"shape \[True\]"),
        (lambda head: head["components"].pop(), "a header of 2 columns that claims 4"),
    ],
)
def test_headers_that_contradict_themselves_are_damage(
    path: Path, change: Callable[[dict[str, Any]], Any], problem: str
) -> None:
    head = json.loads(Header(3, 4, "", ("*",), (), tuple(PARTS), (WEIGHT, SCALAR, RATE, MOMENT)).to_bytes())
    change(head)
    record = digest_log.encoded(b"HEAD", 4, json.dumps(head).encode())
    path.parent.mkdir()
    path.write_bytes(record + digest_log.encoded(b"STEP", 1, record[-8:], digests(1, 4)))
    with DigestLog(path) as log, pytest.raises(FormatError, match=f"damaged at byte 0: .*{problem}"):
        log.frame(0)


def test_frames_of_another_header_are_not_taken_for_this_ones(path: Path, tmp_path: Path) -> None:
    other = tmp_path / digest_log.file_name(3)
    write(path, (1, [WEIGHT]))
    write(other, (1, [MOMENT]))
    ends = record_ends(path.read_bytes())
    path.write_bytes(path.read_bytes() + other.read_bytes() + path.read_bytes()[ends[1] :])
    with DigestLog(path) as log:
        assert [log.frame(number).header.columns for number in (0, 1)] == [(WEIGHT,), (MOMENT,)]
        with pytest.raises(FormatError, match="belongs to another header"):
            log.frame(2)


@pytest.mark.parametrize("step_payload", [b"", bytes(8), bytes(8 + 15), bytes(8 + 32)])
def test_frames_have_16_bytes_a_column(path: Path, step_payload: bytes) -> None:
    write(path, (1, [WEIGHT]))
    size = path.stat().st_size
    with path.open("ab") as stream:
        stream.write(digest_log.encoded(b"STEP", 2, step_payload))
    with pytest.raises(FormatError, match=f"damaged at byte {size}: step 2 does not hold 1 digests"):
        DigestLog(path)


# ---- what keeps a writer from writing


def test_a_damaged_log_and_that_of_another_rank_are_not_continued(sample: Path) -> None:
    before = sample.read_bytes()
    with pytest.raises(FormatError, match="this is the log of rank 3, not of rank 2; move it away"):
        LogWriter(sample, rank=2, world_size=4)
    damaged = bytearray(before)
    damaged[record_ends(before)[2] + 9] ^= 1
    sample.write_bytes(damaged)
    with pytest.raises(FormatError, match=r"damaged at byte \d+: no record begins there; move it away"):
        LogWriter(sample, rank=3, world_size=4)
    assert sample.read_bytes() == damaged


def test_in_one_process_a_later_writer_takes_the_log_over(path: Path) -> None:
    first = LogWriter(path, rank=3, world_size=4)
    first.write(1, PARTS, [WEIGHT], digests(1, 1))
    second = LogWriter(path, rank=3, world_size=4)
    second.write(2, PARTS, [WEIGHT], digests(2, 1))
    with pytest.raises(RunDirectoryInUse, match="a later one of this process writes to"):
        first.write(3, PARTS, [WEIGHT], digests(3, 1))
    first.close()
    second.write(3, PARTS, [WEIGHT], digests(3, 1))
    second.close()
    assert [step for step, _, _ in read(path)] == [1, 2, 3]


@pytest.mark.multiprocess
def test_two_processes_do_not_write_to_one_log(path: Path) -> None:
    def case(rank: int, world_size: int) -> None:
        LogWriter(path, rank=3, world_size=4)

    before = LogWriter(path, rank=3, world_size=4)
    writer = LogWriter(path, rank=3, world_size=4)  # which must not lose the lock with the one before
    before.close()
    [error] = errors(run_ranks(1, case, backend=None))
    assert error.type_name == "RunDirectoryInUse"
    assert "another process records to" in error.message
    writer.close()
    values(run_ranks(1, case, backend=None))


def test_a_full_disk_leaves_a_log_of_whole_frames(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = LogWriter(path, rank=3, world_size=4)
    writer.write(1, PARTS, [WEIGHT], digests(1, 1))
    before = path.read_bytes()
    real = files.write_at

    def full(descriptor: int, data: memoryview | bytes, offset: int) -> None:
        real(descriptor, data[:10], offset)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files, "write_at", full)
    with pytest.raises(NoSpace, match="recording the digests of step 2 failed"):
        writer.write(2, PARTS, [WEIGHT], digests(2, 1))
    assert path.read_bytes() == before
    monkeypatch.undo()
    writer.write(3, PARTS, [WEIGHT, RATE], digests(3, 2))
    writer.close()
    assert [frame[0] for frame in read(path)] == [1, 3]


def test_after_an_error_in_the_header_the_next_frame_has_one(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = LogWriter(path, rank=3, world_size=4)

    def refuse(descriptor: int, data: memoryview | bytes, offset: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch, pytest.raises(StorageError):
        patch.setattr(files, "write_at", refuse)
        writer.write(1, PARTS, [WEIGHT], digests(1, 1))
    writer.write(2, PARTS, [WEIGHT], digests(2, 1))
    writer.close()
    assert read(path) == [(2, (WEIGHT,), digests(2, 1))]


def test_a_log_that_was_deleted_is_missed(path: Path) -> None:
    writer = LogWriter(path, rank=3, world_size=4)
    path.unlink()
    with pytest.raises(StorageError, match="was deleted while it was being recorded to"):
        writer.write(1, PARTS, [WEIGHT], digests(1, 1))
    writer.close()


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    target = tmp_path / "elsewhere"
    target.write_bytes(b"precious")
    link = tmp_path / digest_log.file_name(0)
    link.symlink_to(target)
    with pytest.raises(StorageError):
        LogWriter(link, rank=0, world_size=1)
    assert target.read_bytes() == b"precious"
    with pytest.raises(CheckpointNotFound, match="there is no log of digests"):
        DigestLog(tmp_path / "none")
    with pytest.raises(StorageError, match="not a regular file"):
        DigestLog(tmp_path)
    with pytest.raises(CheckpointError):
        LogWriter(target / "below" / digest_log.file_name(0), rank=0, world_size=1)


def test_logs_of_a_directory_are_found_by_rank(tmp_path: Path) -> None:
    names = [digest_log.file_name(rank) for rank in (12, 0, 123456)]
    for name in [*names, "digests-rank1.fgdl", "digests-rank00001.fgdl.old", "notes.txt"]:
        (tmp_path / name).touch()
    found = digest_log.logs_in(tmp_path)
    assert list(found.items()) == [(rank, tmp_path / digest_log.file_name(rank)) for rank in (0, 12, 123456)]
    with pytest.raises(StorageError):
        digest_log.logs_in(tmp_path / "none")
