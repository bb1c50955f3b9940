"""One process reads the data, and gives every rank its batches."""

import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist

from forgather_ckpt.data.batches import Batch, Samples, map_leaves
from forgather_ckpt.data.loader import StatefulLoader, num_samples_of


class DispatchingLoader(StatefulLoader):
    """A `StatefulLoader` of which only rank 0 reads the dataset; each rank gets just what it would have read.

    With `same_for_all`, all ranks get the same batches, as the stages of one pipeline need them.

    To make one, to iterate over it and to take its next batch are collective: all ranks do it alike. Ranks
    other than 0 may pass `dataset=None`. If reading fails on rank 0, every rank raises.

    Batches travel through host memory, over a gloo group that the loader makes for itself, so it works beside
    an NCCL default group. All ranks keep count of the position, but rank 0's is the one that counts: declare
    the loader as GLOBAL.
    """

    def __init__(
        self,
        dataset: Samples | None,
        batch_size: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = True,
        num_workers: int = 0,
        collate_fn: Callable[[list[Any]], Batch] | None = None,
        pin_memory: bool = False,
        same_for_all: bool = False,
    ) -> None:
        rank = dist.get_rank()
        self._num_receivers = dist.get_world_size()
        self._is_reader = rank == 0
        self._group = dist.new_group(backend="gloo")
        if rank == 0:
            num_samples, problem = _measured(dataset)
        else:
            num_samples, problem = 0, None
        announced: list[Any] = [num_samples, problem]
        dist.broadcast_object_list(announced, src=0, group=self._group)
        num_samples, problem = announced
        if problem is not None:
            raise TypeError(f"rank 0 cannot read the data for all ranks: {problem}")
        super().__init__(
            dataset if rank == 0 and dataset is not None else _ReadElsewhere(num_samples),
            batch_size,
            rank=0 if same_for_all else rank,
            world_size=1 if same_for_all else dist.get_world_size(),
            seed=seed,
            shuffle=shuffle,
            drop_last=drop_last,
            num_workers=num_workers,
            collate_fn=collate_fn,
            pin_memory=pin_memory,
        )

    def _read(self) -> Iterator[Batch]:
        count = len(self)
        if self._is_reader:
            batches = self._data_loader(rank=None)
            for _ in range(count):
                yield self._send(batches)
        else:
            for _ in range(count):
                yield self._receive()

    def _send(self, batches: Iterator[Batch]) -> Batch:
        try:
            shares = list(islice(batches, self.world_size))
            packed = [_Packed.of(batch) for batch in shares]
            if self.world_size == 1:
                packed *= self._num_receivers
        except Exception as err:
            # The others wait for this exchange, whatever happened here.
            self._exchange([_failure(err)] * self._num_receivers)
            raise
        self._exchange([message.skeleton for message in packed])
        sending = [
            dist.isend(tensor, group=self._group, group_dst=rank)
            for rank, message in enumerate(packed)
            for tensor in message.tensors
            if rank != 0
        ]
        for work in sending:
            if work is not None:
                work.wait()
        return shares[0]

    def _receive(self) -> Batch:
        skeleton = pickle.loads(self._exchange(None))
        if isinstance(skeleton, _Failure):
            raise RuntimeError(f"rank 0 reads the data for all ranks, and failed: {skeleton.message}")
        return map_leaves(self._filled, skeleton)

    def _filled(self, leaf: Any) -> Any:
        if not isinstance(leaf, _Hole):
            return leaf
        tensor = torch.empty(leaf.shape, dtype=leaf.dtype, pin_memory=self.pin_memory)
        if tensor.numel():
            dist.recv(tensor, group=self._group, group_src=0)
        return tensor

    def _exchange(self, messages: list[bytes] | None) -> bytes:
        """Give each rank its own message; only rank 0 has them."""
        received: list[Any] = [None]
        dist.scatter_object_list(received, messages, group=self._group, group_src=0)
        return bytes(received[0])


@dataclass(frozen=True)
class _Hole:
    """Where a tensor was in a batch; its bytes follow the skeleton, in order."""

    shape: torch.Size
    dtype: torch.dtype


@dataclass(frozen=True)
class _Failure:
    message: str


def _failure(err: Exception) -> bytes:
    return pickle.dumps(_Failure(f"{type(err).__name__}: {err}"))


@dataclass(frozen=True)
class _Packed:
    """A batch on its way: pickling whole tensors takes ten times as long as sending them."""

    skeleton: bytes
    tensors: list[torch.Tensor]

    @classmethod
    def of(cls, batch: Batch) -> "_Packed":
        tensors: list[torch.Tensor] = []

        def taken_out(leaf: Any) -> Any:
            if not isinstance(leaf, torch.Tensor):
                return leaf
            if leaf.numel():
                tensors.append(leaf.detach().cpu().contiguous())
            return _Hole(leaf.shape, leaf.dtype)

        return cls(pickle.dumps(map_leaves(taken_out, batch)), tensors)


class _ReadElsewhere:
    """The dataset of a rank that does not read it."""

    def __init__(self, num_samples: int) -> None:
        self.num_samples = num_samples

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> Any:
        raise RuntimeError(f"item {index} was asked for on a rank that gets its batches from rank 0")


def _measured(dataset: Samples | None) -> tuple[int, str | None]:
    try:
        return num_samples_of(dataset), None
    except Exception as err:
        return 0, f"{type(err).__name__}: {err}"
