"""What the ranks agree to store, from what each of them holds."""

import math

import pytest

from forgather_ckpt import strict_json
from forgather_ckpt.agreement import (
    Entry,
    contributions,
    differing_sets,
    entry_of_one,
    entry_of_several,
    first_difference,
    first_problem,
)
from forgather_ckpt.boxes import Layout, Shard, local_boxes, volume
from forgather_ckpt.errors import StructureError
from forgather_ckpt.patterns import TRAITS, SharingPattern
from forgather_ckpt.portions import WHOLE, Declared, Held, Portion, Report, layout_name
from forgather_ckpt.topology import Group, Topology

GLOBAL, PER_RANK, REPLICATED, PER_GROUP, PER_NODE = (
    SharingPattern.GLOBAL, SharingPattern.PER_RANK, SharingPattern.REPLICATED, SharingPattern.PER_GROUP,
    SharingPattern.PER_NODE,
)  # fmt: skip

TOPOLOGY = Topology(0, 4, ((0, 1, 2), (3,)), groups={"dp": Group(((0, 2), (1, 3))), "some": Group(((0, 1),))})


def declared(pattern: SharingPattern, group: str | None = None, *, names: str | None = None) -> Declared:
    is_global = (names or TRAITS[pattern].names) == "global"
    return Declared("c", pattern, group, required=True, is_global=is_global)


def reports(structures: str) -> dict[int, Report]:
    """A report for each letter, equal for equal letters; none for `-`."""
    return {rank: report(letter, 2, 10 * rank) for rank, letter in enumerate(structures) if letter != "-"}


def report(digest: str, num_items: int, num_bytes: int) -> Report:
    return Report(digest, num_items, {WHOLE: Held(None, (), num_items, num_bytes)})


def portion(entry: str, *holders: int) -> Portion:
    return Portion("c", entry, holders, 2, 10 * holders[0], lead=holders[0])


@pytest.mark.parametrize(
    ("component", "structures", "expected"),
    [
        (declared(GLOBAL), "aaaa", [portion("all", 0)]),
        (declared(GLOBAL), "a---", [portion("all", 0)]),
        (declared(GLOBAL), "abcd", [portion("all", 0)]),
        (declared(REPLICATED), "aaaa", [portion("all", 0, 1, 2, 3)]),
        (declared(REPLICATED), "----", []),
        (declared(PER_RANK), "abcd", [portion(f"rank={rank}", rank) for rank in range(4)]),
        (declared(PER_RANK), "a-b-", [portion("rank=0", 0), portion("rank=2", 2)]),
        (declared(PER_RANK), "----", []),
        (declared(PER_NODE), "aaab", [portion("node=0", 0), portion("node=1", 3)]),
        (declared(PER_NODE), "-aab", [portion("node=1", 3)]),
        (declared(PER_GROUP, "dp"), "abab", [portion("dp=0", 0, 2), portion("dp=1", 1, 3)]),
        (declared(PER_GROUP, "dp"), "-a-a", [portion("dp=1", 1, 3)]),
        (declared(PER_GROUP, "some"), "aa--", [portion("some=0", 0, 1)]),
    ],
)
def test_one_portion_a_set(component, structures, expected):
    entries = [entry_of_one(one) for one in contributions(component, reports(structures), TOPOLOGY)]
    assert [portion for entry in entries for portion in entry.portions] == expected
    assert [(entry.name, entry.num_items) for entry in entries] == [(one.entry, 2) for one in expected]


@pytest.mark.parametrize(
    ("component", "structures", "expected"),
    [
        (declared(PER_RANK, names="global"), "ab-d", {"a": (0,), "b": (1,), "d": (3,)}),
        (declared(PER_RANK, names="global"), "abab", {"a": (0, 2), "b": (1, 3)}),
        (declared(PER_GROUP, "dp", names="global"), "abab", {"a": (0, 2), "b": (1, 3)}),
        (declared(PER_GROUP, "dp", names="global"), "aaaa", {"a": (0, 1, 2, 3)}),
    ],
)
def test_with_global_names_all_ranks_of_one_structure_are_a_family(component, structures, expected):
    [given] = contributions(component, reports(structures), TOPOLOGY)
    assert given.entry == "all"
    assert {family.reports[family.ranks[0]].digest: family.ranks for family in given.families} == expected


def test_sets_of_equal_structure_hold_the_same_items_together():
    [given] = contributions(declared(PER_GROUP, "dp", names="global"), reports("aaaa"), TOPOLOGY)
    expected = Portion("c", "all", (0, 1, 2, 3), 2, 0, num_sets=2, lead=0)
    assert entry_of_one(given) == Entry("all", 2, (expected,))


@pytest.mark.parametrize(
    ("component", "structures", "rank", "problem"),
    [
        (declared(GLOBAL), "-aaa", 0, "rank 0 holds nothing (stateful=None), and its state counts"),
        (declared(GLOBAL), "----", 0, "rank 0 holds nothing"),
        (declared(REPLICATED), "a-aa", 1, "stateful is None on rank 1, but not on rank 0, 2-3 of the same set"),
        (declared(REPLICATED), "a---", 1, "stateful is None on rank 1-3, but not"),
        (declared(PER_GROUP, "dp"), "ab-b", 2, "stateful is None on rank 2, but not on rank 0 of the same set"),
        (
            declared(PER_GROUP, "some"),
            "aab-",
            2,
            "ranks 2 hold state but are in no group 'some'; declare stateful=None",
        ),
    ],
)
def test_a_rank_that_must_hold_something_and_does_not_is_named(component, structures, rank, problem):
    with pytest.raises(StructureError) as caught:
        contributions(component, reports(structures), TOPOLOGY)
    assert problem in caught.value.message
    assert (caught.value.rank, caught.value.component) == (rank, "c")


@pytest.mark.parametrize(
    ("component", "structures", "expected"),
    [
        (declared(REPLICATED), "aaaa", ()),
        (declared(REPLICATED), "aaba", (0, 2)),
        (declared(REPLICATED), "bcab", (0, 1, 2)),
        (declared(REPLICATED), "-aab", (1, 3)),
        (declared(PER_GROUP, "dp"), "abab", ()),
        (declared(PER_GROUP, "dp"), "abac", (1, 3)),
        (declared(PER_GROUP, "dp"), "abcd", (0, 2)),
        (declared(GLOBAL), "abcd", ()),
        (declared(PER_RANK), "abcd", ()),
        (declared(PER_NODE), "abcd", ()),
    ],
)
def test_structures_must_be_equal_inside_compared_sets_only(component, structures, expected):
    assert differing_sets(component, reports(structures), TOPOLOGY) == expected


def test_problems_are_told_with_their_ranks():
    found = {
        0: report("a", 1, 1),
        1: Report(problem="it broke"),
        2: Report(problem="other"),
        3: Report(problem="it broke"),
    }
    assert first_problem(declared(REPLICATED), found) == "on ranks 1, 3: it broke; on ranks 2: other"
    assert first_problem(declared(REPLICATED), reports("aa-a")) is None


# ---- global names

T, V = "tensor", "value"
BYTES = 4


def row(name: str, kind: str = T, *details: object) -> list[object]:
    return [name, kind, *(details or (("float32", [1]) if kind == T else ()))]


def merged(*tables: list[list[object]], holders: str = "abab", component: Declared | None = None) -> Entry:
    """What the ranks with these letters as structures agree on, whose tables are these."""
    component = component or declared(PER_GROUP, "dp", names="global")
    letters = sorted(set(holders) - {"-"})
    sizes = {letter: (len(table), _bytes_of(table)) for letter, table in zip(letters, tables, strict=True)}
    reported = {rank: report(letter, *sizes[letter]) for rank, letter in enumerate(holders) if letter != "-"}
    [given] = contributions(component, reported, TOPOLOGY)
    return entry_of_several(given, dict(zip(given.speakers, tables, strict=True)))


def _bytes_of(table: list[list[object]]) -> int:
    return sum(BYTES * math.prod(details[1]) for _, kind, *details in table if kind == T)


def test_names_of_one_set_stay_with_it():
    entry = merged([row("a"), row("b", V)], [row("c"), row("d", T, "float32", [2])])
    assert entry == Entry(
        "all", 4, (Portion("c", "all", (0, 2), 2, 4, lead=0), Portion("c", "all", (1, 3), 2, 12, lead=1))
    )


def test_a_name_of_several_sets_is_one_item_that_all_of_them_hold():
    embedding = row("embedding", T, "float32", [25])
    entry = merged([embedding, row("a")], [row("b"), embedding])
    assert entry.num_items == 3
    assert entry.portions == (
        Portion("c", "all", (0, 2), 1, 4, lead=0),
        Portion("c", "all", (1, 3), 1, 4, lead=1),
        Portion("c", "all", (0, 1, 2, 3), 1, 100, ("embedding",), 2, lead=0),
    )


def test_a_portion_for_every_combination_of_sets():
    tables = [row("all"), row("01"), row("0")], [row("all"), row("01"), row("12")], [row("all"), row("12")]
    entry = merged(*tables, holders="abc-", component=declared(PER_RANK, names="global"))
    assert {(one.holders, one.names, one.num_sets) for one in entry.portions} == {
        ((0,), None, 1),
        ((0, 1, 2), ("all",), 3),
        ((0, 1), ("01",), 2),
        ((1, 2), ("12",), 2),
    }
    assert (entry.num_items, sum(one.num_bytes for one in entry.portions)) == (4, 16)


def test_a_tensor_that_is_a_second_name_elsewhere_is_stored_under_both():
    tied = [row("wte"), row("head", "alias", "wte")]
    entry = merged(tied, [row("head"), row("b")])
    assert entry.num_items == 3
    assert entry.portions == (
        Portion("c", "all", (0, 2), 1, 4, lead=0),
        Portion("c", "all", (1, 3), 1, 4, lead=1),
        Portion("c", "all", (0, 1, 2, 3), 1, 4, ("head",), 2, lead=0, is_untied=True),
    )


def test_second_names_of_the_same_tensor_stay_second_names():
    tied = [row("wte"), row("head", "alias", "wte")]
    entry = merged([*tied, row("a")], [*tied, row("b")])
    assert [(one.names, one.is_untied) for one in entry.portions[2:]] == [(("head", "wte"), False)]


# ---- tensors that a mesh cuts

FSDP = Layout((4,), (Shard(0),))
HSDP = Layout((2, 2), (None, Shard(0)))


def cut(layout: Layout, ranks: tuple[int, ...], rank: int, *shapes: tuple[int, ...]) -> Held:
    """What `rank` has of tensors of these shapes."""
    place = list(layout.coordinates())[ranks.index(rank)]
    boxes = [box for shape in shapes for box, _ in local_boxes(layout, shape, place)]
    return Held(layout, ranks, len(boxes), BYTES * sum(map(volume, boxes)))


def test_each_part_of_a_tensor_is_held_by_the_ranks_at_its_place():
    reported = {
        rank: Report("a", 3, {WHOLE: Held(None, (), 1, 4), "cut": cut(HSDP, (0, 1, 2, 3), rank, (5, 2), (3,))})
        for rank in range(4)
    }
    [given] = contributions(declared(REPLICATED), reported, TOPOLOGY)
    assert entry_of_one(given) == Entry(
        "all",
        3,
        (
            Portion("c", "all", (0, 1, 2, 3), 1, 4, lead=0),
            Portion("c", "all", (0, 2), 2, 4 * (6 + 2), layouts=("cut",), lead=0),
            Portion("c", "all", (1, 3), 2, 4 * (4 + 1), layouts=("cut",), lead=1),
        ),
    )


def test_ranks_whose_part_is_empty_hold_none():
    reported = {rank: Report("a", 1, {"cut": cut(FSDP, (0, 1, 2, 3), rank, (3,))}) for rank in range(4)}
    [given] = contributions(declared(REPLICATED), reported, TOPOLOGY)
    assert [one.holders for one in entry_of_one(given).portions] == [(0,), (1,), (2,)]


def test_the_parts_of_several_meshes_are_put_together():
    tp = Layout((2,), (Shard(1),))
    reported = {
        rank: Report("a", 1, {"cut": cut(tp, (0, 1) if rank < 2 else (2, 3), rank, (2, 4))}) for rank in range(4)
    }
    [given] = contributions(declared(PER_GROUP, "dp", names="global"), reported, TOPOLOGY)
    portions = entry_of_one(given).portions
    assert [(one.holders, one.lead, one.num_bytes, one.num_sets) for one in portions] == [
        ((0, 2), 0, 16, 1),
        ((1, 3), 1, 16, 1),
    ]


def test_what_is_not_compared_comes_from_one_copy_however_the_mesh_is_ordered():
    ranks = (0, 3, 2, 1)  # rank 0 has the first part of the first copy, rank 1 the second part of the second
    reported = {rank: Report("a", 1, {"cut": cut(HSDP, ranks, rank, (4,))}) for rank in range(4)}
    [given] = contributions(declared(REPLICATED), reported, TOPOLOGY)
    assert [(one.holders, one.lead) for one in entry_of_one(given).portions] == [((0, 2), 0), ((1, 3), 3)]


def test_layouts_in_which_the_same_ranks_hold_parts_are_one_portion():
    other = Layout((4,), (Shard(1),))
    reported = {
        rank: Report(
            "a",
            2,
            {"rows": cut(FSDP, (0, 1, 2, 3), rank, (4, 4)), "columns": cut(other, (0, 1, 2, 3), rank, (4, 4))},
        )
        for rank in range(4)
    }
    [given] = contributions(declared(REPLICATED), reported, TOPOLOGY)
    portions = entry_of_one(given).portions
    assert [(one.holders, one.layouts, one.num_items) for one in portions] == [
        ((rank,), ("rows", "columns"), 2) for rank in range(4)
    ]


def test_a_cut_tensor_of_several_families_is_shared_part_by_part():
    layout = Layout((2,), (Shard(0),))
    name = layout_name(layout, 0)
    meshes = {0: (0, 1), 1: (0, 1), 2: (2, 3), 3: (2, 3)}
    own = {"a": [(4,), (6,)], "b": [(4,)]}  # both have the first one
    reported = {
        rank: Report(letter, len(own[letter]), {name: cut(layout, meshes[rank], rank, *own[letter])})
        for rank, letter in enumerate("aabb")
    }
    [given] = contributions(declared(PER_RANK, names="global"), reported, TOPOLOGY)
    tables = {
        0: [row("tied", T, "float32", [4], name), row("w", T, "float32", [6], name)],
        2: [row("tied", T, "float32", [4], name)],
    }
    entry = entry_of_several(given, tables)
    assert entry.num_items == 2
    assert [(one.holders, one.names, one.num_items, one.num_bytes, one.num_sets) for one in entry.portions] == [
        ((0,), None, 1, 12, 1),
        ((1,), None, 1, 12, 1),
        ((0, 2), ("tied",), 1, 8, 2),
        ((1, 3), ("tied",), 1, 8, 2),
    ]


@pytest.mark.parametrize(
    ("component", "problem"),
    [
        (declared(PER_RANK), "outside the set 'rank=0', whose state is stored by itself; declare names='global'"),
        (declared(GLOBAL), "outside the set 'all', whose state is stored by itself; declare REPLICATED"),
        (declared(PER_GROUP, "dp"), "outside the set 'dp=0', whose state is stored by itself; declare names='global'"),
    ],
)
def test_a_mesh_that_reaches_outside_its_set_is_refused(component, problem):
    reported = {rank: Report("a", 1, {"cut": cut(FSDP, (0, 1, 2, 3), rank, (4,))}) for rank in range(4)}
    with pytest.raises(StructureError) as caught:
        [entry_of_one(one) for one in contributions(component, reported, TOPOLOGY)]
    assert problem in caught.value.message


def test_ranks_of_one_mesh_may_hold_different_items_besides():
    layout = Layout((2,), (Shard(0),))
    name = layout_name(layout, 0)
    reported = {
        rank: Report(letter, 2, {WHOLE: Held(None, (), 1, 0), name: cut(layout, (0, 1), rank, (4,))})
        for rank, letter in enumerate("ab")
    }
    [given] = contributions(declared(PER_RANK, names="global"), reported, TOPOLOGY)
    tables = {rank: [row("w", T, "float32", [4], name), row(f"own {rank}", V)] for rank in range(2)}
    entry = entry_of_several(given, tables)
    assert entry.num_items == 3
    assert [(one.holders, one.names, one.num_items, one.num_bytes) for one in entry.portions] == [
        ((0,), None, 1, 0),
        ((1,), None, 1, 0),
        ((0,), ("w",), 1, 8),
        ((1,), ("w",), 1, 8),
    ]


@pytest.mark.parametrize("ranks", [(0,), (0, 1, 2, 3), (3, 2, 1, 0), (1, 3, 5, 7), (0, 1, 4, 5), (5, 5), ()])
def test_the_ranks_of_a_mesh_survive_json(ranks):
    one = Held(Layout((len(ranks),), (Shard(0),)), ranks, 1, 8)
    assert Held.from_json(strict_json.loads(strict_json.dumps(one.to_json()), what="message", max_bytes=10**6)) == one


def test_a_mesh_of_which_a_rank_holds_nothing_is_refused():
    reported = {rank: Report("a", 1, {"cut": cut(FSDP, (0, 1, 2, 3), rank, (4,))}) for rank in range(3)}
    [given] = contributions(declared(PER_RANK, names="global"), reported, TOPOLOGY)
    with pytest.raises(StructureError, match=r"of which rank\(s\) 3 do not hold the same items; every rank of a mesh must"):
        entry_of_one(given)


@pytest.mark.parametrize(
    ("one", "other", "shown"),
    [
        (
            row("w", T, "float32", [2]),
            row("w", T, "float32", [3]),
            "is a tensor float32 [2] on rank 0 and a tensor float32 [3]",
        ),
        (row("w", T, "float32", [2]), row("w", T, "bfloat16", [2]), "a tensor bfloat16 [2] on rank 1"),
        (row("w"), row("w", V), "a value on rank 1"),
    ],
)
def test_one_name_with_two_meanings_names_both_ranks(one, other, shown):
    with pytest.raises(StructureError) as caught:
        merged([row("a"), one], [other])
    assert "'w' is" in caught.value.message
    assert shown in caught.value.message
    assert (caught.value.rank, caught.value.component) == (1, "c")


@pytest.mark.parametrize(
    ("tables", "rank", "shown"),
    [
        ({0: [row("a")], 2: [row("a"), row("b")]}, 2, "'b' is absent on rank 0 and a tensor float32 [1] on rank 2"),
        ({0: [row("a"), row("b")], 2: [row("b")]}, 2, "'a' is a tensor float32 [1] on rank 0 and absent on rank 2"),
        (
            {1: [row("a", T, "int8", [2, 3])], 3: [row("a", T, "int8", [3, 2])]},
            3,
            "'a' is a tensor int8 [2, 3] on rank 1 and a tensor int8 [3, 2] on rank 3",
        ),
        ({0: [row("a")], 1: [row("a")], 3: [row("a", V)]}, 3, "and a value on rank 3"),
    ],
)
def test_the_first_item_that_differs_is_named_with_both_ranks(tables, rank, shown):
    error = first_difference("c", tables)
    assert isinstance(error, StructureError)
    assert shown in error.message
    assert (error.rank, error.component) == (rank, "c")


def test_portions_and_reports_survive_json():
    def over_the_wire(data):
        return strict_json.loads(strict_json.dumps(data), what="message", max_bytes=10**6)

    for one in (portion("all", 0, 2), Portion("c", "rank=1", (1,), 3, 2**40, ("a", "b/~i0"), 2, layouts=("x",))):
        assert Portion.from_json(over_the_wire(one.to_json())) == one
    for one in (
        report("ab", 1, 2),
        Report(problem="it broke"),
        Report("a", 1, {"cut": cut(HSDP, (0, 1, 2, 3), 1, (4,))}),
    ):
        assert Report.from_json(over_the_wire(one.to_json())) == one
