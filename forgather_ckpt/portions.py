"""What the ranks agreed to store, from what each of them holds: pure, decided by rank 0, told to all.

A portion is the items of one entry that the same ranks hold. The sharing pattern gives the default: one portion a
set. Global names narrow or widen it: a name that several sets have (a tied embedding on two pipeline stages) is one
item of one state, held by all of them.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

from forgather_ckpt.errors import CheckpointError, StructureError
from forgather_ckpt.patterns import TRAITS, SharingPattern
from forgather_ckpt.replication import describe
from forgather_ckpt.topology import Ranks, RankSet, Topology, sets_of

ENTRY_OF_ALL = "all"
"""The one entry of a component with global names."""


@dataclass(frozen=True)
class Report:
    """What one rank says of one component before anything is written.

    `problem` instead of the rest, where its state could not be taken; no report where it holds nothing.
    """

    digest: str = ""
    """Of the structure: names, kinds, dtypes, shapes."""
    num_items: int = 0
    num_bytes: int = 0
    problem: str | None = None

    def to_json(self) -> list[Any]:
        return [self.digest, self.num_items, self.num_bytes, self.problem]


@dataclass(frozen=True)
class Portion:
    """The items of one entry of a component that `holders` hold.

    `names` is None for all items of the holders' state but those that another portion names.
    """

    component: str
    entry: str
    holders: Ranks
    num_items: int
    num_bytes: int
    names: tuple[str, ...] | None = None
    num_sets: int = 1
    """How many sets of the pattern the holders come from."""
    exclude: tuple[str, ...] = ()
    """Patterns of the names that are not compared."""

    def to_json(self) -> list[Any]:
        names = None if self.names is None else list(self.names)
        listed = [self.component, self.entry, list(self.holders), self.num_items, self.num_bytes, names, self.num_sets]
        return [*listed, list(self.exclude)]

    @classmethod
    def from_json(cls, data: Sequence[Any]) -> Self:
        component, entry, holders, num_items, num_bytes, names, num_sets, exclude = data
        listed = None if names is None else tuple(names)
        return cls(component, entry, tuple(holders), num_items, num_bytes, listed, num_sets, tuple(exclude))


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


def first_problem(component: Declared, reports: Reports) -> str | None:
    """Why the component cannot be stored, with the ranks that say so; None if it can."""
    problems: dict[str, list[int]] = defaultdict(list)
    for rank, report in sorted(reports.items()):
        if report.problem is not None:
            problems[report.problem].append(rank)
    if not problems:
        return None
    return "; ".join(f"on ranks {describe(tuple(ranks))}: {problem}" for problem, ranks in problems.items())


def differing_sets(component: Declared, reports: Reports, topology: Topology) -> list[Ranks]:
    """For the first set whose members' structures differ, the lowest rank of each different structure."""
    if not component.is_compared:
        return []
    for ranks in (group.ranks for group in component.sets(topology)):
        lowest: dict[str, int] = {}
        for rank in ranks:
            if rank in reports:
                lowest.setdefault(reports[rank].digest, rank)
        if len(lowest) > 1:
            return [tuple(lowest.values())]
    return []


def base_portions(component: Declared, reports: Reports, topology: Topology) -> list[Portion]:
    """One portion a set, as the pattern says.

    `StructureError` where a rank must hold something and does not. Ranks outside all sets must hold nothing.
    """
    portions = []
    members = set()
    for group in component.sets(topology):
        members |= set(group.ranks)
        if component.is_compared:
            holders = tuple(rank for rank in group.ranks if rank in reports)
            if holders and holders != group.ranks:
                empty = tuple(rank for rank in group.ranks if rank not in reports)
                raise StructureError(
                    f"component {component.key!r} ({component.pattern.name}): ranks {describe(empty)} hold nothing "
                    f"(stateful=None), but {describe(holders)} of the same set do; all members must hold the state",
                    rank=empty[0],
                    component=component.key,
                )
        else:
            holders = group.ranks[:1] if group.ranks[0] in reports else ()
        if component.pattern is SharingPattern.GLOBAL and not holders:
            raise StructureError(
                f"component {component.key!r} (GLOBAL): rank 0 holds nothing (stateful=None), and its state counts",
                rank=0,
                component=component.key,
            )
        if holders:
            report = reports[holders[0]]
            entry = ENTRY_OF_ALL if component.is_global else group.id
            size = (report.num_items, report.num_bytes)
            portions.append(Portion(component.key, entry, holders, *size, exclude=component.exclude))
    if strays := sorted(set(reports) - members):
        raise StructureError(
            f"component {component.key!r}: ranks {describe(tuple(strays))} hold state but are in no group "
            f"{component.group!r}; declare stateful=None there",
            rank=strays[0],
            component=component.key,
        )
    return portions


Table = Sequence[Sequence[Any]]
"""`structure.State.table()` and each item's bytes: `[name, kind, …, num_bytes]`."""


def merge_tables(portions: Sequence[Portion], tables: Mapping[int, Table]) -> list[Portion]:
    """The portions of a component with global names that several sets hold, given the table of each set's first rank.

    A name that several sets have becomes part of a portion that all of them hold; it must mean the same there.
    """
    first: dict[str, tuple[int, Sequence[Any]]] = {}
    having: dict[str, list[int]] = defaultdict(list)
    for number, portion in enumerate(portions):
        for *what, _ in tables[portion.holders[0]]:
            name = what[0]
            having[name].append(number)
            rank, known = first.setdefault(name, (portion.holders[0], what))
            if list(known) != what:
                raise StructureError(
                    f"component {portion.component!r}: {name!r} is {_show(known)} on rank {rank} and {_show(what)} on rank "
                    f"{portion.holders[0]}; with names='global' one name means one item",
                    rank=portion.holders[0],
                    component=portion.component,
                )
    sizes = {row[0]: row[-1] for portion in portions for row in tables[portion.holders[0]]}
    shared: dict[tuple[int, ...], list[str]] = defaultdict(list)
    for name, numbers in having.items():
        if len(numbers) > 1:
            shared[tuple(numbers)].append(name)
    shared_names = {name for names in shared.values() for name in names}
    result = []
    for portion in portions:
        own = [row for row in tables[portion.holders[0]] if row[0] not in shared_names]
        if own:
            result.append(replace(portion, num_items=len(own), num_bytes=sum(row[-1] for row in own)))
    for having_it, names in sorted(shared.items()):
        holders = tuple(sorted({rank for number in having_it for rank in portions[number].holders}))
        num_bytes = sum(sizes[name] for name in names)
        result.append(
            replace(
                portions[0],
                holders=holders,
                num_items=len(names),
                num_bytes=num_bytes,
                names=tuple(sorted(names)),
                num_sets=len(having_it),
            )
        )
    return result


def first_difference(component: str, tables: Mapping[int, Table]) -> CheckpointError:
    """The error that names the first item in which the structures of some ranks differ."""
    (rank, table), *others = sorted(tables.items())
    expected = {row[0]: list(row[:-1]) for row in table}
    for other, other_table in others:
        found = {row[0]: list(row[:-1]) for row in other_table}
        for name in sorted(expected.keys() | found.keys()):
            if expected.get(name) != found.get(name):
                return StructureError(
                    f"component {component!r}: {name!r} is {_show(expected.get(name))} on rank {rank} and "
                    f"{_show(found.get(name))} on rank {other}; members of one set must hold the same items",
                    rank=other,
                    component=component,
                )
    return StructureError(f"component {component!r}: the structures of its members differ", component=component)


def _show(what: Sequence[Any] | None) -> str:
    if what is None:
        return "absent"
    _, kind, *details = what
    if kind == "alias":
        return f"the same tensor as {details[0]!r}"
    return f"a {kind} {' '.join(str(detail) for detail in details)}".rstrip()
