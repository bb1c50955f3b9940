"""The training loop on a model whose stages lie on different ranks, with `torch.distributed.pipelining`."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import default_collate

from forgather_ckpt.callbacks.events import TrainerCallback
from forgather_ckpt.component import StateComponent
from forgather_ckpt.data.batches import Batch, Samples
from forgather_ckpt.data.dispatch import DispatchingLoader
from forgather_ckpt.data.loader import StatefulLoader
from forgather_ckpt.data.position import merge_positions
from forgather_ckpt.patterns import SharingPattern, ValidationLevel
from forgather_ckpt.replication import describe
from forgather_ckpt.trainers.arguments import TrainingArguments
from forgather_ckpt.trainers.checks import refuse_unusable
from forgather_ckpt.trainers.distributed import DistributedTrainer
from forgather_ckpt.trainers.evaluation import EvalDataset, EvaluationBatches
from forgather_ckpt.trainers.gradients import broadcast_from_first, own_gradient, scale_gradients, squared_norm
from forgather_ckpt.trainers.micro_batches import digest_of, in_micro_batches, shapes_of
from forgather_ckpt.trainers.pipeline_schedules import SCHEDULES, SafeStage
from forgather_ckpt.trainers.stages import CanBeCut, Cut, Handed, Outline, Part, Share, Stage, dealt, parts_of
from forgather_ckpt.trainers.trainer import NUM_SAMPLES, Trainer, unwrapped


class PipelineTrainer(DistributedTrainer):
    """A `Trainer` of one model over all ranks of the job, each of which has some of its stages.

        PipelineTrainer(GPT(...), args, dataset, schedule="1f1b").train()

    Every rank gives the whole model, and keeps its part. Where it may be cut says the model (`stages.CanBeCut`), or
    `parts`; `stages` is how many stages to make of them, or how many parts each stage gets; by default one stage a
    rank, or two where the schedule interleaves. `compute_loss(output, batch)` gets what the last part returns. All
    names are those of the whole model, so that other numbers of stages, `Trainer` and `DDPTrainer` go on from the
    checkpoints.

    A step takes `gradient_accumulation_steps` micro-batches of `per_device_train_batch_size` samples through the
    pipeline: the same arguments train alike in a `Trainer`. What is left of an epoch when no whole step is, is left
    out. All ranks read the same batches, or rank 0 for all with `dispatch_batches=True`. An `optimizer` may be made
    for the whole model: each rank's keeps the parameters that are there.
    """

    model_validation = ValidationLevel.TENSOR

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        train_dataset: Samples | None,
        *,
        schedule: str = "1f1b",
        stages: int | Sequence[int] | None = None,
        parts: Sequence[Part] | None = None,
        compute_loss: Callable[[Any, Batch], torch.Tensor] | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        lr_scheduler: LRScheduler | None = None,
        data_collator: Callable[[list[Any]], Batch] | None = None,
        eval_dataset: EvalDataset | None = None,
        callbacks: Sequence[TrainerCallback] = (),
        on_step_end: Sequence[Callable[["Trainer"], None]] = (),
    ) -> None:
        if schedule not in SCHEDULES:
            raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, not {schedule!r}")
        if args.fp16:
            raise ValueError("fp16 needs its loss scaled, which a pipeline here does not do; use bf16=True")
        if unwrapped(model) is not model:
            raise ValueError(
                "a compiled model cannot be cut; give the model itself, and compile its blocks in place, by block.compile()"
            )
        if compute_loss is None and not isinstance(model, CanBeCut):
            raise ValueError(f"{type(model).__name__} has no pipeline_loss(output, batch); give compute_loss=")
        self.schedule = schedule
        self.num_micro_batches = args.gradient_accumulation_steps
        self._parts = list(parts) if parts is not None else parts_of(model)
        self._dealing = stages
        self._loss_of_output = compute_loss
        self._micro_batches: list[Batch] = []
        self._pipeline: Any = None
        super().__init__(
            model,
            args,
            train_dataset,
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            data_collator=data_collator,
            eval_dataset=eval_dataset,
            callbacks=callbacks,
            on_step_end=on_step_end,
        )
        keep_own(self.optimizer, self.model)
        if type(self).apply_gradients is Trainer.apply_gradients:
            refuse_unusable(self.optimizer, self.lr_scheduler)

    # The model's share

    def take_model(self, model: nn.Module) -> nn.Module:
        schedule, group = SCHEDULES[self.schedule], self.pipeline_group
        asked = schedule.default_stages(group.size()) if self._dealing is None else self._dealing
        sizes = dealt(len(self._parts), asked)
        self._check_schedule(len(sizes))
        ranks = [schedule.rank_of(stage, group.size()) for stage in range(len(sizes))]
        stages = [self._parts[sum(sizes[:number]) : sum(sizes[: number + 1])] for number in range(len(sizes))]
        cut = Cut(model, stages, ranks)
        self._outline: Outline | None = Outline(cut, self.device)
        self._compared: set[str] = set()
        share = self.parallelize(cut.share(group.rank()).to(self.device))
        parameters = dict(share.named_parameters())
        self.stages = {
            number: Stage(
                share,
                stages[number],
                [parameters[name] for name in cut.parameters(number)],
                self.precision,
                None if number else self._micro_batches,
            )
            for number, owner in enumerate(ranks)
            if owner == group.rank()
        }
        """This rank's, by number."""
        self.num_stages = len(stages)
        self._last_rank = ranks[-1]
        """Of the pipeline, where the loss is."""
        self._share = Share(share, model.state_dict().keys())
        self._join_holders(cut, share)
        return share

    @property
    def pipeline_group(self) -> dist.ProcessGroup:
        """The ranks that have the stages of one pipeline."""
        assert dist.group.WORLD is not None
        return dist.group.WORLD

    def parallelize(self, module: nn.Module) -> nn.Module:
        """What a subclass makes of this rank's share of the model, before stages are made of it."""
        return module

    def _check_schedule(self, num_stages: int) -> None:
        group = self.pipeline_group
        try:
            SCHEDULES[self.schedule].check(num_stages, self.num_micro_batches, group)
        except ValueError as err:
            raise ValueError(
                f"schedule={self.schedule!r} does not go with {num_stages} stages on {group.size()} ranks and "
                f"{self.num_micro_batches} micro-batches (gradient_accumulation_steps): {err}"
            ) from err

    def _join_holders(self, cut: Cut, share: nn.Module) -> None:
        """Give what several ranks hold the first one's values, and remember with whom gradients are summed."""
        place, members = self.pipeline_group.rank(), dist.get_process_group_ranks(self.pipeline_group)
        holders = {name: ranks for name, ranks in cut.holders().items() if place in ranks}
        groups = self._groups_of(members, {ranks for ranks in cut.holders().values() if len(ranks) > 1})
        tensors = {**dict(share.named_parameters()), **dict(share.named_buffers())}
        self._tied: list[tuple[nn.Parameter, dist.ProcessGroup]] = []
        self._counted: list[nn.Parameter] = []
        """The parameters of this rank that are in no lower rank's norm."""
        for name, ranks in holders.items():
            tensor = tensors[name]
            if len(ranks) > 1:
                broadcast_from_first([tensor], self.device, groups[ranks])
            if isinstance(tensor, nn.Parameter) and tensor.requires_grad:
                if len(ranks) > 1:
                    self._tied.append((tensor, groups[ranks]))
                if place == ranks[0]:
                    self._counted.append(tensor)

    def _groups_of(
        self, members: list[int], sets: Iterable[tuple[int, ...]]
    ) -> dict[tuple[int, ...], dist.ProcessGroup]:
        """A process group for each set of places on this rank's pipeline.

        All ranks make all groups, of all pipelines: torch's `use_local_synchronization` names groups by how many a rank
        has, and those who have different numbers wait for each other for ever.
        """
        pipelines: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(pipelines, tuple(members))
        found = {}
        for pipeline in sorted(set(pipelines)):
            for ranks in sorted(sets):
                group = dist.new_group([pipeline[rank] for rank in ranks])
                if pipeline == tuple(members) and group is not dist.GroupMember.NON_GROUP_MEMBER:
                    found[ranks] = group
        return found

    def after_load(self) -> None:
        # A group without parameters here is stored with those of other ranks; many schedules go on from its rate.
        for group, rate in zip(self.optimizer.param_groups, self.lr_scheduler.get_last_lr(), strict=True):
            if not group["params"]:
                group["lr"] = rate

    # The data

    @property
    def batches_per_step(self) -> int:
        return 1  # which is a list of micro-batches

    def create_loader(self, dataset: Samples | None) -> StatefulLoader:
        if self.args.dispatch_batches:
            loader: StatefulLoader = DispatchingLoader(dataset, same_for_all=True, **self.loader_options())
        elif dataset is None:
            raise ValueError(
                "each rank reads the data, and needs train_dataset=; dispatch_batches=True lets rank 0 read"
            )
        else:
            loader = StatefulLoader(dataset, **self.loader_options())
        if loader.batches_per_epoch == 0:
            raise ValueError(
                f"{loader.position.num_samples} samples do not fill one step of {self.num_micro_batches} micro-batches "
                f"(gradient_accumulation_steps) of {self.args.per_device_train_batch_size} (per_device_train_batch_size)"
            )
        return loader

    def loader_options(self) -> dict[str, Any]:
        size = self.args.per_device_train_batch_size
        return {
            **super().loader_options(),
            "batch_size": size * self.num_micro_batches,
            "collate_fn": partial(in_micro_batches, size=size, collate=self.data_collator or default_collate),
        }

    # One step

    def training_step(self, batches: Sequence[Batch]) -> torch.Tensor:
        """One optimizer step over one list of micro-batches; its mean loss where the last stage is, else zero."""
        [micro_batches] = batches
        self._prepare(micro_batches, "training")
        loss = self._run(self._pipeline.step, micro_batches)
        self.combine_gradients()
        self.apply_gradients()
        return loss

    def _prepare(self, micro_batches: Sequence[Batch], what: str) -> None:
        """Make the schedule, the first time, and refuse micro-batches that do not go through it. The first ones of each
        dataset are compared among the stages."""
        shapes = [shapes_of(batch) for batch in micro_batches]
        if what not in self._compared:
            self._refuse_unlike_batches(micro_batches)
            self._compared.add(what)
        if self._pipeline is None:
            self._shapes = shapes[0]
            self._pipeline = self._begin(micro_batches)
        for found in shapes:
            if found != self._shapes:
                raise ValueError(
                    f"a micro-batch has the shapes {found}, the first one of this run {self._shapes}: stages exchange "
                    "tensors of one size; collate all samples to one length"
                )

    def _run(self, schedule: Callable[..., Any], micro_batches: Sequence[Batch]) -> torch.Tensor:
        """Take the micro-batches through the stages; their mean loss where the last one is, else zero."""
        self._micro_batches[:] = self.to_device(micro_batches)
        numbers = torch.arange(self.num_micro_batches)
        losses: list[torch.Tensor] = []
        is_first, is_last = 0 in self.stages, self.num_stages - 1 in self.stages
        schedule(
            *([numbers] if is_first else []),
            target=numbers if is_last else None,
            losses=losses if is_last else None,
            return_outputs=False,
        )
        self._micro_batches.clear()
        return sum((loss.detach().float() for loss in losses), torch.zeros((), device=self.device))

    def reduce_loss(self, loss: torch.Tensor) -> torch.Tensor:
        dist.broadcast(loss, group=self.pipeline_group, group_src=self._last_rank)
        return loss

    def combine_gradients(self) -> None:
        """All holders of a tied parameter get the sum of their gradients, the same bits, so their copies stay equal."""
        for parameter, group in self._tied:
            dist.all_reduce(own_gradient(parameter), group=group)

    def clip_gradients(self) -> torch.Tensor:
        """Clip by the norm over all stages, in which a tied parameter counts once."""
        total = squared_norm(self._counted, self.device)
        dist.all_reduce(total, group=self.pipeline_group)
        norm = total.sqrt()
        scale_gradients(self.model.parameters(), norm, self.args.max_grad_norm)
        return norm

    # Evaluation

    @property
    def data_share(self) -> tuple[int, int]:
        return 0, 1

    def create_evaluation(self) -> EvaluationBatches:
        """Lists of micro-batches of the shapes of training; what is left at the end of the dataset is left out."""
        if self.args.per_device_eval_batch_size not in (None, self.args.per_device_train_batch_size):
            raise ValueError(
                "per_device_eval_batch_size must be that of training, or None: the stages exchange tensors of one size"
            )
        return super().create_evaluation()

    def evaluation_options(self) -> dict[str, Any]:
        options = self.loader_options()
        return {"batch_size": options["batch_size"], "collate_fn": options["collate_fn"], "drop_last": True}

    def evaluation_sums(self) -> dict[str, torch.Tensor]:
        """Of the mean loss, where the last stage is; zeros elsewhere."""
        assert self._evaluation is not None
        total, weight = torch.zeros((), device=self.device), torch.zeros((), device=self.device)
        for micro_batches, num_samples in self._evaluation:
            self._prepare(micro_batches, "evaluation")
            total += self._run(self._pipeline.eval, micro_batches) * num_samples
            weight += num_samples
        is_last = self.num_stages - 1 in self.stages
        return {"eval_loss": total, NUM_SAMPLES: weight if is_last else torch.zeros_like(weight)}

    def _begin(self, micro_batches: Sequence[Batch]) -> Any:
        """The schedule of this run, once there is a batch from which the shapes follow that stages exchange."""
        assert self._outline is not None
        with torch.enable_grad():  # an evaluation may come before the first step
            handed = self._outline.handed_on(micro_batches[0], self.precision)
        self._outline = None
        stages = [self._torch_stage(number, handed) for number in self.stages]
        return SCHEDULES[self.schedule].of(stages, self.num_micro_batches, self._micro_batch_loss)

    def _torch_stage(self, number: int, handed: Sequence[Handed]) -> SafeStage:
        return SafeStage(
            self.stages[number],
            number,
            self.num_stages,
            self.device,
            input_args=handed[number - 1] if number else (torch.zeros(1, dtype=torch.int64),),
            output_args=handed[number],
            group=self.pipeline_group,
        )

    def _micro_batch_loss(self, output: Any, number: torch.Tensor) -> torch.Tensor:
        batch = self._micro_batches[int(number)]
        with self.precision():
            if self._loss_of_output is not None:
                loss = self._loss_of_output(output, batch)
            else:
                assert isinstance(self.model, CanBeCut)
                loss = self.model.pipeline_loss(output, batch)
        return loss / self.num_micro_batches

    def _refuse_unlike_batches(self, micro_batches: Sequence[Batch]) -> None:
        """The first stage reads the inputs and the last the targets: of the same samples, or nothing is learnt."""
        members = dist.get_process_group_ranks(self.pipeline_group)
        digests: list[bytes] = [b""] * len(members)
        dist.all_gather_object(digests, digest_of(micro_batches), group=self.pipeline_group)
        unlike = tuple(rank for rank, digest in zip(members, digests, strict=True) if digest != digests[0])
        if unlike:
            raise ValueError(
                f"ranks {describe(unlike)} read another batch than rank {members[0]}: the stages of a pipeline need the same "
                "samples. Give all ranks the same dataset, put one that draws random numbers into SeededItems, or let rank 0 "
                "read for all with dispatch_batches=True"
            )

    # What it declares

    def get_state_components(self) -> list[StateComponent]:
        components = super().get_state_components()
        for place, component in enumerate(components):
            if component.key in ("model", "optimizer"):
                stateful = self._share if component.key == "model" else component.stateful
                components[place] = replace(
                    component, stateful=stateful, sharing_pattern=SharingPattern.PER_RANK, names="global"
                )
        return components

    def data_component(self) -> StateComponent:
        return StateComponent("dataset", self.loader, SharingPattern.GLOBAL, on_resize=merge_positions)


def keep_own(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Leave to an optimizer the parameters that this rank's share of the model has, and their state. Groups stay, even
    empty ones: the schedule has a learning rate for each, and is the same on all ranks."""
    own = set(model.parameters())
    for group in optimizer.param_groups:
        for parameter in set(group["params"]) - own:
            optimizer.state.pop(parameter, None)
        group["params"] = [parameter for parameter in group["params"] if parameter in own]
