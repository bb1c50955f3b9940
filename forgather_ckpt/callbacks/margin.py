"""How much worse, or better, a number must be to count: so much, or so many percent of what it is compared with."""

import math
from dataclasses import dataclass
from typing import Self


@dataclass(frozen=True)
class Margin:
    """2.0 as an amount, or "50%" of the magnitude of the number that is compared with.

    Near zero a share is next to nothing: a metric that comes there needs an amount.
    """

    amount: float
    is_share: bool = False

    @classmethod
    def parse(cls, argument: str, value: float | str, *, allows_zero: bool = False) -> Self:
        """The margin that the user wrote for `argument`; ValueError with what to write instead."""
        refused = ValueError(
            f"{argument}={value!r}: write a number {'of at least' if allows_zero else 'above'} 0, such as {argument}=2.0, "
            f'or a share of what is compared with, such as {argument}="50%"'
        )
        is_share = isinstance(value, str)
        if isinstance(value, str):
            if not value.endswith("%"):
                raise refused
            value = value.removesuffix("%")
        if isinstance(value, bool):
            raise refused
        try:
            amount = float(value)
        except (TypeError, ValueError, OverflowError):
            raise refused from None
        if not math.isfinite(amount) or amount < 0 or (amount == 0 and not allows_zero):
            raise refused
        return cls(amount / 100 if is_share else amount, is_share)

    def beside(self, level: float) -> float:
        """The margin as an amount, where `level` is what is compared with."""
        return self.amount * abs(level) if self.is_share else self.amount

    def __str__(self) -> str:
        return f"{100 * self.amount:g}%" if self.is_share else f"{self.amount:g}"
