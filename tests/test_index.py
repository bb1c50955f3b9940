"""The index: what is written is read, and no row is believed that does not fit its tensor and its file."""

import dataclasses
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forgather_ckpt import hashtree, index
from forgather_ckpt.errors import FormatError, UnsupportedVersion
from forgather_ckpt.hashtree import BLOCK_BYTES
from forgather_ckpt.index import AliasRow, Index, IndexEntry, TensorRow, ValueRow
from tests.golden_files import golden
from tests.json_mutations import mutated


def digest(text: str) -> bytes:
    return hashtree.digest(text.encode())


BLOCKS = (digest("block 0"), digest("block 1"), digest("block 2"))
SIZES = {"model.safetensors": 1 << 30, "small-00000.safetensors": 1 << 20}


def sample() -> Index:
    """An index with something in every column."""
    return Index(
        3,
        (
            IndexEntry(
                "model",
                "all",
                tensors=(
                    TensorRow("emb/w", 0, "float32", (2, 3), "small-00000.safetensors", 4096, digest("emb")),
                    TensorRow("scalar", 2, "bfloat16", (), "small-00000.safetensors", 4120, digest("scalar")),
                    TensorRow("empty", 3, "int64", (0, 7), "small-00000.safetensors", 4122, digest("")),
                    TensorRow(
                        "big", 4, "int8", (3, BLOCK_BYTES), "model.safetensors", 4096, hashtree.join(BLOCKS[:2]),
                        range=(BLOCK_BYTES, 2 * BLOCK_BYTES + 5), key="big#4194304:8388613", blocks=BLOCKS[:2],
                        logical=digest("all of big"),
                    ),
                    TensorRow(
                        "shard", 5, "complex64", (8, 4), "model.safetensors", 1 << 28, digest("shard"),
                        box=((2, 4), (0, 4)), key="shard#2:4,0:4",
                    ),
                ),
                values=(ValueRow("step", 6, 5, digest("5")), ValueRow("lr", 7, {"$float": "inf"}, digest("inf"))),
                aliases=(AliasRow("head/w", 1, "emb/w"),),
            ),
            IndexEntry("rng", "rank=3", values=(ValueRow("", 0, None, digest("null")),)),
            IndexEntry("nothing", "all"),
        ),
    )  # fmt: skip


DATA = sample().to_bytes()


def parse(data: bytes) -> Index:
    return Index.from_bytes(data, what="index-00003.json", sizes=SIZES)


def test_the_format_is_what_it_was():
    assert golden("index-00003.json", DATA) == DATA


def test_what_is_written_is_read():
    assert parse(DATA) == sample()
    assert parse(DATA).to_bytes() == DATA


def test_a_row_knows_which_bytes_it_holds():
    rows = {row.name: row for row in sample().entries[0].tensors}
    assert {name: (row.bounds, row.num_bytes, row.is_whole, row.block_digests()) for name, row in rows.items()} == {
        "emb/w": ((0, 24), 24, True, (digest("emb"),)),
        "scalar": ((0, 2), 2, True, (digest("scalar"),)),
        "empty": ((0, 0), 0, True, (digest(""),)),
        "big": ((BLOCK_BYTES, 2 * BLOCK_BYTES + 5), BLOCK_BYTES + 5, False, BLOCKS[:2]),
        "shard": ((0, 64), 64, False, (digest("shard"),)),
    }


def changed(column: str, row: int | str, to: object) -> bytes:
    content = json.loads(DATA)
    content["entries"][0]["tensors"][column][row] = to
    return json.dumps(content).encode()


def replaced(**fields: object) -> bytes:
    return json.dumps(json.loads(DATA) | fields).encode()


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"{", "is not valid"),
        (replaced(format="zip"), "is of format 'zip'"),
        (replaced(algorithm="md5"), "digests of 'md5'"),
        (replaced(writer=-1), "field 'writer'"),
        (replaced(entries={}), "field 'entries'"),
        (replaced(entries=[5]), "expected an object"),
        (changed("dtype", 0, "float33"), "the unknown dtype 'float33'"),
        (changed("shape", 0, [2, -3]), "impossible shape"),
        (changed("shape", 0, [2.0, 3]), "impossible shape"),
        (changed("shape", 0, [True, 3]), "impossible shape"),
        (changed("shape", 0, [2**63]), "impossible shape"),
        (changed("shape", 0, [2**62, 2**62]), "reaches beyond the end of 'small-00000.safetensors'"),
        (changed("shape", 0, 6), "malformed"),
        (changed("shape", 3, [3, 1000]), "has a range"),
        (changed("file", 0, "../evil"), "which the manifest does not list"),
        (changed("file", 0, "/etc/passwd"), "which the manifest does not list"),
        (changed("file", 0, "other.safetensors"), "which the manifest does not list"),
        (changed("offset", 0, (1 << 20) - 23), "reaches beyond the end"),
        (changed("offset", 0, 2**62), "reaches beyond the end"),
        (changed("offset", 0, -1), "out of range"),
        (changed("box", "4", [[2, 9], [0, 4]]), "a box"),
        (changed("box", "4", [[4, 2], [0, 4]]), "a box"),
        (changed("box", "4", [[2, 4]]), "a box"),
        (changed("box", "4", [[2.0, 4], [0, 4]]), "a box"),
        (changed("box", "4", [2, 4]), "malformed"),
        (changed("range", "3", [5, 2]), "a range"),
        (changed("range", "3", [-1, 2]), "a range"),
        (changed("range", "3", [0, 5.0]), "a range"),
        (changed("range", "3", [0]), "malformed"),
        (changed("range", "0", [1, 3]), None),
        (changed("key", "3", 5), "the key 5"),
        (changed("blocks", "3", BLOCKS[0].hex()), "block digests that do not make up its digest"),
        (changed("blocks", "3", BLOCKS[0].hex() + BLOCKS[2].hex()), "block digests that do not make up its digest"),
        (changed("blocks", "3", "ab"), "expected a multiple of 16"),
        (changed("blocks", "3", "xy"), "malformed"),
        (changed("blocks", "3", 5), "malformed"),
        (changed("blocks", "0", BLOCKS[0].hex() * 2), "block digests that do not make up its digest"),
        (changed("logical", "3", ""), "malformed"),
        (changed("name", 0, 5), "holds a int"),
    ],
)
def test_a_row_that_cannot_be_is_refused(data, problem):
    if problem is None:
        assert parse(data)
        return
    with pytest.raises(FormatError) as caught:
        parse(data)
    assert problem in caught.value.message


@pytest.mark.parametrize("column", ["name", "order", "dtype", "shape", "file", "offset"])
def test_columns_of_different_lengths_are_refused(column):
    content = json.loads(DATA)
    content["entries"][0]["tensors"][column].pop()
    with pytest.raises(FormatError, match="columns of different lengths"):
        parse(json.dumps(content).encode())


def test_another_major_version_is_told_apart_from_damage():
    with pytest.raises(UnsupportedVersion, match="Update the package"):
        parse(replaced(version="2.0"))


def test_a_newer_minor_version_may_have_more_columns():
    content = json.loads(DATA) | {"version": "1.9", "new": 1}
    content["entries"][0]["tensors"]["new"] = ["a"]
    assert parse(json.dumps(content).encode()) == sample()


@settings(max_examples=250)
@given(st.data())
def test_any_content_is_an_index_or_a_format_error(data):
    content = mutated(data, json.loads(DATA))
    try:
        found = parse(json.dumps(content).encode())
    except FormatError:
        return
    for entry in found.entries:
        for row in entry.tensors:
            assert 0 <= row.offset <= row.offset + row.num_bytes <= SIZES[row.file]
            assert len(row.block_digests()) == hashtree.num_blocks(row.num_bytes)
        list(index.records(entry))


@given(st.data())
def test_damaged_bytes_are_an_index_or_a_format_error(data):
    damaged = bytearray(DATA)
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    try:
        parse(bytes(damaged[: data.draw(st.sampled_from([len(damaged), 100, 1000]))]))
    except FormatError:
        return


# ---- splitting


@given(st.lists(st.tuples(st.integers(0, 7), st.integers(0, 7), st.integers(0, 7)), max_size=5), st.integers(1, 6))
def test_parts_hold_all_items_once_and_none_too_many(counts, max_items):
    entries = [
        IndexEntry(
            f"component {number}",
            "all",
            tuple(TensorRow(f"t{i}", i, "int8", (), "f", i, digest("")) for i in range(num_tensors)),
            tuple(ValueRow(f"v{i}", i, i, digest("")) for i in range(num_values)),
            tuple(AliasRow(f"a{i}", i, "t0") for i in range(num_aliases)),
        )
        for number, (num_tensors, num_values, num_aliases) in enumerate(counts)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index, "MAX_ITEMS", max_items)
        parts = list(index.split(5, entries))
    assert parts
    assert all(part.writer == 5 and sum(entry.num_items for entry in part.entries) <= max_items for part in parts)
    joined: dict[str, IndexEntry] = {}
    for part in parts:
        for entry in part.entries:
            known = joined.setdefault(entry.component, IndexEntry(entry.component, "all"))
            joined[entry.component] = dataclasses.replace(
                known,
                tensors=(*known.tensors, *entry.tensors),
                values=(*known.values, *entry.values),
                aliases=(*known.aliases, *entry.aliases),
            )
    assert list(joined.values()) == entries
