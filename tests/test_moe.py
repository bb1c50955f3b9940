"""The example with experts on their own ranks: no expert is lost, whatever the number of ranks that save and load."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from forgather_ckpt.data.position import GlobalPosition
from forgather_ckpt.data.sampler import epoch_order
from forgather_ckpt.demo.moe import Experts, MoEGPT, MoETrainer
from forgather_ckpt.manifest import CheckpointManifest
from forgather_ckpt.trainers import Trainer, TrainingArguments
from tests.layouts import states
from tests.ranks import errors, run_ranks, values
from tests.test_pipeline import Windows, cloned, union
from tests.test_resume import (
    NUM_STEPS,
    Life,
    Stop,
    assert_continues,
    at_step,
    digests,
    fail,
    in_order_of_reading,
    kill,
    stop,
)

pytestmark = pytest.mark.multiprocess

GLOBAL_BATCH = 16
Mesh = tuple[int, int]
"""The lengths of dp and ep."""
EXPERTS_ON_4, EXPERTS_ON_2, TWO_COPIES, ONE = (1, 4), (1, 2), (2, 2), (1, 1)


class Numbered(Windows):
    """Windows that know their numbers."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"id": index, "window": super().__getitem__(index)}


def make(
    mesh: Mesh, directory: Path, *, batches: list[list[int]] | None = None, dropout: float = 0.1, **options: Any
) -> Trainer:
    """A trainer of this rank; in one process a `Trainer`. What it reads is added to `batches`."""

    def loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        if batches is not None:
            batches.append(batch["id"].tolist())
        return model(batch["window"])

    hooks = options.pop("on_step_end", ())
    defaults: dict[str, Any] = {
        "max_steps": NUM_STEPS,
        "per_device_train_batch_size": GLOBAL_BATCH // 2 // (mesh[0] * mesh[1]),
        "gradient_accumulation_steps": 2,
        "learning_rate": 0.01,
        "max_grad_norm": 0.5,
        "logging_steps": 1,
        "save_steps": 4,
        "lr_scheduler_type": "constant",
        "resume_from_checkpoint": "auto",
        "checkpoint_timeout_seconds": 30,
    }
    args = TrainingArguments(directory, **(defaults | options))
    model = MoEGPT(num_experts=4, context=8, width=16, num_heads=2, num_layers=2, dropout=dropout)
    if mesh == ONE:
        return Trainer(model, args, Numbered(), compute_loss=loss, on_step_end=hooks)
    on = init_device_mesh("cpu", mesh, mesh_dim_names=("dp", "ep"))
    return MoETrainer(model, args, Numbered(), mesh=on, compute_loss=loss, on_step_end=hooks)


def run(mesh: Mesh, case: Any, **options: Any) -> Any:
    return run_ranks(mesh[0] * mesh[1], case, backend=None if mesh == ONE else "gloo", timeout=100, **options)


def live(mesh: Mesh, directory: Path, **options: Any) -> Life:
    batches: list[list[int]] = []
    torch.manual_seed(1 + len(list(directory.glob("checkpoint-*"))))
    trainer = make(mesh, directory, batches=batches, **options)
    trainer.train()
    losses = [(step, value.hex()) for step, value in trainer.history]
    return Life(trainer.history[0][0], batches, losses, digests(states(trainer)))


@pytest.mark.parametrize("mesh", [EXPERTS_ON_4, TWO_COPIES], ids=str)
@pytest.mark.parametrize("death", [stop, fail, kill])
def test_b33_a_run_that_died_goes_on_exactly(tmp_path, mesh, death):
    whole = values(run(mesh, lambda rank, size: live(mesh, tmp_path / "whole")))
    victim = mesh[0] * mesh[1] - 1

    def first_life(rank: int, size: int) -> None:
        if death is stop:
            with pytest.raises(Stop):
                live(mesh, tmp_path / "cut", on_step_end=[at_step(6, stop)])
        else:
            live(mesh, tmp_path / "cut", on_step_end=[at_step(6, death)] if rank == victim else [])

    nodes = [3, 1]
    run(mesh, first_life, expect_dead=[victim] if death is kill else [], nodes=nodes)
    assert CheckpointManifest.load(tmp_path / "cut" / "checkpoint-4").topology.nodes == ((0, 1, 2), (3,))
    resumed = values(run(mesh, lambda rank, size: live(mesh, tmp_path / "cut"), nodes=nodes))
    assert_continues(resumed, whole, from_step=4)


@pytest.mark.parametrize("mesh", [EXPERTS_ON_4, EXPERTS_ON_2, TWO_COPIES], ids=str)
def test_experts_on_their_own_ranks_train_as_in_one_process(tmp_path, mesh):
    def trained(mesh: Mesh) -> tuple[list[float], dict[str, torch.Tensor]]:
        torch.manual_seed(0)
        trainer = make(mesh, tmp_path, dropout=0.0, max_steps=5, save_strategy="no")
        trainer.train()
        return [loss for _, loss in trainer.history], cloned(trainer.model.state_dict())

    [(losses, state)] = values(run(ONE, lambda rank, size: trained(ONE)))
    ranks = values(run(mesh, lambda rank, size: trained(mesh)))
    merged = union([rank[1] for rank in ranks])
    assert merged.keys() == state.keys()
    for rank in ranks:
        assert rank[0] == pytest.approx(losses, rel=1e-5)
    for name, value in state.items():
        torch.testing.assert_close(merged[name], value, rtol=0, atol=1e-4, msg=name)


def saved_and_read(mesh: Mesh, directory: Path, max_steps: int) -> tuple[dict[str, Any], list[int], list[set[str]]]:
    """All tensors and values of model and optimizer at the end of a life, the samples read, and the experts of each rank."""

    def life(rank: int, size: int) -> tuple[dict[str, Any], dict[str, Any], list[list[int]]]:
        batches: list[list[int]] = []
        trainer = make(mesh, directory, batches=batches, max_steps=max_steps)
        trainer.train()
        found = states(trainer)
        return cloned(found["model"]), cloned(found["optimizer"]), batches

    ranks = values(run(mesh, life))
    merged = {**union([one for one, _, _ in ranks]), **union([other for _, other, _ in ranks])}
    experts = [set(re.findall(r"blocks\.0\.mlp\.experts\.(\d)\.0\.weight", " ".join(one))) for one, _, _ in ranks]
    return merged, in_order_of_reading([batches for _, _, batches in ranks]), experts


@pytest.mark.parametrize(
    "meshes",
    [(EXPERTS_ON_4, EXPERTS_ON_2, ONE), (ONE, EXPERTS_ON_4), (TWO_COPIES, EXPERTS_ON_4, TWO_COPIES)],
    ids=str,
)
def test_b35_other_numbers_of_ranks_go_on_with_all_experts(tmp_path, meshes):
    before, read, _ = saved_and_read(meshes[0], tmp_path, 1)
    for life, mesh in enumerate(meshes[1:], start=1):
        loaded, nothing, experts = saved_and_read(mesh, tmp_path, life)  # has no step to do
        assert nothing == []
        assert digests(loaded) == digests(before)
        assert [len(own) for own in experts] == [4 // mesh[1]] * mesh[0] * mesh[1]
        assert set().union(*experts) == {"0", "1", "2", "3"}
        before, more, _ = saved_and_read(mesh, tmp_path, life + 1)
        assert digests(before) != digests(loaded)
        read += more
    assert read == epoch_order(GlobalPosition(len(Windows()), seed=42)).tolist()[: len(read)]
    assert len(read) == GLOBAL_BATCH * len(meshes)


@pytest.mark.parametrize("mesh", [EXPERTS_ON_4, TWO_COPIES], ids=str)
def test_each_expert_is_stored_once(tmp_path, mesh):
    values(run(mesh, lambda rank, size: make(mesh, tmp_path, max_steps=1).train()))
    component = CheckpointManifest.load(tmp_path / "checkpoint-1").components["model"]
    model = MoEGPT(num_experts=4, context=8, width=16, num_heads=2, num_layers=2)
    assert (str(component.pattern), sorted(component.entries)) == ("per_group", ["all"])
    assert component.num_bytes == sum(parameter.numel() * 4 for parameter in model.parameters())


@pytest.mark.parametrize(
    ("mesh", "rank", "name", "told"),
    [
        (TWO_COPIES, 3, "blocks.1.mlp.experts.2.0.bias", "rank 1 and rank 3 at 'blocks.1.mlp.experts.2.0.bias'"),
        (TWO_COPIES, 2, "blocks.1.mlp.router.weight", "ranks [0-1, 3] and rank 2 at 'blocks.1.mlp.router.weight'"),
        (EXPERTS_ON_4, 1, "norm.weight", "ranks [0, 2-3] and rank 1 at 'norm.weight'"),
    ],
)
def test_copies_that_part_are_found_and_named(tmp_path, mesh, rank, name, told):
    def flip(trainer: Trainer) -> None:
        if trainer.rank == rank:
            trainer.model.get_parameter(name).detach().view(torch.int32).view(-1)[3] ^= 1

    outcomes = run(mesh, lambda rank, size: live(mesh, tmp_path, on_step_end=[at_step(4, lambda: None), flip]))
    for error in errors(outcomes):
        assert error.type_name == "ReplicaMismatch"
        assert f"'model' differs between {told}" in error.message


def test_an_expert_without_tokens_learns_nothing_and_nobody_waits_for_it(tmp_path):
    def case(rank: int, size: int) -> list[bool]:
        torch.manual_seed(0)
        trainer = make(EXPERTS_ON_4, tmp_path, max_steps=2, save_strategy="no")
        for module in trainer.model.modules():
            if isinstance(module, Experts):
                module.router.weight.data.zero_()  # all experts are rated alike, and the first one is chosen
                module.router.weight.requires_grad_(False)
        before = cloned(trainer.model.state_dict())
        trainer.train()
        after = trainer.model.state_dict()
        return [torch.equal(before[name], after[name]) for name in before if ".experts." in name]

    first, *others = values(run(EXPERTS_ON_4, case))
    assert not any(first)
    assert all(all(rank) for rank in others)


def test_experts_that_cannot_be_dealt_out_evenly_are_refused(tmp_path):
    outcomes = run((1, 3), lambda rank, size: make((1, 3), tmp_path))
    for error in errors(outcomes):
        assert "4 experts cannot be dealt out evenly to 3 ranks" in error.message


def test_the_example_says_how_it_is_used():
    done = subprocess.run(
        [sys.executable, "-m", "forgather_ckpt.demo.moe"], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 1
    assert "usage: [torchrun" in done.stderr
