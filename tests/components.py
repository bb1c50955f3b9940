"""Small statefuls and trainers for tests, and what their results are compared with."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from forgather_ckpt.component import StateComponent
from forgather_ckpt.errors import CheckpointError
from forgather_ckpt.patterns import SharingPattern

Refusal = tuple[str, str]
"""Type and message of an error, to be compared between ranks."""


class Box:
    """A stateful that holds the items it is given. `fail_save` and `fail_load`, where set, are raised."""

    def __init__(self, items: Mapping[Any, Any]) -> None:
        self.items = dict(items)
        self.fail_save: BaseException | None = None
        self.fail_load: BaseException | None = None

    def state_dict(self) -> dict[Any, Any]:
        if self.fail_save is not None:
            raise self.fail_save
        return dict(self.items)

    def load_state_dict(self, state_dict: dict[Any, Any]) -> None:
        if self.fail_load is not None:
            raise self.fail_load
        self.items = dict(state_dict)


class Trainer:
    """Declares the components that it is given; `fail_declare`, where set, is raised instead."""

    def __init__(self, components: Sequence[StateComponent], groups: Any = None) -> None:
        self.components = list(components)
        self.groups = groups
        self.fail_declare: BaseException | None = None

    def get_state_components(self) -> list[StateComponent]:
        if self.fail_declare is not None:
            raise self.fail_declare
        return self.components

    def get_process_groups(self) -> Any:
        return self.groups


def sample(label: str) -> dict[Any, Any]:
    """A state with items of every kind, the same structure for every label, all different in content."""
    seed = zlib.crc32(label.encode())
    generator = torch.Generator().manual_seed(seed)
    return {
        "weight": torch.randn(5, 3, generator=generator),
        "half": torch.randn(7, generator=generator).bfloat16(),
        "turned": torch.randn(4, 6, generator=generator).t(),
        "count": torch.tensor(seed),
        "mask": torch.rand(9, generator=generator) > 0.5,
        "empty": torch.empty(0, 3),
        "label": label,
        "rate": seed / 7,
        "limits": (float("nan"), float("-inf"), None, True),
        "nested": {"list": [1, {"deep": label.encode()}], 3: {}, "tensors": [torch.arange(3) + seed, label]},
        7: ["an int key", seed],
    }


def is_same(one: Any, other: Any) -> bool:
    """Whether two states are equal in every type, key, order, shape, dtype and bit pattern of values."""
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return (one.dtype, one.shape) == (other.dtype, other.shape) and _bytes(one) == _bytes(other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(is_same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(is_same(*pair) for pair in zip(one, other, strict=True))
    return repr(one) == repr(other)


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def label_of(pattern: SharingPattern, rank: int, world_size: int) -> str:
    """Whose state a rank holds under a pattern, on one node, with two groups of neighbours."""
    match pattern:
        case SharingPattern.REPLICATED:
            return "everybody"
        case SharingPattern.PER_GROUP:
            return f"group {2 * rank // world_size}"
        case _:
            return f"rank {rank}"


def refusal(call: Callable[[], Any]) -> Refusal:
    """Type and message of the `CheckpointError` that `call` raises; AssertionError if it returns."""
    try:
        result = call()
    except CheckpointError as err:
        return type(err).__name__, err.message
    raise AssertionError(f"expected a CheckpointError, but the call returned {result!r}")


def the_same(results: Sequence[Any]) -> Any:
    """What all ranks returned; AssertionError where they differ."""
    assert all(result == results[0] for result in results), results
    return results[0]


def listing(run: Path) -> list[str]:
    """What is in a run directory, without the lease."""
    return sorted(path.name for path in run.iterdir() if path.name != ".lease")
