"""A training loop for one process: what it declares is saved, and a resume is exact to the bit."""

import inspect
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from torch.amp import GradScaler
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

from forgather_ckpt.component import StateComponent
from forgather_ckpt.coordinator import CheckpointCoordinator
from forgather_ckpt.data.batches import Batch, Samples, map_leaves
from forgather_ckpt.data.loader import StatefulLoader, in_groups
from forgather_ckpt.data.position import merge_positions
from forgather_ckpt.data.seeding import mixed_seed, seed_all
from forgather_ckpt.differences import mismatch_error
from forgather_ckpt.errors import CheckpointNotFound
from forgather_ckpt.optimizer import NamedOptimizer
from forgather_ckpt.patterns import SharingPattern, ValidationLevel
from forgather_ckpt.rng import RNGState
from forgather_ckpt.trainers.arguments import TrainingArguments
from forgather_ckpt.trainers.callbacks import CallbackStates, taken_over
from forgather_ckpt.trainers.progress import Progress, TrainResult
from forgather_ckpt.trainers.schedule import is_multiple, lr_factor

logger = logging.getLogger(__name__)


class Trainer:
    """Trains a model in one process.

        Trainer(model, TrainingArguments(output_dir="runs/a", save_steps=100), train_dataset).train()

    Give `optimizer`, `lr_scheduler` or `compute_loss(model, batch)`, or override `create_optimizer`,
    `create_scheduler`, `compute_loss`, `training_step`. The `on_step_end` functions are called with the trainer
    after each optimizer step, before the save that may be due; what they raise ends the training. One that has
    `state_dict` and `load_state_dict` is saved, as rank 0 has it, under its `name` or else that of its class.
    """

    shared: ClassVar[SharingPattern] = SharingPattern.GLOBAL
    """How state is shared of which the job has one: model, optimizer, schedule, progress."""
    model_validation: ClassVar[ValidationLevel] = ValidationLevel.NONE

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        train_dataset: Samples | None,
        *,
        optimizer: torch.optim.Optimizer | None = None,
        lr_scheduler: LRScheduler | None = None,
        compute_loss: Callable[[nn.Module, Batch], torch.Tensor] | None = None,
        data_collator: Callable[[list[Any]], Batch] | None = None,
        on_step_end: Sequence[Callable[["Trainer"], None]] = (),
    ) -> None:
        if lr_scheduler is not None and optimizer is None:
            raise ValueError("lr_scheduler= was made for an optimizer: give that one too, as optimizer=")
        refuse_missing_device(args.device)
        self.args = args
        self.data_collator = data_collator
        self.on_step_end = tuple(on_step_end)
        self.callbacks = CallbackStates(self.on_step_end)
        self._given_loss = compute_loss
        self.device, self.rank, self.world_size = self.join_job()
        self.model = self.take_model(model)
        """The module itself: its names are the names in the checkpoint."""
        self.wrapped = self.wrap_model(model)
        """What is called: the model as it was given (perhaps compiled), in whatever a subclass puts around it."""
        self.loader = self.create_loader(train_dataset)
        if self.loader.batches_per_epoch == 0:
            raise ValueError(
                f"{self.loader.position.num_samples} samples do not fill one batch of "
                f"{args.per_device_train_batch_size} on each of {self.loader.world_size} ranks"
            )
        self.progress = Progress()
        self.total_steps = self.count_total_steps()
        self.optimizer = optimizer or self.create_optimizer()
        self.lr_scheduler = lr_scheduler or self.create_scheduler(self.optimizer)
        if type(self).apply_gradients is Trainer.apply_gradients and type(self).training_step is Trainer.training_step:
            refuse_unusable(self.optimizer, self.lr_scheduler)
        self.scaler = self.create_scaler()
        self.history: list[tuple[int, float]] = []
        """(step, mean loss since the entry before) every `logging_steps`, of this process's life only."""
        self._last_saved_step = 0

    # The run

    def train(self) -> TrainResult:
        """Train to the end, from the checkpoint that the arguments ask for or from the start.

        A save that fails raises its `CheckpointError`, on every rank, and so ends the training.
        """
        args = self.args
        seed_all(args.seed + self.random_stream)
        with CheckpointCoordinator(
            self,
            args.output_dir,
            timeout_seconds=args.checkpoint_timeout_seconds,
            on_mismatch=args.on_replica_mismatch,
            training_args=args.to_json(),
        ) as coordinator:
            resumed_from = self.resume(coordinator)
            self.wrapped.train()
            while not self.is_finished():
                for batches in in_groups(self.loader, self.batches_per_step):
                    self.finish_step(self.reduce_loss(self.training_step(batches)))
                    if args.validate_replication_steps and is_multiple(
                        self.progress.step, args.validate_replication_steps
                    ):
                        self.validate_replication(coordinator)
                    if args.save_strategy == "steps" and is_multiple(self.progress.step, args.save_steps):
                        self.save(coordinator, "periodic")
                    if self.is_finished():
                        break
                else:
                    self.progress.epoch += 1
                    if args.save_strategy == "epoch":
                        self.save(coordinator, "epoch")
            if args.save_strategy != "no":
                self.save(coordinator, "final")
        return TrainResult(
            steps=self.progress.step,
            loss=self.progress.last_loss.item() if self.progress.step else None,
            resumed_from=resumed_from,
        )

    def resume(self, coordinator: CheckpointCoordinator) -> Path | None:
        """Load what `resume_from_checkpoint` asks for; the path that was loaded, None for a fresh start.

        All that draws numbers at the start has been made by now: the generators are loaded last.
        """
        which = self.args.resume_from_checkpoint
        if which is False:
            return None
        newest = which is True or which in ("latest", "auto")
        try:
            report = coordinator.load_checkpoint(None if newest else which)
        except CheckpointNotFound as err:
            if which == "auto":
                return None
            if newest:
                raise CheckpointNotFound(
                    f"{self.args.output_dir} has no checkpoint to resume from; with "
                    'resume_from_checkpoint="auto" the run starts fresh where there is none',
                    path=str(self.args.output_dir),
                ) from err
            raise
        if "rng" in report.skipped:
            # Streams of another world size: begin new ones, and not those that the run began with.
            seed_all(mixed_seed(self.args.seed, self.random_stream, self.progress.step))
        self._last_saved_step = self.progress.step
        self.total_steps = self.count_total_steps()
        if self.rank == 0:
            logger.info("resumed from %s at step %d", report.path, self.progress.step)
        return report.path

    def validate_replication(self, coordinator: CheckpointCoordinator) -> None:
        """Compare the ranks' copies of what they share; what differs ends the training, or is told."""
        step = self.progress.step
        reports = coordinator.validate_replication(self.args.validate_replication_level, step=step)
        if all(report.is_equal for report in reports.values()):
            return
        error = mismatch_error(reports.values())
        if self.args.on_replica_mismatch == "error":
            raise error
        logger.warning("at step %d: %s", step, error.message)

    def save(self, coordinator: CheckpointCoordinator, kind: str) -> None:
        """Save, unless this step is saved already."""
        if self._last_saved_step == self.progress.step:
            return
        position = self.loader.position
        path = coordinator.save_checkpoint(
            self.progress.step,
            epoch=self.progress.epoch + position.samples / position.num_samples,
            metrics={"loss": self.progress.last_loss.item()},
            kind=kind,
        )
        self._last_saved_step = self.progress.step
        if self.rank == 0:
            logger.info("saved %s", path)

    def is_finished(self) -> bool:
        if self.args.max_steps > 0:
            return self.progress.step >= self.args.max_steps
        return self.progress.epoch >= self.args.num_train_epochs

    def count_total_steps(self) -> int:
        """The step at which training will end, as seen from here; the world size may have changed on the way."""
        if self.args.max_steps > 0:
            return self.args.max_steps
        size = self.batches_per_step
        epochs_after = self.args.num_train_epochs - self.progress.epoch - 1
        left = -(-len(self.loader) // size) + epochs_after * -(-self.loader.batches_per_epoch // size)
        return self.progress.step + max(0, left)

    # One step

    def training_step(self, batches: Sequence[Batch]) -> torch.Tensor:
        """One optimizer step over these micro-batches; this rank's mean loss over them."""
        total = torch.zeros((), device=self.device)
        for number, batch in enumerate(batches, start=1):
            with self.gradient_exchange(is_last=number == len(batches)):
                with torch.autocast(self.device.type, self.args.autocast_dtype, self.args.autocast_dtype is not None):
                    loss = self.compute_loss(self.wrapped, self.to_device(batch)) / len(batches)
                torch.autograd.backward(self.scaler.scale(loss))
            total += loss.detach()
        self.combine_gradients()
        self.apply_gradients()
        return total

    def compute_loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """The loss of one micro-batch: that of the function given, else of a model that returns its own loss."""
        if self._given_loss is not None:
            return self._given_loss(model, batch)
        match batch:
            case Mapping():
                output = model(**batch)
            case list() | tuple():
                output = model(*batch)
            case _:
                output = model(batch)
        loss = output["loss"] if isinstance(output, Mapping) else output[0] if isinstance(output, tuple) else output
        if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
            raise TypeError(
                f"{type(self.model).__name__} returned {type(output).__name__}, which is no loss; return one "
                'from forward (alone, first in a tuple, or as "loss" in a dict), or give compute_loss='
            )
        return loss

    def apply_gradients(self) -> None:
        if self.args.max_grad_norm > 0:
            self.scaler.unscale_(self.optimizer)
            self.clip_gradients()
        scale = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.scaler.get_scale() >= scale:  # after an overflow, neither optimizer nor schedule move
            self.lr_scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)

    def clip_gradients(self) -> None:
        nn.utils.clip_grad_norm_(self.model.parameters(), self.args.max_grad_norm)

    def finish_step(self, loss: torch.Tensor) -> None:
        """Count the step, log if it is time, and call the hooks."""
        self.progress.add_step(loss)
        if is_multiple(self.progress.step, self.args.logging_steps):
            self.history.append((self.progress.step, self.progress.take_mean_loss()))
            if self.rank == 0:
                logger.info("step %d of %d: loss %.6g", self.progress.step, self.total_steps, self.history[-1][1])
        for hook in self.on_step_end:
            hook(self)

    def to_device(self, batch: Batch) -> Batch:
        return map_leaves(
            lambda leaf: leaf.to(self.device, non_blocking=True) if isinstance(leaf, torch.Tensor) else leaf, batch
        )

    # What a trainer is made of

    def get_state_components(self) -> list[StateComponent]:
        """All that a resume needs; the generators last, as loading the others may draw from them."""
        components = [
            StateComponent("model", self.model, self.shared, validation_level=self.model_validation),
            StateComponent("optimizer", NamedOptimizer(self.optimizer, [self.model]), self.shared),
            StateComponent("scheduler", self.lr_scheduler, self.shared),
            StateComponent("trainer", self.progress, self.shared),
            StateComponent("callbacks", self.callbacks, SharingPattern.PER_RANK, on_resize=taken_over),
            self.data_component(),
            StateComponent("rng", RNGState(), SharingPattern.PER_RANK, on_resize="drop"),
        ]
        if self.scaler.is_enabled():
            components.insert(3, StateComponent("scaler", self.scaler, self.shared))
        return components

    def data_component(self) -> StateComponent:
        return StateComponent("dataset", self.loader, SharingPattern.GLOBAL, on_resize=merge_positions)

    def join_job(self) -> tuple[torch.device, int, int]:
        """The device of this process, its rank and the world size."""
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise RuntimeError(
                f"Trainer runs in one process, and this is one of {os.environ['WORLD_SIZE']}: use DDPTrainer, "
                "or start it without torchrun"
            )
        return torch.device(self.args.device or ("cuda" if torch.cuda.is_available() else "cpu")), 0, 1

    @property
    def batches_per_step(self) -> int:
        """How many of the loader's batches one optimizer step takes."""
        return self.args.gradient_accumulation_steps

    def take_model(self, model: nn.Module) -> nn.Module:
        """The module that this rank trains, on its device."""
        return unwrapped(model).to(self.device)

    def wrap_model(self, model: nn.Module) -> nn.Module:
        return model

    def create_loader(self, dataset: Samples | None) -> StatefulLoader:
        if dataset is None:
            raise ValueError("this process reads its own data, and needs train_dataset=")
        return StatefulLoader(dataset, rank=self.rank, world_size=self.world_size, **self.loader_options())

    def loader_options(self) -> dict[str, Any]:
        return {
            "batch_size": self.args.per_device_train_batch_size,
            "seed": self.args.seed,
            "num_workers": self.args.dataloader_num_workers,
            "collate_fn": self.data_collator,
            "pin_memory": self.device.type == "cuda",
        }

    def create_optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(
            self.model.parameters(), lr=self.args.learning_rate, weight_decay=self.args.weight_decay
        )

    def create_scheduler(self, optimizer: torch.optim.Optimizer) -> LRScheduler:
        def factor(step: int) -> float:
            return lr_factor(
                self.args.lr_scheduler_type, step, warmup_steps=self.args.warmup_steps, total_steps=self.total_steps
            )

        return LambdaLR(optimizer, factor)

    def create_scaler(self) -> GradScaler:
        """What scales the loss in half precision; a component where it is enabled."""
        return GradScaler(self.device.type, enabled=self.args.fp16)

    # What several processes do differently

    def gradient_exchange(self, is_last: bool) -> AbstractContextManager[None]:
        """Around the forward and backward pass of one micro-batch."""
        return nullcontext()

    @property
    def random_stream(self) -> int:
        """Which of the job's random streams is this rank's. Ranks that compute the same thing draw from the same one."""
        return self.rank

    def combine_gradients(self) -> None:
        """Between the last backward pass of a step and the optimizer."""

    def reduce_loss(self, loss: torch.Tensor) -> torch.Tensor:
        """The mean over all ranks."""
        return loss


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside `torch.compile`'s wrapper, whose names do not begin with `_orig_mod.`."""
    inner = getattr(model, "_orig_mod", model)
    return inner if isinstance(inner, nn.Module) else model


def refuse_missing_device(device: str | None) -> None:
    if device is None or torch.device(device).type != "cuda":
        return
    if not torch.cuda.is_available():
        raise ValueError(
            f'device={device!r}, but torch finds no CUDA device here (torch {torch.__version__}); write device="cpu", or '
            "None for what there is"
        )


def refuse_unusable(optimizer: torch.optim.Optimizer, lr_scheduler: LRScheduler) -> None:
    """Refuse what the loop, which calls `step()` without arguments, could not drive."""
    parameters = list(inspect.signature(type(optimizer).step).parameters.values())[1:]
    if any(one.default is one.empty and one.kind is one.POSITIONAL_OR_KEYWORD for one in parameters):
        raise ValueError(
            f"{type(optimizer).__name__}.step() needs a closure that computes the loss again, and the training loop gives "
            "none; use an optimizer that steps without one, or override apply_gradients"
        )
    if isinstance(lr_scheduler, ReduceLROnPlateau):
        raise ValueError(
            "ReduceLROnPlateau.step() needs a metric, and the training loop gives none; use a schedule that depends on the "
            "step alone, or override apply_gradients"
        )
