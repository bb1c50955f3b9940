"""HybridTrainer on meshes of dp, pp and tp: it trains as one process does, resumes to the same bits, is read by others."""

import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

from forgather_ckpt.data import SeededItems
from forgather_ckpt.manifest import CheckpointManifest
from forgather_ckpt.trainers import HybridPipelineTrainer, HybridTrainer, Trainer, TrainingArguments
from forgather_ckpt.trainers.gradients import scale_gradients, squared_norm
from tests.layouts import (
    DEATHS,
    GLOBAL_BATCH,
    Layout,
    Net,
    Sentences,
    assert_goes_on,
    live,
    local,
    order_of_reading,
    saved_and_read,
    states,
    undisturbed_lives,
    whole,
)
from tests.ranks import errors
from tests.test_pipeline import seeded, union
from tests.test_resume import (
    Hook,
    Life,
    digests,
)

pytestmark = pytest.mark.multiprocess

ONE = Layout("one")
DP_TP = Layout("hybrid", {"dp": 2, "tp": 2})
DP_PP = Layout("hybrid", {"dp": 2, "pp": 2})
DP_PP_TP = Layout("hybrid", {"dp": 2, "pp": 2, "tp": 2})
TP = Layout("hybrid", {"dp": 1, "tp": 2})
PP_DP_INTERLEAVED = Layout("hybrid", {"pp": 2, "dp": 2}, {"schedule": "interleaved_1f1b"})
TP_PP_ZERO_BUBBLE = Layout("hybrid", {"tp": 2, "dp": 1, "pp": 2}, {"schedule": "zbv"})
KINDS = [
    DP_TP,
    DP_PP,
    DP_PP_TP,
    TP,
    PP_DP_INTERLEAVED,
    TP_PP_ZERO_BUBBLE,
    Layout("hybrid", {"dp": 4}),
    Layout("hybrid", {"dp": 2, "tp": 2}, {"bf16": True}),
    Layout("hybrid", {"dp": 2, "pp": 2}, {"dataloader_num_workers": 1}),
]
NODES = [
    Layout("hybrid", {"dp": 2, "tp": 2}, nodes=(2, 2)),
    Layout("hybrid", {"dp": 2, "pp": 2}, nodes=(3, 1)),
    Layout("hybrid", {"dp": 2, "pp": 2, "tp": 2}, nodes=(4, 4)),
]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Layout], list[Life]]:
    return undisturbed_lives(tmp_path_factory)


# ---- exact resume


@pytest.mark.parametrize("kind", [*KINDS, *NODES], ids=str)
def test_b33_a_hybrid_run_that_was_stopped_goes_on_exactly(tmp_path, undisturbed, kind):
    assert_goes_on(kind, tmp_path, "a stop", undisturbed(kind))


@pytest.mark.parametrize("death", DEATHS)
@pytest.mark.parametrize("kind", [DP_TP, DP_PP, DP_PP_TP], ids=str)
def test_a_rank_that_dies_ends_all_and_the_hybrid_run_goes_on_exactly(tmp_path, undisturbed, kind, death):
    victim = kind.world_size - 1 if death == "a kill" else 0
    assert_goes_on(kind, tmp_path, death, undisturbed(kind), victim=victim)


# ---- the same training as in one process


def trained(kind: Layout, directory: Path, **options: Any) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The losses of a run without dropout, and the parameters that this rank came to."""
    trainer = kind.trainer(seeded(lambda: Net(dropout=0.0)), directory, save_strategy="no", max_steps=6, **options)
    trainer.train()
    return [loss for _, loss in trainer.history], whole(dict(trainer.model.named_parameters(remove_duplicate=False)))


@pytest.mark.parametrize("kind", KINDS[:8], ids=str)
def test_hybrid_training_is_that_of_one_process(tmp_path, kind):
    rounding = 2e-2 if "bf16" in kind.settings else 1e-5
    [(losses, parameters)] = ONE.run(lambda: trained(ONE, tmp_path))
    ranks = kind.run(lambda: trained(kind, tmp_path))
    assert all(rank[0] == ranks[0][0] for rank in ranks)
    assert ranks[0][0] == pytest.approx(losses, rel=rounding)
    merged = union([rank[1] for rank in ranks])
    assert merged.keys() == parameters.keys()
    for name, value in parameters.items():
        torch.testing.assert_close(merged[name], value, rtol=0, atol=5 * rounding, msg=name)


@pytest.mark.parametrize("kind", [DP_TP, DP_PP_TP], ids=str)
def test_optimizer_and_schedule_may_be_made_for_the_whole_model(tmp_path, kind):
    def run(kind: Layout) -> list[float]:
        model = seeded(lambda: Net(dropout=0.0))
        groups = [{"params": [*model.blocks.parameters()], "lr": 0.01}, {"params": [model.gain, model.head.weight]}]
        optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
        lr_scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
        options = {"optimizer": optimizer, "lr_scheduler": lr_scheduler, "max_steps": 5}
        trainer = kind.trainer(model, tmp_path / str(kind), **options)
        trainer.train()
        return [loss for _, loss in trainer.history]

    [losses] = ONE.run(lambda: run(ONE))
    for rank in kind.run(lambda: run(kind)):
        assert rank == pytest.approx(losses, rel=1e-5)


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "AdamW": torch.optim.AdamW,
    "Adagrad": torch.optim.Adagrad,
    "SGD": functools.partial(torch.optim.SGD, momentum=0.9),
}


@pytest.mark.parametrize("flag", ["foreach", "fused"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_an_optimizer_steps_plain_and_cut_tensors_side_by_side_and_what_it_was_told_is_kept(tmp_path, optimizer, flag):
    """Torch's operations on many tensors at once refuse such a mixture."""

    def case() -> set[Any]:
        model = Net()
        made = OPTIMIZERS[optimizer](model.parameters(), lr=0.01, **{flag: True})
        trainer = DP_TP.trainer(model, tmp_path, optimizer=made, max_steps=2)
        trainer.train()
        return {value for name, value in states(trainer)["optimizer"].items() if name.endswith(f".{flag}")}

    assert DP_TP.run(case) == [{True}] * 4


def that_has_stepped(model: nn.Module) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for parameter in model.parameters():
        parameter.grad = parameter.detach() - 0.1
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


WITH_STATE: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "Adagrad": lambda model: torch.optim.Adagrad(model.parameters(), lr=0.05, initial_accumulator_value=0.1),
    "AdamW that has stepped": that_has_stepped,
}
CUTS = [
    Layout("fsdp", {"shard": 2}),
    Layout("fsdp", {"replicate": 2, "shard": 2}),
    TP,
    Layout("pipeline", {"pp": 2}),
    DP_PP_TP,
]


@pytest.mark.parametrize("make", WITH_STATE.values(), ids=WITH_STATE)
@pytest.mark.parametrize("kind", CUTS, ids=str)
def test_the_state_that_an_optimizer_has_already_is_cut_like_its_parameters(tmp_path, kind, make):
    def life(kind: Layout) -> tuple[list[float], dict[str, Any]]:
        model = seeded(lambda: Net(dropout=0.0))
        trainer = kind.trainer(model, tmp_path / str(kind), optimizer=make(model), save_steps=1, max_steps=3)
        parameters = set(trainer.model.parameters())
        begun = whole(states(trainer)["optimizer"])
        assert {len(state) > 1 for state in trainer.optimizer.state.values()} == {True}
        assert trainer.optimizer.state.keys() == parameters
        for parameter, state in trainer.optimizer.state.items():
            parts = [local(value) for value in (parameter, *state.values()) if isinstance(value, DTensor)]
            assert all(part.untyped_storage().nbytes() == part.nbytes for part in parts[1:])
            assert {part.shape for part in parts[1:]} <= {part.shape for part in parts[:1]}
        trainer.train()
        return [loss for _, loss in trainer.history], begun

    [(losses, begun)] = ONE.run(lambda: life(ONE))
    ranks = kind.run(lambda: life(kind))
    assert digests(union([rank[1] for rank in ranks])) == digests(begun)
    for found, _ in ranks:
        assert found == pytest.approx(losses, rel=1e-5)


@pytest.mark.parametrize("kind", [CUTS[0], TP], ids=str)
def test_state_that_cannot_be_cut_like_its_parameter_is_refused_with_what_to_write(tmp_path, kind):
    def case() -> None:
        model = Net()
        optimizer = torch.optim.Adafactor(model.parameters())
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        kind.trainer(model, tmp_path, optimizer=optimizer)

    for error in errors(kind.outcomes(case)):
        assert error.type_name == "ValueError"
        assert "'row_var' of a parameter of shape [" in error.message
        assert "give an optimizer that has no state yet, or make it in create_optimizer()" in error.message


@pytest.mark.parametrize("fused", [True, None])
def test_a_run_with_a_fused_optimizer_goes_on_under_tensor_parallelism_and_back(tmp_path, fused):
    """The checkpoint's groups say that it is fused, whatever the job says."""

    def life(kind: Layout, max_steps: int) -> tuple[list[float], set[Any]]:
        model = seeded(lambda: Net(dropout=0.0))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True if kind is ONE else fused)
        settings = {"max_steps": max_steps, "lr_scheduler_type": "constant", "warmup_steps": 0}
        trainer = kind.trainer(model, directory, optimizer=optimizer, **settings)
        trainer.train()
        return [loss for _, loss in trainer.history], {group["fused"] for group in trainer.optimizer.param_groups}

    directory = tmp_path / "whole"
    [(losses, _)] = ONE.run(lambda: life(ONE, 6))
    directory = tmp_path / "parts"
    found = []
    for kind, max_steps in ((ONE, 2), (TP, 4), (ONE, 6)):
        found += kind.run(lambda kind=kind, max_steps=max_steps: life(kind, max_steps))[0][0]
    assert found == pytest.approx(losses, rel=1e-5)
    assert all(flags == {True} for _, flags in TP.run(lambda: life(TP, 6)))


def test_a_gradient_that_is_a_sum_not_yet_taken_is_taken_before_it_is_used():
    """As of parameters that are whole along tp and are used on a part of the activations."""

    def case() -> tuple[float, list[float]]:
        mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
        parameter = nn.Parameter(DTensor.from_local(torch.zeros(2), mesh, [Replicate()]))
        own = torch.tensor([3.0, 0.0]) if mesh.get_local_rank() else torch.tensor([0.0, 4.0])
        parameter.grad = DTensor.from_local(own, mesh, [Partial()])
        norm = squared_norm([parameter], torch.device("cpu")).sqrt()
        scale_gradients([parameter], norm, max_norm=0.5)
        return norm.item(), parameter.grad.to_local().tolist()

    for norm, gradient in Layout("hybrid", {"dp": 1, "tp": 2}).run(case):
        assert norm == 5.0
        assert gradient == pytest.approx([0.3, 0.4])


@pytest.mark.parametrize(
    ("dtype", "rounding"),
    [
        (torch.bfloat16, 1e-6),
        (torch.float32, 1e-6),
        (torch.float64, 1e-14),
        (torch.complex64, 1e-6),
        (torch.complex128, 1e-14),
    ],
    ids=str,
)
def test_the_norm_of_gradients_is_as_exact_as_they_are(dtype, rounding):
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.randn(n, generator=generator, dtype=dtype)) for n in (3, 5)]
    for parameter in parameters:
        parameter.grad = parameter.detach() / 3
    exact = sum(abs(complex(value)) ** 2 for one in parameters for value in one.grad.tolist())
    found = squared_norm([*parameters, nn.Parameter(torch.zeros(2))], torch.device("cpu"))
    assert found.item() == pytest.approx(exact, rel=rounding)


class Double(Net):
    """Of float64, but for buffers."""

    def __init__(self) -> None:
        super().__init__(dropout=0.0)
        for parameter in self.parameters():
            parameter.data = parameter.data.double()


@pytest.mark.parametrize(
    "kind", [DP_TP, Layout("fsdp", {"shard": 2}), Layout("fsdp", {"replicate": 2, "shard": 2})], ids=str
)
def test_a_model_of_float64_is_trained_as_by_one_process(tmp_path, kind):
    def parameters(kind: Layout) -> dict[str, torch.Tensor]:
        trainer = kind.trainer(
            seeded(Double), tmp_path / str(kind), save_strategy="no", max_steps=4, max_grad_norm=0.05
        )
        trainer.train()
        return whole(dict(trainer.model.named_parameters()))

    [expected] = ONE.run(lambda: parameters(ONE))
    for found in kind.run(lambda: parameters(kind)):
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=0, atol=1e-9, msg=name)


@pytest.mark.parametrize("kind", [DP_TP, DP_PP, DP_PP_TP], ids=str)
def test_gradients_are_clipped_by_their_norm_over_the_whole_model(tmp_path, kind):
    def case() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        model = seeded(lambda: Net(dropout=0.0))
        before = {name: value.detach().clone() for name, value in model.named_parameters()}
        sgd = torch.optim.SGD(model.parameters(), lr=1.0)
        settings = {"max_grad_norm": 0.01, "max_steps": 1, "save_strategy": "no", "lr_scheduler_type": "constant"}
        trainer = kind.trainer(model, tmp_path, optimizer=sgd, warmup_steps=0, **settings)
        trainer.train()
        after = whole(dict(trainer.model.named_parameters(remove_duplicate=False)))
        return before, after

    ranks = kind.run(case)
    before, after = ranks[0][0], union([rank[1] for rank in ranks])
    moved = torch.cat([(after[name] - value).flatten() for name, value in before.items()])
    assert moved.norm().item() == pytest.approx(0.01, rel=1e-3)


# ---- what the ranks of a mesh share


@pytest.mark.parametrize(
    ("kind", "groups"),
    [
        (DP_TP, [(0, 2), (1, 3)]),
        (DP_PP, [(0, 2), (1, 3)]),
        (PP_DP_INTERLEAVED, [(0, 1), (2, 3)]),
        (DP_PP_TP, [(0, 4), (1, 5), (2, 6), (3, 7)]),
        (TP, [(0,), (1,)]),
    ],
    ids=str,
)
def test_b1_the_group_is_the_ranks_that_hold_identical_state(tmp_path, kind, groups):
    """Of the ranks of one pipeline only the first saved, and the other stages were lost."""
    ranks = kind.run(lambda: digests(local_state(kind, tmp_path)))
    for group in groups:
        assert all(ranks[rank] == ranks[group[0]] for rank in group)
    assert len({json.dumps(ranks[group[0]], sort_keys=True) for group in groups}) == len(groups)
    manifest = CheckpointManifest.load(tmp_path / "checkpoint-1")
    assert sorted(manifest.topology.groups["dp"].sets) == groups
    components = manifest.components
    assert {key: (str(one.pattern), one.names, one.group, sorted(one.entries)) for key, one in components.items()} == {
        "model": ("per_group", "global", "dp", ["all"]),
        "optimizer": ("per_group", "global", "dp", ["all"]),
        "scheduler": ("replicated", "global", None, ["all"]),
        "trainer": ("replicated", "global", None, ["all"]),
        "callbacks": ("per_rank", "local", None, [f"rank={rank}" for rank in range(kind.world_size)]),
        "dataset": ("global", "global", None, ["all"]),
        "rng": ("per_rank", "local", None, [f"rank={rank}" for rank in range(kind.world_size)]),
    }
    model = Net()
    unique = {tensor for tensor in (*model.parameters(), *model.buffers())}
    assert components["model"].num_bytes == sum(tensor.numel() * tensor.element_size() for tensor in unique)
    moments = sum(2 * parameter.numel() * 4 + 4 for parameter in model.parameters())
    assert components["optimizer"].num_bytes == moments


def local_state(kind: Layout, directory: Path) -> dict[str, Any]:
    """What this rank has of model and optimizer after a step, made or loaded."""
    torch.manual_seed(int.from_bytes(os.urandom(4)))
    trainer = kind.trainer(Net(), directory, max_steps=1)
    trainer.train()
    found = states(trainer)
    return {
        key: {name: value.to_local() if isinstance(value, DTensor) else value for name, value in found[key].items()}
        for key in ("model", "optimizer")
    }


@pytest.mark.parametrize("kind", [DP_TP, DP_PP, DP_PP_TP], ids=str)
def test_b3_every_rank_gets_the_part_of_its_own_group_back(tmp_path, kind):
    """The first rank of a group was given another group's state, the other members nothing."""
    saved = kind.run(lambda: digests(local_state(kind, tmp_path)))
    loaded = kind.run(lambda: digests(local_state(kind, tmp_path)))  # has no step to do
    assert loaded == saved
    assert kind.run(lambda: digests(local_state(kind, tmp_path / "other"))) != saved


@pytest.mark.parametrize("kind", [DP_TP, DP_PP_TP], ids=str)
def test_ranks_of_a_row_read_the_same_samples_and_those_along_dp_others(tmp_path, kind):
    lives = kind.run(lambda: live(kind, tmp_path, max_steps=2))
    half = kind.world_size // 2
    rows = [lives[:half], lives[half:]]
    for row in rows:
        assert all(life.batches == row[0].batches for life in row)
    first, second = (life[0].batches for life in rows)
    assert not {sample for batch in first for sample in batch} & {sample for batch in second for sample in batch}


def test_ranks_along_tp_drop_out_the_same_elements_and_others_do_not(tmp_path):
    def case() -> str:
        trainer = DP_PP_TP.trainer(Net(), tmp_path, max_steps=1, save_strategy="no")
        trainer.train()
        return str(digests(torch.get_rng_state()))

    drawn = DP_PP_TP.run(case)
    assert drawn[::2] == drawn[1::2]
    assert len(set(drawn)) == 4


# ---- other layouts


@pytest.mark.parametrize(
    "kinds",
    [
        (DP_TP, ONE, DP_TP),
        (DP_PP, ONE, DP_PP_TP),
        (DP_PP_TP, DP_TP, DP_PP, ONE),
        (TP_PP_ZERO_BUBBLE, Layout("hybrid", {"dp": 4}), TP),
        (DP_PP_TP, Layout("fsdp", {"shard": 4}), Layout("pipeline", {"pp": 2}), DP_TP),
    ],
    ids=lambda kinds: " to ".join(map(str, kinds)),
)
def test_b35_other_meshes_and_trainers_go_on_from_what_was_saved(tmp_path, kinds):
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


# ---- copies that part


def flip(on_rank: int, name: str) -> Hook:
    """Change the lowest bit of an element in this rank's part of a tensor."""

    def hook(trainer: Trainer) -> None:
        if trainer.rank == on_rank and trainer.progress.step == 2:
            tensor = dict(trainer.model.named_parameters())[name].detach()
            part = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            part.view(torch.int32).view(-1)[5] ^= 1

    return hook


@pytest.mark.parametrize("level", ["quick", "tensor", "full"])
@pytest.mark.parametrize(
    ("kind", "rank", "name", "told"),
    [
        # cut along tp: two copies, along dp
        (DP_TP, 3, "blocks.2.up.weight", "rank 1 and rank 3 at 'blocks.2.up.weight[6:12,0:6]' (first at [6, 5]"),
        (
            DP_PP_TP,
            7,
            "blocks.3.down.weight",
            "rank 3 and rank 7 at 'blocks.3.down.weight[0:6,6:12]' (first at [0, 11]",
        ),
        # a stage's: two copies, along dp
        (DP_PP, 3, "blocks.3.up.weight", "rank 1 and rank 3 at 'blocks.3.up.weight' (first at [0, 5]"),
        # not cut along tp: four copies
        (DP_TP, 1, "blocks.0.norm.weight", "ranks [0, 2-3] and rank 1 at 'blocks.0.norm.weight' (first at [5]"),
        # tied across stages: four copies
        (DP_PP, 1, "embedding.weight", "ranks [0, 2-3] and rank 1 at 'embedding.weight' (first at [0, 5]"),
    ],
    ids=["cut", "cut-in-a-stage", "stage", "whole", "tied"],
)
def test_a_bit_that_differs_in_one_copy_is_found_and_named(tmp_path, level, kind, rank, name, told):
    settings = {"validate_replication_steps": 1, "validate_replication_level": level, "save_strategy": "no"}
    found = errors(kind.outcomes(lambda: live(kind, tmp_path, [flip(rank, name)], **settings)))
    assert {error.type_name for error in found} == {"ReplicaMismatch"}
    assert len({error.message for error in found}) == 1
    assert f"'model' differs between {told}" in found[0].message
    groups = "all holders (0-3)" if "ranks [" in told else f"dp ({rank - kind.world_size // 2}, {rank})"
    assert f"expected identical state in {groups}" in found[0].message


def test_models_that_are_made_differently_become_rank_0s(tmp_path):
    def case() -> dict[str, Any]:
        torch.manual_seed(torch.distributed.get_rank())
        return whole(dict(DP_PP_TP.trainer(Net(), tmp_path).model.named_parameters(remove_duplicate=False)))

    merged = union(DP_PP_TP.run(case))
    assert digests(merged) == digests(dict(seeded(Net).named_parameters(remove_duplicate=False)))


# ---- refusals


class Own(HybridTrainer):
    """A subclass that knows nothing of pipelines."""


CUT = {"blocks.*.up": ColwiseParallel(), "blocks.*.down": RowwiseParallel()}


@pytest.mark.parametrize(
    ("axes", "options", "problem"),
    [
        ({"data": 4}, {}, "mesh has the axes ('data',); name them dp, and as needed pp and tp"),
        ({"pp": 2, "tp": 2}, {}, "mesh has the axes ('pp', 'tp'); name them dp"),
        ({"dp": 2}, {}, "mesh has 2 ranks and the job 4"),
        ({"dp": 2, "tp": 2}, {"tp_plan": None}, "nothing is cut along it; say what is by tp_plan="),
        (
            {"dp": 2, "tp": 2},
            {"tp_plan": {"blocks.*.gate": ColwiseParallel()}},
            "tp_plan names 'blocks.*.gate', but Net",
        ),
        ({"dp": 2, "tp": 2}, {"tp_plan": {"head": ColwiseParallel()}}, "'embedding.weight' and 'head.weight' are one"),
        ({"dp": 2, "tp": 2}, {"fp16": True}, "use bf16=True"),
        ({"dp": 2, "tp": 2}, {"dispatch_batches": True}, "dispatch_batches=True is not for meshes"),
        ({"dp": 2, "pp": 2}, {"kind": Own}, "let Own be a subclass of HybridPipelineTrainer"),
        ({"dp": 2, "tp": 2}, {"kind": HybridPipelineTrainer, "tp_plan": CUT}, "the mesh has no axis 'pp'"),
        ({"dp": 4}, {"dataset": None}, "each rank reads its own data"),
        ({"dp": 2, "pp": 2}, {"stages": 3}, "does not go with 3 stages on 2 ranks"),
    ],
    ids=lambda value: str(value) if isinstance(value, str) else "",
)
def test_what_a_mesh_cannot_do_is_refused_with_what_to_write(tmp_path, axes, options, problem):
    def case() -> None:
        settings = {key: options[key] for key in ("fp16", "dispatch_batches") if key in options}
        given = {key: options[key] for key in ("tp_plan", "stages") if key in options}
        sizes = {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 2}
        args = TrainingArguments(tmp_path, **(sizes | settings))
        mesh = init_device_mesh("cpu", tuple(axes.values()), mesh_dim_names=tuple(axes))
        dataset = options.get("dataset", SeededItems(Sentences()))
        options.get("kind", HybridTrainer)(Net(), args, dataset, mesh=mesh, **given)

    for error in errors(Layout("hybrid", {"dp": 4}).outcomes(case)):
        assert error.type_name in ("ValueError", "TypeError"), error.traceback
        assert problem in error.message
