"""What the ranks agree to store, from what each of them holds: pure, decided by rank 0, told to all.

Ranks whose states have the same structure are a family, and say the same of it; so there is little to ask, however
many ranks there are. Where several families contribute to one namespace, one of each sends its names too.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from forgather_ckpt.boxes import Coordinate, volume
from forgather_ckpt.dtypes import ITEM_BYTES
from forgather_ckpt.errors import CheckpointError, StructureError
from forgather_ckpt.patterns import SharingPattern
from forgather_ckpt.portions import ENTRY_OF_ALL, WHOLE, Declared, Held, Portion, Reports, without_number
from forgather_ckpt.replication import describe
from forgather_ckpt.topology import Ranks, Topology


def first_problem(component: Declared, reports: Reports) -> str | None:
    """Why the component cannot be stored, with the ranks that say so; None if it can."""
    problems: dict[str, list[int]] = defaultdict(list)
    for rank, report in sorted(reports.items()):
        if report.problem is not None:
            problems[report.problem].append(rank)
    if not problems:
        return None
    return "; ".join(f"on ranks {describe(tuple(ranks))}: {problem}" for problem, ranks in problems.items())


def differing_sets(component: Declared, reports: Reports, topology: Topology) -> Ranks:
    """For the first set whose members' structures differ, the lowest rank of each different structure."""
    if not component.is_compared:
        return ()
    for ranks in (group.ranks for group in component.sets(topology)):
        lowest: dict[str, int] = {}
        for rank in ranks:
            if rank in reports:
                lowest.setdefault(reports[rank].digest, rank)
        if len(lowest) > 1:
            return tuple(lowest.values())
    return ()


class Entry(NamedTuple):
    """What will be stored of a component under one name."""

    name: str
    num_items: int
    portions: tuple[Portion, ...]


class Family(NamedTuple):
    """Ranks whose states have the same structure, and which therefore say the same of it."""

    ranks: Ranks
    reports: Reports

    @property
    def layouts(self) -> Iterable[str]:
        return self.reports[self.ranks[0]].held

    def held(self, layout: str) -> list[tuple[int, Held]]:
        return [(rank, self.reports[rank].held[layout]) for rank in self.ranks]


@dataclass(frozen=True)
class Contribution:
    """The families that contribute to one entry of a component."""

    component: Declared
    entry: str
    families: Sequence[Family]
    set_of: Mapping[int, str]
    """The set that each rank belongs to."""

    @property
    def speakers(self) -> list[int]:
        """The rank of each family whose table tells all."""
        return [family.ranks[0] for family in self.families]


def contributions(component: Declared, reports: Reports, topology: Topology) -> list[Contribution]:
    """The families of each entry, with the ranks whose state counts.

    `StructureError` where a rank must hold something and does not. Ranks outside all sets must hold nothing.
    """
    found: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    set_of: dict[int, str] = {}
    for group in component.sets(topology):
        for rank in _holders(component, group.ranks, reports):
            found[ENTRY_OF_ALL if component.is_global else group.id][reports[rank].digest].append(rank)
        set_of |= dict.fromkeys(group.ranks, group.id)
    if strays := sorted(set(reports) - set(set_of)):
        raise StructureError(
            f"component {component.key!r}: ranks {describe(tuple(strays))} hold state but are in no group "
            f"{component.group!r}; declare stateful=None there",
            rank=strays[0],
            component=component.key,
        )
    return [
        Contribution(
            component,
            entry,
            [Family(tuple(sorted(ranks)), reports) for ranks in sorted(by_digest.values(), key=min)],
            set_of,
        )
        for entry, by_digest in found.items()
    ]


def _holders(component: Declared, ranks: Ranks, reports: Reports) -> Ranks:
    """The members of a set whose state counts."""
    if component.is_compared:
        holders = tuple(rank for rank in ranks if rank in reports)
        if holders and holders != ranks:
            empty = tuple(rank for rank in ranks if rank not in reports)
            raise StructureError(
                f"component {component.key!r} ({component.pattern.name}): stateful is None on rank {describe(empty)}, but not "
                f"on rank {describe(holders)} of the same set; all its members must hold the state",
                rank=empty[0],
                component=component.key,
            )
    else:
        holders = ranks[:1] if ranks[0] in reports else ()
    if component.pattern is SharingPattern.GLOBAL and not holders:
        raise StructureError(
            f"component {component.key!r} (GLOBAL): rank 0 holds nothing (stateful=None), and its state counts",
            rank=0,
            component=component.key,
        )
    return holders


def entry_of_one(given: Contribution) -> Entry:
    """The entry to which one family alone contributes."""
    [family] = given.families
    num_items = family.reports[family.ranks[0]].num_items
    return Entry(given.entry, num_items, _portions(given, [_Group([(family, layout)]) for layout in family.layouts]))


Table = Sequence[Sequence[Any]]
"""`structure.State.table()`."""


def entry_of_several(given: Contribution, tables: Mapping[int, Table]) -> Entry:
    """The entry to which several families contribute, given each one's table: names must mean the same in all.

    What several have under one name becomes a portion that all of them hold.
    """
    rows = [{row[0]: tuple(row) for row in tables[rank]} for rank in given.speakers]
    having: dict[str, list[int]] = defaultdict(list)
    for number, table in enumerate(rows):
        for name in table:
            having[name].append(number)
    shared: dict[tuple[Any, ...], list[str]] = defaultdict(list)
    for name, numbers in having.items():
        if len(numbers) > 1:
            is_untied = _is_untied(given, name, {number: rows[number] for number in numbers})
            layouts = [
                _layout(rows[number], name if not is_untied else _target(rows[number], name)) for number in numbers
            ]
            shared[is_untied, tuple(numbers), tuple(layouts)].append(name)
    groups = []
    for family, table in zip(given.families, rows, strict=True):
        for layout in family.layouts:
            elsewhere = [name for name in table if len(having[name]) > 1 and _layout(table, name) == layout]
            groups.append(_Group([(family, layout)], sizes=[_size(table[name]) for name in elsewhere]))
    for (is_untied, numbers, layouts), names in sorted(shared.items(), key=lambda one: one[1]):
        table = rows[numbers[0]]
        stored = [_target(table, name) if is_untied else name for name in names]
        members = [(given.families[number], layout) for number, layout in zip(numbers, layouts, strict=True)]
        groups.append(_Group(members, tuple(sorted(names)), [_size(table[name]) for name in stored], is_untied))
    return Entry(given.entry, len(having), _portions(given, groups))


def _is_untied(given: Contribution, name: str, tables: Mapping[int, Mapping[str, Sequence[Any]]]) -> bool:
    """Whether families that share a name have it as a tensor of its own, or as a second name of different ones: then
    all must store a tensor. `StructureError` where the name does not mean the same in all."""
    kinds = [table[name][1:] for table in tables.values()]
    is_untied = any(kind[0] == "alias" for kind in kinds) and any(kind != kinds[0] for kind in kinds)
    first: tuple[int, list[Any]] | None = None
    for number, table in tables.items():
        _, *what = table[_target(table, name)] if is_untied else table[name]
        # meshes are numbered by each family for itself
        what = [without_number(one) if isinstance(one, str) else one for one in what]
        rank = given.families[number].ranks[0]
        if first is None:
            first = rank, what
        elif first[1] != what:
            raise StructureError(
                f"component {given.component.key!r}: {name!r} is {_show([name, *first[1]])} on rank {first[0]} and "
                f"{_show([name, *what])} on rank {rank}; with names='global' one name means one item",
                rank=rank,
                component=given.component.key,
            )
    return is_untied


def _target(table: Mapping[str, Sequence[Any]], name: str) -> str:
    _, kind, *details = table[name]
    return details[0] if kind == "alias" else name


def _layout(table: Mapping[str, Sequence[Any]], name: str) -> str:
    _, kind, *details = table[name]
    return details[2] if kind == "tensor" and len(details) > 2 else WHOLE


class _Size(NamedTuple):
    """Of an item: what its bytes, and those of any part of it, follow from. Values and second names have none."""

    shape: tuple[int, ...] = ()
    item_bytes: int = 0


def _size(row: Sequence[Any]) -> _Size:
    _, kind, *details = row
    return _Size(tuple(details[1]), ITEM_BYTES[details[0]]) if kind == "tensor" else _Size()


class _Group(NamedTuple):
    """Items that the same families have, each in one of its layouts."""

    members: Sequence[tuple[Family, str]]
    names: tuple[str, ...] | None = None
    """None for all of the layout but what other groups name."""
    sizes: Sequence[_Size] = ()
    """Of the items in `names`; without names, of those that other groups name."""
    is_untied: bool = False


def _portions(given: Contribution, groups: Sequence[_Group]) -> tuple[Portion, ...]:
    """A portion for each set of ranks that hold the same, of the items that no group names; and for each group that
    names items, one for each part."""
    common: dict[Ranks, Portion] = {}
    named: list[Portion] = []
    portions = [portion for group in groups for portion in _parts(given, group)]
    # a state without items is a state too
    for portion in [one for one in portions if one.num_items] or portions[:1]:
        if portion.names is not None:
            named.append(portion)
        elif (known := common.get(portion.holders)) is None:
            common[portion.holders] = portion
        else:
            common[portion.holders] = replace(
                known,
                num_items=known.num_items + portion.num_items,
                num_bytes=known.num_bytes + portion.num_bytes,
                layouts=known.layouts + portion.layouts,
            )
    return (*common.values(), *named)


def _parts(given: Contribution, group: _Group) -> Iterator[Portion]:
    """A portion for each part of the items of a group; one if they are whole."""
    held = {rank: one for family, layout in group.members for rank, one in family.held(layout)}
    lowest = held[min(held)]
    missing = sorted({rank for ranks in {one.ranks for one in held.values()} for rank in ranks} - held.keys())
    holders: dict[Coordinate | None, list[int]] = defaultdict(list)
    for rank, one in held.items():
        holders[one.place_of(rank)].append(rank)
    for place, ranks in holders.items():
        first = held[min(ranks)]
        boxes = [list(first.boxes(size.shape, place)) for size in group.sizes]
        num_items = sum(map(len, boxes))
        num_bytes = sum(size.item_bytes * sum(map(volume, own)) for size, own in zip(group.sizes, boxes, strict=True))
        if group.names is None:
            num_items, num_bytes = first.num_parts - num_items, first.num_bytes - num_bytes
        if num_items and missing:
            raise _reaches_outside(given, first.ranks, missing)
        yield Portion(
            given.component.key,
            given.entry,
            tuple(sorted(ranks)),
            num_items,
            num_bytes,
            names=group.names,
            num_sets=len({given.set_of[rank] for rank in ranks}),
            exclude=given.component.exclude,
            layouts=tuple(dict.fromkeys(layout for _, layout in group.members)),
            lead=min(ranks) if place is None else lowest.lead(place),
            is_untied=group.is_untied,
        )


def _reaches_outside(given: Contribution, mesh: Ranks, missing: Sequence[int]) -> StructureError:
    if given.component.is_global and given.component.pattern is not SharingPattern.GLOBAL:
        problem = "do not hold the same items; every rank of a mesh must"
    else:
        what = "REPLICATED" if given.component.pattern is SharingPattern.GLOBAL else "names='global'"
        problem = f"are outside the set {given.entry!r}, whose state is stored by itself; declare {what}"
    return StructureError(
        f"component {given.component.key!r}: tensors are cut over the ranks {describe(mesh)}, of which rank(s) "
        f"{describe(tuple(missing))} {problem}",
        rank=missing[0],
        component=given.component.key,
    )


def first_difference(component: str, tables: Mapping[int, Table]) -> CheckpointError:
    """The error that names the first item in which the structures of some ranks differ."""
    (rank, table), *others = sorted(tables.items())
    expected = {row[0]: list(row) for row in table}
    for other, other_table in others:
        found = {row[0]: list(row) for row in other_table}
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
    if kind == "tensor" and len(details) > 2:
        return f"a tensor {details[0]} {details[1]}, {without_number(details[2])}"
    return f"a {kind} {' '.join(str(detail) for detail in details)}".rstrip()
