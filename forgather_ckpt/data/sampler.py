"""Which samples are in which batch of which rank: a function of the global position, in constant time.

The samples of an epoch are put in one order, the same on every rank. Every `world_size * batch_size` of them
are a global batch, and rank r gets the r-th run of `batch_size` in it. So what the job reads does not depend
on how the ranks divide it, and any position can be continued at another world size.
"""

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler

from forgather_ckpt.data.position import GlobalPosition
from forgather_ckpt.data.seeding import mixed_seed


def epoch_order(position: GlobalPosition) -> torch.Tensor:
    """All sample ids of the position's epoch in the order in which the job reads them."""
    if not position.shuffle:
        return torch.arange(position.num_samples)
    generator = torch.Generator().manual_seed(mixed_seed("order", position.seed, position.epoch))
    return torch.randperm(position.num_samples, generator=generator)


def share(num_samples: int, rank: int, world_size: int) -> tuple[int, int]:
    """The part of a global batch of `num_samples` that is this rank's, as (start, stop).

    As even as can be. With fewer samples than ranks, those that would get none repeat a neighbour's: a rank
    without a batch would leave the others waiting for its gradients.
    """
    start, stop = rank * num_samples // world_size, (rank + 1) * num_samples // world_size
    return (start, stop) if stop > start else (min(start, num_samples - 1), min(start, num_samples - 1) + 1)


class ShardedBatches(Sampler[list[int]]):
    """The batches from `position` to the end of its epoch; with `drop_last`, of full global batches only.

    Yields the sample ids of one rank's batches, or with `rank=None` those of all ranks in turn, as the one
    process needs them that reads for all. Every rank gets equally many batches.
    """

    def __init__(
        self,
        position: GlobalPosition,
        batch_size: int,
        *,
        rank: int | None = 0,
        world_size: int = 1,
        drop_last: bool = True,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {batch_size}")
        if world_size < 1 or (rank is not None and not 0 <= rank < world_size):
            raise ValueError(f"there is no rank {rank} among {world_size} ranks")
        self.position = position
        self.batch_size = batch_size
        self.ranks = range(world_size) if rank is None else (rank,)
        self.world_size = world_size
        self.drop_last = drop_last

    @property
    def num_global_batches(self) -> int:
        left = self.position.num_samples - self.position.samples
        full, rest = divmod(left, self.world_size * self.batch_size)
        return full + (rest > 0 and not self.drop_last)

    def global_batch_samples(self) -> int:
        """How many samples the next global batch has."""
        return min(self.world_size * self.batch_size, self.position.num_samples - self.position.samples)

    def __len__(self) -> int:
        return self.num_global_batches * len(self.ranks)

    def __iter__(self) -> Iterator[list[int]]:
        order = epoch_order(self.position)
        for batch in range(self.num_global_batches):
            first = self.position.samples + batch * self.world_size * self.batch_size
            samples = order[first : first + self.world_size * self.batch_size]
            for rank in self.ranks:
                start, stop = share(len(samples), rank, self.world_size)
                yield samples[start:stop].tolist()
