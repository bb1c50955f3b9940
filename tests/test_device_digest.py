"""The digest that GPUs take, in torch's own operators: against the formula in plain Python, for all types and layouts."""

from __future__ import annotations

import functools
import itertools
import math
import sys
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from forgather_ckpt import device_digest, dtypes, memory, multilinear
from forgather_ckpt.hashtree import BLOCK_BYTES
from forgather_ckpt.multilinear import PRIME, ROW_BYTES, ROW_WORDS
from tests.states import tensor_of

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")

RANDOM = torch.frombuffer(bytearray(np.random.default_rng(7).bytes(3 * BLOCK_BYTES)), dtype=torch.uint8)


def tensor_bytes(tensor: torch.Tensor) -> bytes:
    """The elements in C order, whatever the strides, also of types that torch cannot copy."""
    plain = tensor.detach().resolve_conj().resolve_neg()
    elements = plain.view(torch.uint8) if plain.element_size() == 1 else plain
    dense = torch.empty(elements.shape, dtype=elements.dtype).copy_(elements)
    return dense.view(-1).view(torch.uint8).numpy().tobytes() if dense.numel() else b""


# ---- the formula, the obvious way


def reference_lanes(data: bytes, row: int = 0) -> tuple[int, int]:
    """`sum of word * A[row] * B[column] + num_bytes * L  (mod p)` of a block, or of rows from `row` of one."""
    words = np.frombuffer(data + bytes(-len(data) % ROW_BYTES), "<u4").astype(object).reshape(-1, ROW_WORDS)
    lanes = []
    for lane in range(multilinear.NUM_LANES):
        by_column = keys_of_rows(lane)[row : row + len(words)] @ words if len(words) else np.zeros(ROW_WORDS, object)
        total = int(by_column @ keys_of_columns(lane)) + len(data) * multilinear.length_keys()[lane]
        lanes.append(total % PRIME)
    return lanes[0], lanes[1]


@functools.cache
def keys_of_rows(lane: int) -> Any:
    return np.array(multilinear.row_keys()[lane], dtype=object)


@functools.cache
def keys_of_columns(lane: int) -> Any:
    return np.array(multilinear.column_keys()[lane], dtype=object)


def reference(data: bytes) -> tuple[bytes, ...]:
    blocks = [data[at : at + BLOCK_BYTES] for at in range(0, len(data), BLOCK_BYTES)] or [b""]
    return tuple(b"".join(lane.to_bytes(8, "big") for lane in reference_lanes(block)) for block in blocks)


def digest_of(tensor: torch.Tensor) -> tuple[bytes, ...]:
    [found] = device_digest.block_digests([tensor])
    return found


def test_the_reference_is_the_formula_word_by_word():
    """And the keys are what the documentation says: SplitMix64 from the digits of pi, below 2^56 and p."""
    data = bytes(range(256)) * 20 + b"xyz"
    expected = []
    for lane in range(2):
        total = len(data) * multilinear.length_keys()[lane]
        for at in range(0, len(data), 4):
            row, column = divmod(at // 4, ROW_WORDS)
            word = int.from_bytes(data[at : at + 4], "little")
            total += word * multilinear.row_keys()[lane][row] * multilinear.column_keys()[lane][column]
        expected.append(total % PRIME)
    assert reference_lanes(data) == tuple(expected)
    rows = [key for lane in multilinear.row_keys() for key in lane]
    columns = [key for lane in multilinear.column_keys() for key in lane]
    assert (len(set(rows)), len(set(columns))) == (2 * 1024, 2 * 1024)
    assert max(rows) < 1 << 56
    assert 0 < min(columns) <= max(columns) < PRIME
    assert all(0 < key < PRIME for key in multilinear.length_keys())


def test_a_golden_digest():
    """A digest in a log of last year is compared with today's."""
    data = torch.arange(5000, dtype=torch.int32)
    assert reference(tensor_bytes(data)) == digest_of(data)
    assert digest_of(data)[0].hex() == GOLDEN
    assert multilinear.ALGORITHM == "multilinear61x2"


GOLDEN = "036ab9b45a91e4461dc73a0ffb40a971"


# ---- sizes, types, layouts


def test_every_size_up_to_a_row_and_a_byte():
    tensors = [RANDOM[size : 2 * size].clone() for size in range(4098)]
    found = device_digest.block_digests(tensors)
    assert len(found) == len(tensors)
    for size, (tensor, [digest]) in enumerate(zip(tensors, found, strict=True)):
        if size % 37 < 6 or size > 4080:
            assert (digest,) == reference(tensor_bytes(tensor)), size
        first, second = small_lanes(tensor)
        assert digest == first.to_bytes(8, "big") + second.to_bytes(8, "big"), size


def small_lanes(tensor: torch.Tensor) -> list[int]:
    """Of at most two rows; one product of arrays of Python's integers."""
    data = tensor_bytes(tensor)
    words = np.frombuffer(data + bytes(-len(data) % 4), "<u4").astype(object)
    return [
        int((words * keys_of_words(lane)[: len(words)]).sum() + len(data) * multilinear.length_keys()[lane]) % PRIME
        for lane in range(2)
    ]


@functools.cache
def keys_of_words(lane: int) -> Any:
    return np.concatenate([keys_of_rows(lane)[row] * keys_of_columns(lane) for row in range(2)])


@pytest.mark.parametrize("dtype", dtypes.ITEM_BYTES)
def test_every_type_and_layout(dtype: str):
    base = tensor_of(dtype, (6, 1030))
    layouts = {
        "contiguous": base,
        "transposed": base.t(),
        "sliced": base[1:, 3::7],
        "offset": base.view(-1)[5:],
        "expanded": base[:, :1].expand(6, 9),
        "scalar": base[2, 3],
        "one element with a stride": base.view(-1)[::9000],
        "empty": base[:0],
        "empty column": base[:, 3:3].t(),
        "none": torch.empty(0, dtype=base.dtype),
    }
    if dtype in ("float32", "float64", "complex64", "int32", "bool", "uint8", "bfloat16"):
        layouts["flipped"] = base.flip(0, 1)
    if dtype == "complex64":
        layouts |= {"conjugate": base.conj(), "negative": base.conj().imag, "adjoint": base.mH}
    found = device_digest.block_digests(list(layouts.values()))
    for (name, tensor), digests in zip(layouts.items(), found, strict=True):
        assert digests == reference(tensor_bytes(tensor)), name


@pytest.mark.parametrize("num_bytes", [BLOCK_BYTES - 1, BLOCK_BYTES, BLOCK_BYTES + 1, 2 * BLOCK_BYTES + ROW_BYTES + 5])
@pytest.mark.parametrize("offset", [0, 16, 3])
def test_blocks_end_where_they_should(num_bytes: int, offset: int):
    data = RANDOM[offset : offset + num_bytes]
    assert digest_of(data) == reference_of_random(offset, num_bytes)
    assert digest_of(data.view(-1, 1).expand(-1, 1).t().t()) == reference_of_random(offset, num_bytes)


@functools.cache
def reference_of_random(offset: int, num_bytes: int) -> tuple[bytes, ...]:
    return reference(tensor_bytes(RANDOM[offset : offset + num_bytes]))


def test_a_large_tensor_in_another_layout_is_copied_part_by_part():
    lines = torch.arange(3 * (1 << 20), dtype=torch.int32).view(1 << 10, -1)
    turned = lines.t().contiguous().t()
    assert not turned.is_contiguous()
    expected = digest_of(lines)
    assert len(expected) == 3
    assert digest_of(turned) == expected
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device_digest, "COPIED_BYTES", BLOCK_BYTES)
        assert device_digest.block_digests([turned, lines, turned]) == [expected] * 3


def test_extreme_words_do_not_overflow():
    for word in (-1, 0, -(2**31), 2**31 - 1, 0x0000FFFF, -65536):
        data = torch.full((BLOCK_BYTES // 4,), word, dtype=torch.int32)
        total = [
            (word & 0xFFFFFFFF) * sum(multilinear.row_keys()[lane]) * sum(multilinear.column_keys()[lane])
            + BLOCK_BYTES * multilinear.length_keys()[lane]
            for lane in range(2)
        ]
        assert digest_of(data) == (b"".join((one % PRIME).to_bytes(8, "big") for one in total),)


# ---- what it must tell apart


def test_order_and_length_count():
    words = torch.arange(1, 4097, dtype=torch.int32)

    def with_words(*changes: tuple[int, int]) -> torch.Tensor:
        copy = words.clone()
        for place, word in changes:
            copy[place] = word
        return copy

    different = [
        words,
        with_words((0, 2), (1, 1)),  # in a row
        with_words((0, 1025), (1024, 1)),  # in a column
        with_words((0, 1026), (1025, 1)),
        with_words((5, 6 + 9), (2000, 2001 - 9)),  # the same sum
        with_words((5, 6 ^ 512), (2000, 2001 ^ 512)),  # the same XOR
        with_words((0, 1 + 1), (1, 2 - 2), (2, 3 + 1)),
        words.roll(1),
        words.flip(0),
        torch.cat([words[1024:2048], words[:1024], words[2048:]]),  # two rows swapped
        torch.cat([words, torch.zeros(1, dtype=torch.int32)]),
        torch.cat([words, torch.zeros(1024, dtype=torch.int32)]),
        words[:-1],
        torch.zeros(0, dtype=torch.int32),
        *(torch.zeros(size, dtype=torch.int32) for size in (1, 2, 1024, 1025)),
        *(torch.zeros(size, dtype=torch.uint8) for size in (1, 2, 3)),
    ]
    found = device_digest.block_digests(different)
    assert len(set(found)) == len(different)


def test_every_single_bit_counts():
    data = RANDOM[:5000].clone()
    seen = {digest_of(data)}
    places = [*range(0, 5000, 97), 4095, 4096, 4099, 4999]
    for place in places:
        for bit in range(8):
            data[place] ^= 1 << bit
            seen.add(digest_of(data))
            data[place] ^= 1 << bit
    assert len(seen) == 1 + 8 * len(set(places))


# ---- parts add up


@settings(max_examples=60)
@given(
    cuts=st.lists(st.integers(0, 2 * BLOCK_BYTES + 777), max_size=6),
    order=st.randoms(use_true_random=False),
    is_turned=st.booleans(),
)
def test_the_lanes_of_parts_add_up_to_those_of_the_whole(cuts: list[int], order: Any, is_turned: bool):
    """Wherever they are cut, in whatever order they come, and whatever their layout."""
    num_bytes = 2 * BLOCK_BYTES + 777
    ends = sorted({0, *cuts, num_bytes})
    parts = []
    for start, stop in itertools.pairwise(ends):
        part = RANDOM[start:stop]
        if is_turned:
            part = torch.stack([part, part], dim=1)[:, 0]
        parts.append((5, part, start))
    order.shuffle(parts)
    total: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
    half = len(parts) // 2
    for some in (parts[:half], parts[half:]):  # as on two ranks
        for key, lanes in device_digest.block_lanes(some).items():
            total[key].append(lanes)
    found = {key: multilinear.digest(multilinear.add(lanes)) for key, lanes in total.items()}
    assert found == {(5, block): digest for block, digest in enumerate(reference_of_random(0, num_bytes))}


def test_parts_that_begin_anywhere():
    data = RANDOM[: 3 * ROW_BYTES + 11]
    for cut in [*range(0, 20), *range(ROW_BYTES - 5, ROW_BYTES + 5), 3 * ROW_BYTES, 3 * ROW_BYTES + 10]:
        lanes = device_digest.block_lanes([(0, data[cut:], cut), (0, data[:cut], 0)])
        assert {key: multilinear.digest(one) for key, one in lanes.items()} == {(0, 0): digest_of(data)[0]}, cut
        own = device_digest.block_lanes([(0, data[cut:], cut)])[0, 0]
        row, lead = divmod(cut, ROW_BYTES)
        expected = reference_lanes(bytes(lead) + tensor_bytes(data[cut:]), row)
        keys = multilinear.length_keys()
        assert own == ((expected[0] - lead * keys[0]) % PRIME, (expected[1] - lead * keys[1]) % PRIME)


def test_no_parts_and_no_tensors_have_no_lanes():
    assert device_digest.block_lanes([]) == {}
    assert device_digest.block_lanes([(0, torch.empty(0), 0)]) == {}
    assert device_digest.block_digests([]) == []
    assert multilinear.add([]) == (0, 0)


# ---- a kernel that cannot be had


def no_compiler(*_: Any) -> torch.Tensor:
    raise RuntimeError("Failed to find C compiler")


@pytest.mark.parametrize(
    ("take_lanes", "problem"),
    [
        (device_digest.tile_lanes_in_torch, None),
        (lambda tiles, batch: device_digest.tile_lanes_in_torch(tiles, batch) + PRIME, None),  # the same modulo p
        (no_compiler, "Triton's kernel does not run (RuntimeError: Failed to find C compiler)"),
        (
            lambda tiles, batch: device_digest.tile_lanes_in_torch(tiles, batch) + 1,
            "Triton's kernel takes wrong digests",
        ),
        (None, "Triton is not installed"),
    ],
    ids=["right", "unreduced", "no compiler", "wrong", "not installed"],
)
def test_a_kernel_that_does_not_run_or_takes_wrong_digests_is_not_used(monkeypatch, caplog, take_lanes, problem):
    """As in a container without a C compiler, which Triton needs at its first launch."""
    kernel = None if take_lanes is None else SimpleNamespace(tile_lanes=take_lanes)
    monkeypatch.setitem(sys.modules, "forgather_ckpt.triton_digest", kernel)
    found = device_digest._kernel.__wrapped__(torch.device("cpu"))
    told = [] if problem is None else [f"{problem}: digests of tensors on cpu take many times as long"]
    assert (found, caplog.messages) == (None if problem else take_lanes, told)


# ---- ranges of bytes of any layout


@st.composite
def laid_out(draw: Any) -> torch.Tensor:
    """A tensor of any rank and layout: permuted, sliced with steps, expanded, flipped, as a view of one memory."""
    shape = draw(st.lists(st.integers(0, 5), max_size=4))
    dtype = draw(st.sampled_from(["uint8", "bfloat16", "float32", "int64", "complex64", "complex128", "bool"]))
    tensor = tensor_of(dtype, tuple(size * 2 + 1 for size in shape), seed=draw(st.integers(0, 9)))
    for axis, size in enumerate(shape):
        how = draw(st.sampled_from(["all", "part", "every other", "one for all", "flipped"]))
        if how == "part":
            tensor = tensor.narrow(axis, draw(st.integers(0, size)), size)
        elif how == "every other":
            tensor = tensor[(slice(None),) * axis + (slice(draw(st.integers(0, 1)), None, 2),)]
        elif how == "one for all":
            sizes = list(tensor.shape)
            tensor = tensor.narrow(axis, 0, 1).expand(sizes)
        elif how == "flipped":
            tensor = tensor.flip(axis)
    tensor = tensor.permute(draw(st.permutations(range(tensor.dim()))))
    if tensor.is_complex() and draw(st.booleans()):
        tensor = tensor.conj()
    return tensor


@settings(max_examples=300)
@given(tensor=laid_out(), data=st.data())
def test_a_range_of_bytes_is_that_of_the_elements_in_c_order(tensor: torch.Tensor, data: Any):
    size = tensor.element_size()
    start = data.draw(st.integers(0, tensor.numel()))
    stop = data.draw(st.integers(start, tensor.numel()))
    found = memory.byte_range(tensor, start * size, stop * size)
    assert (found.dtype, found.dim()) == (torch.uint8, 1)
    expected = tensor_bytes(tensor)[start * size : stop * size]
    assert found.contiguous().numpy().tobytes() == expected
    assert math.prod(found.shape) == (stop - start) * size


def test_a_range_shares_memory_where_it_can():
    tensor = torch.arange(20.0)
    memory.byte_range(tensor, 4, 12).zero_()
    assert tensor.tolist()[:4] == [0.0, 0.0, 0.0, 3.0]
