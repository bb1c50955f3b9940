"""Signals that ask a training to end, or to save: noted where they arrive, acted upon at the next step.

A handler runs between any two lines of the training, and a save from there would begin an exchange inside of another
one, on one rank alone. So it only sets a flag, which the training looks at where all ranks can agree on a step.

A signal often goes to a whole process group: Ctrl-C, torchrun (each rank with its children), Slurm. Data workers would
die of it, and the rank with them before it has saved; so they ignore what the rank handles.
"""

import functools
import logging
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import Any, Self

from forgather_ckpt.errors import DeclarationError

logger = logging.getLogger(__name__)

STOP_SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1")
"""What stops a training, unless said otherwise: schedulers and launchers, a person, Slurm's warning before the end."""

INSISTING_SECONDS = 2.0
"""A second SIGINT that comes sooner is another copy of the same Ctrl-C: the terminal's and the launcher's."""

_OUT_OF_REACH = ("SIGKILL", "SIGSTOP", "SIGCHLD", "SIGSEGV", "SIGBUS", "SIGFPE", "SIGILL", "SIGABRT")

_Before = Callable[[int, FrameType | None], Any] | int | signal.Handlers

_guarded: Counter[int] = Counter()
"""By how many guards of this process each signal is handled; a forked worker finds it as it was."""


@dataclass(frozen=True)
class Received:
    """The first signal that asked for the end."""

    name: str
    number: int
    count: int
    """How many have asked for the end so far, this one included."""
    monotonic_seconds: float
    """When it came, by `time.monotonic`."""


class SignalGuard:
    """While it is entered, the signals `stop` and `save` are noted instead of ending the process.

    >>> with SignalGuard(stop=("SIGTERM", "SIGINT"), save=("SIGUSR2",)) as guard:
    ...     while guard.received is None:
    ...         train_step()
    ...         if guard.take_save():
    ...             save()

    A handler that somebody had installed is called too, after the flag is set, except Python's own for SIGINT. A signal
    that was ignored (`nohup`, shells' background jobs) stays ignored; one that code outside of Python handles is left to
    it. On exit the old handlers are back, unless another one has been put over ours meanwhile. A second SIGINT at least
    2 s after the first raises KeyboardInterrupt: a person insists. In a forked child the signals do what they did before.

    Python runs handlers in the main thread only, and only there they can be installed: elsewhere entering warns, and
    nothing is noted. A main thread inside a long call of C code (a collective that waits) notes the signal after it.
    """

    def __init__(self, stop: Sequence[str] = STOP_SIGNALS, save: Sequence[str] = ()) -> None:
        self._stop = signal_numbers(stop, "stop")
        self._save = signal_numbers(save, "save")
        if both := self._stop & self._save:
            raise DeclarationError(
                f"{signal.Signals(min(both)).name} is given as stop= and as save=; a signal asks for one of them"
            )
        self._before: dict[int, _Before] = {}
        self._pid: int | None = None
        """Where the flags count; None before and after."""
        self._first: tuple[int, float] | None = None
        self._first_interrupt: float | None = None
        self._count = 0
        self._num_saves = self._num_saves_taken = 0

    @property
    def received(self) -> Received | None:
        """The first stop signal; it stays."""
        if self._first is None:
            return None
        number, seconds = self._first
        return Received(signal.Signals(number).name, number, self._count, seconds)

    @property
    def save_requested(self) -> bool:
        """Whether a save signal has come that `take_save` has not told of."""
        return self._num_saves != self._num_saves_taken

    def take_save(self) -> bool:
        """The same, once: signals that have come by now are answered together."""
        seen = self._num_saves  # one that comes from here on is told next time
        is_new, self._num_saves_taken = seen != self._num_saves_taken, seen
        return is_new

    def __enter__(self) -> Self:
        if self._pid is not None:
            raise RuntimeError("this SignalGuard is entered already; make another one")
        if threading.current_thread() is not threading.main_thread():
            logger.warning(
                "signals are not handled: Python handles them in the main thread only, and this is %r; a signal will end "
                "the process without a checkpoint",
                threading.current_thread().name,
            )
            return self
        self._pid = os.getpid()
        for number in sorted(self._stop | self._save):
            before = signal.getsignal(number)
            if before is None:
                logger.warning("%s is left to code outside of Python that handles it", signal.Signals(number).name)
            elif before != signal.SIG_IGN:
                self._before[number] = before
                signal.signal(number, self._note)
        _guarded.update(self._before.keys())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Restore the old handlers; a second call does nothing."""
        if self._pid is None:
            return
        self._pid = None
        _guarded.subtract(self._before.keys())
        if threading.current_thread() is not threading.main_thread():
            logger.warning("the handlers of signals stay, and do what was done before: this is not the main thread")
            return
        for number, before in self._before.items():
            if signal.getsignal(number) == self._note:
                signal.signal(number, before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        before = self._before[number]
        if os.getpid() != self._pid:  # a forked child, or a guard that is over and still called by a later handler
            _as_before(before, number, frame)
            return
        now = time.monotonic()
        insists = False
        if number in self._save:
            self._num_saves += 1
        else:
            self._first = self._first or (number, now)
            self._count += 1
            if number == signal.SIGINT:
                self._first_interrupt = self._first_interrupt or now
                insists = now - self._first_interrupt >= INSISTING_SECONDS
        if callable(before) and before is not signal.default_int_handler:
            before(number, frame)
        if insists:
            raise KeyboardInterrupt


def _as_before(before: _Before, number: int, frame: FrameType | None) -> None:
    if callable(before):
        before(number, frame)
    else:
        signal.signal(number, before)
        signal.raise_signal(number)


def signal_numbers(names: Sequence[str], argument: str) -> frozenset[int]:
    """The numbers of these signals; `DeclarationError`, which names the argument, where a training cannot handle one."""
    if isinstance(names, str):
        raise DeclarationError(f"{argument}={names!r} is a string; use a tuple of names, ({names!r},)")
    if not isinstance(names, Sequence):
        raise DeclarationError(
            f"{argument}={names!r} is no list of names; use a tuple of names, ('SIGTERM',), or () for none"
        )
    for name in names:
        if name not in signal.Signals.__members__ or name in _OUT_OF_REACH:
            raise DeclarationError(
                f"{argument} names {name!r}, which is no signal that a training can handle; use names such as 'SIGTERM'"
            )
    return frozenset(signal.Signals[name].value for name in names)


def exit_code(number: int) -> int:
    """What a process says that ended because of this signal, in good order: 128 and its number, as shells have it."""
    return 128 + number


# ---- data workers


def _heard_by_the_rank() -> set[int]:
    return {signal.Signals[name].value for name in STOP_SIGNALS} | set(+_guarded)


def ignore_signals_in_workers(worker_id: int | None = None) -> None:
    """Let this data worker outlive the signals that its rank handles: for `DataLoader(worker_init_fn=…)`.

    SIGTERM is ignored from everybody but the rank itself. `multiprocessing` ends its workers by it when the rank exits,
    and then waits for them, without end if they ignored it. When the rank is dead, torch's watchdog ends the worker
    within 5 s of its last item. Programs that a worker starts inherit this: they do not hear SIGTERM either (a dataset
    that ends its own uses `kill`).
    """
    ignored = _heard_by_the_rank()
    by_others = ignored - {signal.SIGTERM}
    for number in by_others:
        signal.signal(number, signal.SIG_IGN)
    # Blocked in this thread, and so in all that it will start, SIGTERM waits for the one that asks who sent it.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_with, args=(os.getppid(),), name="ends with its rank", daemon=True).start()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, by_others)


def _end_with(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


def worker_init(user_fn: Callable[[int], Any] | None = None) -> Callable[[int], None]:
    """A `worker_init_fn` that makes the worker ignore signals, then calls `user_fn`; it can be pickled if that can."""
    return functools.partial(_init_worker, user_fn)


def _init_worker(user_fn: Callable[[int], Any] | None, worker_id: int) -> None:
    ignore_signals_in_workers(worker_id)
    if user_fn is not None:
        user_fn(worker_id)


@contextmanager
def held_back() -> Iterator[None]:
    """Signals that come meanwhile are delivered afterwards, and workers started here begin with them blocked.

    Else one that comes before `ignore_signals_in_workers` has run ends the worker.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _heard_by_the_rank())
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
