"""Early stopping: a loss that no longer falls, or gradients that explode."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

from forgather_ckpt.callbacks.decision import CONTINUE, Action, Decision
from forgather_ckpt.callbacks.events import TrainerControl, TrainerState
from forgather_ckpt.callbacks.margin import Margin
from forgather_ckpt.callbacks.saved import is_of_metric, saved_count, saved_number, saved_step
from forgather_ckpt.callbacks.watched import WatchedMetric, is_sound, number_of
from forgather_ckpt.callbacks.watcher import Watcher
from forgather_ckpt.errors import LoadMismatch
from forgather_ckpt.metrics import Mode


class EarlyStopping(Watcher):
    """Stops, with a checkpoint, a run that gets nowhere.

    - After `patience` checks in a row none of which was better than the best by more than `min_delta`, an amount or a
      share of the best such as "1%". A check is one value: give it the mean loss of each log, since single steps are
      too noisy to be counted.
    - After `grad_spike_patience` gradient norms in a row above `grad_spike_threshold`. One that is not finite is such
      a spike and no more: under loss scaling in fp16 now and then one is normal, and that step is skipped.
    - At once when the loss is not finite.

    Up to step `warmup_steps` only the last is looked at, and nothing else enters the state.

    In a training, the checks are the values of logs and evaluations. The gradient norm, and whether the loss is finite,
    are looked at after every step, for which the step waits for the device.

    >>> stopping = EarlyStopping(patience=2, warmup_steps=0)
    >>> [stopping.update(loss).ends_training for loss in (3.0, 2.0, 1.995, 2.1)]
    [False, False, False, True]
    """

    def __init__(
        self,
        patience: int = 5,
        min_delta: float | str = 0.01,
        grad_spike_threshold: float = 1000.0,
        grad_spike_patience: int = 3,
        warmup_steps: int = 50,
        *,
        metric_key: str = "loss",
        grad_norm_key: str = "grad_norm",
        mode: Mode | None = None,
        name: str | None = None,
    ) -> None:
        whole = {"patience": (patience, 1), "grad_spike_patience": (grad_spike_patience, 1)}
        for argument, (value, least) in {**whole, "warmup_steps": (warmup_steps, 0)}.items():
            if type(value) is not int or value < least:
                raise ValueError(f"{argument} must be a whole number of at least {least}, not {value!r}")
        if type(grad_spike_threshold) not in (int, float) or not grad_spike_threshold > 0:
            raise ValueError(f"grad_spike_threshold must be a number above 0, not {grad_spike_threshold!r}")
        self.metric = WatchedMetric.of(metric_key, mode)
        self.name = name if name is not None else f"{type(self).__name__}.{metric_key}"
        """Under which its state is saved."""
        self._patience, self._min_delta = patience, Margin.parse("min_delta", min_delta, allows_zero=True)
        self._grad_spike_threshold, self._grad_spike_patience = grad_spike_threshold, grad_spike_patience
        self._warmup_steps = warmup_steps
        self._grad_norm_key = grad_norm_key
        self._counted = _Counted()

    def on_step_end(
        self, args: Any, state: TrainerState, control: TrainerControl, *, metrics: Mapping[str, Any], **kwargs: Any
    ) -> None:
        """The value of a single step is too noisy to be a check, and is taken in only where it ends the run."""
        value = self.metric.value_in(metrics)
        if value is not None and is_sound(number_of(self.metric.key, value)):
            value = None
        norm = metrics.get(self._grad_norm_key)
        self.follow(self.update(value, grad_norm=norm, step=state.global_step), control)

    def on_log(
        self, args: Any, state: TrainerState, control: TrainerControl, *, logs: Mapping[str, Any], **kwargs: Any
    ) -> None:
        self.look_for_metric(logs, state, is_evaluation=False)
        self.follow(self.update(self.metric.value_in(logs), step=state.global_step), control)

    def on_evaluate(
        self, args: Any, state: TrainerState, control: TrainerControl, *, metrics: Mapping[str, Any], **kwargs: Any
    ) -> None:
        self.look_for_metric(metrics, state, is_evaluation=True)
        self.follow(self.update(self.metric.value_in(metrics), step=state.global_step), control)

    def give_another_chance(self) -> None:
        """Full counts begin anew, and the best stays: without improvement the run ends after `patience` more checks."""
        counted = self._counted
        if counted.num_stalled >= self._patience:
            counted.num_stalled = 0
        if counted.num_spikes >= self._grad_spike_patience:
            counted.num_spikes = 0

    def observe(self, metrics: Mapping[str, Any], step: int) -> Decision:
        """Be told the metrics of an event; what they lack of the loss and the gradient norm changes nothing.

        Several events of one step may bring the same metric: it is counted once.
        """
        return self.update(self.metric.value_in(metrics), grad_norm=metrics.get(self._grad_norm_key), step=step)

    def update(self, value: Any = None, *, grad_norm: Any = None, step: int | None = None) -> Decision:
        """Take in what is known at a training step and decide on that. TypeError if one of the two is not one number.

        `step` counts from 1; without it, each call is the next step. Of one step, a second value or norm is not taken
        in, the answer is given again.
        """
        number = None if value is None else number_of(self.metric.key, value)
        norm = None if grad_norm is None else number_of(self._grad_norm_key, grad_norm)
        step = self._counted.step + 1 if step is None else step
        self._counted.step = step
        if number is not None and not is_sound(number):
            return Decision(Action.STOP, f"at step {step} {self.metric.key} is {number:g}")
        if step <= self._warmup_steps:
            return CONTINUE
        spikes = None if norm is None else self._check_gradient(norm, step)
        stall = None if number is None else self._check_value(number, step)
        reason = spikes or stall
        return CONTINUE if reason is None else Decision(Action.STOP, f"at step {step} {reason}")

    def _check_gradient(self, norm: float, step: int) -> str | None:
        counted = self._counted
        if step != counted.norm_step:
            is_spike = not is_sound(norm) or norm > self._grad_spike_threshold
            counted.norm_step, counted.num_spikes = step, counted.num_spikes + 1 if is_spike else 0
        if counted.num_spikes < self._grad_spike_patience:
            return None
        return (
            f"{self._grad_norm_key} is {norm:g}: {counted.num_spikes} in a row above {self._grad_spike_threshold:g} or not "
            f"finite (grad_spike_patience={self._grad_spike_patience})"
        )

    def _check_value(self, number: float, step: int) -> str | None:
        counted = self._counted
        if step != counted.value_step:
            counted.value_step = step
            if counted.best is None or self._is_improvement(number, counted.best):
                counted.best, counted.best_step, counted.num_stalled = number, step, 0
            else:
                counted.num_stalled += 1
        if counted.num_stalled < self._patience:
            return None
        return (
            f"{self.metric.key} is {number:g}: {counted.num_stalled} checks in a row not more than {self._min_delta} better "
            f"than the best, {counted.best:g} at step {counted.best_step} (patience={self._patience})"
        )

    def _is_improvement(self, number: float, best: float) -> bool:
        return self.metric.worsening(best, number) > self._min_delta.beside(best)

    def state_dict(self) -> dict[str, Any]:
        """Plain data; finite, whatever came in."""
        return {"metric": self.metric.key, "mode": self.metric.mode, **asdict(self._counted)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a saved state, with the arguments of this one.

        The state of another metric or mode means nothing here: it is left, with a warning, and this one starts fresh.
        LoadMismatch, and nothing changed, if it is no state of an `EarlyStopping`.
        """
        self._counted = (
            _Counted.from_state(state_dict) if is_of_metric(state_dict, self.metric, self.name) else _Counted()
        )


@dataclass
class _Counted:
    """What was seen so far, warm-up left out."""

    step: int = 0
    """Of the last call; where steps are not told, how many calls there were."""
    best: float | None = None
    best_step: int | None = None
    value_step: int | None = None
    """Of the last value, as `norm_step` of the last gradient norm: each is counted once a step."""
    num_stalled: int = 0
    """Checks in a row without improvement."""
    norm_step: int | None = None
    num_spikes: int = 0
    """Gradient spikes in a row."""

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        best, best_step = saved_number(state, "best"), saved_step(state, "best_step")
        if (best is None) != (best_step is None):
            raise LoadMismatch(f"the saved state has best={best!r} and best_step={best_step!r}: one of them is missing")
        return cls(
            step=saved_count(state, "step"),
            best=best,
            best_step=best_step,
            value_step=saved_step(state, "value_step"),
            num_stalled=saved_count(state, "num_stalled"),
            norm_step=saved_step(state, "norm_step"),
            num_spikes=saved_count(state, "num_spikes"),
        )
