"""What the callbacks that may end a training have in common: how they ask for it, and what a resume makes of that."""

from typing import Any

from forgather_ckpt.callbacks.decision import Action, Decision
from forgather_ckpt.callbacks.events import TrainerCallback, TrainerControl, TrainerState


class Watcher(TrainerCallback):
    """A callback that decides on what it is told.

    A run that it has ended may be resumed: somebody wants it to go on. So what it remembers never ends a run by itself;
    that takes new values.
    """

    _asked: Decision | None = None

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._asked = None
        self.give_another_chance()

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
