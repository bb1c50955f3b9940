"""The first step of a load: what to read where, and whether the checkpoint and the job fit. Touches nothing live.

And the last: to give the states to the statefuls, and to see what they made of them.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from forgather_ckpt import catalog
from forgather_ckpt.assembly import Assembly, Stored, assemble, gather
from forgather_ckpt.component import ChoosesTargets, StateComponent, Target
from forgather_ckpt.entries import Resize, check_pattern, entry_for
from forgather_ckpt.errors import CheckpointError, FormatError, LoadMismatch, StorageError
from forgather_ckpt.index import Index, IndexEntry
from forgather_ckpt.job import Job
from forgather_ckpt.manifest import CheckpointManifest
from forgather_ckpt.portions import ENTRY_OF_ALL
from forgather_ckpt.replication import describe
from forgather_ckpt.settle import capture_live
from forgather_ckpt.structure import State
from forgather_ckpt.topology import sets_of

logger = logging.getLogger(__name__)

_NUM_NAMED_ITEMS = 5


@dataclass(frozen=True)
class Request:
    """What is asked of one load; equal on all ranks."""

    which: str | int | Path | None
    components: tuple[str, ...] | None
    strict: bool
    staged: bool


@dataclass(frozen=True)
class Live:
    """What a load fills: the job's components, and their state on this rank as it is now."""

    components: Sequence[StateComponent]
    states: Mapping[str, State]
    unusable: Mapping[str, str]
    """Optional components whose state could not be taken on some rank, and why; the same on all ranks."""


@dataclass(frozen=True)
class Recipe:
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
class Prepared:
    manifest: CheckpointManifest
    recipes: Sequence[Recipe]
    chosen: Sequence[str]
    """Components that the job and the checkpoint have, the same on all ranks."""
    skipped: Mapping[str, str]
    """Components of either that are not loaded, and why."""


def prepare(job: Job, request: Request, live: Live, path: Path, digest: str) -> Prepared:
    """Read and check all but the tensors' bytes; touches nothing live. `digest` is that of rank 0's manifest."""
    manifest = CheckpointManifest.load(path)
    if manifest.digest != digest:
        raise StorageError(f"the manifest at {path} is not the one that rank 0 read; is the directory shared?")
    skipped: dict[str, str] = {}
    chosen = _match(live, manifest, request, skipped)
    library = _Library(path, manifest)
    recipes = []
    for component in chosen:
        job.comm.beat()
        if component.stateful is not None:
            state = live.states[component.key]
            recipe = _recipe(job, component, state, library, skipped, staged=request.staged)
            if recipe is not None:
                recipes.append(recipe)
    return Prepared(manifest, recipes, [component.key for component in chosen], skipped)


def _match(live: Live, manifest: CheckpointManifest, request: Request, skipped: dict[str, str]) -> list[StateComponent]:
    """The job's components that the checkpoint has; `LoadMismatch` where the two do not fit."""
    declared = {component.key: component for component in live.components}
    if request.components is not None:
        if unknown := sorted(set(request.components) - set(declared)):
            raise LoadMismatch(f"components={unknown} are not declared by the job; declared: {sorted(declared)}")
        declared = {key: component for key, component in declared.items() if key in request.components}
    chosen = []
    for key, component in declared.items():
        if key in live.unusable:
            skipped[key] = live.unusable[key]
        elif key in manifest.components:
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
) -> Recipe | None:
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
        return Recipe(component, stored, assemblies, True, manifest)
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
    return Recipe(component, [whole], [assemble(whole, live, targets, staged=staged)], False, manifest)


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


def give(recipes: Sequence[Recipe], job: Job) -> None:
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


def _check_restored(recipes: Sequence[Recipe]) -> None:
    """Take the structure again: a tensor that came back with another dtype or shape was changed by its stateful."""
    states, problems = capture_live([recipe.component for recipe in recipes])
    for problem in problems.values():
        raise LoadMismatch(f"{problem}, after it was loaded")
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
