"""What parts of tensors add to the digests of the whole ones, taken where they lie (`multilinear`, on a GPU).

The digest of the host, xxh3, is of bytes in one order, and a shard has no say in it. That of the device is a sum over
all bytes, each at its place in the whole tensor. So each rank stores the sum over its part, and whoever reads the
indexes of all of them has the digest of a tensor that nobody ever held.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import torch

from forgather_ckpt import device_digest, digests, memory, multilinear
from forgather_ckpt.boxes import Box, inside, overlap, rectangles, volume, whole_box
from forgather_ckpt.digests import Blocks
from forgather_ckpt.hashtree import BLOCK_BYTES
from forgather_ckpt.index import Lanes
from forgather_ckpt.structure import TensorItem


def lanes(items: Iterable[TensorItem], known: Blocks) -> dict[str, Lanes]:
    """By key what each item on a device adds to the blocks of its tensor. Items on the host have no such digests.

    `known` are block digests of whole tensors that have been taken already.
    """
    found: dict[str, Lanes] = {}
    parts: list[_Part] = []
    for item in items:
        if digests.is_on_host(item):
            continue
        if item.box is None and item.key in known:
            found[item.key] = Lanes(0, b"".join(known[item.key]))
        else:
            parts.append(_Part(item))
    for device in {part.item.tensor.device for part in parts}:
        own = [part for part in parts if part.item.tensor.device == device]
        found.update(_taken(own))
    return found


class _Part(NamedTuple):
    """A part, and where its bytes lie in the whole tensor's."""

    item: TensorItem

    @property
    def box(self) -> Box:
        return whole_box(self.item.shape) if self.item.box is None else self.item.box

    def place(self, index: Iterable[int]) -> int:
        """The place in C order of the element at `index`."""
        position = 0
        for at, length in zip(index, self.item.shape, strict=True):
            position = position * length + at
        return position

    @property
    def elements(self) -> tuple[int, int]:
        """From its first element to its last one, in C order of the whole tensor."""
        if not self.item.tensor.numel():
            return 0, 0
        return self.place(start for start, _ in self.box), self.place(stop - 1 for _, stop in self.box) + 1

    @property
    def lies_together(self) -> bool:
        first, last = self.elements
        return last - first == self.item.tensor.numel()


def _taken(parts: list[_Part]) -> Mapping[str, Lanes]:
    """Of parts on one device, in one pass over all of them."""
    sums = device_digest.block_lanes(_runs(parts))
    found = {}
    for number, part in enumerate(parts):
        size = part.item.tensor.element_size()
        first, last = (place * size for place in part.elements)
        blocks = range(first // BLOCK_BYTES, max(first // BLOCK_BYTES + 1, -(-last // BLOCK_BYTES)))
        own = []
        for block in blocks:
            lane = sums.get((number, block), (0, 0))
            if not part.lies_together:
                lane = multilinear.add([lane, multilinear.length(-_num_filled(part, block))])
            own.append(multilinear.digest(lane))
        found[part.item.key] = Lanes(blocks.start, b"".join(own))
    return found


def _runs(parts: list[_Part]) -> Iterator[tuple[int, torch.Tensor, int]]:
    """The parts as what `block_lanes` takes. One that does not lie together goes, some blocks at a time, into a buffer of
    zeros, which add nothing to a sum but their number."""
    for number, part in enumerate(parts):
        tensor, size = part.item.tensor, part.item.tensor.element_size()
        first, last = part.elements
        if part.lies_together:
            yield number, tensor, first * size
            continue
        step = device_digest.COPIED_BYTES // size
        for start in range(first // step * step, last, step):
            stop = min(start + step, volume(whole_box(part.item.shape)))
            yield number, _filled(part, start, stop), start * size


def _filled(part: _Part, start: int, stop: int) -> torch.Tensor:
    """The elements `start` to `stop` of the whole tensor, zero where the part does not have them."""
    words = memory.WORDS[part.item.tensor.element_size()]
    source = part.item.tensor.view(words)
    buffer = torch.zeros(stop - start, dtype=words, device=source.device)
    position = 0
    for box in rectangles(whole_box(part.item.shape), start, stop):
        if (common := overlap(box, part.box)) is not None:
            there = buffer[position : position + volume(box)].view([high - low for low, high in box])
            there[inside(common, box)] = source[inside(common, part.box)]
        position += volume(box)
    return buffer


def _num_filled(part: _Part, block: int) -> int:
    """How many bytes of zeros a block of the buffer has."""
    size = part.item.tensor.element_size()
    total = volume(whole_box(part.item.shape))
    start, stop = (min(total, at * BLOCK_BYTES // size) for at in (block, block + 1))
    common = (overlap(box, part.box) for box in rectangles(whole_box(part.item.shape), start, stop))
    return size * (stop - start - sum(volume(box) for box in common if box is not None))
