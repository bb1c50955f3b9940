"""A replication check by itself, without a save."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from forgather_ckpt.check import compare, leave_report, level_of, reports
from forgather_ckpt.declarations import declare
from forgather_ckpt.differences import ReplicationReport
from forgather_ckpt.errors import DeclarationError
from forgather_ckpt.holdings import holdings
from forgather_ckpt.job import Job
from forgather_ckpt.patterns import ValidationLevel, strongest
from forgather_ckpt.settle import settle


@dataclass(frozen=True)
class Request:
    """What is asked of one check; equal on all ranks."""

    level: ValidationLevel | None
    """Of all components; None: each one's own, and QUICK where that is NONE."""
    components: Sequence[str] | None
    """Only these; None: all."""
    step: int | None
    """For the name of the report that a mismatch leaves."""


def validate(job: Job, request: Request, *, prepare: Callable[[], None]) -> Mapping[str, ReplicationReport]:
    """Compare the copies; a report for every component asked for, "not compared" where there is one copy only.
    Differences are no error; what keeps a component from being compared is, be it optional or not.

    `prepare` is local work before everything else; its failure is everybody's, like any other.
    """
    wanted = {
        "do": "validate",
        "level": None if request.level is None else request.level.value,
        "components": None if request.components is None else list(request.components),
        "step": request.step,
    }
    job.comm.begin_operation(f"{wanted}")
    declared = declare(job.comm, job.topology, job.source, wanted, prepare=prepare)
    keys = [component.key for component in declared]
    if unknown := sorted(set(request.components or ()) - set(keys)):
        raise DeclarationError(f"no component {unknown[0]!r} is declared; there are {', '.join(map(repr, keys))}")
    chosen = [one for one in declared if request.components is None or one.key in request.components]
    # an optional component may be left out of a checkpoint, but a check that could not be made is no check
    settled = settle(job.comm, job.topology, [replace(one, required=True) for one in chosen])
    by_key = {component.key: component for component in chosen}
    levels = {
        number: request.level or strongest([level_of(portion, by_key[portion.component]), ValidationLevel.QUICK])
        for number, portion in enumerate(settled.portions)
        if len(portion.holders) > 1
    }
    held = holdings(settled.portions, settled.states, job.comm.rank)
    comparison = compare(job, settled.portions, held, levels)
    nothing_to_compare = {
        one.key: ReplicationReport(one.key, one.process_group_name, ValidationLevel.NONE, 0, (), 0.0, ())
        for one in chosen
    }
    found = nothing_to_compare | reports(settled.portions, comparison, chosen)
    leave_report(job, found, request.step)
    return found
