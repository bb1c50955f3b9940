"""What one rank holds of each agreed portion."""

import fnmatch
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from forgather_ckpt import names
from forgather_ckpt.portions import WHOLE, Portion
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
        """The keys of tensors and their parts, the names of the rest."""
        return [*self.tensors, *self.values, *self.aliases]

    def excluded(self) -> list[str]:
        """Those that the component wants left out of comparisons. A tied tensor is, where it is under all names."""
        if not self.portion.exclude:
            return []
        matches = re.compile("|".join(fnmatch.translate(pattern) for pattern in self.portion.exclude)).match
        compared = {alias.target for alias in self.aliases.values() if not matches(alias.name)}
        return sorted(key for key in self.names if matches(name := names.item_name(key)) and name not in compared)

    def without(self, keys: Collection[str]) -> "Holding":
        if not keys:
            return self
        left_out = set(keys)
        return Holding(
            self.number,
            self.portion,
            {key: item for key, item in self.tensors.items() if key not in left_out},
            {name: item for name, item in self.values.items() if name not in left_out},
            {name: item for name, item in self.aliases.items() if name not in left_out},
        )


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
            result.append(_of_layouts(number, portion, state, named.get(portion.component, set())))
        else:
            result.append(_of_names(number, portion, state, set(portion.names)))
    return result


def _of_layouts(number: int, portion: Portion, state: State, elsewhere: Collection[str]) -> Holding:
    """All that the rank has in the portion's layouts, but what is part of other portions."""
    is_whole = WHOLE in portion.layouts
    tensors: Mapping[str, TensorItem] = state.tensors
    if elsewhere or state.sharded:
        tensors = {
            key: item for key, item in tensors.items() if item.layout in portion.layouts and item.name not in elsewhere
        }
    values = {name: item for name, item in state.values.items() if is_whole and name not in elsewhere}
    aliases = {name: item for name, item in state.aliases.items() if is_whole and name not in elsewhere}
    return Holding(number, portion, tensors, values, aliases)


def _of_names(number: int, portion: Portion, state: State, wanted: Collection[str]) -> Holding:
    tensors = {key: item for key, item in state.tensors.items() if item.name in wanted}
    values = {name: item for name, item in state.values.items() if name in wanted}
    aliases = {name: item for name, item in state.aliases.items() if name in wanted}
    if portion.is_untied:
        for alias in aliases.values():
            for item in state.tensor_parts(alias.target):
                own = item._replace(name=alias.name, order=alias.order)
                tensors[own.key] = own
        aliases = {}
    return Holding(number, portion, tensors, values, aliases)
