"""A short and a long average of one sequence of numbers: where it is now, and where it was for long."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

from forgather_ckpt.callbacks.saved import saved_item, saved_number, sound_number
from forgather_ckpt.errors import LoadMismatch


class Levels(NamedTuple):
    """The two averages."""

    short: float
    long: float


class Averages(Protocol):
    """Two averages of the same numbers, all of them sound (`watched.is_sound`)."""

    settings: dict[str, float]
    """The arguments that they were made with."""

    @property
    def levels(self) -> Levels | None:
        """None until there are enough numbers to compare."""

    def add(self, number: float) -> None: ...

    def clear(self) -> None: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: Mapping[str, Any], /) -> None: ...


class ExponentialAverages:
    """Two exponential moving averages, `alpha·x + (1 - alpha)·average`, which begin at the first number.

    Each remembers about 1/alpha numbers.
    """

    def __init__(self, short_alpha: float, long_alpha: float) -> None:
        for name, alpha in (("short_alpha", short_alpha), ("long_alpha", long_alpha)):
            if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha <= 1:
                raise ValueError(f"{name} must be above 0 and at most 1, not {alpha!r}")
        if short_alpha <= long_alpha:
            raise ValueError(
                f"short_alpha={short_alpha!r} must be above long_alpha={long_alpha!r}: the short average is the faster one"
            )
        self.settings = {"short_alpha": short_alpha, "long_alpha": long_alpha}
        self._short_alpha, self._long_alpha = short_alpha, long_alpha
        self._levels: Levels | None = None

    @property
    def levels(self) -> Levels | None:
        return self._levels

    def add(self, number: float) -> None:
        short, long = self._levels or (number, number)
        self._levels = Levels(
            self._short_alpha * number + (1 - self._short_alpha) * short,
            self._long_alpha * number + (1 - self._long_alpha) * long,
        )

    def clear(self) -> None:
        self._levels = None

    def state_dict(self) -> dict[str, Any]:
        short, long = self._levels or (None, None)
        return {"short": short, "long": long}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        short, long = saved_number(state_dict, "short"), saved_number(state_dict, "long")
        if (short is None) != (long is None):
            raise LoadMismatch(f"the saved averages are short={short!r} and long={long!r}: one of them is missing")
        self._levels = None if short is None or long is None else Levels(short, long)


class WindowAverages:
    """The means of the last `short_window` and of the last `long_window` numbers.

    There are levels as soon as the short window is full; until the long one is, it holds all numbers so far.
    """

    def __init__(self, short_window: int, long_window: int) -> None:
        for name, window in (("short_window", short_window), ("long_window", long_window)):
            if type(window) is not int or window < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, not {window!r}")
        if short_window >= long_window:
            raise ValueError(f"short_window={short_window} must be below long_window={long_window}")
        self.settings: dict[str, float] = {"short_window": short_window, "long_window": long_window}
        self._short_window, self._long_window = short_window, long_window
        self._numbers: list[float] = []
        """The last `long_window`, the newest last. Means are taken of them anew each time: a running sum would
        depend on numbers that have left it, by its rounding, and so differ after a resume."""

    @property
    def levels(self) -> Levels | None:
        if len(self._numbers) < self._short_window:
            return None
        return Levels(_mean(self._numbers[-self._short_window :]), _mean(self._numbers))

    def add(self, number: float) -> None:
        self._keep([*self._numbers, number])

    def clear(self) -> None:
        self._numbers = []

    def state_dict(self) -> dict[str, Any]:
        return {"numbers": list(self._numbers)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """A smaller long window takes the newest of the saved numbers; a larger one fills up from them."""
        numbers = saved_item(state_dict, "numbers")
        if not isinstance(numbers, list | tuple):
            raise LoadMismatch(f"the saved window is a {type(numbers).__name__}, not a list of numbers")
        self._keep([sound_number("numbers", number) for number in numbers])

    def _keep(self, numbers: list[float]) -> None:
        self._numbers = numbers[-self._long_window :]


def _mean(numbers: list[float]) -> float:
    return math.fsum(numbers) / len(numbers)
