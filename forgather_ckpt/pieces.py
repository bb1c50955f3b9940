"""Stored pieces: which of them are read together, and whether they make up whole items. Pure."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from forgather_ckpt import hashtree
from forgather_ckpt.boxes import Box, is_grid
from forgather_ckpt.dtypes import ITEM_BYTES
from forgather_ckpt.errors import CheckpointDamaged
from forgather_ckpt.hashtree import BLOCK_BYTES
from forgather_ckpt.index import IndexEntry, TensorRow


class HasRow(Protocol):
    """A stored piece and whatever its reader knows besides."""

    @property
    def row(self) -> TensorRow: ...


P = TypeVar("P", bound=HasRow)


@dataclass(frozen=True)
class Block(Generic[P]):
    """One block of a piece: its number, and its bytes counted from the start of the file."""

    piece: P
    number: int
    start: int
    stop: int

    @property
    def digest(self) -> bytes:
        row = self.piece.row
        return row.blocks[self.number] if row.blocks else row.digest


def requests(
    pieces: Iterable[P], is_wanted: Callable[[P, int], bool] = lambda piece, number: True
) -> Iterator[list[Block[P]]]:
    """The blocks of pieces of one file, given in file order, that are wanted: neighbours that together are no larger
    than a block are one request."""
    request: list[Block[P]] = []
    for piece in pieces:
        for number, (start, stop) in enumerate(hashtree.block_bounds(piece.row.num_bytes)):
            if not is_wanted(piece, number):
                continue
            block = Block(piece, number, piece.row.offset + start, piece.row.offset + stop)
            if request and not (request[-1].stop <= block.start and block.stop - request[0].start <= BLOCK_BYTES):
                yield request
                request = []
            request.append(block)
    if request:
        yield request


def item_problems(parts: Sequence[IndexEntry]) -> Iterator[tuple[str, str]]:
    """Whether what the writers stored of one entry makes up whole items, each name one of them: `(item, problem)`."""
    tensors: dict[str, list[TensorRow]] = defaultdict(list)
    for part in parts:
        for row in part.tensors:
            tensors[row.name].append(row)
    seen = set(tensors)
    for name, rows in tensors.items():
        if not _make_up_whole(rows):
            yield name, "the stored pieces do not make up the whole tensor"
    for part in parts:
        for name in [*(row.name for row in part.values), *(row.name for row in part.aliases)]:
            if name in seen:
                yield name, "is stored twice"
            seen.add(name)
        for alias in part.aliases:
            if alias.target not in tensors:
                yield alias.name, f"stands for {alias.target!r}, which is not stored"


def _make_up_whole(rows: Sequence[TensorRow]) -> bool:
    first = rows[0]
    if len(rows) == 1 and first.is_whole:
        return True
    if any((row.dtype, row.shape) != (first.dtype, first.shape) for row in rows):
        return False
    by_box: dict[Box | None, list[TensorRow]] = defaultdict(list)
    for row in rows:
        by_box[row.box].append(row)
    for inside in by_box.values():
        position = 0
        for start, stop in sorted(row.bounds for row in inside):
            if start != position:
                return False
            position = stop
        if position != math.prod(inside[0].box_shape) * ITEM_BYTES[first.dtype]:
            return False
    return by_box.keys() == {None} or is_grid([box for box in by_box if box is not None], first.shape)


def damaged(
    row: TensorRow, number: int, component: str, directory: Path, *, is_short: bool, advice: str = ""
) -> CheckpointDamaged:
    """The error of block `number` of a stored piece: its file ends before it, or its bytes are not those written."""
    problem = "ends before it" if is_short else "does not have the digest that was recorded"
    return CheckpointDamaged(
        f"component {component!r}: tensor {row.name!r}, block {number + 1} of {len(row.block_digests())} "
        f"(from byte {row.offset + number * BLOCK_BYTES} of {directory.name}/{row.file}) {problem}{advice}",
        component=component,
        path=str(directory / row.file),
    )
