"""`Comm.agree`: one verdict for all ranks, whatever one of them does.

Deadlines of 600 s in these tests mean that nobody waits for one: the harness ends the ranks long before.
"""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch.distributed as dist

from forgather_ckpt import CheckpointCoordinator, SharingPattern, StateComponent
from forgather_ckpt.comm import Comm
from forgather_ckpt.discovery import connect
from forgather_ckpt.errors import CheckpointError, RankFailed, RankTimeout, StorageError
from tests.components import Box, Refusal, refusal, the_same
from tests.ranks import run_ranks, values

pytestmark = pytest.mark.multiprocess


def join(timeout_seconds: float = 600) -> Comm:
    comm, _ = connect(lambda: None, timeout_seconds=timeout_seconds)
    return comm


def works(comm: Comm) -> list[int]:
    """One whole operation: what the ranks said, in rank order."""
    comm.begin_operation()
    return comm.agree("counting", lambda: comm.rank, lambda results: results)


@pytest.mark.parametrize("backend", ["gloo", "cuda:gloo", None])
@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_all_ranks_get_the_decision_of_rank_0_with_any_default_group_or_none(world_size: int, backend: str | None):
    def case(rank: int, world_size: int) -> list[Any]:
        comm = join()
        comm.begin_operation()
        decided = comm.agree("adding", lambda: {"rank": rank}, lambda results: [sum(r["rank"] for r in results), rank])
        return [decided, comm.agree("nothing", lambda: rank), works(comm), join().world_size]

    results = the_same(values(run_ranks(world_size, case, backend=backend)))
    assert results == [[sum(range(world_size)), 0], None, list(range(world_size)), world_size]


def test_one_rank_that_raises_stops_all_with_one_error_that_names_it():
    def case(rank: int, world_size: int) -> list[Any]:
        comm = join()
        results = []

        def fail(culprit: int, error: Exception) -> None:
            if rank == culprit:
                raise error

        for culprit in range(world_size):
            for error in (ValueError("not so"), StorageError("disk on fire", path="/x", component="model")):
                comm.begin_operation()
                comm.agree("a good phase", lambda: None)
                try:
                    comm.agree("burning", lambda culprit=culprit, error=error: fail(culprit, error))
                except CheckpointError as err:
                    results.append(err.to_wire())
                    assert (err.__cause__ is error) == (rank == culprit)  # with its traceback, where it happened
                results.append(works(comm))
        return results

    results = the_same(values(run_ranks(3, case)))
    for culprit in range(3):
        plain, after, typed, again = results[4 * culprit : 4 * culprit + 4]
        told = f"burning failed on rank {culprit}: "
        assert plain == RankFailed(f"{told}ValueError: not so", rank=culprit).to_wire()
        assert typed == StorageError(f"{told}disk on fire", rank=culprit, path="/x", component="model").to_wire()
        assert after == again == [0, 1, 2]


def test_the_others_do_not_wait_for_the_work_of_a_rank_that_has_raised_elsewhere():
    """A rank that beats while it works leaves its work; one that does not is told when it comes."""

    def case(rank: int, world_size: int) -> tuple[Refusal, bool, list[int]]:
        comm = join()
        store = dist.distributed_c10d._get_default_store()
        comm.begin_operation()
        is_finished = False

        def work() -> None:
            nonlocal is_finished
            if rank == 2:
                raise ValueError("at once")
            end = time.monotonic() + 20
            while time.monotonic() < end:
                if rank == 0:
                    comm.beat()
                elif store.check(["rank 0 has raised"]):
                    is_finished = True
                    break
                time.sleep(0.01)

        error = refusal(lambda: comm.agree("working", work))
        if rank == 0:
            store.set("rank 0 has raised", "")
        return error, is_finished, works(comm)

    results = values(run_ranks(3, case))
    assert the_same([(error, after) for error, _, after in results]) == (
        ("RankFailed", "working failed on rank 2: ValueError: at once"),
        [0, 1, 2],
    )
    assert [is_finished for _, is_finished, _ in results] == [False, True, False]


def test_several_ranks_that_fail_differently_are_all_named():
    def case(rank: int, world_size: int) -> list[Refusal]:
        comm = join()

        def fail_with(error: Exception | None) -> Callable[[], None]:
            def work() -> None:
                dist.barrier()
                if rank == 0:
                    time.sleep(0.5)  # so that it collects when all have spoken
                if error is not None:
                    raise error

            return work

        errors = [None, StorageError("no disk"), ValueError("no value"), StorageError("no disk")]
        comm.begin_operation()
        different = refusal(lambda: comm.agree("working", fail_with(errors[rank])))
        comm.begin_operation()
        many = refusal(lambda: comm.agree("working", fail_with(ValueError(f"my own {rank}"))))
        return [different, many]

    different, many = the_same(values(run_ranks(4, case)))
    assert different == (
        "StorageError",
        "working failed on ranks 1, 3: no disk; on rank 2: ValueError: no value",
    )
    assert many[1].startswith("working failed on rank 0: ValueError: my own 0; on rank 1: ValueError: my own 1; ")


def test_a_decision_that_fails_on_rank_0_fails_on_all():
    def case(rank: int, world_size: int) -> list[Any]:
        comm = join()
        results: list[Any] = []
        for error in (KeyError("x"), StorageError("cannot commit", path="/y")):

            def decide(_: list[Any], error: Exception = error) -> None:
                raise error

            comm.begin_operation()
            results += [refusal(lambda decide=decide: comm.agree("deciding", lambda: None, decide)), works(comm)]
        return results

    assert the_same(values(run_ranks(3, case))) == [
        ("RankFailed", "deciding failed on rank 0: KeyError: 'x'"),
        [0, 1, 2],
        ("StorageError", "cannot commit"),
        [0, 1, 2],
    ]


@pytest.mark.parametrize("culprit", [0, 1, 2])
def test_a_killed_rank_is_named_at_once_although_the_deadline_is_far(culprit: int):
    def case(rank: int, world_size: int) -> Any:
        comm = join()
        comm.begin_operation()
        pids = comm.agree("telling pids", os.getpid, lambda results: results)

        def work() -> None:
            if rank == culprit:
                os.kill(os.getpid(), signal.SIGKILL)

        first = refusal(lambda: comm.agree("working", work))
        comm.begin_operation()
        return pids[culprit], first, refusal(lambda: comm.agree("working again", lambda: None))

    pid, first, again = the_same(values(run_ranks(3, case, expect_dead=[culprit])))
    assert first == ("RankTimeout", f"working failed: rank {culprit} (pid {pid}) died")
    assert again == ("RankTimeout", f"working again failed: rank {culprit} (pid {pid}) died")


@pytest.mark.parametrize("reason", [None, ValueError("no more data")], ids=str)
@pytest.mark.parametrize("culprit", [0, 1, 2])
def test_a_rank_that_has_left_is_not_waited_for_and_the_reason_is_told(culprit: int, reason: Exception | None):
    """Whether its process lives on, as where an error is caught far outside, or ends."""

    def case(rank: int, world_size: int) -> Any:
        comm = join()
        comm.begin_operation()
        decided = comm.agree("working", lambda: rank, lambda results: results)
        if rank == culprit:
            comm.say_goodbye(reason)
            if reason is None:
                time.sleep(2)  # it lives on
            return None
        comm.begin_operation()
        return decided, refusal(lambda: comm.agree("going on", lambda: None))

    outcomes = values(run_ranks(3, case))
    assert outcomes.pop(culprit) is None
    told = "" if reason is None else " after ValueError: no more data"
    left = f"going on failed: rank {culprit} has closed its coordinator{told}"
    assert the_same(outcomes) == ([0, 1, 2], ("RankFailed", left))


def test_a_rank_killed_after_it_has_answered_fails_the_next_phase_only():
    def case(rank: int, world_size: int) -> Any:
        comm = join()
        comm.begin_operation()
        decided = comm.agree("working", lambda: rank, lambda results: results)
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return decided, refusal(lambda: comm.agree("going on", lambda: None))[0]

    assert the_same(values(run_ranks(3, case, expect_dead=[1]))) == ([0, 1, 2], "RankTimeout")


@pytest.mark.parametrize("culprit", [0, 1])
def test_a_stopped_rank_is_named_at_the_deadline_and_all_go_on_together_afterwards(culprit: int):
    def case(rank: int, world_size: int) -> tuple[Refusal, list[int]]:
        comm = join(timeout_seconds=1)
        comm.begin_operation()
        pids = comm.agree("telling pids", os.getpid, lambda results: results)

        def work() -> None:
            if rank == culprit:
                os.kill(os.getpid(), signal.SIGSTOP)

        error = refusal(lambda: comm.agree("working", work))
        if rank != culprit:
            time.sleep(0.5)  # so that every other rank has given up by itself
            os.kill(pids[culprit], signal.SIGCONT)
        return error, works(comm)

    error, after = the_same(values(run_ranks(3, case)))
    assert after == [0, 1, 2]
    if culprit == 0:
        assert error == ("RankTimeout", "working failed: no verdict from rank 0 within the deadline")
    else:
        assert error[0] == "RankTimeout"
        assert error[1].startswith(f"working failed: no answer from rank {culprit} within 1 s (timeout_seconds)")


@pytest.mark.parametrize("is_killed", [False, True])
def test_rank_0_stopped_or_killed_while_it_decides(is_killed: bool):
    """Nobody can know then whether its decision took effect: all give up in bounded time, and rank 0 with them."""

    def case(rank: int, world_size: int) -> tuple[Refusal, list[int] | None]:
        comm = join(timeout_seconds=1)
        comm.begin_operation()
        pids = comm.agree("telling pids", os.getpid, lambda results: results)

        def decide(_: list[Any]) -> str:
            os.kill(os.getpid(), signal.SIGKILL if is_killed else signal.SIGSTOP)
            return "late"

        error = refusal(lambda: comm.agree("deciding", lambda: None, decide))
        if not is_killed and rank != 0:
            os.kill(pids[0], signal.SIGCONT)  # at once: another rank may not have given up yet
        return error, None if is_killed else works(comm)

    (kind, message), after = the_same(values(run_ranks(3, case, expect_dead=[0] if is_killed else [])))
    assert kind == "RankTimeout"
    if is_killed:
        assert message.startswith("deciding failed: rank 0 (pid ")
    else:
        assert (message, after) == ("deciding failed: no verdict from rank 0 within the deadline", [0, 1, 2])


def test_progress_extends_the_deadline_of_everybody_who_waits():
    def case(rank: int, world_size: int) -> Any:
        comm = join(timeout_seconds=1)

        def busily(seconds: float) -> None:
            end = time.monotonic() + seconds
            while time.monotonic() < end:
                comm.beat()
                time.sleep(0.02)

        def decide(results: list[int]) -> list[int]:
            busily(4)  # longer than the deadline and the grace of the others
            return results

        comm.begin_operation()
        decided = comm.agree("working", lambda: busily(4 if rank == 1 else 0) or rank, decide)
        comm.begin_operation()
        silent = refusal(lambda: comm.agree("sleeping", lambda: time.sleep(2.5 if rank == 1 else 0)))
        return decided, silent

    decided, (kind, message) = the_same(values(run_ranks(3, case)))
    assert decided == [0, 1, 2]
    assert (kind, "no answer from rank 1 within 1 s" in message) == ("RankTimeout", True)


@pytest.mark.parametrize("culprit", [0, 1])
def test_a_keyboard_interrupt_at_work_is_obeyed_there_and_told_to_the_others(culprit: int):
    def case(rank: int, world_size: int) -> tuple[Any, list[int]]:
        comm = join()
        comm.begin_operation()

        def work() -> None:
            if rank == culprit:
                raise KeyboardInterrupt

        if rank == culprit:
            with pytest.raises(KeyboardInterrupt):
                comm.agree("working", work)
            return None, works(comm)
        return refusal(lambda: comm.agree("working", work)), works(comm)

    results = values(run_ranks(3, case))
    assert results.pop(culprit) == (None, [0, 1, 2])
    (kind, message), after = the_same(results)
    assert (kind, after) == ("RankFailed", [0, 1, 2])
    assert message.startswith(f"working failed on rank {culprit}: KeyboardInterrupt")


@pytest.mark.parametrize("culprit", [0, 1])
def test_a_keyboard_interrupt_while_waiting_is_told_to_the_others(culprit: int):
    def case(rank: int, world_size: int) -> tuple[str, list[int]]:
        comm = join()

        def interrupt(signum: int, frame: FrameType | None) -> None:
            raise KeyboardInterrupt

        if rank == culprit:
            signal.signal(signal.SIGALRM, interrupt)
            signal.setitimer(signal.ITIMER_REAL, 0.5)
        comm.begin_operation()
        try:
            comm.agree("waiting", lambda: time.sleep(1.5 if rank == 2 else 0))
            comm.agree("going on", lambda: None)
        except KeyboardInterrupt:
            outcome = "interrupted"
        except RankFailed as err:
            outcome = err.message
        return outcome, works(comm)

    results = values(run_ranks(3, case))
    assert results.pop(culprit) == ("interrupted", [0, 1, 2])
    message, after = the_same(results)
    assert after == [0, 1, 2]
    assert f"rank {culprit}" in message
    assert "KeyboardInterrupt" in message


class LooksLate:
    """A store whose first answer, that there is no verdict yet, is heard when the process `pid` has ended."""

    def __init__(self, store: dist.Store, pid: int) -> None:
        self._store = store
        self._pid: int | None = pid

    def check(self, keys: list[str]) -> bool:
        answer = self._store.check(keys)
        if self._pid is not None and keys[0].endswith("/verdict"):
            assert not answer
            while Path(f"/proc/{self._pid}/exe").exists():
                time.sleep(0.01)
            time.sleep(0.3)  # past the next look at who is alive
            self._pid = None
        return answer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)


def test_rank_0_may_exit_as_soon_as_it_has_spoken():
    """The others may see that its process is gone before they look for its verdict; it is there all the same."""

    def case(rank: int, world_size: int) -> list[int]:
        comm = join()
        comm.begin_operation()
        pids = comm.agree("telling pids", os.getpid, lambda results: results)
        if rank != 0:
            comm._store = LooksLate(comm._store, pids[0])  # type: ignore[assignment]
        return comm.agree("the last phase", lambda: time.sleep(0.3 if rank == 0 else 0) or rank, lambda ranks: ranks)

    assert the_same(values(run_ranks(3, case))) == [0, 1, 2]


class LooksSeldom:
    """A store whose verdicts are asked for only every now and then."""

    def __init__(self, store: dist.Store) -> None:
        self._store = store

    def check(self, keys: list[str]) -> bool:
        if keys[0].endswith("/verdict"):
            time.sleep(0.1)
        return self._store.check(keys)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)


@pytest.mark.parametrize("fails", [False, True])
def test_rank_0_may_host_the_store_and_exit_after_closing(tmp_path: Path, fails: bool):
    """As without torchrun, and where agents do not share their store with the ranks."""

    def case(rank: int, world_size: int, port: int) -> Any:
        store = dist.TCPStore("127.0.0.1", port, world_size, is_master=rank == 0)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
        box = Box({"weight": rank})
        box.fail_save = ValueError("not now") if fails and rank == 0 else None
        coordinator = CheckpointCoordinator(
            [StateComponent("own", box, SharingPattern.PER_RANK)], tmp_path, timeout_seconds=30
        )
        comm = coordinator._job.comm
        if rank != 0:
            comm._store = LooksSeldom(comm._store)  # type: ignore[assignment]
        with coordinator:
            if fails:
                told = refusal(lambda: coordinator.save_checkpoint(1))[1]
            else:
                told = coordinator.save_checkpoint(1).name
        if rank == 0:
            os._exit(0)
        return told

    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    outcomes = run_ranks(3, lambda rank, size: case(rank, size, port), backend=None, expect_dead=[0])
    told = the_same(values(outcomes))
    assert ("on rank 0:" in told and "not now" in told) if fails else told == "checkpoint-1", told


def test_operations_leave_nothing_behind_in_the_store(monkeypatch):
    monkeypatch.setattr("forgather_ckpt.comm._KEPT_OPERATIONS", 4)

    def case(rank: int, world_size: int) -> list[int]:
        comm = join()
        store = dist.distributed_c10d._get_default_store()

        def fail() -> None:
            raise ValueError("no")

        sizes = []
        for _ in range(3):
            for _ in range(8):
                works(comm)
                comm.begin_operation()
                refusal(lambda: comm.agree("failing", fail))
            dist.barrier()
            sizes.append(store.num_keys())
            dist.barrier()
        return sizes

    for sizes in values(run_ranks(2, case)):
        assert sizes[1] == sizes[2]


@pytest.mark.multiprocess
@pytest.mark.parametrize("culprit", [0, 1])
def test_a_call_that_one_rank_made_alone_does_not_leave_the_others_behind(culprit: int, tmp_path: Path):
    def case(rank: int, world_size: int) -> list[str]:
        box = Box({"w": rank * 0})
        coordinator = CheckpointCoordinator(
            [StateComponent("a", box, SharingPattern.REPLICATED)], tmp_path / str(culprit), timeout_seconds=1
        )
        told = []
        if rank == culprit:
            try:
                coordinator.save_checkpoint(1)
            except RankTimeout as err:
                told.append(type(err).__name__)
        dist.barrier()
        for step in (2, 3):
            told.append(coordinator.save_checkpoint(step).name)
        return told

    told = values(run_ranks(2, case))
    assert told[culprit] == ["RankTimeout", "checkpoint-2", "checkpoint-3"]
    assert told[1 - culprit] == ["checkpoint-2", "checkpoint-3"]
