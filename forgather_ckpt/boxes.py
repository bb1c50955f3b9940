"""Which elements of a sharded tensor lie where: boxes from a mesh's shape and placements, pure, for any rank.

A box is `(start, stop)` in each dimension. A local part is a *list* of boxes: what a strided placement gives a rank
does not lie together. Semantics as in `torch.distributed.tensor.placement_types`: a dimension is cut as `torch.chunk`
does, into pieces of equal length, of which the last may be shorter and those after it empty.
"""

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Self

from forgather_ckpt.errors import StructureError

Interval = tuple[int, int]
Box = tuple[Interval, ...]
"""A part of a tensor: `(start, stop)` in each dimension."""
Coordinate = tuple[int, ...]
"""A place on a mesh: a number on each of its axes."""


class Shard(NamedTuple):
    """A mesh axis cuts tensor dimension `dim`. With `split_factor` > 1 the dimension is cut into so many pieces first,
    and each of them over the axis."""

    dim: int
    split_factor: int = 1


@dataclass(frozen=True)
class Layout:
    """How a tensor is laid out on a mesh: for each mesh axis its length, and how it cuts, None where it replicates."""

    mesh: tuple[int, ...]
    placements: tuple[Shard | None, ...]

    def to_json(self) -> list[Any]:
        return [list(self.mesh), [None if one is None else list(one) for one in self.placements]]

    @classmethod
    def from_json(cls, data: Sequence[Any]) -> Self:
        mesh, placements = data
        return cls(tuple(mesh), tuple(None if one is None else Shard(*one) for one in placements))

    def __str__(self) -> str:
        axes = [f"{_show(one)} over {size}" for one, size in zip(self.placements, self.mesh, strict=True)]
        return ", ".join(axes)

    def coordinates(self) -> Iterator[Coordinate]:
        """All places on the mesh, in C order."""
        return itertools.product(*map(range, self.mesh))

    def of_tensor(self, ndim: int) -> Self:
        """The same of a tensor of `ndim` dimensions, where negative ones count from the end."""
        placements = (
            one if one is None or one.dim >= 0 else one._replace(dim=one.dim + ndim) for one in self.placements
        )
        return replace(self, placements=tuple(placements))

    def part(self, coordinate: Coordinate) -> Coordinate:
        """What tells places apart that hold different elements: the coordinate on the axes that cut."""
        return tuple(at for at, one in zip(coordinate, self.placements, strict=True) if one is not None)


def _show(placement: Shard | None) -> str:
    if placement is None:
        return "replicated"
    if placement.split_factor == 1:
        return f"dim {placement.dim} cut"
    return f"dim {placement.dim} cut (in {placement.split_factor} pieces each)"


class LocalBox(NamedTuple):
    """A box of the whole tensor, and the region of the rank's local part where it lies."""

    box: Box
    local: Box


@functools.lru_cache(1 << 16)  # every save asks for the same ones
def local_boxes(layout: Layout, shape: tuple[int, ...], coordinate: Coordinate) -> tuple[LocalBox, ...]:
    """The boxes of a tensor of `shape` that lie at `coordinate`, in the order of the local part; none if it is empty.

    `StructureError` where the placements do not fit the shape.
    """
    held = [_intervals(cuts, length, coordinate) for cuts, length in zip(_cuts(layout, shape), shape, strict=True)]
    found = []
    for chosen in itertools.product(*(_with_local(intervals) for intervals in held)):
        found.append(LocalBox(tuple(one for one, _ in chosen), tuple(other for _, other in chosen)))
    return tuple(found)


@functools.lru_cache(1 << 16)
def local_shape(layout: Layout, shape: tuple[int, ...], coordinate: Coordinate) -> tuple[int, ...]:
    """The shape of the local part at `coordinate`."""
    held = (_intervals(cuts, length, coordinate) for cuts, length in zip(_cuts(layout, shape), shape, strict=True))
    return tuple(sum(stop - start for start, stop in intervals) for intervals in held)


def whole_box(shape: Sequence[int]) -> Box:
    return tuple((0, length) for length in shape)


def volume(box: Box) -> int:
    """The number of elements in a box."""
    return math.prod(stop - start for start, stop in box)


class _Cut(NamedTuple):
    """A mesh axis that cuts a dimension: its number, its length, and the placement's split factor."""

    axis: int
    size: int
    split_factor: int


def _cuts(layout: Layout, shape: tuple[int, ...]) -> list[list[_Cut]]:
    """By tensor dimension the mesh axes that cut it, in the order of the mesh."""
    found: list[list[_Cut]] = [[] for _ in shape]
    for axis, (size, one) in enumerate(zip(layout.mesh, layout.placements, strict=True)):
        if one is None:
            continue
        if not 0 <= one.dim < len(shape):
            raise StructureError(f"a placement cuts dimension {one.dim} of a tensor of shape {list(shape)}")
        found[one.dim].append(_Cut(axis, size, one.split_factor))
    return found


def _intervals(cuts: Sequence[_Cut], length: int, coordinate: Coordinate) -> list[Interval]:
    """What a rank has of a dimension of `length`, in the order of its local part."""
    held = [(0, length)] if length else []
    ordered = _in_order_of_cutting(cuts)
    for cut in cuts if ordered is None else ordered:
        num_pieces = 1 if ordered is not None else cut.split_factor
        pieces = [_chunk(held, num_pieces, number) for number in range(num_pieces)]
        own = [_chunk(piece, cut.size, coordinate[cut.axis]) for piece in pieces]
        held = _joined([interval for intervals in own for interval in intervals])
    return held


def _in_order_of_cutting(cuts: Sequence[_Cut]) -> list[_Cut] | None:
    """The order in which the axes cut one after the other, None where there is none.

    FSDP over tensor parallelism cuts the parts that the later axis has made, and says so by a split factor: the number
    of pieces there were. Taken literally, that factor is wrong where the pieces are of different lengths.
    """
    ordered: list[_Cut] = []
    for cut in reversed(cuts):
        before = [math.prod(one.size for one in ordered[:count]) for count in range(len(ordered) + 1)]
        if cut.split_factor not in before:
            return None
        ordered.insert(before.index(cut.split_factor), cut)
    return ordered


def _chunk(intervals: Sequence[Interval], count: int, number: int) -> list[Interval]:
    """One of the `count` chunks into which `torch.chunk` would cut what lies in `intervals`, taken together."""
    size = -(-sum(stop - start for start, stop in intervals) // count)
    first, last = size * number, size * (number + 1)
    found = []
    position = 0
    for start, stop in intervals:
        low, high = max(first, position), min(last, position + stop - start)
        if low < high:
            found.append((start + low - position, start + high - position))
        position += stop - start
    return found


def _joined(intervals: Sequence[Interval]) -> list[Interval]:
    joined: list[Interval] = []
    for start, stop in intervals:
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], stop)
        else:
            joined.append((start, stop))
    return joined


def _with_local(intervals: Sequence[Interval]) -> Iterator[tuple[Interval, Interval]]:
    position = 0
    for start, stop in intervals:
        yield (start, stop), (position, position + stop - start)
        position += stop - start


@functools.lru_cache(1 << 14)
def check_tiling(layout: Layout, shape: tuple[int, ...]) -> None:
    """`StructureError` unless the boxes of all ranks together are the whole tensor, each element once.

    Boxes are products of intervals, so that is so exactly if in each dimension the intervals are.
    """
    for number, (cuts, length) in enumerate(zip(_cuts(layout, shape), shape, strict=True)):
        axes = {cut.axis for cut in cuts}
        places = itertools.product(*(range(size) if axis in axes else (0,) for axis, size in enumerate(layout.mesh)))
        held = sorted(interval for place in places for interval in _intervals(cuts, length, place))
        if _joined(held) != ([(0, length)] if length else []):
            raise StructureError(f"the placements ({layout}) do not cut dimension {number} of {list(shape)} into parts")


# Reading and writing parts


def overlap(one: Box, other: Box) -> Box | None:
    """What two boxes have in common; None if that is nothing."""
    common = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(one, other, strict=True))
    return common if all(start < stop for start, stop in common) else None


def inside(box: Box, outer: Box) -> tuple[slice, ...]:
    """Where `box` lies in an array that holds `outer`."""
    return tuple(slice(start - low, stop - low) for (start, stop), (low, _) in zip(box, outer, strict=True))


def rectangles(box: Box, start: int, stop: int) -> Iterator[Box]:
    """The elements `start` to `stop` of a box in its C order, as boxes that follow one another."""
    if start >= stop:
        return
    if not box or (start == 0 and stop == volume(box)):
        yield box
        return
    (low, _), *rest = box
    row = volume(tuple(rest))
    first, last = start // row, -(-stop // row)
    if start > first * row:
        for inner in rectangles(tuple(rest), start - first * row, min(stop - first * row, row)):
            yield ((low + first, low + first + 1), *inner)
        first += 1
    whole = max(first, min(last, stop // row))
    if whole > first:
        yield ((low + first, low + whole), *rest)
    if last > whole:
        for inner in rectangles(tuple(rest), 0, stop - whole * row):
            yield ((low + whole, low + whole + 1), *inner)


def is_grid(boxes: Sequence[Box], shape: Sequence[int]) -> bool:
    """Whether different boxes that hold something are the cells of one grid over the whole tensor, as all that
    placements make are: then they hold each element once."""
    if len(set(boxes)) != len(boxes):
        return False
    for dimension, length in enumerate(shape):
        cuts = sorted({box[dimension] for box in boxes})
        if _joined(cuts) != [(0, length)] or any(one[1] != other[0] for one, other in itertools.pairwise(cuts)):
            return False
    return len(boxes) == math.prod(len({box[dimension] for box in boxes}) for dimension in range(len(shape)))
