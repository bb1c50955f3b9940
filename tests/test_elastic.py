"""A job that is cut over all ranks loses a machine or a process, restarts by itself with what is left, and goes on with
the next sample.

The agents are those of scripts/launch, one for each machine; what runs in them is elastic_job.py.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

import pytest

from forgather_ckpt import open_checkpoint
from forgather_ckpt.data.position import GlobalPosition
from forgather_ckpt.data.sampler import epoch_order
from forgather_ckpt.manifest import CheckpointManifest
from tests.elastic_job import BATCH_SIZE, ManyPoints
from tests.ranks import OUTPUT_TAIL_CHARS, die_with_parent
from tests.test_cli import Fgckpt, fgckpt
from tests.test_launch import LAUNCH, PATH
from tests.torchrun import _JOB_VARIABLE, ROOT, TorchrunTimedOut, _end, _print_stacks

__all__ = ["fgckpt"]

DEADLINE_SECONDS = 270
pytestmark = [pytest.mark.multiprocess, pytest.mark.slow, pytest.mark.timeout(DEADLINE_SECONDS + 30)]

EVERYWHERE_ALIKE = ["model", "optimizer", "scheduler", "trainer"]
"""What the ranks of another number load unchanged; the others are the data position and the random generators."""


@dataclass(frozen=True)
class Process:
    """What a rank told of itself, and which samples it read in each step."""

    life: str
    rank: int
    world_size: int
    agent: int
    pid: int
    steps: Mapping[int, list[int]]

    @classmethod
    def read(cls, account: Path) -> Self | None:
        """None of one that has just been made. Its last line may be cut off, where the process was killed in it."""
        lines = [json.loads(line) for line in account.read_text().splitlines(True) if line.endswith("\n")]
        if not lines:
            return None
        return cls(pid=int(account.name), steps={step["step"]: step["samples"] for step in lines[1:]}, **lines[0])


@dataclass(frozen=True)
class Life:
    """From one restart of the job to the next."""

    processes: tuple[Process, ...]

    @property
    def world_size(self) -> int:
        return self.processes[0].world_size

    @property
    def steps(self) -> list[int]:
        """Those that all ranks did."""
        return sorted(set.intersection(*(set(process.steps) for process in self.processes)))

    def samples(self, step: int) -> list[int]:
        """What the job read for a step, in the order of the ranks."""
        return [sample for process in self.processes for sample in process.steps[step]]


class ElasticJob:
    """Four agents on this machine, each in a session of its own, as on four machines; three are enough for the job."""

    def __init__(self, directory: Path, script: str, plan: Mapping[int, Any]) -> None:
        """`script`: of scripts/launch, which starts an agent. `plan`: see elastic_job.py."""
        self._directory = directory
        self._script = script
        self._plan = json.dumps(plan)
        self._name = uuid.uuid4().hex
        self._deadline = time.monotonic() + DEADLINE_SECONDS
        with socket.create_server(("127.0.0.1", 0)) as server:
            self._port = server.getsockname()[1]
        self._started: list[subprocess.Popen[bytes]] = []
        self.agents: dict[int, subprocess.Popen[bytes]] = {}
        """By pid; without those that were lost."""

    def start(self) -> None:
        if self._script == "elastic.sh":
            self._start("elastic.sh", "meet", f"{self._port}")
            self._wait_for_port()
        self.start_agent()
        self._wait_for_port()  # so that the first agent, if any, is the one that holds the rendezvous
        for _ in range(3):
            self.start_agent()

    def start_agent(self) -> None:
        job = [ROOT / "tests" / "elastic_job.py", self._directory, self._plan]
        agent = self._start(self._script, "--local-addr=127.0.0.1", *job)
        self.agents[agent.pid] = agent

    def _start(self, script: str, *arguments: str | Path) -> subprocess.Popen[bytes]:
        own = {
            "HEAD": f"127.0.0.1:{self._port}",
            "MEET": f"127.0.0.1:{self._port}",
            "RUN_ID": self._name,
            "NNODES": "3:4",
            "NPROC_PER_NODE": "1",
            "LAST_CALL": "3",
            "SHUTDOWN_TIMEOUT": "10",
            "GLOO_SOCKET_IFNAME": "lo",
            "PATH": PATH,
            "PYTHONPATH": str(ROOT),
            "PYTHONFAULTHANDLER": "1",
            _JOB_VARIABLE: self._name,
        }
        with (self._directory / f"output-{len(self._started)}").open("wb") as output:
            process = subprocess.Popen(
                [LAUNCH / script, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **own},
                start_new_session=True,
                preexec_fn=partial(die_with_parent, signal.SIGTERM),
            )
        self._started.append(process)
        return process

    def _wait_for_port(self) -> None:
        for _ in self._until("nobody listens where the agents meet"):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self._port), timeout=5):
                return

    def wait_for_step(self, step: int, world_size: int) -> Life:
        """The life with so many ranks, when they have all done the step."""
        for _ in self._until(f"{world_size} ranks have not done step {step}"):
            for life in self.lives():
                if life.world_size == world_size == len(life.processes) and step in life.steps:
                    return life
        raise AssertionError

    def wait(self) -> None:
        """Until the agents have ended that are left, each without an error."""
        for _ in self._until("an agent has not ended"):
            if all(agent.poll() == 0 for agent in self.agents.values()):
                return

    def lose(self, process: Process, *, machine: bool) -> None:
        """By SIGKILL, with its agent if its machine is lost."""
        if machine:
            agent = self.agents.pop(process.agent)
            agent.kill()
            agent.wait()
        os.kill(process.pid, signal.SIGKILL)

    def lives(self) -> list[Life]:
        """In the order of the steps with which they began."""
        found: dict[str, list[Process]] = {}
        for account in (self._directory / "read").glob("*"):
            if process := Process.read(account):
                found.setdefault(process.life, []).append(process)
        lives = [Life(tuple(sorted(processes, key=lambda one: one.rank))) for processes in found.values()]
        return sorted((life for life in lives if life.steps), key=lambda life: life.steps[0])

    def end(self) -> None:
        """Kill what still runs."""
        _end(self._name, self._started)

    def _until(self, what_is_wrong: str) -> Iterator[None]:
        """Again and again, to the deadline: then the stacks of all processes are in the error."""
        while time.monotonic() < self._deadline:
            if any(agent.poll() for agent in self.agents.values()):
                raise AssertionError(f"an agent failed\n{self._output()}")
            yield
            time.sleep(0.1)
        _print_stacks(self._name)
        raise TorchrunTimedOut(f"after {DEADLINE_SECONDS} s {what_is_wrong}\n{self._output()}")

    def _output(self) -> str:
        logs = sorted(self._directory.glob("output-*"))
        return "\n".join(f"---- {log.name}:\n{log.read_text(errors='replace')[-OUTPUT_TAIL_CHARS:]}" for log in logs)


@contextlib.contextmanager
def elastic_job(directory: Path, script: str, plan: Mapping[int, Any]) -> Iterator[ElasticJob]:
    job = ElasticJob(directory, script, plan)
    try:
        job.start()
        yield job
    finally:
        job.end()


def manifests(run: Path) -> dict[int, CheckpointManifest]:
    return {one.step: one for one in map(CheckpointManifest.load, run.glob("checkpoint-*"))}


def assert_every_sample_is_read_once_and_in_order(lives: list[Life]) -> None:
    """What counts of a life are the steps before those that the next one did. What a life did beyond them, the next one
    reads again, in the same order, shared out among its own ranks."""
    order = epoch_order(GlobalPosition(len(ManyPoints()), seed=42)).tolist()
    place = 0
    for life, following in zip(lives, [*lives[1:], None], strict=True):
        assert life.steps == list(range(life.steps[0], life.steps[-1] + 1))
        at = place
        for step in life.steps:
            read = life.samples(step)
            assert len(read) == life.world_size * BATCH_SIZE
            assert read == order[at : at + len(read)], f"step {step} of {life.world_size} ranks"
            at += len(read)
            if following is None or step < following.steps[0]:
                place = at


def assert_loaded_is_what_was_saved(fgckpt: Fgckpt, directory: Path, step: int, components: list[str]) -> None:
    """`loaded` is what the ranks of the next life saved at once when they had resumed."""
    sides = [f"{directory / name}@{step}" for name in ("run", "loaded")]
    told = fgckpt("diff", *sides, "--logical", *(f"--component={key}" for key in components))
    assert told.code == 0, told.out + told.err
    saved, loaded = map(open_checkpoint, sides)
    ranks = range(loaded.manifest.world_size)
    positions = [loaded.load("dataset", entry=f"rank={rank}") for rank in ranks]
    assert positions == [saved.load("dataset", entry="rank=0")] * len(ranks)


@pytest.mark.parametrize(("script", "victim"), [("several_nodes.sh", 2), ("elastic.sh", 0)])
def test_a_sharded_run_that_loses_a_machine_goes_on_without_it(tmp_path, fgckpt, script, victim):
    """Rank 0 is the one that holds the lease of the run directory, and the store of all ranks."""
    plan = {0: {"world_size": 4, "stops": [6, victim]}, 4: {"world_size": 3}}
    with elastic_job(tmp_path, script, plan) as job:
        holder_of_rendezvous = next(iter(job.agents))
        lost = job.wait_for_step(6, 4).processes[victim]
        assert script == "elastic.sh" or lost.agent != holder_of_rendezvous
        job.lose(lost, machine=True)
        job.wait()
        lives = job.lives()

    assert [(life.world_size, life.steps) for life in lives] == [(4, [*range(1, 7)]), (3, [*range(5, 13)])]
    assert_every_sample_is_read_once_and_in_order(lives)
    found = manifests(tmp_path / "run")
    assert {step: one.world_size for step, one in found.items()} == {4: 4, 8: 3, 12: 3}
    assert found[8].parent is not None and found[8].parent["digest"] == found[4].digest
    assert_loaded_is_what_was_saved(fgckpt, tmp_path, 4, EVERYWHERE_ALIKE)
    assert json.loads((tmp_path / "run" / ".lease").read_text())["pid"] == lives[1].processes[0].pid


def test_a_machine_that_comes_back_is_taken_in_and_all_go_on_with_it(tmp_path, fgckpt):
    plan = {
        0: {"world_size": 4, "stops": [5, 3]},
        4: {"world_size": 3, "stops": [10, 1]},
        8: {"world_size": 4},
    }
    with elastic_job(tmp_path, "elastic.sh", plan) as job:
        job.lose(job.wait_for_step(5, 4).processes[3], machine=True)
        job.wait_for_step(10, 3)
        job.start_agent()
        job.wait()
        lives = job.lives()

    assert [(life.world_size, life.steps) for life in lives] == [
        (4, [*range(1, 6)]),
        (3, [*range(5, 11)]),
        (4, [*range(9, 13)]),
    ]
    assert_every_sample_is_read_once_and_in_order(lives)
    assert {step: one.world_size for step, one in manifests(tmp_path / "run").items()} == {4: 4, 8: 3, 12: 4}
    for step in (4, 8):
        assert_loaded_is_what_was_saved(fgckpt, tmp_path, step, EVERYWHERE_ALIKE)


def test_after_a_process_dies_as_many_go_on_exactly(tmp_path, fgckpt):
    plan = {0: {"world_size": 4, "stops": [7, 1]}, 4: {"world_size": 4}}
    with elastic_job(tmp_path, "elastic.sh", plan) as job:
        job.lose(job.wait_for_step(7, 4).processes[1], machine=False)
        job.wait()
        lives = job.lives()

    assert [(life.world_size, life.steps) for life in lives] == [(4, [*range(1, 8)]), (4, [*range(5, 13)])]
    assert_every_sample_is_read_once_and_in_order(lives)
    # the data position and the generators too: as many ranks have all that the ranks before had
    assert_loaded_is_what_was_saved(fgckpt, tmp_path, 4, [*EVERYWHERE_ALIKE, "dataset", "rng"])
