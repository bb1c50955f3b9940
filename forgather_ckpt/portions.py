"""What ranks say that they hold, and what they agree to store: plain data (`agreement` makes the one of the other).

A portion is the items, or parts of sharded ones, of one entry that the same ranks hold. The sharing pattern gives the
default: one portion a set. Layouts narrow it: of a tensor that a mesh cuts, each part is held by the ranks at one place
on the axes that cut. Global names widen it: what several sets have under one name (a tied embedding on two pipeline
stages, a parameter in all data-parallel replicas of a tensor-parallel rank) is one item, held by all of them.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple, Self

from forgather_ckpt.boxes import Box, Coordinate, Layout, local_boxes, whole_box
from forgather_ckpt.patterns import TRAITS, SharingPattern
from forgather_ckpt.topology import Ranks, RankSet, Topology, sets_of

ENTRY_OF_ALL = "all"
"""The one entry of a component with global names."""

WHOLE = ""
"""The layout of what is not cut into parts."""


_NUMBER = " (mesh "


def layout_name(layout: Layout, number: int) -> str:
    """The name of a layout in a state; `number` tells apart the meshes of one shape."""
    return f"{layout}{_NUMBER}{number})"


def without_number(name: str) -> str:
    """What such a name says to people, and to ranks whose state numbers its meshes in another order."""
    return name.partition(_NUMBER)[0]


class Held(NamedTuple):
    """What one rank holds of one layout: the mesh that it is on (None for what is whole), how many items or parts, and
    their bytes."""

    layout: Layout | None
    ranks: Ranks
    num_parts: int
    num_bytes: int

    def place_of(self, rank: int) -> Coordinate | None:
        """Which part the rank holds: a place on the axes that cut; None for what is whole."""
        return None if self.layout is None else _places(self.layout, self.ranks)[rank]

    def lead(self, place: Coordinate) -> int:
        """The rank that holds the part at `place`, and is the first on all axes that replicate."""
        assert self.layout is not None
        return next(rank for rank, other in _places(self.layout, self.ranks).items() if other == place)

    def boxes(self, shape: tuple[int, ...], place: Coordinate | None) -> Iterator[Box]:
        """The parts at `place` of a tensor of `shape`."""
        if self.layout is None or place is None:
            yield whole_box(shape)
            return
        cutting = iter(place)
        coordinate = tuple(0 if one is None else next(cutting) for one in self.layout.placements)
        for box, _ in local_boxes(self.layout, shape, coordinate):
            yield box

    def to_json(self) -> list[Any]:
        return [self.layout and self.layout.to_json(), _ranks_to_json(self.ranks), self.num_parts, self.num_bytes]

    @classmethod
    def from_json(cls, data: Sequence[Any]) -> Self:
        layout, ranks, num_parts, num_bytes = data
        return cls(layout and Layout.from_json(layout), _ranks_from_json(ranks), num_parts, num_bytes)


def _ranks_to_json(ranks: Ranks) -> list[int] | dict[str, list[int]]:
    """Most meshes are on ranks that follow one another: every rank sends its own, and rank 0 reads all."""
    if len(ranks) > 1 and (step := ranks[1] - ranks[0]) and ranks == tuple(range(ranks[0], ranks[-1] + step, step)):
        return {"range": [ranks[0], ranks[-1] + step, step]}
    return list(ranks)


def _ranks_from_json(data: list[int] | dict[str, list[int]]) -> Ranks:
    return tuple(range(*data["range"])) if isinstance(data, dict) else tuple(data)


@functools.lru_cache(256)  # all ranks of a mesh say the same of it
def _places(layout: Layout, ranks: Ranks) -> dict[int, Coordinate]:
    return dict(zip(ranks, map(layout.part, layout.coordinates()), strict=True))


@dataclass(frozen=True)
class Report:
    """What one rank says of one component before anything is written.

    `problem` instead of the rest, where its state could not be taken; no report where it holds nothing.
    """

    digest: str = ""
    """Of the structure: names, kinds, dtypes, shapes, and how each tensor is cut."""
    num_items: int = 0
    held: Mapping[str, Held] = field(default_factory=dict)
    """By layout."""
    problem: str | None = None

    def to_json(self) -> list[Any]:
        held = {name: one.to_json() for name, one in self.held.items()}
        return [self.digest, self.num_items, held, self.problem]

    @classmethod
    def from_json(cls, data: Sequence[Any]) -> Self:
        digest, num_items, held, problem = data
        return cls(digest, num_items, {name: Held.from_json(one) for name, one in held.items()}, problem)


@dataclass(frozen=True)
class Portion:
    """The items, or parts of items, of one entry of a component that `holders` hold.

    `names` is None for all that the holders have in `layouts` but the items that another portion names.
    """

    component: str
    entry: str
    holders: Ranks
    num_items: int
    """Items, and parts of sharded ones."""
    num_bytes: int
    names: tuple[str, ...] | None = None
    num_sets: int = 1
    """How many sets of the pattern the holders come from."""
    exclude: tuple[str, ...] = ()
    """Patterns of the names that are not compared."""
    layouts: tuple[str, ...] = (WHOLE,)
    lead: int = -1
    """Who writes alone, where copies are not compared: in all portions of an entry a rank of the same copy."""
    is_untied: bool = False
    """Second names of tensors among `names` are stored as tensors of their own: elsewhere they are."""

    def to_json(self) -> list[Any]:
        return [getattr(self, one.name) for one in fields(self)]

    @classmethod
    def from_json(cls, data: Sequence[Any]) -> Self:
        values: list[Any] = [tuple(value) if isinstance(value, list) else value for value in data]
        return cls(**dict(zip((one.name for one in fields(cls)), values, strict=True)))


@dataclass(frozen=True)
class Declared:
    """What the ranks have agreed to declare of one component."""

    key: str
    pattern: SharingPattern
    group: str | None
    required: bool
    is_global: bool
    exclude: tuple[str, ...] = ()

    def sets(self, topology: Topology) -> tuple[RankSet, ...]:
        return sets_of(self.pattern, self.group, topology)

    @property
    def is_compared(self) -> bool:
        return TRAITS[self.pattern].compared


Reports = Mapping[int, Report]
"""The reports of one component by rank; ranks that hold nothing are absent."""
