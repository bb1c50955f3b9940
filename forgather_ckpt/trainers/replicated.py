"""What the trainers share in which every rank holds the whole model, and `DistributedDataParallel` keeps them alike."""

import logging

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from forgather_ckpt.patterns import ValidationLevel
from forgather_ckpt.trainers.distributed import DistributedTrainer
from forgather_ckpt.trainers.trainer import unwrapped

logger = logging.getLogger(__name__)


class ReplicatedTrainer(DistributedTrainer):
    """A `DistributedTrainer` whose ranks hold copies of one model; subclasses say in `replicate` how it is wrapped."""

    model_validation = ValidationLevel.TENSOR

    def wrap_model(self, model: nn.Module) -> nn.Module:
        if isinstance(unwrapped(model), DistributedDataParallel):
            raise ValueError(
                f"the model is in DistributedDataParallel already, and {type(self).__name__} would put it there again: give "
                "the module inside, model.module"
            )
        wrapped = self.replicate(model)
        ddp = unwrapped(wrapped)
        self.ddp = ddp if isinstance(ddp, DistributedDataParallel) else None
        """None in one process that is no job."""
        if self.ddp is not None:
            lay_out_buckets(self.ddp)
        return wrapped

    def replicate(self, model: nn.Module) -> nn.Module:
        """The model in `DistributedDataParallel`, where there are other ranks."""
        raise NotImplementedError

    def evaluate(self) -> dict[str, float]:
        """With rank 0's buffers on all ranks, and afterwards each with its own again: what DDP makes of them it does at
        its own time."""
        own = [(buffer, buffer.clone()) for buffer in self.model.buffers()]
        self.settle_copies()
        try:
            return super().evaluate()
        finally:
            for buffer, before in own:
                buffer.copy_(before)

    @property
    def evaluated_model(self) -> nn.Module:
        """The module inside DDP, which would exchange buffers, and so wait for ranks that have fewer batches."""
        return self.wrapped if self.ddp is None else self.ddp.module

    def settle_copies(self) -> None:
        """Buffers such as BatchNorm's differ until DDP copies rank 0's over the others', before the next forward pass.
        Doing that now changes nothing in the training."""
        if self.ddp is not None and self.ddp.broadcast_buffers:
            for buffer in self.model.buffers():
                dist.broadcast(buffer, src=0)


def lay_out_buckets(model: DistributedDataParallel) -> None:
    """Have DDP decide now, and not after its first backward pass, which gradients it sums in one buffer.

    The order in which more than two ranks add up a gradient depends on its place in the buffer, and float sums
    depend on the order. Left alone, DDP sums the first step of every process in one layout and all later ones
    in another: the first step after a resume would then differ in the last bits from the undisturbed run.

    DDP goes by the order in which gradients came in its first backward pass. So it is given one, of zeros, in
    which they come from the last parameter to the first, as they do in models that use them in order.
    """
    module = model.module
    if any(getattr(part, "sparse", False) for part in module.modules()):
        logger.warning("sparse gradients: a resume on more than two ranks is not exact to the last bit")
        return
    if model.static_graph:  # what it learns of the graph in its first pass holds for all others
        logger.warning("static_graph=True: a resume on more than two ranks is not exact to the last bit")
        return
    model.module = _ZeroLoss(module)
    try:
        model(torch.zeros((), device=next(module.parameters()).device)).backward()
    finally:
        model.module = module
    model.zero_grad(set_to_none=True)


class _ZeroLoss(nn.Module):
    """A loss of zero on all parameters of a module; autograd goes through them from the last to the first."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, zero: torch.Tensor) -> torch.Tensor:  # on CUDA, DDP wants an input
        used = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
        return zero + torch.stack([parameter.sum().float() * 0 for parameter in used]).sum()
