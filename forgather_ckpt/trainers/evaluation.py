"""The batches of an evaluation, and what keeps training from noticing it."""

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any, cast

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from forgather_ckpt.data.batches import Batch, Samples
from forgather_ckpt.data.loader import num_samples_of
from forgather_ckpt.data.position import GlobalPosition
from forgather_ckpt.data.sampler import ShardedBatches
from forgather_ckpt.data.seeding import mixed_seed, seed_all
from forgather_ckpt.rng import RNGState

EvalDataset = Samples | Callable[[], Samples]
"""A dataset, or a function that makes it when it is first needed."""


def as_means(found: Any, device: torch.device) -> dict[str, torch.Tensor]:
    """What was computed of one batch, as one float each, where it lies; TypeError or ValueError where it is something else."""
    if not isinstance(found, Mapping):
        raise TypeError(
            f"an evaluation step gave {found!r}, a {type(found).__name__}; return the means over the batch by name, such as "
            '{"loss": loss}'
        )
    means = {}
    for name, value in found.items():
        if not isinstance(name, str):
            raise TypeError(f"a metric is called {name!r}, a {type(name).__name__}; give it a name that is a string")
        try:
            number = torch.as_tensor(value, device=device).detach()
        except (TypeError, ValueError, RuntimeError):
            number = None
        if number is None or number.numel() != 1 or number.is_complex():
            raise TypeError(
                f"the metric {name!r} of a batch is {value!r}, a {type(value).__name__}; give its mean over the batch, one "
                "number"
            )
        full_name = name if name.startswith("eval_") else f"eval_{name}"
        if full_name in means:
            raise ValueError(
                f"two metrics of a batch are called {full_name!r}: with and without `eval_` is the same name"
            )
        means[full_name] = number.reshape(()).float()
    return means


def refuse_unlike_names(
    names: Sequence[str], reduce_sums: Callable[[torch.Tensor], torch.Tensor], device: torch.device
) -> None:
    """ValueError where ranks have metrics of other names, which would be added to each other. All ranks call this.

    Numbers are all equal just where the square of their sum is their number times the sum of their squares.
    """
    mark = float(zlib.crc32("\n".join(names).encode()) & 0xFFFF)
    sums = reduce_sums(torch.tensor([mark, mark * mark, 1.0], dtype=torch.float64, device=device))
    total, squares, num_ranks = (int(one) for one in sums.tolist())
    if total * total != num_ranks * squares:
        raise ValueError(
            f"the metrics of this rank are {', '.join(names)}, and another rank has others; give the same ones on all ranks"
        )


class EvaluationBatches:
    """The first batches of a dataset, in its order, the same at each evaluation; every rank gets as many.

    `drop_last` leaves out what is left at the end when no whole batch of all ranks is.
    """

    def __init__(
        self,
        dataset: Samples,
        batch_size: int,
        *,
        rank: int,
        world_size: int,
        max_batches: int | None,
        collate_fn: Callable[[list[Any]], Batch] | None,
        drop_last: bool = False,
    ) -> None:
        position = GlobalPosition(num_samples_of(dataset), shuffle=False)
        self.num_samples = position.num_samples
        batches = ShardedBatches(position, batch_size, rank=rank, world_size=world_size, drop_last=drop_last)
        if not len(batches):
            raise ValueError(
                f"the evaluation dataset has {position.num_samples} samples, which do not make one batch; give more, or none"
            )
        self._dataset = dataset
        self._collate_fn = collate_fn
        self._samples = list(islice(batches, max_batches))
        whole, rest = divmod(position.num_samples, batch_size * world_size)
        sizes = [batch_size * world_size] * whole + ([rest] if rest else [])
        # With fewer samples than ranks some ranks get a neighbour's, which count there.
        self._weights = [
            (rank + 1) * size // world_size - rank * size // world_size for size in sizes[: len(self._samples)]
        ]

    def __iter__(self) -> Iterator[tuple[Batch, int]]:
        """Batches, each with the number of samples in it that count; 0 where they are another rank's."""
        loader = DataLoader(
            cast("Dataset[Any]", self._dataset), batch_sampler=self._samples, collate_fn=self._collate_fn
        )
        yield from zip(loader, self._weights, strict=True)


@contextmanager
def undisturbed(model: nn.Module, seed: int) -> Iterator[None]:
    """The model in evaluation mode and without gradients; at the end each module is in its mode again, and every random
    generator where it was. Inside, the generators begin at `seed`: what an evaluation draws is the same each time."""
    modes = {module: module.training for module in model.modules()}
    generators = RNGState()
    before = generators.state_dict()
    seed_all(mixed_seed("evaluation", seed))
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        generators.load_state_dict(before)
