"""`CheckpointManager`: when to save, what to keep, when to stop, around a `CheckpointCoordinator`."""

import logging
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from forgather_ckpt import annotations, attempts, catalog, choice, prompt, pruning, requests, space
from forgather_ckpt.changes import compare_arguments, refuse_risky, told
from forgather_ckpt.control import NOTHING, Pace, Wishes, merged, refuse_unlike
from forgather_ckpt.coordinator import CheckpointCoordinator
from forgather_ckpt.declarations import Source
from forgather_ckpt.deleter import Deleter
from forgather_ckpt.errors import CheckpointError, CheckpointNotFound, DeclarationError, RankTimeout, StorageError
from forgather_ckpt.load import LoadReport
from forgather_ckpt.manifest import CheckpointManifest
from forgather_ckpt.metrics import as_number
from forgather_ckpt.policies import Best, Policy, Stored, parts
from forgather_ckpt.resume import is_by_rank
from forgather_ckpt.retention import Protected, best_checkpoints_summary, countable, from_arguments
from forgather_ckpt.run_clock import RunClock, SaveCosts
from forgather_ckpt.signals import STOP_SIGNALS, SignalGuard, exit_code, signal_numbers
from forgather_ckpt.triggers import SaveSchedule

logger = logging.getLogger(__name__)

SAVES_PER_STORAGE_LINE = 10
_DELETING_SECONDS = 30.0


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
            self.coordinator.agree("comparing the managers", lambda: self._checked(settings), refuse_unlike)
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
        self._training_args = dict(training_args or {})
        self._strict_args = strict_args
        self._on_storage_error = on_storage_error
        self._max_load_attempts = max_load_attempts
        self._grace_seconds = grace_seconds
        self._pace = Pace(control_steps)
        self._clock = RunClock()
        self._pending = Wishes()
        self._is_on_trial = False
        """Rank 0: a checkpoint is being loaded, or was, and no step has been done since: if the job dies now, it may be
        because of that. An error, or the end of the training, is no death."""
        self._deleter = Deleter()
        self._costs = SaveCosts()
        self._told: set[str] = set()

    def __enter__(self) -> Self:
        self.guard.__enter__()
        try:
            self.coordinator.agree("taking the run directory", self._take_run_directory)
        except BaseException:
            self.close()
            raise
        return self

    def _checked(self, settings: Mapping[str, Any]) -> dict[str, Any]:
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
        signal_numbers(settings["stop_signals"], "stop_signals")
        return {"schedule": repr(self.schedule), **{name: repr(value) for name, value in settings.items()}}

    def _take_run_directory(self) -> None:
        if self.rank == 0 and self.schedule.saves:
            self.coordinator.take_lease()
            requests.discard_stale(self.run)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._is_on_trial and not self._is_of_a_death(error):
            self._end_trial()
        self.close()

    def _is_of_a_death(self, error: BaseException | None) -> bool:
        """Whether another rank died, and this one is left to tell. Torch's own exchanges fail without saying why."""
        if isinstance(error, RankTimeout):
            return True
        is_torchs = isinstance(error, RuntimeError) and not isinstance(error, CheckpointError)
        return is_torchs and bool(self.coordinator.ranks_that_died())

    def close(self) -> None:
        """Give the run directory and the signals back. A second call does nothing."""
        try:
            self._deleter.close(_DELETING_SECONDS)
            self.coordinator.close()
        finally:
            self.guard.__exit__(None, None, None)  # last: the launcher ends this rank when another one has ended

    # Resume

    def resume(self, which: bool | int | str | Path | None = "auto") -> int:
        """Load what is asked for; the step that training goes on from, 0 for a fresh start.

        `which`: "auto" (the newest good checkpoint, or a fresh start where there is none), True or "latest" (an error
        where there is none), "best", a step, a path, or False for a fresh start. None asks the person at the terminal,
        where there is something to resume from; without a terminal that is an error.
        """
        asked = str(which)
        answer = self.coordinator.agree("choosing how to start", lambda: {"resume": asked}, self._choose_start)
        if which is None:
            which = answer
        if which is False:
            self._tell_fresh_start()
            return 0
        if isinstance(which, str) and is_by_rank(which) and self._bests:
            which = self.coordinator.agree("choosing the best", lambda: None, lambda _: self._path_of_best(str(which)))
        is_newest = which is True or which in ("latest", "auto")
        avoid: Sequence[str] = self._exhausted() if is_newest else ()
        try:
            report = self._load(None if is_newest else which, avoid)
        except CheckpointNotFound as err:
            if avoid:
                raise  # there are checkpoints: a fresh start would go over them
            if which == "auto":
                return 0
            if is_newest:
                raise CheckpointNotFound(
                    f"{self.run} has no checkpoint to resume from; with "
                    'resume_from_checkpoint="auto" the run starts fresh where there is none',
                    path=str(self.run),
                ) from err
            raise
        self.resumed = report
        is_own = self.coordinator.agree(
            "comparing run directories", lambda: None, lambda _: report.path.parent.resolve() == self.run.resolve()
        )
        self.last_step, self.last_path = report.step if is_own else None, report.path
        self._clock.begin(report.elapsed_seconds or 0.0)
        self._pace.next_step = report.step
        return report.step

    def _choose_start(self, asked: Sequence[Mapping[str, str]]) -> prompt.Answer | None:
        """Rank 0: the person's answer, where nothing else says what to go on from."""
        refuse_unlike(asked)
        return self._ask() if asked[0]["resume"] == str(None) else None

    def _ask(self) -> prompt.Answer:
        """Rank 0: what the person who started the job wants to go on from."""
        found = pruning.survey(catalog.scan(self.run))
        if not found or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
            return "auto"  # which tells of damaged ones, or else starts fresh; torchrun's restarts go on with the job
        if not prompt.is_terminal():
            raise DeclarationError(prompt.without_terminal(self.run, found), path=str(self.run))
        best = next(iter(self._bests), None)
        return prompt.ask(self.run, found, best=best, while_waiting=self._while_waiting)

    def _tell_fresh_start(self) -> None:
        """Rank 0: what there is of an earlier run is not safe from this one."""
        found = pruning.survey(catalog.scan(self.run)) if self.rank == 0 and self.schedule.saves else []
        if found:
            logger.warning(
                "a fresh start in %s, which holds %d checkpoints, the newest of step %d: this run's policy counts them with "
                "its own and removes what it does not keep, and its saves replace those of the same step",
                self.run,
                len(found),
                found[0].step,
            )

    def _path_of_best(self, which: str) -> str:
        """Rank 0: of the best checkpoint, or the next best, by the policy of this job."""
        best, found = self._bests[0], catalog.scan(self.run)
        ranked = [one.path for one, _ in best.ranked(countable(pruning.survey(found)))]
        if not ranked:
            raise CheckpointNotFound(
                f"{self.run} has no best checkpoint: none has a finite {best.metric!r}; name another one, 'latest' or a "
                "step",
                path=str(self.run),
            )
        return str(choice.chosen_of(found, which, ranked=ranked)[0].path)

    def _while_waiting(self) -> None:
        """While the person takes their time: the other ranks hear that this one is alive, and Ctrl-C is obeyed."""
        self.coordinator.beat()
        if self.guard.received is not None:
            raise KeyboardInterrupt

    def _load(self, which: str | int | Path | None, avoid: Sequence[str]) -> LoadReport:
        return self.coordinator.load_checkpoint(which, avoid=avoid, inspect=None if self.rank else self._inspect)

    def _exhausted(self) -> list[str]:
        """The digests of the checkpoints on which the job has died too often."""

        def look(_: list[None]) -> list[str]:
            given_up = attempts.exhausted(self.run, self._max_load_attempts)
            return [
                one.manifest.digest for one in catalog.scan(self.run).checkpoints if one.manifest.digest in given_up
            ]

        found: list[str] = self.coordinator.agree("looking at earlier attempts", lambda: None, look)
        return found

    def _inspect(self, manifest: CheckpointManifest) -> None:
        """Rank 0: before a checkpoint touches anything."""
        if manifest.training_args and self._training_args:
            self._tell_changes(manifest)
        if self.schedule.saves:
            attempts.begin(self.run, manifest.digest)
            self._is_on_trial = True

    def _tell_changes(self, manifest: CheckpointManifest) -> None:
        found = compare_arguments(
            manifest.training_args,
            self._training_args,
            saved_world_size=manifest.world_size,
            world_size=self.coordinator.topology.world_size,
            step=manifest.step,
        )
        if self._strict_args:
            refuse_risky(found)
        if text := told(found):
            logger.warning("arguments that are not those of the checkpoint of step %d:\n%s", manifest.step, text)

    def _end_trial(self) -> None:
        if self._is_on_trial:
            self._is_on_trial = False
            attempts.succeeded(self.run, self._max_load_attempts)

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
        self.step_done()
        due = self.schedule.due(step, is_epoch_end=is_epoch_end)
        agreed = self.agree(step, Wishes(**wishes), must=due is not None)
        if kind := kind_to_save(due, agreed):
            self.save(step, epoch=epoch, metrics=metrics, kind=kind)
        return agreed.ends_training

    def finish(self, step: int, *, epoch: float | None = None, metrics: Mapping[str, Any] | None = None) -> None:
        """At the end of the training: its last checkpoint, unless it was aborted, by a wish of its last steps too."""
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
        self._end_trial()

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
        if self.last_step == step:
            return None
        started = time.monotonic()
        try:
            path = self.coordinator.save_checkpoint(
                step, epoch=epoch, metrics=metrics, kind=kind, elapsed_seconds=self._clock.elapsed_seconds
            )
        except StorageError as err:
            if self.rank == 0:
                self._prune()  # what an earlier policy has kept may be what there is no room for
            if self._on_storage_error == "error" or kind in ("final", "emergency") or self.ending.ends_training:
                raise
            if self.rank == 0:
                logger.error("step %d is not saved, training goes on: %s", step, err.message)
            return None
        self.last_step, self.last_path = step, path
        self.last_save_seconds = time.monotonic() - started
        self._costs.add(step, self.last_save_seconds, self._clock.elapsed_seconds)
        if self.rank == 0:
            logger.info("saved %s", path)
            try:
                self._tidy_up(path, kind)
            except Exception as err:  # the checkpoint is there, and training goes on
                logger.warning("after the save of %s: %s: %s", path.name, type(err).__name__, err)
        return path

    def _tidy_up(self, path: Path, kind: str) -> None:
        if self.ending.signal is not None:
            note = "; ".join(self.ending.reasons)
            annotations.annotate(path, lambda noted: replace(noted, notes=(*noted.notes, note)))
        pruned = self._prune()
        kept = [verdict.checkpoint for verdict in pruned.verdicts if verdict.keep]
        self._tell_best(path, kept)
        self._tell_space(pruned)
        if self.last_save_seconds is not None and self.last_save_seconds > self._grace_seconds:
            self._warn_once(
                "grace",
                f"a save took {self.last_save_seconds:.1f} s, longer than the {self._grace_seconds:g} s that remain after a "
                "signal (grace_seconds): an emergency checkpoint would be lost. Ask the launcher for more, as with torchrun "
                "--shutdown-timeout, terminationGracePeriodSeconds of Kubernetes, #SBATCH --signal; see docs/preemption.md",
            )

    def _prune(self) -> pruning.Pruned:
        """Rank 0: remove what the policy does not keep."""
        protected = Protected(resumed_from=None if self.resumed is None else self.resumed.digest)
        return pruning.prune(self.run, self.policy, protected, delete=self._deleter.delete)

    def _tell_best(self, path: Path, kept: Sequence[Stored]) -> None:
        for best in self._bests:
            ranked = best.ranked(countable(kept))[: best.n]
            for place, (one, value) in enumerate(ranked, start=1):
                if one.path == path:
                    what = "new best checkpoint" if place == 1 else f"best checkpoint {place} of {best.n}"
                    logger.info("%s: %s (%s=%.6g)", what, path, best.metric, value)

    def _tell_space(self, pruned: pruning.Pruned) -> None:
        storage = space.storage(self.run, pruned.left)
        if self._costs.num_saves % SAVES_PER_STORAGE_LINE == 0:
            logger.info("%s", space.line(storage))
            logger.info("%s", self._costs.advice())
        removed = (storage.largest_recent_bytes or 0) if pruned.removed else 0
        if shortage := space.shortage(storage, removed_per_save_bytes=removed):
            self._warn_once("space", shortage)
        else:
            self._told.discard("space")

    def _warn_once(self, about: str, text: str) -> None:
        if about not in self._told:
            self._told.add(about)
            logger.warning("%s", text)

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

    @property
    def _bests(self) -> list[Best]:
        return [one for one in parts(self.policy) if isinstance(one, Best)]

    def get_best_checkpoints_summary(self) -> str:
        """The best checkpoints with their values, a line each, the best first. Empty but on rank 0, and where the policy
        asks for none."""
        if self.rank != 0 or not self._bests:
            return ""
        found = pruning.survey(catalog.scan(self.run))
        return "\n".join(best_checkpoints_summary(best, found) for best in self._bests)


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
