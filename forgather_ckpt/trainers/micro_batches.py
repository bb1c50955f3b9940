"""The micro-batches of one step of a pipeline."""

import pickle
from collections.abc import Callable
from typing import Any

import torch

from forgather_ckpt import hashtree
from forgather_ckpt.data.batches import Batch, map_leaves


def in_micro_batches(items: list[Any], *, size: int, collate: Callable[[list[Any]], Batch]) -> list[Batch]:
    """The items of one step, collated in lists of `size`."""
    return [collate(items[first : first + size]) for first in range(0, len(items), size)]


def shapes_of(batch: Batch) -> list[list[int]]:
    """Of the tensors in a batch, in their order."""
    shapes: list[list[int]] = []
    map_leaves(lambda leaf: shapes.append(list(leaf.shape)) if isinstance(leaf, torch.Tensor) else None, batch)
    return shapes


def digest_of(batch: Batch) -> bytes:
    """Of all that is in a batch."""

    def content(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        data = leaf.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return str(leaf.dtype), tuple(leaf.shape), data

    return hashtree.digest(pickle.dumps(map_leaves(content, batch)))
