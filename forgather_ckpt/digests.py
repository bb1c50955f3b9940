"""The block digests of live tensors, each taken where the tensor lies: `xxh3_128` on the host, `multilinear` on a GPU.

Digests of different algorithms say nothing about each other: whoever compares, compares `device_names` first.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping

import torch

from forgather_ckpt import device_digest, hashtree, memory, multilinear, strict_json
from forgather_ckpt.structure import TensorItem

Blocks = Mapping[str, tuple[bytes, ...]]
"""Tensor's key -> block digests."""


def algorithm(tensor: torch.Tensor) -> str:
    """Of the block digests of a tensor that lies where this one does."""
    return multilinear.ALGORITHM if tensor.is_cuda else hashtree.ALGORITHM


def is_on_host(item: TensorItem) -> bool:
    return not item.tensor.is_cuda


def block_digests(
    items: Iterable[TensorItem], on_progress: Callable[[], None] = lambda: None, *, on_host: bool = False
) -> Blocks:
    """The block digests of tensors, or parts of them. With `on_host`, all are xxh3: a copy of one block at a time for a GPU's."""
    return begin(items, on_progress, on_host=on_host)()


def begin(
    items: Iterable[TensorItem], on_progress: Callable[[], None] = lambda: None, *, on_host: bool = False
) -> Callable[[], Blocks]:
    """`block_digests` in two steps: devices have begun when this returns; what it returns does the host's work and waits
    for theirs."""
    host: list[TensorItem] = []
    devices: dict[torch.device, dict[str, torch.Tensor]] = defaultdict(dict)
    for item in items:
        if on_host or is_on_host(item):
            host.append(item)
        else:
            devices[item.tensor.device][item.key] = item.tensor
    begun = [(list(tensors), device_digest.begin(list(tensors.values()))) for tensors in devices.values()]

    def finish() -> Blocks:
        found = memory.block_digests(host, on_progress) if host else {}
        for keys, finish_one in begun:
            found.update(zip(keys, finish_one(), strict=True))
            on_progress()
        return found

    return finish


def device_names(items: Iterable[TensorItem]) -> str:
    """A digest of which tensors have digests of the device's algorithm; empty where none has."""
    names = sorted(item.key for item in items if not is_on_host(item))
    return hashtree.digest(strict_json.dumps([multilinear.ALGORITHM, *names])).hex() if names else ""
