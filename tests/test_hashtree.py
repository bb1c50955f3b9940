"""The digest tree, against a slow one written from its description alone."""

import itertools

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from forgather_ckpt import hashtree
from forgather_ckpt.hashtree import BLOCK_BYTES

MIB = 1 << 20


def slow_piece_digest(data: bytes) -> bytes:
    blocks = [data]
    while len(blocks[-1]) > 4 * MIB:
        last = blocks.pop()
        blocks += [last[: 4 * MIB], last[4 * MIB :]]
    digests = [bytes.fromhex(xxhash.xxh3_128_hexdigest(block)) for block in blocks]
    if len(digests) == 1:
        return digests[0]
    return bytes.fromhex(xxhash.xxh3_128_hexdigest(b"".join(digests)))


@pytest.mark.parametrize(
    "size",
    [0, 1, 7, 4 * MIB - 1, 4 * MIB, 4 * MIB + 1, 8 * MIB, 8 * MIB + 3, 12 * MIB],
    ids=lambda size: f"{size} bytes",
)
def test_a_piece_has_the_digest_that_is_described(size):
    data = (b"0123456789abcde" * (size // 15 + 1))[:size]
    assert hashtree.buffer_digest(data) == slow_piece_digest(data)
    assert hashtree.buffer_digest(bytearray(data)) == hashtree.buffer_digest(memoryview(data))


@given(st.integers(0, 2**45))
def test_blocks_cover_a_piece_in_order(size):
    if size > 1000 * BLOCK_BYTES:
        assert hashtree.num_blocks(size) == -(-size // BLOCK_BYTES)
        return
    bounds = list(hashtree.block_bounds(size))
    assert len(bounds) == hashtree.num_blocks(size)
    assert (bounds[0][0], bounds[-1][1]) == (0, size)
    assert all(stop == start for (_, stop), (start, _) in itertools.pairwise(bounds))
    assert all(stop - start == BLOCK_BYTES for start, stop in bounds[:-1])


def test_known_digests_stay_what_they_are():
    assert hashtree.digest(b"").hex() == "99aa06d3014798d86001c324468d497f"
    assert hashtree.buffer_digest(b"forgather").hex() == xxhash.xxh3_128_hexdigest(b"forgather")
    assert hashtree.tensor_structure("float32", (2, 3)) == b"tensor float32 [2, 3]"
    assert hashtree.tensor_structure("bool", ()) == b"tensor bool []"
    record = ("w", hashtree.tensor_structure("int8", (1,)), hashtree.digest(b"\0"))
    assert hashtree.state_digest([record]).hex() == slow_state_digest([record]).hex()


def test_a_file_is_its_header_and_its_pieces_in_order():
    header, one, other = (hashtree.digest(name) for name in (b"header", b"one", b"other"))
    assert hashtree.file_digest(header, [one, other]).hex() == xxhash.xxh3_128_hexdigest(header + one + other)
    assert hashtree.file_digest(header, [other, one]) != hashtree.file_digest(header, [one, other])


def slow_state_digest(records):
    text = b""
    for name, structure, digest in sorted(records, key=lambda record: record[0].encode()):
        name = name.encode()
        text += f"{len(name)}:{len(structure)}:".encode() + name + structure + digest
    return bytes.fromhex(xxhash.xxh3_128_hexdigest(text))


records = st.lists(
    st.tuples(st.text(max_size=5), st.binary(max_size=5), st.binary(min_size=16, max_size=16)),
    max_size=5,
    unique_by=lambda record: record[0],
)


@given(records, st.randoms())
def test_a_state_is_its_items_whatever_their_order(items, random):
    shuffled = random.sample(items, len(items))
    assert hashtree.state_digest(shuffled) == hashtree.state_digest(items) == slow_state_digest(items)


@given(records, records)
def test_different_states_have_different_digests(one, other):
    assert (hashtree.state_digest(one) == hashtree.state_digest(other)) == (sorted(one) == sorted(other))


def test_bytes_cannot_move_between_the_fields_of_a_record():
    digest = bytes(16)
    alike = [[("ab", b"c", digest)], [("a", b"bc", digest)], [("abc", b"", digest)], [("", b"abc", digest)]]
    assert len({hashtree.state_digest(state) for state in alike}) == len(alike)
