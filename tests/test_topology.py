"""Where the ranks are, and the sets that each sharing pattern makes of them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forgather_ckpt import strict_json
from forgather_ckpt.errors import DeclarationError
from forgather_ckpt.patterns import SharingPattern
from forgather_ckpt.topology import Group, RankSet, Topology, same_place, sets_of

GLOBAL, PER_RANK, REPLICATED, PER_GROUP, PER_NODE = (
    SharingPattern.GLOBAL, SharingPattern.PER_RANK, SharingPattern.REPLICATED, SharingPattern.PER_GROUP,
    SharingPattern.PER_NODE,
)  # fmt: skip

UNEVEN = Topology(
    rank=2,
    world_size=6,
    nodes=((0, 1, 2), (3,), (4, 5)),
    groups={
        "dp": Group(((0, 3, 4), (1, 5))),
        "mesh": Group(((0, 1), (2, 3), (4, 5)), ((("pp", 0, 3),), (("pp", 1, 3),), (("pp", 2, 3),))),
        "alone": Group(((0, 1, 2, 3, 4, 5),), ((),)),
        "deep": Group(((0, 1), (4, 5)), ((("pp", 0, 2), ("tp", 1, 3)), (("pp", 1, 2), ("tp", 0, 3)))),
    },
)
ALL = RankSet("all", (0, 1, 2, 3, 4, 5))


@pytest.mark.parametrize(
    ("pattern", "group", "sets"),
    [
        (GLOBAL, None, [ALL]),
        (REPLICATED, None, [ALL]),
        (PER_RANK, None, [RankSet(f"rank={rank}", (rank,)) for rank in range(6)]),
        (PER_NODE, None, [RankSet("node=0", (0, 1, 2)), RankSet("node=1", (3,)), RankSet("node=2", (4, 5))]),
        (PER_GROUP, "dp", [RankSet("dp=0", (0, 3, 4)), RankSet("dp=1", (1, 5))]),
        (
            PER_GROUP,
            "mesh",
            [
                RankSet("pp=0/3", (0, 1), (("pp", 0, 3),)),
                RankSet("pp=1/3", (2, 3), (("pp", 1, 3),)),
                RankSet("pp=2/3", (4, 5), (("pp", 2, 3),)),
            ],
        ),
        (PER_GROUP, "alone", [RankSet("alone=0", (0, 1, 2, 3, 4, 5), ())]),
        (
            PER_GROUP,
            "deep",
            [
                RankSet("pp=0/2,tp=1/3", (0, 1), (("pp", 0, 2), ("tp", 1, 3))),
                RankSet("pp=1/2,tp=0/3", (4, 5), (("pp", 1, 2), ("tp", 0, 3))),
            ],
        ),
    ],
)
def test_sets(pattern, group, sets):
    assert sets_of(pattern, group, UNEVEN) == tuple(sets)


@pytest.mark.parametrize("pattern", SharingPattern)
def test_a_process_alone_is_one_set(pattern):
    topology = Topology(0, 1, ((0,),), groups={"dp": Group(((0,),))})
    assert [one.ranks for one in sets_of(pattern, "dp" if pattern is PER_GROUP else None, topology)] == [(0,)]


@pytest.mark.parametrize("pattern", [GLOBAL, REPLICATED, PER_RANK, PER_NODE])
@given(sizes=st.lists(st.integers(1, 4), min_size=1, max_size=6))
def test_these_patterns_are_partitions_of_all_ranks(pattern, sizes):
    nodes, start = [], 0
    for size in sizes:
        nodes.append(tuple(range(start, start + size)))
        start += size
    sets = sets_of(pattern, None, Topology(0, start, tuple(nodes)))
    assert sorted(rank for one in sets for rank in one.ranks) == list(range(start))
    assert len({one.id for one in sets}) == len(sets)


@pytest.mark.parametrize("name", [None, "pp"])
def test_a_group_that_nobody_gave_is_refused_with_the_known_ones(name):
    with pytest.raises(
        DeclarationError, match=r"no process group .*; known groups: alone, deep, dp, mesh\. Return it from"
    ):
        sets_of(PER_GROUP, name, UNEVEN)
    with pytest.raises(DeclarationError, match="known groups: none"):
        sets_of(PER_GROUP, "dp", Topology.single())


@pytest.mark.parametrize(
    ("saved", "now", "is_same"),
    [
        ((), (), True),
        ((("pp", 1, 2),), (("pp", 1, 2),), True),
        ((("pp", 1, 2),), (("pp", 0, 2),), False),
        ((("pp", 1, 2),), (("pp", 1, 4),), False),
        ((("pp", 0, 2),), (("tp", 0, 2),), False),
        ((("pp", 1, 2), ("tp", 0, 3)), (("tp", 0, 3), ("pp", 1, 2)), True),
        ((("pp", 1, 2), ("tp", 0, 1)), (("pp", 1, 2),), True),
        ((("pp", 0, 1),), (), True),
        ((("pp", 0, 2),), (), False),
        ((("pp", 1, 2),), (("pp", 1, 2), ("tp", 0, 2)), False),
    ],
)
def test_a_place_is_found_again_where_all_axes_that_tell_are_equal(saved, now, is_same):
    assert same_place(saved, now) == is_same
    assert same_place(now, saved) == is_same


def test_it_survives_json():
    data = strict_json.loads(strict_json.dumps(UNEVEN.to_json()), what="topology", max_bytes=10**6)
    assert Topology.from_json(data, rank=2) == UNEVEN


def test_a_rank_knows_its_node():
    assert [Topology(rank, 6, UNEVEN.nodes).node for rank in range(6)] == [0, 0, 0, 1, 2, 2]
    assert Topology.single().node == 0
