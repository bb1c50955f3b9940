"""Data loading: who gets which samples, and that any place is found again."""

import random
from collections import namedtuple
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import IterableDataset

from forgather_ckpt.data import (
    DispatchingLoader,
    GlobalPosition,
    SeededItems,
    ShardedBatches,
    StatefulLoader,
    in_groups,
    item_generator,
    merge_positions,
)
from forgather_ckpt.data.sampler import epoch_order
from forgather_ckpt.errors import LoadMismatch
from forgather_ckpt.topology import Topology
from tests.ranks import errors, run_ranks, values

# More workers than cores is no mistake here.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


class Ids:
    """Its items are their own ids."""

    def __init__(self, num_samples: int) -> None:
        self.num_samples = num_samples

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> int:
        return index


class Noise(Ids):
    """Its items are drawn from the global generators, as careless augmentation does."""

    def __getitem__(self, index: int) -> tuple[int, float, float, float]:
        return index, random.random(), float(np.random.rand()), torch.rand(()).item()


positions = st.builds(
    lambda num_samples, seed, shuffle, epoch, consumed: GlobalPosition(
        num_samples, seed, shuffle, epoch, min(consumed, num_samples)
    ),
    st.integers(0, 60),
    st.integers(0, 3),
    st.booleans(),
    st.integers(0, 3),
    st.integers(0, 60),
)
sizes = st.integers(1, 7)


def batches_of_ranks(position: GlobalPosition, batch_size: int, world_size: int, drop_last: bool) -> list[Any]:
    """For each rank the list of its batches."""
    return [
        list(ShardedBatches(position, batch_size, rank=rank, world_size=world_size, drop_last=drop_last))
        for rank in range(world_size)
    ]


def in_order_of_reading(ranks: list[list[list[int]]]) -> list[int]:
    """All samples that the ranks got, step by step."""
    return [sample for step in zip(*ranks, strict=True) for batch in step for sample in batch]


def taken(loader: StatefulLoader, count: int | None = None) -> list[list[int]]:
    """The ids of the next `count` batches, or of the rest of the epoch."""
    batches: Iterator[Any] = iter(loader)
    if count is None:
        return [batch.tolist() for batch in batches]
    return [next(batches).tolist() for _ in range(count)]


# ---- the sampler


@given(positions, sizes, sizes)
def test_ranks_share_each_global_batch_in_the_order_of_the_epoch(position, batch_size, world_size):
    order = epoch_order(position).tolist()[position.samples :]
    ranks = batches_of_ranks(position, batch_size, world_size, drop_last=True)
    assert all(len(batch) == batch_size for batches in ranks for batch in batches)
    assert in_order_of_reading(ranks) == order[: len(order) // (batch_size * world_size) * batch_size * world_size]


@given(positions, sizes, sizes)
def test_without_drop_last_no_sample_is_left_out_and_no_rank_ends_early(position, batch_size, world_size):
    order = epoch_order(position).tolist()[position.samples :]
    ranks = batches_of_ranks(position, batch_size, world_size, drop_last=False)
    assert len({len(batches) for batches in ranks}) == 1
    assert all(batch for batches in ranks for batch in batches)
    read = in_order_of_reading(ranks)
    rest = len(order) % (batch_size * world_size)
    if 0 < rest < world_size:
        assert sorted(set(read)) == sorted(order)
        assert len(read) == len(order) - rest + world_size
    else:
        assert read == order


@given(positions, sizes, sizes, st.data())
def test_any_place_continues_with_the_same_batches(position, batch_size, world_size, data):
    whole = batches_of_ranks(position, batch_size, world_size, drop_last=True)
    split = data.draw(st.integers(0, len(whole[0])))
    resumed = batches_of_ranks(position.advanced_by(split * batch_size * world_size), batch_size, world_size, True)
    assert resumed == [batches[split:] for batches in whole]


@given(positions, st.lists(st.tuples(sizes, sizes, st.integers(0, 4)), min_size=1, max_size=4))
def test_other_world_and_batch_sizes_on_the_way_neither_repeat_nor_skip(position, lives):
    order, read = epoch_order(position).tolist(), []
    start = position.samples
    for batch_size, world_size, num_steps in lives:
        ranks = batches_of_ranks(position, batch_size, world_size, drop_last=True)
        samples = in_order_of_reading([batches[:num_steps] for batches in ranks])
        read += samples
        position = position.advanced_by(len(samples))
    assert read == order[start : start + len(read)]


def test_every_epoch_and_seed_has_an_order_of_its_own():
    orders = [
        tuple(epoch_order(GlobalPosition(50, seed, epoch=epoch)).tolist()) for seed in range(3) for epoch in range(3)
    ]
    assert len(set(orders)) == 9
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert epoch_order(GlobalPosition(5, shuffle=False, epoch=3)).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"batch_size": 2, "rank": 2, "world_size": 2}, "no rank 2 among 2"),
        ({"batch_size": 2, "world_size": 0}, "among 0 ranks"),
    ],
)
def test_impossible_shares_are_refused(options, problem):
    with pytest.raises(ValueError, match=problem):
        StatefulLoader(Ids(10), **options)


# ---- the loader


def test_a_loader_goes_from_epoch_to_epoch():
    loader = StatefulLoader(Ids(10), 3)
    assert (len(loader), loader.batches_per_epoch) == (3, 3)
    first, second = taken(loader), taken(loader)
    assert len(first) == len(second) == 3 and first != second
    assert loader.position == GlobalPosition(10, epoch=2, total_samples=18)


def test_the_length_is_what_is_left():
    loader = StatefulLoader(Ids(10), 3)
    lengths = [len(loader) for _ in loader]
    assert lengths == [2, 1, 0]
    assert len(loader) == 3


@pytest.mark.parametrize("num_workers", [0, 2, 4])
@pytest.mark.parametrize("rank", [0, 1])
def test_the_position_counts_what_was_taken_and_not_what_workers_read_ahead(num_workers, rank):
    def loader() -> StatefulLoader:
        return StatefulLoader(Ids(60), 3, rank=rank, world_size=2, num_workers=num_workers)

    undisturbed = loader()
    expected = taken(undisturbed) + taken(undisturbed)
    first = loader()
    before = taken(first, 3)
    state = first.state_dict()
    assert state["samples"] == 3 * 3 * 2
    resumed = loader()
    resumed.load_state_dict(state)
    assert before + taken(resumed) + taken(resumed) == expected


def test_the_state_after_the_last_batch_begins_the_next_epoch():
    loader = StatefulLoader(Ids(9), 3)
    taken(loader, 3)
    resumed = StatefulLoader(Ids(9), 3)
    resumed.load_state_dict(loader.state_dict())
    assert taken(resumed) == []
    undisturbed = StatefulLoader(Ids(9), 3)
    taken(undisturbed)
    assert taken(resumed) == taken(undisturbed)


def test_the_saved_seed_is_kept():
    loader = StatefulLoader(Ids(9), 3, seed=7)
    taken(loader, 1)
    resumed = StatefulLoader(Ids(9), 3, seed=8)
    resumed.load_state_dict(loader.state_dict())
    assert taken(resumed) == taken(StatefulLoader(Ids(9), 3, seed=7))[1:]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_having_a_loader_changes_no_draw_of_the_training(num_workers):
    def draws() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), torch.rand(()).item()

    def seed() -> None:
        random.seed(1), np.random.seed(1), torch.manual_seed(1)

    seed()
    expected = [draws() for _ in range(4)]
    loader = StatefulLoader(SeededItems(Noise(12)), 4, num_workers=num_workers)
    seed()
    assert [draws() for _ in loader] + [draws()] == expected


@pytest.mark.parametrize("num_workers", [0, 2])
def test_seeded_items_are_the_same_after_a_resume_with_any_number_of_workers(num_workers):
    def items(loader: StatefulLoader) -> list[Any]:
        return [torch.stack(batch, 1).tolist() for batch in loader]

    undisturbed = StatefulLoader(SeededItems(Noise(12), seed=5), 4)
    first, second = items(undisturbed), items(undisturbed)
    resumed = StatefulLoader(SeededItems(Noise(12), seed=5), 4, num_workers=num_workers)
    resumed.load_state_dict(GlobalPosition(12, samples=4).state_dict())
    assert items(resumed) + items(resumed) == first[1:] + second
    of_first, of_second = ({item[0]: item[1:] for batch in epoch for item in batch} for epoch in (first, second))
    assert all(of_first[index] != of_second[index] for index in of_first)


def test_an_item_generator_depends_on_seed_epoch_and_index_alone():
    def draw(*parts: int) -> float:
        return torch.rand((), generator=item_generator(*parts)).item()

    places = [(seed, epoch, index) for seed in range(3) for epoch in range(3) for index in range(3)]
    assert len({draw(*place) for place in places}) == len(places)
    assert draw(1, 2, 3) == draw(1, 2, 3)


@pytest.mark.parametrize(
    ("state", "problem"),
    [
        (GlobalPosition(11).state_dict(), "11 samples, this one has 10"),
        (GlobalPosition(10, shuffle=False).state_dict(), "shuffle=False, this job has shuffle=True"),
        (GlobalPosition(10).state_dict() | {"samples": 11}, "no epoch 0, sample 11 in a dataset of 10"),
        ({"_sampler_iter_yielded": 2}, "no saved data position: 'num_samples' is missing"),
    ],
)
def test_a_position_of_another_sequence_is_refused(state, problem):
    loader = StatefulLoader(Ids(10), 3)
    taken(loader, 1)
    before = loader.position
    with pytest.raises(LoadMismatch, match=problem):
        loader.load_state_dict(state)
    assert loader.position == before


def test_one_position_cannot_serve_two_iterators():
    loader = StatefulLoader(Ids(10), 3)
    first, second = iter(loader), iter(loader)
    next(first), next(second)
    with pytest.raises(RuntimeError, match="two iterators"):
        next(first)


@pytest.mark.parametrize("num_taken", [1, 3])
def test_an_iterator_does_not_outlive_a_load(num_taken):
    loader = StatefulLoader(Ids(10), 3)
    batches = iter(loader)
    for _ in range(num_taken):
        next(batches)
    loader.load_state_dict(GlobalPosition(10, epoch=1).state_dict())
    with pytest.raises(RuntimeError, match="a state was loaded"):
        next(batches)
    assert loader.position == GlobalPosition(10, epoch=1)


def test_a_stream_is_refused():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(range(3))

    with pytest.raises(TypeError, match="Stream must have __len__ and __getitem__"):
        StatefulLoader(Stream(), 3)


def test_groups_stop_at_the_epoch_and_leave_the_position_behind_them():
    loader = StatefulLoader(Ids(20), 4)
    seen = [(len(group), loader.position.samples) for group in in_groups(loader, 2)]
    assert seen == [(2, 8), (2, 16), (1, 20)]
    assert loader.position == GlobalPosition(20, epoch=1, total_samples=20)


# ---- another world size


def worlds(old: int, new: int) -> tuple[Topology, Topology]:
    return (
        Topology(rank=0, world_size=old, nodes=(tuple(range(old)),)),
        Topology(rank=0, world_size=new, nodes=(tuple(range(new)),)),
    )


@pytest.mark.parametrize(("old", "new"), [(4, 2), (2, 4), (3, 1)])
def test_merged_positions_go_on_with_the_next_sample(old, new):
    loaders = [StatefulLoader(Ids(48), 2, rank=rank, world_size=old) for rank in range(old)]
    before = [taken(loader, 3) for loader in loaders]
    state = merge_positions([loader.state_dict() for loader in loaders], *worlds(old, new))
    after = []
    for rank in range(new):
        loader = StatefulLoader(Ids(48), 2, rank=rank, world_size=new)
        loader.load_state_dict(state)
        after.append(taken(loader))
    read = in_order_of_reading(before) + in_order_of_reading(after)
    assert read == epoch_order(GlobalPosition(48)).tolist()[: len(read)]
    assert len(read) > 48 - 2 * new


def test_positions_that_disagree_are_not_merged():
    states = [GlobalPosition(10, samples=samples).state_dict() for samples in (4, 4, 6)]
    with pytest.raises(LoadMismatch, match=r"entry 0 of 3 says .*'samples': 4.*entry 2 says .*'samples': 6"):
        merge_positions(states, *worlds(3, 2))
    with pytest.raises(LoadMismatch, match="no data position"):
        merge_positions([], *worlds(3, 2))


# ---- one rank reads for all


@pytest.mark.multiprocess
@pytest.mark.parametrize("num_workers", [0, 2])
def test_dispatched_ranks_get_what_they_would_have_read(num_workers):
    def case(rank: int, world_size: int) -> list[Any]:
        loader = DispatchingLoader(Ids(41) if rank == 0 else None, 3, seed=3, num_workers=num_workers)
        first = taken(loader, 2)
        resumed = DispatchingLoader(Ids(41) if rank == 0 else None, 3, seed=3, num_workers=num_workers)
        resumed.load_state_dict(loader.state_dict())
        lengths = len(loader), len(resumed)
        return [first + taken(resumed) + taken(resumed), lengths, resumed.position]

    outcomes = values(run_ranks(3, case))
    for rank, (batches, lengths, position) in enumerate(outcomes):
        sharded = StatefulLoader(Ids(41), 3, seed=3, rank=rank, world_size=3)
        assert batches == taken(sharded) + taken(sharded)
        assert lengths == (2, 2)
        assert position == sharded.position


Pair = namedtuple("Pair", ["left", "right"])


@pytest.mark.multiprocess
@pytest.mark.parametrize("backend", ["gloo", "cuda:gloo"], ids=["gloo", "no CPU backend"])
def test_batches_of_any_make_arrive_as_they_were(backend):
    def collate(items: list[int]) -> Any:
        first = items[0]
        return {
            "text": [f"sample {item}" for item in items],
            "of its own length": torch.arange(first),
            "pair": Pair(torch.tensor(items).t(), (None, torch.full((2, 3), first, dtype=torch.bfloat16))),
            "mask": torch.tensor([item > 2 for item in items]),
            "empty": torch.empty(0, 4),
            "scalar": torch.tensor(1.5, dtype=torch.float64),
            "strided": torch.arange(12).reshape(3, 4)[:, ::2],
        }

    def case(rank: int, world_size: int) -> list[str]:
        return [repr(batch) for batch in DispatchingLoader(Ids(12), 2, shuffle=False, collate_fn=collate)]

    outcomes = values(run_ranks(2, case, backend=backend))
    for rank, batches in enumerate(outcomes):
        own = StatefulLoader(Ids(12), 2, shuffle=False, rank=rank, world_size=2, collate_fn=collate)
        assert batches == [repr(batch) for batch in own]


class Broken(Ids):
    def __getitem__(self, index: int) -> int:
        if index >= 5:
            raise OSError(f"sample {index} cannot be read")
        return index


@pytest.mark.multiprocess
def test_when_reading_fails_every_rank_is_told_and_none_moves_on():
    def case(rank: int, world_size: int) -> Any:
        loader = DispatchingLoader(Broken(12), 2, shuffle=False)
        batches = iter(loader)
        next(batches)
        with pytest.raises((OSError, RuntimeError), match="sample 5 cannot be read"):
            next(batches)
        return loader.position.samples

    assert values(run_ranks(2, case)) == [4, 4]


@pytest.mark.multiprocess
def test_a_dataset_that_rank_0_cannot_read_is_refused_on_every_rank():
    outcomes = run_ranks(2, lambda rank, world_size: DispatchingLoader(None if rank == 0 else Ids(4), 2))
    assert [error.type_name for error in errors(outcomes)] == ["TypeError"] * 2
    assert all("NoneType must have __len__" in error.message for error in errors(outcomes))
