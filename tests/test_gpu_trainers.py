"""The trainers on real GPUs, with NCCL: run by `pytest -m gpu`; ranks without a GPU of their own share one."""

from __future__ import annotations

import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from forgather_ckpt import CheckpointCoordinator, SharingPattern, StateComponent, catalog, comparison, device_digest
from forgather_ckpt.sharded import local_part
from forgather_ckpt.trainers import Trainer
from tests.components import Box, refusal, the_same
from tests.layouts import Layout, assert_goes_on, live, saved_and_read, undisturbed_lives
from tests.ranks import run_ranks, values
from tests.test_evaluation import trained
from tests.test_resume import NUM_STEPS, assert_continues, digests

pytestmark = [pytest.mark.gpu, pytest.mark.multiprocess]

def layout(kind: str, **axes: int) -> Layout:
    return Layout(kind, axes, device="cuda")


ONE = Layout("one", device="cuda")
DDP, FSDP, PIPELINE = layout("ddp", dp=2), layout("fsdp", shard=2), layout("pipeline", pp=2)
TP, DP_TP, DP_PP = layout("hybrid", dp=1, tp=2), layout("hybrid", dp=2, tp=2), layout("hybrid", dp=2, pp=2)
KINDS = [
    *(DDP, FSDP, PIPELINE, TP, DP_TP, DP_PP),
    layout("fsdp", copies=2, shard=1),
    layout("fsdp", copies=2, shard=2),
    layout("hybrid", dp=2, tp=1),
    layout("hybrid", dp=1, pp=2),
]


@pytest.fixture(autouse=True)
def deterministic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_run_that_was_stopped_goes_on_exactly(tmp_path: Path, tmp_path_factory: Any, kind: Layout):
    assert_goes_on(kind, tmp_path, "a stop", undisturbed_lives(tmp_path_factory)(kind))


@pytest.mark.parametrize(
    "kinds",
    [
        (DDP, FSDP, ONE),
        (PIPELINE, TP, FSDP),
        (layout("fsdp", shard=4), FSDP, layout("ddp", dp=4)),
        (DP_TP, layout("hybrid", dp=1, tp=4), DP_PP, PIPELINE, ONE),
    ],
    ids=str,
)
def test_another_layout_loads_the_same_bits(tmp_path: Path, kinds: tuple[Layout, ...]):
    before, _ = saved_and_read(kinds[0], tmp_path, 1)
    for life, kind in enumerate(kinds[1:], start=1):
        loaded, _ = saved_and_read(kind, tmp_path, life)
        assert digests(loaded) == digests(before)
        before, _ = saved_and_read(kind, tmp_path, life + 1)


@pytest.mark.parametrize("kind", [ONE, DDP, FSDP, PIPELINE, DP_TP, DP_PP], ids=str)
def test_training_is_the_same_to_the_bit_with_and_without_evaluations(tmp_path: Path, kind: Layout):
    without = kind.run(lambda: trained(kind, tmp_path, every=None))
    evaluated = kind.run(lambda: trained(kind, tmp_path, every=1))
    assert [rank[:2] for rank in evaluated] == [rank[:2] for rank in without]
    metrics = evaluated[0][2]
    assert [step for step, _ in metrics] == [1, 2, 3, 4, 5]
    assert all(rank[2] == metrics for rank in evaluated)


@pytest.mark.parametrize("kind", [ONE, DDP, FSDP, PIPELINE, DP_TP], ids=str)
def test_a_signal_to_one_rank_leaves_an_emergency_checkpoint_and_the_run_goes_on_exactly(
    tmp_path: Path, tmp_path_factory: Any, kind: Layout
):
    def terminate_the_last(trainer: Trainer) -> None:
        if trainer.progress.step == 5 and trainer.rank == kind.world_size - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    kind.run(lambda: live(kind, tmp_path, [terminate_the_last]))
    newest = catalog.scan(tmp_path).checkpoints[0].manifest
    assert newest.kind == "emergency"
    assert 5 <= newest.step < NUM_STEPS
    resumed = kind.run(lambda: live(kind, tmp_path))
    assert_continues(resumed, undisturbed_lives(tmp_path_factory)(kind), from_step=newest.step)


# ---- parts on a device; two ranks may share one, and then speak gloo

SHAPE = (1030, 1027)


def on_gpus(mesh: tuple[int, ...], case: Any) -> list[Any]:
    def on_gpu(rank: int, world_size: int) -> Any:
        torch.cuda.set_device(rank % torch.cuda.device_count())
        return case(rank, init_device_mesh("cuda", mesh))

    return values(run_ranks(math.prod(mesh), on_gpu, timeout=100))


def save(run: Path, step: int, mesh: tuple[int, ...], placements: list[Placement]) -> None:
    def case(rank: int, on: Any) -> None:
        whole = torch.arange(math.prod(SHAPE), dtype=torch.float32, device="cuda").view(SHAPE)
        own = distribute_tensor(whole, on, placements, src_data_rank=None)
        with CheckpointCoordinator(
            [StateComponent("m", Box({"w": own}), SharingPattern.REPLICATED)], run
        ) as coordinator:
            coordinator.save_checkpoint(step)
            local_part(own).zero_()
            coordinator.load_checkpoint(step)
            assert torch.equal(
                local_part(own), local_part(distribute_tensor(whole, on, placements, src_data_rank=None))
            )

    on_gpus(mesh, case)


def test_parts_on_gpus_add_up_to_the_digest_of_the_whole_and_load_in_place(tmp_path: Path):
    layouts: list[tuple[tuple[int, ...], list[Placement]]] = [
        ((1,), [Replicate()]),
        ((2,), [Shard(0)]),
        ((3,), [Shard(1)]),
        ((2, 2), [Replicate(), Shard(1)]),
    ]
    found = []
    for step, (mesh, placements) in enumerate(layouts, start=1):
        save(tmp_path, step, mesh, placements)
        checkpoint = catalog.read_checkpoint(tmp_path / f"checkpoint-{step}")
        path, manifest = checkpoint.path, checkpoint.manifest
        parts = [entry for name in manifest.indexes for entry in catalog.read_index(path, manifest, name).entries]
        content = comparison.items(parts)["w"].content
        assert isinstance(content, comparison.StoredTensor)
        found.append(comparison.device_digests(content))
    whole = torch.arange(math.prod(SHAPE), dtype=torch.float32).view(SHAPE)
    assert found == [list(device_digest.block_digests([whole])[0])] * len(layouts)


@pytest.mark.parametrize("level", ["quick", "tensor", "full"])
def test_a_part_on_a_gpu_that_differs_is_named(tmp_path: Path, level: str):
    def case(rank: int, on: Any) -> Any:
        own = distribute_tensor(torch.ones(SHAPE, device="cuda"), on, [Replicate(), Shard(1)], src_data_rank=None)
        assert isinstance(own, DTensor)
        if rank == 3:
            local_part(own)[1000, 7] += 0.5
        declared = [StateComponent("m", Box({"w": own}), SharingPattern.REPLICATED, validation_level=level)]  # type: ignore[arg-type]
        with CheckpointCoordinator(declared, tmp_path) as coordinator:
            return refusal(lambda: coordinator.save_checkpoint(1))

    _, message = the_same(on_gpus((2, 2), case))
    assert "differs between rank 1 and rank 3 at 'w[0:1030,514:1027]' (first at [1000, 521], max |Δ| 0.5)" in message
