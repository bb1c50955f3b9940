"""FSDPTrainer: it trains as one process does, resumes to the same bits, and its checkpoints are read by others."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from forgather_ckpt.manifest import CheckpointManifest
from forgather_ckpt.trainers import FSDPTrainer, Trainer, TrainingArguments
from forgather_ckpt.trainers.fsdp import blocks_of, units_in
from tests.layouts import (
    DEATHS,
    GLOBAL_BATCH,
    Layout,
    Net,
    Sentences,
    assert_goes_on,
    live,
    order_of_reading,
    saved_and_read,
    states,
    undisturbed_lives,
    whole,
)
from tests.ranks import errors
from tests.test_pipeline import seeded
from tests.test_resume import (
    Life,
    digests,
)

pytestmark = pytest.mark.multiprocess

ONE = Layout("one")
FSDP_2, FSDP_4, FSDP_8 = (Layout("fsdp", {"shard": size}) for size in (2, 4, 8))
HSDP = Layout("fsdp", {"replicate": 2, "shard": 2})
KINDS = [
    FSDP_2,
    FSDP_4,
    FSDP_8,
    HSDP,
    Layout("fsdp", {"replicate": 2, "shard": 2}, nodes=(2, 2)),
    Layout("fsdp", {"shard": 3}, {"per_device_train_batch_size": 2}, nodes=(2, 1)),
    Layout("fsdp", {"shard": 2}, {"bf16": True}),
    Layout("fsdp", {"shard": 2}, {"fp16": True}),
    Layout("fsdp", {"shard": 2}, {"dispatch_batches": True}),
]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Layout], list[Life]]:
    return undisturbed_lives(tmp_path_factory)


# ---- exact resume


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_b33_a_sharded_run_that_was_stopped_goes_on_exactly(tmp_path, undisturbed, kind):
    assert_goes_on(kind, tmp_path, "a stop", undisturbed(kind))


@pytest.mark.parametrize("death", DEATHS)
@pytest.mark.parametrize("kind", [FSDP_2, HSDP], ids=str)
def test_a_rank_that_dies_ends_all_and_the_sharded_run_goes_on_exactly(tmp_path, undisturbed, kind, death):
    for victim in (0, kind.world_size - 1):
        assert_goes_on(kind, tmp_path / str(victim), death, undisturbed(kind), victim=victim)


# ---- the same training as in one process


def trained(kind: Layout, directory: Path, **options: Any) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The losses of a run without dropout, and the parameters that it came to."""
    trainer = kind.trainer(seeded(lambda: Net(dropout=0.0)), directory, save_strategy="no", max_steps=6, **options)
    trainer.train()
    return [loss for _, loss in trainer.history], whole(dict(trainer.model.named_parameters()))


@pytest.mark.parametrize("kind", [FSDP_2, FSDP_8, HSDP, KINDS[6]], ids=str)
def test_sharded_training_is_that_of_one_process(tmp_path, kind):
    one = Layout("one", settings=kind.settings)
    rounding = 2e-2 if kind.settings else 1e-5
    [(losses, parameters)] = one.run(lambda: trained(one, tmp_path, per_device_train_batch_size=8))
    for rank in kind.run(lambda: trained(kind, tmp_path)):
        assert rank[0] == pytest.approx(losses, rel=rounding)
        assert rank[1].keys() == parameters.keys()
        for name, value in parameters.items():
            torch.testing.assert_close(rank[1][name], value, rtol=0, atol=5 * rounding, msg=name)


@pytest.mark.parametrize("shard", [blocks_of, ["blocks.1", "blocks.1.norm"], [], lambda model: model.blocks])
def test_what_is_gathered_together_changes_nothing(tmp_path, shard):
    [(losses, _)] = ONE.run(lambda: trained(ONE, tmp_path))
    for rank in FSDP_2.run(lambda: trained(FSDP_2, tmp_path, shard=shard)):
        assert rank[0] == pytest.approx(losses, rel=1e-5)


def test_an_optimizer_may_be_made_before_the_model_is_cut(tmp_path):
    def run(kind: Layout) -> list[float]:
        model = seeded(lambda: Net(dropout=0.0))
        groups = [{"params": [*model.blocks.parameters()], "lr": 0.01}, {"params": [model.gain, model.head.weight]}]
        optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
        lr_scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
        trainer = kind.trainer(model, tmp_path / str(kind), optimizer=optimizer, lr_scheduler=lr_scheduler, max_steps=5)
        trainer.train()
        return [loss for _, loss in trainer.history]

    [losses] = ONE.run(lambda: run(ONE))
    for rank in FSDP_2.run(lambda: run(FSDP_2)):
        assert rank == pytest.approx(losses, rel=1e-5)


def test_gradients_are_exchanged_once_a_step_and_clipped_by_their_norm_over_all_ranks(tmp_path):
    def case() -> tuple[float, bool]:
        model = seeded(lambda: Net(dropout=0.0))
        before = {name: value.detach().clone() for name, value in model.named_parameters()}
        sgd = torch.optim.SGD(model.parameters(), lr=1.0)
        settings = {"max_grad_norm": 0.01, "max_steps": 1, "save_strategy": "no", "lr_scheduler_type": "constant"}
        trainer = FSDP_2.trainer(model, tmp_path, optimizer=sgd, **settings, warmup_steps=0)
        shapes = []
        trainer.clip_gradients = lambda clip=trainer.clip_gradients: (  # type: ignore[method-assign]
            shapes.extend(parameter.grad.shape == parameter.shape for parameter in trainer.model.parameters()),
            clip(),
        )
        trainer.train()
        moved = [(value - before[name]).flatten() for name, value in whole(dict(model.named_parameters())).items()]
        return torch.cat(moved).norm().item(), all(shapes)

    for norm, has_gradients in FSDP_2.run(case):
        assert norm == pytest.approx(0.01, rel=1e-3)
        assert has_gradients


def test_an_overflow_on_one_rank_is_one_on_all(tmp_path):
    kind = KINDS[7]

    def case() -> tuple[bool, int, float]:
        def infinite(model: nn.Module, batch: Any) -> torch.Tensor:
            loss: torch.Tensor = model(batch)
            return loss * float("inf") if trainer.rank == 1 else loss

        model = seeded(Net)
        before = {name: value.detach().clone() for name, value in model.named_parameters()}
        trainer = kind.trainer(model, tmp_path, compute_loss=infinite, max_steps=1, save_strategy="no")
        trainer.train()
        after = whole(dict(trainer.model.named_parameters()))
        return digests(after) == digests(before), trainer.lr_scheduler.last_epoch, trainer.scaler.get_scale()

    assert kind.run(case) == [(True, 0, 2.0**15)] * 2


# ---- what a checkpoint holds, and who reads it


def test_parameters_and_moments_are_stored_once_and_by_all(tmp_path):
    kind = FSDP_4
    kind.run(lambda: live(kind, tmp_path, max_steps=1))
    components = CheckpointManifest.load(tmp_path / "checkpoint-1").components
    assert {key: (str(one.pattern), one.names, sorted(one.entries)) for key, one in components.items()} == {
        "model": ("replicated", "global", ["all"]),
        "optimizer": ("replicated", "global", ["all"]),
        "scheduler": ("replicated", "global", ["all"]),
        "trainer": ("replicated", "global", ["all"]),
        "callbacks": ("per_rank", "local", [f"rank={rank}" for rank in range(4)]),
        "dataset": ("per_rank", "local", [f"rank={rank}" for rank in range(4)]),
        "rng": ("per_rank", "local", [f"rank={rank}" for rank in range(4)]),
    }
    model = Net()
    unique = {tensor for tensor in (*model.parameters(), *model.buffers())}
    assert components["model"].num_bytes == sum(tensor.numel() * tensor.element_size() for tensor in unique)
    moments = sum(2 * parameter.numel() * 4 + 4 for parameter in model.parameters())
    assert components["optimizer"].num_bytes == moments
    assert [len(components[key].writers) for key in ("model", "optimizer")] == [4, 4]


def test_no_rank_ever_has_more_than_its_part(tmp_path):
    def case() -> list[bool]:
        trainer = FSDP_4.trainer(Net(), tmp_path, max_steps=1)
        trainer.train()
        sharded = [*states(trainer)["model"].items(), *states(trainer)["optimizer"].items()]
        return [
            isinstance(value, DTensor) and value.to_local().numel() <= -(-value.shape[0] // 4) * value.stride(0)
            for name, value in sharded
            if name in dict(trainer.model.named_parameters()) or name.endswith(("exp_avg", "exp_avg_sq"))
        ]

    for rank in FSDP_4.run(case):
        assert len(rank) > 60
        assert all(rank)


@pytest.mark.parametrize(
    "kinds",
    [
        (FSDP_2, ONE, FSDP_4),
        (FSDP_8, HSDP, ONE),
        (HSDP, Layout("ddp", {"dp": 2}), FSDP_8),
        (ONE, FSDP_4, FSDP_2),
    ],
    ids=lambda kinds: " to ".join(map(str, kinds)),
)
def test_b35_other_world_sizes_and_trainers_go_on_from_what_was_saved(tmp_path, kinds):
    before, read = saved_and_read(kinds[0], tmp_path, 1)
    for life, kind in enumerate(kinds[1:], start=1):
        loaded, nothing = saved_and_read(kind, tmp_path, life)  # has no step to do
        assert nothing == []
        assert digests(loaded) == digests(before)
        before, more = saved_and_read(kind, tmp_path, life + 1)
        assert digests(before) != digests(loaded)
        read += more
    assert len(read) == GLOBAL_BATCH * len(kinds)
    assert read == order_of_reading(len(read))


def test_a_model_may_be_evaluated_between_steps(tmp_path):
    """After a forward pass alone, parameters are whole until the next one."""

    def evaluate(trainer: Trainer) -> None:
        trainer.wrapped.eval()
        with torch.no_grad():
            trainer.wrapped(batch)
        trainer.wrapped.train()

    batch = {"tokens": torch.zeros(1, 5, dtype=torch.int64), "targets": torch.zeros(1, 5, dtype=torch.int64)}
    for life in FSDP_2.run(lambda: live(FSDP_2, tmp_path, [evaluate], save_steps=1, max_steps=3)):
        assert life.first_step == 1
    assert CheckpointManifest.load(tmp_path / "checkpoint-3").step == 3


# ---- copies that part


def flip(trainer: Trainer) -> None:
    """Change the lowest bit of one element in the part of rank 3, whose copy rank 1 has."""
    if trainer.rank == 3 and trainer.progress.step == 2:
        weight = trainer.model.get_parameter("blocks.2.up.weight")
        weight.to_local().detach().view(torch.int32)[1, 4] ^= 1


@pytest.mark.parametrize("level", ["quick", "tensor", "full"])
def test_a_bit_that_differs_in_one_copy_of_a_part_is_found_and_named(tmp_path, level):
    settings = {"validate_replication_steps": 1, "validate_replication_level": level, "save_strategy": "no"}
    outcomes = HSDP.outcomes(lambda: live(HSDP, tmp_path, [flip], **settings))
    told = errors(outcomes)
    assert {error.type_name for error in told} == {"ReplicaMismatch"}
    assert len({error.message for error in told}) == 1
    assert (
        "'model' differs between rank 1 and rank 3 at 'blocks.2.up.weight[6:12,0:6]' (first at [7, 4]"
        in told[0].message
    )


def test_a_save_finds_a_part_that_differs_too(tmp_path):
    for error in errors(HSDP.outcomes(lambda: live(HSDP, tmp_path, [flip], save_steps=2))):
        assert error.type_name == "ReplicaMismatch"
    assert not list(tmp_path.glob("checkpoint-*"))


def test_buffers_that_drift_are_rank_0s_after_each_step(tmp_path):
    def case() -> list[dict[str, str]]:
        found: list[dict[str, str]] = []
        hook = lambda trainer: found.append(digests(dict(trainer.model.named_buffers())))  # noqa: E731
        FSDP_2.trainer(Net(), tmp_path, on_step_end=[hook], max_steps=2, save_strategy="no").train()
        return found

    first, second = FSDP_2.run(case)
    assert first == second
    assert first[0] != first[1]


def test_models_that_are_made_differently_become_rank_0s(tmp_path):
    def case() -> dict[str, str]:
        torch.manual_seed(torch.distributed.get_rank())
        return digests(whole(dict(FSDP_2.trainer(Net(), tmp_path).model.named_parameters())))

    first, second = FSDP_2.run(case)
    torch.manual_seed(0)
    assert first == second == digests(dict(Net().named_parameters()))


# ---- refusals


def tied_blocks() -> Net:
    model = Net()
    model.blocks[3].up.weight = model.blocks[1].up.weight
    return model


def sharded() -> Net:
    model = Net()
    fully_shard(model)
    return model


@pytest.mark.parametrize(
    ("make", "options", "problem"),
    [
        (Net, {"shard": ["blocks.7"]}, "shard= names 'blocks.7', but Net has no such module"),
        (Net, {"shard": "blocks.1"}, "shard= is one name; give a list of names"),
        (Net, {"shard": lambda model: [nn.Linear(1, 1)]}, "returned a module that is not in the model"),
        (tied_blocks, {}, "'blocks.1.up.weight' and 'blocks.3.up.weight' are one parameter, in two modules"),
        (sharded, {}, "the model is in fully_shard already"),
        (lambda: Net().to("meta"), {}, "the model is on the meta device"),
    ],
)
def test_what_cannot_be_sharded_is_refused_with_what_to_write(tmp_path, make, options, problem):
    for error in errors(FSDP_2.outcomes(lambda: FSDP_2.trainer(make(), tmp_path, **options))):
        assert error.type_name == "ValueError"
        assert problem in error.message


@pytest.mark.parametrize(("shape", "names"), [((1,), ("shard",)), ((2, 1, 1), ("a", "b", "c")), ((2,), None)], ids=str)
def test_a_mesh_of_another_form_is_refused(tmp_path, shape, names):
    def case() -> None:
        FSDPTrainer(
            Net(), TrainingArguments(tmp_path), Sentences(), mesh=init_device_mesh("cpu", shape, mesh_dim_names=names)
        )

    for error in errors(FSDP_2.outcomes(case)):
        assert f"mesh has the shape {shape} in a job of 2 ranks, and the names {names}" in error.message


def test_blocks_are_the_modules_in_the_outermost_lists():
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.ModuleList([Net(1), Net(2)])
            self.stack = nn.Sequential(nn.Linear(1, 1), Net(1))

    model = Nested()
    assert [*blocks_of(model)] == [model.first[0], model.first[1], model.stack[1].blocks[0]]
    assert units_in(model, blocks_of)[-1] is model
    inner_first = units_in(model, ["first.1", "first.1.blocks.0"])
    assert inner_first == [model.first[1].blocks[0], model.first[1], model]
