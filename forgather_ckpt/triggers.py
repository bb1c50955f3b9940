"""When to save, from absolute step numbers and the training time of the whole run; how often that is wise. Pure.

Nothing here counts from the start of a process, so a resume keeps every grid.
"""

import math
from dataclasses import dataclass

from forgather_ckpt.errors import DeclarationError
from forgather_ckpt.metrics import rankable

DAY_SECONDS = 24 * 3600.0

_UNITS = ((DAY_SECONDS, "days"), (3600.0, "h"), (60.0, "min"))


def is_multiple(step: int, every: int) -> bool:
    """Whether something that happens every so many steps happens after this one. Steps count from 1."""
    return step > 0 and step % every == 0


@dataclass(frozen=True)
class SaveSchedule:
    """When a run saves by itself: each of these that is given. `SaveSchedule(at_end=False)` never does."""

    steps: int | None = None
    """After every multiple of so many steps."""
    epochs: bool = False
    """At the end of each epoch."""
    seconds: float | None = None
    """Each time that the run has been training for a multiple of so many seconds, over all its lives."""
    at_end: bool = True
    """When the training ends."""

    def __post_init__(self) -> None:
        if self.steps is not None and not (type(self.steps) is int and self.steps > 0):
            raise DeclarationError(f"SaveSchedule: steps is {self.steps!r}; use a number of steps, from 1, or None")
        if not isinstance(self.epochs, bool):
            raise DeclarationError(
                f"SaveSchedule: epochs is {self.epochs!r}; use True, at the end of each epoch, or False"
            )
        if self.seconds is not None and not (rankable(self.seconds) is not None and self.seconds > 0):
            raise DeclarationError(f"SaveSchedule: seconds is {self.seconds!r}; use a number above 0, or None")

    @property
    def saves(self) -> bool:
        """Whether it saves at all."""
        return self.steps is not None or self.epochs or self.seconds is not None or self.at_end

    def is_due(self, step: int) -> bool:
        """Whether a save is due after this step, by its number: all ranks find the same."""
        return self.steps is not None and is_multiple(step, self.steps)

    def is_due_by_clock(self, previous_elapsed_seconds: float, elapsed_seconds: float) -> bool:
        """Whether one is due by the training time at the last look and now.

        Each rank's clock says something else: one rank asks, and tells the others. The time is saved with each
        checkpoint, and goes on from there.
        """
        if self.seconds is None:
            return False
        return elapsed_seconds // self.seconds > previous_elapsed_seconds // self.seconds

    def due(
        self,
        step: int,
        *,
        elapsed_seconds: float = 0.0,
        previous_elapsed_seconds: float = 0.0,
        is_epoch_end: bool = False,
        is_end: bool = False,
    ) -> str | None:
        """The kind of the checkpoint that is due after this step, None for none. Where several are, it is one: the
        end of an epoch before that of the training, both before a periodic one."""
        if is_epoch_end and self.epochs:
            return "epoch"
        if is_end and self.at_end:
            return "final"
        if self.is_due(step) or self.is_due_by_clock(previous_elapsed_seconds, elapsed_seconds):
            return "periodic"
        return None


# ---- how often


@dataclass(frozen=True)
class Overhead:
    """Which part of a run's time is not spent on training that lasts."""

    saving: float
    """Spent on saves."""
    repeating: float
    """Spent on what a failure undoes: the work since the last save, and the save that it interrupts."""

    @property
    def total(self) -> float:
        return self.saving + self.repeating


def advised_interval(save_seconds: float, mean_seconds_between_failures: float) -> float:
    """Seconds of training between two saves at which the overhead is least; saves not counted.

    `save_seconds` is what a save holds training up for. Failures come at random, of the whole job. Daly's higher-order
    estimate (J. T. Daly, A higher order estimate of the optimum checkpoint interval for restart dumps, 2006), which for
    short saves is Young's sqrt(2 · save · MTBF) (J. W. Young, A first order approximation to the optimum checkpoint
    interval, 1974). How long a restart takes does not matter to it.
    """
    _check(save_seconds, mean_seconds_between_failures)
    if save_seconds >= 2 * mean_seconds_between_failures:
        return mean_seconds_between_failures
    root = math.sqrt(save_seconds / (2 * mean_seconds_between_failures))
    young = math.sqrt(2 * save_seconds * mean_seconds_between_failures)
    return young * (1 + root / 3 + root**2 / 9) - save_seconds


def overhead(save_seconds: float, interval_seconds: float, mean_seconds_between_failures: float) -> Overhead:
    """What saving every `interval_seconds` of training costs, failures being exponentially distributed (Daly 2006, eq. 13).

    Without the time of restarts themselves, which does not depend on the interval.
    """
    _check(save_seconds, mean_seconds_between_failures)
    if not interval_seconds > 0:
        raise ValueError(f"interval_seconds is {interval_seconds!r}; use a number above 0")
    segment = interval_seconds + save_seconds
    try:
        expected = mean_seconds_between_failures * math.expm1(segment / mean_seconds_between_failures)
    except OverflowError:  # it never gets from one save to the next
        expected = math.inf
    return Overhead(saving=save_seconds / expected, repeating=1 - segment / expected)


def advice(
    save_seconds: float,
    seconds_per_step: float,
    steps_per_save: float,
    mean_seconds_between_failures: float = DAY_SECONDS,
) -> str:
    """A sentence on how often to save, from what saves and steps have cost so far.

    >>> advice(3.1, 0.47, 500)
    'a save takes 3.1 s; with a failure every 24 h, save every 12 min (about 1,550 steps of 0.47 s): 0.4 % of the time goes
    into saves, 0.4 % into work done again; now every 500 steps: 1.3 % and 0.1 %'
    """
    if not seconds_per_step > 0:
        raise ValueError(f"seconds_per_step is {seconds_per_step!r}; use a number above 0")
    mean = mean_seconds_between_failures
    best = max(advised_interval(save_seconds, mean), seconds_per_step)
    now = overhead(save_seconds, max(steps_per_save, 1) * seconds_per_step, mean)
    then = overhead(save_seconds, best, mean)
    steps = max(1, round(best / seconds_per_step))
    about = f"about {_steps(steps)} of {_told(seconds_per_step)}" if steps > 1 else "each step"
    return (
        f"a save takes {_told(save_seconds)}; with a failure every {_told(mean)}, save every {_told(best)} ({about}): "
        f"{_percent(then.saving)} of the time goes into saves, {_percent(then.repeating)} into work done again; "
        f"now every {_steps(round(steps_per_save))}: {_percent(now.saving)} and {_percent(now.repeating)}"
    )


def _check(save_seconds: float, mean_seconds_between_failures: float) -> None:
    if not save_seconds >= 0:
        raise ValueError(f"save_seconds is {save_seconds!r}; use a number from 0")
    if not 0 < mean_seconds_between_failures < math.inf:
        raise ValueError(f"mean_seconds_between_failures is {mean_seconds_between_failures!r}; use a number above 0")


def _steps(count: int) -> str:
    """With three digits: the estimate has no more."""
    return f"{round(count, -max(0, len(str(count)) - 3)):,} step{'' if count == 1 else 's'}"


def _told(seconds: float) -> str:
    for length, unit in _UNITS:
        if seconds >= 3 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.2g} s" if seconds < 100 else f"{seconds:.0f} s"


def _percent(part: float) -> str:
    return f"{100 * part:.1f} %"
