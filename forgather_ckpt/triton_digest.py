"""The kernel behind `device_digest`: the lanes of all tiles of many tensors in one launch."""

import functools
from typing import Any

import torch
import triton
import triton.language as tl

from forgather_ckpt import multilinear
from forgather_ckpt.multilinear import LIMB_BITS, ROW_WORDS

ROWS_AT_ONCE = 8
"""Between two reductions modulo p. A limb times a word is below 2^60, and 2^61 + 8 + 8 * 2^60 < 2^64."""


def tile_lanes(tiles: Any, batch: Any) -> torch.Tensor:
    """The lanes of every tile, [num_tiles, 2] int64. Launched on the current stream, which must have made the data."""
    device = batch[0].data.device
    table = torch.stack([torch.from_numpy(column) for column in (tiles.address, tiles.num_bytes, tiles.row)], dim=1)
    lanes = torch.empty((len(tiles.address), 2), dtype=torch.int64, device=device)
    rows, columns, lengths = _keys_on(device)
    with torch.cuda.device(device):
        _tile_lanes[(len(tiles.address),)](
            table.to(device), rows, columns, lengths, lanes, ROW_WORDS=ROW_WORDS, ROWS_AT_ONCE=ROWS_AT_ONCE, num_warps=8
        )
    return lanes


@functools.cache
def _keys_on(device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A as [row, lane] with its upper limb in the upper half, B as [lane, column] and L as [lane], all int64. Zeros
    follow the last row, so that the kernel may ask for keys of a few rows that are not there."""
    mask = (1 << LIMB_BITS) - 1
    rows = [
        [(key >> LIMB_BITS) << 32 | (key & mask) for key in keys] for keys in zip(*multilinear.row_keys(), strict=True)
    ]
    rows += [[0, 0]] * ROWS_AT_ONCE
    return (
        torch.tensor(rows, dtype=torch.int64, device=device),
        torch.tensor(list(multilinear.column_keys()), dtype=torch.int64, device=device),
        torch.tensor(list(multilinear.length_keys()), dtype=torch.int64, device=device),
    )


@triton.jit
def _reduced(x):
    """x modulo p, but for one p too many."""
    return (x & 0x1FFFFFFFFFFFFFFF) + (x >> 61)


@triton.jit
def _product(x, y):
    """x * y modulo p, below 2^61 + 2, for x up to 2^61 + 8 and y below p."""
    low = x * y
    high = tl.umulhi(x, y)
    return _reduced((low & 0x1FFFFFFFFFFFFFFF) + ((low >> 61) | (high << 3)))


@triton.jit
def _times_power(x, exponent: tl.constexpr):
    """x * 2^exponent modulo p, for x up to 2^61 + 8."""
    x = _reduced(x)
    x = tl.where(x >= 0x1FFFFFFFFFFFFFFF, x - 0x1FFFFFFFFFFFFFFF, x)
    return ((x << exponent) & 0x1FFFFFFFFFFFFFFF) | (x >> (61 - exponent))


@triton.jit
def _lane(low, high, column):
    """The sum over columns, below 2^63, from both limbs' sums over rows."""
    total = _product(_reduced(low + _times_power(high, 28)), column)
    upper = tl.sum(total >> 32, axis=0)
    return _times_power(upper, 32) + tl.sum(total & 0xFFFFFFFF, axis=0)


@triton.jit
def _add_row(word, key, a00, a01, a10, a11):
    """Add a row's words, times both limbs of both lanes' keys, to the sums. One load a key: two a lane would be the
    bottleneck."""
    word = word.to(tl.uint64)
    first = tl.load(key).to(tl.uint64)
    second = tl.load(key + 1).to(tl.uint64)
    a00 += word * (first & 0xFFFFFFFF)
    a01 += word * (first >> 32)
    a10 += word * (second & 0xFFFFFFFF)
    a11 += word * (second >> 32)
    return a00, a01, a10, a11


@triton.jit
def _tile_lanes(table, rows, columns, lengths, sums, ROW_WORDS: tl.constexpr, ROWS_AT_ONCE: tl.constexpr):
    tile = tl.program_id(0).to(tl.int64)
    address = tl.load(table + 3 * tile)
    num_bytes = tl.load(table + 3 * tile + 1)
    row = tl.load(table + 3 * tile + 2)
    words = tl.multiple_of(address.to(tl.pointer_type(tl.uint32)), 16)
    # whole vectors of 16 bytes; the rest, byte by byte, at the end
    num_words = tl.multiple_of((num_bytes // 16).to(tl.int32) * 4, 4)
    column = tl.arange(0, ROW_WORDS)
    a00 = tl.zeros([ROW_WORDS], tl.uint64)
    a01 = tl.zeros([ROW_WORDS], tl.uint64)
    a10 = tl.zeros([ROW_WORDS], tl.uint64)
    a11 = tl.zeros([ROW_WORDS], tl.uint64)
    key = rows + 2 * row
    num_rounds = num_words // (ROWS_AT_ONCE * ROW_WORDS)
    for _ in range(num_rounds):
        for i in tl.static_range(ROWS_AT_ONCE):
            word = tl.load(words + i * ROW_WORDS + column)
            a00, a01, a10, a11 = _add_row(word, key + 2 * i, a00, a01, a10, a11)
        a00, a01, a10, a11 = _reduced(a00), _reduced(a01), _reduced(a10), _reduced(a11)
        words += ROWS_AT_ONCE * ROW_WORDS
        key += 2 * ROWS_AT_ONCE
    left = num_words - num_rounds * ROWS_AT_ONCE * ROW_WORDS
    if left > 0:
        for i in tl.static_range(ROWS_AT_ONCE):
            word = tl.load(words + i * ROW_WORDS + column, mask=i * ROW_WORDS + column < left, other=0)
            a00, a01, a10, a11 = _add_row(word, key + 2 * i, a00, a01, a10, a11)
        a00, a01, a10, a11 = _reduced(a00), _reduced(a01), _reduced(a10), _reduced(a11)
    lane0 = _lane(a00, a01, tl.load(columns + column).to(tl.uint64))
    lane1 = _lane(a10, a11, tl.load(columns + ROW_WORDS + column).to(tl.uint64))

    rest = tl.arange(0, 16)
    at = (num_bytes // 16) * 16 + rest
    byte = tl.load(address.to(tl.pointer_type(tl.uint8)) + at, mask=at < num_bytes, other=0).to(tl.uint64)
    value = byte << (8 * (rest % 4)).to(tl.uint64)
    place = at // 4
    zero = tl.zeros([16], tl.uint64)
    a00, a01, a10, a11 = _add_row(value, rows + 2 * (row + place // ROW_WORDS), zero, zero, zero, zero)
    column = place % ROW_WORDS
    lane0 = _reduced(lane0) + _lane(a00, a01, tl.load(columns + column).to(tl.uint64))
    lane1 = _reduced(lane1) + _lane(a10, a11, tl.load(columns + ROW_WORDS + column).to(tl.uint64))

    size = num_bytes.to(tl.uint64)
    lane0 = _reduced(lane0) + _product(tl.load(lengths).to(tl.uint64), size)
    lane1 = _reduced(lane1) + _product(tl.load(lengths + 1).to(tl.uint64), size)
    tl.store(sums + 2 * tile, _reduced(lane0).to(tl.int64))
    tl.store(sums + 2 * tile + 1, _reduced(lane1).to(tl.int64))
