"""The first step of a load: what to read where, and whether the checkpoint and the job fit. Touches nothing live.

And the last: to give the states to the statefuls, and to see what they made of them.
"""

import logging
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from forgather_ckpt import reading, structure
from forgather_ckpt.assembly import Assembly, Stored, assemble, content_of
from forgather_ckpt.component import Available, ChecksValues, ChoosesTargets, StateComponent, StateDict, Target
from forgather_ckpt.entries import Resize, check_pattern, entry_for
from forgather_ckpt.errors import CheckpointError, LoadMismatch, StorageError
from forgather_ckpt.job import Job
from forgather_ckpt.library import Library
from forgather_ckpt.manifest import CheckpointManifest
from forgather_ckpt.matching import some_of
from forgather_ckpt.portions import ENTRY_OF_ALL
from forgather_ckpt.reading import Wanted
from forgather_ckpt.replication import describe
from forgather_ckpt.settle import capture_live
from forgather_ckpt.structure import State
from forgather_ckpt.topology import sets_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Request:
    """What is asked of one load; equal on all ranks."""

    which: str | int | Path | None
    components: tuple[str, ...] | None
    strict: bool
    staged: bool
    avoid: tuple[str, ...] = ()
    """Digests of manifests that are not to be chosen."""
    inspect: Callable[[CheckpointManifest], None] | None = None
    """Asked, on the ranks that have it, before anything is touched; what it raises is everybody's."""


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
    taken: str = "0"
    """See `Prepared.taken`."""
    apart: Collection[str] = ()
    """Of tensors that are read into memory of their own, whatever the live ones are."""

    @property
    def wanted(self) -> list[Wanted]:
        return [want for assembly in self.assemblies for want in assembly.wanted]

    def resized(self, job: Job) -> StateDict:
        """The state that the component's rule makes of all old entries, once their bytes are read."""
        assert callable(self.component.on_resize)
        saved = [assembly.state_dict() for assembly in self.assemblies]
        with _told_by(self.component, "on_resize()"):
            state = self.component.on_resize(saved, self.manifest.topology, job.topology)
        if not isinstance(state, dict):
            raise LoadMismatch(
                f"component {self.component.key!r}: on_resize() returned a {type(state).__name__}; return the new state, a dict",
                component=self.component.key,
            )
        return state

    def give(self, state: StateDict | None) -> None:
        """Hand the state over: `state`, or what has been read."""
        assert self.component.stateful is not None
        if state is None:
            [assembly] = self.assemblies
            state = assembly.state_dict()
        with _told_by(self.component, "load_state_dict()"):
            self.component.stateful.load_state_dict(state)


@contextmanager
def _told_by(component: StateComponent, doing: str) -> Iterator[None]:
    """Say which component's code raised."""
    try:
        yield
    except CheckpointError as err:
        raise err.in_component(component.key) from err
    except Exception as err:
        raise LoadMismatch(
            f"component {component.key!r}: {doing} raised {type(err).__name__}: {err}", component=component.key
        ) from err


@dataclass(frozen=True)
class Prepared:
    manifest: CheckpointManifest
    recipes: Sequence[Recipe]
    chosen: Sequence[str]
    """Components that the job and the checkpoint have, the same on all ranks."""
    skipped: Mapping[str, str]
    """Components of either that are not loaded, and why."""
    library: Library
    namespaces: Sequence[str]
    """The components of which each rank takes what it has, the same on all ranks."""

    def taken(self) -> dict[str, str]:
        """What this rank takes of the namespaces: of each a number in base 16 with a bit for every name, in their order."""
        return {
            recipe.component.key: recipe.taken for recipe in self.recipes if recipe.component.key in self.namespaces
        }

    def refuse_untaken(self, columns: Sequence[Mapping[str, str]]) -> None:
        """`LoadMismatch` where no rank takes some item of a namespace: a layer that the job no longer has, say."""
        for key in self.namespaces:
            untaken = (1 << self.manifest.components[key].entries[ENTRY_OF_ALL].num_items) - 1
            for column in columns:
                untaken &= ~int(column.get(key, "0"), 16)
            if untaken:
                names = sorted(self.library.entry(key, ENTRY_OF_ALL).names)
                left = [name for place, name in enumerate(names) if untaken >> place & 1]
                raise LoadMismatch(
                    f"component {key!r}: {some_of(left)} in the checkpoint but on no rank of the job; build the job as it "
                    "was saved, or load with strict=False to leave them",
                    component=key,
                )


def prepare(job: Job, request: Request, live: Live, path: Path, digest: str) -> Prepared:
    """Read and check all but the tensors' bytes; touches nothing live. `digest` is that of rank 0's manifest."""
    library = open_library(path, digest)
    manifest = library.manifest
    if request.inspect is not None:
        request.inspect(manifest)
    skipped: dict[str, str] = {}
    chosen = _match(live, manifest, request, skipped)
    recipes = []
    for component in chosen:
        job.comm.beat()
        if component.stateful is not None:
            state = live.states[component.key]
            recipe = _recipe(job, component, state, library, skipped, staged=request.staged)
            if recipe is not None:
                recipes.append(recipe)
    refuse_shared_memory(recipes, live)
    namespaces = [
        one.key
        for one in chosen
        if request.strict and _is_shared_namespace(one, job) and ENTRY_OF_ALL in manifest.components[one.key].entries
    ]
    return Prepared(manifest, recipes, [one.key for one in chosen], skipped, library, namespaces)


def _is_shared_namespace(component: StateComponent, job: Job) -> bool:
    """Whether each rank takes of the component what it has, and no rank need have all."""
    sets = sets_of(component.sharing_pattern, component.process_group_name, job.topology)
    return component.is_global and len(sets) > 1


def open_library(path: Path, digest: str) -> Library:
    """The indexes of the checkpoint that rank 0 has chosen, whose manifest has this digest."""
    manifest = CheckpointManifest.load(path)
    if manifest.digest != digest:
        raise StorageError(f"the manifest at {path} is not the one that rank 0 read; is the directory shared?")
    return Library(path, manifest)


def _match(live: Live, manifest: CheckpointManifest, request: Request, skipped: dict[str, str]) -> list[StateComponent]:
    """The job's components that the checkpoint has; `LoadMismatch` where the two do not fit."""
    declared = {component.key: component for component in live.components}
    if request.components is not None:
        check_declared(request.components, live)
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


def _recipe(
    job: Job, component: StateComponent, live: State, library: Library, skipped: dict[str, str], *, staged: bool
) -> Recipe | None:
    manifest = library.manifest
    record = manifest.components[component.key]
    if record.trusted:
        logger.warning(
            "component %r was saved although its copies differed; all ranks but %s get the majority's state, at least of some "
            "items",
            component.key,
            {entry: describe(ranks) or "none" for entry, ranks in record.trusted.items()},
        )
    if num_excluded := sum(len(names) for names in record.excluded.values()):
        logger.warning(
            "%d item(s) of component %r were not compared when it was saved (validation_exclude): all ranks that share "
            "them get one rank's",
            num_excluded,
            component.key,
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
    targets = targets_of(component, whole.available())
    taken = 0
    asked = {name for name, target in targets.items() if target is not None}
    refused = targets.keys() - asked
    if entry == ENTRY_OF_ALL and _is_shared_namespace(component, job):
        # of a job-wide namespace a rank takes what it has, and what it asks for
        wanted = asked | live.names
        taken = _bits(sorted(whole.names), wanted - refused)
        whole = whole.only(wanted)
    elif refused:
        logger.warning(
            "component %r: %s in the checkpoint, which the job does not want; they are left there",
            component.key,
            some_of(refused),
        )
    if isinstance(component.stateful, nn.Module):
        _check_module(component, whole, live)
    assembly = assemble(whole, live, targets, staged=staged)
    check_values(component, assembly)
    return Recipe(component, [whole], [assembly], False, manifest, f"{taken:x}", asked)


def check_values(component: StateComponent, assembly: Assembly) -> None:
    """Have the stateful refuse, if it can, the values that it would be given."""
    if isinstance(component.stateful, ChecksValues):
        with _told_by(component, "check_values()"):
            component.stateful.check_values(assembly.values)


def targets_of(component: StateComponent, available: Mapping[str, Available]) -> Mapping[str, Target | None]:
    """Where the stateful wants the items that there are, if it says so."""
    if not isinstance(component.stateful, ChoosesTargets):
        return {}
    with _told_by(component, "load_targets()"):
        targets = component.stateful.load_targets(available)
        if not isinstance(targets, Mapping):
            raise LoadMismatch(
                f"component {component.key!r}: load_targets() returned {targets!r}; return a dict of item names, each with a "
                "Target, or None for what is not wanted"
            )
        for name, target in targets.items():
            if target is not None and not isinstance(target, Target):
                raise LoadMismatch(
                    f"component {component.key!r}: load_targets() returned {target!r} for {name!r}; return a Target, or None "
                    "for what is not wanted"
                )
    return targets


def _bits(names: Sequence[str], chosen: Collection[str]) -> int:
    """A number with a bit for each of the names: 1 for the chosen ones, the first name's the lowest."""
    return int("".join("1" if name in chosen else "0" for name in reversed(names)) or "0", 2)


def check_declared(keys: Collection[str], live: Live) -> None:
    """`LoadMismatch` where the job declares no component of one of the `keys`."""
    declared = {component.key for component in live.components}
    if unknown := sorted(set(keys) - declared):
        raise LoadMismatch(f"components={unknown} are not declared by the job; declared: {sorted(declared)}")


def refuse_shared_memory(recipes: Sequence[Recipe], live: Live) -> None:
    """Names that are one tensor in the job must not be two different ones in the checkpoint: the last would win."""
    owners: dict[Hashable, tuple[str, bytes]] = {}
    for recipe in recipes:
        if recipe.is_resized:
            continue
        state = live.states[recipe.component.key]
        for name, rows in recipe.stored[0].tensors.items():
            item = state.tensor_item(state.aliases[name].target if name in state.aliases else name)
            if name in recipe.apart or item is None or (memory := structure.memory_of(item.tensor)) is None:
                continue
            told = f"{name!r} of component {recipe.component.key!r}"
            content = content_of(rows)
            owner, known = owners.setdefault(memory, (told, content))
            if known != content:
                raise LoadMismatch(
                    f"{owner} and {told} are one tensor in the job and two different ones in the checkpoint; build the job "
                    "as it was saved",
                    component=recipe.component.key,
                )


def _check_module(component: StateComponent, stored: Stored, live: State) -> None:
    """A module's `load_state_dict` is strict about names, but speaks only after tensors have been filled."""
    names = live.names
    for what, difference in (
        ("in the checkpoint but not in the job's module", stored.names - names),
        ("in the job's module but not in the checkpoint", names - stored.names),
    ):
        if difference:
            hint = ""
            if any(name.startswith(("module.", "_orig_mod.")) for name in stored.names ^ names):
                hint = ", and declare the module inside DDP or torch.compile, not the wrapper"
            elif any("._orig_mod." in name for name in stored.names ^ names):
                hint = ", and compile modules in place, by module.compile(), which leaves their names"
            raise LoadMismatch(
                f"component {component.key!r}: {some_of(difference)} {what}; build the model as it was saved{hint}",
                component=component.key,
            )


def resize(recipes: Sequence[Recipe], path: Path, job: Job) -> dict[str, StateDict]:
    """The states that `on_resize` rules make, by component. Touches nothing live."""
    resized = [recipe for recipe in recipes if recipe.is_resized]
    reading.read(path, [want for recipe in resized for want in recipe.wanted], on_progress=job.comm.beat)
    return {recipe.component.key: recipe.resized(job) for recipe in resized}


def give(recipes: Sequence[Recipe], resized: Mapping[str, StateDict]) -> None:
    """Give every component its state, and look at what it made of it.

    `load_state_dict()` and `state_dict()` may be collectives, so each is called once, in order, whatever the ones
    before did; the first failure is raised at the end.
    """
    failures: list[CheckpointError] = []
    for recipe in recipes:
        try:
            recipe.give(resized.get(recipe.component.key))
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
        if recipe.is_resized or getattr(recipe.component.stateful, "may_convert", False):
            continue
        for name, (dtype, shape) in recipe.assemblies[0].made.items():
            item = live.tensor_item(name)
            if item is not None and (item.dtype, item.shape) != (dtype, shape):
                raise LoadMismatch(
                    f"component {recipe.component.key!r}: {name!r} was saved as {dtype} {list(shape)}, but "
                    f"load_state_dict() made {item.dtype} {list(item.shape)} of it; wrap optimizers in NamedOptimizer, "
                    "which keeps dtypes",
                    component=recipe.component.key,
                )
