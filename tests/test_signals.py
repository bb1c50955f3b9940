"""Signals: noted and nothing else, old handlers kept, and data workers that outlive them. Real processes, real signals."""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import DataLoader

from forgather_ckpt import signals
from forgather_ckpt.data import StatefulLoader
from forgather_ckpt.errors import DeclarationError
from forgather_ckpt.signals import SignalGuard, exit_code, held_back, ignore_signals_in_workers, worker_init
from tests.ranks import run_ranks, values
from tests.test_data import Ids

pytestmark = [pytest.mark.multiprocess, pytest.mark.filterwarnings("ignore:This DataLoader will create")]

DEADLINE_SECONDS = 60


def in_process(case: Callable[[], Any]) -> Any:
    """What `case` returns, run in a process of its own in which no signal is handled yet."""
    [value] = values(run_ranks(1, lambda rank, world_size: case(), backend=None, timeout=DEADLINE_SECONDS))
    return value


def send(*names: str) -> None:
    for name in names:
        os.kill(os.getpid(), signal.Signals[name])


def send_from_elsewhere(name: str, pid: int) -> None:
    """As a launcher does; `pid` is that of a process, or minus that of a process group."""
    subprocess.run(["kill", "-s", name.removeprefix("SIG"), "--", str(pid)], check=True, start_new_session=True)


def has_ended(pid: int) -> bool:
    """Whether a process that need not be a child ends before the deadline."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([pidfd], [], [], DEADLINE_SECONDS)[0])
    finally:
        os.close(pidfd)


# ---- what is noted


@pytest.mark.parametrize(
    ("sent", "received", "saves"),
    [
        ((), None, [False]),
        (("SIGTERM",), ("SIGTERM", 15, 1), [False]),
        (("SIGUSR1", "SIGTERM", "SIGTERM"), ("SIGUSR1", 10, 3), [False]),
        (("SIGINT", "SIGINT", "SIGTERM"), ("SIGINT", 2, 3), [False]),
        (("SIGUSR2", "SIGUSR2"), None, [True, False]),
        (("SIGUSR2", "SIGTERM"), ("SIGTERM", 15, 1), [True, False]),
    ],
)
def test_a_signal_is_noted_and_nothing_else_happens(sent, received, saves, monkeypatch):
    monkeypatch.setattr(signals, "INSISTING_SECONDS", 3600)  # so that a busy machine does not make a person of us

    def case():
        with SignalGuard(save=("SIGUSR2",)) as guard:
            send(*sent)
            asked = guard.save_requested
            taken = [guard.take_save() for _ in saves]
        noted = guard.received
        return noted and (noted.name, noted.number, noted.count), asked, taken

    assert in_process(case) == (received, saves[0], saves)


def test_the_time_is_that_of_the_first_one():
    def case():
        with SignalGuard() as guard:
            send("SIGTERM")
            first = guard.received
            send("SIGTERM", "SIGUSR1")
            return first, guard.received

    first, last = in_process(case)
    assert (last.monotonic_seconds, last.name) == (first.monotonic_seconds, first.name)
    assert (first.count, last.count) == (1, 3)


def test_save_signals_that_come_after_one_was_taken_are_told_again():
    def case():
        with SignalGuard(save=("SIGUSR2",)) as guard:
            told = []
            for _ in range(3):
                send("SIGUSR2")
                told.append(guard.take_save())
            return [*told, guard.take_save()]

    assert in_process(case) == [True, True, True, False]


@pytest.mark.parametrize(("insisting_seconds", "ends"), [(1e-9, True), (3600, False)])
def test_a_person_who_insists_interrupts_and_copies_of_one_signal_do_not(insisting_seconds, ends, monkeypatch):
    monkeypatch.setattr(signals, "INSISTING_SECONDS", insisting_seconds)

    def case():
        with SignalGuard() as guard:
            send("SIGTERM", "SIGINT")
            try:
                send("SIGINT")
            except KeyboardInterrupt:
                return True, guard.received.name, guard.received.count
        return False, guard.received.name, guard.received.count

    assert in_process(case) == (ends, "SIGTERM", 3)


def test_however_often_sigterm_comes_it_interrupts_nothing(monkeypatch):
    monkeypatch.setattr(signals, "INSISTING_SECONDS", 0)

    def case():
        with SignalGuard() as guard:
            send(*["SIGTERM", "SIGUSR1"] * 3)
            return guard.received.count

    assert in_process(case) == 6


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGUSR1", 138)])
def test_exit_codes_are_those_of_shells(name, code):
    assert exit_code(signal.Signals[name]) == code


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"stop": ("SIGTEM",)}, "stop names 'SIGTEM', which is no signal"),
        ({"stop": ("TERM",)}, "use names such as 'SIGTERM'"),
        ({"save": ("SIGKILL",)}, "save names 'SIGKILL', which is no signal that a training can handle"),
        ({"stop": "SIGTERM"}, "is a string; use a tuple of names, \\('SIGTERM',\\)"),
        ({"stop": None}, "stop=None is no list of names; use a tuple of names, .* or \\(\\) for none"),
        ({"stop": ("SIGTERM",), "save": ("SIGTERM",)}, "SIGTERM is given as stop= and as save="),
    ],
)
def test_signals_that_cannot_be_handled_are_refused(arguments, problem):
    with pytest.raises(DeclarationError, match=problem):
        SignalGuard(**arguments)


# ---- what was there before


def test_old_handlers_are_called_after_the_flag_is_set_and_come_back():
    def case():
        seen = []
        guard = SignalGuard()

        def old(number, frame):
            seen.append((number, guard.received is not None))

        signal.signal(signal.SIGUSR1, old)
        with guard:
            send("SIGUSR1")
        send("SIGUSR1")
        restored = signal.getsignal(signal.SIGUSR1) is old, signal.getsignal(signal.SIGTERM), signal.getsignal(2)
        return seen, guard.received.count, restored

    seen, count, restored = in_process(case)
    assert seen == [(signal.SIGUSR1, True)] * 2
    assert count == 1
    assert restored == (True, signal.SIG_DFL, signal.default_int_handler)


def test_a_signal_that_was_ignored_stays_ignored():
    def case():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with SignalGuard() as guard:
            send("SIGINT")
            return guard.received, signal.getsignal(signal.SIGINT)

    assert in_process(case) == (None, signal.SIG_IGN)


def test_of_nested_guards_each_notes_what_comes_while_it_is_entered():
    def case():
        with SignalGuard() as outer:
            with SignalGuard(stop=("SIGTERM",)) as inner:
                send("SIGTERM", "SIGUSR1")
            send("SIGTERM")
            counts = inner.received.count, outer.received.count
        return counts, signal.getsignal(signal.SIGTERM), set(+signals._guarded)

    assert in_process(case) == ((1, 3), signal.SIG_DFL, set())


def test_a_handler_put_over_ours_stays_and_may_call_it_when_it_is_over():
    def case():
        seen = []
        signal.signal(signal.SIGTERM, lambda number, frame: seen.append("first"))
        with SignalGuard() as guard:
            ours = signal.getsignal(signal.SIGTERM)
            signal.signal(signal.SIGTERM, lambda number, frame: (seen.append("last"), ours(number, frame)))
            send("SIGTERM")
        send("SIGTERM")
        return seen, guard.received.count

    assert in_process(case) == (["last", "first"] * 2, 1)


def test_a_guard_is_entered_once_and_left_as_often_as_one_likes():
    def case():
        guard = SignalGuard()
        guard.__exit__(None, None, None)
        with guard, pytest.raises(RuntimeError, match="entered already"):
            guard.__enter__()
        guard.__exit__(None, None, None)
        return signal.getsignal(signal.SIGTERM)

    assert in_process(case) == signal.SIG_DFL


def test_in_another_thread_it_warns_and_changes_nothing(caplog):
    before = signal.getsignal(signal.SIGTERM)
    found = []

    def enter():
        with SignalGuard() as guard:
            found.append((signal.getsignal(signal.SIGTERM), guard.received))

    with caplog.at_level(logging.WARNING):
        thread = threading.Thread(target=enter, name="loop")
        thread.start()
        thread.join(DEADLINE_SECONDS)
    assert found == [(before, None)]
    [message] = caplog.messages
    assert "Python handles them in the main thread only, and this is 'loop'" in message


def test_in_a_forked_child_a_signal_does_what_it_did_before():
    def case():
        with SignalGuard() as guard:
            fork = multiprocessing.get_context("fork")
            is_running = fork.Event()
            child = fork.Process(target=lambda: (is_running.set(), time.sleep(DEADLINE_SECONDS)), daemon=True)
            child.start()
            is_running.wait(DEADLINE_SECONDS)
            child.terminate()
            child.join(DEADLINE_SECONDS)
            return child.exitcode, guard.received

    assert in_process(case) == (-signal.SIGTERM, None)


# ---- data workers


def ours() -> StatefulLoader:
    return StatefulLoader(Ids(64), 2, num_workers=2, shuffle=False)


def plain() -> DataLoader[Any]:
    return DataLoader(Ids(64), 2, num_workers=2, worker_init_fn=ignore_signals_in_workers)  # type: ignore[arg-type]


@pytest.mark.parametrize("make_loader", [ours, plain])
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2"])
def test_workers_outlive_a_signal_to_the_whole_process_group(name, make_loader):
    def case():
        os.setpgid(0, 0)
        loader = make_loader()
        read = []
        with SignalGuard(save=("SIGUSR2",)) as guard:
            for batch in loader:
                if len(read) in (4, 40):
                    send_from_elsewhere(name, -os.getpgrp())
                read += batch.tolist()
            return read, guard.received is not None, guard.take_save()

    is_save = name == "SIGUSR2"
    assert in_process(case) == (list(range(64)), not is_save, is_save)


class Pid(Ids):
    def __getitem__(self, index: int) -> int:
        return os.getpid()


def test_workers_end_with_a_rank_that_is_killed(tmp_path: Path):
    script = tmp_path / "rank.py"
    script.write_text(
        "import os, signal\n"
        "from forgather_ckpt.data import StatefulLoader\n"
        "from tests.test_signals import Pid\n"
        "batches = iter(StatefulLoader(Pid(100), 1, num_workers=2))\n"
        "print(*{next(batches).item() for _ in range(4)}, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    ended = run_script(script)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    pids = [int(pid) for pid in ended.stdout.split()]
    assert len(pids) == 2
    assert all(has_ended(pid) for pid in pids)


@pytest.mark.parametrize("loader", ["StatefulLoader(Ids(100), 1, num_workers=2)", "PLAIN"])
def test_a_rank_that_fails_while_workers_wait_ends(loader: str, tmp_path: Path):
    """As the iterator is still held, `multiprocessing` ends the workers at exit, by SIGTERM, and waits for them."""
    plain = "DataLoader(Ids(100), 1, num_workers=2, worker_init_fn=ignore_signals_in_workers)"
    script = tmp_path / "rank.py"
    script.write_text(
        "from torch.utils.data import DataLoader\n"
        "from forgather_ckpt.data import StatefulLoader\n"
        "from forgather_ckpt.signals import ignore_signals_in_workers\n"
        "from tests.test_data import Ids\n"
        f"batches = iter({loader.replace('PLAIN', plain)})\n"
        "next(batches)\n"
        "raise RuntimeError('the training failed')\n"
    )
    ended = run_script(script)
    assert ended.returncode == 1
    assert "the training failed" in ended.stderr


def run_script(script: Path) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).parent.parent
    return subprocess.run(
        [sys.executable, "-W", "ignore", script],
        env={**os.environ, "PYTHONPATH": str(root)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=DEADLINE_SECONDS,
    )


def test_a_signal_to_a_worker_that_is_just_starting_does_not_end_it():
    def case():
        ready, go = os.pipe()
        with held_back():
            pid = os.fork()
            if pid == 0:
                os.read(ready, 1)
                ignore_signals_in_workers()
                os._exit(7)
        for name in ("SIGTERM", "SIGINT", "SIGUSR1"):
            send_from_elsewhere(name, pid)
        os.write(go, b"x")
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    assert in_process(case) == 7


def test_signals_that_are_held_back_come_afterwards():
    def case():
        with SignalGuard(save=("SIGUSR2",)) as guard:
            with held_back():
                send("SIGTERM", "SIGUSR2")
                meanwhile = guard.received, guard.save_requested
            return meanwhile, guard.received.name, guard.save_requested

    assert in_process(case) == ((None, False), "SIGTERM", True)


def prepare(worker_id: int) -> None:
    global prepared
    prepared = worker_id, signal.getsignal(signal.SIGINT)


prepared: tuple[int, Any] | None = None


class Prepared(Ids):
    def __getitem__(self, index: int) -> Any:
        return prepared


def test_a_users_own_function_runs_in_the_worker_too():
    init = pickle.loads(pickle.dumps(worker_init(prepare)))
    loader = DataLoader(Prepared(4), batch_size=None, num_workers=2, worker_init_fn=init)
    assert sorted(loader) == [[worker, signal.SIG_IGN] for worker in (0, 0, 1, 1)]
