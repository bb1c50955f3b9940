"""Comparing checkpoints by what their indexes say, where two runs part, and how far stored tensors are apart."""

from __future__ import annotations

import dataclasses
import itertools
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from forgather_ckpt import comparison, deltas, excerpts, files, hashtree, parting, strict_json
from forgather_ckpt.comparison import Change, Comparison, Side, StoredTensor
from forgather_ckpt.dtypes import ITEM_BYTES
from forgather_ckpt.errors import CheckpointDamaged, FormatError
from forgather_ckpt.hashtree import BLOCK_BYTES
from forgather_ckpt.index import AliasRow, Box, Index, IndexEntry, TensorRow, ValueRow
from forgather_ckpt.manifest import CheckpointManifest, ComponentRecord, EntryRecord, FileRecord
from forgather_ckpt.patterns import SharingPattern
from forgather_ckpt.topology import Coordinates, Topology
from tests.states import tensor_bytes, tensor_of

# ---- what is stored, made by hand


def whole(name: str, content: bytes, *, dtype: str = "uint8", shape: tuple[int, ...] | None = None, order: int = 0):
    shape = (len(content) // ITEM_BYTES[dtype],) if shape is None else shape
    return TensorRow(name, order, dtype, shape, "f", 0, hashtree.buffer_digest(content), blocks=blocks_of(content))


def blocks_of(content: bytes) -> tuple[bytes, ...]:
    digests = [hashtree.digest(content[start:stop]) for start, stop in hashtree.block_bounds(len(content))]
    return tuple(digests) if len(digests) > 1 else ()


def piece(name: str, content: bytes, start: int, stop: int, *, box: Box | None = None, shape: Any = None) -> TensorRow:
    """Bytes `start` to `stop` of a tensor of uint8 whose content is `content`, or of its `box`."""
    shape = (len(content),) if shape is None else shape
    part = content[start:stop]
    digest = hashtree.buffer_digest(part)
    return TensorRow(name, 0, "uint8", shape, "f", 0, digest, box=box, range=(start, stop), blocks=blocks_of(part))


def cut(name: str, content: bytes, *cuts: int) -> list[TensorRow]:
    return [piece(name, content, *bounds) for bounds in itertools.pairwise([0, *cuts, len(content)])]


def value(name: str, data: Any, order: int = 0) -> ValueRow:
    return ValueRow(name, order, data, hashtree.digest(strict_json.dumps(data)))


def stored(*rows: Any, component: str = "model", entry: str = "all") -> IndexEntry:
    kinds = (TensorRow, ValueRow, AliasRow)
    tensors, values, aliases = ([row for row in rows if isinstance(row, kind)] for kind in kinds)
    return IndexEntry(component, entry, tensors, values, aliases)


def entry_record(parts: Sequence[IndexEntry], ranks: Sequence[int], coordinates: Coordinates | None) -> EntryRecord:
    names = {row.name for part in parts for row in (*part.tensors, *part.values, *part.aliases)}
    digest = hashtree.digest(repr(parts).encode()).hex()
    return EntryRecord(tuple(ranks), coordinates, (0,), len(names), 0, digest)


def side(
    *parts: IndexEntry,
    pattern: SharingPattern = SharingPattern.REPLICATED,
    ranks: Mapping[str, Sequence[int]] | None = None,
    places: Mapping[str, Coordinates] | None = None,
) -> Side:
    """A checkpoint with one index file for each part."""
    components = {}
    for key in dict.fromkeys(part.component for part in parts):
        own = [part for part in parts if part.component == key]
        entries = {
            name: entry_record(
                [part for part in own if part.entry == name], (ranks or {}).get(name, (0,)), (places or {}).get(name)
            )
            for name in dict.fromkeys(part.entry for part in own)
        }
        names = "global" if set(entries) == {"all"} else "local"
        components[key] = ComponentRecord(pattern, names, True, None, entries, "0" * 32)
    indexes = {f"index-{number:05}.json": [(part.component, part.entry)] for number, part in enumerate(parts)}
    index_digests = {
        name: hashtree.digest(repr(part).encode()).hex() for name, part in zip(indexes, parts, strict=True)
    }
    records = {name: FileRecord(1, digest, 0) for name, digest in index_digests.items()}
    manifest = CheckpointManifest(1, 1, "periodic", "", Topology.single(), components, records, indexes)
    contents = dict(zip(indexes, parts, strict=True))
    return Side(manifest, mock.Mock(side_effect=lambda name: Index(0, [contents[name]])))


def changes(found: Comparison) -> list[tuple[str, Change]]:
    return [(difference.name, difference.change) for difference in found.differences]


CONTENT = bytes(range(256)) * 50_000  # 12.8 MB: four blocks
OTHER = CONTENT[:-1] + b"\0"
BLOCK = BLOCK_BYTES


# ---- items


@pytest.mark.parametrize(
    ("one", "other", "change"),
    [
        ([whole("t", b"abcd")], [whole("t", b"abcd")], None),
        ([whole("t", b"abcd")], [whole("t", b"abcE")], Change.BYTES),
        ([whole("t", b"abcd")], [whole("t", b"abcd", shape=(2, 2))], Change.STRUCTURE),
        ([whole("t", b"abcd")], [whole("t", b"abcd", dtype="int8")], Change.STRUCTURE),
        ([whole("t", b"abcd")], [value("t", 4)], Change.KIND),
        ([value("t", 4)], [whole("t", b"abcd")], Change.KIND),
        ([value("t", [1, {"$tuple": []}])], [value("t", [1, {"$tuple": []}])], None),
        ([value("t", 1)], [value("t", 1.0)], Change.VALUE),
        ([value("t", 1)], [value("t", True)], Change.VALUE),
        ([value("t", 0.0)], [value("t", -0.0)], Change.VALUE),
        ([value("t", 0.1)], [value("t", 0.1 + 2e-17)], Change.VALUE),
        ([value("t", None)], [], Change.ONLY_IN_A),
        ([], [whole("t", b"")], Change.ONLY_IN_B),
        ([whole("t", b"")], [whole("t", b"")], None),
        # whole or in pieces, and in which
        ([whole("t", CONTENT)], cut("t", CONTENT, BLOCK), None),
        ([whole("t", CONTENT)], cut("t", OTHER, BLOCK), Change.BYTES),
        (cut("t", CONTENT, BLOCK, 2 * BLOCK), cut("t", CONTENT, 2 * BLOCK), None),
        (cut("t", CONTENT, BLOCK, 2 * BLOCK)[::-1], cut("t", OTHER, 2 * BLOCK), Change.BYTES),
        ([whole("t", CONTENT)], cut("t", CONTENT, BLOCK)[::-1], None),
        (cut("t", CONTENT, 0, BLOCK), [whole("t", CONTENT)], None),  # an empty piece
        # cut where no block begins: only what was cut alike can be compared
        (cut("t", CONTENT, 1000), cut("t", CONTENT, 1000), None),
        (cut("t", CONTENT, 1000), cut("t", OTHER, 1000), Change.BYTES),
        (cut("t", CONTENT, 1000), [whole("t", CONTENT)], Change.UNKNOWN),
        (cut("t", CONTENT, 1000), cut("t", CONTENT, 1000, 2000), Change.UNKNOWN),
        (cut("t", CONTENT, 1000, 2000), cut("t", OTHER, 500, 2000), Change.BYTES),
    ],
)
def test_items_of_one_name(one: list[Any], other: list[Any], change: Change | None) -> None:
    same = value("same", "x")
    found = comparison.compare(side(stored(*one, same)), side(stored(*other, value("same", "x", order=9))))
    assert changes(found) == ([] if change is None else [("t", change)])
    assert found.is_equal is (change is None)
    assert found.is_different is (change not in (None, Change.UNKNOWN))
    [component] = found.components
    assert (component.num_items, component.num_equal) == (2, 2 if change is None else 1)


def test_pieces_of_several_writers_are_one_tensor() -> None:
    rows = cut("t", CONTENT, BLOCK, 2 * BLOCK)
    found = comparison.compare(side(*(stored(row) for row in rows)), side(stored(whole("t", CONTENT))))
    assert found.is_equal
    assert [component.num_items for component in found.components] == [1]


def boxed(name: str, content: bytes, width: int, *columns: int) -> list[TensorRow]:
    """Columns of a matrix, each its own box, as a tensor that is sharded across its rows is stored."""
    matrix = np.frombuffer(content, np.uint8).reshape(-1, width)
    rows = []
    for low, high in itertools.pairwise([0, *columns, width]):
        part = np.ascontiguousarray(matrix[:, low:high]).tobytes()
        box = ((0, len(matrix)), (low, high))
        rows.append(TensorRow(name, 0, "uint8", matrix.shape, "f", 0, hashtree.buffer_digest(part), box=box))
    return rows


@pytest.mark.parametrize(
    ("one", "other", "change"),
    [
        (boxed("t", b"abcdefgh", 4, 2), boxed("t", b"abcdefgh", 4, 2)[::-1], None),
        (boxed("t", b"abcdefgh", 4, 2), boxed("t", b"abcdefgH", 4, 2), Change.BYTES),
        (boxed("t", b"abcdefgh", 4, 2), boxed("t", b"abcdefgh", 4, 1), Change.UNKNOWN),
        (boxed("t", b"abcdefgh", 4, 2, 3), boxed("t", b"abcdefgH", 4, 1, 3), Change.BYTES),
        (boxed("t", b"abcdefgh", 4, 2), [whole("t", b"abcdefgh", shape=(2, 4))], Change.UNKNOWN),
        ([boxed("t", b"abcdefgh", 4)[0]], [whole("t", b"abcdefgh", shape=(2, 4))], None),
    ],
)
def test_boxes_are_compared_where_they_are_the_same(one: Any, other: Any, change: Change | None) -> None:
    assert changes(comparison.compare(side(stored(*one)), side(stored(*other)))) == ([("t", change)] if change else [])


def test_the_digest_that_a_writer_took_of_the_whole_tensor_is_used() -> None:
    rows = [row._replace(logical=hashtree.buffer_digest(CONTENT)) for row in cut("t", CONTENT, 1000)]
    assert comparison.compare(side(stored(*rows)), side(stored(whole("t", CONTENT)))).is_equal
    assert not comparison.compare(side(stored(*rows)), side(stored(whole("t", OTHER)))).is_equal


def test_a_second_name_counts_as_its_tensor() -> None:
    tied = side(stored(whole("a", b"1234"), AliasRow("b", 1, "a")))
    turned = side(stored(whole("b", b"1234"), AliasRow("a", 0, "b")))
    copied = side(stored(whole("a", b"1234"), whole("b", b"1234")))
    changed = side(stored(whole("a", b"1234"), whole("b", b"123x")))
    for other, expected, num_retied in ((turned, [], 0), (copied, [], 1), (changed, [("b", Change.BYTES)], 0)):
        found = comparison.compare(tied, other)
        assert changes(found) == expected
        assert [component.num_retied for component in found.components] == [num_retied]


def test_differences_come_in_the_order_of_the_state_dict() -> None:
    one = stored(value("late", 1, order=3), value("z", 1, order=0), value("same", 1, order=1))
    other = stored(value("late", 2, order=0), value("new", 2, order=2), value("z", 2, order=1), value("same", 1))
    found = comparison.compare(side(one), side(other))
    assert changes(found) == [("z", Change.VALUE), ("new", Change.ONLY_IN_B), ("late", Change.VALUE)]


def test_an_index_that_does_not_hold_whole_items_is_refused() -> None:
    parts = side(stored(*cut("t", CONTENT, 1000)[:1]))
    with pytest.raises(FormatError, match="component 'model': item 't' the stored pieces do not make up the whole"):
        comparison.compare(parts, side(stored(whole("t", CONTENT))))


def test_what_reading_settles() -> None:
    one = stored(*cut("t", CONTENT, 1000), *cut("u", CONTENT, 1000), value("v", 1, order=2))
    other = stored(whole("t", CONTENT), whole("u", OTHER), value("v", 2, order=2))
    found = comparison.compare(side(one), side(other)).settled(lambda difference: difference.name == "t")
    assert changes(found) == [("u", Change.BYTES), ("v", Change.VALUE)]
    assert [component.num_equal for component in found.components] == [1]
    assert [difference.tensors is not None for difference in found.differences] == [True, False]


# ---- entries and components


def per_rank(*labels: str) -> Side:
    parts = [stored(value("seed", label), component="rng", entry=f"rank={rank}") for rank, label in enumerate(labels)]
    return side(*parts, pattern=SharingPattern.PER_RANK, ranks={part.entry: (n,) for n, part in enumerate(parts)})


def test_a_rank_that_only_one_side_has() -> None:
    found = comparison.compare(per_rank("a", "b", "c", "d"), per_rank("a", "B", "c"))
    [component] = found.components
    assert [entry.entry for entry in component.only_in_a] == ["rank=3"]
    assert [(difference.entry, difference.name) for difference in component.differences] == [("rank=1", "seed")]
    assert (component.num_equal, component.num_items, component.count(Change.ONLY_IN_A)) == (2, 4, 1)
    assert not comparison.compare(per_rank("a"), per_rank("a", "b")).is_equal


@pytest.mark.parametrize(
    ("ours", "theirs", "matched"),
    [
        ({"pp=0/2": (("pp", 0, 2),)}, {"pp=0/2,tp=0/1": (("pp", 0, 2), ("tp", 0, 1))}, True),
        ({"pp=0/2": (("pp", 0, 2),)}, {"pp=0/4": (("pp", 0, 4),)}, False),
        ({"dp=0": (0, 2)}, {"dp=1": (0, 2)}, True),
        ({"dp=0": (0, 2)}, {"dp=0": (0, 1)}, False),
    ],
)
def test_groups_are_found_by_their_place_or_their_ranks(ours: Any, theirs: Any, matched: bool) -> None:
    def group(places: Any) -> Side:
        [(entry, place)] = places.items()
        where = {"ranks": places} if isinstance(place[0], int) else {"places": places}
        return side(stored(value("v", 1), entry=entry), pattern=SharingPattern.PER_GROUP, **where)

    [component] = comparison.compare(group(ours), group(theirs)).components
    assert (component.num_equal == 1) is matched
    assert [entry.entry for entry in component.only_in_a] == ([] if matched else list(ours))
    assert [entry.entry for entry in component.only_in_b] == ([] if matched else list(theirs))


def test_a_component_that_only_one_side_has() -> None:
    both = stored(value("v", 1), component="both")
    one = side(stored(value("w", 1), value("x", 1), component="first"), both)
    other = side(both, stored(value("w", 1), component="last"))
    found = comparison.compare(one, other)
    assert [component.key for component in found.components] == ["first", "both", "last"]
    assert [component.is_equal for component in found.components] == [False, True, False]
    assert [component.num_items for component in found.components] == [2, 1, 1]
    chosen = comparison.compare(one, other, ["both"])
    assert chosen.is_equal
    assert [component.key for component in chosen.components] == ["both"]


def test_indexes_are_read_only_for_entries_whose_digests_differ() -> None:
    parts = [stored(value("v", 1), component=key) for key in ("a", "b", "c")]
    one = side(*parts)
    other = side(parts[0], stored(value("v", 2), component="b"), parts[2])
    assert changes(comparison.compare(one, other)) == [("v", Change.VALUE)]
    for read in (one.read_index, other.read_index):
        assert isinstance(read, mock.Mock)
        assert [call.args for call in read.call_args_list] == [("index-00001.json",)]


def with_entry(one: Side, **changes: Any) -> Side:
    """The same with another record of the component `model`'s entry."""
    record = one.manifest.components["model"]
    entries = {"all": dataclasses.replace(record.entries["all"], **changes)}
    components = {"model": dataclasses.replace(record, entries=entries)}
    return dataclasses.replace(one, manifest=dataclasses.replace(one.manifest, components=components))


def test_pieces_that_changed_places_are_a_difference_though_all_digests_are_there() -> None:
    """The digest of an entry that several ranks wrote is made of their pieces' digests, not of what those are of."""
    first, second = CONTENT[:BLOCK], bytes(BLOCK)
    one = side(stored(*cut("t", first + second, BLOCK)))
    other = side(stored(*cut("t", second + first, BLOCK)))
    one, other = (with_entry(it, writers=(0, 1), digest="0" * 32) for it in (one, other))
    assert changes(comparison.compare(one, other)) == [("t", Change.BYTES)]


def test_an_entry_of_several_writers_with_the_same_indexes_is_equal_unread() -> None:
    one, other = (
        with_entry(side(stored(*cut("t", CONTENT, BLOCK))), writers=(0, 1), digest=digit * 32) for digit in "12"
    )
    assert comparison.compare(one, other).is_equal
    for read in (one.read_index, other.read_index):
        assert isinstance(read, mock.Mock)
        read.assert_not_called()


def num_calls(function: Callable[[], Any]) -> int:
    """How many calls, of Python's and of built-in functions, this takes."""
    count = 0

    def on_event(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(on_event)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count


def test_the_work_grows_with_the_number_of_items_and_no_faster() -> None:
    def both(size: int, changed: bool) -> Side:
        tensors = [whole(f"t{number}", b"1x" if changed and number % 3 == 0 else b"12") for number in range(size)]
        values = [value(f"v{number}", number, order=number) for number in range(size)]
        ranks = [
            stored(value("seed", [number, changed]), component="rng", entry=f"rank={number}") for number in range(size)
        ]
        return side(stored(*tensors, *values), *ranks, pattern=SharingPattern.PER_RANK)

    small, large = ((both(size, False), both(size, True)) for size in (200, 1600))
    few = num_calls(lambda: comparison.compare(*small))
    many = num_calls(lambda: comparison.compare(*large))
    assert many < 8 * few * 1.1


def test_a_hundred_thousand_items() -> None:
    """Would take hours if it were quadratic; the runner's limit is two minutes."""
    size = 100_000
    digest = hashtree.digest(b"")
    rows = [TensorRow(f"layers.{number}", number, "uint8", (0,), "f", 0, digest) for number in range(size)]
    other = [row._replace(digest=hashtree.digest(b"x")) if row.order % 2 else row for row in rows]
    found = comparison.compare(side(stored(*rows)), side(stored(*other)))
    assert [component.num_equal for component in found.components] == [size // 2]


# ---- where runs part


@pytest.mark.parametrize("count", range(1, 18))
def test_halving_finds_the_first_step_that_differs(count: int) -> None:
    steps = [10 * number for number in range(count)]
    for num_equal in range(count + 1):
        asked: list[int] = []

        def is_equal(step: int, num_equal: int = num_equal, asked: list[int] = asked) -> bool:
            asked.append(step)
            return step < 10 * num_equal

        found = parting.find(steps, is_equal)
        assert found.first_different == (10 * num_equal if num_equal < count else None)
        assert found.last_equal == (10 * (num_equal - 1) if num_equal else None)
        assert len(asked) == len(set(asked)) <= 1 + math.ceil(math.log2(count))
        assert found.compared == tuple(sorted(asked))


@pytest.mark.parametrize(
    ("verdicts", "last_equal", "first", "again"),
    [
        ([], None, None, ()),
        ([True, True], 1, None, ()),
        ([False, False], None, 0, ()),
        ([True, False, True, False, True], 0, 1, (2, 4)),
        ([False, True], None, 0, (1,)),
    ],
)
def test_all_steps_tell_where_runs_meet_again(verdicts: Any, last_equal: Any, first: Any, again: Any) -> None:
    found = parting.find_in_all(range(len(verdicts)), verdicts.__getitem__)
    assert found == parting.Parting(last_equal, first, tuple(range(len(verdicts))), again)


def test_no_step_is_no_question() -> None:
    assert parting.find([], lambda step: False) == parting.Parting(None, None, ())


# ---- excerpts: tensors on disk, cut in every way


def put(directory: Path, tensor: torch.Tensor, *parts: tuple[Box | None, tuple[int, int] | None]) -> StoredTensor:
    """Store a tensor in these pieces, in a file of its own, after some bytes that are nobody's."""
    dtype, shape = str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)
    size = ITEM_BYTES[dtype]
    content = np.frombuffer(tensor_bytes(tensor), np.uint8).reshape(*shape, size)
    directory.mkdir(exist_ok=True)
    rows = []
    with (directory / "f").open("wb") as stream:
        for box, bounds in parts or [(None, None)]:
            stream.write(b"?" * 5)
            where = tuple(slice(*bounds) for bounds in box) if box else ()
            data = np.ascontiguousarray(content[where]).tobytes()
            if bounds is not None:
                data = data[bounds[0] * size : bounds[1] * size]
            offset = stream.tell()
            stream.write(data)
            row = TensorRow("t", 0, dtype, shape, "f", offset, hashtree.buffer_digest(data), box, bounds)
            rows.append(row._replace(blocks=blocks_of(data)))
    return StoredTensor(dtype, shape, tuple(rows))


def read_all(directory: Path, tensor: StoredTensor) -> bytes:
    reader = excerpts.Excerpts(directory, "model", tensor)
    return b"".join(reader.read(slab).tobytes() for slab in excerpts.slabs(tensor.dtype, tensor.shape))


def grid(*cuts: Sequence[int]) -> list[tuple[Box, None]]:
    """All boxes between the cuts of each dimension."""
    return [(box, None) for box in itertools.product(*(list(itertools.pairwise(own)) for own in cuts))]


@pytest.mark.parametrize("block_bytes", [1 << 22, 64, 16])
@pytest.mark.parametrize(
    "parts",
    [
        [],
        [(None, (0, 7)), (None, (7, 100)), (None, (100, 120))],
        [(None, (60, 120)), (None, (0, 60))],
        grid((0, 1, 4), (0, 6), (0, 5)),
        grid((0, 4), (0, 2, 3, 6), (0, 5)),
        grid((0, 4), (0, 6), (0, 1, 4, 5)),
        grid((0, 3, 4), (0, 2, 6), (0, 1, 5)),
        [(((0, 4), (0, 6), (0, 3)), (0, 50)), (((0, 4), (0, 6), (3, 5)), None), (((0, 4), (0, 6), (0, 3)), (50, 72))],
    ],
)
def test_excerpts_put_pieces_together(
    parts: Any, block_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (hashtree, excerpts):
        monkeypatch.setattr(module, "BLOCK_BYTES", block_bytes)
    tensor = tensor_of("int32", (4, 6, 5))
    assert read_all(tmp_path, put(tmp_path, tensor, *parts)) == tensor_bytes(tensor)


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1, 1), (7,)])
def test_excerpts_of_small_and_empty_tensors(shape: tuple[int, ...], tmp_path: Path) -> None:
    tensor = tensor_of("float64", shape)
    assert read_all(tmp_path, put(tmp_path, tensor)) == tensor_bytes(tensor)


@pytest.mark.parametrize("shape", [(40,), (2, 20), (20, 2), (2, 5, 4), (1, 40)])
def test_slabs_cover_a_tensor_in_order_and_are_no_larger_than_a_block(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(excerpts, "BLOCK_BYTES", 32)
    position = 0
    for slab in excerpts.slabs("float32", shape):
        count = (slab.stop - slab.start) * math.prod(shape[len(slab.prefix) + 1 :])
        assert slab.position == position
        assert 0 < 4 * count <= 32
        position += count
    assert position == 40


def test_every_block_is_read_once_and_few_are_held(tmp_path: Path) -> None:
    tensor = torch.arange(6 * (BLOCK // 4) + 11, dtype=torch.int32).reshape(-1, 1)
    stored_tensor = put(tmp_path, tensor, (None, (0, 3_000_001)), (None, (3_000_001, tensor.numel())))
    num_blocks = sum(len(row.block_digests()) for row in stored_tensor.rows)
    reader = excerpts.Excerpts(tmp_path, "model", stored_tensor)
    with mock.patch.object(files, "read_at", wraps=files.read_at) as read:
        for slab in excerpts.slabs("int32", tensor.shape):
            assert reader.read(slab).nbytes <= BLOCK
            assert len(reader._kept) <= 2
    assert read.call_count == num_blocks


def test_boxes_side_by_side_are_read_once_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (hashtree, excerpts):
        monkeypatch.setattr(module, "BLOCK_BYTES", 64)
    tensor = tensor_of("int16", (200, 8))
    stored_tensor = put(tmp_path, tensor, *grid((0, 200), (0, 1, 4, 8)))
    with mock.patch.object(files, "read_at", wraps=files.read_at) as read:
        assert read_all(tmp_path, stored_tensor) == tensor_bytes(tensor)
    assert read.call_count == sum(len(row.block_digests()) for row in stored_tensor.rows)


def test_no_more_blocks_are_held_than_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(excerpts, "NUM_KEPT_BLOCKS", 3)
    for module in (hashtree, excerpts):
        monkeypatch.setattr(module, "BLOCK_BYTES", 64)
    tensor = tensor_of("int16", (50, 8))
    stored_tensor = put(tmp_path, tensor, *grid((0, 50), range(9)))
    reader = excerpts.Excerpts(tmp_path, "model", stored_tensor)
    parts = []
    for slab in excerpts.slabs("int16", (50, 8)):
        parts.append(reader.read(slab).tobytes())
        assert len(reader._kept) <= 3
    assert b"".join(parts) == tensor_bytes(tensor)


def test_a_damaged_block_is_never_shown(tmp_path: Path) -> None:
    tensor = torch.arange(3_000_000, dtype=torch.int32)
    stored_tensor = put(tmp_path, tensor)
    data = bytearray((tmp_path / "f").read_bytes())
    data[2 * BLOCK] ^= 1
    (tmp_path / "f").write_bytes(data)
    with pytest.raises(CheckpointDamaged, match=r"component 'model': tensor 't', block 2 of 3 \(from byte 4194309 of"):
        read_all(tmp_path, stored_tensor)
    (tmp_path / "f").write_bytes(data[:-1])
    row = stored_tensor.rows[0]
    with pytest.raises(CheckpointDamaged, match=r"block 3 of 3 .* ends before it"):
        excerpts.Excerpts(tmp_path, "model", stored_tensor)._read_block(row, 2)


# ---- deltas


def measure(one: torch.Tensor, other: torch.Tensor, tmp_path: Path) -> deltas.Delta:
    left, right = tmp_path / "left", tmp_path / "right"
    return deltas.measure("model", (left, put(left, one)), (right, put(right, other)))


def expected_norms(one: torch.Tensor, other: torch.Tensor) -> tuple[float, float]:
    """One number at a time, in Python's own arithmetic."""
    pairs = []
    for a, b in zip(numbers(one), numbers(other), strict=True):
        if math.isfinite(a) and math.isfinite(b):
            pairs.append((a, b - a))
    return math.hypot(*(float(a) for a, _ in pairs)), math.hypot(*(float(apart) for _, apart in pairs))


def numbers(tensor: torch.Tensor) -> list[Any]:
    if tensor.is_complex():
        tensor = tensor.reshape(-1).view({2: torch.float16, 4: torch.float32, 8: torch.float64}[tensor.itemsize // 2])
    if tensor.is_floating_point():
        tensor = tensor.to(torch.float64)
    return [int(number) if type(number) is bool else number for number in tensor.reshape(-1).tolist()]


NUMERIC = [dtype for dtype in ITEM_BYTES if dtype != "float4_e2m1fn_x2" and hasattr(torch, dtype)]


@pytest.mark.parametrize("dtype", NUMERIC)
def test_norms_of_every_dtype(dtype: str, tmp_path: Path) -> None:
    one, other = tensor_of(dtype, (3, 50), seed=1), tensor_of(dtype, (3, 50), seed=2)
    found = measure(one, other, tmp_path)
    norm, difference = expected_norms(one, other)
    assert found.norm == pytest.approx(norm, rel=1e-12)
    assert found.difference_norm == pytest.approx(difference, rel=1e-12)
    assert found.relative_norm == pytest.approx(difference / norm, rel=1e-12)
    mine, its = (tensor_bytes(tensor) for tensor in (one, other))
    size = ITEM_BYTES[dtype]
    differing = [at for at in range(150) if mine[at * size : (at + 1) * size] != its[at * size : (at + 1) * size]]
    assert found.elements.num_elements == 150
    assert found.elements.num_different == len(differing)
    assert found.elements.first_index == divmod(differing[0], 50)


def test_norms_are_the_same_whatever_the_slices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = tensor_of("bfloat16", (64, 33), seed=1), tensor_of("bfloat16", (64, 33), seed=2)
    at_once = measure(one, other, tmp_path)
    monkeypatch.setattr(deltas, "_SLICE_ELEMENTS", 5)
    for module in (hashtree, excerpts):
        monkeypatch.setattr(module, "BLOCK_BYTES", 100)
    in_slices = measure(one, other, tmp_path)
    assert in_slices.elements == at_once.elements
    assert in_slices.norm == pytest.approx(at_once.norm, rel=1e-12)
    assert in_slices.difference_norm == pytest.approx(at_once.difference_norm, rel=1e-12)


@pytest.mark.parametrize(
    ("one", "other", "norm", "difference", "relative"),
    [
        ([3e200, 4e200], [3e200, 4e200 * (1 + 2**-10)], 5e200, 4e200 * 2**-10, 0.8 * 2**-10),
        ([5e-324], [1.5e-323], 5e-324, 1e-323, 2.0),
        ([1e308, 0.0], [-1e308, 0.0], 1e308, math.inf, math.inf),
        ([0.0, 0.0], [3.0, 4.0], 0.0, 5.0, math.inf),
        ([0.0], [-0.0], 0.0, 0.0, 0.0),
        ([2.0, math.nan, 1.0, math.inf], [3.0, 1.0, math.nan, math.inf], 2.0, 1.0, 0.5),
        ([math.nan], [math.inf], 0.0, 0.0, 0.0),
    ],
)
def test_norms_at_the_edges_of_floats(
    one: list[float], other: list[float], norm: float, difference: float, relative: float, tmp_path: Path
) -> None:
    found = measure(*(torch.tensor(data, dtype=torch.float64) for data in (one, other)), tmp_path)
    assert (found.norm, found.difference_norm) == (pytest.approx(norm), pytest.approx(difference))
    assert found.relative_norm == pytest.approx(relative, rel=1e-4)


def test_integers_are_subtracted_exactly(tmp_path: Path) -> None:
    one, other = torch.tensor([2**62, -(2**63)]), torch.tensor([2**62 + 1, 2**63 - 1])
    assert measure(one[:1], other[:1], tmp_path).difference_norm == 1.0
    assert measure(one[1:], other[1:], tmp_path).difference_norm == 2.0**64
    flags = measure(torch.tensor([True, False, True]), torch.tensor([True, True, False]), tmp_path)
    assert flags.difference_norm == pytest.approx(math.sqrt(2))


def test_special_numbers_are_counted_on_both_sides(tmp_path: Path) -> None:
    one = torch.tensor([math.nan, 1.0, math.inf, 2.0], dtype=torch.bfloat16)
    other = torch.tensor([math.nan, math.nan, -math.inf, math.inf], dtype=torch.bfloat16)
    found = measure(one, other, tmp_path).elements
    assert (found.reference_nan, found.nan, found.reference_inf, found.inf) == (1, 2, 1, 2)
    assert (found.num_different, found.first_index) == (3, (1,))


def test_packed_types_have_no_norm(tmp_path: Path) -> None:
    one = torch.tensor([0x12, 0x34], dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    other = torch.tensor([0x12, 0x35], dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    rows = []
    for name, tensor in (("left", one), ("right", other)):
        as_bytes = put(tmp_path / name, tensor.view(torch.uint8))
        row = as_bytes.rows[0]._replace(dtype="float4_e2m1fn_x2")
        rows.append((tmp_path / name, StoredTensor("float4_e2m1fn_x2", (2,), (row,))))
    found = deltas.measure("model", *rows)
    assert (found.norm, found.difference_norm, found.relative_norm) == (None, None, None)
    assert (found.elements.num_different, found.elements.first_index) == (1, (1,))
