"""FULL: the bytes of all copies compared, sent chunk by chunk from one holder to the others, in bounded memory."""

import itertools
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from forgather_ckpt import bulk, digests, memory
from forgather_ckpt.bulk import Channel
from forgather_ckpt.hashtree import BLOCK_BYTES
from forgather_ckpt.holdings import Holding
from forgather_ckpt.job import Job
from forgather_ckpt.replication import Verdict, vote
from forgather_ckpt.structure import TensorItem
from forgather_ckpt.topology import Ranks

CHUNK_BYTES = 60 << 20
"""What is sent at once. A rank needs so much memory for each that is under way, once more to compare, and once more to put
together what is not contiguous: with what is noted of each chunk, all within 256 MiB."""
_IN_FLIGHT = 2
_ALONE_BYTES = 1 << 20
"""From host memory, where copies are slow, a part of a tensor so large is sent from where it lies."""
_MIN_SPLIT_BYTES = 1 << 20
"""Tensors are cut to fill a chunk, but not for less than this."""
_SLOT_BYTES = 64 << 10
"""Where a chunk differs is told this precisely."""

HOST = torch.device("cpu")

Suspects = Mapping[int, Mapping[str, Sequence[int]]]
"""Portion number -> key -> blocks that differ from those of ranks with the same digest."""


class Compared(NamedTuple):
    """What comparing all bytes has found. Ranks are together in a verdict only if all their bytes are equal."""

    verdicts: Mapping[int, Verdict]
    suspects: Suspects
    """Where this rank's bytes differ from those of its class' first."""
    own_seconds: Mapping[int, float]
    """Portion number -> what this rank spent on it, with what it waited for bytes."""
    seconds: float
    """On rank 0."""


class Segment(NamedTuple):
    """Bytes `start` to `stop` of a tensor."""

    item: TensorItem
    start: int
    stop: int

    @property
    def num_bytes(self) -> int:
        return self.stop - self.start


def compare(job: Job, compared: Sequence[Holding], verdicts: Mapping[int, Verdict]) -> Compared:
    """Compare the bytes of the portions of `verdicts` among the ranks that their digests put together.

    Every rank calls it with the same `verdicts`. Copies that the digests tell apart are not compared again.
    """
    started = time.perf_counter()
    lead = {number: verdict.majority[0] for number, verdict in verdicts.items()}

    def links() -> dict[str, str]:
        return {str(one.number): _device_of(one) for one in compared if one.number in verdicts}

    suspects: dict[int, Mapping[str, Sequence[int]]] = {}
    own_seconds: dict[int, float] = {}
    fast = job.comm.agree("choosing how to compare bytes", links, lambda links: _fast_portions(links, verdicts))

    def differing() -> list[int]:
        found = []
        for holding in sorted(compared, key=lambda one: one.number):
            if holding.number not in verdicts:
                continue
            begun = time.perf_counter()
            own = next(ranks for ranks in verdicts[holding.number].classes if job.comm.rank in ranks)
            if len(own) > 1 and (names := _compare(job, holding, own, is_fast=holding.number in fast)):
                suspects[holding.number] = names
                found.append(holding.number)
            own_seconds[holding.number] = time.perf_counter() - begun
        return found

    def decide(reports: list[list[int]]) -> dict[str, Any]:
        told = {}
        for number, verdict in verdicts.items():
            # a rank whose bytes differ from those of its class' first is alone: nobody knows what else it equals
            copies = {
                rank: (place, rank if number in reports[rank] else -1)
                for place, ranks in enumerate(verdict.classes)
                for rank in ranks
            }
            told[str(number)] = [list(ranks) for ranks in vote(copies, lead.get(number)).classes]
        return {"classes": told, "seconds": time.perf_counter() - started}

    with job.channels.guard():
        told = job.comm.agree("comparing all bytes", differing, decide)
    found = {int(number): Verdict(tuple(map(tuple, classes))) for number, classes in told["classes"].items()}
    return Compared(found, suspects, own_seconds, told["seconds"])


def _device_of(holding: Holding) -> str:
    """The one device of all tensors of a portion that are not in host memory; empty where there is none such."""
    devices = {item.tensor.device for item in holding.tensors.values() if not digests.is_on_host(item)}
    if len(devices) != 1 or not bulk.is_fast(device := devices.pop()):
        return ""
    return str(torch.cuda.get_device_properties(device).uuid)


def _fast_portions(links: Sequence[Mapping[str, str]], verdicts: Mapping[int, Verdict]) -> list[int]:
    """The portions that every holder has on a device of its own."""
    fast = []
    for number, verdict in verdicts.items():
        devices = [links[rank][str(number)] for ranks in verdict.classes for rank in ranks]
        if all(devices) and len(set(devices)) == len(devices):
            fast.append(number)
    return fast


def _compare(job: Job, holding: Holding, ranks: Ranks, *, is_fast: bool) -> dict[str, list[int]]:
    """The blocks of this rank's tensors that differ from those of the first of `ranks`, by name."""
    found: dict[str, list[int]] = {}
    items = [holding.tensors[name] for name in sorted(holding.tensors)]
    on_device = [item for item in items if is_fast and not digests.is_on_host(item)]
    on_host = [item for item in items if not (is_fast and not digests.is_on_host(item))]
    for some in (on_device, on_host):
        if some:
            device = some[0].tensor.device if some is on_device else HOST
            channel = job.channels.among(ranks, device)
            for segment in _differing_segments(channel, some, device, job.comm.rank):
                blocks = found.setdefault(segment.item.key, [])
                blocks += (block for block in _blocks(segment) if block not in blocks)
    return found


def _blocks(segment: Segment) -> range:
    return range(segment.start // BLOCK_BYTES, -(-segment.stop // BLOCK_BYTES))


def chunks(items: Iterable[TensorItem], device: torch.device) -> Iterator[list[Segment]]:
    """All bytes of the tensors, at most a chunk at a time."""
    chunk: list[Segment] = []
    room = CHUNK_BYTES
    for item in items:
        start = 0
        while start < item.num_bytes:
            left = item.num_bytes - start
            if device == HOST and left >= _ALONE_BYTES:
                yield [Segment(item, start, start + min(left, CHUNK_BYTES))]
                start += CHUNK_BYTES
                continue
            if left > room and room < _MIN_SPLIT_BYTES:
                yield chunk
                chunk, room = [], CHUNK_BYTES
            size = left if left <= room else room // 16 * 16  # whole elements
            chunk.append(Segment(item, start, start + size))
            start, room = start + size, room - size
    if chunk:
        yield chunk


def _differing_segments(
    channel: Channel, items: Sequence[TensorItem], device: torch.device, rank: int
) -> Iterator[Segment]:
    source = channel.ranks[0]
    free: list[torch.Tensor] = []
    under_way: deque[tuple[list[Segment], torch.Tensor, Any]] = deque()
    compared: list[tuple[list[Segment], torch.Tensor]] = []

    def finish_one() -> None:
        chunk, data, work = under_way.popleft()
        channel.finish(work)
        if rank != source:
            if (slots := _differing_slots(data, _bytes(chunk, device))) is not None:
                compared.append((chunk, slots))
            free.append(data.as_strided((CHUNK_BYTES,), (1,), 0))

    for chunk in chunks(items, device):
        if rank == source:
            data = _bytes(chunk, device)
        else:
            # fresh memory for every chunk would cost more than the comparison
            buffer = free.pop() if free else torch.empty(CHUNK_BYTES, dtype=torch.uint8, device=device)
            data = buffer[: sum(segment.num_bytes for segment in chunk)]
        under_way.append((chunk, data, channel.broadcast(data, source)))
        if len(under_way) == _IN_FLIGHT:
            finish_one()
    while under_way:
        finish_one()
    channel.settle()
    if compared:  # one copy from the device, not one a chunk
        flags = torch.cat([slots for _, slots in compared]).cpu()
        if flags.any():
            for (chunk, _), slots in zip(compared, flags.split([len(slots) for _, slots in compared]), strict=True):
                yield from _touched(chunk, slots.nonzero().flatten().tolist())


def _bytes(chunk: Sequence[Segment], device: torch.device) -> torch.Tensor:
    """The bytes of a chunk, one segment after the other: the tensor's own memory where that is possible."""
    parts = [memory.byte_range(segment.item.tensor, segment.start, segment.stop) for segment in chunk]
    if device == HOST:
        parts = [part.cpu() for part in parts]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _differing_slots(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor | None:
    """For each slot of two equally long buffers whether it differs: 1-D bool, on their device, which may still work on
    it. None where it is known already that none does."""
    word = _widest(one, other)
    whole = one.numel() // _SLOT_BYTES * _SLOT_BYTES
    slots = [part[:whole].view(word).view(whole // _SLOT_BYTES, _SLOT_BYTES // word.itemsize) for part in (one, other)]
    if one.device == HOST and torch.equal(*slots) and torch.equal(one[whole:], other[whole:]):
        return None
    found = (slots[0] != slots[1]).any(dim=1)
    return found if whole == one.numel() else torch.cat([found, (one[whole:] != other[whole:]).any().view(1)])


def _widest(*buffers: torch.Tensor) -> torch.dtype:
    """The widest words that all addresses allow, as those are compared fastest; and all places in their storages, which
    may begin anywhere themselves."""
    starts = [start for buffer in buffers for start in (buffer.data_ptr(), buffer.storage_offset())]
    for dtype in (torch.int64, torch.int32, torch.int16):
        if all(start % dtype.itemsize == 0 for start in starts):
            return dtype
    return torch.uint8


def _touched(chunk: Sequence[Segment], slots: Sequence[int]) -> Iterator[Segment]:
    """The parts of a chunk's segments that lie in some slots."""
    ends = list(itertools.accumulate(segment.num_bytes for segment in chunk))
    for segment, end in zip(chunk, ends, strict=True):
        begin = end - segment.num_bytes
        for slot in slots:
            first, last = max(begin, slot * _SLOT_BYTES), min(end, (slot + 1) * _SLOT_BYTES)
            if first < last:
                yield Segment(segment.item, segment.start + first - begin, segment.start + last - begin)
