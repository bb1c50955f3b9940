"""How a component's state is shared among the ranks, and how closely copies are compared.

A pattern is a partition of the ranks into sets: inside a set, all ranks hold the same state (or one of
them holds it for all). `topology.sets_of` computes the sets; nothing else in the package branches on a
pattern, but for the two facts in the table below.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum


class SharingPattern(StrEnum):
    """How a component's state is shared among the ranks."""

    GLOBAL = "global"
    """One state for the job; rank 0's counts. Trainer progress, centrally dispatched data."""
    PER_RANK = "per_rank"
    """Every rank has its own. Random generators, pipeline stages."""
    REPLICATED = "replicated"
    """All ranks hold the same. DDP weights and optimizer."""
    PER_GROUP = "per_group"
    """Alike inside each group of a named process group, different between groups. DP × PP, DP × TP."""
    PER_NODE = "per_node"
    """One for each node, held by the node's first rank. Node-local caches."""


class ValidationLevel(StrEnum):
    """How closely copies are compared before they are stored. Each level finds what the ones before it find."""

    NONE = "none"
    """Nothing is compared; the lowest rank of each set writes its own copy alone."""
    QUICK = "quick"
    """One digest over the whole state of each rank: structure, values, every byte."""
    TENSOR = "tensor"
    """As QUICK, and a difference names the items and the ranks in the minority."""
    FULL = "full"
    """As TENSOR, and differing items are compared element by element."""


def strongest(levels: Iterable[ValidationLevel]) -> ValidationLevel:
    """The one that finds most; NONE of none."""
    return max(levels, key=list(ValidationLevel).index, default=ValidationLevel.NONE)


@dataclass(frozen=True)
class PatternTraits:
    """What else follows from a pattern, besides its partition."""

    compared: bool
    """Every member of a set holds a copy, so copies can be compared and their writing shared out.
    Where this is false, the first member of the set holds the state for the others."""
    names: str
    """The default of `StateComponent.names`."""


TRAITS = {
    SharingPattern.GLOBAL: PatternTraits(compared=False, names="global"),
    SharingPattern.PER_RANK: PatternTraits(compared=False, names="local"),
    SharingPattern.REPLICATED: PatternTraits(compared=True, names="global"),
    SharingPattern.PER_GROUP: PatternTraits(compared=True, names="local"),
    SharingPattern.PER_NODE: PatternTraits(compared=False, names="local"),
}
