"""Where the ranks are, as plain data: nodes, named groups, and the sets that a sharing pattern makes of them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self, assert_never

from forgather_ckpt.errors import DeclarationError
from forgather_ckpt.patterns import SharingPattern

Ranks = tuple[int, ...]
Coordinates = tuple[tuple[str, int, int], ...]
"""A place on mesh axes: `(axis, coordinate, size)` of each, for example `(("pp", 1, 2),)`."""


@dataclass(frozen=True)
class RankSet:
    """One set of a partition: the ranks that hold the same state, and the name of the entry that stores it."""

    id: str
    ranks: Ranks
    coordinates: Coordinates | None = None
    """Of a group on a mesh: where the set lies on all other axes. It is found again by this, on any ranks."""


@dataclass(frozen=True)
class Group:
    """A named family of disjoint process groups, such as all the data-parallel groups of a job."""

    sets: tuple[Ranks, ...]
    coordinates: tuple[Coordinates, ...] | None = None
    """For each set, its place on the other axes of the mesh that it comes from; None for bare process groups."""


@dataclass(frozen=True)
class Topology:
    """The ranks of a job as one of them sees it; everything but `rank` is equal on all."""

    rank: int
    world_size: int
    nodes: tuple[Ranks, ...]
    """The ranks of each node, in the order of node numbers."""
    node_source: str = "single node"
    """What told the nodes apart: "torchrun group rank", "slurm node id", "mpi node rank" or "boot id"."""
    groups: Mapping[str, Group] = field(default_factory=dict)

    @classmethod
    def single(cls) -> Self:
        """The topology of one process that is alone."""
        return cls(rank=0, world_size=1, nodes=((0,),))

    @property
    def node(self) -> int:
        """The number of the node that this rank is on."""
        return next(number for number, ranks in enumerate(self.nodes) if self.rank in ranks)

    def to_json(self) -> dict[str, Any]:
        return {
            "world_size": self.world_size,
            "nodes": [list(ranks) for ranks in self.nodes],
            "node_source": self.node_source,
            "groups": {
                name: {
                    "sets": [list(ranks) for ranks in group.sets],
                    "coordinates": None
                    if group.coordinates is None
                    else [[list(axis) for axis in place] for place in group.coordinates],
                }
                for name, group in self.groups.items()
            },
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any], *, rank: int) -> Self:
        """The topology that `to_json` described, as `rank` sees it."""
        return cls(
            rank=rank,
            world_size=data["world_size"],
            nodes=tuple(tuple(ranks) for ranks in data["nodes"]),
            node_source=data["node_source"],
            groups={
                name: Group(
                    sets=tuple(tuple(ranks) for ranks in group["sets"]),
                    coordinates=None
                    if group["coordinates"] is None
                    else tuple(tuple((axis, at, size) for axis, at, size in place) for place in group["coordinates"]),
                )
                for name, group in data["groups"].items()
            },
        )


def sets_of(pattern: SharingPattern, group_name: str | None, topology: Topology) -> tuple[RankSet, ...]:
    """The partition of the ranks that `pattern` means: inside a set, the state is the same.

    Ranks outside every process group called `group_name` are in no set. Source: DESIGN section 4.
    """
    match pattern:
        case SharingPattern.GLOBAL | SharingPattern.REPLICATED:
            return (RankSet("all", tuple(range(topology.world_size))),)
        case SharingPattern.PER_RANK:
            return tuple(RankSet(f"rank={rank}", (rank,)) for rank in range(topology.world_size))
        case SharingPattern.PER_NODE:
            return tuple(RankSet(f"node={number}", ranks) for number, ranks in enumerate(topology.nodes))
        case SharingPattern.PER_GROUP:
            if group_name is None or group_name not in topology.groups:
                known = ", ".join(sorted(topology.groups)) or "none"
                raise DeclarationError(
                    f"there is no process group {group_name!r}; known groups: {known}. "
                    "Return it from get_process_groups(), or pass process_groups= to the coordinator"
                )
            group = topology.groups[group_name]
            if group.coordinates is None:
                return tuple(RankSet(f"{group_name}={i}", ranks) for i, ranks in enumerate(group.sets))
            return tuple(
                RankSet(_place_name(place) or f"{group_name}={i}", ranks, place)
                for i, (ranks, place) in enumerate(zip(group.sets, group.coordinates, strict=True))
            )
    assert_never(pattern)


def same_place(saved: Coordinates, now: Coordinates) -> bool:
    """Whether two places on two meshes are the same one: every other axis has the same size and coordinate.

    An axis of size 1 may be absent: it tells nothing apart.
    """
    return telling_axes(saved) == telling_axes(now)


def telling_axes(place: Coordinates) -> frozenset[tuple[str, int, int]]:
    """What tells a place from others: equal exactly for the `same_place`."""
    return frozenset(axis for axis in place if axis[2] > 1)


def _place_name(place: Coordinates) -> str:
    return ",".join(f"{axis}={at}/{size}" for axis, at, size in place)
