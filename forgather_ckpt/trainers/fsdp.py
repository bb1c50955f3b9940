"""The training loop on many processes, each of which has a part of every parameter, with FSDP2 (`fully_shard`)."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from forgather_ckpt.component import StateComponent
from forgather_ckpt.data.batches import Batch, Samples
from forgather_ckpt.patterns import ValidationLevel
from forgather_ckpt.trainers.arguments import TrainingArguments
from forgather_ckpt.trainers.distributed import DistributedTrainer
from forgather_ckpt.trainers.gradients import broadcast_from_first, renew, scale_gradients, squared_norm
from forgather_ckpt.trainers.trainer import unwrapped


def blocks_of(model: nn.Module) -> Iterator[nn.Module]:
    """The modules in a model's ModuleLists; of lists inside others, those in the outermost."""
    for child in model.children():
        if isinstance(child, nn.ModuleList):
            yield from (block for block in child if not isinstance(block, nn.ModuleList | nn.ModuleDict))
        else:
            yield from blocks_of(child)


class FSDPTrainer(DistributedTrainer):
    """A `Trainer` in each process of `torchrun`; parameters, gradients and optimizer state are cut over the processes.

        FSDPTrainer(model, args, dataset).train()
        FSDPTrainer(model, args, dataset, mesh=init_device_mesh("cuda", (2, 4), mesh_dim_names=("replicate", "shard")))

    `mesh` covers all ranks: of one axis, over which everything is cut (the default); of two, everything is cut over the
    second and copied over the first (HSDP). `shard` says which modules are gathered and let go by themselves, by name
    or by a function of the model; by default each block in a ModuleList. What is left is gathered with the model
    itself. Parameters that are tied must be in one of these units.

    Every rank gives the whole model, on the CPU if the device has no room for it, and rank 0's values are taken. It is
    cut in place. An `optimizer` may be made for it before; it is given the parameters that take the places of those it
    had. With bf16 or fp16, parameters are gathered in that type and gradients summed in float32. Buffers are not cut;
    after each step all ranks get rank 0's, as under DDP.

    Every rank reads samples of its own, and draws random numbers of its own.
    """

    model_validation = ValidationLevel.TENSOR

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        train_dataset: Samples | None,
        *,
        mesh: DeviceMesh | None = None,
        shard: Sequence[str] | Callable[[nn.Module], Iterable[nn.Module]] = blocks_of,
        optimizer: torch.optim.Optimizer | None = None,
        **options: Any,
    ) -> None:
        self._mesh = mesh
        self._shard = shard
        self._given_optimizer = optimizer
        super().__init__(model, args, train_dataset, optimizer=optimizer, **options)

    def take_model(self, model: nn.Module) -> nn.Module:
        module = unwrapped(model)
        if any(isinstance(part, FSDPModule) for part in module.modules()):
            raise ValueError(
                "the model is in fully_shard already; give it as it was before, and say how to cut it by shard="
            )
        if any(parameter.is_meta for parameter in module.parameters()):
            raise ValueError(
                "the model is on the meta device and has no values; make it on the CPU, where it is taken from"
            )
        mesh = self._mesh or init_device_mesh(self.device.type, (self.world_size,), mesh_dim_names=("shard",))
        if mesh.size() != self.world_size or mesh.ndim > 2 or mesh.mesh_dim_names is None:
            raise ValueError(
                f"mesh has the shape {tuple(mesh.shape)} in a job of {self.world_size} ranks, and the names "
                f"{mesh.mesh_dim_names}; give one with named axes over all ranks, one of them or two (replicate, shard)"
            )
        units = units_in(module, self._shard)
        broadcast_from_first((*module.parameters(), *module.buffers()), self.device)
        policy = MixedPrecisionPolicy(
            param_dtype=self.args.autocast_dtype, reduce_dtype=torch.float32 if self.args.autocast_dtype else None
        )
        before = list(module.parameters()) if self._given_optimizer is not None else []
        for unit in units:
            fully_shard(unit, mesh=mesh, mp_policy=policy)
        if self._given_optimizer is not None:
            renew(self._given_optimizer, dict(zip(before, module.parameters(), strict=True)))
        return module.to(self.device)

    def training_step(self, batches: Sequence[Batch]) -> torch.Tensor:
        loss = super().training_step(batches)
        broadcast_from_first(self.model.buffers(), self.device)
        return loss

    def gradient_exchange(self, is_last: bool) -> AbstractContextManager[None]:
        assert isinstance(self.model, FSDPModule)
        self.model.set_requires_gradient_sync(is_last)
        return nullcontext()

    def clip_gradients(self) -> torch.Tensor:
        norm = squared_norm(self.model.parameters(), self.device).sqrt()
        scale_gradients(self.model.parameters(), norm, self.args.max_grad_norm)
        return norm

    def evaluate(self) -> dict[str, float]:
        metrics = super().evaluate()
        self._reshard()
        return metrics

    def get_state_components(self) -> list[StateComponent]:
        self._reshard()
        return super().get_state_components()

    def _reshard(self) -> None:
        """After a forward pass without a backward one, parameters are whole."""
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def units_in(model: nn.Module, shard: Sequence[str] | Callable[[nn.Module], Iterable[nn.Module]]) -> list[nn.Module]:
    """The modules to cut by themselves, inner ones before those that they are in, and last the model.

    `ValueError` where a name is none, or where parameters are tied across units.
    """
    names = {module: name for name, module in model.named_modules()}
    if isinstance(shard, str):
        raise ValueError("shard= is one name; give a list of names")
    if callable(shard):
        chosen = set(shard(model))
        if not chosen <= names.keys():
            raise ValueError("shard= returned a module that is not in the model")
    else:
        if unknown := sorted(set(shard) - set(names.values())):
            raise ValueError(f"shard= names {unknown[0]!r}, but {type(model).__name__} has no such module")
        chosen = {module for module, name in names.items() if name in shard}
    units = [*reversed([module for module in names if module in chosen and module is not model]), model]
    owners: dict[nn.Parameter, tuple[nn.Module, str]] = {}
    of_module: dict[nn.Module, nn.Module] = {}
    for unit in units:
        for module in unit.modules():
            of_module.setdefault(module, unit)
    for module, path in names.items():
        for name, parameter in module.named_parameters(path, recurse=False):
            owner, other = owners.setdefault(parameter, (of_module[module], name))
            if owner is not of_module[module]:
                raise ValueError(
                    f"{other!r} and {name!r} are one parameter, in two modules that shard= cuts by themselves; let the module "
                    "that has both be the one to be cut"
                )
    return units
