"""A data loader whose state is the place in the data that the trainer has reached."""

from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any, cast

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from forgather_ckpt.data.batches import Batch, Samples
from forgather_ckpt.data.position import GlobalPosition
from forgather_ckpt.data.sampler import ShardedBatches
from forgather_ckpt.data.seeding import KnowsEpoch, mixed_seed
from forgather_ckpt.signals import held_back, worker_init


class StatefulLoader:
    """Batches of the current epoch, from the position on; at the epoch's end the position moves to the next.

        loader = StatefulLoader(dataset, batch_size=8, rank=rank, world_size=world_size)
        for batch in loader: ...                 # the rest of this epoch
        for batch in loader: ...                 # the next one

    The position counts batches that were *taken*, not what worker processes have read ahead: a state dict
    made after the k-th batch was taken continues with the k+1st, without reading the ones before.

    Loading the state restores the order, not the random draws of worker processes. Datasets that augment
    draw from `item_generator`, or are wrapped in `SeededItems`, and then every item is exact too. No draw is
    ever made from the global generators, so having a loader does not change what a model's dropout does.
    """

    def __init__(
        self,
        dataset: Samples,
        batch_size: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = True,
        num_workers: int = 0,
        collate_fn: Callable[[list[Any]], Batch] | None = None,
        pin_memory: bool = False,
    ) -> None:
        self._position = GlobalPosition(num_samples_of(dataset), seed=seed, shuffle=shuffle)
        self.dataset = dataset
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self.drop_last = drop_last
        self.num_workers = num_workers
        self.collate_fn = collate_fn
        self.pin_memory = pin_memory
        self._remaining()  # refuses a wrong batch size or rank here, not at the first batch

    @property
    def position(self) -> GlobalPosition:
        """Where the job is: all batches before it have been taken, by every rank."""
        return self._position

    @property
    def batches_per_epoch(self) -> int:
        """Batches that one rank takes in a whole epoch."""
        whole = GlobalPosition(self._position.num_samples)
        return self._batches(whole, self.rank).num_global_batches

    def __len__(self) -> int:
        """Batches left in this epoch, as one rank takes them."""
        return self._remaining().num_global_batches

    def __iter__(self) -> Iterator[Batch]:
        place = self._position
        for batch in self._read():
            self._check_still_at(place)
            place = self._position = place.advanced_by(self._remaining().global_batch_samples())
            yield batch
        self._check_still_at(place)
        self._position = place.next_epoch()

    def _check_still_at(self, place: GlobalPosition) -> None:
        if self._position is not place:
            raise RuntimeError(
                "the position changed while batches were being read: a state was loaded, or two iterators "
                "were used at once. Begin a new iteration after loading"
            )

    def end_epoch(self) -> None:
        """Leave out the rest of this epoch. Begin a new iteration after it."""
        self._position = self._position.next_epoch()

    def state_dict(self) -> dict[str, Any]:
        return self._position.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self._position = self._position.resumed_from(state_dict)

    def _read(self) -> Iterator[Batch]:
        """This rank's batches from the position to the end of the epoch."""
        return self._data_loader(self.rank)

    def _data_loader(self, rank: int | None) -> Iterator[Batch]:
        """A plain DataLoader over the rest of the epoch, for one rank or for all in turn."""
        position = self._position
        if isinstance(self.dataset, KnowsEpoch):
            self.dataset.set_epoch(position.epoch)
        # The generator is the DataLoader's own: without one, making the iterator draws from the global one. It
        # seeds the workers; with `samples` in it, a resumed epoch does not repeat the draws of its beginning.
        seed = mixed_seed("workers", position.seed, position.epoch, position.samples, self.rank)
        batches = DataLoader(
            cast("Dataset[Any]", self.dataset),
            batch_sampler=self._batches(position, rank),
            num_workers=self.num_workers,
            collate_fn=self.collate_fn,
            pin_memory=self.pin_memory,
            worker_init_fn=worker_init(),
            generator=torch.Generator().manual_seed(seed),
        )
        with held_back():
            return iter(batches)

    def _remaining(self) -> ShardedBatches:
        return self._batches(self._position, self.rank)

    def _batches(self, position: GlobalPosition, rank: int | None) -> ShardedBatches:
        return ShardedBatches(
            position, self.batch_size, rank=rank, world_size=self.world_size, drop_last=self.drop_last
        )


def in_groups(loader: StatefulLoader, size: int) -> Iterator[list[Batch]]:
    """The rest of the epoch in lists of `size` batches, for gradient accumulation; the last may be shorter.

    When a list is handed over, the loader's position is right behind it.
    """
    batches = iter(loader)
    while count := min(size, len(loader)):
        yield list(islice(batches, count))
    next(batches, None)  # the loader moves on to the next epoch when it is asked for more than there is


def num_samples_of(dataset: object) -> int:
    """The length of a dataset that can be read at any place; others are refused."""
    if isinstance(dataset, IterableDataset) or not isinstance(dataset, Samples):
        raise TypeError(
            f"{type(dataset).__name__} must have __len__ and __getitem__: a place in a stream cannot be found "
            "again without reading all that comes before it"
        )
    return len(dataset)
