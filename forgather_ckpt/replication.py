"""The verdict on copies that must be equal: pure, the same on every rank."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from forgather_ckpt.topology import Ranks


@dataclass(frozen=True)
class Verdict:
    """How the copies of one set of holders compare. `majority` holds the reference; `minority` differs from it."""

    majority: Ranks
    minority: Ranks

    @property
    def is_equal(self) -> bool:
        return not self.minority


def vote(digests: Mapping[int, bytes]) -> Verdict:
    """The majority's digest is the reference; in a tie, the one that the lowest rank has."""
    holders: dict[bytes, list[int]] = defaultdict(list)
    for rank in sorted(digests):
        holders[digests[rank]].append(rank)
    majority = min(holders.values(), key=lambda ranks: (-len(ranks), ranks[0]))
    return Verdict(tuple(majority), tuple(rank for rank in sorted(digests) if rank not in set(majority)))


def describe(ranks: Ranks) -> str:
    """Ranks for an error message, long runs shortened: `0-3, 7`."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
