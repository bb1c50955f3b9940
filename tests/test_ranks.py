"""The multi-process harness: what it reports of ranks that return, raise, die and hang."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.ranks import RankDied, RanksTimedOut, errors, run_ranks, values

pytestmark = pytest.mark.multiprocess


class Refused(RuntimeError):
    """An error of this module, so that it can be pickled."""


class NeedsTwoArguments(RuntimeError):
    """An error that pickles but does not come back."""

    def __init__(self, rank: int, reason: str) -> None:
        super().__init__(f"{reason} on rank {rank}")


def test_values_come_back_in_rank_order():
    assert values(run_ranks(3, lambda rank, world_size: (rank, world_size))) == [(0, 3), (1, 3), (2, 3)]


def test_all_reduce_works_over_gloo():
    def case(rank: int, world_size: int) -> float:
        total = torch.tensor([float(rank)])
        dist.all_reduce(total)
        return total.item()

    assert values(run_ranks(4, case)) == [6.0] * 4


def test_no_default_group_with_backend_none_but_the_environment_leads_to_one():
    def case(rank: int, world_size: int) -> tuple[bool, int]:
        before = dist.is_initialized()
        dist.init_process_group("gloo")  # env://, as a script under torchrun does
        dist.barrier()
        return before, dist.get_world_size()

    assert values(run_ranks(2, case, backend=None)) == [(False, 2)] * 2


def test_a_job_without_a_cpu_backend():
    def case(rank: int, world_size: int) -> str:
        return str(dist.get_backend_config())

    assert values(run_ranks(2, case, backend="cuda:gloo")) == ["cuda:gloo"] * 2


def test_simulated_nodes_and_extra_environment():
    names = ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "EXTRA")

    def case(rank: int, world_size: int) -> list[str]:
        return [os.environ[name] for name in names]

    outcomes = run_ranks(4, case, nodes=[3, 1], backend=None, env={"EXTRA": "x"})
    assert values(outcomes) == [
        ["0", "0", "3", "0", "2", "x"],
        ["1", "1", "3", "0", "2", "x"],
        ["2", "2", "3", "0", "2", "x"],
        ["3", "0", "1", "1", "2", "x"],
    ]
    assert "EXTRA" not in os.environ
    with pytest.raises(ValueError, match="make 3 ranks; expected 4"):
        run_ranks(4, case, nodes=[2, 1])


def test_an_error_comes_back_with_its_type_message_traceback_and_object():
    def case(rank: int, world_size: int) -> None:
        print("about to refuse")
        raise Refused(f"not on rank {rank}")

    outcomes = run_ranks(2, case, backend=None)
    first, second = errors(outcomes)
    assert (first.type_name, first.message) == ("Refused", "not on rank 0")
    assert second.message == "not on rank 1"
    assert first.mro[:2] == ("Refused", "RuntimeError")
    assert "in case" in first.traceback
    assert isinstance(first.exception, Refused)
    assert [outcome.exitcode for outcome in outcomes] == [1, 1]
    assert outcomes[0].output == "about to refuse\n"
    with pytest.raises(AssertionError, match="not on rank 1"):
        values(outcomes)


def test_an_error_that_cannot_be_pickled_is_described_all_the_same():
    def case(rank: int, world_size: int) -> None:
        if rank == 0:
            raise NeedsTwoArguments(rank, "refused")

        class Local(Exception):
            pass

        raise Local("unreachable class")

    described, local = errors(run_ranks(2, case, backend=None))
    assert (described.message, described.exception) == ("refused on rank 0", None)
    assert (local.type_name, local.message, local.exception) == ("Local", "unreachable class", None)


def test_a_value_that_cannot_be_pickled_is_an_error():
    (error,) = errors(run_ranks(1, lambda rank, world_size: lambda: None, backend=None))
    assert "pickle" in error.message


def test_errors_refuses_ranks_that_returned():
    def case(rank: int, world_size: int) -> str:
        if rank == 0:
            raise Refused
        return "fine"

    with pytest.raises(AssertionError, match="rank 1 returned 'fine'"):
        errors(run_ranks(2, case, backend=None))


def test_sys_exit_is_an_error_of_the_rank():
    (error,) = errors(run_ranks(1, lambda rank, world_size: sys.exit(3), backend=None))
    assert (error.type_name, error.message) == ("SystemExit", "3")


def test_a_killed_rank_is_reported_and_the_store_outlives_rank_0():
    def case(rank: int, world_size: int) -> bytes:
        store = dist.distributed_c10d._get_default_store()
        if rank == 0:
            store.set("last words", "goodbye")
            print("rank 0 goes")
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.3)
        store.set(f"alive {rank}", "yes")
        return store.get("last words")

    outcomes = run_ranks(3, case, expect_dead=[0])
    assert (outcomes[0].is_dead, outcomes[0].exitcode) == (True, -signal.SIGKILL)
    assert outcomes[0].output == "rank 0 goes\n"
    assert values(outcomes) == [b"goodbye"] * 2
    with pytest.raises(RankDied, match=r"(?s)rank 0 died by SIGKILL.*rank 0 goes"):
        run_ranks(3, case)


def test_a_rank_that_leaves_without_a_report_is_dead():
    with pytest.raises(RankDied, match="rank 0 ended with exit code 0"):
        run_ranks(1, lambda rank, world_size: os._exit(0), backend=None)


def test_a_crash_leaves_its_stacks_in_the_output():
    def crash_here(rank: int, world_size: int) -> None:
        os.kill(os.getpid(), signal.SIGSEGV)

    (outcome,) = run_ranks(1, crash_here, backend=None, expect_dead=[0])
    assert outcome.exitcode == -signal.SIGSEGV
    assert "crash_here" in outcome.output


def test_a_hang_ends_at_the_deadline_with_the_stacks_of_every_living_rank():
    def wait_for_nothing(rank: int, world_size: int) -> int:
        if rank == 1:
            return os.getpid()
        if rank == 2:
            raise Refused("meanwhile")
        print("rank 0 waits")
        dist.distributed_c10d._get_default_store().get("never set")  # blocks in C++
        raise AssertionError("unreachable")

    started = time.monotonic()
    with pytest.raises(RanksTimedOut) as caught:
        run_ranks(3, wait_for_nothing, timeout=2.0)
    message = str(caught.value)
    assert "ranks [0] still ran after 2 s" in message
    assert "rank 0 waits" in message
    assert "wait_for_nothing" in message.split("---- rank 1")[0]
    assert "Refused: meanwhile" in message
    assert time.monotonic() - started < 20
    assert_no_children()


def test_a_stopped_rank_is_killed_at_the_deadline():
    with pytest.raises(RanksTimedOut, match="still ran"):
        run_ranks(1, lambda rank, world_size: os.kill(os.getpid(), signal.SIGSTOP), backend=None, timeout=1.0)
    assert_no_children()


def test_large_values_and_outputs_do_not_block():
    def case(rank: int, world_size: int) -> bytes:
        print("x" * (1 << 20))
        return bytes([rank]) * 10_000_000

    outcomes = run_ranks(2, case, backend=None)
    assert values(outcomes) == [b"\0" * 10_000_000, b"\1" * 10_000_000]
    assert [len(outcome.output) for outcome in outcomes] == [(1 << 20) + 1] * 2


def test_a_grandchild_that_holds_the_pipe_does_not_delay_the_outcome():
    def case(rank: int, world_size: int) -> int:
        pid = os.fork()
        if pid == 0:
            time.sleep(30)
            os._exit(0)
        return pid

    (grandchild,) = values(run_ranks(1, case, backend=None, timeout=20.0))
    os.kill(grandchild, signal.SIGKILL)


def test_backward_works_in_the_ranks_after_the_parent_used_it():
    def case(rank: int, world_size: int) -> float:
        weight = torch.ones(64, 64, requires_grad=True)
        (weight @ weight).sum().backward()
        return weight.grad.sum().item()

    assert values(run_ranks(2, case, backend=None)) == [case(0, 1)] * 2


def test_nothing_leaks_over_many_runs(capsys):
    def case(rank: int, world_size: int) -> int:
        return rank

    run_ranks(2, case)
    fds = names_in("/proc/self/fd")
    threads = len(names_in("/proc/self/task"))
    started = time.monotonic()
    for _ in range(50):
        assert values(run_ranks(2, case)) == [0, 1]
    seconds = (time.monotonic() - started) / 50
    assert names_in("/proc/self/fd") == fds
    assert len(names_in("/proc/self/task")) == threads
    assert_no_children()
    with capsys.disabled():
        print(f" [2 gloo ranks: {seconds * 1e3:.0f} ms a run]", end="")


def test_warnings_are_errors_in_the_ranks_too():
    (error,) = errors(run_ranks(1, lambda rank, world_size: warnings.warn("careless", stacklevel=1), backend=None))
    assert (error.type_name, error.message) == ("UserWarning", "careless")


PARENT = """
import os, signal, sys, time
import tests.conftest
from tests.ranks import run_ranks

def case(rank, world_size):
    print(os.getpid(), file=open(sys.argv[1], "w"), flush=True)
    time.sleep(60)

run_ranks(1, case, backend=None)
"""


def test_ranks_die_with_their_parent(tmp_path):
    path = tmp_path / "pid"
    root = Path(__file__).parent.parent
    parent = subprocess.Popen([sys.executable, "-c", PARENT, path], cwd=root)
    try:
        pid = _wait_for(lambda: path.exists() and path.read_text().strip())
    finally:
        parent.kill()
        parent.wait()
    _wait_for(lambda: not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text().split()[2])


def _wait_for(condition, seconds: float = 30.0):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.02)
    raise AssertionError(f"not so within {seconds} s")


def names_in(directory: str) -> list[str]:
    return sorted(path.name for path in Path(directory).iterdir())


def assert_no_children() -> None:
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)
