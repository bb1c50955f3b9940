"""What loaders read and what they make of it."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class Samples(Protocol):
    """A dataset that can be read at any place, as torch's map-style ones and those of Hugging Face."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


Batch = Any
"""What a collate function makes of a list of items: nested dicts, lists and tuples, with tensors as leaves."""


def map_leaves(change: Callable[[Any], Any], batch: Batch) -> Batch:
    """The batch with every leaf changed, in a fixed order; containers keep their types."""
    if isinstance(batch, Mapping):
        return type(batch)({key: map_leaves(change, value) for key, value in batch.items()})  # type: ignore[call-arg]
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(map_leaves(change, value) for value in batch))
    if isinstance(batch, list | tuple):
        return type(batch)(map_leaves(change, value) for value in batch)
    return change(batch)
