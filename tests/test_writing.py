"""What a rank writes: files that safetensors reads, rows that say where everything is, digests of what is there."""

import errno
import os
import time

import pytest
import torch
import xxhash
from safetensors import safe_open

from forgather_ckpt import container, dtypes, files, hashtree, index, memory, strict_json, values, writing
from forgather_ckpt.errors import CheckpointError, NoSpace, StorageError
from forgather_ckpt.hashtree import BLOCK_BYTES
from forgather_ckpt.index import Index
from forgather_ckpt.structure import capture
from forgather_ckpt.writing import Assignment
from tests.checkpoints import assign, write
from tests.states import tensor_bytes, tensor_of
from tests.system_calls import num_open_files

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")

MIB = 1 << 20


def slow_digest(data: bytes) -> str:
    blocks = [data[start : start + BLOCK_BYTES] for start in range(0, len(data), BLOCK_BYTES)] or [b""]
    digests = [xxhash.xxh3_128_hexdigest(block) for block in blocks]
    return digests[0] if len(digests) == 1 else xxhash.xxh3_128_hexdigest(bytes.fromhex("".join(digests)))


def check_files(directory, written):
    """Every file has the size and digest that was reported, and every row the bytes and digests that are there."""
    assert {path.name for path in directory.iterdir()} == set(written.files)
    rows = [row for entry in written.entries for row in entry.tensors]
    for name, (size, digest) in written.files.items():
        data = (directory / name).read_bytes()
        assert len(data) == size
        if name in written.indexes:
            assert xxhash.xxh3_128_hexdigest(data) == digest
            continue
        header_size = 8 + int.from_bytes(data[:8], "little")
        assert header_size % 4096 == 0
        own = sorted(
            (row for row in rows if row.file == name), key=lambda row: (row.offset, row.offset + row.num_bytes)
        )
        position, digests = header_size, [xxhash.xxh3_128_hexdigest(data[:header_size])]
        for row in own:
            assert row.offset == position, "there are no holes"
            assert row.offset % dtypes.ITEM_BYTES[row.dtype] == 0
            position += row.num_bytes
            piece = data[row.offset : position]
            assert row.digest.hex() == slow_digest(piece)
            assert [one.hex() for one in row.block_digests()] == [
                xxhash.xxh3_128_hexdigest(piece[start:stop]) for start, stop in hashtree.block_bounds(len(piece))
            ]
        assert position == size
        # tensors of no bytes stand at the place of the next, in the order of the header
        in_order = [
            xxhash.xxh3_128_hexdigest(data[:header_size]),
            *(row.digest.hex() for row in in_header_order(data, own)),
        ]
        assert len(in_order) == len(digests) + len(own)
        assert xxhash.xxh3_128_hexdigest(bytes.fromhex("".join(in_order))) == digest
    sizes = {name: size for name, (size, _) in written.files.items()}
    entries = []
    for name, pairs in written.indexes.items():
        found = Index.from_bytes((directory / name).read_bytes(), what=name, sizes=sizes)
        assert [(entry.component, entry.entry) for entry in found.entries] == list(pairs)
        entries += found.entries
    return entries


def in_header_order(data, rows):
    keys = [
        key for key in strict_json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")], what="", max_bytes=1 << 30)
    ]
    by_key = {row.key or row.name: row for row in rows}
    return [by_key[key] for key in keys if key != "__metadata__"]


def test_everything_that_is_written_can_be_read_by_the_library(tmp_path):
    state = {
        f"{dtype}/{shape}": tensor_of(dtype, shape)
        for dtype in dtypes.ITEM_BYTES
        for shape in [(3, 5), (), (0, 7), (2, 1, 4)]
    }
    state |= {"turned": tensor_of("float32", (3, 4)).t(), "expanded": torch.ones(1).expand(5)}
    written = write(tmp_path, assign("model", state))
    [entry] = check_files(tmp_path, written)
    with safe_open(tmp_path / "small-00000.safetensors", "pt") as file:
        for row in entry.tensors:
            tensor = capture(state).tensors[row.name].tensor
            assert tensor_bytes(file.get_tensor(row.key or row.name)) == tensor_bytes(tensor), row.name
            assert (row.dtype, row.shape, row.is_whole) == (str(tensor.dtype)[6:], tuple(tensor.shape), True)


def test_large_tensors_have_several_blocks(tmp_path):
    state = {
        "five blocks": torch.arange(5 * MIB, dtype=torch.int32),
        "a block and a byte": torch.arange(BLOCK_BYTES + 1).to(torch.uint8),
        "a block": torch.arange(MIB, dtype=torch.int32),
        "turned": torch.arange(3 * MIB, dtype=torch.int32).reshape(-1, 3).t(),
    }
    written = write(tmp_path, assign("model", state))
    [entry] = check_files(tmp_path, written)
    assert {row.name: len(row.blocks) for row in entry.tensors} == {
        "five blocks": 5, "a block and a byte": 2, "a block": 0, "turned": 3,
    }  # fmt: skip
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        for name, tensor in state.items():
            assert tensor_bytes(file.get_tensor(name)) == tensor_bytes(tensor)


@pytest.mark.parametrize(
    "make",
    [
        lambda: {"large": torch.zeros(2 * MIB), "empty": torch.zeros(0)},
        lambda: {"empty": torch.zeros(0), "large": torch.zeros(2 * MIB)},
        lambda: {"a": torch.zeros(0, 3), "b": torch.zeros(4, 0), "c": torch.zeros(0, dtype=torch.int8)},
        lambda: {
            "a": torch.zeros(2 * MIB),
            "b": torch.zeros(0),
            "c": torch.zeros(3),
            "d": torch.zeros(0),
            "e": torch.zeros(0),
        },
        lambda: {"a": torch.ones(20 * MIB), "b": torch.zeros(0)},
    ],
    ids=["after a large one", "before a large one", "alone", "between", "after more than is in flight"],
)
def test_tensors_without_elements_have_a_place_and_a_digest(tmp_path, make):
    """Made by the test: what a module holds is copied, page table by page table, into every rank that is forked."""
    state = make()
    [entry] = check_files(tmp_path, write(tmp_path, assign("model", state)))
    assert {row.name for row in entry.tensors} == set(state)
    assert all(row.digest == hashtree.digest(b"") for row in entry.tensors if row.num_bytes == 0)


def test_hundreds_of_small_tensors_share_requests(tmp_path, monkeypatch):
    state = {f"layers.{number}": torch.full((number,), number) for number in range(700)}
    requests = []
    write_at = files.write_at
    monkeypatch.setattr(
        files, "write_at", lambda fd, data, offset: (requests.append(len(data)), write_at(fd, data, offset))
    )
    [entry] = check_files(tmp_path, write(tmp_path, assign("model", state)))
    assert len(entry.tensors) == 700
    assert len(requests) < 10


def test_a_component_of_which_little_is_written_shares_a_file(tmp_path):
    written = write(
        tmp_path,
        assign("model", {"w": torch.zeros(MIB // 4)}),
        assign("optimizer", {"w": torch.zeros(10)}),
        assign("scheduler", {"w": torch.zeros(10), "step": 5}),
        assign("rng", {"seed": 1}),
        writer=7,
    )
    assert set(written.files) == {"model.safetensors", "small-00007.safetensors", "index-00007.json"}
    entries = check_files(tmp_path, written)
    assert [entry.component for entry in entries] == ["model", "optimizer", "scheduler", "rng"]
    keys = {entry.component: [row.key or row.name for row in entry.tensors] for entry in entries}
    assert keys == {"model": ["w"], "optimizer": ["w"], "scheduler": ["scheduler:w"], "rng": []}


def test_names_that_are_taken_or_reserved_get_another_key(tmp_path):
    state = {"__metadata__": torch.zeros(1), "a:x": torch.ones(1), "x": torch.zeros(2)}
    written = write(tmp_path, assign("a", {"x": torch.full((1,), 2.0)}), assign("a:a", state), assign("b", state))
    rows = [row for entry in check_files(tmp_path, written) for row in entry.tensors]
    keys = [row.key or row.name for row in rows]
    assert len(set(keys)) == len(rows) == 7
    assert "__metadata__" not in keys


def test_a_piece_is_stored_flat_under_its_range(tmp_path):
    tensor = torch.arange(12 * MIB, dtype=torch.int16).reshape(3, -1)
    data = tensor_bytes(tensor)
    parts = {"w": (2 * BLOCK_BYTES, 5 * BLOCK_BYTES)}
    written = write(tmp_path, assign("model", {"w": tensor}, parts=parts, num_writers=4), writer=2)
    assert set(written.files) == {"model-00002-of-00004.safetensors", "index-00002.json"}
    [entry] = check_files(tmp_path, written)
    [row] = entry.tensors
    assert (row.key, row.range, row.shape) == (f"w#{4 * MIB}:{10 * MIB}", (4 * MIB, 10 * MIB), (3, 4 * MIB))
    assert row.logical is None
    with safe_open(tmp_path / "model-00002-of-00004.safetensors", "pt") as file:
        found = file.get_tensor(row.key)
        assert tuple(found.shape) == (6 * MIB,)
        assert tensor_bytes(found) == data[2 * BLOCK_BYTES : 5 * BLOCK_BYTES]


def checked(assignment: Assignment) -> Assignment:
    """The assignment with the block digests that a replication check takes."""
    pieces = [
        piece._replace(expected=memory.block_digests([piece.item])[piece.item.name]) for piece in assignment.pieces
    ]
    return Assignment(assignment.component, assignment.entry, pieces, assignment.values, assignment.aliases)


def test_a_piece_that_was_compared_carries_the_digest_of_the_whole(tmp_path):
    tensor = torch.arange(3 * MIB, dtype=torch.int32)
    parts = {"w": (BLOCK_BYTES, 3 * BLOCK_BYTES)}
    [entry] = check_files(tmp_path, write(tmp_path, checked(assign("model", {"w": tensor}, parts=parts))))
    assert entry.tensors[0].logical.hex() == slow_digest(tensor_bytes(tensor))


@pytest.mark.parametrize("at", [0, 2 * MIB, 3 * MIB - 1])
def test_a_tensor_that_changed_since_it_was_compared_is_refused(tmp_path, at):
    tensor = torch.arange(3 * MIB, dtype=torch.int32)
    assignment = checked(assign("model", {"w": tensor, "n": torch.zeros(1)}))
    tensor[at] += 1
    with pytest.raises(CheckpointError, match="'w' changed while it was being saved; nothing may modify the state"):
        write(tmp_path, assignment)


def test_values_and_aliases_lie_in_the_index(tmp_path):
    weight = torch.zeros(2)
    state = {"a": 1, "w": weight, "nested": {"lr": float("inf"), 3: (1, b"x")}, "tied": weight, "none": None}
    [entry] = check_files(tmp_path, write(tmp_path, assign("c", state)))
    assert {row.name: values.decode(row.value) for row in entry.values} == {
        "a": 1, "nested/lr": float("inf"), "nested/~i3": (1, b"x"), "none": None,
    }  # fmt: skip
    assert all(row.digest.hex() == xxhash.xxh3_128_hexdigest(strict_json.dumps(row.value)) for row in entry.values)
    assert [tuple(row) for row in entry.aliases] == [("tied", 5, "w")]
    orders = sorted(row.order for row in (*entry.tensors, *entry.values, *entry.aliases))
    assert orders == [1, 2, 3, 4, 5, 6]


def test_nothing_to_write_is_no_file(tmp_path):
    written = write(tmp_path)
    assert written.files == {} and list(tmp_path.iterdir()) == []


def test_a_file_that_is_full_is_followed_by_another(tmp_path, monkeypatch):
    monkeypatch.setattr(container, "MAX_ITEMS", 7)
    monkeypatch.setattr(index, "MAX_ITEMS", 6)
    state = {f"layers.{number}": torch.full((MIB // 40,), float(number)) for number in range(20)}
    written = write(tmp_path, assign("model", state), assign("other", {f"x{i}": torch.ones(i) for i in range(9)}))
    assert {name for name in written.files if name.startswith("model")} == {
        "model.safetensors", "model-part1.safetensors", "model-part2.safetensors",
    }  # fmt: skip
    assert {name for name in written.files if name.startswith("small")} == {
        "small-00000.safetensors", "small-00000-part1.safetensors",
    }  # fmt: skip
    entries = check_files(tmp_path, written)
    assert sum(entry.num_items for entry in entries) == 29


def test_a_header_that_is_full_is_followed_by_another(tmp_path, monkeypatch):
    monkeypatch.setattr(container, "MAX_HEADER_BYTES", 2000)
    state = {"😀" * number: torch.ones(1) for number in range(1, 25)}
    written = write(tmp_path, assign("model", state))
    check_files(tmp_path, written)
    for path in tmp_path.glob("*.safetensors"):
        assert int.from_bytes(path.read_bytes()[:8], "little") <= 2000 + 4096


def test_progress_is_told_all_the_time(tmp_path):
    beats = []
    writing.write(
        tmp_path,
        [assign("model", {"w": torch.zeros(16 * MIB)})],
        writer=0,
        stems={"model": "model"},
        on_progress=lambda: beats.append(1),
    )
    assert len(beats) >= 16


# ---- what fails


def test_a_planted_file_is_refused(tmp_path):
    (tmp_path / "precious").write_bytes(b"precious")
    (tmp_path / "model.safetensors").symlink_to("precious")
    with pytest.raises(StorageError, match=r"writing the checkpoint failed at .*model\.safetensors: File exists"):
        write(tmp_path, assign("model", {"w": torch.zeros(MIB)}))
    assert (tmp_path / "precious").read_bytes() == b"precious"


@pytest.mark.parametrize(("number", "kind"), [(errno.ENOSPC, NoSpace), (errno.EIO, StorageError)])
@pytest.mark.parametrize("fail_at", [0, 1, 5])
def test_an_error_of_a_write_is_typed_and_nobody_writes_after_the_file_is_closed(
    tmp_path, monkeypatch, fail_at, number, kind
):
    """Another file could have the descriptor's number by then."""
    write_at, calls, late = files.write_at, [], []

    def slow_write_at(descriptor, data, offset):
        calls.append(offset)
        if len(calls) == fail_at + 1:
            raise OSError(number, os.strerror(number))
        time.sleep(0.01)
        try:
            os.fstat(descriptor)
        except OSError as err:
            late.append(err)
        write_at(descriptor, data, offset)

    monkeypatch.setattr(files, "write_at", slow_write_at)
    open_before = num_open_files()
    with pytest.raises(StorageError, match="writing the checkpoint failed") as caught:
        write(tmp_path, assign("model", {"w": torch.zeros(16 * MIB)}))
    assert type(caught.value) is kind
    assert not late
    assert num_open_files() == open_before
