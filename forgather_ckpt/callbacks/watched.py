"""The metric that a callback watches: its key, which way is better, and its values as numbers that can be averaged."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

from forgather_ckpt.metrics import Mode, mode_of

LARGEST = 1e300
"""Sums and differences of larger numbers overflow. A metric that comes here has diverged whatever the threshold."""


def is_sound(number: float) -> bool:
    """Whether a number may enter averages and comparisons: it is finite, and no larger than `LARGEST`."""
    return abs(number) <= LARGEST


def number_of(key: str, value: Any) -> float:
    """`value` as a float, tensors and numpy scalars of one element included; TypeError on anything else."""
    problem = TypeError(f"{key} is {value!r}, a {type(value).__name__}; give one number")
    if isinstance(value, str | bytes | bytearray | bool):
        raise problem
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise problem from None


@dataclass(frozen=True)
class WatchedMetric:
    """A key of the metrics that events bring, and whether its lowest ("min") or highest ("max") value is the best."""

    key: str
    mode: Mode

    @classmethod
    def of(cls, key: str, mode: Mode | None = None) -> Self:
        """Without `mode` the name decides; ValueError where it does not tell, rather than watch the wrong side."""
        if mode is None:
            # No checkpoint is best by a norm, so norms are not in the table of names; but training diverges upwards.
            mode = "min" if key.endswith("norm") else mode_of(key)
        if mode not in ("min", "max"):
            said = f"mode={mode!r} for" if mode is not None else "the name does not tell which way is better:"
            raise ValueError(
                f'{said} the metric {key!r}; write mode="min" if lower is better, mode="max" if higher is better'
            )
        return cls(key, mode)

    def value_in(self, metrics: Mapping[str, Any]) -> Any:
        """The value under exactly this key, None where it is absent."""
        return metrics.get(self.key)

    def worsening(self, now: float, before: float) -> float:
        """How much worse `now` is than `before`; negative where it is better."""
        return now - before if self.mode == "min" else before - now

    def better_of(self, one: float, other: float) -> float:
        return min(one, other) if self.mode == "min" else max(one, other)

    @property
    def worse_word(self) -> Literal["above", "below"]:
        return "above" if self.mode == "min" else "below"
