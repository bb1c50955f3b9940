"""A replication check by itself, without a save."""

from collections.abc import Mapping
from dataclasses import dataclass

from forgather_ckpt.check import Finding, compare, level_of
from forgather_ckpt.declarations import declare
from forgather_ckpt.holdings import holdings
from forgather_ckpt.job import Job
from forgather_ckpt.patterns import ValidationLevel
from forgather_ckpt.settle import settle
from forgather_ckpt.topology import Ranks


@dataclass(frozen=True)
class Difference:
    """Copies of one entry that differ: `majority` holds the reference, `minority` another state, in `items`."""

    entry: str
    majority: Ranks
    minority: Ranks
    items: tuple[str, ...]


@dataclass(frozen=True)
class ReplicationReport:
    """What a check of one component found."""

    component: str
    level: ValidationLevel
    num_items: int
    differences: tuple[Difference, ...]

    @property
    def is_equal(self) -> bool:
        return not self.differences


def validate(job: Job) -> Mapping[str, ReplicationReport]:
    """Compare all copies; a report for every component that has several holders."""
    job.comm.begin_operation("validate")
    components = declare(job.comm, job.topology, job.source, {"do": "validate"})
    settled = settle(job.comm, job.topology, components)
    by_key = {component.key: component for component in components}
    levels = {
        number: max(
            level_of(portion, by_key[portion.component]), ValidationLevel.QUICK, key=list(ValidationLevel).index
        )
        for number, portion in enumerate(settled.portions)
        if len(portion.holders) > 1
    }
    comparison = compare(job.comm, settled.portions, holdings(settled.portions, settled.states, job.comm.rank), levels)
    findings: dict[str, list[tuple[int, Finding]]] = {}
    for number, finding in comparison.findings.items():
        findings.setdefault(settled.portions[number].component, []).append((number, finding))
    return {
        key: ReplicationReport(
            component=key,
            level=found[0][1].level,
            num_items=sum(settled.portions[number].num_items for number, _ in found),
            differences=tuple(
                Difference(
                    settled.portions[number].entry, finding.verdict.majority, finding.verdict.minority, finding.items
                )
                for number, finding in found
                if not finding.verdict.is_equal
            ),
        )
        for key, found in findings.items()
    }
