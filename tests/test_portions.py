"""What the ranks agree to store, from what each of them holds."""

import pytest

from forgather_ckpt import strict_json
from forgather_ckpt.errors import StructureError
from forgather_ckpt.patterns import TRAITS, SharingPattern
from forgather_ckpt.portions import (
    Declared,
    Portion,
    Report,
    base_portions,
    differing_sets,
    first_difference,
    first_problem,
    merge_tables,
)
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
    return {rank: Report(letter, 2, 10 * rank) for rank, letter in enumerate(structures) if letter != "-"}


def portion(entry: str, *holders: int) -> Portion:
    return Portion("c", entry, holders, 2, 10 * holders[0])


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
        (declared(PER_RANK, names="global"), "ab-d", [portion("all", 0), portion("all", 1), portion("all", 3)]),
        (declared(PER_NODE), "aaab", [portion("node=0", 0), portion("node=1", 3)]),
        (declared(PER_NODE), "-aab", [portion("node=1", 3)]),
        (declared(PER_GROUP, "dp"), "abab", [portion("dp=0", 0, 2), portion("dp=1", 1, 3)]),
        (declared(PER_GROUP, "dp"), "-a-a", [portion("dp=1", 1, 3)]),
        (declared(PER_GROUP, "dp", names="global"), "abab", [portion("all", 0, 2), portion("all", 1, 3)]),
        (declared(PER_GROUP, "some"), "aa--", [portion("some=0", 0, 1)]),
    ],
)
def test_one_portion_a_set(component, structures, expected):
    assert base_portions(component, reports(structures), TOPOLOGY) == expected


@pytest.mark.parametrize(
    ("component", "structures", "rank", "problem"),
    [
        (declared(GLOBAL), "-aaa", 0, "rank 0 holds nothing (stateful=None), and its state counts"),
        (declared(GLOBAL), "----", 0, "rank 0 holds nothing"),
        (declared(REPLICATED), "a-aa", 1, "ranks 1 hold nothing (stateful=None), but 0, 2-3 of the same set do"),
        (declared(REPLICATED), "a---", 1, "ranks 1-3 hold nothing"),
        (declared(PER_GROUP, "dp"), "ab-b", 2, "ranks 2 hold nothing (stateful=None), but 0 of the same set do"),
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
        base_portions(component, reports(structures), TOPOLOGY)
    assert problem in caught.value.message
    assert (caught.value.rank, caught.value.component) == (rank, "c")


@pytest.mark.parametrize(
    ("component", "structures", "expected"),
    [
        (declared(REPLICATED), "aaaa", []),
        (declared(REPLICATED), "aaba", [(0, 2)]),
        (declared(REPLICATED), "bcab", [(0, 1, 2)]),
        (declared(REPLICATED), "-aab", [(1, 3)]),
        (declared(PER_GROUP, "dp"), "abab", []),
        (declared(PER_GROUP, "dp"), "abac", [(1, 3)]),
        (declared(PER_GROUP, "dp"), "abcd", [(0, 2)]),
        (declared(GLOBAL), "abcd", []),
        (declared(PER_RANK), "abcd", []),
        (declared(PER_NODE), "abcd", []),
    ],
)
def test_structures_must_be_equal_inside_compared_sets_only(component, structures, expected):
    assert differing_sets(component, reports(structures), TOPOLOGY) == expected


def test_problems_are_told_with_their_ranks():
    found = {
        0: Report("a", 1, 1),
        1: Report(problem="it broke"),
        2: Report(problem="other"),
        3: Report(problem="it broke"),
    }
    assert first_problem(declared(REPLICATED), found) == "on ranks 1, 3: it broke; on ranks 2: other"
    assert first_problem(declared(REPLICATED), reports("aa-a")) is None


# ---- global names

T, V = "tensor", "value"


def row(name: str, kind: str = T, *details: object, num_bytes: int = 4) -> list[object]:
    return [name, kind, *(details or (("float32", [1]) if kind == T else ())), num_bytes]


STAGES = [Portion("c", "all", (0, 2), 2, 8), Portion("c", "all", (1, 3), 2, 8)]


def test_names_of_one_set_stay_with_it():
    tables = {0: [row("a"), row("b", V, num_bytes=0)], 1: [row("c"), row("d", num_bytes=6)]}
    assert merge_tables(STAGES, tables) == [Portion("c", "all", (0, 2), 2, 4), Portion("c", "all", (1, 3), 2, 10)]


def test_a_name_of_several_sets_is_one_item_that_all_of_them_hold():
    tables = {0: [row("embedding", num_bytes=100), row("a")], 1: [row("b"), row("embedding", num_bytes=100)]}
    assert merge_tables(STAGES, tables) == [
        Portion("c", "all", (0, 2), 1, 4),
        Portion("c", "all", (1, 3), 1, 4),
        Portion("c", "all", (0, 1, 2, 3), 1, 100, ("embedding",), 2),
    ]


def test_sets_that_share_everything_have_no_portion_of_their_own():
    tables = {0: [row("a"), row("b")], 1: [row("a"), row("b")]}
    assert merge_tables(STAGES, tables) == [Portion("c", "all", (0, 1, 2, 3), 2, 8, ("a", "b"), 2)]


def test_a_portion_for_every_combination_of_sets():
    bases = [Portion("c", "all", (rank,), 3, 12) for rank in range(3)]
    tables = {0: [row("all"), row("01"), row("0")], 1: [row("all"), row("01"), row("12")], 2: [row("all"), row("12")]}
    merged = merge_tables(bases, tables)
    assert {(one.holders, one.names, one.num_sets) for one in merged} == {
        ((0,), None, 1),
        ((0, 1, 2), ("all",), 3),
        ((0, 1), ("01",), 2),
        ((1, 2), ("12",), 2),
    }
    assert sum(one.num_bytes for one in merged) == 16


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
        (
            row("w", "alias", "x"),
            row("w", "alias", "y"),
            "is the same tensor as 'x' on rank 0 and the same tensor as 'y' on rank 1",
        ),
    ],
)
def test_one_name_with_two_meanings_names_both_ranks(one, other, shown):
    with pytest.raises(StructureError) as caught:
        merge_tables(STAGES, {0: [row("a"), one], 1: [other]})
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

    for one in (*STAGES, Portion("c", "rank=1", (1,), 3, 2**40, ("a", "b/~i0"), 2)):
        assert Portion.from_json(over_the_wire(one.to_json())) == one
    for report in (Report("ab", 1, 2), Report(problem="it broke")):
        assert Report(*over_the_wire(report.to_json())) == report
