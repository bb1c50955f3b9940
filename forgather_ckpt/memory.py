"""The bytes of live tensors: read in C order block by block, and written in place."""

import ctypes
import itertools
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch

from forgather_ckpt import hashtree
from forgather_ckpt.hashtree import BLOCK_BYTES
from forgather_ckpt.structure import AliasItem, TensorItem, ValueItem

WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}
"""By size of an element: torch cannot copy every dtype, but all bits of one of the same size."""

_buffers = threading.local()

_SPAN_BYTES = 8 * BLOCK_BYTES
"""What one task of a thread hashes: a run of small tensors, or a part of a large one."""


def flat_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's elements in C order as 1-D uint8, sharing its memory where it is contiguous, else a copy."""
    dense = tensor.detach() if tensor.requires_grad else tensor
    if not is_flat(dense):
        plain = dense.resolve_conj().resolve_neg()
        # torch cannot copy every type of one byte
        dense = (plain.view(torch.uint8) if plain.element_size() == 1 else plain).contiguous()
    return _lying_bytes(dense)


def _lying_bytes(dense: torch.Tensor) -> torch.Tensor:
    """Of a tensor that `is_flat`."""
    if not (count := dense.numel()):
        return torch.empty(0, dtype=torch.uint8)
    # not reshape(-1), which keeps the stride of a single element, whatever that is, and `view` wants it to be 1
    return dense.as_strided((count,), (1,)).view(torch.uint8)


def is_flat(tensor: torch.Tensor) -> bool:
    """Whether the bytes of the tensor's elements lie in memory in C order."""
    return tensor.is_contiguous() and not (tensor.is_conj() or tensor.is_neg())


def byte_range(tensor: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """Bytes `start` to `stop` (whole elements) of the tensor's elements in C order, as 1-D uint8 on its device.

    Shares its memory where it is contiguous; of any other layout, only that range is copied.
    """
    if is_flat(tensor):
        flat = _lying_bytes(tensor.detach() if tensor.requires_grad else tensor)
        return flat if stop - start == tensor.nbytes else flat[start:stop]
    size = tensor.element_size()
    parts = [flat_bytes(part) for part in _element_range(tensor.detach(), start // size, stop // size)]
    return parts[0] if len(parts) == 1 else torch.cat(parts) if parts else flat_bytes(tensor.flatten()[:0])


def _element_range(tensor: torch.Tensor, start: int, stop: int) -> Iterator[torch.Tensor]:
    """Views that hold the elements `start` to `stop` in C order, one after the other."""
    if start == 0 and stop == tensor.numel():
        yield tensor
        return
    if start == stop:
        return
    row = tensor.numel() // tensor.shape[0]
    first, last = start // row, -(-stop // row)
    if start > first * row:
        yield from _element_range(tensor[first], start - first * row, min(stop - first * row, row))
        first += 1
    whole = max(first, min(last, stop // row))
    if whole > first:
        yield tensor[first:whole]
    if last > whole:
        yield from _element_range(tensor[whole], 0, stop - whole * row)


def host_view(flat: torch.Tensor) -> memoryview:
    """The memory of a contiguous uint8 CPU tensor, without a copy. Valid as long as the tensor is."""
    return flat.numpy().data


def bounce_buffer(*, pinned: bool) -> torch.Tensor:
    """This thread's host buffer of one block. Fresh memory for every request would cost more than reading into it."""
    key = "pinned" if pinned else "plain"
    if not hasattr(_buffers, key):
        setattr(_buffers, key, torch.empty(BLOCK_BYTES, dtype=torch.uint8, pin_memory=pinned))
    buffer: torch.Tensor = getattr(_buffers, key)
    return buffer


def gathered(parts: Sequence[torch.Tensor]) -> tuple[memoryview, list[memoryview]]:
    """A copy of 1-D uint8 tensors, of a block together at most, one after the other in host memory; and
    each part of it. What is live may change from now on. Valid until this thread asks again."""
    ends = list(itertools.accumulate(part.numel() for part in parts))
    devices = {part.device for part in parts}
    is_host = all(device.type == "cpu" for device in devices)
    buffer = bounce_buffer(pinned=not is_host)
    if len(devices) == 1 and not is_host:  # one copy from the device, not one for each
        parts = [torch.cat(list(parts))] if len(parts) > 1 else parts
        buffer[: ends[-1]].copy_(parts[0])
    else:
        for part, end in zip(parts, ends, strict=True):
            buffer[end - part.numel() : end].copy_(part)
    copy = host_view(buffer)[: ends[-1]]
    return copy, [copy[start:end] for start, end in itertools.pairwise([0, *ends])]


def wait_for_devices(tensors: Iterable[torch.Tensor]) -> None:
    """Wait for what was launched on any stream of the tensors' devices: other threads shall read them now."""
    for device in {tensor.device for tensor in tensors}:
        if device.type == "cuda":
            torch.cuda.synchronize(device)


def blocks(flat: torch.Tensor, start: int, stop: int) -> Iterator[memoryview]:
    """Bytes `start` to `stop` of a `flat_bytes` tensor in host memory, at most one block at a time.

    A view is valid until the next one is asked for.
    """
    if flat.device.type == "cpu":
        view = host_view(flat)
        for at in range(start, stop, BLOCK_BYTES):
            yield view[at : min(stop, at + BLOCK_BYTES)]
        return
    bounce = torch.empty(min(BLOCK_BYTES, stop - start), dtype=torch.uint8, pin_memory=True)
    for at in range(start, stop, BLOCK_BYTES):
        length = min(stop - at, BLOCK_BYTES)
        bounce[:length].copy_(flat[at : at + length])
        yield host_view(bounce)[:length]


def num_threads() -> int:
    """Threads for hashing, reading and writing: this process's share of the machine's cores, at most 4."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(4, (os.cpu_count() or 1) // processes))


def block_digests(
    items: Iterable[TensorItem], on_progress: Callable[[], None] = lambda: None
) -> dict[str, tuple[bytes, ...]]:
    """The block digests of tensors, or parts of them, by key, on the host: equal content in another layout or on another device
    has equal ones. `hashtree.join` makes a tensor's logical digest of them."""
    names: list[str] = []
    spans: list[list[_Part]] = [[]]
    span_bytes = 0
    for item in items:
        size, is_lying = item.num_bytes, item.tensor.is_cpu and is_flat(item.tensor)
        # what has to be copied is copied by its task, so it is one task's as a whole
        step = _SPAN_BYTES if is_lying else max(1, size)
        for start in range(0, size or 1, step):
            stop = min(size, start + step)
            if span_bytes >= _SPAN_BYTES:
                spans.append([])
                span_bytes = 0
            spans[-1].append(_Part(item.tensor, start, stop, is_lying))
            span_bytes += stop - start
            names.append(item.key)
    found: dict[str, tuple[bytes, ...]] = {}
    with ThreadPoolExecutor(num_threads()) as pool:
        number = 0
        for digests in pool.map(_span_digests, spans):
            for some in digests:
                name = names[number]
                found[name] = found[name] + some if name in found else some
                number += 1
            on_progress()
    return found


class _Part(NamedTuple):
    """Bytes `start` to `stop` of a tensor; `is_lying` in host memory as they are."""

    tensor: torch.Tensor
    start: int
    stop: int
    is_lying: bool


def _span_digests(span: Sequence[_Part]) -> list[tuple[bytes, ...]]:
    return [
        _lying_digests(part) if part.is_lying else _copied_digests(part) if part.stop else (hashtree.digest(b""),)
        for part in span
    ]


def _copied_digests(part: _Part) -> tuple[bytes, ...]:
    return tuple(hashtree.digest(block) for block in blocks(flat_bytes(part.tensor), part.start, part.stop))


def _lying_digests(part: _Part) -> tuple[bytes, ...]:
    """Of the memory itself: for thousands of small tensors, a view by torch would cost more than the digest."""
    size = part.stop - part.start
    if size == 0:
        return (hashtree.digest(b""),)
    view = memoryview((ctypes.c_char * size).from_address(part.tensor.data_ptr() + part.start))
    if size <= BLOCK_BYTES:
        return (hashtree.digest(view),)
    return tuple(hashtree.digest(view[start:stop]) for start, stop in hashtree.block_bounds(size))


def records(
    tensors: Iterable[TensorItem],
    values: Iterable[ValueItem],
    aliases: Iterable[AliasItem],
    digests: Mapping[str, bytes],
) -> Iterator[tuple[str, bytes, bytes]]:
    """The records of items in the digest of their state (`hashtree.state_digest`), given their tensors' logical
    digests by name."""
    for item in tensors:
        yield item.key, item.structure, digests[item.key]
    for value in values:
        yield value.name, b"value", hashtree.digest(value.data)
    for alias in aliases:
        yield alias.name, b"alias", hashtree.digest(alias.target.encode())
