"""How long a run has been training, and what its saves have cost."""

import statistics
import time
from dataclasses import dataclass, field

from forgather_ckpt.triggers import advice


class RunClock:
    """For how long the run has been training, over all its lives, by this rank's clock."""

    def __init__(self) -> None:
        self.begin(0.0)
        self._last_step: tuple[int, float] | None = None

    def begin(self, seconds: float) -> None:
        self._start = time.monotonic() - seconds
        self._looked_at = seconds

    @property
    def elapsed_seconds(self) -> float:
        return time.monotonic() - self._start

    def look(self) -> tuple[float, float]:
        """The time at the last look, and now."""
        before, self._looked_at = self._looked_at, self.elapsed_seconds
        return before, self._looked_at

    def seconds_per_step(self, step: int) -> float | None:
        """Since the last call."""
        before, now = self._last_step, time.monotonic()
        self._last_step = step, now
        if before is None or step <= before[0]:
            return None
        return (now - before[1]) / (step - before[0])


@dataclass
class SaveCosts:
    """What saves have cost in this process."""

    seconds: list[float] = field(default_factory=list)
    first: tuple[int, float] | None = None
    """Step and training time of the first save."""
    last: tuple[int, float] = (0, 0.0)

    @property
    def num_saves(self) -> int:
        return len(self.seconds)

    def add(self, step: int, seconds: float, elapsed_seconds: float) -> None:
        self.seconds.append(seconds)
        self.last = (step, elapsed_seconds)
        self.first = self.first or self.last

    def advice(self) -> str:
        assert self.first is not None
        num_steps = max(1, self.last[0] - self.first[0])
        return advice(
            save_seconds=statistics.median(self.seconds),
            seconds_per_step=(self.last[1] - self.first[1]) / num_steps,
            steps_per_save=num_steps / max(1, self.num_saves - 1),
        )
