"""The torchrun harness: return codes, output, simulated nodes, and no process left behind."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from tests.torchrun import TorchrunTimedOut, _pids_of, torchrun

pytestmark = pytest.mark.multiprocess

JOB = """
import os, sys, time
import torch
import torch.distributed as dist

def wait_for_ever():
    while True:
        time.sleep(1)

if sys.argv[1] == "hang":
    wait_for_ever()
dist.init_process_group("gloo")
total = torch.tensor([dist.get_rank()])
dist.all_reduce(total)
print(f"rank {dist.get_rank()} on node {os.environ['GROUP_RANK']}: {total.item()}, {sys.argv[1]}", flush=True)
dist.destroy_process_group()
if sys.argv[1] == "fail" and os.environ["RANK"] == "1":
    sys.exit(3)
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "job.py"
    path.write_text(JOB)
    return path


def test_one_node(script, tmp_path):
    result = torchrun([script, "fine"], 2, cwd=tmp_path)
    assert result.returncode == 0, result.output
    assert "rank 0 on node 0: 1, fine" in result.output
    assert "rank 1 on node 0: 1, fine" in result.output


def test_two_nodes(script):
    result = torchrun([script, "fine"], 2, nodes=2)
    assert result.returncode == 0, result.output
    # two processes may write into one line
    assert sorted(re.findall(r"rank \d on node \d", result.output)) == [
        "rank 0 on node 0",
        "rank 1 on node 0",
        "rank 2 on node 1",
        "rank 3 on node 1",
    ]


def test_a_failed_rank_fails_the_job(script):
    result = torchrun([script, "fail"], 2)
    assert result.returncode != 0
    assert "exitcode  : 3" in result.output


def test_a_hang_ends_at_the_deadline_with_stacks_and_no_process_left(script, monkeypatch):
    jobs = []
    monkeypatch.setattr("tests.torchrun._pids_of", lambda job: jobs.append(job) or _pids_of(job))
    with pytest.raises(TorchrunTimedOut, match="wait_for_ever"):
        torchrun([script, "hang"], 2, timeout=25.0)
    assert len(set(jobs)) == 1
    assert _pids_of(jobs[0]) == []
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)
