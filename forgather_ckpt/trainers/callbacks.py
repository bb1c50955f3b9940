"""The state of the functions that a trainer calls, under names that do not depend on their order."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from forgather_ckpt.component import StateDict
from forgather_ckpt.errors import LoadMismatch
from forgather_ckpt.structure import capture
from forgather_ckpt.topology import Topology

logger = logging.getLogger(__name__)


@runtime_checkable
class HasState(Protocol):
    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any: ...


def taken_over(saved: Sequence[StateDict], old: Topology, new: Topology) -> StateDict:
    """For another number of ranks: rank 0's state, if all ranks had the same names, dtypes and shapes.

    `LoadMismatch` where they had not: what a callback keeps of a part of the model that only some ranks have (an average
    of a stage's weights, say) belongs in a component of its own, with the pattern of that part.
    """
    if len({capture(state).structure_digest() for state in saved}) > 1:
        raise LoadMismatch(
            "callbacks kept other items on some ranks than on others, which cannot be dealt out over another number of "
            "ranks; declare such state as a component of its own, in the trainer's get_state_components, with "
            'names="global" and the names of the model'
        )
    return saved[0]


class CallbackStates:
    """What those of the callbacks hold that have `state_dict` and `load_state_dict`.

    Each rank's are its own, and come back to it; on another number of ranks all get rank 0's (`taken_over`).

    Each is saved under its attribute `name`, or else that of its class. Callbacks may come and go between runs: a new
    one starts fresh, the state of one that is gone is left in the checkpoint, and either is told. One whose state cannot
    be taken, stored or loaded is told of and left out, and harms neither the others nor the training.
    """

    def __init__(self, callbacks: Iterable[Any]) -> None:
        self._by_name: dict[str, HasState] = {}
        for callback in callbacks:
            if isinstance(callback, HasState):
                name = getattr(callback, "name", None) or type(callback).__name__
                if self._by_name.setdefault(name, callback) is not callback:
                    raise ValueError(f"two callbacks are called {name!r}: give each an attribute `name` of its own")

    def state_dict(self) -> dict[str, Any]:
        states = {}
        for name, callback in self._by_name.items():
            try:
                state = callback.state_dict()
                capture({name: state})  # which refuses what cannot be stored
            except Exception as err:
                logger.warning("the state of callback %r is not saved: %s: %s", name, type(err).__name__, err)
            else:
                states[name] = state
        return states

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        for name in state_dict.keys() - self._by_name.keys():
            logger.warning("the checkpoint has the state of a callback %r, which this run does not have", name)
        for name, callback in self._by_name.items():
            if name not in state_dict:
                logger.warning("callback %r is not in the checkpoint, and starts fresh", name)
                continue
            try:
                callback.load_state_dict(state_dict[name])
            except Exception as err:
                logger.warning("callback %r did not take its state: %s: %s", name, type(err).__name__, err)
