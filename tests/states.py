"""State for tests: values of every kind that can be checkpointed, and the comparison that "comes back exactly" means.

Nothing here uses the package, so that the comparison does not share its mistakes.
"""

from __future__ import annotations

import random
import re
import struct
import warnings
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st


def assert_same(found: Any, expected: Any, at: str = "state") -> None:
    """The same types, the same bits, the same order of keys; of tensors dtype, shape and bytes."""
    if isinstance(expected, torch.Tensor):
        assert isinstance(found, torch.Tensor), f"{at} is a {type(found).__name__}, not a tensor"
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape), at
        assert tensor_bytes(found) == tensor_bytes(expected), f"{at} has other bytes"
        return
    assert type(found) is type(expected), f"{at} is a {type(found).__name__}, expected a {type(expected).__name__}"
    if isinstance(expected, dict):
        assert len(found) == len(expected), at
        for (key, one), (other_key, other) in zip(found.items(), expected.items(), strict=True):
            assert_same(key, other_key, f"{at}, key {other_key!r}")
            assert_same(one, other, f"{at}/{other_key!r}")
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected), at
        for index, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert_same(one, other, f"{at}/{index}")
    elif isinstance(expected, set | frozenset):
        assert sorted(map(_text_of, found)) == sorted(map(_text_of, expected)), at
    elif isinstance(expected, np.ndarray | np.generic):
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape), at
        assert found.tobytes() == expected.tobytes(), at
    elif type(expected) is float:
        assert struct.pack("d", found) == struct.pack("d", expected), at
    elif type(expected) is complex:
        assert struct.pack("dd", found.real, found.imag) == struct.pack("dd", expected.real, expected.imag), at
    else:
        assert found == expected, at


def _text_of(value: Any) -> str:
    """A text that is equal for values of the same type and bits only."""
    if isinstance(value, float):
        return f"float {struct.pack('d', value).hex()}"
    if isinstance(value, complex):
        return f"complex {struct.pack('dd', value.real, value.imag).hex()}"
    if isinstance(value, tuple | frozenset):
        texts = [_text_of(item) for item in value]
        return f"{type(value).__name__} {texts if isinstance(value, tuple) else sorted(texts)}"
    return f"{type(value).__name__} {value!r}"


def tensor_bytes(tensor: torch.Tensor) -> bytes:
    """The elements in C order."""
    dense = tensor.detach().resolve_conj().resolve_neg().contiguous()
    return dense.reshape(-1).view(torch.uint8).cpu().numpy().tobytes() if dense.numel() else b""


def tensor_of(dtype: str, shape: tuple[int, ...] = (3, 5), *, seed: int = 0) -> torch.Tensor:
    """A tensor of any dtype whose bytes are random: NaNs with payloads, infinities and subnormals among them."""
    kind = getattr(torch, dtype)
    count = torch.Size(shape).numel()
    data = random.Random(seed).randbytes(count * kind.itemsize)
    if dtype == "bool":
        data = bytes(byte & 1 for byte in data)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "ComplexHalf support is experimental")
        if not data:
            return torch.empty(shape, dtype=kind)
        return torch.frombuffer(bytearray(data), dtype=torch.uint8).view(kind).reshape(shape)


def float_of(bits: int) -> float:
    """The float with these 64 bits: `float_of(0x7FF8DEADBEEF0001)` is a NaN with a payload."""
    return float(struct.unpack(">d", bits.to_bytes(8, "big"))[0])


_SURROGATE_PAIR = re.compile("[\ud800-\udbff][\udc00-\udfff]")

texts = st.text(alphabet=st.characters(codec=None, exclude_categories=()), max_size=8).filter(
    lambda text: not _SURROGATE_PAIR.search(text)
) | st.sampled_from(
    [
        "",
        "~",
        "/",
        "~0",
        "~1",
        "~i0",
        "~k1",
        "..",
        "../../evil",
        "\n",
        "a/b",
        "\ud800",
        "\udc80x",
        "😀",
        "__metadata__",
        "$int",
    ]
)
"""Any text, lone surrogates included. Two that make a pair are refused: JSON takes them for one character."""

scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(2**62, 2**70)
    | st.floats(allow_nan=False)
    | st.integers(0, 2**64 - 1).map(float_of)
    | texts
    | st.binary(max_size=8)
    | st.complex_numbers()
)

keys = st.recursive(
    scalars | st.floats(allow_nan=False),
    lambda below: st.tuples(below, below) | st.frozensets(below, max_size=2),
    max_leaves=4,
)
"""Anything plain that can be the key of a dict."""

plain_values = st.recursive(
    scalars | st.binary(max_size=8).map(bytearray) | st.sets(scalars, max_size=3) | st.frozensets(scalars, max_size=3),
    lambda below: (
        st.lists(below, max_size=3)
        | st.lists(below, max_size=3).map(tuple)
        | st.dictionaries(texts, below, max_size=3)
        | st.dictionaries(keys, below, max_size=3)
    ),
    max_leaves=12,
)
"""Any plain data, nested."""

_tensors = st.builds(
    tensor_of, st.sampled_from(["float32", "int8", "bool"]), st.lists(st.integers(0, 3), max_size=2).map(tuple)
)
state_dicts = st.dictionaries(
    keys | texts,
    st.recursive(
        _tensors | scalars,
        lambda below: (
            st.lists(below, max_size=3)
            | st.lists(below, max_size=3).map(tuple)
            | st.dictionaries(texts, below, max_size=3)
            | st.dictionaries(keys, below, max_size=3)
        ),
        max_leaves=8,
    ),
    max_size=4,
)
"""Any nesting of tensors and plain data."""
