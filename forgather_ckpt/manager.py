"""`CheckpointManager`: when to save, what to keep, when to stop, around a `CheckpointCoordinator`."""

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from forgather_ckpt import annotations, catalog, choice, pruning, requests
from forgather_ckpt.control import NOTHING, Pace, Wishes, merged, refuse_unlike
from forgather_ckpt.coordinator import CheckpointCoordinator
from forgather_ckpt.declarations import Source
from forgather_ckpt.errors import DeclarationError, StorageError
from forgather_ckpt.housekeeping import Housekeeping
from forgather_ckpt.load import LoadReport
from forgather_ckpt.metrics import as_number, rankable
from forgather_ckpt.policies import Policy, bests
from forgather_ckpt.retention import Protected, best_checkpoints_summary, from_arguments
from forgather_ckpt.run_clock import RunClock
from forgather_ckpt.signals import STOP_SIGNALS, SignalGuard, exit_code, signal_numbers
from forgather_ckpt.start import Start
from forgather_ckpt.triggers import SaveSchedule

logger = logging.getLogger(__name__)


class CheckpointManager:
    """Runs the checkpoints of a training. Every rank makes one and calls the same methods at the same steps.

    >>> with CheckpointManager(components, "runs/a", schedule=SaveSchedule(steps=500), policy=Latest(3)) as manager:
    ...     step = manager.resume("auto")
    ...     while step < 10_000:
    ...         loss = train_step()
    ...         step += 1
    ...         if manager.after_step(step, metrics={"loss": loss}):
    ...             break
    ...     manager.finish(step)
    >>> sys.exit(manager.exit_code)

    What it adds to its `coordinator`:

    - saves when the `schedule` says so, when a signal comes, or when somebody asks (`fgckpt save RUN`);
    - removes after each commit what the `policy` does not keep, in the background; what fails is logged;
    - lets the ranks agree: what one wishes, all do at the same step. They look at each other's wishes every
      `control_steps` steps, or with None about once a second (`control.Pace`), and wherever a save is due;
    - after one of the `stop_signals`, saves an emergency checkpoint and ends the training; `exit_code` says so;
    - notices a checkpoint on which the job dies each time while it loads it, and after `max_load_attempts` tries takes
      the one before it;
    - where the file system fails, as on a full disk, goes on without that checkpoint, and tries again when the next one is
      due; with `on_storage_error="error"`, and for the last checkpoint, the failure is raised;
    - tells which `training_args` are not those of the checkpoint, and with `strict_args=True` refuses risky ones;
    - warns when a save takes longer than `grace_seconds`, the time between a signal and the kill.

    Further keywords are those of `CheckpointCoordinator`.
    """

    def __init__(
        self,
        source: Source,
        output_dir: str | Path,
        *,
        schedule: SaveSchedule | None = None,
        policy: Policy | None = None,
        stop_signals: Sequence[str] = STOP_SIGNALS,
        control_steps: int | None = None,
        grace_seconds: float = 30.0,
        max_load_attempts: int = 3,
        on_storage_error: Literal["warn", "error"] = "warn",
        strict_args: bool = False,
        training_args: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        self.schedule = SaveSchedule(steps=500) if schedule is None else schedule
        self.policy = from_arguments() if policy is None else policy
        self.coordinator = CheckpointCoordinator(source, output_dir, training_args=training_args, **options)
        settings = {
            "stop_signals": stop_signals,
            "control_steps": control_steps,
            "max_load_attempts": max_load_attempts,
            "on_storage_error": on_storage_error,
        }
        try:  # a rank with a wrong one tells the others
            self.coordinator.agree("comparing the managers", lambda: self._checked(settings, grace_seconds), refuse_unlike)
        except BaseException:
            self.coordinator.close()
            raise
        self.guard = SignalGuard(stop=stop_signals)
        self.rank = self.coordinator.topology.rank
        self.run = self.coordinator.run_directory
        self.resumed: LoadReport | None = None
        """What this process went on from."""
        self.last_step: int | None = None
        """Of the checkpoint that was saved or loaded last; `last_path` is where it is."""
        self.last_path: Path | None = None
        self.last_save_seconds: float | None = None
        """How long training stood still for it."""
        self.ending = Wishes()
        """What ends the training, once that has been agreed."""
        self._on_storage_error = on_storage_error
        self._start = Start(
            self.coordinator,
            self.policy,
            saves=self.schedule.saves,
            max_load_attempts=max_load_attempts,
            training_args=dict(training_args or {}),
            strict_args=strict_args,
            is_interrupted=lambda: self.guard.received is not None,
        )
        self._housekeeping = Housekeeping(self.run, self.policy, grace_seconds=grace_seconds)
        self._pace = Pace(control_steps)
        self._clock = RunClock()
        self._pending = Wishes()

    def __enter__(self) -> Self:
        self.guard.__enter__()
        try:
            self.coordinator.agree("taking the run directory", self._take_run_directory)
        except BaseException:
            self.close()
            raise
        return self

    def _checked(self, settings: Mapping[str, Any], grace_seconds: float) -> dict[str, Any]:
        """What must be the same on all ranks, or they would not come to the same exchanges; `DeclarationError` where it
        makes no sense on this one."""
        if not isinstance(self.schedule, SaveSchedule):
            raise DeclarationError(f"schedule is {self.schedule!r}; use SaveSchedule(steps=500), for example")
        if not isinstance(self.policy, Policy):
            raise DeclarationError(
                f'policy is {self.policy!r}; use policies joined by |: Latest(3) | Best(1, "eval_loss")'
            )
        if settings["on_storage_error"] not in ("warn", "error"):
            raise DeclarationError(f'on_storage_error is {settings["on_storage_error"]!r}; use "warn" or "error"')
        for name in ("control_steps", "max_load_attempts"):
            value = settings[name]
            if not (type(value) is int and value > 0) and (name, value) != ("control_steps", None):
                raise DeclarationError(f"{name} is {value!r}; use a whole number, from 1")
        if (rankable(grace_seconds) or 0) <= 0:
            raise DeclarationError(f"grace_seconds is {grace_seconds!r}; use a number of seconds, above 0")
        signal_numbers(settings["stop_signals"], "stop_signals")
        return {"schedule": repr(self.schedule), **{name: repr(value) for name, value in settings.items()}}

    def _take_run_directory(self) -> None:
        if self.rank == 0 and self.schedule.saves:
            self.coordinator.take_lease()
            requests.discard_stale(self.run)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._start.end(error)
        self.close(error)

    def close(self, error: BaseException | None = None) -> None:
        """Give the run directory and the signals back; `error` is why, for the other ranks. A second call does nothing."""
        try:
            self._housekeeping.close()
            self.coordinator.close(error)
        finally:
            self.guard.__exit__(None, None, None)  # last: the launcher ends this rank when another one has ended

    # Resume

    def resume(self, which: bool | int | str | Path | None = "auto") -> int:
        """Load what is asked for; the step that training goes on from, 0 for a fresh start.

        `which`: "auto" (the newest good checkpoint, or a fresh start where there is none), True or "latest" (an error
        where there is none), "best", a step, a path, or False for a fresh start. None asks the person at the terminal,
        where there is something to resume from; without a terminal that is an error.
        """
        report = self._start.load(which)
        if report is None:
            return 0
        self.resumed = report
        self._housekeeping.protected = Protected(resumed_from=report.digest)
        is_own = self.coordinator.agree(
            "comparing run directories", lambda: None, lambda _: report.path.parent.resolve() == self.run.resolve()
        )
        self.last_step, self.last_path = report.step if is_own else None, report.path
        self._clock.begin(report.elapsed_seconds or 0.0)
        self._pace.next_step = report.step
        return report.step

    # The run

    def after_step(
        self,
        step: int,
        *,
        epoch: float | None = None,
        metrics: Mapping[str, Any] | None = None,
        is_epoch_end: bool = False,
        **wishes: Any,
    ) -> bool:
        """After an optimizer step: save if that is due; whether the training ends here, for all ranks alike.

        `wishes` are those of this rank (`control.Wishes`): `save=True`, `stop=True`, `abort=True`, `reasons=("why",)`.
        """
        step = as_number(step)
        self.step_done()
        due = self.schedule.due(step, is_epoch_end=is_epoch_end)
        agreed = self.agree(step, Wishes(**wishes), must=due is not None)
        if kind := kind_to_save(due, agreed):
            self.save(step, epoch=epoch, metrics=metrics, kind=kind)
        return agreed.ends_training

    def finish(self, step: int, *, epoch: float | None = None, metrics: Mapping[str, Any] | None = None) -> None:
        """At the end of the training: its last checkpoint, unless it was aborted, by a wish of its last steps too."""
        step = as_number(step)
        if self.saves_at_end(self.agree(step, must=True)):
            self.save(step, epoch=epoch, metrics=metrics, kind=self.kind_of_last)

    def saves_at_end(self, agreed: Wishes) -> bool:
        """Whether the training ends with a checkpoint, of what the ranks have agreed on after its last step."""
        is_wanted = self.schedule.at_end or agreed.save or self.ending.signal is not None
        return is_wanted and not self.ending.abort

    @property
    def kind_of_last(self) -> str:
        """The kind of the checkpoint with which the training ends."""
        return "final" if self.ending.signal is None else "emergency"

    @property
    def exit_code(self) -> int:
        """For the process: 0, or 128 and the number of the signal that ended the training."""
        return 0 if self.ending.signal is None else exit_code(self.ending.signal)

    def agree(self, step: int, wishes: Wishes = NOTHING, *, must: bool = False) -> Wishes:
        """What the job wants at this step: what any rank wished since the ranks looked at each other's wishes last.

        The same on all ranks; nothing at a step at which they do not look. `must`: they do at this one.
        """
        self._pending |= wishes
        if not must and not self._pace.is_due(step):
            return Wishes()
        own = self._take_wishes()
        found = self.coordinator.agree(f"step {step}", own.to_json, lambda columns: self._decide(step, columns))
        self._pace.next_step = found.pop("next_step")
        agreed = Wishes.from_json(found)
        if agreed.ends_training:
            self.ending |= agreed
            if self.rank == 0:
                logger.warning(
                    "training ends at step %d: %s", step, "; ".join(agreed.reasons) or "a callback asked for it"
                )
        return agreed

    def postpone(self, agreed: Wishes) -> None:
        """Wish at the next look once more for what could not be done at this one."""
        self._pending |= Wishes(save=agreed.save, log=agreed.log, end_epoch=agreed.end_epoch)

    def _take_wishes(self) -> Wishes:
        own, self._pending = self._pending, Wishes()
        if (received := self.guard.received) is not None and self.ending.signal is None:
            own |= Wishes(signal=received.number, reasons=(f"{received.name} received",))
        return own

    def _decide(self, step: int, columns: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Rank 0: what the ranks wish, what was asked from outside, and what the clock says."""
        wanted = merged([Wishes.from_json(column) for column in columns])
        if self.schedule.saves:
            for request in requests.take(self.run):
                wanted |= _wish(request)
        before, now = self._clock.look()
        if self.schedule.is_due_by_clock(before, now):
            wanted |= Wishes(save=True)
        return {**wanted.to_json(), "next_step": self._pace.after(step, self._clock.seconds_per_step(step))}

    def step_done(self) -> None:
        """A step has been done since the load: it does not kill the job."""
        self._start.end_trial()

    # Saving

    def save(
        self,
        step: int,
        *,
        epoch: float | None = None,
        metrics: Mapping[str, Any] | None = None,
        kind: str = "periodic",
    ) -> Path | None:
        """Save, unless this step is saved already, then remove what the policy does not keep. The path, or None."""
        step = as_number(step)
        if self.last_step == step:
            return None
        started = time.monotonic()
        try:
            path = self.coordinator.save_checkpoint(
                step, epoch=epoch, metrics=metrics, kind=kind, elapsed_seconds=self._clock.elapsed_seconds
            )
        except StorageError as err:
            if self.rank == 0:
                self._housekeeping.prune()  # what an earlier policy has kept may be what there is no room for
            if self._on_storage_error == "error" or kind in ("final", "emergency") or self.ending.ends_training:
                raise
            if self.rank == 0:
                logger.error("step %d is not saved, training goes on: %s", step, err.message)
            return None
        self.last_step, self.last_path = step, path
        self.last_save_seconds = time.monotonic() - started
        if self.rank == 0:
            self._housekeeping.after_save(
                path,
                step=step,
                seconds=self.last_save_seconds,
                elapsed_seconds=self._clock.elapsed_seconds,
                note=None if self.ending.signal is None else "; ".join(self.ending.reasons),
            )
        return path

    def note_metrics(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Metrics of a step that is saved already: they count for the best from the next save on. Rank 0's are taken."""
        if self.rank != 0:
            return
        try:
            numbers = {name: as_number(value) for name, value in metrics.items()}
            checkpoint = choice.candidates(self.run, step)[0]
            annotations.annotate(checkpoint.path, lambda noted: replace(noted, metrics={**noted.metrics, **numbers}))
        except Exception as err:
            logger.warning("the metrics of step %d were not noted: %s: %s", step, type(err).__name__, err)

    def get_best_checkpoints_summary(self) -> str:
        """The best checkpoints with their values, a line each, the best first. Empty but on rank 0, and where the policy
        asks for none."""
        if self.rank != 0 or not (wanted := bests(self.policy)):
            return ""
        found = pruning.survey(catalog.scan(self.run))
        return "\n".join(best_checkpoints_summary(best, found) for best in wanted)


def kind_to_save(due: str | None, agreed: Wishes) -> str | None:
    """The kind of the checkpoint to save after a step, None for none: of the one that is due by the schedule and what the
    ranks have agreed on."""
    if agreed.abort:
        return None
    if agreed.signal is not None and due != "epoch":
        return "emergency"
    return due or ("periodic" if agreed.save else None)


def _wish(request: requests.Request) -> Wishes:
    """What a request from outside asks for."""
    reasons = (f"{request.kind} asked for by {request.by}" + (f": {request.reason}" if request.reason else ""),)
    match request.kind:
        case "save":
            return Wishes(save=True)
        case "stop":
            return Wishes(stop=True, reasons=reasons)
        case "abort":
            return Wishes(abort=True, reasons=reasons)
