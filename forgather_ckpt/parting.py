"""At which step two runs part: pure, over a question that somebody else answers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Parting:
    """Where two runs part, among the steps that both have."""

    last_equal: int | None
    """The last step before `first_different`; the last of all where none differs; None where none before it is equal."""
    first_different: int | None
    compared: tuple[int, ...]
    """The steps that were looked at, in their order."""
    equal_again: tuple[int, ...] = ()
    """Steps after `first_different` that were found equal."""


def find(steps: Sequence[int], is_equal: Callable[[int], bool]) -> Parting:
    """The first of the rising `steps` at which two runs differ, by halving: about log2(len(steps)) are compared.

    Right if runs that have parted stay apart: training goes on from its own state, so a difference feeds on itself.
    """
    compared: dict[int, bool] = {}

    def holds(number: int) -> bool:
        compared[steps[number]] = is_equal(steps[number])
        return compared[steps[number]]

    if not steps or holds(len(steps) - 1):
        return Parting(steps[-1] if steps else None, None, tuple(compared))
    low, high = -1, len(steps) - 1  # steps[low] is equal (or before the first), steps[high] differs
    while high - low > 1:
        middle = (low + high) // 2
        if holds(middle):
            low = middle
        else:
            high = middle
    return Parting(None if low < 0 else steps[low], steps[high], tuple(sorted(compared)))


def find_in_all(steps: Sequence[int], is_equal: Callable[[int], bool]) -> Parting:
    """The same from all steps, assuming nothing."""
    verdicts = {step: is_equal(step) for step in steps}
    different = [step for step in steps if not verdicts[step]]
    first = different[0] if different else None
    before = [step for step in steps if first is None or step < first]
    return Parting(
        before[-1] if before else None,
        first,
        tuple(steps),
        tuple(step for step in steps if first is not None and step > first and verdicts[step]),
    )
