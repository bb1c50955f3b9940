"""The state of the functions that a trainer calls, under names that do not depend on their order."""

import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch

from forgather_ckpt import hashtree, sharded
from forgather_ckpt.boxes import Box
from forgather_ckpt.component import Available, StateDict, Target
from forgather_ckpt.errors import LoadMismatch, StructureError
from forgather_ckpt.names import decode_path
from forgather_ckpt.structure import State, capture
from forgather_ckpt.topology import Topology

logger = logging.getLogger(__name__)

PART = "part of the model"
"""The key under which is saved, as `{digest: [names of callbacks]}`, of which part of the model the tensors are that
callbacks keep. No callback has this name."""

AS_COMPONENT = (
    "declare such state as a component of its own, in the trainer's get_state_components, with "
    'names="global" and the names of the model (docs/custom_trainer.md)'
)


@runtime_checkable
class HasState(Protocol):
    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any: ...


def taken_over(saved: Sequence[StateDict], old: Topology, new: Topology) -> StateDict:
    """For another number of ranks: of each callback the state of the first rank that had one, if all that had one had the
    same names, dtypes and shapes.

    What a callback keeps of a part of the model that only some ranks have (an average of a stage's weights, say) is left
    out, with a warning: it belongs in a component of its own, with the pattern of that part. `LoadMismatch` where ranks
    with the same part had unlike states.
    """
    taken: StateDict = {}
    for name in dict.fromkeys(name for state in saved for name in state if name != PART):
        first, *others = [state for state in saved if name in state]
        structure = capture({name: first[name]}).structure_digest()
        if any(capture({name: state[name]}).structure_digest() != structure for state in others):
            if any(part_saved(state, name) != part_saved(first, name) for state in others):
                logger.warning("callback %r kept tensors of other parts of the model on each rank; %s", name, AS_COMPONENT)
                continue
            raise LoadMismatch(
                f"callback {name!r} kept other items on some ranks than on others, which cannot be dealt out over another "
                f"number of ranks; {AS_COMPONENT}"
            )
        taken[name] = first[name]
        if (part := part_saved(first, name)) is not None:
            taken.setdefault(PART, {}).setdefault(part, []).append(name)
    return taken


def part_saved(state_dict: Mapping[str, Any], name: str) -> str | None:
    """Of which part of the model a callback's tensors are; None where it has none, or where that was not saved."""
    return next((part for part, names in state_dict.get(PART, {}).items() if name in names), None)


def part_of(model_state: StateDict) -> str:
    """A digest of the names, dtypes and shapes of what this rank has of a model, and of where that lies in the whole."""
    rows = [
        (name, str(tensor.dtype), tuple(tensor.shape), boxes_of(tensor))
        for name, tensor in model_state.items()
        if isinstance(tensor, torch.Tensor)
    ]
    return hashtree.digest(repr(sorted(rows)).encode()).hex()


def boxes_of(tensor: torch.Tensor) -> list[Box] | None:
    """What this rank has of a tensor that is cut over ranks; None where it has all of it."""
    if sharded.is_dtensor(tensor) and sharded.is_sharded(tensor):
        return [part.box for part in sharded.parts(tensor)]
    return None


class CallbackStates:
    """What those of the callbacks hold that have `state_dict` and `load_state_dict`.

    Each rank's are its own, and come back to it; on another number of ranks all get the first's (`taken_over`). Where
    `model_state` says what this rank has of the model, a callback that keeps tensors gets its state only where they were
    saved with the same part of the model, as they may be of that; elsewhere it starts fresh, and that is told.

    Each is saved under its attribute `name`, or else that of its class. Callbacks may come and go between runs: a new
    one starts fresh, the state of one that is gone is left in the checkpoint, and either is told. One whose state cannot
    be taken, stored or loaded is told of and left out, and harms neither the others nor the training.
    """

    may_convert = True

    def __init__(self, callbacks: Iterable[Any], model_state: Callable[[], StateDict] | None = None) -> None:
        self._model_state = model_state
        self._targets: dict[str, Target] = {}
        """Where the tensors lie that `state_dict` last gave, by item."""
        self._by_name: dict[str, HasState] = {}
        for callback in callbacks:
            if isinstance(callback, HasState):
                name = getattr(callback, "name", None) or type(callback).__name__
                if name == PART:
                    raise ValueError(f"a callback is called {name!r}, which is the key of something else; rename it")
                if self._by_name.setdefault(name, callback) is not callback:
                    raise ValueError(f"two callbacks are called {name!r}: give each an attribute `name` of its own")

    def state_dict(self) -> dict[str, Any]:
        states: dict[str, Any] = {}
        with_tensors: list[str] = []
        self._targets = {}
        for name, callback in self._by_name.items():
            try:
                state = callback.state_dict()
                captured = capture({name: state})  # which refuses what cannot be stored
                refuse_cut(captured)
            except Exception as err:
                logger.warning("the state of callback %r is not saved: %s: %s", name, type(err).__name__, err)
                continue
            states[name] = state
            if captured.tensors:
                with_tensors.append(name)
                self._targets |= places_in(captured)
        if with_tensors and self._model_state is not None:
            states[PART] = {part_of(self._model_state()): with_tensors}
        return states

    def load_targets(self, available: Mapping[str, Available]) -> dict[str, Target | None]:
        """All tensors are read into new memory, on the devices of those that are there now: these may be of other dtypes
        and shapes, as the callbacks have not begun. Of another part of the model, none are."""
        paths = {item: decode_path(item) for item in available}
        unwanted = set()
        if self._is_other_part({path[1] for path in paths.values() if path[0] == PART and len(path) > 1}):
            unwanted = {paths[item][0] for item, what in available.items() if what.dtype is not None}
        targets: dict[str, Target | None] = {}
        for item, what in available.items():
            if paths[item][0] in unwanted:
                targets[item] = None
            elif what.dtype is not None:
                targets[item] = self._targets.get(item, Target())
        return targets

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        marked = {name for names in state_dict.get(PART, {}).values() for name in names}
        for name in sorted((state_dict.keys() | marked) - {PART} - self._by_name.keys()):
            logger.warning("the checkpoint has the state of a callback %r, which this run does not have", name)
        for name, callback in self._by_name.items():
            part = part_saved(state_dict, name)
            if part is not None and self._is_other_part({part}):
                logger.warning(
                    "callback %r starts fresh: it keeps tensors, which were saved on a rank with another part of the model "
                    "than this one has; where they are to go on in any layout, %s",
                    name,
                    AS_COMPONENT,
                )
            elif name not in state_dict:
                logger.warning("callback %r is not in the checkpoint, and starts fresh", name)
            else:
                try:
                    callback.load_state_dict(state_dict[name])
                except Exception as err:
                    logger.warning("callback %r did not take its state: %s: %s", name, type(err).__name__, err)

    def _is_other_part(self, saved: Collection[str]) -> bool:
        """Whether this rank has none of the parts in `saved`; not where none is known."""
        return bool(saved) and self._model_state is not None and part_of(self._model_state()) not in saved


def refuse_cut(state: State) -> None:
    """`StructureError` where a tensor is cut over ranks: each would store its part by itself, for no other layout."""
    for name in state.sharded:
        raise StructureError(f"{name!r} is a DTensor that is cut over the ranks; {AS_COMPONENT}")


def places_in(state: State) -> dict[str, Target]:
    """Where the tensors of a state lie, of which nothing is cut, by name."""
    places = {
        name: Target.like(item.tensor if item.dtensor is None else item.dtensor) for name, item in state.tensors.items()
    }
    return places | {name: places[alias.target] for name, alias in state.aliases.items()}

