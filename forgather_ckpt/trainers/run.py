"""One life of a training: from a load, or a fresh start, to its last checkpoint."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from forgather_ckpt.control import Wishes, refuse_unlike
from forgather_ckpt.data.loader import in_groups
from forgather_ckpt.data.seeding import mixed_seed, seed_all
from forgather_ckpt.differences import mismatch_error
from forgather_ckpt.load import LoadReport
from forgather_ckpt.manager import CheckpointManager, kind_to_save
from forgather_ckpt.trainers.progress import TrainResult
from forgather_ckpt.trainers.schedule import is_multiple

if TYPE_CHECKING:
    from forgather_ckpt.trainers.trainer import Trainer

logger = logging.getLogger(__name__)


class Run:
    """The loop over epochs and steps, and what is due between them.

    The trainer says what a step and an evaluation are, the manager when a checkpoint is due and what the ranks have
    agreed to do; in which order it is done is said here, once for all trainers.
    """

    def __init__(self, trainer: "Trainer", manager: CheckpointManager) -> None:
        self.trainer, self.manager = trainer, manager
        self.args = trainer.args

    def train(self) -> TrainResult:
        """From what `resume_from_checkpoint` asks for to the end."""
        trainer, manager = self.trainer, self.manager
        manager.coordinator.agree("comparing the ranks", trainer.common_facts, refuse_unlike)
        manager.coordinator.agree("looking at the evaluation data", trainer.refuse_unusable_evaluation)
        resumed_from = self.resume()
        with self._told_to_callbacks():
            self.go()
        self._tell_end()
        return TrainResult(
            steps=trainer.progress.step,
            loss=trainer.progress.last_loss.item() if trainer.progress.step else None,
            resumed_from=resumed_from,
            stop_reason="; ".join(manager.ending.reasons) or None,
            exit_code=manager.exit_code,
        )

    # The beginning

    def resume(self) -> Path | None:
        """Load what `resume_from_checkpoint` asks for; the path that was loaded, None for a fresh start.

        All that draws numbers at the start has been made by now: the generators are loaded last.
        """
        trainer = self.trainer
        self.manager.resume(self.args.resume_from_checkpoint)
        report = self.manager.resumed
        if report is None:
            return None
        self._resume_random_streams(report)
        trainer.total_steps = trainer.count_total_steps()
        trainer.state.resumed_from = report.path
        trainer.after_load()
        if trainer.rank == 0:
            logger.info("resumed from %s at step %d", report.path, self.step)
        return report.path

    def _resume_random_streams(self, report: LoadReport) -> None:
        """Begin new streams, not those that the run began with, where the checkpoint's are not for these ranks: in another
        world size, or where other ranks than before are to draw alike, as along tensor parallelism."""
        trainer = self.trainer
        saved, own = trainer.generators.loaded_stream, trainer.random_stream
        if "rng" in report.loaded and self.manager.coordinator.agree(
            "comparing random streams", lambda: saved not in (None, own), any
        ):
            reason = "starts fresh: other ranks drew alike where it was saved"
            report = self.manager.resumed = report.without("rng", reason)
            if trainer.rank == 0:
                logger.warning("component 'rng' was not loaded: %s", reason)
        if "rng" in report.skipped:
            seed_all(mixed_seed(self.args.seed, own, self.step))

    # The loop

    def go(self) -> None:
        """Until the training is finished, or the ranks have agreed to end it."""
        self.trainer.wrapped.train()
        self.begin()
        while not self.is_over:
            self.run_epoch()
        agreed = self.agree(must=True)  # of the last steps
        if agreed.evaluate and self.trainer.can_evaluate and not agreed.abort:
            agreed |= self.evaluate()
        if self.manager.saves_at_end(agreed):
            self.save(self.manager.kind_of_last)

    def begin(self) -> None:
        """Before the first step: what was wished at the start and in the load, and the evaluation that a signal has
        kept from the steps before. There is nothing to save yet: that is done after the first step."""
        trainer, manager = self.trainer, self.manager
        agreed = self.agree(must=True)
        is_owed = False
        if manager.resumed is not None and trainer.progress.evaluated_step is not None:
            ends_epoch = trainer.loader.position.samples == 0
            is_save_due = manager.schedule.due(self.step, is_epoch_end=ends_epoch) is not None
            is_owed = self.is_evaluation_due(ends_epoch=ends_epoch, is_save_due=is_save_due)
        if trainer.can_evaluate and (is_owed or agreed.evaluate) and not agreed.ends_training:
            agreed |= self.evaluate()
        manager.postpone(agreed)

    def run_epoch(self) -> None:
        """The rest of an epoch, or as much of it as the ranks agree to do."""
        trainer = self.trainer
        self.tell("on_epoch_begin")
        groups = in_groups(trainer.loader, trainer.batches_per_step)
        for batches in groups:
            self.tell("on_step_begin")
            trainer.step(batches)
            self.manager.step_done()
            if is_last := len(trainer.loader) == 0:
                next(groups, None)  # the loader moves on to the next epoch
            if self.after_step(ends_epoch=is_last) or self.is_over:
                return
        self.after_step(ends_epoch=True)  # a resume, on more ranks perhaps, has left no step of the epoch

    def after_step(self, *, ends_epoch: bool) -> bool:
        """What is due after a step, which may be the last of its epoch: let the ranks agree, evaluate, log, save, in this
        order, so that a resume from the checkpoint has nothing to make up for. Whether the epoch ends here, by the ranks'
        will too."""
        args, schedule, step = self.args, self.manager.schedule, self.step
        is_log_due = is_multiple(step, args.logging_steps)
        is_due = is_log_due or self.is_evaluation_due() or schedule.is_due(step)
        agreed = self.agree(must=is_due)
        if ends_epoch or agreed.end_epoch:
            agreed |= self.end_epoch(is_early=not ends_epoch)
            ends_epoch = True
        due = schedule.due(step, is_epoch_end=ends_epoch)
        if args.validate_replication_steps and is_multiple(step, args.validate_replication_steps):
            self.validate_replication()
        if self.trainer.can_evaluate and not agreed.abort and agreed.signal is None:  # after a signal time is short
            is_save_due = due is not None or agreed.save
            if agreed.evaluate or self.is_evaluation_due(ends_epoch=ends_epoch, is_save_due=is_save_due):
                agreed |= self.evaluate()
        if agreed.end_epoch and not ends_epoch:  # asked for in the evaluation
            agreed |= self.end_epoch(is_early=True)
            ends_epoch = True
            due = schedule.due(step, is_epoch_end=True)
        if agreed.log and not is_log_due:
            self.trainer.log()
        if kind := kind_to_save(due, agreed):
            self.save(kind)
        return ends_epoch

    def end_epoch(self, *, is_early: bool) -> Wishes:
        """Count the epoch, whose rest is left out if it ends early, and tell the callbacks; what the ranks then agree on."""
        trainer = self.trainer
        if is_early:
            trainer.loader.end_epoch()
        trainer.progress.epoch += 1
        if is_early:
            trainer.total_steps = trainer.count_total_steps()  # as a resume from here finds it
        self.tell("on_epoch_end")
        return self.agree(must=True)

    @property
    def step(self) -> int:
        return self.trainer.progress.step

    @property
    def is_over(self) -> bool:
        return self.trainer.is_finished() or self.manager.ending.ends_training

    def agree(self, *, must: bool) -> Wishes:
        """What the ranks do at this step, of what callbacks have asked for on any of them (`CheckpointManager.agree`)."""
        return self.manager.agree(self.step, self.trainer.events.take_wishes(), must=must)

    # What is due between steps

    def is_evaluation_due(self, *, ends_epoch: bool = False, is_save_due: bool = False) -> bool:
        """By the arguments, after the last step, of which there is none yet."""
        args, step = self.args, self.step
        is_due = {"steps": is_multiple(step, args.eval_steps), "epoch": ends_epoch, "no": False}[args.eval_strategy]
        is_judged = args.eval_on_save and is_save_due
        is_new = step not in (0, self.trainer.progress.evaluated_step)
        return self.trainer.can_evaluate and is_new and (is_due or is_judged)

    def evaluate(self) -> Wishes:
        """Evaluate, tell the callbacks, and let the ranks agree on what these ask for."""
        trainer, manager, step = self.trainer, self.manager, self.step
        if not trainer.has_evaluation_data:
            manager.coordinator.agree("loading the evaluation data", trainer.load_evaluation_data, refuse_unlike)
        metrics = trainer.evaluate()
        trainer.evaluated = step, dict(metrics)  # of a subclass's own evaluate too
        trainer.progress.evaluated_step = step
        if manager.last_step == step:
            manager.note_metrics(step, metrics)
        if trainer.rank == 0:
            logger.info("step %d: %s", step, ", ".join(f"{name} {value:.6g}" for name, value in metrics.items()))
        self.tell("on_evaluate", metrics=metrics)
        return self.agree(must=True)

    def validate_replication(self) -> None:
        """Compare the ranks' copies of what they share; what differs ends the training, or is told."""
        self.trainer.settle_copies()
        reports = self.manager.coordinator.validate_replication(self.args.validate_replication_level, step=self.step)
        if all(report.is_equal for report in reports.values()):
            return
        error = mismatch_error(reports.values())
        if self.args.on_replica_mismatch == "error":
            raise error
        logger.warning("at step %d: %s", self.step, error.message)

    def save(self, kind: str) -> None:
        """Save, unless this step is saved already, or the evaluation before it aborts the training."""
        trainer, manager, step = self.trainer, self.manager, self.step
        if step == 0 or manager.last_step == step:
            return
        trainer.settle_copies()
        if self.args.eval_on_save and trainer.can_evaluate and manager.ending.signal is None:
            if trainer.evaluated[0] != step:
                self.evaluate()
            if manager.ending.abort:
                return
            if kind == "final":  # a signal may have come in the evaluation
                kind = manager.kind_of_last
        path = manager.save(
            step,
            epoch=trainer.epochs_done,
            metrics={
                "loss": trainer.progress.last_loss.item(),
                **(trainer.evaluated[1] if trainer.evaluated[0] == step else {}),
            },
            kind=kind,
        )
        if path is not None:
            self.tell("on_save", path=path, kind=kind)

    # Telling

    def tell(self, event: str, **facts: Any) -> None:
        """Call an event of all callbacks, with what has been saved."""
        state, manager = self.trainer.state, self.manager
        state.last_checkpoint, state.last_checkpoint_step = manager.last_path, manager.last_step
        state.last_save_seconds = manager.last_save_seconds
        self.trainer.tell(event, **facts)

    @contextmanager
    def _told_to_callbacks(self) -> Iterator[None]:
        """Around the loop: the callbacks hear of its beginning, and of its end however it ends."""
        self.tell("on_train_begin")
        error: BaseException | None = None
        try:
            yield
        except BaseException as err:
            error = err
            raise
        finally:
            self.tell("on_train_end", error=error)
            self.trainer.events.tell_failures()

    def _tell_end(self) -> None:
        if self.trainer.rank != 0:
            return
        ending = self.manager.ending
        lines = ["Training complete!" if not ending.ends_training else f"Training ended: {'; '.join(ending.reasons)}"]
        lines += filter(None, [self.manager.get_best_checkpoints_summary()])
        rule = "=" * 60
        logger.info("%s", "\n".join([rule, *lines, rule]))
