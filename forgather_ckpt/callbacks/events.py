"""What a trainer tells its callbacks, and what they may ask of it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from forgather_ckpt.callbacks.decision import Action, Decision


@dataclass
class TrainerState:
    """Where a run is, as callbacks see it; the trainer's, to be read."""

    global_step: int = 0
    """Optimizer steps done, those before a resume included."""
    max_steps: int = 0
    """The step at which training will end, as seen from here."""
    epoch: float = 0.0
    """Epochs done, with the part of the current one."""
    rank: int = 0
    world_size: int = 1
    resumed_from: Path | None = None
    last_checkpoint: Path | None = None
    """Saved or resumed from."""
    last_checkpoint_step: int | None = None
    last_save_seconds: float | None = None
    """How long training stood still for the last save of this process."""

    @property
    def is_world_process_zero(self) -> bool:
        return self.rank == 0


@dataclass(slots=True)
class TrainerControl:
    """What callbacks ask for. One rank's wish is every rank's: the ranks agree before any of them acts.

    A flag is taken down again when it has been followed.
    """

    should_save: bool = False
    should_evaluate: bool = False
    should_log: bool = False
    should_epoch_stop: bool = False
    """End this epoch at this step, and go on with the next."""
    should_training_stop: bool = False
    """End the training at this step, with a checkpoint."""
    should_abort_without_save: bool = False
    """End it without one: a save that is due is given up."""
    reasons: list[str] = field(default_factory=list)
    """Why, where a callback said so."""

    def stop(self, reason: str) -> None:
        self.should_training_stop = True
        self.reasons.append(reason)

    def abort(self, reason: str) -> None:
        self.should_abort_without_save = True
        self.reasons.append(reason)

    def clear(self) -> None:
        """Take all flags down: the trainer has them."""
        self.__init__()  # type: ignore[misc]

    def follow(self, decision: Decision) -> None:
        """Ask for what a watcher has decided."""
        match decision.action:
            case Action.STOP:
                self.stop(decision.reason or "")
            case Action.ABORT:
                self.abort(decision.reason or "")


class TrainerCallback:
    """Something that a trainer tells what happens; override what is of interest.

    All ranks call all events, in the order in which the callbacks were given. `args` are the trainer's arguments; among
    the keywords are always `trainer` and its `model`. An event that raises is logged and harms neither the training nor
    other callbacks. What a callback asks for it writes into `control`; returned values mean nothing. One that has
    `state_dict` and `load_state_dict` is saved with each checkpoint, under its `name`, or else that of its class.
    """

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> Any:
        """Before the first step, after a resume."""

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> Any:
        """After the last checkpoint; also where the training ends by an error (`error=` is that, else None)."""

    def on_epoch_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> Any: ...

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> Any: ...

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> Any: ...

    def on_step_end(
        self, args: Any, state: TrainerState, control: TrainerControl, *, metrics: Mapping[str, Any], **kwargs: Any
    ) -> Any:
        """After an optimizer step. `metrics` has `loss`, `grad_norm` (where gradients are clipped) and `learning_rate`
        of this step; looking one up waits for the device, so look only at what is needed."""

    def on_log(
        self, args: Any, state: TrainerState, control: TrainerControl, *, logs: Mapping[str, Any], **kwargs: Any
    ) -> Any:
        """Every `logging_steps`: `loss` is the mean since the last log. The same on all ranks."""

    def on_evaluate(
        self, args: Any, state: TrainerState, control: TrainerControl, *, metrics: Mapping[str, Any], **kwargs: Any
    ) -> Any:
        """After an evaluation: its metrics, with names that begin with `eval_`. The same on all ranks."""

    def on_save(
        self, args: Any, state: TrainerState, control: TrainerControl, *, path: Path, kind: str, **kwargs: Any
    ) -> Any:
        """After a checkpoint has been committed."""
