"""The verdict on copies that must be equal: pure, the same on every rank."""

from collections import defaultdict
from collections.abc import Hashable, Mapping
from dataclasses import dataclass

from forgather_ckpt.topology import Ranks


@dataclass(frozen=True)
class Verdict:
    """How the copies of one set of holders compare: ranks with equal copies together. The majority is the first, and
    holds the reference; the others follow in the order of their lowest ranks."""

    classes: tuple[Ranks, ...]

    @property
    def majority(self) -> Ranks:
        return self.classes[0]

    @property
    def minority(self) -> Ranks:
        return tuple(sorted(rank for ranks in self.classes[1:] for rank in ranks))

    @property
    def is_equal(self) -> bool:
        return len(self.classes) == 1


def vote(copies: Mapping[int, Hashable], lead: int | None = None) -> Verdict:
    """From what each rank has, a digest say: the majority's is the reference; in a tie that of `lead`, or where that is
    not among them the lowest rank's."""
    holders: dict[Hashable, list[int]] = defaultdict(list)
    for rank in sorted(copies):
        holders[copies[rank]].append(rank)
    majority = min(holders.values(), key=lambda ranks: (-len(ranks), lead not in ranks, ranks[0]))
    others = [ranks for ranks in holders.values() if ranks is not majority]
    return Verdict(tuple(tuple(ranks) for ranks in (majority, *others)))


def describe(ranks: Ranks) -> str:
    """Ranks for an error message, long runs shortened: `0-3, 7`."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
