"""The training loop on Hugging Face's accelerate, in one process or many."""

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.amp import GradScaler
from torch.utils.data import DataLoader

from forgather_ckpt.data.batches import Batch, Samples
from forgather_ckpt.trainers.arguments import TrainingArguments
from forgather_ckpt.trainers.checks import refuse_unusable
from forgather_ckpt.trainers.replicated import ReplicatedTrainer

try:
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer
    from accelerate.scheduler import AcceleratedScheduler
    from accelerate.utils import DDPCommunicationHookType, DistributedType
except ImportError as err:
    raise ImportError(f"AccelTrainer needs accelerate ({err}): pip install forgather-ckpt[accelerate]") from err


class AccelTrainer(ReplicatedTrainer):
    """A `Trainer` in each process of `accelerate launch` or `torchrun`, or in a single one, with accelerate underneath.

        AccelTrainer(model, args, train_dataset).train()
        AccelTrainer(model, args, train_dataset, accelerator=Accelerator(mixed_precision="bf16")).train()

    Model and optimizer are prepared here: give them, and the dataset, as they are. Wrapping, mixed precision, gradient
    accumulation and clipping are accelerate's. Without `accelerator=`, one is made from the arguments, and where they ask
    for no mixed precision, from what `accelerate launch` was told.

    Two things are not accelerate's, so that a resume at another world size goes on exactly. The schedule makes one step
    an optimizer step, where accelerate's makes one for each process. And the data is read by a `StatefulLoader`, which
    shares out each sample once and saves its place.

    Objects given to `Accelerator.register_for_checkpointing` are not saved: declare them in `get_state_components`.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        train_dataset: Samples | None,
        *,
        accelerator: Accelerator | None = None,
        **options: Any,
    ) -> None:
        refuse_prepared(train_dataset, options.get("optimizer"), options.get("lr_scheduler"))
        self._given_accelerator = accelerator
        super().__init__(model, args, train_dataset, **options)
        if type(self).apply_gradients is AccelTrainer.apply_gradients:
            refuse_unusable(self.optimizer, self.lr_scheduler)
        # After the scheduler, which wraps the optimizer's step to count its calls: accelerate keeps what it finds. And
        # without accelerate's placement, which passes state through torch's loading, and that casts it.
        self.accelerated: AcceleratedOptimizer = self.accelerator.prepare_optimizer(
            self.optimizer, device_placement=False
        )

    def join_job(self) -> tuple[torch.device, int, int]:
        device = self._own_device()
        self.accelerator: Accelerator = self._given_accelerator or Accelerator(
            cpu=device.type == "cpu",
            mixed_precision="fp16" if self.args.fp16 else "bf16" if self.args.bf16 else None,
        )
        refuse_lone_process(self.accelerator)
        refuse_sharing(self.accelerator)
        refuse_contradictions(self.accelerator, self.args)
        return self.accelerator.device, self.accelerator.process_index, self.accelerator.num_processes

    def replicate(self, model: nn.Module) -> nn.Module:
        wrapped: nn.Module = self.accelerator.prepare_model(model)
        return wrapped

    def create_scaler(self) -> GradScaler:
        return self.accelerator.scaler or GradScaler(self.device.type, enabled=False)

    def training_step(self, batches: Sequence[Batch]) -> torch.Tensor:
        total = torch.zeros((), device=self.device)
        with counting_to(len(batches), self.accelerator):
            for batch in batches:
                with self.accelerator.accumulate(self.wrapped):
                    with self.precision():
                        loss = self.compute_loss(self.wrapped, self.to_device(batch))
                    self.accelerator.backward(loss)
                total += loss.detach() / len(batches)
        self.apply_gradients()
        return total

    def precision(self) -> AbstractContextManager[Any]:
        context: AbstractContextManager[Any] = self.accelerator.autocast()
        return context

    def apply_gradients(self) -> None:
        if self.args.max_grad_norm > 0:
            self.grad_norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.args.max_grad_norm)
        scale = self.scaler.get_scale()
        self.accelerated.step()
        # Not `step_was_skipped`, which is False for fused optimizers: their own kernel skips the step.
        if self.scaler.get_scale() >= scale:
            self.lr_scheduler.step()
        self.forget_gradients(self.accelerated)

    def reduce_loss(self, loss: torch.Tensor) -> torch.Tensor:
        mean: torch.Tensor = self.accelerator.reduce(loss, reduction="mean")
        return mean


@contextmanager
def counting_to(num_batches: int, accelerator: Accelerator) -> Iterator[None]:
    """Make so many micro-batches a step for accelerate, which else has one number for all steps, divides the loss by it,
    and counts on from step to step. The last step of an epoch may have fewer."""
    given = accelerator.gradient_accumulation_steps
    accelerator.step, accelerator.gradient_accumulation_steps = 0, num_batches
    try:
        yield
    finally:
        accelerator.gradient_accumulation_steps = given


def refuse_prepared(dataset: object, optimizer: object, lr_scheduler: object) -> None:
    """Refuse what accelerate, or its user, has wrapped already."""
    if isinstance(dataset, DataLoader):
        raise TypeError(
            f"train_dataset= is a {type(dataset).__name__}: give its dataset; the trainer makes a loader that can be "
            "resumed, with per_device_train_batch_size and dataloader_num_workers of the arguments and data_collator="
        )
    if isinstance(optimizer, AcceleratedOptimizer):
        raise ValueError("optimizer= is prepared already: give the one inside, optimizer.optimizer")
    if isinstance(lr_scheduler, AcceleratedScheduler):
        raise ValueError(
            "lr_scheduler= is prepared already, and would make one step for each process: give the one inside, "
            "lr_scheduler.scheduler, which makes one an optimizer step"
        )


def refuse_lone_process(accelerator: Accelerator) -> None:
    """Refuse an Accelerator that has not found the other processes: each would train for itself."""
    world_size = dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != world_size:
        raise RuntimeError(
            f"this is one of {world_size} processes, and accelerate found {accelerator.num_processes}: start them with "
            "torchrun or accelerate launch, and give an Accelerator made with cpu=True where they are to train on CPUs"
        )


def refuse_sharing(accelerator: Accelerator) -> None:
    """Refuse what leaves no rank with the whole model, or has state of which accelerate keeps the only knowledge."""
    kind = accelerator.distributed_type
    if kind is not DistributedType.NO and not kind.value.startswith("MULTI_"):
        raise ValueError(
            f"AccelTrainer saves a model that every rank holds whole, and this Accelerator is for {kind.value}: make it "
            "without a plugin for that, and without the setting in accelerate's configuration"
        )
    if accelerator.parallelism_config is not None:
        raise ValueError(
            "AccelTrainer saves a model that every rank holds whole: make the Accelerator without parallelism_config="
        )
    if accelerator.mixed_precision == "fp8":
        raise ValueError('fp8 keeps scales that are not saved: make the Accelerator with mixed_precision="bf16"')
    hook = accelerator.ddp_handler and accelerator.ddp_handler.comm_hook
    if hook in (DDPCommunicationHookType.POWER_SGD, DDPCommunicationHookType.BATCHED_POWER_SGD):
        raise ValueError(
            f"comm_hook={hook.value} carries errors from step to step that are not saved, so no resume would be exact: use "
            "the hooks fp16 or bf16, or none"
        )


def refuse_contradictions(accelerator: Accelerator, args: TrainingArguments) -> None:
    """Refuse an Accelerator that was told otherwise than the arguments, or would not do what it was told."""
    for name in ("fp16", "bf16"):
        if getattr(args, name) and accelerator.mixed_precision != name:
            raise ValueError(
                f"{name}=True, but the Accelerator has mixed_precision={accelerator.mixed_precision!r}: say it in one place"
            )
    if accelerator.mixed_precision == "fp16" and accelerator.scaler is None:
        raise ValueError(
            f"on {accelerator.device.type}, accelerate trains in full precision where fp16 is asked for: write bf16=True, or "
            "use DDPTrainer"
        )
    if accelerator.gradient_accumulation_steps not in (1, args.gradient_accumulation_steps):
        raise ValueError(
            f"the Accelerator has gradient_accumulation_steps={accelerator.gradient_accumulation_steps}, the arguments have "
            f"{args.gradient_accumulation_steps}: say it in the arguments alone"
        )
    if accelerator.dispatch_batches or accelerator.split_batches:
        raise ValueError(
            "dispatch_batches and split_batches of the Accelerator are for its own loaders, and the trainer makes another: "
            "write TrainingArguments(dispatch_batches=True) to have rank 0 read for all, and per_device_train_batch_size= "
            "for the share of one process"
        )
    if args.device is not None and not _is_same(torch.device(args.device), accelerator.device):
        raise ValueError(
            f"device={args.device!r}, but the Accelerator has {str(accelerator.device)!r}: leave device= out, or make the "
            "Accelerator for that device"
        )


def _is_same(wanted: torch.device, found: torch.device) -> bool:
    """Whether they are one device; without a number, a device is the current one of its kind."""
    return wanted.type == found.type and (wanted.index == found.index or None in (wanted.index, found.index))
