"""Verified reading: no byte that was not verified reaches a destination."""

import os
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from forgather_ckpt import files, reading
from forgather_ckpt.errors import CheckpointDamaged, StorageError
from forgather_ckpt.hashtree import BLOCK_BYTES
from forgather_ckpt.reading import Wanted
from tests.checkpoints import assign, write
from tests.states import tensor_bytes
from tests.system_calls import num_open_files

MIB = 1 << 20
STATE = {
    "large": torch.arange(5 * MIB + 3, dtype=torch.int32),
    "wide": torch.arange(40, dtype=torch.float64),
    "empty": torch.zeros(0, 3),
    **{f"small.{number}": torch.full((number,), number, dtype=torch.int16) for number in range(1, 60)},
    "last": torch.arange(7, dtype=torch.uint8),
}
SENTINEL = 0xEE


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A directory with two components, and the rows of all tensors."""
    directory = tmp_path_factory.mktemp("stored")
    other = {"w": torch.arange(300, dtype=torch.float32), "e": torch.zeros(0)}
    written = write(directory, assign("model", STATE), assign("other", other))
    rows = [(entry.component, row) for entry in written.entries for row in entry.tensors]
    expected = {("model", name): tensor_bytes(tensor) for name, tensor in STATE.items()}
    expected |= {("other", name): tensor_bytes(tensor) for name, tensor in other.items()}
    return directory, rows, expected


def want(rows) -> list[Wanted]:
    return [
        Wanted(component, row, torch.full((row.num_bytes,), SENTINEL, dtype=torch.uint8)) for component, row in rows
    ]


def found(wanted) -> dict:
    return {(one.component, one.row.name): one.destination.numpy().tobytes() for one in wanted}


def copy_of(directory, target):
    for path in directory.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def test_what_was_written_is_read(stored):
    directory, rows, expected = stored
    wanted = want(rows)
    reading.read(directory, wanted)
    assert found(wanted) == expected


@settings(max_examples=15)
@given(data=st.data())
def test_any_selection_in_any_order(stored, data):
    directory, rows, expected = stored
    wanted = want(data.draw(st.lists(st.sampled_from(rows), unique=True, max_size=20)))
    reading.read(directory, wanted)
    assert found(wanted) == {(one.component, one.row.name): expected[one.component, one.row.name] for one in wanted}


def test_one_piece_may_go_to_several_places(stored):
    directory, rows, expected = stored
    wanted = want([rows[0], rows[3], rows[0], rows[3]])
    reading.read(directory, wanted)
    assert all(one.destination.numpy().tobytes() == expected[one.component, one.row.name] for one in wanted)


def test_nothing_wanted_is_nothing_read(tmp_path):
    reading.read(tmp_path / "nothing", [])


def test_small_neighbours_are_read_in_one_request(stored, monkeypatch):
    directory, rows, expected = stored
    requests = []
    read_at = files.read_at
    monkeypatch.setattr(
        files, "read_at", lambda fd, view, offset: (requests.append(offset), read_at(fd, view, offset))[1]
    )
    wanted = want(rows)
    reading.read(directory, wanted)
    assert found(wanted) == expected
    assert len(requests) <= 10


# ---- damage


@pytest.mark.parametrize("name", ["large", "wide", "small.7", "last", "w"])
@pytest.mark.parametrize("where", ["first", "middle", "last"])
def test_b21_a_flipped_bit_is_found_and_reaches_nothing(stored, tmp_path, name, where):
    directory, rows, expected = stored
    directory = copy_of(directory, tmp_path)
    component, row = next((component, row) for component, row in rows if row.name == name)
    at = {"first": 0, "middle": row.num_bytes // 2, "last": row.num_bytes - 1}[where]
    with (directory / row.file).open("r+b") as file:
        file.seek(row.offset + at)
        byte = file.read(1)[0]
        file.seek(row.offset + at)
        file.write(bytes([byte ^ 0x10]))
    wanted = want(rows)
    with pytest.raises(CheckpointDamaged) as caught:
        reading.read(directory, wanted)
    number, count = at // BLOCK_BYTES + 1, len(row.block_digests())
    assert f"component {component!r}: tensor {name!r}, block {number} of {count} (from byte " in caught.value.message
    assert f"/{row.file}) does not have the digest that was recorded" in caught.value.message
    assert (caught.value.component, caught.value.path) == (component, str(directory / row.file))
    for one in wanted:
        right = expected[one.component, one.row.name]
        for start in range(0, len(right), BLOCK_BYTES):
            block = one.destination[start : start + BLOCK_BYTES].numpy().tobytes()
            assert block in (right[start : start + BLOCK_BYTES], bytes([SENTINEL]) * len(block))


def test_every_flipped_bit_of_small_tensors_is_found(stored, tmp_path):
    directory, rows, _ = stored
    directory = copy_of(directory, tmp_path)
    rows = [(component, row) for component, row in rows if row.name in ("small.3", "last", "w")]
    for _, row in rows:
        path = directory / row.file
        for position in range(row.offset, row.offset + row.num_bytes, 1 if row.num_bytes < 100 else 97):
            for bit in range(8):
                flip(path, position, bit)
                with pytest.raises(CheckpointDamaged):
                    reading.read(directory, want(rows))
                flip(path, position, bit)
    reading.read(directory, want(rows))


def flip(path, position, bit):
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 1 << bit]))


def test_swapped_tensors_are_found(stored, tmp_path):
    directory, rows, _ = stored
    directory = copy_of(directory, tmp_path)
    one, other = (next(row for _, row in rows if row.name == name) for name in ("small.8", "small.9"))
    data = bytearray((directory / one.file).read_bytes())
    data[one.offset : one.offset + 16], data[other.offset : other.offset + 16] = (
        data[other.offset : other.offset + 16],
        data[one.offset : one.offset + 16],
    )
    (directory / one.file).write_bytes(data)
    with pytest.raises(CheckpointDamaged):
        reading.read(directory, want(rows))


@pytest.mark.parametrize("name", ["large", "last"])
@pytest.mark.parametrize("missing", [1, 2])
def test_a_short_file_is_found(stored, tmp_path, name, missing):
    directory, rows, _ = stored
    directory = copy_of(directory, tmp_path)
    component, row = next((component, row) for component, row in rows if row.name == name)
    os.truncate(directory / row.file, row.offset + row.num_bytes - missing)
    with pytest.raises(CheckpointDamaged, match=f"tensor '{name}', block .* ends before it"):
        reading.read(directory, want([(component, row)]))


@pytest.mark.parametrize("plant", ["nothing", "link", "directory", "pipe"])
def test_what_is_no_regular_file_is_not_read(stored, tmp_path, plant):
    directory, rows, _ = stored
    directory = copy_of(directory, tmp_path)
    file = directory / rows[0][1].file
    file.rename(directory / "elsewhere")
    if plant == "link":
        file.symlink_to("elsewhere")
    elif plant == "directory":
        file.mkdir()
    elif plant == "pipe":
        os.mkfifo(file)
    with pytest.raises(StorageError, match="reading the checkpoint failed at"):
        reading.read(directory, want(rows))


def test_an_error_ends_all_reading_before_the_files_are_closed(stored, monkeypatch):
    directory, rows, _ = stored
    read_at, calls, late = files.read_at, [], []

    def slow_read_at(descriptor, view, offset):
        calls.append(offset)
        if len(calls) == 2:
            raise OSError(5, "Input/output error")
        time.sleep(0.01)
        try:
            os.fstat(descriptor)
        except OSError as err:
            late.append(err)
        return read_at(descriptor, view, offset)

    monkeypatch.setattr(files, "read_at", slow_read_at)
    open_before = num_open_files()
    with pytest.raises(StorageError, match="reading the checkpoint failed"):
        reading.read(directory, want(rows))
    assert not late
    assert num_open_files() == open_before


def test_progress_is_told_all_the_time(stored):
    directory, rows, _ = stored
    beats = []
    reading.read(directory, want(rows), on_progress=lambda: beats.append(1))
    assert len(beats) >= 6
