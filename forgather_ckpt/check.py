"""The replication check: do the copies that ranks hold agree?

In the good case one 16-byte root a rank and portion is exchanged, at FULL after the bytes themselves have been
compared. Where copies differ, `mismatch` finds out in what and how far.
"""

import datetime
import logging
import time
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from forgather_ckpt import bytewise, digests, files, hashtree, memory, mismatch, paths, strict_json
from forgather_ckpt.component import StateComponent
from forgather_ckpt.differences import Finding, ReplicationReport, SetDifference, report_json
from forgather_ckpt.digests import Blocks
from forgather_ckpt.errors import StorageError
from forgather_ckpt.holdings import Holding
from forgather_ckpt.job import Job
from forgather_ckpt.patterns import ValidationLevel, strongest
from forgather_ckpt.portions import Portion
from forgather_ckpt.replication import Verdict, vote
from forgather_ckpt.writing import changed

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Comparison:
    """The outcome of a check: findings by portion number, equal on all ranks, and what this rank knows of its copies."""

    findings: Mapping[int, Finding]
    blocks: Mapping[int, Blocks]
    """Portion number -> block digests of the compared tensors."""
    on_host: Collection[int]
    """The portions whose digests are all of the host's algorithm, wherever their tensors lie."""
    own_seconds: Mapping[int, float]
    """Portion number -> what this rank spent on it."""
    seconds: float = 0.0
    """What comparing took on rank 0, without what was done about copies that differ."""

    @property
    def mismatches(self) -> dict[int, Finding]:
        return {number: finding for number, finding in self.findings.items() if finding.difference is not None}

    def renumbered(self, kept: Mapping[int, int]) -> "Comparison":
        """The same of some portions, under new numbers."""
        return Comparison(
            {kept[old]: finding for old, finding in self.findings.items() if old in kept},
            {kept[old]: blocks for old, blocks in self.blocks.items() if old in kept},
            {kept[old] for old in self.on_host if old in kept},
            {kept[old]: seconds for old, seconds in self.own_seconds.items() if old in kept},
            self.seconds,
        )

    def host_blocks(self, holding: Holding) -> Blocks:
        """The digests that the write stream will take again."""
        return {
            name: blocks
            for name, blocks in self.blocks.get(holding.number, {}).items()
            if holding.number in self.on_host or digests.is_on_host(holding.tensors[name])
        }

    def device_blocks(self, holding: Holding) -> Blocks:
        """The digests that are of the device's algorithm."""
        on_host = self.host_blocks(holding)
        known = self.blocks.get(holding.number, {})
        return {key: blocks for key, blocks in known.items() if key not in on_host}

    def refuse_changed(self, held: Sequence[Holding]) -> None:
        """`CheckpointError` if a tensor on a device is no longer what was compared."""
        for holding in held:
            known, on_host = self.blocks.get(holding.number, {}), self.host_blocks(holding)
            items = [holding.tensors[name] for name in known if name not in on_host]
            for name, blocks in digests.block_digests(items).items():
                if blocks != known[name]:
                    raise changed(name).at(component=holding.portion.component)


def level_of(portion: Portion, component: StateComponent) -> ValidationLevel:
    """How closely the copies of a portion are compared; NONE where there is one copy."""
    return component.level_for(portion.num_sets) if len(portion.holders) > 1 else ValidationLevel.NONE


def compare(
    job: Job, portions: Sequence[Portion], held: Sequence[Holding], levels: Mapping[int, ValidationLevel]
) -> Comparison:
    """Compare the portions in `levels` (by number) among their holders; differences are findings, not errors.

    Every rank calls it with the same `portions` and `levels`.
    """
    if not levels:
        return Comparison({}, {}, (), {})
    whole = [holding for holding in held if holding.number in levels]
    excluded = {holding.number: holding.excluded() for holding in whole}
    compared = [holding.without(excluded[holding.number]) for holding in whole]
    roots = _compare_roots(job, portions, compared, excluded, levels)
    verdicts, own_seconds, seconds = roots.verdicts, dict(roots.own_seconds), roots.seconds
    suspects: bytewise.Suspects = {}
    if full := {number: verdicts[number] for number, level in levels.items() if level is ValidationLevel.FULL}:
        split, suspects, more_own, more = bytewise.compare(job, compared, full)
        verdicts, seconds = {**verdicts, **split}, seconds + more
        for number, spent in more_own.items():
            own_seconds[number] += spent
    differences: dict[int, SetDifference] = {}
    if differing := {number: verdict for number, verdict in verdicts.items() if not verdict.is_equal}:
        different = {holding.number: holding for holding in compared if holding.number in differing}
        leaves = {number: list(_records(one, roots.blocks[number])) for number, one in different.items()}
        evidence = mismatch.Evidence(different, leaves, roots.blocks, suspects)
        differences = mismatch.locate(job, portions, differing, evidence)
    findings = {
        number: Finding(levels[number], verdict, roots.excluded[number], differences.get(number))
        for number, verdict in verdicts.items()
    }
    return Comparison(findings, roots.blocks, roots.on_host, own_seconds, seconds)


@dataclass(frozen=True)
class _Roots:
    """What the exchange of roots has told, by portion number; `blocks` and `own_seconds` are this rank's."""

    verdicts: dict[int, Verdict]
    excluded: Mapping[int, tuple[str, ...]]
    blocks: Mapping[int, Blocks]
    on_host: Collection[int]
    own_seconds: Mapping[int, float]
    seconds: float


def _compare_roots(
    job: Job,
    portions: Sequence[Portion],
    compared: Sequence[Holding],
    excluded: Mapping[int, list[str]],
    levels: Mapping[int, ValidationLevel],
) -> _Roots:
    """Where some holders have on a device what others have on the host, all take host digests in a second round."""
    started = time.perf_counter()
    blocks: dict[int, Blocks] = {}
    own_seconds: dict[int, float] = defaultdict(float)

    @contextmanager
    def clocked(number: int) -> Iterator[None]:
        begun = time.perf_counter()
        yield
        own_seconds[number] += time.perf_counter() - begun

    def roots(numbers: Collection[int], *, on_host: bool) -> dict[str, Root]:
        taken, begun = {}, []
        # devices begin with all portions before the host goes through the first
        for holding in compared:
            if holding.number in numbers:
                with clocked(holding.number):
                    begun.append((holding, digests.begin(holding.tensors.values(), job.comm.beat, on_host=on_host)))
        for holding, finish in begun:
            with clocked(holding.number):
                names = "" if on_host else digests.device_names(holding.tensors.values())
                blocks[holding.number] = finish()
                root = hashtree.state_digest(_records(holding, blocks[holding.number])).hex()
            taken[str(holding.number)] = (root, names, excluded[holding.number])
        return taken

    def decide(numbers: Iterable[int], reports: Sequence[Mapping[str, Root]]) -> dict[str, Any]:
        return {"found": _decide(portions, numbers, reports), "seconds": time.perf_counter() - started}

    told = job.comm.agree("comparing the copies", lambda: roots(levels, on_host=False), partial(decide, levels))
    found, seconds = told["found"], told["seconds"]
    on_host = [int(number) for number, (classes, _) in found.items() if not classes]
    if on_host:
        told = job.comm.agree("comparing the copies", lambda: roots(on_host, on_host=True), partial(decide, on_host))
        found, seconds = found | told["found"], told["seconds"]
    return _Roots(
        {int(number): Verdict(tuple(map(tuple, classes))) for number, (classes, _) in found.items()},
        {int(number): tuple(names) for number, (_, names) in found.items()},
        blocks,
        on_host,
        own_seconds,
        seconds,
    )


Root = tuple[str, str, list[str]]
"""A rank's root of a portion, which tensors have device digests in it, and the names that were left out."""


def _decide(
    portions: Sequence[Portion], numbers: Iterable[int], reports: Sequence[Mapping[str, Root]]
) -> dict[str, tuple[list[list[int]], list[str]]]:
    """By portion: the ranks with equal copies, none where some holders have on a device what others have on the host
    and all must take host digests; and the names that were left out."""
    told = {}
    for number in numbers:
        copies = {rank: reports[rank][str(number)] for rank in portions[number].holders}
        is_comparable = len({device_names for _, device_names, _ in copies.values()}) == 1
        verdict = vote({rank: root for rank, (root, _, _) in copies.items()}, portions[number].lead)
        classes = [list(ranks) for ranks in verdict.classes] if is_comparable else []
        told[str(number)] = (classes, copies[portions[number].holders[0]][2])
    return told


def _records(holding: Holding, blocks: Blocks) -> Iterator[tuple[str, bytes, bytes]]:
    return memory.records(
        holding.tensors.values(),
        holding.values.values(),
        holding.aliases.values(),
        {name: hashtree.join(taken) for name, taken in blocks.items()},
    )


def reports(
    portions: Sequence[Portion], comparison: Comparison, components: Iterable[StateComponent]
) -> dict[str, ReplicationReport]:
    """What the check found, by component; only those that have several holders."""
    found = {}
    for component in components:
        numbers = [n for n in comparison.findings if portions[n].component == component.key]
        findings = [comparison.findings[number] for number in numbers]
        if not findings:
            continue
        excluded = tuple(sorted({name for finding in findings for name in finding.excluded}))
        found[component.key] = ReplicationReport(
            component=component.key,
            group=component.process_group_name,
            level=strongest(finding.level for finding in findings),
            num_items=sum(portions[n].num_items - len(comparison.findings[n].excluded) for n in numbers),
            excluded=excluded,
            seconds=comparison.seconds,
            differences=tuple(finding.difference for finding in findings if finding.difference is not None),
        )
    return found


def leave_report(job: Job, found: Mapping[str, ReplicationReport], step: int | None) -> None:
    """Write what a failed check found into the run directory, for people and tools. Rank 0 writes, and all wait for it;
    an error is only told."""
    if all(report.is_equal for report in found.values()):
        return

    def write() -> None:
        if job.comm.rank != 0:
            return
        path = job.run / paths.replication_report(step)
        created = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        data = strict_json.pretty(report_json(found, step, created, job.on_mismatch))
        try:
            with files.typed_errors(path, "writing the replication report"):
                files.make_directory(job.run)
                files.replace(path, data)
        except StorageError as err:
            logger.warning("%s", err)
        else:
            logger.warning("copies differ; the report is %s", path)

    job.comm.agree("writing the replication report", write)
