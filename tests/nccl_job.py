"""Run by torchrun in test_gpu.py: an NCCL-only default group, every pattern, exact restore.

Prints `exact: <number of ranks>` from rank 0 when everything held.
"""

import os
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from forgather_ckpt import CheckpointCoordinator, NamedOptimizer, RNGState, SharingPattern, StateComponent, bytewise
from forgather_ckpt.errors import RankFailed, ReplicaMismatch


class Holder:
    def __init__(self, state: dict[str, Any]) -> None:
        self.state = state

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state


class Job:
    """DDP on GPUs: bf16 and fp32 parameters, dropout, a fused optimizer whose step counters live on the device."""

    def __init__(self, device: torch.device, seed: int) -> None:
        torch.manual_seed(seed)
        rank = dist.get_rank()
        self.device = device
        self.model = nn.Sequential(nn.Linear(256, 1024), nn.Dropout(0.2), nn.Linear(1024, 256)).to(device)
        self.model[2].to(torch.bfloat16)
        self.wrapped = DistributedDataParallel(self.model, device_ids=[device.index])
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, fused=True)
        self.cache = Holder({"table": torch.arange(8 + seed, 16 + seed, device=device), "rank": rank})
        self.stage = Holder({f"stage.{rank}.weight": torch.full((3, 5), float(rank + seed), device=device)})

    def train(self, steps: int) -> list[float]:
        losses = []
        for _ in range(steps):
            inputs = torch.randn(16, 256, device=self.device)
            hidden = self.wrapped.module[1](self.wrapped.module[0](inputs)).to(torch.bfloat16)
            loss = self.wrapped.module[2](hidden).float().pow(2).mean()
            loss.backward()
            for parameter in self.model.parameters():
                dist.all_reduce(parameter.grad, op=dist.ReduceOp.AVG)
            self.optimizer.step()
            self.optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    def get_state_components(self) -> list[StateComponent]:
        return [
            StateComponent("model", self.model, SharingPattern.REPLICATED, validation_level="tensor"),
            StateComponent("optimizer", NamedOptimizer(self.optimizer, [self.model]), SharingPattern.REPLICATED),
            StateComponent("cache", self.cache, SharingPattern.PER_NODE),
            StateComponent("stage", self.stage, SharingPattern.PER_RANK, names="global"),
            StateComponent("rng", RNGState(), SharingPattern.PER_RANK),
        ]


LEVELS = ("quick", "tensor", "full")


def check_that_copies_are_compared(job: Job, coordinator: CheckpointCoordinator) -> None:
    """On the devices, through NCCL at FULL; equal copies first, then one element that differs on rank 1."""
    for level in LEVELS:
        assert all(report.is_equal for report in coordinator.validate_replication(level).values())
    assert "cuda" in {device for _, device in coordinator._job.channels._open}
    check_that_a_failure_leaves_full_usable(coordinator)
    weight = job.model[0].weight
    before = weight[17, 4].item()
    with torch.no_grad():
        if dist.get_rank() == 1:
            weight[17, 4] += 2**-10
    for level in LEVELS:
        reports = coordinator.validate_replication(level)
        assert [key for key, report in reports.items() if not report.is_equal] == ["model"], reports
        [item] = reports["model"].differences[0].items
        [copy] = item.minorities
        assert (item.name, item.majority, copy.ranks) == ("0.weight", (0,), (1,)), item
        assert (copy.elements.num_different, copy.elements.first_index) == (1, (17, 4)), copy
    try:
        coordinator.save_checkpoint(6)
    except ReplicaMismatch as err:
        assert "'0.weight' (first at [17, 4]" in err.message, err
    else:
        raise AssertionError("a difference between the replicas was not seen")
    with torch.no_grad():
        weight[17, 4] = before
    assert coordinator.save_checkpoint(6).name == "checkpoint-6"


def check_that_full_takes_little_memory(device: torch.device, directory: str) -> None:
    """Of 1 GiB in tensors of all sizes, 256 MiB more."""
    sizes = [1 << 28, 1 << 27, *[20 << 20] * 12, *[50_001] * 8000]
    state = {f"t{number}": torch.ones(size, dtype=torch.uint8, device=device) for number, size in enumerate(sizes)}
    state["transposed"] = torch.ones(4096, 20_000, device=device).t()
    component = StateComponent("model", Holder(state), SharingPattern.REPLICATED)
    with CheckpointCoordinator([component], directory) as coordinator:
        for level in LEVELS:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            assert all(report.is_equal for report in coordinator.validate_replication(level).values())
            more = torch.cuda.max_memory_allocated() - before
            assert more <= 256 << 20, f"{level}: {more} bytes"


def check_that_a_failure_leaves_full_usable(coordinator: CheckpointCoordinator) -> None:
    compare = bytewise._differing_slots
    if dist.get_rank() == 1:
        bytewise._differing_slots = None  # type: ignore[assignment]  # calling it raises
    try:
        coordinator.validate_replication("full")
    except RankFailed as err:
        assert err.rank == 1, err
    else:
        raise AssertionError("a rank failed, and the check said nothing")
    bytewise._differing_slots = compare
    assert all(report.is_equal for report in coordinator.validate_replication("full").values())


def share_gpus(node: str) -> None:
    """Have NCCL (tests/gpus.py), and FULL, take the GPU that this node has together with others for one of its own."""
    os.environ["NCCL_HOSTID"] = node
    device_of = bytewise._device_of
    bytewise._device_of = lambda holding: (name := device_of(holding)) and f"{name} of {node}"


def main(run_directory: str) -> None:
    if os.environ["GROUP_WORLD_SIZE"] != "1":
        share_gpus(f"node {os.environ['GROUP_RANK']}")
    dist.init_process_group("nccl")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    first = Job(device, seed=0)
    torch.manual_seed(100 + dist.get_rank())
    first.train(3)
    with CheckpointCoordinator(first, run_directory, timeout_seconds=60) as coordinator:
        coordinator.save_checkpoint(3)
        expected = first.train(3)
        second = Job(device, seed=7)
        with CheckpointCoordinator(second, run_directory, timeout_seconds=60) as other:
            report = other.load_checkpoint()
        assert set(report.loaded) == {"model", "optimizer", "cache", "stage", "rng"}, report
        assert second.train(3) == expected
        for key in ("exp_avg", "exp_avg_sq", "step"):
            for one, two in zip(first.model.parameters(), second.model.parameters(), strict=True):
                saved, loaded = first.optimizer.state[one][key], second.optimizer.state[two][key]
                assert loaded.device == saved.device and loaded.dtype == saved.dtype and torch.equal(loaded, saved)
        first_of_node = dist.get_rank() - int(os.environ["LOCAL_RANK"])
        assert second.cache.state["rank"] == first_of_node and second.cache.state["table"].tolist() == list(range(8, 16))
        assert torch.equal(
            second.stage.state[f"stage.{dist.get_rank()}.weight"].cpu(), torch.full((3, 5), float(dist.get_rank()))
        )
        check_that_copies_are_compared(first, coordinator)
        check_that_full_takes_little_memory(device, f"{run_directory}-large")
    if dist.get_rank() == 0:
        print(f"exact: {dist.get_world_size()}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
