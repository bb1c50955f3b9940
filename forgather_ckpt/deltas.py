"""How far two stored tensors are apart: read, verified and measured a block at a time."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from forgather_ckpt import elements, excerpts
from forgather_ckpt.comparison import StoredTensor
from forgather_ckpt.differences import ElementDifference
from forgather_ckpt.excerpts import Bytes, Excerpts

_SLICE_ELEMENTS = 1 << 18
"""Measured at a time: bounds the numbers in float64 that are held at once."""

_PARTS = {"complex32": "float16", "complex64": "float32", "complex128": "float64"}
"""A complex number has the length of its two parts."""

Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class Delta:
    """B − A, of two tensors of one dtype and shape.

    The norms are L2 norms in float64, over the numbers that are finite on both sides; None for packed types, whose
    elements are no numbers.
    """

    elements: ElementDifference
    """Of B (`own`) against A (`reference`)."""
    norm: float | None
    """Of A."""
    difference_norm: float | None

    @property
    def relative_norm(self) -> float | None:
        """‖B − A‖ / ‖A‖; infinite where A is 0 and B is not."""
        if self.norm is None or self.difference_norm is None:
            return None
        if self.norm == 0:
            return math.inf if self.difference_norm else 0.0
        return self.difference_norm / self.norm


def measure(component: str, a: tuple[Path, StoredTensor], b: tuple[Path, StoredTensor]) -> Delta:
    """Read both tensors, which must have the same dtype and shape, each from its checkpoint's directory.

    `CheckpointDamaged` at the first block that does not have its digest. Memory: a few blocks of each.
    """
    (_, tensor), shape = a, a[1].shape
    one, other = (Excerpts(directory, component, stored) for directory, stored in (a, b))
    found = ElementDifference(0)
    norm = difference_norm = 0.0
    has_numbers = tensor.dtype != "float4_e2m1fn_x2"
    for slab in excerpts.slabs(tensor.dtype, shape):
        mine, theirs = one.read(slab), other.read(slab)
        here = elements.measure(mine.data, theirs.data, tensor.dtype, shape, slab.position)
        found = found.merge(here)
        if has_numbers:
            for part in _slices(mine, theirs, tensor.dtype):
                slice_norm, slice_difference = _norms(*part, tensor.dtype)
                norm = math.hypot(norm, slice_norm)
                difference_norm = math.hypot(difference_norm, slice_difference)
    return Delta(found, norm if has_numbers else None, difference_norm if has_numbers else None)


def _slices(one: Bytes, other: Bytes, dtype: str) -> list[tuple[Bytes, Bytes]]:
    step = _SLICE_ELEMENTS * getattr(torch, dtype).itemsize
    return [(one[at : at + step], other[at : at + step]) for at in range(0, len(one), step)]


def _norms(a: Bytes, b: Bytes, dtype: str) -> tuple[float, float]:
    """‖A‖ and ‖B − A‖."""
    kind: torch.dtype = getattr(torch, _PARTS.get(dtype, dtype))
    if not kind.is_floating_point:
        one, other = _integers(a, kind), _integers(b, kind)
        # the distance of two integers of one type fits its unsigned sibling, where subtraction wraps to it
        unsigned = np.dtype(f"u{one.itemsize}")
        apart = np.maximum(one, other).view(unsigned) - np.minimum(one, other).view(unsigned)
        return _norm(one.astype(np.float64)), _norm(apart.astype(np.float64))
    one_numbers, other_numbers = _floats(a, kind), _floats(b, kind)
    finite = np.isfinite(one_numbers) & np.isfinite(other_numbers)
    one_numbers, other_numbers = one_numbers[finite], other_numbers[finite]
    with np.errstate(over="ignore"):
        return _norm(one_numbers), _norm(other_numbers - one_numbers)


def _integers(data: Bytes, kind: torch.dtype) -> NDArray[np.integer[Any]]:
    found: NDArray[np.integer[Any]]
    found = (data != 0).view(np.uint8) if kind is torch.bool else data.view(str(kind).removeprefix("torch."))
    return found


def _floats(data: Bytes, kind: torch.dtype) -> Numbers:
    found: Numbers = torch.from_numpy(data).view(kind).to(torch.float64).numpy()
    return found


def _norm(numbers: Numbers) -> float:
    """Scaled by the largest number, as its square may be beyond float64."""
    largest = float(np.abs(numbers).max()) if numbers.size else 0.0
    if largest == 0 or math.isinf(largest):
        return largest
    return largest * math.sqrt(float(np.square(numbers / largest).sum()))
