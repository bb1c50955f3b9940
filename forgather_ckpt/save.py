"""The save: declare, settle, check, begin, write, commit. Every rank runs it; each step ends alike on all."""

import datetime
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from forgather_ckpt import (
    check,
    commit,
    environment,
    files,
    hashtree,
    index,
    inventory,
    logical,
    paths,
    plan,
    strict_json,
    writing,
)
from forgather_ckpt.check import Comparison, compare, level_of
from forgather_ckpt.comm import Comm
from forgather_ckpt.component import StateComponent
from forgather_ckpt.declarations import agreed, declare
from forgather_ckpt.differences import mismatch_error
from forgather_ckpt.errors import NoSpace
from forgather_ckpt.holdings import Holding, holdings
from forgather_ckpt.index import IndexEntry
from forgather_ckpt.inventory import WriteReport
from forgather_ckpt.job import Job
from forgather_ckpt.manifest import CheckpointManifest, FileRecord
from forgather_ckpt.patterns import ValidationLevel
from forgather_ckpt.plan import Extent, Piece
from forgather_ckpt.settle import Settlement, settle
from forgather_ckpt.structure import collector_paused
from forgather_ckpt.topology import Ranks
from forgather_ckpt.writing import Assignment, OwnedPiece, Written

logger = logging.getLogger(__name__)

_OVERHEAD_BYTES = 1 << 20
"""Headers, indexes and the manifest, for the check of free space."""


@dataclass(frozen=True)
class Request:
    """What is asked of one save; equal on all ranks, but for metrics and time, of which rank 0's count."""

    step: int
    epoch: float | None
    kind: str
    metrics: Mapping[str, Any] = field(default_factory=dict)
    elapsed_seconds: float | None = None


@dataclass(frozen=True)
class Saved:
    """A committed checkpoint, as every rank hears of it."""

    path: Path
    step: int
    sequence: int
    digest: str

    def lineage(self) -> dict[str, Any]:
        """How a later checkpoint of the run names this one as its parent."""
        return {"step": self.step, "sequence": self.sequence, "digest": self.digest}


class _Clock:
    """Seconds of each phase on this rank."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - started


def save(job: Job, request: Request, *, prepare: Callable[[], None], parent: Mapping[str, Any] | None) -> Saved:
    """Store one checkpoint. When it returns, on any rank, the checkpoint survives power loss.

    `prepare` is local work before everything else; its failure is everybody's, like any other.

    Whatever fails on whatever rank, all ranks raise the same error, nothing is committed, and the next save works.
    """
    comm, clock = job.comm, _Clock()
    wanted = {"do": "save", "step": request.step, "epoch": request.epoch, "kind": request.kind, "to": str(job.run)}
    comm.begin_operation(f"{wanted}")
    with clock.phase("settle"), collector_paused():
        components = declare(comm, job.topology, job.source, wanted, prepare=prepare)
        settled = settle(comm, job.topology, components)
    with clock.phase("check"), collector_paused():
        settled, comparison = _check(job, components, settled, request.step)
    draft = _begin(job, request, settled)
    try:
        return _write_and_commit(job, request, draft, _Content(components, settled, comparison), clock, parent)
    except BaseException:
        if comm.rank == 0:
            commit.abandon(draft)
        raise


@dataclass(frozen=True)
class _Content:
    """What a checkpoint will hold, agreed and checked."""

    components: Sequence[StateComponent]
    settled: Settlement
    comparison: Comparison


def _check(
    job: Job, components: Sequence[StateComponent], settled: Settlement, step: int
) -> tuple[Settlement, Comparison]:
    """Compare the copies. Those that differ are an error, or (optional components) left out, or (warn) told."""
    by_key = {component.key: component for component in components}
    levels = {
        number: level
        for number, portion in enumerate(settled.portions)
        if (level := level_of(portion, by_key[portion.component])) is not ValidationLevel.NONE
    }
    held = holdings(settled.portions, settled.states, job.comm.rank)
    comparison = compare(job, settled.portions, held, levels)
    if not comparison.mismatches:
        return settled, comparison
    found = check.reports(settled.portions, comparison, components)
    check.leave_report(job, found, step)
    told = mismatch_error(found.values())
    if job.on_mismatch == "warn":
        logger.warning("saving all the same, from the majority alone: %s", told.message)
        return settled, comparison
    if required := [report for report in found.values() if not report.is_equal and by_key[report.component].required]:
        raise mismatch_error(required)
    logger.warning("left out of the checkpoint: %s", told.message)
    return _without(settled, comparison, told.message)


def _without(settled: Settlement, comparison: Comparison, reason: str) -> tuple[Settlement, Comparison]:
    """Leave out the components whose copies differ."""
    dropped = {settled.portions[number].component for number in comparison.mismatches}
    kept = [number for number, portion in enumerate(settled.portions) if portion.component not in dropped]
    return (
        Settlement(
            settled.states,
            tuple(settled.portions[number] for number in kept),
            {key: count for key, count in settled.num_items.items() if key[0] not in dropped},
            {**settled.omitted, **dict.fromkeys(sorted(dropped), reason)},
        ),
        comparison.renumbered({old: new for new, old in enumerate(kept)}),
    )


def _begin(job: Job, request: Request, settled: Settlement) -> commit.Draft:
    """Rank 0 makes the directory, after looking for room; the others see that they see it."""

    def begin(_: list[None]) -> list[Any]:
        needed = sum(portion.num_bytes for portion in settled.portions) + _OVERHEAD_BYTES
        with files.typed_errors(job.run, "looking for free space"):
            free = files.free_bytes(job.run)
        if needed > free:
            raise NoSpace(
                f"the checkpoint needs {needed} bytes, {free} are free at {job.run}; free some, or keep fewer checkpoints",
                path=str(job.run),
            )
        draft = commit.begin(job.run, request.step)
        return [draft.sequence, draft.nonce]

    sequence, nonce = job.comm.agree("beginning the checkpoint", lambda: None, begin)
    return commit.Draft(job.run, request.step, sequence, nonce)


def _write_and_commit(
    job: Job,
    request: Request,
    draft: commit.Draft,
    content: _Content,
    clock: _Clock,
    parent: Mapping[str, Any] | None,
) -> Saved:
    held = holdings(content.settled.portions, content.settled.states, job.comm.rank)

    def write() -> dict[str, Any]:
        job.comm.beat()
        if not draft.directory.is_dir():
            raise files.not_shared(draft.directory)
        stems = paths.stems([component.key for component in content.components])
        with clock.phase("write"):
            assignments = [_assign(holding, content, job.comm) for holding in held]
            written = writing.write(
                draft.directory,
                [assignment for assignment in assignments if assignment is not None],
                writer=job.comm.rank,
                stems=stems,
                on_progress=job.comm.beat,
            )
            content.comparison.refuse_changed(held)
        return _report(assignments, held, written, content.comparison, clock).to_json()

    def seal(columns: list[dict[str, Any]]) -> list[Any]:
        manifest = _manifest(job, request, draft, content, columns, parent)
        path, digest = commit.publish(draft, manifest)
        return [str(path), digest]

    path, digest = job.comm.agree("writing the checkpoint", write, seal)
    return Saved(Path(path), request.step, draft.sequence, digest)


def _assign(holding: Holding, content: _Content, comm: Comm) -> Assignment | None:
    """This rank's part of a portion that it holds; None where others write it."""
    portion = holding.portion
    finding = content.comparison.findings.get(holding.number)
    # Copies that were not compared are never mixed (DESIGN invariant 12): one holder writes alone.
    writers: Ranks = (portion.lead,) if finding is None else finding.verdict.majority
    if comm.rank not in writers:
        return None
    excluded = set() if finding is None else set(finding.excluded)
    # what was not compared comes from one copy too
    dealt = [Extent(key, item.num_bytes) for key, item in holding.tensors.items() if key not in excluded]
    is_first = comm.rank == writers[0]
    owned = plan.deal(dealt, writers)[comm.rank]
    if is_first:
        owned += [Piece(key, 0, item.num_bytes) for key, item in holding.tensors.items() if key in excluded]
    begun = [holding.tensors[piece.name] for piece in owned if piece.start == 0]
    lanes = logical.lanes(begun, content.comparison.device_blocks(holding))
    blocks = content.comparison.host_blocks(holding)
    pieces = [
        OwnedPiece(
            holding.tensors[piece.name],
            piece.start,
            piece.stop,
            blocks.get(piece.name),
            lanes.get(piece.name) if piece.start == 0 else None,
        )
        for piece in owned
    ]
    if not pieces and not is_first:
        return None
    return Assignment(
        portion.component,
        portion.entry,
        pieces,
        values=tuple(holding.values.values()) if is_first else (),
        aliases=tuple(holding.aliases.values()) if is_first else (),
        num_writers=_num_writers(portion.component, content, comm.world_size),
    )


def _num_writers(component: str, content: _Content, world_size: int) -> int:
    """For file names: 1 where it is certain on every rank that one rank writes the component, else all ranks."""
    own = [number for number, portion in enumerate(content.settled.portions) if portion.component == component]
    if len(own) == 1 and own[0] not in content.comparison.findings:
        return 1
    return world_size


def _report(
    assignments: Sequence[Assignment | None],
    held: Sequence[Holding],
    written: Written,
    comparison: Comparison,
    clock: _Clock,
) -> WriteReport:
    by_number = {holding.number: one for holding, one in zip(held, assignments, strict=True) if one is not None}
    entries = iter(written.entries)
    digests: dict[int, str] = {}
    weights: dict[str, str] = {}
    for number, assignment in by_number.items():
        entry = next(entries)
        digests[number] = _state_digest(entry).hex()
        if (
            assignment.component == "model"
            and assignment.num_writers > 1
            and all(row.is_whole for row in entry.tensors)
        ):
            weights |= {row.name: row.file for row in entry.tensors}
    return WriteReport(
        files=written.files,
        indexes=written.indexes,
        num_bytes={number: assignment.num_bytes for number, assignment in by_number.items()},
        digests=digests,
        weights=weights,
        check_seconds=comparison.own_seconds,
        seconds=clock.seconds,
    )


def _state_digest(entry: IndexEntry) -> bytes:
    """The digest of the items that one writer stored; of the whole state where it is the only writer."""
    return hashtree.state_digest(index.records(entry))


def _manifest(
    job: Job,
    request: Request,
    draft: commit.Draft,
    content: _Content,
    columns: Sequence[Mapping[str, Any]],
    parent: Mapping[str, Any] | None,
) -> CheckpointManifest:
    reports = [WriteReport.from_json(column) for column in columns]
    kept = [component for component in content.components if component.key not in content.settled.omitted]
    records = inventory.file_records(reports)
    if weight_map := inventory.weight_map(reports):
        name, data = paths.tensors_index(paths.stems(["model"])["model"]), strict_json.pretty(weight_map)
        files.write_new(draft.directory / name, data)
        records[name] = FileRecord(len(data), hashtree.digest(data).hex(), writer=0)
    return CheckpointManifest(
        step=request.step,
        sequence=draft.sequence,
        kind=request.kind,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        topology=job.topology,
        components=inventory.component_records(
            agreed(kept),
            content.settled.portions,
            content.settled.num_items,
            content.comparison.findings,
            reports,
            {component.key: component.metadata for component in kept},
            job.topology,
        ),
        files=records,
        indexes={name: pairs for report in reports for name, pairs in report.indexes.items()},
        epoch=request.epoch,
        run_id=job.run_id,
        parent=parent,
        omitted=content.settled.omitted,
        metrics=environment.redact(request.metrics),
        training_args=environment.redact(job.training_args),
        environment=environment.describe(),
        timings=inventory.timings(reports),
        elapsed_seconds=request.elapsed_seconds,
    )
