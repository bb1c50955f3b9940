"""Seeds that follow from what they are for, so that no draw depends on what was drawn before it."""

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch

from forgather_ckpt.data.batches import Samples


def mixed_seed(*parts: int | str) -> int:
    """A seed of 63 bits that is the same for the same parts, on every machine, and unrelated for others."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def item_generator(seed: int, epoch: int, index: int) -> torch.Generator:
    """The generator for one item of one epoch: what a dataset that augments should draw from.

    Its draws depend on nothing else, so they are the same after a resume, with any number of worker
    processes and at any world size. A dataset learns the epoch through `set_epoch`, which loaders call:

        class Noisy:
            def set_epoch(self, epoch): self.epoch = epoch
            def __getitem__(self, index):
                generator = item_generator(self.seed, self.epoch, index)
                return self.x[index] + torch.randn(self.x[index].shape, generator=generator)
    """
    return torch.Generator().manual_seed(mixed_seed("item", seed, epoch, index))


@runtime_checkable
class KnowsEpoch(Protocol):
    """A dataset that wants to be told the epoch before items of it are read."""

    def set_epoch(self, epoch: int) -> None: ...


class SeededItems:
    """Makes a dataset exact that augments with the global generators of torch, numpy or python.

    Around each item the three are seeded from (seed, epoch, index) and then put back, so that the items are
    what `item_generator` promises, and the training process's own draws are not disturbed. It costs about
    0.1 ms an item; a dataset that draws from `item_generator` itself does not need it.
    """

    def __init__(self, dataset: Samples, seed: int = 0) -> None:
        self.dataset = dataset
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        if isinstance(self.dataset, KnowsEpoch):
            self.dataset.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        with seeded(mixed_seed("item", self.seed, self.epoch, index)):
            return self.dataset[index]


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Run the body with the global CPU generators seeded, and put them back after it."""
    python_state, numpy_state, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    seed_cpu(seed)
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)


def seed_cpu(seed: int) -> None:
    """Seed the global generators of python, numpy and torch on the CPU."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # numpy's legacy generator takes 32 bits
    torch.default_generator.manual_seed(seed)


def seed_all(seed: int) -> None:
    """Seed the global generators of python, numpy, and torch on every device."""
    seed_cpu(seed)
    torch.manual_seed(seed)
