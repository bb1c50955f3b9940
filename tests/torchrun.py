"""Start torchrun itself, one agent for each simulated node, and leave no process behind.

    result = torchrun(["tests/jobs/train.py", "--steps", "4"], nproc=2)
    assert result.returncode == 0, result.output

Takes about four seconds a job: where the launcher does not matter, use run_ranks (tests/ranks.py).
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

from tests.ranks import OUTPUT_TAIL_CHARS, die_with_parent

ROOT = Path(__file__).parent.parent
_JOB_VARIABLE = "TORCHRUN_TEST_JOB"  # in the environment of every process of a job, whoever its parent is by now


@dataclass(frozen=True)
class TorchrunResult:
    """`returncode`: 0, or that of the first node that failed. `output`: stdout and stderr, node after node."""

    returncode: int
    output: str


class TorchrunTimedOut(AssertionError):
    """The job still ran at the deadline. The message holds the end of its output, with the stacks of its processes."""


def torchrun(
    args: Sequence[str | Path],
    nproc: int,
    *,
    nodes: int = 1,
    timeout: float = 120.0,
    env: Mapping[str, str] | None = None,
    cwd: str | Path | None = None,
) -> TorchrunResult:
    """Run `torchrun ... args`: a script or `-m module`, and its arguments, on `nodes` times `nproc` ranks.

    The repository is on the path and, by default, the working directory. Past `timeout` seconds every process of the
    job prints its stacks and is killed: TorchrunTimedOut. What a job leaves running is killed when it ends.
    """
    with started(args, nproc, nodes=nodes, timeout=timeout, env=env, cwd=cwd) as job:
        return job.wait()


class TorchrunJob:
    """A job that runs; see `started`."""

    def __init__(self, args: Sequence[str | Path], timeout: float, outputs: Sequence[BinaryIO]) -> None:
        self._args, self._timeout, self._outputs = args, timeout, outputs
        self._deadline = time.monotonic() + timeout
        self._name = uuid.uuid4().hex
        self.agents: list[subprocess.Popen[bytes]] = []

    @property
    def pids(self) -> list[int]:
        """Of all its processes, whoever their parents are by now."""
        return _pids_of(self._name)

    @property
    def output(self) -> str:
        return _by_node([_text(output) for output in self._outputs])

    def wait(self) -> TorchrunResult:
        """Until all agents have ended."""
        self.wait_until(lambda: all(agent.poll() is not None for agent in self.agents))
        return TorchrunResult(next((agent.returncode for agent in self.agents if agent.returncode), 0), self.output)

    def wait_until(self, is_so: Callable[[], bool]) -> None:
        """`TorchrunTimedOut` at the deadline of the job; AssertionError if it ends without having come to it."""
        while not is_so():
            if all(agent.poll() is not None for agent in self.agents) and not is_so():
                raise AssertionError(f"{self._args} has ended\n{self.output}")
            if time.monotonic() > self._deadline:
                _print_stacks(self._name)
                texts = [_text(output)[-OUTPUT_TAIL_CHARS:] for output in self._outputs]
                raise TorchrunTimedOut(f"{self._args} still ran after {self._timeout:g} s\n" + _by_node(texts))
            time.sleep(0.02)

    def end(self) -> None:
        """Kill what still runs."""
        _end(self._name, self.agents)


@contextlib.contextmanager
def started(
    args: Sequence[str | Path],
    nproc: int,
    *,
    nodes: int = 1,
    options: Sequence[str] = (),
    timeout: float = 120.0,
    env: Mapping[str, str] | None = None,
    cwd: str | Path | None = None,
    terminal: int | None = None,
) -> Iterator[TorchrunJob]:
    """As `torchrun`, while it runs. `options` are torchrun's own. `terminal`: what stdin and stderr are."""
    with contextlib.ExitStack() as stack:
        outputs = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(nodes)]
        job = TorchrunJob(args, timeout, outputs)
        stack.callback(job.end)
        job_env = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
            "PYTHONFAULTHANDLER": "1",
            "OMP_NUM_THREADS": "1",
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # rank 0 hosts a store of its own, at a free port
            "GLOO_SOCKET_IFNAME": "lo",
            "NCCL_SOCKET_IFNAME": "lo",
            **(env or {}),
            _JOB_VARIABLE: job._name,
        }
        launch = [*_rendezvous(nodes, job._name), f"--nproc-per-node={nproc}", *options]
        for output in outputs:
            job.agents.append(
                subprocess.Popen(
                    [sys.executable, "-m", "torch.distributed.run", *launch, *map(str, args)],
                    stdin=subprocess.DEVNULL if terminal is None else terminal,
                    stdout=output,
                    stderr=subprocess.STDOUT if terminal is None else terminal,
                    env=job_env,
                    cwd=cwd or ROOT,
                    start_new_session=True,
                    # An agent that is asked to terminate ends its workers, each in a session of its own.
                    preexec_fn=partial(die_with_parent, signal.SIGTERM),
                )
            )
        yield job


def _rendezvous(nodes: int, job: str) -> list[str]:
    if nodes == 1:
        return ["--standalone", "--local-addr=127.0.0.1"]
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    return [
        f"--nnodes={nodes}",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint=127.0.0.1:{port}",
        f"--rdzv-id={job}",
        "--local-addr=127.0.0.1",
    ]


def _pids_of(job: str) -> list[int]:
    """Every process of the job that runs now, agents and workers and whatever they started."""
    pids = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            # It may have ended, or be another user's.
            with contextlib.suppress(OSError):
                if f"{_JOB_VARIABLE}={job}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                    pids.append(int(entry.name))
    return pids


def _signal(pids: Sequence[int], signum: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signum)


def _print_stacks(job: str) -> None:
    """End all processes by SIGABRT, on which Python prints the stacks of all threads (PYTHONFAULTHANDLER)."""
    _signal(_pids_of(job), signal.SIGABRT)
    time.sleep(1.0)


def _end(job: str, agents: Sequence[subprocess.Popen[bytes]]) -> None:
    while pids := _pids_of(job):
        _signal(pids, signal.SIGKILL)
        for agent in agents:
            agent.poll()
        time.sleep(0.02)
    for agent in agents:
        agent.wait()


def _text(output: BinaryIO) -> str:
    fd = output.fileno()
    return os.pread(fd, os.fstat(fd).st_size, 0).decode(errors="replace")


def _by_node(texts: Sequence[str]) -> str:
    if len(texts) == 1:
        return texts[0]
    return "\n".join(f"---- node {node}:\n{text}" for node, text in enumerate(texts))
