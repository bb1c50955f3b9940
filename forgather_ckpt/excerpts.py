"""Excerpts of a stored tensor: some of its elements in C order, verified, however it was cut when it was written.

For tools that look at large tensors without a job. Memory: the excerpt, and the last blocks that were read.
"""

import itertools
import os
from bisect import bisect_right
from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Sequence
from math import prod
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from forgather_ckpt import files, hashtree
from forgather_ckpt.boxes import Box
from forgather_ckpt.comparison import StoredTensor
from forgather_ckpt.dtypes import ITEM_BYTES
from forgather_ckpt.hashtree import BLOCK_BYTES
from forgather_ckpt.index import TensorRow
from forgather_ckpt.pieces import damaged

NUM_KEPT_BLOCKS = 16
"""At most. A tensor cut across its rows interleaves its boxes: two blocks of each are kept, so that each is read once
as long as there are no more than 8 boxes side by side."""

Bytes = NDArray[np.uint8]


class Slab(NamedTuple):
    """Elements that follow one another in C order: at the index `prefix` of the leading dimensions, from `start` to
    `stop` in the next one, all of the others."""

    prefix: tuple[int, ...]
    start: int
    stop: int
    position: int
    """Of the first element in the whole tensor."""


def slabs(dtype: str, shape: Sequence[int]) -> Iterator[Slab]:
    """All of a tensor in C order, in slabs of at most a block: the same for every tensor of this dtype and shape."""
    lengths = _lengths(shape)
    if not prod(lengths):
        return
    inner = [prod(lengths[dimension + 1 :]) for dimension in range(len(lengths))]
    fits = (number for number, count in enumerate(inner) if count * ITEM_BYTES[dtype] <= BLOCK_BYTES)
    dimension = next(fits)  # the last one always does
    step = BLOCK_BYTES // (inner[dimension] * ITEM_BYTES[dtype])
    position = 0
    for prefix in itertools.product(*map(range, lengths[:dimension])):
        for start in range(0, lengths[dimension], step):
            stop = min(lengths[dimension], start + step)
            yield Slab(prefix, start, stop, position)
            position += (stop - start) * inner[dimension]


class Excerpts:
    """Reads slabs of one stored tensor. `rows` must make up the whole tensor, as `comparison.items` checks."""

    def __init__(self, directory: Path, component: str, tensor: StoredTensor) -> None:
        self._directory = directory
        self._component = component
        self._lengths = _lengths(tensor.shape)
        self._item_bytes = ITEM_BYTES[tensor.dtype]
        pieces: dict[Box, list[TensorRow]] = defaultdict(list)
        for row in tensor.rows:
            if row.num_bytes:
                box = row.box if row.box else tuple((0, length) for length in self._lengths)
                pieces[box].append(row)
        self._pieces = {box: sorted(rows, key=lambda row: row.bounds) for box, rows in pieces.items()}
        self._kept: OrderedDict[tuple[str, int], Bytes] = OrderedDict()
        self._num_kept = min(NUM_KEPT_BLOCKS, 2 * len(self._pieces))

    def read(self, slab: Slab) -> Bytes:
        """The slab's bytes; `CheckpointDamaged` where a block does not have its digest, `StorageError` where the
        file system fails."""
        dimension = len(slab.prefix)
        rest = self._lengths[dimension + 1 :]
        found = np.empty((slab.stop - slab.start, *rest, self._item_bytes), np.uint8)
        for box in self._pieces:
            start, stop = max(slab.start, box[dimension][0]), min(slab.stop, box[dimension][1])
            is_at_prefix = all(low <= at < high for at, (low, high) in zip(slab.prefix, box, strict=False))
            if start >= stop or not is_at_prefix:
                continue
            # whole rows of the box from `start` on follow one another in the box's own C order too
            sizes = [high - low for low, high in box]
            corner = [at - low for at, (low, _) in zip((*slab.prefix, start), box, strict=False)]
            position = sum(at * prod(sizes[number + 1 :]) for number, at in enumerate(corner))
            count = (stop - start) * prod(sizes[dimension + 1 :])
            part = self._read_box(box, position * self._item_bytes, (position + count) * self._item_bytes)
            where = (
                slice(start - slab.start, stop - slab.start),
                *(slice(low, high) for low, high in box[dimension + 1 :]),
            )
            found[where] = part.reshape(stop - start, *sizes[dimension + 1 :], self._item_bytes)
        return found.reshape(-1)

    def _read_box(self, box: Box, start: int, stop: int) -> Bytes:
        """Bytes `start` to `stop` of the box in its C order."""
        pieces = self._pieces[box]
        found = np.empty(stop - start, np.uint8)
        at = start
        number = bisect_right(pieces, at, key=lambda row: row.bounds[0]) - 1
        while at < stop:
            row = pieces[number]
            first, last = row.bounds
            block, offset = divmod(at - first, BLOCK_BYTES)
            data = self._block(row, block)[offset : offset + stop - at]
            found[at - start : at - start + len(data)] = data
            at += len(data)
            number += at == last
        return found

    def _block(self, row: TensorRow, number: int) -> Bytes:
        key = (row.file, row.offset + number * BLOCK_BYTES)
        if key not in self._kept:
            if len(self._kept) == self._num_kept:
                self._kept.popitem(last=False)
            self._kept[key] = self._read_block(row, number)
        self._kept.move_to_end(key)
        return self._kept[key]

    def _read_block(self, row: TensorRow, number: int) -> Bytes:
        start = number * BLOCK_BYTES
        data = np.empty(min(BLOCK_BYTES, row.num_bytes - start), np.uint8)
        path = self._directory / row.file
        with files.typed_errors(path, "reading the checkpoint"):
            descriptor = files.open_to_read(path)
            try:
                count = files.read_at(descriptor, data.data, row.offset + start)
            finally:
                os.close(descriptor)
        if count < len(data) or hashtree.digest(data.data) != row.block_digests()[number]:
            is_short = count < len(data)
            advice = "; see `fgckpt verify`"
            raise damaged(row, number, self._component, self._directory, is_short=is_short, advice=advice)
        return data


def _lengths(shape: Sequence[int]) -> tuple[int, ...]:
    """The shape, with one dimension at least."""
    return tuple(shape) or (1,)
