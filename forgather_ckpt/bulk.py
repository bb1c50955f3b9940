"""Bulk bytes among some ranks: broadcasts through process groups of our own.

They are made over the job's store, whatever default group there is or is not: gloo for host memory, NCCL for devices.
Only this module, in the package's core, calls collectives.
"""

import ctypes
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from forgather_ckpt.comm import Comm
from forgather_ckpt.replication import describe
from forgather_ckpt.topology import Ranks

_MARGIN_SECONDS = 60.0
"""How much longer than ours the timeouts of a group are: ours name the rank, NCCL's end the process."""


class Channels:
    """The process groups that this rank has made so far. A failure leaves none: the next ones are made anew."""

    def __init__(self, comm: Comm) -> None:
        self._comm = comm
        self._open: dict[tuple[Ranks, str], Channel] = {}

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Around a phase that uses them: if it fails, on whatever rank, all groups are given up."""
        try:
            yield
        except BaseException:
            self.close(abort=True)
            raise

    def among(self, ranks: Ranks, device: torch.device) -> "Channel":
        """The one among `ranks`, of which this rank is one, for data on `device`. All of them ask for it in the work of
        the same phase, and for several in the same order."""
        key = (ranks, device.type)
        if key not in self._open:
            self._open[key] = Channel(self._comm, ranks, device)
        return self._open[key]

    def close(self, *, abort: bool = False) -> None:
        channels = list(self._open.values())
        self._open.clear()
        for channel in channels:
            channel.close(abort=abort)


class Channel:
    """A process group among `ranks`."""

    def __init__(self, comm: Comm, ranks: Ranks, device: torch.device) -> None:
        self.ranks = ranks
        self._comm = comm
        self._others = tuple(rank for rank in ranks if rank != comm.rank)
        self._what = f"the transfer among ranks {describe(ranks)}"
        self._device = device
        self._under_way: list[Any] = []
        store = comm.channel_store(f"{device.type}/{','.join(map(str, ranks))}")
        # nobody shall make a group, and wait for its members, of which one will not come
        store.set(f"here/{comm.rank}", "")
        keys = [f"here/{rank}" for rank in ranks]
        comm.wait_for(self._others, lambda: store.check(keys), self._what)
        timeout = timedelta(seconds=comm.timeout_seconds + _MARGIN_SECONDS)
        self.group = self._made(lambda: _group(store, ranks.index(comm.rank), len(ranks), device, timeout))

    def broadcast(self, data: torch.Tensor, source: int) -> Any:
        """Begin to send `data` of rank `source` into `data` of the others: contiguous, on the channel's device."""
        options = dist.BroadcastOptions()
        options.rootRank = self.ranks.index(source)
        options.rootTensor = 0
        work = self.group.broadcast([data], options)
        self._under_way.append(work)
        return work

    def finish(self, work: Any) -> None:
        """Wait until a broadcast is through; what this rank launches on the device from now on sees the data.

        On a device, only what is launched there waits: call `settle` at the end.
        """
        if self._device.type == "cpu":
            self._comm.wait_for(self._others, work.is_completed, self._what)
        try:
            work.wait()
        except RuntimeError:
            self._comm.blame_the_dead(self._others, self._what)
            raise
        self._under_way.remove(work)
        self._comm.beat()

    def settle(self) -> None:
        """Wait until the device has done what was launched so far."""
        if self._device.type == "cuda":
            done = torch.cuda.Event()
            done.record(torch.cuda.current_stream(self._device))
            self._comm.wait_for(self._others, done.query, self._what)

    def close(self, *, abort: bool) -> None:
        if abort:
            self.group.abort()
        if any(not work.is_completed() for work in self._under_way):
            # Its destructor would wait for what is under way, until the timeout: the group is given to the process.
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self.group))
        self._under_way.clear()
        del self.group

    def _made(self, make: Callable[[], Any]) -> Any:
        """What `make` returns. It runs in a thread, which is left alone if this rank need not wait for it any more: a
        group's constructor waits for the others without a word, and cannot be interrupted."""
        made: Future[Any] = Future()

        def run() -> None:
            try:
                made.set_result(make())
            except BaseException as err:
                made.set_exception(err)

        threading.Thread(target=run, daemon=True).start()
        self._comm.wait_for(self._others, made.done, self._what)
        try:
            return made.result()
        except RuntimeError:
            self._comm.blame_the_dead(self._others, self._what)
            raise


def is_fast(device: torch.device) -> bool:
    """Whether ranks with devices of their own can send from one to the other without the host."""
    return device.type == "cuda" and dist.is_nccl_available()


def _group(store: dist.Store, rank: int, size: int, device: torch.device, timeout: timedelta) -> Any:
    if device.type == "cpu":
        return dist.ProcessGroupGloo(store, rank, size, timeout)
    from torch.distributed.distributed_c10d import ProcessGroupNCCL  # not in every build

    options = ProcessGroupNCCL.Options()
    options._timeout = timeout
    options.is_high_priority_stream = True  # transfers are what takes long: other kernels shall not keep them waiting
    with torch.cuda.device(device):
        return ProcessGroupNCCL(store, rank, size, options)
