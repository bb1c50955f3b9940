"""Block digests of tensors where they lie (`multilinear`): one pass over device memory, and 16 bytes a tile come back.

On CUDA a Triton kernel reads all tensors in one launch, from a table of their addresses. Where Triton is missing or
cannot compile, and on other devices, torch's own operators give the same digests, slowly.
"""

import functools
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from forgather_ckpt import memory, multilinear
from forgather_ckpt.hashtree import BLOCK_BYTES
from forgather_ckpt.multilinear import LIMB_BITS, NUM_LANES, PRIME, ROW_BYTES, ROW_WORDS, Lanes

logger = logging.getLogger(__name__)

LARGE_TILE_BYTES, SMALL_TILE_BYTES = 1 << 20, 256 << 10
"""What one program of the kernel reads; the smaller where the larger would leave a part of the device idle."""
_MANY_BYTES = 1 << 30
COPIED_BYTES = 64 << 20
"""What is not contiguous is copied, so much at a time."""
_ALIGNMENT = 16

Array = npt.NDArray[np.int64]


class Run(NamedTuple):
    """Bytes of tensor `number` that lie in C order, and which begin at byte `start` of the tensor's, where a row does."""

    number: int
    data: torch.Tensor
    address: int
    num_bytes: int
    start: int
    padding: int = 0
    """So many zeros come first, which are not the tensor's."""


class Tiles(NamedTuple):
    """The work on a batch of runs: one row a tile."""

    address: Array
    num_bytes: Array
    row: Array
    """The first row's number in its block."""
    key: Array
    """[num_tiles, 2]: the number of the tensor, and of the block in it."""
    run: Array
    """The place of its run in the batch."""


class _Sums(NamedTuple):
    """Lanes of blocks, or of parts of them."""

    key: Array
    """[n, 2]: the number of the tensor, and of the block in it; sorted, but for parts that came in another order."""
    lanes: Array
    """[n, 2]"""


def block_digests(tensors: Sequence[torch.Tensor]) -> list[tuple[bytes, ...]]:
    """The block digests of each tensor, all of them on one device: equal for equal content in C order, in whatever
    layout. An empty tensor has one, of no bytes."""
    return begin(tensors)()


def begin(tensors: Sequence[torch.Tensor]) -> Callable[[], list[tuple[bytes, ...]]]:
    """`block_digests` in two steps: the device has begun when this returns, and what it returns waits for it."""
    finish = _begin_sums([(number, tensor, 0) for number, tensor in enumerate(tensors)])
    return lambda: _digests(finish(), len(tensors))


def _digests(sums: _Sums, num_tensors: int) -> list[tuple[bytes, ...]]:
    counts = np.bincount(sums.key[:, 0], minlength=num_tensors).tolist()
    digests = sums.lanes.astype(">i8").tobytes()
    blocks = [digests[at : at + 16] for at in range(0, len(digests), 16)]
    if len(blocks) == num_tensors and all(counts):  # as thousands of small ones are
        return [(block,) for block in blocks]
    found: list[tuple[bytes, ...]] = []
    at = 0
    for count in counts:
        found.append(tuple(blocks[at : at + count]) or (multilinear.digest((0, 0)),))
        at += count
    return found


def block_lanes(parts: Iterable[tuple[int, torch.Tensor, int]]) -> dict[tuple[int, int], Lanes]:
    """(tensor's number, block) -> lanes, of parts `(number, part, start)`: `start` is where the part's bytes begin in
    those of its tensor. The lanes of all parts of a tensor, on whatever ranks, add up to those of the whole."""
    sums = _begin_sums(parts)()
    found: dict[tuple[int, int], Lanes] = {}
    for (number, block), (one, other) in zip(sums.key.tolist(), sums.lanes.tolist(), strict=True):
        found[number, block] = multilinear.add([found.get((number, block), (0, 0)), (one, other)])
    return found


def _begin_sums(parts: Iterable[tuple[int, torch.Tensor, int]]) -> Callable[[], _Sums]:
    keys: list[Array] = [np.empty((0, 2), dtype=np.int64)]
    lanes: list[torch.Tensor] = []
    paddings: list[tuple[tuple[int, int], Lanes]] = []
    for batch in _batches(parts):
        take_lanes, tile_bytes = _implementation(batch[0].data.device, sum(run.num_bytes for run in batch))
        tiles = _tiles(batch, tile_bytes)
        keys.append(tiles.key)
        lanes.append(take_lanes(tiles, batch))
        paddings += [
            ((run.number, run.start // BLOCK_BYTES), multilinear.length(-run.padding)) for run in batch if run.padding
        ]

    def finish() -> _Sums:
        of_tiles = torch.cat(lanes).cpu().numpy() if lanes else keys[0]
        sums = _added(_Sums(np.concatenate(keys), of_tiles))
        if not paddings:
            return sums
        return _Sums(
            np.r_[sums.key, np.array([key for key, _ in paddings])],
            np.r_[sums.lanes, np.array([one for _, one in paddings])],
        )

    return finish


def _batches(parts: Iterable[tuple[int, torch.Tensor, int]]) -> Iterator[list[Run]]:
    """Runs of all parts, in batches that copy `COPIED_BYTES` at most."""
    batch: list[Run] = []
    copied = 0
    for number, tensor, start in parts:
        size, address = tensor.nbytes, tensor.data_ptr()
        if start % ROW_BYTES == 0 and address % _ALIGNMENT == 0 and memory.is_flat(tensor):
            if size:
                batch.append(Run(number, tensor, address, size, start))
            continue
        for first in range(0, size, COPIED_BYTES):
            batch.append(_copied(number, tensor, start, first, min(size, first + COPIED_BYTES)))
            copied += batch[-1].num_bytes
            if copied >= COPIED_BYTES:
                yield batch
                batch, copied = [], 0
    if batch:
        yield batch


def _copied(number: int, tensor: torch.Tensor, start: int, first: int, last: int) -> Run:
    """Bytes `first` to `last` of a part as a run of their own, that begins where a row does."""
    padding = (start + first) % ROW_BYTES
    data = torch.zeros(padding + last - first, dtype=torch.uint8, device=tensor.device)
    data[padding:] = memory.byte_range(tensor, first, last)
    return Run(number, data, data.data_ptr(), data.numel(), start + first - padding, padding)


def _tiles(batch: Sequence[Run], tile_bytes: int) -> Tiles:
    """Each run in tiles, no tile in two blocks."""
    numbers, _, *columns, _ = zip(*batch, strict=True)
    number, address, size, start = (np.array(column, dtype=np.int64) for column in (numbers, *columns))
    lead = start % tile_bytes
    counts = -(-(lead + size) // tile_bytes)
    owner = np.repeat(np.arange(len(batch)), counts)
    first = (np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)) * tile_bytes - lead[owner]
    begin, end = np.maximum(first, 0), np.minimum(first + tile_bytes, size[owner])
    at = start[owner] + begin
    key = np.stack([number[owner], at // BLOCK_BYTES], axis=1)
    return Tiles(address[owner] + begin, end - begin, at % BLOCK_BYTES // ROW_BYTES, key, owner)


def _added(sums: _Sums) -> _Sums:
    """The lanes of blocks from those of their tiles, which lie together."""
    if not len(sums.key):
        return sums
    number, block = sums.key.T
    is_first = np.ones(len(number), dtype=bool)
    is_first[1:] = (number[1:] != number[:-1]) | (block[1:] != block[:-1])
    firsts = np.flatnonzero(is_first)
    low = np.add.reduceat(sums.lanes & 0xFFFFFFFF, firsts)
    high = np.add.reduceat(sums.lanes >> 32, firsts)
    # high * 2^32 mod p: of its 61 bits, the upper 29 come back at the bottom
    return _Sums(sums.key[firsts], (((high & 0x1FFFFFFF) << 32) + (high >> 29) + low) % PRIME)


TakeLanes = Callable[[Tiles, Sequence[Run]], torch.Tensor]
"""The lanes of every tile, [num_tiles, 2] int64, on the device."""


@functools.cache
def _kernel(device: torch.device) -> TakeLanes | None:
    """The kernel, if it has shown on this device that it can be trusted; else None, with a warning."""
    try:
        from forgather_ckpt.triton_digest import tile_lanes
    except ImportError:
        problem: str | None = "Triton is not installed"
    else:
        problem = _what_is_wrong(tile_lanes, device)
    if problem is None:
        return tile_lanes
    logger.warning("%s: digests of tensors on %s take many times as long", problem, device)
    return None


def _what_is_wrong(take_lanes: TakeLanes, device: torch.device) -> str | None:
    """What keeps an implementation from taking the digests that torch's operators take, tried on a few bytes. A compiler
    that Triton needs, for one, is not in every container."""
    data = torch.arange(5000, dtype=torch.int32, device=device).view(torch.uint8)[:-3]
    batch = [Run(0, data, data.data_ptr(), data.numel(), 0)]
    tiles = _tiles(batch, SMALL_TILE_BYTES)
    try:
        lanes = take_lanes(tiles, batch)
    except Exception as err:
        return f"Triton's kernel does not run ({type(err).__name__}: {err})"
    is_right = torch.equal(lanes % PRIME, tile_lanes_in_torch(tiles, batch) % PRIME)
    return None if is_right else "Triton's kernel takes wrong digests"


def _implementation(device: torch.device, num_bytes: int) -> tuple[TakeLanes, int]:
    """How the lanes of tiles are taken on a device, and how large a tile shall be."""
    if device.type == "cuda" and (kernel := _kernel(device)) is not None:
        return kernel, LARGE_TILE_BYTES if num_bytes >= _MANY_BYTES else SMALL_TILE_BYTES
    return tile_lanes_in_torch, BLOCK_BYTES


def tile_lanes_in_torch(tiles: Tiles, batch: Sequence[Run]) -> torch.Tensor:
    """The same sums as the kernel's, with torch's operators: a few passes over int64 copies of one tile at a time."""
    device = batch[0].data.device
    rows, columns = _keys_on(device)
    flat = [memory.flat_bytes(run.data) for run in batch]
    lanes = []
    for address, num_bytes, row, number in zip(*(tiles[i].tolist() for i in (0, 1, 2, 4)), strict=True):
        begin = address - flat[number].data_ptr()
        lanes.append(_lanes_in_torch(flat[number][begin : begin + num_bytes], row, rows, columns))
    return torch.stack(lanes)


def _lanes_in_torch(data: torch.Tensor, row: int, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    num_rows = -(-data.numel() // ROW_BYTES)
    padded = torch.zeros(num_rows * ROW_BYTES, dtype=torch.uint8, device=data.device)
    padded[: data.numel()] = data
    words = padded.view(torch.int32).to(torch.int64).view(num_rows, ROW_WORDS)
    halves = (words & 0xFFFF, (words >> 16) & 0xFFFF)
    lanes = []
    for lane in range(NUM_LANES):
        total = torch.zeros(ROW_WORDS, dtype=torch.int64, device=data.device)
        for limb in range(2):
            key = rows[lane, limb, row : row + num_rows, None]
            for half, part in enumerate(halves):
                # below 2^28 * 2^16 * 2^10
                total += _times_power((part * key).sum(dim=0), LIMB_BITS * limb + 16 * half)
        product = _product(total % PRIME, columns[lane])
        low, high = (product & 0xFFFFFFFF).sum(), (product >> 32).sum()
        length = data.numel() * multilinear.length_keys()[lane] % PRIME
        lanes.append((_times_power(high, 32) + low + length) % PRIME)
    return torch.stack(lanes)


def _times_power(x: torch.Tensor, exponent: int) -> torch.Tensor:
    """x * 2^exponent modulo p, for x and exponent below 2^61 and 61: a rotation of 61 bits."""
    return ((x << exponent) & PRIME) | (x >> (61 - exponent))


def _product(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """x * y modulo p, for both below p, in halves of 31 and 30 bits: 2^62 = 2 mod p."""
    x0, x1, y0, y1 = x & 0x7FFFFFFF, x >> 31, y & 0x7FFFFFFF, y >> 31
    middle = x1 * y0 + x0 * y1
    return (2 * (x1 * y1) + _times_power(middle & PRIME, 31) + ((middle >> 61) << 31) + x0 * y0 % PRIME) % PRIME


@functools.cache
def _keys_on(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The keys as the kernel reads them too: limbs of A as [lane, limb, row], and B as [lane, column], int64."""
    mask = (1 << LIMB_BITS) - 1
    limbs = [[[key & mask for key in lane], [key >> LIMB_BITS for key in lane]] for lane in multilinear.row_keys()]
    columns = list(multilinear.column_keys())
    return (
        torch.tensor(limbs, dtype=torch.int64, device=device),
        torch.tensor(columns, dtype=torch.int64, device=device),
    )
