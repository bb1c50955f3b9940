"""The replication check: do the copies that ranks hold agree?

In the good case one 16-byte root a rank and portion is exchanged. Where roots differ, the leaves of those portions
are, so that the error names the items and the ranks in the minority.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from forgather_ckpt import hashtree, memory
from forgather_ckpt.comm import Comm
from forgather_ckpt.component import StateComponent
from forgather_ckpt.errors import ReplicaMismatch
from forgather_ckpt.holdings import Holding
from forgather_ckpt.patterns import ValidationLevel
from forgather_ckpt.portions import Portion
from forgather_ckpt.replication import Verdict, describe, vote
from forgather_ckpt.topology import Ranks

_NUM_NAMED_ITEMS = 5


@dataclass(frozen=True)
class Finding:
    """What the check found of one portion that has several holders."""

    level: ValidationLevel
    verdict: Verdict
    digest: str
    """Of the majority's state."""
    items: tuple[str, ...] = ()
    """The items that differ, where any do."""


@dataclass(frozen=True)
class Comparison:
    """The outcome of a check: findings by portion number, equal on all ranks, and this rank's block digests."""

    findings: Mapping[int, Finding]
    blocks: Mapping[int, Mapping[str, tuple[bytes, ...]]]
    """Portion number -> tensor name -> block digests, of the compared portions that this rank holds."""
    seconds: float = 0.0

    @property
    def mismatches(self) -> dict[int, Finding]:
        return {number: finding for number, finding in self.findings.items() if not finding.verdict.is_equal}


def level_of(portion: Portion, component: StateComponent) -> ValidationLevel:
    """How closely the copies of a portion are compared; NONE where there is one copy."""
    return component.level_for(portion.num_sets) if len(portion.holders) > 1 else ValidationLevel.NONE


def compare(
    comm: Comm,
    portions: Sequence[Portion],
    held: Sequence[Holding],
    levels: Mapping[int, ValidationLevel],
) -> Comparison:
    """Compare the portions in `levels` (by number) among their holders; differences are findings, not errors.

    Every rank calls it with the same `portions` and `levels`.
    """
    started = time.perf_counter()
    if not levels:
        return Comparison({}, {})
    compared = [holding for holding in held if holding.number in levels]
    blocks: dict[int, dict[str, tuple[bytes, ...]]] = {}

    def roots() -> dict[str, str]:
        for holding in compared:
            blocks[holding.number] = memory.block_digests(holding.tensors.values(), comm.beat)
        return {
            str(holding.number): hashtree.state_digest(_records(holding, blocks[holding.number])).hex()
            for holding in compared
        }

    def decide(reports: list[dict[str, str]]) -> dict[str, list[list[int] | str]]:
        told: dict[str, list[list[int] | str]] = {}
        for number in levels:
            digests = {rank: bytes.fromhex(reports[rank][str(number)]) for rank in portions[number].holders}
            verdict = vote(digests)
            told[str(number)] = [list(verdict.majority), list(verdict.minority), digests[verdict.majority[0]].hex()]
        return told

    told = comm.agree("comparing the copies", roots, decide)
    verdicts = {
        int(number): Verdict(tuple(majority), tuple(minority)) for number, (majority, minority, _) in told.items()
    }
    differing = {number: verdict for number, verdict in verdicts.items() if not verdict.is_equal}
    items = _differing_items(comm, differing, compared, blocks) if differing else {}
    findings = {
        number: Finding(levels[number], verdict, told[str(number)][2], tuple(items.get(number, ())))
        for number, verdict in verdicts.items()
    }
    return Comparison(findings, blocks, time.perf_counter() - started)


def _records(holding: Holding, blocks: Mapping[str, tuple[bytes, ...]]) -> Iterator[tuple[str, bytes, bytes]]:
    return memory.records(
        holding.tensors.values(),
        holding.values.values(),
        holding.aliases.values(),
        {name: hashtree.join(digests) for name, digests in blocks.items()},
    )


def _differing_items(
    comm: Comm,
    differing: Mapping[int, Verdict],
    compared: Sequence[Holding],
    blocks: Mapping[int, Mapping[str, tuple[bytes, ...]]],
) -> dict[int, list[str]]:
    def leaves() -> dict[str, dict[str, str]]:
        return {
            str(holding.number): {
                name: hashtree.digest(structure + digest).hex()
                for name, structure, digest in _records(holding, blocks[holding.number])
            }
            for holding in compared
            if holding.number in differing
        }

    def decide(reports: list[dict[str, dict[str, str]]]) -> dict[str, list[str]]:
        named = {}
        for number, verdict in differing.items():
            reference = reports[verdict.majority[0]][str(number)]
            copies = [reports[rank][str(number)] for rank in verdict.minority]
            named[str(number)] = sorted(
                name for name, digest in reference.items() if any(copy.get(name) != digest for copy in copies)
            )
        return named

    told = comm.agree("finding the items that differ", leaves, decide)
    return {int(number): names for number, names in told.items()}


def mismatch(
    portions: Sequence[Portion], mismatches: Mapping[int, Finding], groups: Mapping[str, str | None]
) -> ReplicaMismatch:
    """The error for copies that differ; the same text on every rank."""
    told = []
    for number, finding in mismatches.items():
        portion = portions[number]
        shown = ", ".join(repr(name) for name in finding.items[:_NUM_NAMED_ITEMS])
        more = (
            f" and {len(finding.items) - _NUM_NAMED_ITEMS} more items" if len(finding.items) > _NUM_NAMED_ITEMS else ""
        )
        told.append(
            f"{portion.component!r} differs between {_ranks(finding.verdict.majority)} and "
            f"{_ranks(finding.verdict.minority)} at {shown}{more}; expected identical state in "
            f"{groups[portion.component] or 'all holders'} ({describe(portion.holders)})"
        )
    first = next(iter(mismatches))
    return ReplicaMismatch(
        "; ".join(told), rank=mismatches[first].verdict.minority[0], component=portions[first].component
    )


def _ranks(ranks: Ranks) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks [{describe(ranks)}]"
