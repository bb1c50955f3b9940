"""Run a function on several ranks: forked children, a store and a process group, as under torchrun but in 0.1 s.

    def case(rank: int, world_size: int) -> float:
        total = torch.tensor([float(rank)])
        torch.distributed.all_reduce(total)
        return total.item()

    assert values(run_ranks(4, case)) == [6.0] * 4

The ranks are forked from the test process, so `case` may be any closure, and torch is imported already. The parent
keeps the store, as torchrun's agent does: it survives a killed rank 0. CUDA: the parent must not have used it.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import gc
import logging
import os
import pickle
import selectors
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, BinaryIO, NoReturn

import torch
import torch.distributed as dist

GROUP_TIMEOUT = timedelta(seconds=30)
DUMP_SIGNAL = signal.SIGRTMIN + 7  # prints a rank's stacks; none that the package handles or torchrun sends
OUTPUT_TAIL_CHARS = 8000

RankFunction = Callable[[int, int], Any]

_libc = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class ErrorInfo:
    """What a rank raised. `exception` is the object itself, or None if it cannot be pickled."""

    type_name: str
    message: str
    traceback: str
    mro: tuple[str, ...] = field()  # or dataclass would take `type.mro` for its default
    exception: BaseException | None


@dataclass(frozen=True)
class Outcome:
    """How one rank ended: with a value, an error, or dead. `exitcode`: minus the signal. `output`: all it printed."""

    rank: int
    value: Any
    error: ErrorInfo | None
    exitcode: int
    is_dead: bool
    output: str


class RanksTimedOut(AssertionError):
    """Ranks were still running at the deadline. The message holds their output and the stacks of all their threads."""


class RankDied(AssertionError):
    """A rank that was not expected to die ended without a report."""


def run_ranks(
    world_size: int,
    fn: RankFunction,
    *,
    nodes: Sequence[int] | None = None,
    backend: str | None = "gloo",
    timeout: float = 60.0,
    env: Mapping[str, str] | None = None,
    expect_dead: Sequence[int] = (),
) -> list[Outcome]:
    """Run `fn(rank, world_size)` on every rank and return one outcome a rank, in rank order.

    `nodes`: the number of ranks on each simulated node, `[3, 1]`; by default all are on one. `backend`: what
    `init_process_group` is given; None starts no process group. `env` is set last. What `fn` raises is an outcome;
    a rank that dies without a report raises RankDied, unless it is in `expect_dead` (where it may die).
    Past `timeout` seconds all living ranks are killed: RanksTimedOut.
    """
    nodes = [world_size] if nodes is None else nodes
    if sum(nodes) != world_size:
        raise ValueError(f"nodes {list(nodes)} make {sum(nodes)} ranks; expected {world_size}")
    if torch.cuda.is_initialized():
        raise AssertionError("this process has used CUDA, so its forks cannot; use torchrun (tests/torchrun.py)")

    deadline = time.monotonic() + timeout
    with contextlib.ExitStack() as stack:
        # Ranks are forked between listen and accept: they queue in the backlog, and no store thread is forked.
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=4 * world_size))
        port = listener.getsockname()[1]
        children: list[_Child] = []
        stack.callback(_end, children)
        for rank, rank_env in enumerate(_rank_envs(nodes, port)):
            children.append(_fork(rank, world_size, fn, backend, {**rank_env, **(env or {})}))
        store = dist.TCPStore(
            "127.0.0.1", port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
        )
        _wait(children, deadline)
        if any(child.exitcode is None for child in children):
            raise RanksTimedOut(_timeout_message(children, timeout))
        outcomes = [child.outcome() for child in children]
        del store

    dead = [outcome for outcome in outcomes if outcome.is_dead and outcome.rank not in expect_dead]
    if dead:
        raise RankDied("\n".join(f"rank {o.rank} {_ending(o.exitcode)}; output:\n{o.output}" for o in dead))
    return outcomes


def values(outcomes: Sequence[Outcome]) -> list[Any]:
    """What the ranks returned, without those that were expected to die and did. AssertionError if any raised."""
    failed = [f"rank {o.rank}:\n{o.error.traceback}\n{o.output}" for o in outcomes if o.error is not None]
    if failed:
        raise AssertionError("\n".join(failed))
    return [outcome.value for outcome in outcomes if not outcome.is_dead]


def errors(outcomes: Sequence[Outcome]) -> list[ErrorInfo]:
    """What the ranks raised, without those that were expected to die and did. AssertionError if any returned."""
    returned = [f"rank {o.rank} returned {o.value!r}" for o in outcomes if o.error is None and not o.is_dead]
    if returned:
        raise AssertionError("expected every rank to raise, but " + "; ".join(returned))
    return [outcome.error for outcome in outcomes if outcome.error is not None]


def die_with_parent(signum: int = signal.SIGKILL) -> None:
    """Have the kernel send this process `signum` when the thread that started it ends (Linux)."""
    if _libc.prctl(_PR_SET_PDEATHSIG, signum, 0, 0, 0) != 0:
        raise OSError("prctl(PR_SET_PDEATHSIG) failed")


# ---- the parent's side


@dataclass
class _Child:
    """A forked rank, as its parent sees it. Owns its three files until `close`."""

    rank: int
    pid: int
    pidfd: int  # readable once the child has ended: the report pipe alone may be held open by a grandchild
    report_fd: int
    output: BinaryIO
    report: bytearray = field(default_factory=bytearray)
    exitcode: int | None = None

    def drain(self) -> bool:
        """Read what the child has reported so far; True at the end of it."""
        try:
            while chunk := os.read(self.report_fd, 1 << 20):
                self.report += chunk
        except BlockingIOError:
            return False
        return True

    def reap(self) -> None:
        if self.exitcode is None:
            self.exitcode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def read_output(self) -> str:
        # Not through the file object: the child writes at the offset that it shares with us.
        fd = self.output.fileno()
        return os.pread(fd, os.fstat(fd).st_size, 0).decode(errors="replace")

    def outcome(self) -> Outcome:
        assert self.exitcode is not None, f"rank {self.rank} is still running"
        # A rank ends by itself only after its whole report.
        is_dead = self.exitcode < 0 or not self.report
        value, error = (None, None) if is_dead else pickle.loads(self.report)
        return Outcome(self.rank, value, error, self.exitcode, is_dead, self.read_output())

    def close(self) -> None:
        os.close(self.pidfd)
        os.close(self.report_fd)
        self.output.close()


def _rank_envs(nodes: Sequence[int], port: int) -> Iterator[dict[str, str]]:
    """What torchrun's agents would set, rank by rank."""
    rank = 0
    for node, local_world_size in enumerate(nodes):
        for local_rank in range(local_world_size):
            yield {
                "RANK": str(rank),
                "WORLD_SIZE": str(sum(nodes)),
                "LOCAL_RANK": str(local_rank),
                "LOCAL_WORLD_SIZE": str(local_world_size),
                "GROUP_RANK": str(node),
                "GROUP_WORLD_SIZE": str(len(nodes)),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "TORCHELASTIC_USE_AGENT_STORE": "True",
                "TORCHELASTIC_RESTART_COUNT": "0",
                "TORCHELASTIC_RUN_ID": f"ranks-{os.getpid()}-{port}",
                "GLOO_SOCKET_IFNAME": "lo",
                "NCCL_SOCKET_IFNAME": "lo",
                "NCCL_HOSTID": f"node {node}",
            }
            rank += 1


def _fork(rank: int, world_size: int, fn: RankFunction, backend: str | None, env: Mapping[str, str]) -> _Child:
    read_fd, write_fd = os.pipe()
    os.set_blocking(read_fd, False)
    output = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115  closed by _Child.close
    for stream in (sys.stdout, sys.stderr):
        stream.flush()  # or the child would print it again
    parent_pid = os.getpid()
    pid = os.fork()
    if pid == 0:
        _child_main(parent_pid, rank, world_size, fn, backend, env, write_fd, output.fileno())
    os.close(write_fd)
    return _Child(rank, pid, os.pidfd_open(pid), read_fd, output)


def _wait(children: Sequence[_Child], deadline: float) -> None:
    """Collect reports until every child has ended or the deadline has passed."""
    with selectors.DefaultSelector() as selector:
        for child in children:
            selector.register(child.report_fd, selectors.EVENT_READ, child)
            selector.register(child.pidfd, selectors.EVENT_READ, child)
        while any(child.exitcode is None for child in children) and (remaining := deadline - time.monotonic()) > 0:
            for key, _ in selector.select(remaining):
                child = key.data
                is_at_end = child.drain()  # if the child has ended, all of it
                if key.fd == child.pidfd:
                    child.reap()
                    selector.unregister(key.fd)
                elif is_at_end:
                    selector.unregister(key.fd)


def _timeout_message(children: Sequence[_Child], timeout: float) -> str:
    """What every rank was doing. Kills those that still run."""
    living = [child for child in children if child.exitcode is None]
    for child in living:
        os.kill(child.pid, DUMP_SIGNAL)
    time.sleep(1.0)
    _kill(living)
    lines = [f"ranks {[child.rank for child in living]} still ran after {timeout:g} s"]
    for child in children:
        state = "was killed at the deadline" if child in living else _ending(child.exitcode)
        lines.append(f"---- rank {child.rank} {state}; the end of its output:")
        lines.append(child.read_output()[-OUTPUT_TAIL_CHARS:])
        if child.report and child not in living:
            error = child.outcome().error
            lines.append(error.traceback if error is not None else "(it returned a value)")
    return "\n".join(lines)


def _kill(children: Sequence[_Child]) -> None:
    for child in children:
        os.kill(child.pid, signal.SIGKILL)
        child.reap()


def _end(children: Sequence[_Child]) -> None:
    _kill([child for child in children if child.exitcode is None])
    for child in children:
        child.close()


def _ending(exitcode: int | None) -> str:
    if exitcode is None:
        return "is running"
    return f"died by {signal.Signals(-exitcode).name}" if exitcode < 0 else f"ended with exit code {exitcode}"


# ---- the child's side


def _child_main(
    parent_pid: int,
    rank: int,
    world_size: int,
    fn: RankFunction,
    backend: str | None,
    env: Mapping[str, str],
    report_fd: int,
    output_fd: int,
) -> NoReturn:
    """Run one rank and end the process: nothing of the parent's stack, exit handlers or pytest may run here."""
    exitcode = 1
    try:
        _become_rank(parent_pid, env, output_fd)
        try:
            if backend is not None:
                _init_group(rank, world_size, backend)
            report = pickle.dumps((fn(rank, world_size), None))
            exitcode = 0
        except BaseException as error:
            report = pickle.dumps((None, _error_info(error)))
        with os.fdopen(report_fd, "wb") as pipe:
            pipe.write(report)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        # The process group is not destroyed: that may wait for a rank that is gone.
        os._exit(exitcode)


def _become_rank(parent_pid: int, env: Mapping[str, str], output_fd: int) -> None:
    die_with_parent()
    if os.getppid() != parent_pid:
        os._exit(1)
    gc.freeze()  # the parent's garbage is not ours to finalise: a store would join a thread that was not forked
    os.dup2(output_fd, 1)
    os.dup2(output_fd, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    logging.basicConfig(force=True, format="%(levelname)s %(name)s: %(message)s")
    faulthandler.enable(file=2)
    faulthandler.register(DUMP_SIGNAL, file=2)
    for signum in (signal.SIGTERM, signal.SIGALRM):
        signal.signal(signum, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    os.environ.update(env)


def _init_group(rank: int, world_size: int, backend: str) -> None:
    store = dist.TCPStore(
        "127.0.0.1", int(os.environ["MASTER_PORT"]), is_master=False, timeout=GROUP_TIMEOUT, wait_for_workers=False
    )
    dist.init_process_group(
        backend, store=dist.PrefixStore("pg", store), rank=rank, world_size=world_size, timeout=GROUP_TIMEOUT
    )
    # A rank that returned at once would close its connections while others still set theirs up.
    ready = dist.PrefixStore("ranks", store)
    if ready.add("num_initialised", 1) == world_size:
        ready.set("all_initialised", "")
    ready.wait(["all_initialised"])


def _error_info(error: BaseException) -> ErrorInfo:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        portable = None
    else:
        portable = error
    return ErrorInfo(
        type_name=type(error).__name__,
        message=str(error),
        traceback="".join(traceback.format_exception(error)),
        mro=tuple(cls.__name__ for cls in type(error).__mro__),
        exception=portable,
    )
