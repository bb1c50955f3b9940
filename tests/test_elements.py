"""Element-wise differences, against a slow comparison of one element after the other in Python's own numbers."""

from __future__ import annotations

import itertools
import math
import struct
import tracemalloc
from fractions import Fraction
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from forgather_ckpt import elements
from forgather_ckpt.differences import ElementDifference
from forgather_ckpt.dtypes import ITEM_BYTES
from forgather_ckpt.elements import measure

PARTS = {"complex32": "float16", "complex64": "float32", "complex128": "float64"}
FLOATS = [name for name in ITEM_BYTES if "float" in name and not name.startswith("float4")]
SMALL_FLOATS = [name for name in FLOATS if ITEM_BYTES[name] <= 2]
INTEGERS = [name for name in ITEM_BYTES if "int" in name]
CODES = {"float16": "e", "float32": "f", "float64": "d"}


def number_of(bits: int, dtype: str) -> float:
    """What a float's bits stand for."""
    if dtype == "bfloat16":
        return number_of(bits << 16, "float32")
    if dtype in CODES:
        return struct.unpack(f"<{CODES[dtype]}", bits.to_bytes(ITEM_BYTES[dtype], "little"))[0]
    return torch.tensor([bits], dtype=torch.uint8).view(getattr(torch, dtype)).to(torch.float64).item()


def place_of(bits: int, dtype: str) -> int:
    """Its place among the numbers of its type."""
    if dtype in SMALL_FLOATS:
        return places(dtype)[bits]
    magnitude = bits & ~(1 << 8 * ITEM_BYTES[dtype] - 1)
    return magnitude if bits == magnitude else -magnitude - 1


def places(dtype: str, known: dict[str, dict[int, int]] = {}) -> dict[int, int]:  # noqa: B006
    """All patterns that are numbers, in the order of these; -0.0 comes before 0.0."""
    if dtype not in known:
        numbers = {bits: number_of(bits, dtype) for bits in range(1 << 8 * ITEM_BYTES[dtype])}
        order = sorted(
            (bits for bits, number in numbers.items() if not math.isnan(number)),
            key=lambda bits: (numbers[bits], math.copysign(1, numbers[bits])),
        )
        known[dtype] = {bits: place for place, bits in enumerate(order)}
    return known[dtype]


def distance_of(one: float, other: float) -> float:
    """|one - other| as exactly as a float can say."""
    if one == other:
        return 0.0
    if math.isinf(one) or math.isinf(other):
        return math.inf
    try:
        return float(abs(Fraction(one) - Fraction(other)))
    except OverflowError:
        return math.inf


def parts_of(data: bytes, dtype: str) -> list[tuple[int, ...]]:
    """The bits of each element: of both parts of a complex one."""
    size = ITEM_BYTES[PARTS.get(dtype, dtype)]
    bits = [int.from_bytes(data[at : at + size], "little") for at in range(0, len(data), size)]
    return list(zip(bits[::2], bits[1::2], strict=True)) if dtype in PARTS else [(one,) for one in bits]


def integer_of(bits: int, dtype: str) -> int:
    if dtype == "bool":
        return int(bits != 0)
    return int.from_bytes(bits.to_bytes(ITEM_BYTES[dtype], "little"), "little", signed=dtype.startswith("int"))


def slow_measure(reference: bytes, own: bytes, dtype: str, shape: tuple[int, ...], start: int) -> ElementDifference:
    part = PARTS.get(dtype, dtype)
    first, different, absolutes, ulps = None, 0, [], []
    counts = {"nan": 0, "inf": 0, "reference_nan": 0, "reference_inf": 0}
    for number, (old, new) in enumerate(zip(parts_of(reference, dtype), parts_of(own, dtype), strict=True)):
        if dtype in FLOATS or dtype in PARTS:
            olds, news = [number_of(bits, part) for bits in old], [number_of(bits, part) for bits in new]
            for prefix, numbers in (("reference_", olds), ("", news)):
                counts[f"{prefix}nan"] += any(map(math.isnan, numbers))
                counts[f"{prefix}inf"] += any(map(math.isinf, numbers))
        if old == new:
            continue
        different += 1
        first = first or (number + start,)
        if dtype in INTEGERS or dtype == "bool":
            absolutes.append(float(abs(integer_of(new[0], dtype) - integer_of(old[0], dtype))))
        elif dtype in FLOATS or dtype in PARTS:
            if not any(map(math.isnan, [*olds, *news])):
                absolutes.append(math.hypot(*map(distance_of, olds, news)))
            ulps += [
                abs(place_of(one, part) - place_of(other, part))
                for one, other in zip(old, new, strict=True)
                if one != other and not math.isnan(number_of(one, part)) and not math.isnan(number_of(other, part))
            ]
    return ElementDifference(
        num_elements=len(own) // ITEM_BYTES[dtype],
        num_different=different,
        first_index=tuple(map(int, np.unravel_index(first[0], shape))) if first else None,
        max_abs=max(absolutes, default=None),
        max_ulp=max(ulps, default=None),
        **counts,
    )


def assert_alike(found: ElementDifference, expected: ElementDifference) -> None:
    """Equal, but for the last bits of a complex number's absolute value."""
    assert (found.max_abs is None) is (expected.max_abs is None)
    assert (found.max_abs or 0.0) == pytest.approx(expected.max_abs or 0.0, rel=1e-14, abs=0)
    assert ElementDifference(**{**vars(found), "max_abs": None}) == ElementDifference(
        **{**vars(expected), "max_abs": None}
    )


def pattern(dtype: str, bits: int) -> bytes:
    return bits.to_bytes(ITEM_BYTES[dtype], "little")


def special_bits(part: str) -> list[int]:
    """Zeros, the smallest and largest numbers, infinities, NaNs, and their negatives; of integers, their ends."""
    top = 1 << 8 * ITEM_BYTES[part] - 1
    low = [0, 1, 2, top - 1, top - 2]
    if part in FLOATS:
        digits = {1: 3, 2: 10, 4: 23, 8: 52}[ITEM_BYTES[part]]
        inf = {"bfloat16": 0x7F80, "float8_e5m2": 0x7C}.get(part, (top - 1) >> digits << digits)
        low += [inf - 1, inf, inf + 1]
    return [bits | sign for bits in low for sign in (0, top)]


@st.composite
def copies(draw: st.DrawFn) -> tuple[bytes, bytes, str, tuple[int, ...], int]:
    """Two copies of a range of an item: equal but for some elements."""
    dtype = draw(st.sampled_from(list(ITEM_BYTES)))
    part = PARTS.get(dtype, dtype)
    size = ITEM_BYTES[part]
    one = (st.sampled_from(special_bits(part)) | st.integers(0, 256**size - 1)).map(lambda bits: pattern(part, bits))
    element = st.tuples(one, one).map(b"".join) if dtype in PARTS else one
    shape = draw(st.sampled_from([(), (7,), (30,), (3, 5), (2, 1, 3, 2), (1, 0)]))
    start, stop = sorted(draw(st.tuples(*[st.integers(0, math.prod(shape))] * 2)))
    own = draw(st.lists(element, min_size=stop - start, max_size=stop - start))
    reference = [draw(element) if draw(st.booleans()) else same for same in own]
    return b"".join(reference), b"".join(own), dtype, shape, start


@given(copies())
def test_a_range_is_measured_as_one_element_after_the_other_is(drawn):
    assert_alike(measure(*drawn), slow_measure(*drawn))


@given(copies(), st.data())
def test_ranges_put_together_in_any_order_are_the_whole(drawn, data):
    reference, own, dtype, shape, start = drawn
    size, whole = ITEM_BYTES[dtype], measure(*drawn)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(own) // size), max_size=3)))
    bounds = list(itertools.pairwise([0, *cuts, len(own) // size]))
    pieces = [
        measure(reference[a * size : b * size], own[a * size : b * size], dtype, shape, start + a) for a, b in bounds
    ]
    merged = ElementDifference(0)
    for piece in data.draw(st.permutations(pieces)):
        merged = merged.merge(piece)
    assert merged == whole
    with mock.patch.object(elements, "_SLICE_ELEMENTS", 4):
        assert measure(*drawn) == whole


@given(copies(), copies(), copies())
def test_merging_is_associative_and_commutative(one, other, third):
    a, b, c = measure(*one), measure(*other), measure(*third)
    assert a.merge(b).merge(c) == a.merge(b.merge(c))
    assert a.merge(b) == b.merge(a)
    assert a.merge(ElementDifference(0)) == a == ElementDifference(0).merge(a)


NAN32 = struct.pack("<I", 0x7FC00000)
OTHER_NAN32 = struct.pack("<I", 0xFFC00001)


def floats(*numbers: float) -> bytes:
    return struct.pack(f"<{len(numbers)}f", *numbers)


@pytest.mark.parametrize(
    ("dtype", "reference", "own", "expected"),
    [
        ("float32", floats(1, 2), floats(1, 2), ElementDifference(2)),
        ("float32", floats(0.0), floats(-0.0), ElementDifference(1, 1, (0,), 0.0, 1)),
        ("float32", NAN32, NAN32, ElementDifference(1, nan=1, reference_nan=1)),
        ("float32", NAN32, OTHER_NAN32, ElementDifference(1, 1, (0,), nan=1, reference_nan=1)),
        ("float32", floats(1, 2), NAN32 + floats(2), ElementDifference(2, 1, (0,), nan=1)),
        (
            "float32",
            floats(1, math.inf),
            floats(1, 3.4028235e38),
            ElementDifference(2, 1, (1,), math.inf, 1, 0, 0, 0, 1),
        ),
        (
            "float32",
            floats(math.inf),
            floats(-math.inf),
            ElementDifference(1, 1, (0,), math.inf, 0xFF000001, 0, 1, 0, 1),
        ),
        ("float32", floats(1e-45), floats(-1e-45), ElementDifference(1, 1, (0,), 2 * 2.0**-149, 3)),
        (
            "float64",
            struct.pack("<d", -1.7e308),
            struct.pack("<d", 1.7e308),
            ElementDifference(1, 1, (0,), math.inf, 2 * struct.unpack("<Q", struct.pack("<d", 1.7e308))[0] + 1),
        ),
        # the same infinity in one part, another number in the other
        (
            "complex64",
            floats(math.inf, 1),
            floats(math.inf, 3),
            ElementDifference(1, 1, (0,), 2.0, 0xC00000, 0, 1, 0, 1),
        ),
        ("complex64", floats(0, 0), floats(3, 4), ElementDifference(1, 1, (0,), 5.0, 0x40800000)),
        # where one part is NaN, there is no absolute difference, but one of the other part in ulp
        ("complex64", NAN32 + floats(1), floats(7, 1.5), ElementDifference(1, 1, (0,), None, 1 << 22, 0, 0, 1, 0)),
        (
            "complex64",
            NAN32 + floats(1),
            OTHER_NAN32 + floats(1),
            ElementDifference(1, 1, (0,), nan=1, reference_nan=1),
        ),
        ("float8_e4m3fn", b"\x7e\x7f", b"\x7f\x7e", ElementDifference(2, 2, (0,), None, None, 1, 0, 1, 0)),
        ("float8_e4m3fn", b"\x7e", b"\xfe", ElementDifference(1, 1, (0,), 896.0, 0xFD)),
        ("float8_e5m2", b"\x7b", b"\x7c", ElementDifference(1, 1, (0,), math.inf, 1, 0, 1)),
        ("float8_e4m3fnuz", b"\x00\x00", b"\x80\x81", ElementDifference(2, 2, (0,), 2.0**-10, 1, 1)),
        ("float8_e4m3fnuz", b"\x01", b"\x81", ElementDifference(1, 1, (0,), 2.0**-9, 2)),
        ("float8_e5m2fnuz", b"\x7f", b"\xff", ElementDifference(1, 1, (0,), 114688.0, 0xFE)),
        ("float8_e8m0fnu", b"\x7f\xff", b"\x81\xff", ElementDifference(2, 1, (0,), 3.0, 2, 1, 0, 1, 0)),
        ("float8_e8m0fnu", b"\x00", b"\x01", ElementDifference(1, 1, (0,), 2.0**-127, 1)),
        ("int8", b"\x80", b"\x7f", ElementDifference(1, 1, (0,), 255.0)),
        ("uint8", b"\x00\x05", b"\xff\x05", ElementDifference(2, 1, (0,), 255.0)),
        ("int64", struct.pack("<q", -(2**63)), struct.pack("<q", 2**63 - 1), ElementDifference(1, 1, (0,), 2.0**64)),
        ("int64", struct.pack("<q", 2**62), struct.pack("<q", 2**62 - 1), ElementDifference(1, 1, (0,), 1.0)),
        ("uint64", struct.pack("<Q", 2**64 - 1), struct.pack("<Q", 0), ElementDifference(1, 1, (0,), 2.0**64)),
        ("uint64", struct.pack("<Q", 2**64 - 1), struct.pack("<Q", 2**64 - 3), ElementDifference(1, 1, (0,), 2.0)),
        ("bool", b"\x00\x01", b"\x01\x01", ElementDifference(2, 1, (0,), 1.0)),
        ("bool", b"\x01", b"\x02", ElementDifference(1, 1, (0,), 0.0)),
        ("float4_e2m1fn_x2", b"\x12\x34", b"\x12\x35", ElementDifference(2, 1, (1,))),
    ],
)
def test_what_is_told_of_these_elements(dtype, reference, own, expected):
    shape = (expected.num_elements,)
    assert measure(reference, own, dtype, shape) == expected
    assert measure(own, reference, dtype, shape) == ElementDifference(
        **{
            **vars(expected),
            "nan": expected.reference_nan,
            "inf": expected.reference_inf,
            "reference_nan": expected.nan,
            "reference_inf": expected.inf,
        }
    )


@pytest.mark.parametrize("dtype", ITEM_BYTES)
def test_every_type_is_measured_in_every_bit(dtype):
    """Each bit of one element in the middle is turned."""
    size = ITEM_BYTES[dtype]
    reference = bytes(range(1, 1 + 3 * size))
    for bit in range(8 * size):
        own = bytearray(reference)
        own[size + bit // 8] ^= 1 << bit % 8
        found = measure(reference, own, dtype, (1, 3))
        assert (found.num_elements, found.num_different, found.first_index) == (3, 1, (0, 1))
        assert_alike(found, slow_measure(reference, bytes(own), dtype, (1, 3), 0))


@pytest.mark.parametrize("dtype", [name for name in FLOATS if ITEM_BYTES[name] == 1])
def test_pairs_of_eight_bit_floats(dtype):
    for old in (*range(0, 256, 11), 0x7B, 0x7C, 0x7E, 0x7F, 0x80, 0x81, 0xFC, 0xFE, 0xFF):
        for new in range(256):
            one, other = pattern(dtype, old), pattern(dtype, new)
            assert measure(one, other, dtype, (1,)) == slow_measure(one, other, dtype, (1,), 0), (old, new)


@pytest.mark.parametrize("dtype", SMALL_FLOATS)
def test_neighbours_are_one_apart_and_the_ends_as_many_as_there_are_numbers(dtype):
    ordered = [pattern(dtype, bits) for bits in places(dtype)]
    found = measure(b"".join(ordered[:-1]), b"".join(ordered[1:]), dtype, (len(ordered) - 1,))
    assert (found.num_different, found.max_ulp) == (len(ordered) - 1, 1)
    assert measure(ordered[0], ordered[-1], dtype, ()).max_ulp == len(ordered) - 1


@pytest.mark.parametrize("dtype", SMALL_FLOATS)
def test_nans_and_infinities_are_counted_among_all_patterns(dtype):
    size = ITEM_BYTES[dtype]
    data = b"".join(pattern(dtype, bits) for bits in range(256**size))
    numbers = torch.frombuffer(bytearray(data), dtype=torch.uint8).view(getattr(torch, dtype)).to(torch.float64)
    zeros = bytes(len(data)) if dtype != "float8_e8m0fnu" else b"\x01" * len(data)
    found = measure(zeros, data, dtype, (256**size,))
    assert (found.nan, found.inf) == (int(numbers.isnan().sum()), int(numbers.isinf().sum()))
    assert (found.reference_nan, found.reference_inf) == (0, 0)
    assert measure(data, zeros, dtype, (256**size,)).reference_nan == found.nan


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "bfloat16", "complex64", "int64", "uint8", "bool"])
def test_a_large_item_is_measured_as_torch_sees_it(dtype):
    """More than one slice, and differences in each."""
    kind = getattr(torch, dtype)
    generator = torch.Generator().manual_seed(7)
    shape = (3, 1000, 211)
    numbers = torch.randn(shape, generator=generator, dtype=torch.complex64 if kind.is_complex else torch.float64)
    one = (numbers * 50).to(torch.int32).to(kind) if dtype in ("uint8", "bool") else (numbers * 50).to(kind)
    other = one.clone()
    at = torch.randperm(one.numel(), generator=generator)[:5000]
    other.view(-1)[at] = one.view(-1)[at.roll(1)]
    same = one.view(-1) == other.view(-1)
    wide = (
        torch.complex128 if kind.is_complex else torch.int64 if dtype in ("int64", "bool", "uint8") else torch.float64
    )
    found = measure(bytes_of(one), bytes_of(other), dtype, shape)
    assert found.num_different == int((~same).sum()) > 0
    assert found.first_index == tuple((one != other).nonzero()[0].tolist())
    assert found.max_abs == pytest.approx(float((other.to(wide) - one.to(wide)).abs().max()), rel=1e-14)
    assert found.num_elements == one.numel()


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def test_any_buffer_will_do():
    one, other = floats(1, 2, 3), floats(1, 2, 4)
    expected = ElementDifference(3, 1, (2,), 1.0, 1 << 22)
    tensors = [torch.frombuffer(bytearray(data), dtype=torch.uint8) for data in (one, other)]
    strided = [tensor.repeat_interleave(2)[::2] for tensor in tensors]
    unaligned = [memoryview(b"." + data)[1:] for data in (one, other)]
    numbers = [np.frombuffer(data, np.float32).data for data in (one, other)]
    for reference, own in ([one, other], [bytearray(one), memoryview(other)], tensors, strided, unaligned, numbers):
        assert measure(reference, own, "float32", (3,)) == expected
    assert measure(b"", torch.empty(0, dtype=torch.uint8), "float32", (0, 4)) == ElementDifference(0)


@pytest.mark.parametrize(
    ("reference", "own", "dtype", "shape", "start", "message"),
    [
        (bytes(8), bytes(4), "float32", (2,), 0, "hold 8 and 4 bytes"),
        (bytes(6), bytes(6), "float32", (2,), 0, "whole elements of 4 bytes"),
        (bytes(8), bytes(8), "float32", (2,), 1, r"elements 1 to 3 are not in shape \[2\]"),
        (bytes(4), bytes(4), "float32", (2,), -1, "elements -1 to 0"),
        (bytes(4), bytes(4), "float31", (2,), 0, "'float31' cannot be compared; expected one of bool, "),
        (torch.zeros(2), torch.zeros(2), "float32", (2,), 0, "expected a 1-D uint8 tensor on the CPU"),
    ],
)
def test_what_is_no_range_of_an_item_is_refused(reference, own, dtype, shape, start, message):
    with pytest.raises(ValueError, match=message):
        measure(reference, own, dtype, shape, start)


@pytest.mark.parametrize("dtype", ["uint8", "float64", "complex128", "float8_e5m2"])
def test_memory_is_bounded_where_all_elements_differ(dtype):
    size = 48 << 20
    one = torch.ones(size, dtype=torch.uint8)
    other = torch.full((size,), 3, dtype=torch.uint8)
    tracemalloc.start()
    try:
        found = measure(one, other, dtype, (size // ITEM_BYTES[dtype],))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found.num_different == found.num_elements
    assert peak < 24 << 20
