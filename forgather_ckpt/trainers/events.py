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
        for callback in callbacks:
            if not isinstance(callback, TrainerCallback):
                raise TypeError(
                    f"callbacks= has a {type(callback).__name__}; make it a subclass of forgather_ckpt.callbacks."
                    "TrainerCallback, or give a function of the trainer to on_step_end="
                )
        self.callbacks = tuple(callbacks)
        self.state = state
        self.control = TrainerControl()
        self._args = args
        self._failures: Counter[str] = Counter()

    def tell(self, event: str, **facts: Any) -> None:
        """Call this event of all callbacks. What one raises is logged, the first time with its traceback."""
        for callback in self.callbacks:
            try:
                getattr(callback, event)(self._args, self.state, self.control, **facts)
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
