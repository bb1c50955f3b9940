"""Why copies drift apart in real jobs, with the real parts: the check names what differs, and nothing else."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.post_localSGD_hook import PostLocalSGDState, post_localSGD_hook
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.nn.parallel import DistributedDataParallel

from forgather_ckpt import CheckpointCoordinator, CheckpointManifest, NamedOptimizer, SharingPattern, StateComponent
from tests.components import Box, refusal, the_same
from tests.ranks import run_ranks, values

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # torch's own: it still scripts its functional optimizers
    from torch.distributed.optim import PostLocalSGDOptimizer

pytestmark = pytest.mark.multiprocess

REPLICATED = SharingPattern.REPLICATED


def names_of(report: Any) -> list[str]:
    return [item.name for difference in report.differences for item in difference.items]


def inputs_of(rank: int, step: int, width: int) -> torch.Tensor:
    return torch.randn(8, width, generator=torch.Generator().manual_seed(1000 * step + rank))


# ---- buffers that nobody sends


@pytest.mark.filterwarnings("ignore:`broadcast_buffers` is deprecated:FutureWarning")  # torch 2.11 has no other
@pytest.mark.parametrize("broadcast_buffers", [False, True])
def test_batch_norm_under_ddp_differs_in_its_running_statistics_alone(broadcast_buffers: bool, tmp_path: Path):
    """With `broadcast_buffers` DDP sends rank 0's before each forward pass; after the pass they differ again."""
    statistics = ["1.running_mean", "1.running_var"]

    def case(rank: int, world_size: int) -> Any:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))
        wrapped = DistributedDataParallel(model, broadcast_buffers=broadcast_buffers)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        for step in range(3):
            optimizer.zero_grad()
            wrapped(inputs_of(rank, step, 4)).square().mean().backward()
            optimizer.step()
        named = StateComponent("optimizer", NamedOptimizer(optimizer, [model]), REPLICATED)
        whole = StateComponent("model", model, REPLICATED, validation_level="full")
        without = StateComponent(
            "model", model, REPLICATED, validation_level="full", validation_exclude=("*running_*",)
        )
        with CheckpointCoordinator([whole, named], tmp_path, timeout_seconds=60) as coordinator:
            found = {key: names_of(report) for key, report in coordinator.validate_replication().items()}
            error = refusal(lambda: coordinator.save_checkpoint(1))
        with CheckpointCoordinator([without, named], tmp_path, timeout_seconds=60) as coordinator:
            are_equal = [report.is_equal for report in coordinator.validate_replication().values()]
            return found, error, are_equal, coordinator.save_checkpoint(1).name

    found, (kind, message), are_equal, saved = the_same(values(run_ranks(2, case)))
    assert found == {"model": statistics, "optimizer": []}
    assert kind == "ReplicaMismatch"
    assert message.startswith("'model' differs between rank 0 and rank 1 at '1.running_mean' (first at [0], max |Δ| ")
    assert (are_equal, saved) == ([True, True], "checkpoint-1")
    excluded = CheckpointManifest.load(tmp_path / saved).components["model"].excluded
    assert excluded == {"all": tuple(statistics)}


# ---- averaging now and then


def test_post_local_sgd_differs_between_averagings_and_agrees_after_one(tmp_path: Path):
    period, warmup, num_steps = 3, 2, 9

    def case(rank: int, world_size: int) -> list[Any]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))
        wrapped = DistributedDataParallel(model)
        state = PostLocalSGDState(process_group=None, subgroup=dist.new_subgroups(1)[0], start_localSGD_iter=warmup)
        wrapped.register_comm_hook(state, post_localSGD_hook)
        optimizer = PostLocalSGDOptimizer(
            optim=torch.optim.SGD(model.parameters(), lr=0.2),
            averager=PeriodicModelAverager(period=period, warmup_steps=warmup),
        )
        found = []
        with CheckpointCoordinator(
            [StateComponent("model", model, REPLICATED)], tmp_path, timeout_seconds=60
        ) as coordinator:
            for step in range(num_steps):
                optimizer.zero_grad()
                wrapped(inputs_of(rank, step, 4)).square().mean().backward()
                optimizer.step()
                found.append(names_of(coordinator.validate_replication("tensor")["model"]))
        return found

    found = the_same(values(run_ranks(2, case)))
    weights = ["0.bias", "0.weight", "2.bias", "2.weight"]
    # the averager averages where (step - warmup) is a multiple of the period; before, every step is of all ranks
    expected = [[] if step < warmup or (step - warmup) % period == 0 else weights for step in range(num_steps)]
    assert found == expected
    assert expected.count([]) > 2
    assert weights in expected


# ---- rounding that is not the same


def stochastically_rounded(weight: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """float32 to bfloat16, up with the probability of what is cut off: 16 random bits are added below the last place."""
    noise = torch.randint(0, 1 << 16, weight.shape, generator=generator, dtype=torch.int32)
    return ((weight.view(torch.int32) + noise) & -65536).view(torch.float32).to(torch.bfloat16)


def test_a_rank_that_rounds_with_another_seed_is_off_by_one_in_the_last_place(tmp_path: Path):
    def case(rank: int, world_size: int) -> Any:
        exact = torch.linspace(0.5, 4.0, 2000)  # one update of equal weights by equal gradients
        generator = torch.Generator().manual_seed(17 if rank == 1 else 16)
        weight = stochastically_rounded(exact, generator)
        bias = torch.zeros(3, dtype=torch.bfloat16)
        component = StateComponent("model", Box({"weight": weight, "bias": bias}), REPLICATED)
        with CheckpointCoordinator([component], tmp_path, timeout_seconds=60) as coordinator:
            report = coordinator.validate_replication(step=1)["model"]
        return report.differences, report.text().splitlines()[-1], weight

    results = values(run_ranks(3, case))
    differences, line = the_same([result[:2] for result in results])
    weights = [result[2].float() for result in results]
    [difference] = differences
    assert (difference.majority, difference.minority) == ((0, 2), (1,))
    [item] = difference.items
    assert (item.name, item.dtype) == ("weight", "bfloat16")
    [copy] = item.minorities
    num_different = int((weights[0] != weights[1]).sum())
    assert 100 < num_different < 2000
    assert (copy.elements.num_different, copy.elements.max_ulp) == (num_different, 1)
    assert copy.elements.max_abs == float((weights[0] - weights[1]).abs().max())
    assert f"rank 1: {num_different} of 2000 elements" in line
    assert line.endswith(", 1 ulp")
