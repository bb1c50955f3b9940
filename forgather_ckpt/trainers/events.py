"""Telling callbacks what happens: each by itself, so that a broken one harms neither the training nor the others."""

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from forgather_ckpt.callbacks.events import TrainerCallback, TrainerControl, TrainerState
from forgather_ckpt.control import Wishes

logger = logging.getLogger(__name__)


class Events:
    """The callbacks of a trainer, what they are told of it, and what they have asked for."""

    def __init__(self, callbacks: Sequence[TrainerCallback], args: Any, state: TrainerState) -> None:
        if isinstance(callbacks, TrainerCallback) or not isinstance(callbacks, Sequence):
            raise TypeError(f"callbacks={callbacks!r} is no list; write callbacks=[…], or leave it out")
        for callback in callbacks:
            if isinstance(callback, type) and issubclass(callback, TrainerCallback):
                raise TypeError(
                    f"callbacks= has the class {callback.__name__}; give an instance, {callback.__name__}(…)"
                )
            if not isinstance(callback, TrainerCallback):
                raise TypeError(
                    f"callbacks= has a {type(callback).__name__}; make it a subclass of forgather_ckpt.callbacks."
                    "TrainerCallback, or give a function of the trainer to on_step_end="
                )
            if state.rank == 0 and (unknown := _unknown_events(callback)):
                logger.warning(
                    "callback %s has %s, which no trainer calls", type(callback).__name__, ", ".join(unknown)
                )
        self.callbacks = tuple(callbacks)
        self.state = state
        self.control = TrainerControl()
        self._args = args
        self._failures: Counter[str] = Counter()

    def tell(self, event: str, **facts: Any) -> None:
        """Call this event of all callbacks. What one raises is logged, the first time with its traceback.

        Each gets metrics and logs of its own: what one changes in them, no other one sees.
        """
        for callback in self.callbacks:
            try:
                own = {name: dict(fact) if isinstance(fact, dict) else fact for name, fact in facts.items()}
                getattr(callback, event)(self._args, self.state, self.control, **own)
            except Exception as err:
                name = f"{type(callback).__name__}.{event}"
                self._failures[name] += 1
                if self._failures[name] == 1:
                    logger.exception(
                        "callback %s failed at step %d; it will be called again", name, self.state.global_step
                    )
                else:
                    logger.debug("callback %s failed again: %s: %s", name, type(err).__name__, err)

    def take_wishes(self) -> Wishes:
        """What the callbacks have asked for since the last call."""
        control = self.control
        wishes = Wishes(
            save=control.should_save,
            evaluate=control.should_evaluate,
            log=control.should_log,
            end_epoch=control.should_epoch_stop,
            stop=control.should_training_stop,
            abort=control.should_abort_without_save,
            reasons=tuple(control.reasons),
        )
        control.clear()
        return wishes

    def tell_failures(self) -> None:
        """At the end: which callbacks did not do their work."""
        for name, count in self._failures.items():
            logger.warning("callback %s failed %d times; the first one is in the log above", name, count)


def _unknown_events(callback: TrainerCallback) -> list[str]:
    """Methods with names like those of events, as other libraries have more of them, or as they are misspelt."""
    return [
        name
        for name in dir(type(callback))
        if name.startswith("on_") and not hasattr(TrainerCallback, name) and callable(getattr(type(callback), name))
    ]


class StepMetrics(Mapping[str, float]):
    """Numbers of one step, each read from its device when it is first looked up, which waits for the device."""

    def __init__(self, values: Mapping[str, torch.Tensor | float]) -> None:
        self._values = dict(values)

    def __getitem__(self, name: str) -> float:
        value = self._values[name]
        if isinstance(value, torch.Tensor):
            value = self._values[name] = float(value.item())
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def tensor(self, name: str) -> torch.Tensor:
        """The number as a tensor of no dimensions, where it lies: nothing waits."""
        value = self._values[name]
        return value if isinstance(value, torch.Tensor) else torch.tensor(value)
