"""Verified reading: every block is hashed and compared before any of its bytes go where they are wanted."""

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from os import close
from pathlib import Path
from typing import NamedTuple

import torch

from forgather_ckpt import files, hashtree, memory
from forgather_ckpt.boxes import Box, inside, overlap, volume
from forgather_ckpt.dtypes import ITEM_BYTES
from forgather_ckpt.hashtree import BLOCK_BYTES
from forgather_ckpt.index import TensorRow
from forgather_ckpt.pieces import Block, damaged, requests

IN_FLIGHT = 16


class Region(NamedTuple):
    """A part of a tensor in memory: `tensor` has the shape of `box`, any strides, and lies on any device."""

    box: Box
    tensor: torch.Tensor


class Wanted(NamedTuple):
    """One stored piece and where it goes.

    `destination` is 1-D uint8 of the piece's length, on any device; or a region which has some of its elements, and
    into whose dtype they are converted; or None, for bytes that are verified only.
    """

    component: str
    row: TensorRow
    destination: torch.Tensor | Region | None

    @property
    def is_on_host(self) -> bool:
        if self.destination is None:
            return True
        tensor = self.destination.tensor if isinstance(self.destination, Region) else self.destination
        return tensor.device.type == "cpu"

    def wants(self, number: int) -> bool:
        """Whether any byte of the piece's block of that number goes anywhere."""
        if not isinstance(self.destination, Region):
            return True
        return any(overlap(one, self.destination.box) for one in self.row.rectangles(number))


def read(
    directory: Path,
    wanted: Sequence[Wanted],
    *,
    verify: bool = True,
    on_progress: Callable[[], None] = lambda: None,
) -> None:
    """Fill the destinations of all `wanted` pieces from the files of a checkpoint.

    `CheckpointDamaged` at the first block that does not have its digest, or that is not there; some destinations
    are filled by then, none with bytes that were not verified. `StorageError` where the file system fails. Without
    `verify` only what is not there is found.
    """
    by_file: dict[str, list[Wanted]] = {}
    for one in wanted:
        by_file.setdefault(one.row.file, []).append(one)
    # the pool is left first: it waits for its threads, which read from the descriptors that the stack closes
    with (
        files.typed_errors(directory, "reading the checkpoint"),
        ExitStack() as stack,
        ThreadPoolExecutor(memory.num_threads()) as pool,
    ):
        in_flight: deque[Future[None]] = deque()
        for name, pieces in by_file.items():
            descriptor = files.open_to_read(directory / name)
            stack.callback(close, descriptor)
            for run in requests(sorted(pieces, key=lambda one: one.row.offset), Wanted.wants):
                if len(in_flight) == IN_FLIGHT:
                    in_flight.popleft().result()
                    on_progress()
                in_flight.append(pool.submit(_read_run, descriptor, run, directory, verify))
        for future in in_flight:
            future.result()
            on_progress()


def _read_run(descriptor: int, run: Sequence[Block[Wanted]], directory: Path, verify: bool) -> None:
    start = run[0].start
    buffer = memory.bounce_buffer(pinned=not all(block.piece.is_on_host for block in run))
    view = memory.host_view(buffer)[: run[-1].stop - start]
    count = files.read_at(descriptor, view, start)
    for block in run:
        data = view[block.start - start : block.stop - start]
        is_short = block.stop - start > count
        if is_short or (verify and hashtree.digest(data) != block.digest):
            raise damaged(block.piece.row, block.number, block.piece.component, directory, is_short=is_short)
    for block in run:
        if block.stop > block.start:
            _give(block, buffer[block.start - start : block.stop - start])


def _give(block: Block[Wanted], verified: torch.Tensor) -> None:
    """Copy the bytes of a block to where they are wanted."""
    destination, row = block.piece.destination, block.piece.row
    if destination is None:
        return
    if not isinstance(destination, Region):
        offset = block.number * BLOCK_BYTES
        destination[offset : offset + len(verified)].copy_(verified)
        return
    dtype, target = getattr(torch, row.dtype), destination.tensor
    if target.dtype == dtype:
        # torch cannot copy every dtype, but all bits of one of the same size
        dtype = memory.WORDS[ITEM_BYTES[row.dtype]]
        target = target.view(dtype)
    elements = verified.view(dtype)
    position = 0
    for box in row.rectangles(block.number):
        count = volume(box)
        if (common := overlap(box, destination.box)) is not None:
            source = elements[position : position + count].view([stop - first for first, stop in box])
            target[inside(common, destination.box)].copy_(source[inside(common, box)])
        position += count
