"""How FULL cuts the bytes of tensors into chunks, and where chunks differ. On ranks: tests/test_replication_check.py."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from forgather_ckpt import bytewise
from forgather_ckpt.bytewise import HOST, Segment
from forgather_ckpt.structure import TensorItem

DEVICE = torch.device("meta")
"""Any that is not the host."""

SIZES = st.lists(st.integers(0, 700), max_size=30)


def items_of(sizes: list[int], dtype: torch.dtype = torch.uint8) -> list[TensorItem]:
    return [TensorItem(f"t{number}", number, torch.zeros(size, dtype=dtype)) for number, size in enumerate(sizes)]


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bytewise, "CHUNK_BYTES", 256)
    monkeypatch.setattr(bytewise, "_ALONE_BYTES", 64)
    monkeypatch.setattr(bytewise, "_MIN_SPLIT_BYTES", 32)
    monkeypatch.setattr(bytewise, "_SLOT_BYTES", 16)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("device", [HOST, DEVICE])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.complex128])
def test_chunks_hold_every_byte_once_in_order_and_whole_elements(device: torch.device, dtype: torch.dtype) -> None:
    @given(SIZES)
    def check(sizes: list[int]) -> None:
        items = items_of(sizes, dtype)
        chunks = list(bytewise.chunks(items, device))
        assert all(0 < sum(segment.num_bytes for segment in chunk) <= 256 for chunk in chunks)
        for item in items:
            own = [segment for chunk in chunks for segment in chunk if segment.item is item]
            if device == HOST:
                own.sort(key=lambda segment: segment.start)
            assert [segment.start for segment in own] == [0, *(segment.stop for segment in own)][: len(own)]
            assert (own[-1].stop if own else 0) == item.num_bytes
            assert all(segment.start % dtype.itemsize == segment.stop % dtype.itemsize == 0 for segment in own)

    check()


@pytest.mark.usefixtures("small_chunks")
@given(SIZES)
def test_on_a_device_chunks_are_full_but_for_a_rest_that_is_not_worth_a_cut(sizes: list[int]) -> None:
    *chunks, _ = [*bytewise.chunks(items_of(sizes), DEVICE), []]
    for chunk in chunks[:-1]:
        assert sum(segment.num_bytes for segment in chunk) > 256 - 32 - 16


@pytest.mark.usefixtures("small_chunks")
@given(st.integers(1, 300), st.integers(0, 8), st.integers(0, 8), st.data())
def test_the_slots_that_differ_are_found_at_any_alignment(
    size: int, one_shift: int, other_shift: int, data: st.DataObject
) -> None:
    one = torch.randint(0, 256, (size + 16,), dtype=torch.uint8)[one_shift : one_shift + size]
    other = torch.zeros(size + 16, dtype=torch.uint8)[other_shift : other_shift + size]
    other.copy_(one)
    changed = data.draw(st.sets(st.integers(0, size - 1), max_size=3))
    for place in changed:
        other[place] ^= 1 << data.draw(st.integers(0, 7))
    slots = bytewise._differing_slots(one, other)
    found = set() if slots is None else set(slots.nonzero().flatten().tolist())
    assert found == {place // 16 for place in changed}


@pytest.mark.usefixtures("small_chunks")
def test_slots_are_told_as_parts_of_the_tensors_that_lie_in_them() -> None:
    first, second = items_of([40, 100])
    chunk = [Segment(first, 8, 40), Segment(second, 0, 60)]  # at 0-32 and 32-92 of the chunk
    assert list(bytewise._touched(chunk, [])) == []
    assert list(bytewise._touched(chunk, [1, 2, 5])) == [
        Segment(first, 24, 40),
        Segment(second, 0, 16),
        Segment(second, 48, 60),
    ]


def test_what_a_rank_needs_on_top_is_bounded() -> None:
    """Of a tebibyte, none of it contiguous: what is put together is there twice, and a flag a slot is kept."""
    chunk = bytewise.CHUNK_BYTES
    under_way, own, flags = bytewise._IN_FLIGHT * chunk, 2 * chunk, (1 << 40) // bytewise._SLOT_BYTES
    assert under_way + own + flags <= 256 << 20
    assert under_way + chunk + chunk // 8 + flags <= 256 << 20


def test_blocks_of_a_segment() -> None:
    [item] = items_of([1])
    mib = 1 << 20
    for start, stop in itertools.combinations(range(0, 12 * mib, mib), 2):
        blocks = bytewise._blocks(Segment(item, start, stop))
        assert list(blocks) == sorted({byte // (4 * mib) for byte in range(start, stop, mib)})
