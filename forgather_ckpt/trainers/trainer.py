"""A training loop for one process: what it declares is saved, and a resume is exact to the bit."""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
from torch import nn
from torch.amp import GradScaler
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from forgather_ckpt.callbacks.events import TrainerCallback, TrainerState
from forgather_ckpt.component import StateComponent
from forgather_ckpt.data.batches import Batch, Samples, map_leaves
from forgather_ckpt.data.loader import StatefulLoader
from forgather_ckpt.data.position import merge_positions
from forgather_ckpt.data.seeding import seed_all
from forgather_ckpt.manager import CheckpointManager
from forgather_ckpt.optimizer import NamedOptimizer
from forgather_ckpt.patterns import SharingPattern, ValidationLevel
from forgather_ckpt.rng import RNGState
from forgather_ckpt.trainers.arguments import TrainingArguments
from forgather_ckpt.trainers.callbacks import CallbackStates, taken_over
from forgather_ckpt.trainers.checks import refuse_missing_device, refuse_unusable
from forgather_ckpt.trainers.evaluation import (
    EvalDataset,
    EvaluationBatches,
    as_means,
    refuse_unlike_names,
    undisturbed,
)
from forgather_ckpt.trainers.events import Events, StepMetrics
from forgather_ckpt.trainers.progress import Progress, TrainResult
from forgather_ckpt.trainers.run import Run
from forgather_ckpt.trainers.schedule import is_multiple, lr_factor

logger = logging.getLogger(__name__)

NUM_SAMPLES = "number of samples"


class Trainer:
    """Trains a model in one process.

        Trainer(model, TrainingArguments(output_dir="runs/a", save_steps=100), train_dataset).train()

    Give `optimizer`, `lr_scheduler` or `compute_loss(model, batch)`, or override `create_optimizer`,
    `create_scheduler`, `compute_loss`, `training_step`. The `on_step_end` functions are called with the trainer
    after each optimizer step, before the save that may be due; what they raise ends the training. `callbacks` are told
    of more events, may ask for saves, evaluations and the end, and what they raise is logged
    (`forgather_ckpt.callbacks`). Those of either that have `state_dict` and `load_state_dict` are saved.

    `eval_dataset`, or a function that makes it when it is first needed, is gone through every `eval_steps`;
    `compute_metrics(model, batch)` gives the means over a batch that are averaged, by default the loss alone.
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
        eval_dataset: EvalDataset | None = None,
        compute_metrics: Callable[[nn.Module, Batch], Mapping[str, Any]] | None = None,
        callbacks: Sequence[TrainerCallback] = (),
        on_step_end: Sequence[Callable[["Trainer"], None]] = (),
    ) -> None:
        if lr_scheduler is not None and optimizer is None:
            raise ValueError("lr_scheduler= was made for an optimizer: give that one too, as optimizer=")
        refuse_missing_device(args.device)
        self.args = args
        self.data_collator = data_collator
        self.eval_dataset = eval_dataset
        self.on_step_end = tuple(on_step_end)
        self._given_loss = compute_loss
        self._given_metrics = compute_metrics
        self.device, self.rank, self.world_size = self.join_job()
        self.state = TrainerState(rank=self.rank, world_size=self.world_size)
        self.events = Events(callbacks, args, self.state)
        self.callback_states = CallbackStates((*on_step_end, *callbacks), lambda: self.model.state_dict())
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
        self.generators = RNGState(self.random_stream)
        self.total_steps = self.count_total_steps()
        self.optimizer = optimizer or self.create_optimizer()
        self.lr_scheduler = lr_scheduler or self.create_scheduler(self.optimizer)
        if type(self).apply_gradients is Trainer.apply_gradients and type(self).training_step is Trainer.training_step:
            refuse_unusable(self.optimizer, self.lr_scheduler)
        self.scaler = self.create_scaler()
        self.history: list[tuple[int, float]] = []
        """(step, mean loss since the entry before) every `logging_steps`, of this process's life only."""
        self.grad_norm: torch.Tensor | None = None
        """Of the last step, before clipping; None where gradients are not clipped."""
        self._evaluation: EvaluationBatches | None = None
        self.evaluated: tuple[int, dict[str, float]] = (-1, {})
        """The last evaluation: at which step, and what it found."""

    # The run

    def train(self) -> TrainResult:
        """Train to the end, from the checkpoint that the arguments ask for or from the start.

        A save that fails raises its `CheckpointError`, on every rank, and so ends the training; where it is the file
        system that fails, `on_storage_error` decides.
        """
        seed_all(self.args.seed + self.random_stream)
        with self.create_manager() as manager:
            return Run(self, manager).train()

    def create_manager(self) -> CheckpointManager:
        """What saves, keeps and loads the checkpoints of this run."""
        args = self.args
        return CheckpointManager(
            self,
            args.output_dir,
            schedule=args.save_schedule(),
            policy=args.retention_policy(),
            stop_signals=args.stop_signals,
            control_steps=args.control_steps,
            grace_seconds=args.grace_seconds,
            max_load_attempts=args.max_load_attempts,
            on_storage_error=args.on_storage_error,
            strict_args=args.strict_args,
            timeout_seconds=args.checkpoint_timeout_seconds,
            on_mismatch=args.on_replica_mismatch,
            training_args=args.to_json(),
        )

    def common_facts(self) -> dict[str, Any]:
        """What must be the same on all ranks, or they would come to the end, or to a log or a save, at different steps."""
        settings = {name: value for name, value in self.args.to_json().items() if name not in ("output_dir", "device")}
        length = self.loader.position.num_samples
        return {**settings, "len(train_dataset)": length, "has eval_dataset": self.can_evaluate}

    # Evaluation

    @property
    def can_evaluate(self) -> bool:
        return self.eval_dataset is not None

    def refuse_unusable_evaluation(self) -> None:
        """Before the first step, not hours later; a function that makes the dataset is called at the first evaluation."""
        is_made_later = callable(self.eval_dataset) and not isinstance(self.eval_dataset, Samples)
        is_needed = self.args.eval_strategy != "no" or self.args.eval_on_save
        if self.can_evaluate and is_needed and not is_made_later:
            self.create_evaluation()

    def evaluate(self) -> dict[str, float]:
        """The mean metrics of the evaluation dataset, named `eval_…`, the same on all ranks.

        Training goes on as if it had not been: its random numbers, modes and data stay as they are.
        """
        if not self.has_evaluation_data:
            self.load_evaluation_data()
        with undisturbed(self.model, self.args.seed + self.random_stream):
            sums = self.evaluation_sums()
        names = sorted(sums)
        refuse_unlike_names(names, self.reduce_sums, self.device)
        totals = self.reduce_sums(torch.stack([sums[name].double() for name in names])).tolist()
        weight = totals[names.index(NUM_SAMPLES)]
        metrics = {name: total / weight for name, total in zip(names, totals, strict=True) if name != NUM_SAMPLES}
        self.evaluated = self.progress.step, metrics
        return metrics

    @property
    def has_evaluation_data(self) -> bool:
        return self._evaluation is not None

    def load_evaluation_data(self) -> dict[str, Any]:
        """Make the dataset, when it is first needed; what of it must be the same on all ranks."""
        self._evaluation = self.create_evaluation()
        return {"len(eval_dataset)": self._evaluation.num_samples}

    def create_evaluation(self) -> EvaluationBatches:
        """The batches of this rank; the dataset is made now, if it was given as a function."""
        dataset = self.eval_dataset
        if not isinstance(dataset, Samples):
            if not callable(dataset):
                raise ValueError(
                    f"there is nothing to evaluate on: eval_dataset is {dataset!r}; give a dataset with __len__ and __getitem__, "
                    "or a function that makes one"
                )
            dataset = dataset()
        rank, world_size = self.data_share
        return EvaluationBatches(
            dataset,
            rank=rank,
            world_size=world_size,
            max_batches=self.args.max_eval_batches,
            **self.evaluation_options(),
        )

    def evaluation_options(self) -> dict[str, Any]:
        size = self.args.per_device_eval_batch_size or self.args.per_device_train_batch_size
        return {"batch_size": size, "collate_fn": self.data_collator}

    def evaluation_sums(self) -> dict[str, torch.Tensor]:
        """Of this rank: the sum of each metric (`eval_…`) over its samples, and under `NUM_SAMPLES` how many these are."""
        assert self._evaluation is not None
        sums: dict[str, torch.Tensor] = {}
        for batch, weight in self._evaluation:
            found = as_means(self.evaluation_step(self.to_device(batch)), self.device)
            found[NUM_SAMPLES] = torch.ones((), device=self.device)
            if sums and sums.keys() != found.keys():
                unlike = ", ".join(sorted(sums.keys() ^ found.keys()))
                raise ValueError(
                    f"some batches have the metric {unlike} and some have not; give the same ones of each batch"
                )
            sums = {name: sums.get(name, 0.0) + value * weight for name, value in found.items()}
        return sums

    def evaluation_step(self, batch: Batch) -> Mapping[str, Any]:
        """The means of one batch."""
        with self.precision():
            if self._given_metrics is not None:
                return self._given_metrics(self.evaluated_model, batch)
            return {"loss": self.compute_loss(self.evaluated_model, batch)}

    @property
    def evaluated_model(self) -> nn.Module:
        """What is called in an evaluation."""
        return self.wrapped

    # How far it has come

    @property
    def epochs_done(self) -> float:
        """With the part of the current one."""
        position = self.loader.position
        return self.progress.epoch + position.samples / position.num_samples

    def tell(self, event: str, **facts: Any) -> None:
        """Call an event of all callbacks, with how far the training has come."""
        self.state.global_step, self.state.max_steps = self.progress.step, self.total_steps
        self.state.epoch = self.epochs_done
        self.events.tell(event, trainer=self, model=self.model, **facts)

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

    def step(self, batches: Sequence[Batch]) -> None:
        """Train one step, count it, log if it is time, and call the hooks and callbacks."""
        loss = self.training_step(batches)
        if not isinstance(loss, torch.Tensor):
            raise TypeError(
                f"{type(self).__name__}.training_step returned {loss!r}; return this rank's mean loss, a tensor"
            )
        self.progress.add_step(self.reduce_loss(loss))
        if is_multiple(self.progress.step, self.args.logging_steps):
            self.log()
        for hook in self.on_step_end:
            hook(self)
        if self.events.callbacks:
            self.tell("on_step_end", metrics=StepMetrics(self.step_numbers()))

    def training_step(self, batches: Sequence[Batch]) -> torch.Tensor:
        """One optimizer step over these micro-batches; this rank's mean loss over them."""
        total = torch.zeros((), device=self.device)
        for number, batch in enumerate(batches, start=1):
            with self.gradient_exchange(is_last=number == len(batches)):
                with self.precision():
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
            self.grad_norm = self.clip_gradients()
        scale = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.scaler.get_scale() >= scale:  # after an overflow, neither optimizer nor schedule move
            self.lr_scheduler.step()
        self.forget_gradients(self.optimizer)

    def forget_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        """Those of parameters that the optimizer has not, too: they count when gradients are clipped."""
        optimizer.zero_grad(set_to_none=True)
        self.model.zero_grad(set_to_none=True)

    def clip_gradients(self) -> torch.Tensor:
        """Clip to `max_grad_norm`; the norm before."""
        return nn.utils.clip_grad_norm_(self.model.parameters(), self.args.max_grad_norm)

    def step_numbers(self) -> dict[str, torch.Tensor | float]:
        """What there is to tell of the last step, where it lies."""
        numbers: dict[str, torch.Tensor | float] = {
            "loss": self.progress.last_loss,
            "learning_rate": float(self.lr_scheduler.get_last_lr()[0]),
        }
        return numbers if self.grad_norm is None else {**numbers, "grad_norm": self.grad_norm}

    def log(self) -> None:
        """Tell the mean loss since the last time; nothing where there was no step since."""
        if not self.progress.num_losses:
            return
        step = self.progress.step
        numbers = {**StepMetrics(self.step_numbers()), "loss": self.progress.take_mean_loss()}
        self.history.append((step, numbers["loss"]))
        if self.rank == 0:
            logger.info("step %d of %d: loss %.6g", step, self.total_steps, numbers["loss"])
        self.tell("on_log", logs=numbers)

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
            StateComponent("callbacks", self.callback_states, SharingPattern.PER_RANK, on_resize=taken_over),
            self.data_component(),
            StateComponent("rng", self.generators, SharingPattern.PER_RANK, on_resize="drop"),
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

    def after_load(self) -> None:
        """After a checkpoint has been loaded, before the first step."""

    def settle_copies(self) -> None:
        """Before the ranks' copies are saved or compared: make equal what is declared so and differs between steps. It
        changes nothing in the training."""

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

    def reduce_sums(self, sums: torch.Tensor) -> torch.Tensor:
        """The sums over the ranks that read different data, the same on all."""
        return sums

    @property
    def data_share(self) -> tuple[int, int]:
        """Which of how many shares of the data is this rank's."""
        return self.rank, self.world_size

    def precision(self) -> AbstractContextManager[Any]:
        """Around a forward pass."""
        return torch.autocast(self.device.type, self.args.autocast_dtype, self.args.autocast_dtype is not None)


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside `torch.compile`'s wrapper, whose names do not begin with `_orig_mod.`."""
    inner = getattr(model, "_orig_mod", model)
    return inner if isinstance(inner, nn.Module) else model
