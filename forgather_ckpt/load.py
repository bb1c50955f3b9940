"""The load, in two steps on every rank: prepare (nothing live is touched), then apply.

A failure in prepare changes nothing. A failure in apply leaves the live state torn; where the choice of the
checkpoint was ours, the next older one is loaded over it, otherwise the error says what was touched.
"""

import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from forgather_ckpt import choice, reading
from forgather_ckpt.comm import Comm
from forgather_ckpt.component import StateComponent, StateDict
from forgather_ckpt.declarations import declare
from forgather_ckpt.errors import (
    CheckpointDamaged,
    CheckpointError,
    CheckpointNotFound,
    FormatError,
    StorageError,
    TornState,
)
from forgather_ckpt.job import Job
from forgather_ckpt.prepare import Live, Recipe, Request, give, prepare, resize
from forgather_ckpt.settle import capture_live
from forgather_ckpt.structure import State

logger = logging.getLogger(__name__)

_DAMAGE = (CheckpointDamaged, FormatError, StorageError, CheckpointNotFound)
"""Errors of the checkpoint itself, for which another one may be taken."""


@dataclass(frozen=True)
class LoadReport:
    """What a load did: from where, which components, and which not and why."""

    path: Path
    step: int
    sequence: int
    epoch: float | None
    digest: str
    """Of the manifest."""
    loaded: tuple[str, ...]
    skipped: Mapping[str, str] = field(default_factory=dict)
    """Components of the job or the checkpoint that were not loaded, with the reason. A component that starts fresh
    because its set was not found again (`on_resize="drop"`) is among them."""
    fell_back_from: tuple[tuple[Path, str], ...] = ()
    """Newer checkpoints that were passed over, with the reason."""
    metrics: Mapping[str, Any] = field(default_factory=dict)
    elapsed_seconds: float | None = None
    """For which the run had been training."""

    def without(self, key: str, reason: str) -> "LoadReport":
        """Where a component was loaded, and what it was given is not for this job after all."""
        loaded = tuple(one for one in self.loaded if one != key)
        return replace(self, loaded=loaded, skipped={**self.skipped, key: reason})


class Torn(Exception):
    """A load failed in apply: carries what was raised, and the components it had begun to load.

    `error` is the one that all ranks agreed on, or what interrupted this rank. `touched` are this rank's components,
    `named` those of all ranks, for a message that is the same everywhere.
    """

    def __init__(self, error: BaseException, touched: Iterable[str], named: Iterable[str]) -> None:
        super().__init__(str(error))
        self.error = error
        self.touched = tuple(dict.fromkeys(touched))
        self.named = tuple(dict.fromkeys(named))


def load(job: Job, request: Request) -> LoadReport:
    """Load one checkpoint into the live state of all ranks; `Torn` where it fails after touching it.

    `which` None or "latest": the newest that is good; damaged ones are passed over, on every rank alike.
    """
    comm = job.comm
    wanted = {
        "do": "load",
        "which": None if request.which is None else str(request.which),
        "components": None if request.components is None else list(request.components),
        "strict": request.strict,
        "staged": request.staged,
    }
    comm.begin_operation(f"{wanted}")
    components = declare(comm, job.topology, job.source, wanted)
    candidates = comm.agree("choosing a checkpoint", lambda: None, lambda _: _choose(job.run, request))
    live = take_live(comm, components, request.components)
    passed_over: list[tuple[Path, str]] = []
    torn: Torn | None = None
    for path, digest in candidates:
        try:
            report = _load_one(job, request, live, Path(path), digest)
        except _DAMAGE as err:
            failure: CheckpointError = err
        except Torn as err:
            before = torn
            torn = err if before is None else Torn(err.error, before.touched + err.touched, before.named + err.named)
            if not isinstance(err.error, _DAMAGE):
                break
            failure = err.error
        except CheckpointError as err:
            if torn is None:
                raise
            raise Torn(err, torn.touched, torn.named) from err  # the older one does not fit, the newer was half loaded
        else:
            if torn is not None:
                _refuse_leftovers(comm, torn, report)
            return LoadReport(**{**report.__dict__, "fell_back_from": tuple(passed_over)})
        if len(candidates) > 1:
            logger.warning("checkpoint %s is passed over: %s", path, failure.message)
        passed_over.append((Path(path), failure.message))
    if torn is not None:
        raise torn
    raise failure


def _refuse_leftovers(comm: Comm, torn: Torn, report: LoadReport) -> None:
    """`Torn` where a failed load touched a component which the older checkpoint that was taken instead lacks."""
    touched = [key for key in torn.touched if key not in report.loaded]

    def check() -> None:
        if touched:
            raise TornState(
                f"the checkpoint of step {report.step} was loaded instead of a damaged one, but does not have "
                f"{', '.join(touched)}, which had been touched by then",
                component=touched[0],
            )

    try:
        comm.agree("falling back to an older checkpoint", check)
    except CheckpointError as err:
        raise Torn(err, touched, [err.component or ""]) from torn.error


def _choose(run: Path, request: Request) -> list[list[str]]:
    """Rank 0's choice: paths and manifest digests of the checkpoints to try, in order."""
    return [[str(one.path.resolve()), one.manifest.digest] for one in choice.candidates(run, request.which, avoid=request.avoid)]


def take_live(comm: Comm, components: Sequence[StateComponent], keys: Collection[str] | None) -> Live:
    """The live state of the components in `keys`, or of all. An optional one that fails on some rank is left out on
    all."""
    wanted = [one for one in components if keys is None or one.key in keys]
    states: dict[str, State] = {}

    def take() -> dict[str, str]:
        taken, problems = capture_live(wanted)
        states.update(taken)
        return problems

    def merge(reports: list[dict[str, str]]) -> dict[str, str]:
        return {key: problem for problems in reports for key, problem in problems.items()}

    return Live(components, states, comm.agree("taking the live state", take, merge))


def _load_one(job: Job, request: Request, live: Live, path: Path, digest: str) -> LoadReport:
    only = job.comm.together("preparing the load", lambda: prepare(job, request, live, path, digest))
    if only.namespaces:
        job.comm.agree("preparing the load", only.taken, only.refuse_untaken)
    resized = job.comm.together("resizing", lambda: resize(only.recipes, path, job))
    apply(job.comm, path, only.recipes, only.chosen, resized=resized, staged=request.staged)
    for key, reason in only.skipped.items():
        logger.warning("component %r was not loaded: %s", key, reason)
    manifest = only.manifest
    return LoadReport(
        path=path,
        step=manifest.step,
        sequence=manifest.sequence,
        epoch=manifest.epoch,
        digest=manifest.digest,
        loaded=tuple(key for key in only.chosen if key not in only.skipped),
        skipped=only.skipped,
        metrics=manifest.metrics,
        elapsed_seconds=manifest.elapsed_seconds,
    )


def apply(
    comm: Comm,
    path: Path,
    recipes: Sequence[Recipe],
    chosen: Sequence[str],
    *,
    resized: Mapping[str, StateDict] = MappingProxyType({}),
    staged: bool = False,
) -> None:
    """The second step: read what the recipes want, and give the components, on all ranks those in `chosen`, their
    states, or those in `resized`. `Torn` where it fails after touching them."""

    def read() -> None:
        wanted = [want for recipe in recipes if not recipe.is_resized for want in recipe.wanted]
        reading.read(path, wanted, on_progress=comm.beat)

    if staged:
        comm.agree("reading the checkpoint", read)
    try:
        if not staged:
            comm.agree("reading the checkpoint", read)
        comm.agree("loading the checkpoint", lambda: give(recipes, resized))
    except BaseException as err:
        raise Torn(err, [recipe.component.key for recipe in recipes], chosen) from err


def torn_error(torn: Torn) -> BaseException:
    """The error for the caller: what went wrong, and what is no longer whole. What interrupted this rank stays as it is."""
    error = torn.error
    if not isinstance(error, CheckpointError):
        return error
    return type(error)(
        f"{error.message}. The live state of {', '.join(torn.named)} is now torn between two states: load a "
        "checkpoint successfully before saving or training on",
        rank=error.rank,
        component=error.component,
        path=error.path,
    )


def refuse_torn(components: Sequence[str]) -> TornState:
    return TornState(
        f"the last load failed half-way, the state of {', '.join(components)} is torn; load a checkpoint successfully "
        "before saving"
    )
