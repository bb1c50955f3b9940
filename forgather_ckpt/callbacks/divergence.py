"""Divergence: a metric that has become lastingly worse is told from one that is noisy.

Two comparisons, of averages and never of single values:

- the short average with the long one: a jump. The long average follows, so a new level is forgiven in the end.
- the short average with the best short average so far: a drift, however slow, and a jump so soon after the start that
  the long average still remembers the beginning.

A value that is not finite needs no comparison: it is divergence at once, and enters no average.
"""

import logging
from collections.abc import Mapping
from typing import Any, Literal

from forgather_ckpt.callbacks.averages import Averages, ExponentialAverages, WindowAverages
from forgather_ckpt.callbacks.decision import CONTINUE, Action, Decision
from forgather_ckpt.callbacks.events import TrainerControl, TrainerState
from forgather_ckpt.callbacks.margin import Margin
from forgather_ckpt.callbacks.saved import is_of_metric, saved_item, saved_number, saved_step
from forgather_ckpt.callbacks.watched import WatchedMetric, is_sound, number_of
from forgather_ckpt.callbacks.watcher import Watcher
from forgather_ckpt.metrics import Mode

logger = logging.getLogger(__name__)


class _DivergenceDetector(Watcher):
    """A metric, the averages of its values, and what they are compared with."""

    def __init__(
        self,
        averages: Averages,
        threshold: float | str,
        action: Literal["stop", "abort"],
        use_eval_loss: bool,
        metric_key: str | None,
        mode: Mode | None,
        drift_threshold: float | str | None,
        name: str | None,
    ) -> None:
        if action not in ("stop", "abort"):
            raise ValueError(f'action={action!r}: write "stop" to end with a checkpoint, "abort" to end without one')
        if metric_key is None:
            metric_key = "eval_loss" if use_eval_loss else "loss"
        self.metric = WatchedMetric.of(metric_key, mode)
        self.name = name if name is not None else f"{type(self).__name__}.{metric_key}"
        """Under which its state is saved: it says what is watched, and nothing of the order of callbacks."""
        self._averages = averages
        self._threshold = Margin.parse("threshold", threshold)
        self._drift_threshold = self._drift(drift_threshold)
        self._action = Action(action)
        self._best: float | None = None
        """The best short average so far."""
        self._step: int | None = None
        """The step of the last value."""

    def _drift(self, drift_threshold: float | str | None) -> Margin | None:
        match drift_threshold:
            case None:
                return None
            case "same":
                return self._threshold
            case other:
                return Margin.parse("drift_threshold", other)

    def on_log(
        self, args: Any, state: TrainerState, control: TrainerControl, *, logs: Mapping[str, Any], **kwargs: Any
    ) -> None:
        self.look_for_metric(logs, state, is_evaluation=False)
        self.follow(self.observe(logs, state.global_step), control)

    def on_evaluate(
        self, args: Any, state: TrainerState, control: TrainerControl, *, metrics: Mapping[str, Any], **kwargs: Any
    ) -> None:
        self.look_for_metric(metrics, state, is_evaluation=True)
        self.follow(self.observe(metrics, state.global_step), control)

    def give_another_chance(self) -> None:
        """Averages that would end the run begin anew; the best that the metric was stays.

        Where the metric is as bad as it was, the run ends again as soon as there is an average of new values.
        """
        if self._decide().ends_training:
            self._averages.clear()

    def observe(self, metrics: Mapping[str, Any], step: int) -> Decision:
        """Be told the metrics of an event, an evaluation or a log; those without the watched one change nothing.

        Several events of one step may bring the same metric: it is counted once.
        """
        value = self.metric.value_in(metrics)
        return CONTINUE if value is None else self.update(value, step=step)

    def update(self, value: Any, *, step: int | None = None) -> Decision:
        """Take in the next value of the metric and decide. TypeError if it is not one number.

        A second value of the same `step` is not taken in, the answer is given again; without `step` every value is
        taken in.
        """
        number = number_of(self.metric.key, value)
        if not is_sound(number):
            return self._end(f"{self.metric.key} is {number:g}", step)
        if step is None or step != self._step:
            self._averages.add(number)
            self._step = step
            levels = self._averages.levels
            if levels is not None:
                self._best = levels.short if self._best is None else self.metric.better_of(levels.short, self._best)
        return self._decide()

    def _decide(self) -> Decision:
        levels = self._averages.levels
        if levels is None:
            return CONTINUE
        references = [("threshold", self._threshold, "its long average", levels.long)]
        if self._drift_threshold is not None and self._best is not None:
            references.append(("drift_threshold", self._drift_threshold, "the best that it was", self._best))
        for argument, margin, what, reference in references:
            worsening = self.metric.worsening(levels.short, reference)
            if worsening > 0 and worsening >= margin.beside(reference):
                settings = ", ".join(f"{name}={value:g}" for name, value in self._averages.settings.items())
                return self._end(
                    f"the short average of {self.metric.key} is {levels.short:g}, {worsening:g} {self.metric.worse_word} "
                    f"{what}, {reference:g} ({argument}={margin}, {settings})",
                    self._step,
                )
        return CONTINUE

    def _end(self, reason: str, step: int | None) -> Decision:
        return Decision(self._action, reason if step is None else f"at step {step} {reason}")

    def state_dict(self) -> dict[str, Any]:
        """Plain data; finite, whatever came in."""
        return {
            "metric": self.metric.key,
            "mode": self.metric.mode,
            "settings": dict(self._averages.settings),
            "averages": self._averages.state_dict(),
            "best": self._best,
            "step": self._step,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a saved state; the arguments are those of this detector, where they are others now.

        The state of another metric or mode means nothing here: it is left, with a warning, and the detector starts
        fresh. LoadMismatch, and nothing changed, if it is no state of such a detector.
        """
        if not is_of_metric(state_dict, self.metric, self.name):
            self._averages.clear()
            self._best = self._step = None
            return
        best, step = saved_number(state_dict, "best"), saved_step(state_dict, "step")
        settings = saved_item(state_dict, "settings")
        self._averages.load_state_dict(saved_item(state_dict, "averages"))
        self._best, self._step = best, step
        if settings != self._averages.settings:
            logger.warning("%s was saved with %s and goes on with %s", self.name, settings, self._averages.settings)


class DualTimeScaleDivergenceDetector(_DivergenceDetector):
    """Divergence by two exponential averages; it answers from the second value on.

    >>> detector = DualTimeScaleDivergenceDetector(threshold="50%")
    >>> detector.update(2.8).ends_training
    False
    >>> detector.update(float("nan")).reason
    'eval_loss is nan'

    `threshold`, `drift_threshold`: how much worse the short average must be than the long one, and than the best that
    it was: an amount, or a share of the reference such as "50%". `drift_threshold` is "same", as `threshold`, or None:
    no such comparison. `metric_key`: what is watched instead of `eval_loss`, or with use_eval_loss=False of `loss`.
    `mode`: "min" or "max" is best; the name of the metric decides where it tells. `name`: for the saved state, where
    there are two detectors of one metric.
    """

    def __init__(
        self,
        short_alpha: float = 0.1,
        long_alpha: float = 0.01,
        threshold: float | str = 2.0,
        action: Literal["stop", "abort"] = "stop",
        use_eval_loss: bool = True,
        metric_key: str | None = None,
        *,
        mode: Mode | None = None,
        drift_threshold: float | str | None = "same",
        name: str | None = None,
    ) -> None:
        averages = ExponentialAverages(short_alpha, long_alpha)
        super().__init__(averages, threshold, action, use_eval_loss, metric_key, mode, drift_threshold, name)


class DualWindowDivergenceDetector(_DivergenceDetector):
    """Divergence by the means of two windows; it answers when the short one is full, and forgets at a sharp edge.

    Arguments are those of `DualTimeScaleDivergenceDetector`, with numbers of values instead of alphas.
    """

    def __init__(
        self,
        short_window: int = 10,
        long_window: int = 100,
        threshold: float | str = 2.0,
        action: Literal["stop", "abort"] = "stop",
        use_eval_loss: bool = True,
        metric_key: str | None = None,
        *,
        mode: Mode | None = None,
        drift_threshold: float | str | None = "same",
        name: str | None = None,
    ) -> None:
        averages = WindowAverages(short_window, long_window)
        super().__init__(averages, threshold, action, use_eval_loss, metric_key, mode, drift_threshold, name)
