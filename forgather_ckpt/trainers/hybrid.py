"""The training loop on a mesh of processes: data parallel along one axis, tensor and pipeline parallel along others.

Eight ranks on the axes dp, pp and tp, each two long. A rank has one of four parts of the model: a stage (pp), and a
half (tp) of those tensors that are cut. The ranks that have the same part lie along dp:

                   pp=0               pp=1
               tp=0    tp=1       tp=0    tp=1
      dp=0       0       1          2       3
                 |       |          |       |        identical state: (0, 4) (1, 5) (2, 6) (3, 7)
      dp=1       4       5          6       7

So the group that PER_GROUP asks for is "dp": its members have the same bytes, which are compared and stored once. The
ranks of one pipeline, (0, 2), or of one cut tensor, (0, 1), have different ones, and must not be declared as a group.
What follows from the place on dp alone is the share of the data: the ranks of a row work on the same samples.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import ParallelStyle, parallelize_module

from forgather_ckpt.component import StateComponent
from forgather_ckpt.data.batches import Batch, Samples
from forgather_ckpt.data.loader import StatefulLoader
from forgather_ckpt.data.position import merge_positions
from forgather_ckpt.patterns import SharingPattern, ValidationLevel
from forgather_ckpt.trainers.arguments import TrainingArguments
from forgather_ckpt.trainers.distributed import DistributedTrainer
from forgather_ckpt.trainers.gradients import (
    average_gradients,
    broadcast_from_first,
    renew,
    scale_gradients,
    squared_norm,
)
from forgather_ckpt.trainers.pipeline import PipelineTrainer
from forgather_ckpt.trainers.trainer import unwrapped

AXES = ("dp", "pp", "tp")


class HybridTrainer(DistributedTrainer):
    """A `Trainer` in each process of `torchrun`, on a `DeviceMesh` over all of them with axes named dp, pp and tp.

        mesh = init_device_mesh("cuda", (4, 2), mesh_dim_names=("dp", "tp"))
        plan = {"blocks.*.mlp.0": ColwiseParallel(), "blocks.*.mlp.2": RowwiseParallel()}
        HybridTrainer(model, args, dataset, mesh=mesh, tp_plan=plan).train()

    Along dp the ranks have copies, whose gradients are averaged here (`DistributedDataParallel` over tensor parallelism
    loses the parameters). Along tp, the modules in `tp_plan` are cut, as by torch's `parallelize_module`; keys may hold
    `*` for one level of the name. With an axis pp, this makes a `HybridPipelineTrainer`. An axis may be 1 long.

    Every rank gives the whole model, and rank 0's values are taken. It is cut in place. An `optimizer` may be made for
    it before; it is given the parameters that take the places of those it had.

    Ranks along tp compute the same thing on what is not cut, so they draw from one random stream: there they drop out
    the same elements. Inside a cut region each then drops out the same places of its own part.
    """

    model_validation = ValidationLevel.TENSOR

    def __new__(cls, *args: Any, mesh: DeviceMesh, **options: Any) -> "HybridTrainer":
        if "pp" in (mesh.mesh_dim_names or ()) and not issubclass(cls, HybridPipelineTrainer):
            if cls is not HybridTrainer:
                raise TypeError(f"the mesh has an axis 'pp': let {cls.__name__} be a subclass of HybridPipelineTrainer")
            return super().__new__(HybridPipelineTrainer)
        return super().__new__(cls)

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        train_dataset: Samples | None,
        *,
        mesh: DeviceMesh,
        tp_plan: Mapping[str, ParallelStyle] | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        **options: Any,
    ) -> None:
        names = mesh.mesh_dim_names or ()
        if "dp" not in names or not set(names) <= set(AXES):
            raise ValueError(f"mesh has the axes {names}; name them dp, and as needed pp and tp (dp may be 1 long)")
        if args.dispatch_batches:
            raise ValueError(
                "dispatch_batches=True is not for meshes: ranks that work on the same samples each read them"
            )
        if args.fp16:
            raise ValueError(
                "fp16 needs its loss scaled, which torch cannot do for cut and whole tensors together; use bf16=True"
            )
        self.mesh = mesh
        self.tp_plan = dict(tp_plan or {})
        if self.length("tp") > 1 and not tp_plan:
            raise ValueError("the mesh has an axis 'tp', and nothing is cut along it; say what is by tp_plan=")
        for pattern in self.tp_plan:
            if not matching(unwrapped(model), pattern):
                raise ValueError(f"tp_plan names {pattern!r}, but {type(unwrapped(model)).__name__} has no such module")
        self._given_optimizer = optimizer
        super().__init__(model, args, train_dataset, optimizer=optimizer, **options)
        if self.length("tp") > 1:
            step_one_by_one(self.optimizer)

    def join_job(self) -> tuple[torch.device, int, int]:
        device, rank, world_size = super().join_job()
        if self.mesh.size() != world_size:
            raise ValueError(f"mesh has {self.mesh.size()} ranks and the job {world_size}; give one over all ranks")
        return device, rank, world_size

    # The place on the mesh

    def length(self, axis: str) -> int:
        """How long an axis is; 1 if the mesh does not have it."""
        names = self.mesh.mesh_dim_names or ()
        return self.mesh.size(names.index(axis)) if axis in names else 1

    def place(self, axis: str) -> int:
        """This rank's place on an axis; 0 if the mesh does not have it."""
        return self.mesh.get_local_rank(axis) if self.length(axis) > 1 else 0

    @property
    def random_stream(self) -> int:
        return self.place("dp") + self.length("dp") * self.place("pp")

    # The model's part

    def take_model(self, model: nn.Module) -> nn.Module:
        self.begin_alike(model)
        return self.parallelize(super().take_model(model))

    def begin_alike(self, model: nn.Module) -> None:
        module = unwrapped(model)
        broadcast_from_first((*module.parameters(), *module.buffers()), self.device)

    def parallelize(self, module: nn.Module) -> nn.Module:
        """Cut along tp what is to be cut of what this rank has."""
        if self.length("tp") == 1:
            return module
        before = dict(module.named_parameters(remove_duplicate=False))
        plan = {pattern: style for pattern, style in self.tp_plan.items() if matching(module, pattern)}
        parallelize_module(module, self.mesh["tp"], plan)
        after = dict(module.named_parameters(remove_duplicate=False))
        place: dict[nn.Parameter, tuple[str, nn.Parameter]] = {}
        for name, parameter in before.items():
            other, now = place.setdefault(parameter, (name, after[name]))
            if now is not after[name]:
                raise ValueError(
                    f"{other!r} and {name!r} are one parameter, and tp_plan would make two of it; leave out the modules that "
                    "have it"
                )
        if self._given_optimizer is not None:
            renew(self._given_optimizer, {old: new for old, (_, new) in place.items()})
        return module

    # The data

    def create_loader(self, dataset: Samples | None) -> StatefulLoader:
        if dataset is None:
            raise ValueError("each rank reads its own data, and needs train_dataset=")
        return StatefulLoader(dataset, rank=self.place("dp"), world_size=self.length("dp"), **self.loader_options())

    # One step

    def training_step(self, batches: Sequence[Batch]) -> torch.Tensor:
        loss = super().training_step(batches)
        broadcast_from_first(self.model.buffers(), self.device, self.mesh.get_group("dp"))
        return loss

    def combine_gradients(self) -> None:
        average_gradients(self.model.parameters(), self.mesh.get_group("dp"))
        super().combine_gradients()

    def clip_gradients(self) -> torch.Tensor:
        norm = squared_norm(self.model.parameters(), self.device).sqrt()
        scale_gradients(self.model.parameters(), norm, self.args.max_grad_norm)
        return norm

    def reduce_loss(self, loss: torch.Tensor) -> torch.Tensor:
        """The mean over dp of what the ranks have that are first on tp, in one sum that all ranks get."""
        loss = loss if self.place("tp") == 0 else torch.zeros_like(loss)
        dist.all_reduce(loss)
        return loss / self.length("dp")

    def reduce_sums(self, sums: torch.Tensor) -> torch.Tensor:
        return super().reduce_sums(sums if self.place("tp") == 0 else torch.zeros_like(sums))

    @property
    def data_share(self) -> tuple[int, int]:
        return self.place("dp"), self.length("dp")

    # What it declares

    def get_process_groups(self) -> DeviceMesh:
        return self.mesh

    def get_state_components(self) -> list[StateComponent]:
        components = super().get_state_components()
        for number, component in enumerate(components):
            if component.key in ("model", "optimizer"):
                components[number] = replace(
                    component, sharing_pattern=SharingPattern.PER_GROUP, process_group_name="dp", names="global"
                )
        return components

    def data_component(self) -> StateComponent:
        return StateComponent("dataset", self.loader, SharingPattern.GLOBAL, on_resize=merge_positions)


class HybridPipelineTrainer(HybridTrainer, PipelineTrainer):
    """A `HybridTrainer` whose mesh has an axis pp: a `PipelineTrainer` along it, with the same options, in each place on
    the others.

        mesh = init_device_mesh("cuda", (2, 4), mesh_dim_names=("dp", "pp"))
        HybridTrainer(model, args, dataset, mesh=mesh, schedule="interleaved_1f1b").train()
    """

    def __init__(self, *args: Any, mesh: DeviceMesh, **options: Any) -> None:
        if "pp" not in (mesh.mesh_dim_names or ()):
            raise ValueError("the mesh has no axis 'pp', along which a pipeline could lie; use HybridTrainer")
        super().__init__(*args, mesh=mesh, **options)

    @property
    def pipeline_group(self) -> dist.ProcessGroup:
        return self.mesh.get_group("pp")

    def take_model(self, model: nn.Module) -> nn.Module:
        self.begin_alike(model)
        return PipelineTrainer.take_model(self, model)  # which cuts along tp once the stages are apart

    def clip_gradients(self) -> torch.Tensor:
        return PipelineTrainer.clip_gradients(self)


def matching(module: nn.Module, pattern: str) -> list[str]:
    """The submodules that a key of a `tp_plan` names."""
    levels = pattern.split(".")
    return [
        name
        for name, _ in module.named_modules()
        if len(parts := name.split(".")) == len(levels) and all(map(fnmatchcase, parts, levels))
    ]


def step_one_by_one(optimizer: torch.optim.Optimizer) -> None:
    """Have an optimizer step one parameter at a time: torch's operations on many tensors refuse plain ones beside DTensors.
    The groups say so during the step only, as what they say at other times is saved, and is not for other layouts.

    A step counter on its parameter's device, as fused steps need it, does for single ones too.
    """
    asked: list[dict[str, Any]] = []

    def before(*_: Any) -> None:
        asked[:] = [
            {key: group[key] for key in ("foreach", "fused") if key in group} for group in optimizer.param_groups
        ]
        for group, flags in zip(optimizer.param_groups, asked, strict=True):
            group.update(dict.fromkeys(flags, False))

    def after(*_: Any) -> None:
        for group, flags in zip(optimizer.param_groups, asked, strict=True):
            group.update(flags)

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(after)
