"""Which stored entry a rank's component is loaded from, or what keeps it from being found."""

import pytest

from forgather_ckpt import SharingPattern, StateComponent
from forgather_ckpt.entries import Resize, check_pattern, entry_for
from forgather_ckpt.errors import LoadMismatch
from forgather_ckpt.manifest import ComponentRecord, EntryRecord
from forgather_ckpt.topology import Group, Topology, sets_of

GLOBAL, PER_RANK, REPLICATED, PER_GROUP, PER_NODE = (
    SharingPattern.GLOBAL, SharingPattern.PER_RANK, SharingPattern.REPLICATED, SharingPattern.PER_GROUP,
    SharingPattern.PER_NODE,
)  # fmt: skip


def component(pattern, names=None) -> StateComponent:
    group = "dp" if pattern is PER_GROUP else None
    return StateComponent("c", None, pattern, process_group_name=group, names=names)


def topology(*node_sizes: int, rank: int = 0, dp: Group | None = None) -> Topology:
    nodes, start = [], 0
    for size in node_sizes:
        nodes.append(tuple(range(start, start + size)))
        start += size
    return Topology(rank, start, tuple(nodes), groups={} if dp is None else {"dp": dp})


def stored(one: StateComponent, old: Topology, *, without: tuple[str, ...] = ()) -> ComponentRecord:
    """The record of a component that was saved under `old`."""
    if one.is_global:
        entries = {"all": tuple(range(old.world_size))} if "all" not in without else {}
        coordinates: dict = {}
    else:
        sets = sets_of(one.sharing_pattern, one.process_group_name, old)
        entries = {each.id: each.ranks for each in sets if each.id not in without}
        coordinates = {each.id: each.coordinates for each in sets}
    return ComponentRecord(
        pattern=one.sharing_pattern,
        names=one.names,
        required=True,
        group=one.process_group_name,
        entries={
            name: EntryRecord(ranks, coordinates.get(name), ranks[:1], 1, 1, "0" * 32)
            for name, ranks in entries.items()
        },
        digest="0" * 32,
    )


def find(one: StateComponent, old: Topology, new: Topology, **kwargs):
    return entry_for(one, stored(one, old, **kwargs), old, new)


@pytest.mark.parametrize("one", [component(GLOBAL), component(REPLICATED), component(PER_RANK, "global")])
def test_global_names_are_found_from_any_layout(one):
    for old, new in [(topology(4), topology(1)), (topology(1), topology(2, 2, rank=3)), (topology(4), topology(4))]:
        assert find(one, old, new) == "all"


BARE = Group(((0, 2), (1, 3)))
MESH = Group(((0, 1), (2, 3)), ((("pp", 0, 2),), (("pp", 1, 2),)))
WIDER = Group(((0, 1, 2, 3), (4, 5, 6, 7)), ((("pp", 0, 2),), (("pp", 1, 2),)))
WITH_TP = Group(((0, 1), (2, 3)), ((("pp", 0, 2), ("tp", 0, 1)), (("pp", 1, 2), ("tp", 0, 1))))
DEEPER = Group(((0,), (1,), (2,), (3,)), tuple((("pp", stage, 4),) for stage in range(4)))


@pytest.mark.parametrize(
    ("one", "old", "new", "expected"),
    [
        (component(PER_RANK), topology(2, 2), topology(4, rank=3), "rank=3"),
        (component(PER_RANK), topology(4), topology(2), Resize("it was saved by 4 ranks, now there are 2")),
        (component(PER_RANK), topology(2), topology(4, rank=1), Resize("it was saved by 2 ranks, now there are 4")),
        (component(PER_NODE), topology(2, 2), topology(4, 1, rank=4), "node=1"),
        (component(PER_NODE), topology(2, 2), topology(4), Resize("it was saved on 2 nodes, now there are 1")),
        (component(PER_GROUP), topology(4, dp=BARE), topology(2, 2, rank=3, dp=BARE), "dp=1"),
        (
            component(PER_GROUP),
            topology(4, dp=BARE),
            topology(4, dp=Group(((0, 1), (2, 3)))),
            Resize("no saved group is 'dp=0' (ranks 0-1); saved: dp=0 (ranks 0, 2); dp=1 (ranks 1, 3)"),
        ),
        (component(PER_GROUP), topology(4, dp=MESH), topology(4, rank=2, dp=MESH), "pp=1/2"),
        (component(PER_GROUP), topology(4, dp=MESH), topology(8, rank=2, dp=WIDER), "pp=0/2"),
        (component(PER_GROUP), topology(8, dp=WIDER), topology(4, rank=3, dp=MESH), "pp=1/2"),
        (component(PER_GROUP), topology(4, dp=WITH_TP), topology(4, rank=3, dp=MESH), "pp=1/2,tp=0/1"),
        (
            component(PER_GROUP),
            topology(4, dp=MESH),
            topology(4, rank=1, dp=DEEPER),
            Resize("no saved group is 'pp=1/4' (ranks 1); saved: pp=0/2 (ranks 0-1); pp=1/2 (ranks 2-3)"),
        ),
        (component(PER_GROUP), topology(4, dp=MESH), topology(4, rank=1, dp=Group(((0, 1), (2, 3)))), "pp=0/2"),
    ],
)
def test_local_names_belong_to_their_set(one, old, new, expected):
    assert find(one, old, new) == expected


@pytest.mark.parametrize(
    ("one", "old", "new", "missing"),
    [
        (component(PER_RANK), topology(4), topology(4, rank=2), "rank=2"),
        (component(PER_NODE), topology(2, 2), topology(2, 2, rank=3), "node=1"),
        (component(REPLICATED), topology(2), topology(2), "all"),
        (component(PER_RANK, "global"), topology(2), topology(4, rank=1), "all"),
    ],
)
def test_a_set_that_held_nothing_has_nothing_to_load(one, old, new, missing):
    with pytest.raises(
        LoadMismatch, match=f"the checkpoint has no state for '{missing}' .*; declare stateful=None there"
    ):
        find(one, old, new, without=(missing,))


def test_a_rank_outside_all_groups_must_hold_nothing():
    new = topology(4, rank=3, dp=Group(((0, 1),)))
    with pytest.raises(LoadMismatch, match="rank 3 is in no group 'dp', but holds state; declare stateful=None there"):
        find(component(PER_GROUP), topology(4, dp=BARE), new)


ALL = [
    component(GLOBAL), component(REPLICATED), component(PER_RANK), component(PER_NODE), component(PER_GROUP),
    component(PER_RANK, "global"), component(PER_NODE, "global"), component(PER_GROUP, "global"),
]  # fmt: skip


@pytest.mark.parametrize("now", ALL, ids=lambda one: f"{one.sharing_pattern}-{one.names}")
@pytest.mark.parametrize("then", ALL, ids=lambda one: f"{one.sharing_pattern}-{one.names}")
def test_b34_a_changed_pattern_is_an_error_unless_names_are_global(then, now):
    record = stored(then, topology(4, dp=BARE))
    if then.names == now.names and (now.is_global or then.sharing_pattern is now.sharing_pattern):
        check_pattern(now, record)
        return
    with pytest.raises(LoadMismatch) as caught:
        check_pattern(now, record)
    assert f"was saved as {then.sharing_pattern.name} with {then.names} names" in caught.value.message
    assert f"is declared {now.sharing_pattern.name} with {now.names} names now" in caught.value.message
    assert caught.value.component == "c"
