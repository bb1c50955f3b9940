"""What the trainers of many processes have in common: joining the job, who reads the data, the mean loss."""

import os

import torch
import torch.distributed as dist

from forgather_ckpt.component import StateComponent
from forgather_ckpt.data.batches import Samples
from forgather_ckpt.data.dispatch import DispatchingLoader
from forgather_ckpt.data.loader import StatefulLoader
from forgather_ckpt.data.position import merge_positions
from forgather_ckpt.patterns import SharingPattern
from forgather_ckpt.trainers.trainer import Trainer


class DistributedTrainer(Trainer):
    """A `Trainer` in each process of `torchrun`; subclasses keep the processes in step.

    Without a default process group, one is made from torchrun's environment (NCCL on CUDA, else gloo); it stays until
    the process ends.
    """

    shared = SharingPattern.REPLICATED

    def join_job(self) -> tuple[torch.device, int, int]:
        device = self._own_device()
        if not dist.is_initialized():
            if "RANK" not in os.environ:
                raise RuntimeError(
                    f"{type(self).__name__} found no process group and no RANK in the environment: start it with torchrun, "
                    "or call torch.distributed.init_process_group first; Trainer trains in one process"
                )
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        return device, dist.get_rank(), dist.get_world_size()

    def _own_device(self) -> torch.device:
        device = torch.device(self.args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        if device.type == "cuda":
            torch.cuda.set_device(device)
        return device

    def create_loader(self, dataset: Samples | None) -> StatefulLoader:
        if self.args.dispatch_batches and dist.is_initialized():  # a single process reads for all anyway
            return DispatchingLoader(dataset, **self.loader_options())
        return super().create_loader(dataset)

    def data_component(self) -> StateComponent:
        pattern = SharingPattern.GLOBAL if self.args.dispatch_batches else SharingPattern.PER_RANK
        return StateComponent("dataset", self.loader, pattern, on_resize=merge_positions)

    def reduce_loss(self, loss: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(loss)
        return loss / self.world_size

    def reduce_sums(self, sums: torch.Tensor) -> torch.Tensor:
        if dist.is_initialized():
            dist.all_reduce(sums)
        return sums
