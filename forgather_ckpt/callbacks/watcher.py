"""What the callbacks that may end a training have in common: how they ask for it, and what a resume makes of that."""

import logging
from collections.abc import Mapping
from typing import Any

from forgather_ckpt.callbacks.decision import Action, Decision
from forgather_ckpt.callbacks.events import TrainerCallback, TrainerControl, TrainerState
from forgather_ckpt.callbacks.watched import WatchedMetric

logger = logging.getLogger(__name__)


class Watcher(TrainerCallback):
    """A callback that decides on what it is told.

    A run that it has ended may be resumed: somebody wants it to go on. So what it remembers never ends a run by itself;
    that takes new values. Of a metric that never comes, rank 0 warns: the training is not watched.
    """

    metric: WatchedMetric
    name: str
    _asked: Decision | None = None
    _first_step = 0
    _is_settled = False
    """The metric has come, or it has been told that it does not."""

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._asked = None
        self._first_step, self._is_settled = state.global_step, False
        self.give_another_chance()

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not self._is_settled and state.is_world_process_zero and state.global_step > self._first_step:
            logger.warning("%s has watched nothing: %r never came", self.name, self.metric.key)

    def look_for_metric(self, metrics: Mapping[str, Any], state: TrainerState, *, is_evaluation: bool) -> None:
        """Warn, once, where the metric had to come and did not: names that begin with `eval_` come with evaluations."""
        if self._is_settled:
            return
        has_come = self.metric.value_in(metrics) is not None
        self._is_settled = has_come or self.metric.key.startswith("eval_") == is_evaluation
        if self._is_settled and not has_come and state.is_world_process_zero:
            logger.warning(
                "%s watches %r, which the %s of step %d does not have, only %s",
                self.name,
                self.metric.key,
                "evaluation" if is_evaluation else "log",
                state.global_step,
                ", ".join(metrics) or "nothing",
            )

    def give_another_chance(self) -> None:
        """Where what is remembered would end the training whatever comes next, forget as much as makes it go on."""
        raise NotImplementedError

    def follow(self, decision: Decision, control: TrainerControl) -> None:
        """Ask for the end, at every event from the first that says so: it may take some steps until the ranks have agreed,
        and the first reason is the one to tell.
        """
        if decision.ends_training and self._asked is None:
            self._asked = decision
        if self._asked is None:
            return
        is_stop = self._asked.action is Action.STOP
        is_up = control.should_training_stop if is_stop else control.should_abort_without_save
        if not is_up or self._asked.reason not in control.reasons:
            control.follow(self._asked)
