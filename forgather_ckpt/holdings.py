"""What one rank holds of each agreed portion."""

import fnmatch
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from forgather_ckpt.portions import Portion
from forgather_ckpt.structure import AliasItem, State, TensorItem, ValueItem


@dataclass(frozen=True)
class Holding:
    """The items of one portion, as this rank holds them. `number` is the portion's place in the agreed list."""

    number: int
    portion: Portion
    tensors: Mapping[str, TensorItem]
    values: Mapping[str, ValueItem]
    aliases: Mapping[str, AliasItem]

    @property
    def names(self) -> list[str]:
        return [*self.tensors, *self.values, *self.aliases]

    def excluded(self) -> list[str]:
        """The items that the component wants left out of comparisons. A tied tensor is, where it is under all names."""
        if not self.portion.exclude:
            return []
        matches = re.compile("|".join(fnmatch.translate(pattern) for pattern in self.portion.exclude)).match
        compared = {alias.target for alias in self.aliases.values() if not matches(alias.name)}
        return sorted(name for name in self.names if matches(name) and name not in compared)

    def without(self, names: Collection[str]) -> "Holding":
        if not names:
            return self
        left_out = set(names)
        return _holding(self.number, self.portion, self, [name for name in self.names if name not in left_out])


def holdings(portions: Sequence[Portion], states: Mapping[str, State], rank: int) -> list[Holding]:
    """The holdings of `rank`, whose own state of each component is in `states`."""
    named: dict[str, set[str]] = {}
    for portion in portions:
        if rank in portion.holders and portion.names is not None:
            named.setdefault(portion.component, set()).update(portion.names)
    result = []
    for number, portion in enumerate(portions):
        if rank not in portion.holders:
            continue
        state = states[portion.component]
        if portion.names is None:
            elsewhere = named.get(portion.component, set())
            names = [name for name in _names(state) if name not in elsewhere] if elsewhere else None
        else:
            names = list(portion.names)
        result.append(_holding(number, portion, state, names))
    return result


def _names(state: State) -> list[str]:
    return [*state.tensors, *state.values, *state.aliases]


def _holding(number: int, portion: Portion, state: State | Holding, names: list[str] | None) -> Holding:
    if names is None:
        return Holding(number, portion, state.tensors, state.values, state.aliases)
    return Holding(
        number,
        portion,
        {name: state.tensors[name] for name in names if name in state.tensors},
        {name: state.values[name] for name in names if name in state.values},
        {name: state.aliases[name] for name in names if name in state.aliases},
    )
