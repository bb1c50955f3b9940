"""The training loop on many processes, with `DistributedDataParallel`."""

from contextlib import AbstractContextManager, nullcontext

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from forgather_ckpt.trainers.replicated import ReplicatedTrainer


class DDPTrainer(ReplicatedTrainer):
    """A `Trainer` in each process of `torchrun`, kept in step by `DistributedDataParallel`.

    The models need not be made alike: DDP gives all ranks rank 0's. With `dispatch_batches=True`, only rank 0 needs a
    `train_dataset`.
    """

    wrapped: DistributedDataParallel

    def replicate(self, model: nn.Module) -> DistributedDataParallel:
        return DistributedDataParallel(model, device_ids=[self.device] if self.device.type == "cuda" else None)

    def gradient_exchange(self, is_last: bool) -> AbstractContextManager[None]:
        return nullcontext() if is_last else self.wrapped.no_sync()
