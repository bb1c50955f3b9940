"""The load, in two steps on every rank: prepare (nothing live is touched), then apply.

A failure in prepare changes nothing. A failure in apply leaves the live state torn; where the choice of the
checkpoint was ours, the next older one is loaded over it, otherwise the error says what was touched.
"""

import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from forgather_ckpt import catalog, files, reading, resume
from forgather_ckpt.assembly import Assembly, Stored, assemble, gather
from forgather_ckpt.comm import Comm
from forgather_ckpt.component import ChoosesTargets, StateComponent, Target
from forgather_ckpt.declarations import declare
from forgather_ckpt.entries import Resize, check_pattern, entry_for
from forgather_ckpt.errors import (
    CheckpointDamaged,
    CheckpointError,
    CheckpointNotFound,
    FormatError,
    LoadMismatch,
    StorageError,
    TornState,
    UnsupportedVersion,
)
from forgather_ckpt.index import Index, IndexEntry
from forgather_ckpt.job import Job
from forgather_ckpt.manifest import CheckpointManifest
from forgather_ckpt.portions import ENTRY_OF_ALL
from forgather_ckpt.replication import describe
from forgather_ckpt.settle import capture_live
from forgather_ckpt.structure import State
from forgather_ckpt.topology import sets_of

logger = logging.getLogger(__name__)

_DAMAGE = (CheckpointDamaged, FormatError, StorageError, CheckpointNotFound)
"""Errors of the checkpoint itself, for which another one may be taken."""
_NUM_NAMED_ITEMS = 5


@dataclass(frozen=True)
class Request:
    """What is asked of one load; equal on all ranks."""

    which: str | int | Path | None
    components: tuple[str, ...] | None
    strict: bool
    staged: bool


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
    comm.begin_operation()
    wanted = {
        "do": "load",
        "which": None if request.which is None else str(request.which),
        "components": None if request.components is None else list(request.components),
        "strict": request.strict,
        "staged": request.staged,
    }
    components = declare(comm, job.topology, job.source, wanted)
    candidates = comm.agree("choosing a checkpoint", lambda: None, lambda _: _choose(job.run, request.which))
    live: dict[str, State] = {}
    comm.agree("taking the live state", lambda: live.update(capture_live(components)))
    passed_over: list[tuple[Path, str]] = []
    torn: Torn | None = None
    for path, digest in candidates:
        try:
            report = _load_one(job, request, components, live, Path(path), digest)
        except _DAMAGE as err:
            failure: CheckpointError = err
        except Torn as err:
            before = torn
            torn = err if before is None else Torn(err.error, before.touched + err.touched, before.named + err.named)
            if not isinstance(err.error, _DAMAGE):
                break
            failure = err.error
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


def _choose(run: Path, which: str | int | Path | None) -> list[list[str]]:
    """Rank 0's choice: paths and manifest digests of the checkpoints to try, in order."""
    if isinstance(which, Path) or (isinstance(which, str) and (os.sep in which or Path(which).is_dir())):
        with files.typed_errors(Path(which), "looking for the checkpoint"):
            found = [catalog.read_checkpoint(Path(which).resolve())]
        return [[str(found[0].path), found[0].manifest.digest]]
    with files.typed_errors(run, "looking for checkpoints"):
        scanned = catalog.scan(run)
    by_path = {checkpoint.path: checkpoint for checkpoint in scanned.checkpoints}
    for rejected in scanned.rejected:
        logger.warning("%s is not a committed checkpoint: %s", rejected.path, rejected.reason)
        if isinstance(rejected.error, UnsupportedVersion):
            raise rejected.error  # perhaps the newest one; an older one must not be taken for it
    if scanned.rejected and not scanned.checkpoints:
        # "none" would be an invitation to start afresh, over them
        raise CheckpointDamaged(
            f"none of the {len(scanned.rejected)} checkpoints in {run} is whole; {scanned.rejected[0].path.name}: "
            f"{scanned.rejected[0].reason}",
            path=str(scanned.rejected[0].path),
        )
    chosen = resume.choose([checkpoint.candidate for checkpoint in scanned.checkpoints], which)
    return [[str(one.path.resolve()), by_path[one.path].manifest.digest] for one in chosen]


def _load_one(
    job: Job,
    request: Request,
    components: Sequence[StateComponent],
    live: Mapping[str, State],
    path: Path,
    digest: str,
) -> LoadReport:
    comm = job.comm
    prepared: list[_Prepared] = []
    skipped: dict[str, str] = {}
    comm.agree("preparing the load", lambda: _prepare(job, request, components, live, path, digest, prepared, skipped))
    [only] = prepared

    def read() -> None:
        wanted = [want for recipe in only.recipes for assembly in recipe.assemblies for want in assembly.wanted]
        reading.read(path, wanted, on_progress=comm.beat)

    if request.staged:
        comm.agree("reading the checkpoint", read)
    try:
        if not request.staged:
            comm.agree("reading the checkpoint", read)
        comm.agree("loading the checkpoint", lambda: _give(only.recipes, job))
    except BaseException as err:
        raise Torn(err, [recipe.component.key for recipe in only.recipes], only.chosen) from err
    for key, reason in skipped.items():
        logger.warning("component %r was not loaded: %s", key, reason)
    manifest = only.manifest
    return LoadReport(
        path=path,
        step=manifest.step,
        sequence=manifest.sequence,
        epoch=manifest.epoch,
        digest=manifest.digest,
        loaded=tuple(component.key for component in components if component.key in only.found),
        skipped=skipped,
        metrics=manifest.metrics,
    )


@dataclass(frozen=True)
class _Recipe:
    """How one component is loaded on this rank."""

    component: StateComponent
    stored: Sequence[Stored]
    assemblies: Sequence[Assembly]
    is_resized: bool
    manifest: CheckpointManifest

    def load(self, job: Job) -> None:
        """Give the state to the stateful, once its bytes are read."""
        component = self.component
        states = [assembly.state_dict() for assembly in self.assemblies]
        doing = "on_resize()"
        try:
            if self.is_resized:
                assert callable(component.on_resize)
                state = component.on_resize(states, self.manifest.topology, job.topology)
            else:
                [state] = states
            assert component.stateful is not None
            doing = "load_state_dict()"
            component.stateful.load_state_dict(state)
        except CheckpointError as err:
            raise err.at(component=component.key) from None
        except Exception as err:
            raise LoadMismatch(
                f"component {component.key!r}: {doing} raised {type(err).__name__}: {err}",
                component=component.key,
            ) from err


@dataclass(frozen=True)
class _Prepared:
    manifest: CheckpointManifest
    recipes: Sequence[_Recipe]
    chosen: Sequence[str]
    """Components that the job and the checkpoint have, the same on all ranks."""
    found: frozenset[str]
    """Components of the checkpoint that are loaded, on whichever ranks hold them."""


def _prepare(
    job: Job,
    request: Request,
    components: Sequence[StateComponent],
    live: Mapping[str, State],
    path: Path,
    digest: str,
    prepared: list[_Prepared],
    skipped: dict[str, str],
) -> None:
    """Read and check all but the tensors' bytes; touches nothing live."""
    manifest = CheckpointManifest.load(path)
    if manifest.digest != digest:
        raise StorageError(f"the manifest at {path} is not the one that rank 0 read; is the directory shared?")
    chosen = _match(components, manifest, request, skipped)
    library = _Library(path, manifest)
    recipes = []
    for component in chosen:
        job.comm.beat()
        if component.stateful is not None:
            recipe = _recipe(job, component, live[component.key], library, skipped, staged=request.staged)
            if recipe is not None:
                recipes.append(recipe)
    found = frozenset(component.key for component in chosen if component.key not in skipped)
    prepared.append(_Prepared(manifest, recipes, [component.key for component in chosen], found))


def _match(
    components: Sequence[StateComponent], manifest: CheckpointManifest, request: Request, skipped: dict[str, str]
) -> list[StateComponent]:
    """The job's components that the checkpoint has; `LoadMismatch` where the two do not fit."""
    declared = {component.key: component for component in components}
    if request.components is not None:
        if unknown := sorted(set(request.components) - set(declared)):
            raise LoadMismatch(f"components={unknown} are not declared by the job; declared: {sorted(declared)}")
        declared = {key: component for key, component in declared.items() if key in request.components}
    chosen = []
    for key, component in declared.items():
        if key in manifest.components:
            check_pattern(component, manifest.components[key])
            chosen.append(component)
        elif component.required:
            raise LoadMismatch(
                f"component {key!r} is required and the checkpoint of step {manifest.step} does not have it; it has "
                f"{sorted(manifest.components)}. Declare it required=False and load with strict=False to start it fresh, or "
                "name the ones to load in components=",
                component=key,
            )
        elif key in manifest.omitted:
            skipped[key] = f"left out when it was saved: {manifest.omitted[key]}"
        elif request.strict:
            raise LoadMismatch(
                f"component {key!r} is not in the checkpoint of step {manifest.step}; load with strict=False to start it "
                "fresh",
                component=key,
            )
        else:
            skipped[key] = "not in the checkpoint"
    if request.components is None:
        for key in sorted(set(manifest.components) - set(declared)):
            if request.strict:
                raise LoadMismatch(
                    f"the checkpoint of step {manifest.step} has the component {key!r}, which the job does not declare; "
                    "declare it, or load with strict=False to leave it",
                    component=key,
                )
            skipped[key] = "not declared by the job"
    return chosen


class _Library:
    """The indexes of a checkpoint, each read and verified once, when an entry of it is asked for."""

    def __init__(self, path: Path, manifest: CheckpointManifest) -> None:
        self.manifest = manifest
        self._path = path
        self._indexes: dict[str, Index] = {}

    def entry(self, component: str, entry: str) -> Stored:
        parts: list[IndexEntry] = []
        for name, pairs in self.manifest.indexes.items():
            if (component, entry) in pairs:
                found = self._read(name).entries
                parts += [part for part in found if (part.component, part.entry) == (component, entry)]
        stored = gather(component, parts)
        expected = self.manifest.components[component].entries[entry]
        if len(stored.names) != expected.num_items:
            raise FormatError(
                f"component {component!r}, entry {entry!r}: {len(stored.names)} items in the indexes, "
                f"{expected.num_items} in the manifest",
                component=component,
            )
        return stored

    def _read(self, name: str) -> Index:
        if name not in self._indexes:
            self._indexes[name] = catalog.read_index(self._path, self.manifest, name)
        return self._indexes[name]


def _recipe(
    job: Job, component: StateComponent, live: State, library: _Library, skipped: dict[str, str], *, staged: bool
) -> _Recipe | None:
    manifest = library.manifest
    record = manifest.components[component.key]
    if record.validation.trusted:
        logger.warning(
            "component %r was saved although its copies differed; ranks outside %s get the majority's state",
            component.key,
            {entry: describe(ranks) for entry, ranks in record.validation.trusted.items()},
        )
    entry = entry_for(component, record, manifest.topology, job.topology)
    if isinstance(entry, Resize):
        if component.on_resize == "error":
            raise LoadMismatch(
                f"component {component.key!r} ({component.sharing_pattern.name}): {entry.reason}. Choose on_resize: "
                "'drop' (start fresh), a function (saved, old, new) -> state, or resume as it was saved ('error')",
                component=component.key,
            )
        if component.on_resize == "drop":
            skipped[component.key] = f"starts fresh (on_resize='drop'): {entry.reason}"
            return None
        stored = [library.entry(component.key, name) for name in record.entries]
        assemblies = [assemble(one, None, {}) for one in stored]
        return _Recipe(component, stored, assemblies, True, manifest)
    whole = library.entry(component.key, entry)
    targets: Mapping[str, Target | None] = {}
    if isinstance(component.stateful, ChoosesTargets):
        targets = component.stateful.load_targets(whole.available())
    if (
        entry == ENTRY_OF_ALL
        and len(sets_of(component.sharing_pattern, component.process_group_name, job.topology)) > 1
    ):
        # of a job-wide namespace a rank takes what it has, and what it asks for
        asked = {name for name, target in targets.items() if target is not None}
        whole = whole.only(asked | {*live.tensors, *live.values, *live.aliases})
    if isinstance(component.stateful, nn.Module):
        _check_module(component, whole, live)
    return _Recipe(component, [whole], [assemble(whole, live, targets, staged=staged)], False, manifest)


def _check_module(component: StateComponent, stored: Stored, live: State) -> None:
    """A module's `load_state_dict` is strict about names, but speaks only after tensors have been filled."""
    names = {*live.tensors, *live.values, *live.aliases}
    for what, difference in (
        ("in the checkpoint but not in the job's module", stored.names - names),
        ("in the job's module but not in the checkpoint", names - stored.names),
    ):
        if difference:
            shown = ", ".join(repr(name) for name in sorted(difference)[:_NUM_NAMED_ITEMS])
            more = f" and {len(difference) - _NUM_NAMED_ITEMS} more" if len(difference) > _NUM_NAMED_ITEMS else ""
            raise LoadMismatch(
                f"component {component.key!r}: {shown}{more} {what}; build the model as it was saved",
                component=component.key,
            )


def _give(recipes: Sequence[_Recipe], job: Job) -> None:
    """Give every component its state, and look at what it made of it.

    `load_state_dict()` and `state_dict()` may be collectives, so each is called once, in order, whatever the ones
    before did; the first failure is raised at the end.
    """
    failures: list[CheckpointError] = []
    for recipe in recipes:
        try:
            recipe.load(job)
        except CheckpointError as err:
            failures.append(err)
    try:
        _check_restored(recipes)
    except CheckpointError as err:
        failures.append(err)
    if failures:
        raise failures[0]


def _check_restored(recipes: Sequence[_Recipe]) -> None:
    """Take the structure again: a tensor that came back with another dtype or shape was changed by its stateful."""
    states = capture_live([recipe.component for recipe in recipes])
    for recipe in recipes:
        live = states[recipe.component.key]
        if recipe.is_resized:
            continue
        for name, rows in recipe.stored[0].tensors.items():
            item = live.tensors.get(name)
            if item is not None and (item.dtype, item.shape) != (rows[0].dtype, rows[0].shape):
                raise LoadMismatch(
                    f"component {recipe.component.key!r}: {name!r} was saved as {rows[0].dtype} {list(rows[0].shape)}, but "
                    f"load_state_dict() made {item.dtype} {list(item.shape)} of it; wrap optimizers in NamedOptimizer, "
                    "which keeps dtypes",
                    component=recipe.component.key,
                )


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
