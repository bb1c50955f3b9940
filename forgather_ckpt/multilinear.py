"""The digest of a block that a GPU takes at memory speed: a multilinear hash modulo the prime p = 2^61 - 1.

A block (at most 4 MiB) is read as little-endian 32-bit words, 1,024 to a row. In each of two lanes

    lane = sum over all words of  word * A[row] * B[column]  +  num_bytes * L    (mod p)

with fixed keys: A below 2^56 in two limbs of 28 bits, so that a limb times a word fits 64-bit arithmetic; B and L
below p. The digest is the two lanes, each 8 bytes, big-endian. Only sums: any number of threads may share the work in
any order.

**What it detects.** Two blocks that differ, whatever the difference (one bit, two words swapped, changes that cancel
in a sum or an XOR, another length), collide with a probability below 2^-110 over the choice of the keys: some
column's sum over rows differs but for 2^-56, then the sum over columns but for 2^-60, and the lanes are independent.
This is the universal hashing of Carter and Wegman (1979, doi:10.1016/0022-0000(79)90044-8), in the multilinear form
of Wegman and Carter (1981, doi:10.1016/0022-0000(81)90033-7); Lemire and Kaser (2014, doi:10.1093/comjnl/bxt070) show
why that is fast. The keys are published here: it finds faults, it does not resist an adversary.

**Additive.** A byte adds its value at its place and one to the length, so the lanes of a block are the sums of the
lanes of its parts: shards of a tensor, wherever their boxes lie, add up to the block digests of the whole (`add`).
"""

import functools
from collections.abc import Iterable

ALGORITHM = "multilinear61x2"
PRIME = (1 << 61) - 1
NUM_LANES = 2
ROW_WORDS = 1024
NUM_ROWS = 1024
ROW_BYTES = 4 * ROW_WORDS
LIMB_BITS = 28

_SEED = 0x243F6A8885A308D3
"""The first 64 bits of pi's fraction: nobody chose them."""
_MASK = (1 << 64) - 1

Lanes = tuple[int, int]


def _key(number: int) -> int:
    """The `number`th output of SplitMix64 (Steele, Lea, Flood 2014, doi:10.1145/2660193.2660195)."""
    z = (_SEED + (number + 1) * 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


@functools.cache
def row_keys() -> tuple[tuple[int, ...], ...]:
    """A: of each lane one key a row, below 2^56."""
    return tuple(
        tuple(_key(lane * NUM_ROWS + row) >> (64 - 2 * LIMB_BITS) for row in range(NUM_ROWS))
        for lane in range(NUM_LANES)
    )


@functools.cache
def column_keys() -> tuple[tuple[int, ...], ...]:
    """B: of each lane one key a column, from 1 to p - 1."""
    first = NUM_LANES * NUM_ROWS
    return tuple(
        tuple(1 + _key(first + lane * ROW_WORDS + column) % (PRIME - 1) for column in range(ROW_WORDS))
        for lane in range(NUM_LANES)
    )


@functools.cache
def length_keys() -> tuple[int, ...]:
    """L, of each lane."""
    first = NUM_LANES * (NUM_ROWS + ROW_WORDS)
    return tuple(1 + _key(first + lane) % (PRIME - 1) for lane in range(NUM_LANES))


def add(parts: Iterable[Lanes]) -> Lanes:
    """The lanes of a block from those of its parts; (0, 0) of none."""
    first = second = 0
    for one, other in parts:
        first, second = first + one, second + other
    return first % PRIME, second % PRIME


def length(num_bytes: int) -> Lanes:
    """What so many bytes add by their number alone; a negative number takes it away again."""
    first, second = (num_bytes * key % PRIME for key in length_keys())
    return first, second


def digest(lanes: Lanes) -> bytes:
    """The digest of a block, or what a part adds to it: 16 bytes."""
    return lanes[0].to_bytes(8, "big") + lanes[1].to_bytes(8, "big")


def total(digests: Iterable[bytes]) -> bytes:
    """The digest of a block from what all of its parts add to it."""
    return digest(add((int.from_bytes(one[:8], "big"), int.from_bytes(one[8:], "big")) for one in digests))
