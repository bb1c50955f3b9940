"""`DigestRecorder`: digests of the live state, step by step, in a log (`digest_log`) of each rank's own."""

import fnmatch
import functools
import logging
import os
import re
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Protocol, Self

import torch.distributed as dist

from forgather_ckpt import digest_log, digests, hashtree, names, structure
from forgather_ckpt.callbacks.events import TrainerCallback
from forgather_ckpt.component import StateComponent
from forgather_ckpt.digest_log import Column, Part
from forgather_ckpt.digest_writer import LogWriter
from forgather_ckpt.errors import CheckpointError, DeclarationError, FormatError, RunDirectoryInUse, StorageError
from forgather_ckpt.structure import AliasItem, TensorItem, ValueItem

logger = logging.getLogger(__name__)

States = Sequence[StateComponent] | Mapping[str, Any]
"""Components, or name -> module, optimizer, anything else with `state_dict()`, or a state dict."""

Chooses = Callable[[str], bool]
"""Whether an item of this name is recorded."""


class _Arguments(Protocol):
    @property
    def output_dir(self) -> str | Path: ...


class _Progress(Protocol):
    @property
    def step(self) -> int: ...


class _Trainer(Protocol):
    """What the recorder asks of a trainer that it is a callback of."""

    @property
    def args(self) -> _Arguments: ...
    @property
    def progress(self) -> _Progress: ...
    @property
    def rank(self) -> int: ...
    @property
    def world_size(self) -> int: ...
    def get_state_components(self) -> Sequence[StateComponent]: ...


class DigestRecorder(TrainerCallback):
    """Records 16 bytes for every tensor and value of the training state, every `every_n_steps` steps.

    As a callback of a trainer, which records all components that the trainer declares, in `<output_dir>/digests`:

    >>> DDPTrainer(model, args, dataset, callbacks=[DigestRecorder()]).train()

    In a loop of one's own, with components or with whatever has a `state_dict()`:

    >>> with DigestRecorder("runs/mine/digests") as recorder:
    ...     for step in range(1, 1001):
    ...         train_step()
    ...         recorder.record(step, {"model": model, "optimizer": NamedOptimizer(optimizer, [model])})

    `components` chooses by key, `include` and `exclude` by shell patterns of item names. `fgckpt digests diff` compares
    the logs of two runs, or of two ranks.

    Nothing is sent between ranks, and nothing is synced to the disk: each rank appends to its own log, and every frame
    has left the process when `record` returns. Tensors on a GPU are read there, in one launch a device; the step waits
    for it. A `state_dict()` may be a collective (FSDP's is), so all ranks record the same steps.

    Where the disk fails, or the log cannot be used, the first error is logged, nothing more is recorded, and training
    goes on; `failure` has the error. With `strict=True` it is raised, each time. State that cannot be recorded raises always:
    `StructureError`. What a callback raises is only logged; so that it ends the training, give the recorder among the
    functions in `on_step_end=`.
    """

    def __init__(
        self,
        directory: str | Path | None = None,
        *,
        every_n_steps: int = 1,
        components: Sequence[str] | None = None,
        include: Sequence[str] = ("*",),
        exclude: Sequence[str] = (),
        strict: bool = False,
    ) -> None:
        if isinstance(every_n_steps, bool) or not isinstance(every_n_steps, int) or every_n_steps < 1:
            raise ValueError(f"every_n_steps must be a whole number of at least 1, not {every_n_steps!r}")
        for name, given in (("components", components or ()), ("include", include), ("exclude", exclude)):
            if isinstance(given, (str, bytes)) or not all(isinstance(one, str) and one for one in given):
                raise ValueError(f"{name} must be a list of strings, not {given!r}")
        self.directory = None if directory is None else Path(directory)
        self.every_n_steps = every_n_steps
        self.failure: CheckpointError | None = None
        """Why recording has stopped."""
        self._keys = None if components is None else frozenset(components)
        self._include, self._exclude = tuple(include), tuple(exclude)
        self._is_chosen = functools.lru_cache(maxsize=None)(_choice(self._include, self._exclude))
        self._is_strict = strict
        self._writer: LogWriter | None = None

    def on_step_end(self, *_: Any, **facts: Any) -> None:
        self(facts["trainer"])

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.close()

    def __call__(self, trainer: _Trainer) -> None:
        """After a step of a trainer: record it, if its number is a multiple of `every_n_steps`."""
        step = trainer.progress.step
        if step % self.every_n_steps == 0:
            directory = self.directory or Path(trainer.args.output_dir) / digest_log.DIRECTORY
            path = directory / digest_log.file_name(trainer.rank)
            self._record(step, trainer.get_state_components(), path, trainer.rank, trainer.world_size)

    def record(self, step: int, components: States) -> None:
        """Record one step, if its number is a multiple of `every_n_steps`. Every rank calls it for the same steps.

        The rank is that of the default process group, else RANK.
        """
        if self.directory is None:
            raise DeclarationError('say where to record: DigestRecorder("runs/mine/digests")')
        if isinstance(step, bool) or not isinstance(step, int) or not 0 <= step < 2**63:
            raise DeclarationError(f"step is {step!r}; use a number of steps, from 0")
        if step % self.every_n_steps == 0:
            rank, world_size = _place_in_job()
            self._record(step, components, self.directory / digest_log.file_name(rank), rank, world_size)

    def close(self) -> None:
        """Close the log; a later step opens it again."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _record(self, step: int, components: States, path: Path, rank: int, world_size: int) -> None:
        sources = self._chosen(_sources(components))
        # Also when recording has stopped: it may be a collective, in which the other ranks wait for this one.
        states = [_state_dict(source) for source in sources]
        if self.failure is not None and not self._is_strict:
            return
        with structure.collector_paused():
            frame = _Frame.of(sources, states, self._is_chosen)
        if any(states) and not frame.columns:
            raise DeclarationError(
                f"no item is recorded: none has a name like {list(self._include)} and unlike {list(self._exclude)}; item names "
                "are those that fgckpt show --tensors lists, without the component"
            )
        try:
            if self._writer is None or self._writer.path != path:
                self.close()
                self._writer = LogWriter(
                    path, rank=rank, world_size=world_size, include=self._include, exclude=self._exclude
                )
            self._writer.write(step, frame.parts, frame.columns, frame.digests)
        except (StorageError, FormatError, RunDirectoryInUse) as err:
            self.failure = err.at(rank=rank)
            self.close()
            if self._is_strict:
                raise
            logger.error(
                "rank %d records no digests from step %d on, training goes on: %s (strict=True makes this an error)",
                rank,
                step,
                err.message,
            )

    def _chosen(self, sources: Sequence["_Source"]) -> list["_Source"]:
        if self._keys is None:
            return list(sources)
        if strangers := self._keys - {source.part.key for source in sources}:
            known = ", ".join(source.part.key for source in sources) or "none"
            raise DeclarationError(f"there is no component {min(strangers)!r} to record; known: {known}")
        return [source for source in sources if source.part.key in self._keys]


def _choice(include: Sequence[str], exclude: Sequence[str]) -> Chooses:
    wanted = re.compile("|".join(map(fnmatch.translate, include)) or r"(?!)")
    unwanted = re.compile("|".join(map(fnmatch.translate, exclude)) or r"(?!)")

    def is_chosen(name: str) -> bool:
        return wanted.match(name) is not None and unwanted.match(name) is None

    return is_chosen


def _place_in_job() -> tuple[int, int]:
    """The rank and the world size."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


class _Source(NamedTuple):
    """One component, and what has its state."""

    part: Part
    stateful: Any


def _sources(components: States) -> list[_Source]:
    """`DeclarationError` for what a log could not hold, or could not be read from."""
    if isinstance(components, Mapping):
        for key, stateful in components.items():
            if not isinstance(key, str) or not key:
                raise DeclarationError(f"a component to record is called {key!r}; the name must be a non-empty string")
            if not (
                stateful is None or isinstance(stateful, Mapping) or callable(getattr(stateful, "state_dict", None))
            ):
                raise DeclarationError(
                    f"component {key!r} is a {type(stateful).__name__}; give what has a state_dict(), a state dict, or None"
                )
        return [_Source(Part(key, None), stateful) for key, stateful in components.items()]
    components = list(components) if isinstance(components, Iterable) else [components]
    for component in components:
        if not isinstance(component, StateComponent):
            raise DeclarationError(
                f"cannot record a {type(component).__name__}; give a list of StateComponent, or names with what is recorded "
                'under them: {"model": model}'
            )
    if len(keys := {component.key for component in components}) < len(components):
        raise DeclarationError(
            f"of {len(components)} components to record some have one key; the keys are {sorted(keys)}"
        )
    return [
        _Source(
            Part(component.key, component.sharing_pattern.value, tuple(component.validation_exclude)),
            component.stateful,
        )
        for component in components
    ]


def _state_dict(source: _Source) -> Mapping[str, Any]:
    stateful = source.stateful
    if stateful is None:  # takes part, but holds nothing
        return {}
    state: Mapping[str, Any] = stateful if isinstance(stateful, Mapping) else stateful.state_dict()
    return state


class _Frame(NamedTuple):
    """What is recorded of one step: 16 bytes a column."""

    parts: list[Part]
    columns: list[Column]
    digests: bytes

    @classmethod
    def of(cls, sources: Sequence[_Source], states: Sequence[Mapping[str, Any]], is_chosen: Chooses) -> "_Frame":
        columns: list[Column] = []
        leaves: list[TensorItem | bytes] = []
        for source, state in zip(sources, states, strict=True):
            for column, leaf in _leaves(source.part.key, state, is_chosen):
                columns.append(column)
                leaves.append(leaf)
        # All tensors at once, so that a device is asked once; under numbers, as components may share names.
        tensors = {id(leaf.tensor): leaf.tensor for leaf in leaves if isinstance(leaf, TensorItem)}
        found = digests.block_digests(
            TensorItem(str(number), 0, tensor) for number, tensor in enumerate(tensors.values())
        )
        of_tensors = {key: hashtree.join(found[str(number)]) for number, key in enumerate(tensors)}
        parts = [leaf if isinstance(leaf, bytes) else of_tensors[id(leaf.tensor)] for leaf in leaves]
        return cls([source.part for source in sources], columns, b"".join(parts))


def _leaves(key: str, state_dict: Mapping[str, Any], is_chosen: Chooses) -> Iterator[tuple[Column, TensorItem | bytes]]:
    """The columns of one component in the order of its state dict, each with its tensor or its digest."""
    try:
        state = structure.capture(_without_unchosen(state_dict, is_chosen))
    except CheckpointError as err:
        err.at(component=key)
        raise
    items: list[TensorItem | ValueItem | AliasItem] = [
        *state.tensors.values(),
        *state.values.values(),
        *state.aliases.values(),
    ]
    items.sort(key=lambda item: item.order)
    for item in items:
        if not is_chosen(item.name):
            continue
        if isinstance(item, ValueItem):
            yield Column(key, item.name, None, None, hashtree.ALGORITHM), hashtree.digest(item.data)
            continue
        for tensor in [item] if isinstance(item, TensorItem) else state.tensor_parts(item.target):
            name = names.shown(item.name, tensor.box)
            yield Column(key, name, tensor.dtype, tensor.shape, digests.algorithm(tensor.tensor)), tensor


def _without_unchosen(state_dict: Any, is_chosen: Chooses) -> Any:
    """A state dict without those of its own leaves that are not recorded: walking them would be most of the work.

    A tied tensor whose first name goes is recorded under its others all the same.
    """
    if type(state_dict) not in (dict, OrderedDict):
        return state_dict
    return {key: value for key, value in state_dict.items() if not _is_plain_leaf(key, value) or is_chosen(key)}


def _is_plain_leaf(key: Any, value: Any) -> bool:
    """Whether this is an item whose name is its key."""
    return (
        type(key) is str
        and key.isascii()
        and not ("~" in key or "/" in key)
        and not isinstance(value, (dict, list, tuple))
    )
