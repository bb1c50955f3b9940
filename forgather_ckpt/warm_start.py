"""The warm start: a job takes over some of the state in a checkpoint, which may be another job's.

Not a resume: what is not asked for stays as it is, items may have other names or dtypes than in the checkpoint, and
the report says what became of each.
"""

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch

from forgather_ckpt import choice, hashtree, strict_json
from forgather_ckpt.assembly import Stored, assemble, content_of
from forgather_ckpt.comm import Comm
from forgather_ckpt.component import ChoosesTargets, StateComponent, Target
from forgather_ckpt.declarations import declare
from forgather_ckpt.entries import Resize, entry_for
from forgather_ckpt.errors import CheckpointError, DeclarationError, LoadMismatch
from forgather_ckpt.index import AliasRow, TensorRow, ValueRow
from forgather_ckpt.job import Job
from forgather_ckpt.library import Library
from forgather_ckpt.load import apply, take_live
from forgather_ckpt.matching import Match, Rules, match, matches, patterns, renamed, some_of
from forgather_ckpt.patterns import SharingPattern
from forgather_ckpt.prepare import (
    Live,
    Recipe,
    check_declared,
    check_values,
    open_library,
    refuse_shared_memory,
    targets_of,
)
from forgather_ckpt.structure import ShardedItem, State

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Request:
    """What is asked of one warm start; equal on all ranks, as far as it is not a function."""

    path: str
    components: tuple[str, ...]
    rules: Rules

    @classmethod
    def of(cls, path: object, components: Any, include: Any, exclude: Any, **rules: Any) -> Self:
        """From what the caller gave; `DeclarationError` where it means nothing."""
        if not isinstance(path, (str, Path)) or not str(path):
            raise DeclarationError(f"path is {path!r}; use a checkpoint, a run directory, or RUN@SELECTOR")
        keys = (components,) if isinstance(components, str) else components
        if not isinstance(keys, Sequence) or not keys or not all(isinstance(key, str) for key in keys):
            raise DeclarationError(f"components is {components!r}; use a list of keys, such as ['model']")
        if include is not None:
            rules["include"] = patterns(include, "include")
        if exclude is not None:
            rules["exclude"] = patterns(exclude, "exclude")
        return cls(str(path), tuple(dict.fromkeys(keys)), Rules(**rules))

    def to_json(self) -> dict[str, Any]:
        rules = self.rules
        return {
            "do": "warm start",
            "path": self.path,
            "components": list(self.components),
            "include": list(rules.include),
            "exclude": list(rules.exclude),
            "rename": "function" if callable(rules.rename) else dict(rules.prefixes),
            "missing": rules.missing,
            "cast": rules.cast,
        }


@dataclass(frozen=True)
class ComponentStart:
    """What became of the items of one component. The names are the job's, unless it says otherwise."""

    loaded: Sequence[str] = ()
    renamed: Mapping[str, str] = field(default_factory=dict)
    """Of those loaded, the names in the checkpoint, where they are others there."""
    cast: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    """Of those loaded, the dtypes in the checkpoint and in the job, where these differ."""
    kept: Sequence[str] = ()
    """The job's items that have the values that they had."""
    ignored: Sequence[str] = ()
    """The checkpoint's items, by their names there, that went nowhere."""

    def to_json(self) -> dict[str, Any]:
        cast = {name: list(dtypes) for name, dtypes in self.cast.items()}
        return {
            "loaded": list(self.loaded),
            "renamed": dict(self.renamed),
            "cast": cast,
            "kept": list(self.kept),
            "ignored": list(self.ignored),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        cast = {name: (stored, live) for name, (stored, live) in data["cast"].items()}
        return cls(tuple(data["loaded"]), data["renamed"], cast, tuple(data["kept"]), tuple(data["ignored"]))

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        """What all ranks did together. An item that another rank has taken was not ignored."""
        return cls(
            sorted({name for part in parts for name in part.loaded}),
            {name: old for part in parts for name, old in part.renamed.items()},
            {name: dtypes for part in parts for name, dtypes in part.cast.items()},
            sorted({name for part in parts for name in part.kept}),
            sorted(set(parts[0].ignored).intersection(*(part.ignored for part in parts))),
        )

    def text(self) -> str:
        """One line: how many items, and the first names of what is not plainly loaded."""
        cast = [f"{name} ({stored} to {live})" for name, (stored, live) in self.cast.items()]
        told = [f"{len(self.loaded)} loaded"]
        for names, what in (
            ([f"{old} to {name}" for name, old in self.renamed.items()], "renamed"),
            (cast, "cast"),
            (self.kept, "kept"),
            (self.ignored, "of the checkpoint ignored"),
        ):
            if names:
                told.append(f"{len(names)} {what}: {some_of(names)}")
        return "; ".join(told)


@dataclass(frozen=True)
class WarmStartReport:
    """What a warm start took from where; the same on all ranks."""

    path: Path
    step: int
    components: Mapping[str, ComponentStart]

    def text(self) -> str:
        """One line for the checkpoint, and one for each component."""
        lines = [f"{key}: {start.text()}" for key, start in self.components.items()]
        return "\n".join([f"warm start from {self.path} (step {self.step})", *lines])


@dataclass(frozen=True)
class _Part:
    """What one rank does, decided before anything live is touched."""

    step: int
    recipes: Sequence[Recipe]
    starts: Mapping[str, ComponentStart]
    idle: Sequence[str]
    """Arguments that have had no effect here, as they were written."""


def warm_start(job: Job, request: Request) -> WarmStartReport:
    """Give the components what the checkpoint has for them, on all ranks; `Torn` where it fails after touching them.

    `LoadMismatch` where it does not fit, and nothing is changed.
    """
    comm, wanted = job.comm, request.to_json()
    comm.begin_operation(f"{wanted}")
    components = declare(comm, job.topology, job.source, wanted)
    name, digest = comm.agree("choosing a checkpoint", lambda: None, lambda _: _choose(request.path))
    path = Path(name)
    live = take_live(comm, components, request.components)
    part = comm.together("preparing the warm start", lambda: _prepare(job, request, live, path, digest))
    job_wide = [one.key for one in components if one.is_global and one.sharing_pattern is not SharingPattern.GLOBAL]
    starts = _joined(comm, part, request, job_wide)
    report = WarmStartReport(path, part.step, {key: starts[key] for key in request.components})
    apply(comm, path, part.recipes, request.components)
    logger.info("%s", report.text())
    return report


def _choose(path: str) -> list[str]:
    """Rank 0's choice: the checkpoint's path and its manifest's digest."""
    found = choice.named(path)
    return [str(found.path.resolve()), found.manifest.digest]


def _prepare(job: Job, request: Request, live: Live, path: Path, digest: str) -> _Part:
    library = open_library(path, digest)
    manifest, rules = library.manifest, request.rules
    check_declared(request.components, live)
    recipes: list[Recipe] = []
    starts: dict[str, ComponentStart] = {}
    job_names: set[str] = set()
    stored_names: set[str] = set()
    names_to_come: set[str] = set()
    for component in live.components:
        key = component.key
        if key not in request.components:
            continue
        if key in live.unusable:
            raise LoadMismatch(live.unusable[key], component=key)
        if key not in manifest.components:
            raise LoadMismatch(
                f"the checkpoint of step {manifest.step} has no component {key!r}; it has {sorted(manifest.components)}",
                component=key,
            )
        if component.stateful is None:
            continue
        job.comm.beat()
        stored = _stored(job, component, library)
        try:
            recipe, starts[key] = _recipe(component, live.states[key], stored, rules, library)
        except CheckpointError as err:
            raise err.in_component(key) from err
        recipes.append(recipe)
        stored_names |= stored.names
        job_names.update(starts[key].loaded, starts[key].kept)
        if isinstance(component.stateful, ChoosesTargets):
            names_to_come.update(renamed(stored.names, rules.rename).values())
    refuse_shared_memory(recipes, live)
    return _Part(manifest.step, recipes, starts, list(_idle(rules, job_names, stored_names, names_to_come)))


def _stored(job: Job, component: StateComponent, library: Library) -> Stored:
    """What the checkpoint has for this rank's component."""
    manifest = library.manifest
    entry = entry_for(component, manifest.components[component.key], manifest.topology, job.topology)
    if isinstance(entry, Resize):
        raise LoadMismatch(
            f"component {component.key!r} ({component.sharing_pattern.name}): {entry.reason}; only state with global names "
            "starts another layout",
            component=component.key,
        )
    return library.entry(component.key, entry)


def _idle(rules: Rules, job_names: set[str], stored_names: set[str], names_to_come: set[str]) -> Iterator[str]:
    """`names_to_come`: of items that the job may not have yet, and would be given if they were not excluded."""
    for what, given, names in (
        ("include", rules.include, job_names),
        ("exclude", rules.exclude, job_names | names_to_come),
    ):
        for pattern in given:
            if not any(matches(name, [pattern]) for name in names):
                yield f"{what}={pattern!r} (of the names in the job)"
    for prefix in rules.prefixes:
        if not any(name.startswith(prefix) for name in stored_names):
            yield f"rename={prefix!r} (of the names in the checkpoint)"


def _recipe(
    component: StateComponent, live: State, stored: Stored, rules: Rules, library: Library
) -> tuple[Recipe, ComponentStart]:
    """How one component is filled on this rank, and what that means for each item."""
    new_names = renamed(stored.names, rules.rename)
    old_names = {new: old for old, new in new_names.items()}
    stored = stored.renamed(new_names)
    targets: dict[str, Target] = {}
    usable = stored.names
    if isinstance(component.stateful, ChoosesTargets):
        available = {name: what for name, what in stored.available().items() if rules.asks_for(name)}
        chosen = targets_of(component, available)
        targets = {name: target for name, target in chosen.items() if target is not None}
        usable -= {name for name, target in chosen.items() if target is None}
    ties = {name: [name] for name in sorted(live.names - set(live.aliases))}
    for alias in live.aliases.values():
        ties[alias.target].append(alias.name)
    made = sorted(name for name in usable & (targets.keys() - live.names) if rules.asks_for(name))
    found = match([*ties.values(), *([name] for name in made)], usable, rules)
    _check_doubles(stored, found)

    cast = {}
    tensors: dict[str, Sequence[TensorRow]] = {}
    values: dict[str, ValueRow] = {}
    for name, source in found.sources.items():
        rows = stored.rows_of(source)
        _check_kind(live, name, is_tensor=rows is not None)
        if rows is None:
            value = stored.values[source]
            values[name] = value._replace(name=name, order=_order(live, name, value.order))
            continue
        order = _order(live, name, rows[0].order)
        tensors[name] = [row._replace(name=name, order=order) for row in rows]
        item = live.tensor_item(name)
        if item is not None and name not in targets:
            if item.shape != rows[0].shape:
                raise LoadMismatch(
                    f"{name!r} has the shape {list(rows[0].shape)} in the checkpoint and {list(item.shape)} in the job; "
                    "leave it as it is with exclude="
                )
            if item.dtype != rows[0].dtype:
                _check_cast(name, rows[0].dtype, item.dtype, rules)
                cast[name] = rows[0].dtype, item.dtype
    aliases = {name: AliasRow(*alias) for name, alias in live.aliases.items() if alias.target in found.sources}
    taken = Stored(component.key, tensors, values, aliases)
    assembly = assemble(taken, live, targets, cast=rules.cast)
    for name in found.kept:
        assembly.add(_order(live, name, 0), name, _leaf(live, name))
    check_values(component, assembly)
    start = ComponentStart(
        loaded=sorted({*live.names, *made} - set(found.kept)),
        renamed={name: old_names[source] for name, source in found.sources.items() if old_names[source] != name},
        cast=cast,
        kept=sorted(found.kept),
        ignored=sorted(old_names[name] for name in found.ignored),
    )
    return Recipe(component, [taken], [assembly], False, library.manifest), start


def _check_doubles(stored: Stored, found: Match) -> None:
    for one, other in found.doubles:
        rows, other_rows = stored.rows_of(one), stored.rows_of(other)
        if rows is None or other_rows is None or content_of(rows) != content_of(other_rows):
            raise LoadMismatch(
                f"{one!r} and {other!r} are one tensor in the job and two different ones in the checkpoint; leave one of "
                "them out with exclude="
            )


def _check_kind(live: State, name: str, *, is_tensor: bool) -> None:
    if name in live.names and is_tensor is (name in live.values):
        kinds = ("a tensor", "a value")
        stored, own = kinds if is_tensor else reversed(kinds)
        raise LoadMismatch(f"{name!r} is {stored} in the checkpoint and {own} in the job")


def _check_cast(name: str, stored: str, live: str, rules: Rules) -> None:
    """`LoadMismatch` unless a tensor may, and can, be converted. Numbers are never made integers, or the reverse."""
    differ = f"{name!r} is {stored} in the checkpoint and {live} in the job"
    if not rules.cast:
        raise LoadMismatch(f"{differ}; have it converted with cast=True, or leave it as it is with exclude=")
    one, other = getattr(torch, stored), getattr(torch, live)
    is_possible = (one.is_floating_point and other.is_floating_point) or (one.is_complex and other.is_complex)
    if is_possible:
        try:
            torch.empty(1, dtype=one).to(other)
        except RuntimeError:
            is_possible = False
    if not is_possible:
        raise LoadMismatch(f"{differ}, and cannot be converted; leave it as it is with exclude=")


def _order(live: State, name: str, stored: int) -> int:
    """Where an item stands in the state dict; what the job does not have yet comes last, as it was `stored`."""
    item = live.aliases.get(name) or live.values.get(name) or live.tensor_item(name)
    return live.num_items + 1 + stored if item is None else item.order


def _leaf(live: State, name: str) -> Any:
    """An item of a state dict as it came."""
    if name in live.values:
        return live.values[name].value
    item = live.tensor_item(live.aliases[name].target if name in live.aliases else name)
    assert item is not None
    return item.tensor if isinstance(item, ShardedItem) or item.dtensor is None else item.dtensor


def _joined(comm: Comm, part: _Part, request: Request, job_wide: Collection[str]) -> Mapping[str, ComponentStart]:
    """What becomes of each component on all ranks together. One digest a rank, where all do the same.

    `job_wide` are those in which one name is one item, on whatever ranks. `LoadMismatch` where such an item would become
    different things, where a component would get nothing, or an argument has no effect on any rank.
    """
    own: dict[str, Any] = {
        "starts": {key: start.to_json() for key, start in part.starts.items()},
        "idle": list(part.idle),
    }
    digest = hashtree.digest(strict_json.dumps(own)).hex()
    is_alike = comm.agree("comparing what is loaded", lambda: digest, lambda digests: len(set(digests)) == 1)
    told = [own] if is_alike else comm.agree("comparing what is loaded", lambda: own, lambda columns: columns)
    # equal on all ranks, and so is what follows from it
    starts = {}
    for key in request.components:
        by_rank = {
            rank: ComponentStart.from_json(one["starts"][key]) for rank, one in enumerate(told) if key in one["starts"]
        }
        if key in job_wide:
            _refuse_unlike(key, by_rank)
        parts = [*by_rank.values()]
        starts[key] = ComponentStart.joined(parts) if parts else ComponentStart()
        if not starts[key].loaded:
            has = f"; it has {some_of(starts[key].ignored)}" if starts[key].ignored else ""
            raise LoadMismatch(
                f"component {key!r}: the checkpoint of step {part.step} has nothing under a name that is asked for{has}",
                component=key,
            )
    if idle := sorted(set(told[0]["idle"]).intersection(*(one["idle"] for one in told))):
        raise LoadMismatch(f"{', '.join(idle)} matches nothing; correct it, or leave it out")
    return starts


def _refuse_unlike(key: str, starts: Mapping[int, ComponentStart]) -> None:
    """`LoadMismatch` where ranks, by a `rename` that is not the same function, make different things of one item."""
    told: dict[tuple[str, str], tuple[int, str]] = {}
    for rank, start in starts.items():
        fates = {(name, "whether"): "loaded" for name in start.loaded}
        fates |= {(name, "whether"): "left as it is" for name in start.kept}
        fates |= {(name, "whence"): f"loaded from {old!r}" for name, old in start.renamed.items()}
        for what, fate in fates.items():
            other, known = told.setdefault(what, (rank, fate))
            if fate != known:
                raise LoadMismatch(
                    f"component {key!r}: {what[0]!r} would be {known} on rank {other} and {fate} on rank {rank}, and it is one "
                    "item; let all ranks that have it ask for the same, by the same rename=",
                    component=key,
                )
