"""Two copies of the same elements, compared one by one: how many differ, where first, and how far they are apart.

Elements are equal if their bits are. So most of the work is one integer comparison and one pass for NaNs and
infinities; what the numbers are is asked of the differing ones only.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from forgather_ckpt.differences import ElementDifference
from forgather_ckpt.dtypes import ITEM_BYTES
from forgather_ckpt.hashtree import Buffer

Bits = NDArray[np.unsignedinteger[Any]]

_SLICE_ELEMENTS = 1 << 18
"""Compared at a time, parts of complex elements counted: it bounds the temporary memory, which is at most some 60 bytes
an element, where all of them differ."""


@dataclass(frozen=True)
class _Float:
    """What the bits of a float mean. A magnitude is the bits without the sign."""

    bytes: int
    sign: int
    """The sign's bit; 0 for a type without negative numbers."""
    inf: int | None
    """The magnitude of an infinity, where the type has one."""
    nan: int | None
    """The lowest magnitude of a NaN. None: the bits of a negative zero are the only NaN (the `fnuz` types)."""


_FLOATS = {
    "float16": _Float(2, 0x8000, 0x7C00, 0x7C01),
    "bfloat16": _Float(2, 0x8000, 0x7F80, 0x7F81),
    "float32": _Float(4, 1 << 31, 0x7F80_0000, 0x7F80_0001),
    "float64": _Float(8, 1 << 63, 0x7FF0 << 48, (0x7FF0 << 48) + 1),
    "float8_e4m3fn": _Float(1, 0x80, None, 0x7F),
    "float8_e5m2": _Float(1, 0x80, 0x7C, 0x7D),
    "float8_e4m3fnuz": _Float(1, 0x80, None, None),
    "float8_e5m2fnuz": _Float(1, 0x80, None, None),
    "float8_e8m0fnu": _Float(1, 0, None, 0xFF),
}
"""https://github.com/pytorch/pytorch, c10/util: Half, BFloat16 and the Float8 types; OCP 8-bit and MX formats."""

_COMPLEX = {"complex32": "float16", "complex64": "float32", "complex128": "float64"}
"""The type of each of the two parts."""

_SIGNED = {"int8", "int16", "int32", "int64"}
_UNSIGNED = {"uint8", "uint16", "uint32", "uint64"}


def measure(
    reference: Buffer | torch.Tensor, own: Buffer | torch.Tensor, dtype: str, shape: Sequence[int], start: int = 0
) -> ElementDifference:
    """How `own` compares with `reference`: the same range, in C order, of the elements of one item.

    Both are bytes in host memory (or 1-D uint8 CPU tensors) of equal length. `dtype` is torch's name
    (`bfloat16`), `shape` the whole item's, `start` the place of the first element in it. `ElementDifference.merge`
    puts ranges together. Elements of packed types (`float4_e2m1fn_x2`) are bytes, and no numbers. A `ValueError`
    tells of buffers that are no such range.
    """
    size = ITEM_BYTES.get(dtype)
    if size is None:
        raise ValueError(f"elements of type {dtype!r} cannot be compared; expected one of {', '.join(ITEM_BYTES)}")
    mine, theirs = _bytes_of(own), _bytes_of(reference)
    _check_range(len(theirs), len(mine), size, shape, start)
    step = _SLICE_ELEMENTS * size // (2 if dtype in _COMPLEX else 1)
    found = ElementDifference(0)
    for at in range(0, len(mine), step):
        here = _measure_slice(theirs[at : at + step], mine[at : at + step], dtype, shape, start + at // size)
        found = found.merge(here)
    return found


def _bytes_of(data: Buffer | torch.Tensor) -> NDArray[np.uint8]:
    if isinstance(data, torch.Tensor):
        if data.dtype is not torch.uint8 or data.dim() != 1 or data.device.type != "cpu":
            raise ValueError(
                f"a buffer is a {data.dtype} tensor of {data.dim()} dimensions on {data.device}; "
                "expected a 1-D uint8 tensor on the CPU"
            )
        return data.contiguous().numpy()
    # not frombuffer alone: it refuses empty buffers
    return np.frombuffer(data, np.uint8) if memoryview(data).nbytes else np.empty(0, np.uint8)


def _check_range(reference_bytes: int, own_bytes: int, size: int, shape: Sequence[int], start: int) -> None:
    if reference_bytes != own_bytes:
        raise ValueError(f"the buffers hold {reference_bytes} and {own_bytes} bytes; expected the same range of both")
    if own_bytes % size:
        raise ValueError(f"the buffers hold {own_bytes} bytes; expected whole elements of {size} bytes")
    stop = start + own_bytes // size
    if not 0 <= start <= stop <= math.prod(shape):
        raise ValueError(f"elements {start} to {stop} are not in shape {list(shape)} of {math.prod(shape)} elements")


def _measure_slice(
    reference: NDArray[np.uint8], own: NDArray[np.uint8], dtype: str, shape: Sequence[int], start: int
) -> ElementDifference:
    parts = 2 if dtype in _COMPLEX else 1
    unit = np.dtype(f"u{ITEM_BYTES[dtype] // parts}")
    # a row an element, a column a part
    rows: Bits = reference.view(unit).reshape(-1, parts)
    own_rows: Bits = own.view(unit).reshape(-1, parts)
    positions = np.flatnonzero(_any_part(rows != own_rows))
    old, new = rows[positions], own_rows[positions]
    part = _COMPLEX.get(dtype, dtype)
    nan = inf = own_nan = own_inf = 0
    if kind := _FLOATS.get(part):
        nan, inf = _count_special(rows, kind)
        (old_nan, old_inf), (new_nan, new_inf) = _count_special(old, kind), _count_special(new, kind)
        # elements with equal bits count alike on both sides
        own_nan, own_inf = nan - old_nan + new_nan, inf - old_inf + new_inf
        max_abs, max_ulp = _float_distances(old, new, part, kind, has_nan=old_nan + new_nan > 0)
    else:
        max_abs, max_ulp = _integer_distance(old, new, dtype), None
    return ElementDifference(
        num_elements=len(rows),
        num_different=len(positions),
        first_index=_index(start + int(positions[0]), shape) if len(positions) else None,
        max_abs=max_abs,
        max_ulp=max_ulp,
        nan=own_nan,
        inf=own_inf,
        reference_nan=nan,
        reference_inf=inf,
    )


def _any_part(flags: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Of each row: is any part's flag set? (`any(axis=1)` of so short rows is many times slower.)"""
    return flags[:, 0] if flags.shape[1] == 1 else flags[:, 0] | flags[:, 1]


def _index(position: int, shape: Sequence[int]) -> tuple[int, ...]:
    index: list[int] = []
    for extent in reversed(shape):
        position, at = divmod(position, extent)
        index.insert(0, at)
    return tuple(index)


def _count_special(rows: Bits, kind: _Float) -> tuple[int, int]:
    """How many rows have a NaN, and how many an infinity, in any of their parts."""
    if not rows.size:
        return 0, 0
    lowest = kind.nan if kind.inf is None else kind.inf
    if lowest is not None and kind.sign and int((rows & (kind.sign - 1)).max()) < lowest:
        return 0, 0
    nan = int(np.count_nonzero(_any_part(_is_nan(rows, kind))))
    inf = 0 if kind.inf is None else int(np.count_nonzero(_any_part((rows & (kind.sign - 1)) == kind.inf)))
    return nan, inf


def _is_nan(bits: Bits, kind: _Float) -> NDArray[np.bool_]:
    found: NDArray[np.bool_]
    if kind.nan is None:
        found = bits == kind.sign
    elif kind.sign:
        found = (bits & (kind.sign - 1)) >= kind.nan
    else:
        found = bits >= kind.nan
    return found


def _ordered(bits: Bits, kind: _Float) -> Bits:
    """Unsigned integers in the order of the numbers, neighbours 1 apart; -0.0 comes right before 0.0.

    A negative number's bits are inverted, another's get the sign's bit.
    """
    if not kind.sign:
        return bits
    is_negative = bits >> (8 * kind.bytes - 1)
    ordered: Bits = np.negative(is_negative)
    ordered |= kind.sign
    ordered ^= bits
    if kind.nan is None:
        ordered += is_negative  # there is no -0.0 between the two halves
    return ordered


def _float_distances(
    old: Bits, new: Bits, dtype: str, kind: _Float, *, has_nan: bool
) -> tuple[float | None, int | None]:
    """`max_abs` and `max_ulp` of differing floats, or of complex numbers with parts of type `dtype`."""
    if not has_nan:
        return _max_float_abs(old, new, dtype), _max_ulp(old, new, kind)
    either = _is_nan(old, kind) | _is_nan(new, kind)
    comparable = ~_any_part(either)
    # an absolute value takes both parts of a complex number, its distance in ulp is one of each part
    return _max_float_abs(old[comparable], new[comparable], dtype), _max_ulp(old[~either], new[~either], kind)


def _max_ulp(old: Bits, new: Bits, kind: _Float) -> int | None:
    # parts with other bits are at least 1 apart, so 0 means that there are none
    return _max_distance(_ordered(old, kind), _ordered(new, kind)) or None


def _max_float_abs(old: Bits, new: Bits, dtype: str) -> float | None:
    if not old.size:
        return None
    with np.errstate(over="ignore", invalid="ignore"):
        apart = _numbers(new, dtype) - _numbers(old, dtype)
        if apart.shape[1] == 1:
            return float(np.abs(apart, out=apart).max())
        apart[old == new] = 0.0  # infinities too
        return float(np.hypot(apart[:, 0], apart[:, 1]).max())


def _integer_distance(old: Bits, new: Bits, dtype: str) -> float | None:
    """`max_abs` of differing integers, exact as far as a float is; None for what is no number."""
    if dtype == "bool":
        distance = _max_distance((old != 0).view(np.uint8), (new != 0).view(np.uint8))
    elif dtype in _SIGNED:
        sign = old.dtype.type(1 << (8 * old.itemsize - 1))
        distance = _max_distance(old ^ sign, new ^ sign)
    elif dtype in _UNSIGNED:
        distance = _max_distance(old, new)
    else:
        return None
    return None if distance is None else float(distance)


def _max_distance(one: Bits, other: Bits) -> int | None:
    """The largest |one - other|, in unsigned integers, which hold it."""
    return int((np.maximum(one, other) - np.minimum(one, other)).max()) if one.size else None


def _numbers(bits: Bits, dtype: str) -> NDArray[np.float64]:
    """What the bits of floats stand for; float64 holds each of them exactly."""
    if dtype == "bfloat16":
        return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    if dtype.startswith("float8_"):
        return _float8_numbers(dtype)[bits]
    return bits.view(np.dtype(f"f{bits.itemsize}")).astype(np.float64)


@functools.cache
def _float8_numbers(dtype: str) -> NDArray[np.float64]:
    """The number of each of the 256 patterns."""
    patterns = torch.arange(256, dtype=torch.uint8).view(getattr(torch, dtype))
    return patterns.to(torch.float64).numpy()
