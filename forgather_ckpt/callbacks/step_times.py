"""How long steps take, and how long those that are left will."""

from collections import deque

WINDOW = 50
"""Steps: the recent ones, which speak for those to come."""


class StepTimes:
    """From the end of one step to the end of the next, by a clock in seconds; the first step, which warms up, is not
    counted.

    Between some steps there is a save or an evaluation. Those do not enter the time of a step, which would jump with
    each of them; what they take on top is spread over all steps so far and expected of those to come too.
    """

    def __init__(self) -> None:
        self._last: float | None = None
        self._recent: deque[float] = deque(maxlen=WINDOW)
        """Of steps with nothing between."""
        self._num_plain = 0
        self._num_interrupted = 0
        self._interrupted_seconds = 0.0
        self._is_interrupted = False

    def interrupt(self) -> None:
        """Since the last step, something else has taken time."""
        self._is_interrupted = True

    def step(self, now: float) -> None:
        """A step has ended."""
        if self._last is not None:
            if self._is_interrupted:
                self._num_interrupted += 1
                self._interrupted_seconds += now - self._last
            else:
                self._num_plain += 1
                self._recent.append(now - self._last)
        self._last, self._is_interrupted = now, False

    @property
    def seconds_per_step(self) -> float | None:
        """The mean of the last 50 that nothing came between; None until there are times to speak of."""
        if self._recent:
            return sum(self._recent) / len(self._recent) or None
        if self._num_interrupted:
            return self._interrupted_seconds / self._num_interrupted or None
        return None

    def seconds_left(self, num_steps: int) -> float | None:
        """What so many steps will take, with saves and evaluations as often as so far."""
        per_step = self.seconds_per_step
        if per_step is None:
            return None
        on_top = max(0.0, self._interrupted_seconds - self._num_interrupted * per_step)
        return num_steps * (per_step + on_top / (self._num_plain + self._num_interrupted))
