"""Pipelines: they train as one process does, resume to the same bits, and go on with other stages and other trainers."""

import functools
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, StepLR
from torch.utils.data import default_collate

from forgather_ckpt import CheckpointCoordinator, load_component
from forgather_ckpt.data import SeededItems
from forgather_ckpt.data.position import GlobalPosition
from forgather_ckpt.data.sampler import epoch_order
from forgather_ckpt.demo.gpt import GPT
from forgather_ckpt.errors import LoadMismatch
from forgather_ckpt.manifest import CheckpointManifest
from forgather_ckpt.matching import renamed
from forgather_ckpt.trainers import DDPTrainer, Part, PipelineTrainer, Trainer, TrainingArguments
from forgather_ckpt.trainers.stages import Cut, Share, dealt, parts_of, pruned
from tests.ranks import errors, run_ranks, values
from tests.test_resume import (
    NUM_STEPS,
    Hook,
    Life,
    Stop,
    assert_continues,
    at_step,
    digests,
    fail,
    kill,
    kill_in_state_dict,
    stop,
)

pytestmark = pytest.mark.multiprocess

NUM_SAMPLES, NUM_TOKENS, WIDTH = 101, 16, 8
MICRO_BATCH, NUM_MICRO_BATCHES = 2, 4


class Sentences:
    """Token ids, noisy in another way in every epoch, and what to tell from each."""

    def __len__(self) -> int:
        return NUM_SAMPLES

    def __getitem__(self, index: int) -> dict[str, Any]:
        tokens = torch.randint(NUM_TOKENS, (5,), generator=torch.Generator().manual_seed(index))
        tokens[0] = torch.randint(NUM_TOKENS, ())
        return {"id": index, "tokens": tokens, "targets": (tokens + 1) % NUM_TOKENS}


class Block(nn.Module):
    """With dropout, and with buffers that count the batches it has seen."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.BatchNorm1d(WIDTH)
        self.dropout = nn.Dropout(0.25)

    def forward(self, x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        return x + self.dropout(self.norm(torch.tanh(self.linear(x * table)).transpose(1, 2)).transpose(1, 2))


class Tower(nn.Module):
    """Blocks that share a table, between an embedding and a head that are tied."""

    def __init__(self, num_blocks: int = 6, dropout: float | None = None) -> None:
        super().__init__()
        self.embedding = nn.Embedding(NUM_TOKENS, WIDTH)
        self.register_buffer("table", torch.linspace(0.5, 1.5, WIDTH))
        self.blocks = nn.ModuleList(Block() for _ in range(num_blocks))
        self.head = nn.Linear(WIDTH, NUM_TOKENS, bias=False)
        self.head.weight = self.embedding.weight
        if dropout is not None:
            for block in self.blocks:
                block.dropout.p = dropout

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        x = self.embed(batch)
        for number in range(len(self.blocks)):
            x = self.block(x, f"{number}")
        return self.pipeline_loss(self.head(x), batch)

    def embed(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.embedding(batch["tokens"])

    def block(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return getattr(self.blocks, name)(x, self.table)

    def pipeline_parts(self) -> list[Part]:
        blocks = [
            Part([f"blocks.{name}", "table"], functools.partial(Tower.block, name=name))
            for name in self.blocks._modules
        ]
        return [Part("embedding", type(self).embed), *blocks, Part("head")]

    def pipeline_loss(self, logits: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return nn.functional.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten())


@dataclass(frozen=True)
class Kind:
    """A way to train; without a schedule, a `Trainer` or a `DDPTrainer`."""

    schedule: str | None
    world_size: int
    num_stages: int = 1
    settings: tuple[tuple[str, Any], ...] = ()
    nodes: tuple[int, ...] | None = None

    def __str__(self) -> str:
        name = self.schedule or ("DDP" if self.world_size > 1 else "one process")
        nodes = [] if self.nodes is None else [f"nodes {self.nodes}"]
        return "-".join([name, f"{self.num_stages} on {self.world_size}", *nodes, *(key for key, _ in self.settings)])

    def trainer(self, model: nn.Module, directory: Path, dataset: Any = None, **options: Any) -> Trainer:
        """A trainer; what is no option of trainers is a setting."""
        own = {
            "on_step_end",
            "data_collator",
            "optimizer",
            "lr_scheduler",
            "compute_loss",
            "parts",
            "stages",
            "schedule",
        }
        defaults: dict[str, Any] = {
            "max_steps": NUM_STEPS,
            "per_device_train_batch_size": MICRO_BATCH,
            "gradient_accumulation_steps": NUM_MICRO_BATCHES,
            "learning_rate": 0.01,
            "max_grad_norm": 0.5,
            "warmup_steps": 2,
            "logging_steps": 1,
            "save_steps": 4,
            "resume_from_checkpoint": "auto",
            "checkpoint_timeout_seconds": 30,
        }
        settings = {key: value for key, value in options.items() if key not in own}
        args = TrainingArguments(directory, **(defaults | dict(self.settings) | settings))
        given = {key: value for key, value in options.items() if key in own}
        dataset = SeededItems(Sentences()) if dataset is None else dataset
        if self.schedule is not None:
            stages = {"schedule": self.schedule, "stages": self.num_stages}
            return PipelineTrainer(model, args, dataset, **(stages | given))
        kind = DDPTrainer if self.world_size > 1 else Trainer
        return kind(model, args, dataset, **({"compute_loss": lambda model, batch: model(batch)} | given))

    def run(self, case: Callable[[], Any], **options: Any) -> list[Any]:
        """What `case` comes to on each rank; `expect_dead=`, `raw=True`: the outcomes."""
        raw = options.pop("raw", False)
        backend = None if self.schedule is None and self.world_size == 1 else "gloo"
        outcomes = run_ranks(
            self.world_size, lambda rank, world_size: case(), backend=backend, nodes=self.nodes, **options
        )
        return outcomes if raw else values(outcomes)


ONE = Kind(None, 1)
DDP = Kind(None, 2)
KINDS = [
    Kind("1f1b", 1, 1),
    Kind("1f1b", 2, 2),
    Kind("1f1b", 4, 4),
    Kind("gpipe", 2, 2),
    Kind("gpipe", 4, 4),
    Kind("interleaved_1f1b", 1, 4),
    Kind("interleaved_1f1b", 2, 4),
    Kind("interleaved_zero_bubble", 2, 4),
    Kind("zbv", 1, 2),
    Kind("zbv", 2, 4),
    Kind("1f1b", 2, 2, (("dispatch_batches", True),)),
    Kind("1f1b", 2, 2, (("dataloader_num_workers", 2),)),
    Kind("interleaved_1f1b", 2, 4, (("bf16", True),)),
]
DEATHS = [KINDS[2], KINDS[6], KINDS[7], KINDS[9]]
NODES = [Kind("1f1b", 4, 4, nodes=(2, 2)), Kind("zbv", 3, 6, nodes=(2, 1))]


def live(kind: Kind, run: Path, hooks: Sequence[Hook] = ()) -> Life:
    """One life of one rank: train, resuming if there is something to resume."""
    batches: list[list[int]] = []

    def collate(items: list[dict[str, Any]]) -> Any:
        batches.append([item["id"] for item in items])
        return default_collate(items)

    # Another model in each life and on each rank: what a run resumes with must come from the checkpoint.
    torch.manual_seed(int.from_bytes(os.urandom(4)) if any(run.glob("checkpoint-*")) else 1)
    trainer = kind.trainer(Tower(), run, on_step_end=hooks, data_collator=collate)
    trainer.train()
    state = {c.key: c.stateful.state_dict() for c in trainer.get_state_components() if c.stateful is not None}
    losses = [(step, value.hex()) for step, value in trainer.history]
    return Life(trainer.history[0][0], batches, losses, digests(state))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Kind], list[Life]]:
    """What every rank comes to in a run of this kind that nothing disturbs."""

    @cache
    def of(kind: Kind) -> list[Life]:
        directory = tmp_path_factory.mktemp("undisturbed")
        return kind.run(lambda: live(kind, directory))

    return of


# ---- exact resume


@pytest.mark.parametrize("kind", [*KINDS, *NODES], ids=str)
def test_b33_a_pipeline_that_was_stopped_goes_on_exactly(tmp_path, undisturbed, kind):
    def first_life() -> None:
        with pytest.raises(Stop):
            live(kind, tmp_path, [at_step(NUM_STEPS // 2, stop)])

    kind.run(first_life)
    assert_continues(kind.run(lambda: live(kind, tmp_path)), undisturbed(kind), from_step=4)


DEADLY: dict[str, Hook] = {
    "an exception": at_step(6, fail),
    "a kill": at_step(6, kill),
    "a kill in mid-save": kill_in_state_dict,
}


@pytest.mark.parametrize("death", DEADLY)
@pytest.mark.parametrize("kind", DEATHS, ids=str)
def test_a_stage_that_dies_ends_all_and_the_pipeline_goes_on_exactly(tmp_path, undisturbed, kind, death):
    for victim in {0, kind.world_size - 1}:
        run = tmp_path / str(victim)

        def first_life(run: Path = run, victim: int = victim) -> None:
            live(kind, run, [lambda trainer: DEADLY[death](trainer) if trainer.rank == victim else None])

        outcomes = kind.run(first_life, raw=True, expect_dead=[victim])
        assert all(outcome.is_dead or outcome.error is not None for outcome in outcomes)
        assert outcomes[victim].is_dead == (death != "an exception")
        assert_continues(kind.run(lambda run=run: live(kind, run)), undisturbed(kind), from_step=4)


# ---- the same training as in one process


def trained(kind: Kind, model: nn.Module, directory: Path, **options: Any) -> tuple[list[float], dict[str, Any], int]:
    trainer = kind.trainer(model, directory, save_strategy="no", **options)
    trainer.train()
    return [loss for _, loss in trainer.history], cloned(trainer.model.state_dict()), trainer.progress.step


def cloned(state: dict[str, Any]) -> dict[str, Any]:
    return {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in state.items()}


def union(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """By name what the ranks have; what several have must be equal bit for bit."""
    merged: dict[str, Any] = {}
    for state in states:
        for name, value in state.items():
            known = merged.setdefault(name, value)
            assert digests(known) == digests(value), name
    return merged


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make()


class Windows:
    """Windows of bytes, as the demo's GPT takes them."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(index)
        return torch.randint(256, (9,), generator=generator).to(torch.uint8)


MODELS: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "a model with tied weights and shared buffers": lambda: (Tower(dropout=0.0), SeededItems(Sentences())),
    "the demo's GPT": lambda: (GPT(context=8, width=16, num_heads=2, num_layers=6, dropout=0.0), Windows()),
}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("kind", [*KINDS[:10], Kind("zbv", 4, 8), KINDS[12]], ids=str)
def test_a_pipeline_trains_as_one_process_does(tmp_path, kind, model):
    def run(kind: Kind) -> tuple[list[float], dict[str, Any], int]:
        torch.manual_seed(0)
        made, dataset = MODELS[model]()
        options = {"compute_loss": None} if kind is one and isinstance(made, GPT) else {}
        return trained(kind, made, tmp_path, dataset=dataset, max_steps=6, **options)

    one = Kind(None, 1, settings=kind.settings)
    [(losses, state, _)] = one.run(lambda: run(one))
    ranks = kind.run(lambda: run(kind))
    is_rounded = dict(kind.settings).get("bf16", False)
    assert all(rank[0] == ranks[0][0] for rank in ranks)
    assert ranks[0][0] == pytest.approx(losses, rel=1e-2 if is_rounded else 1e-5)
    merged = union([rank[1] for rank in ranks])
    assert merged.keys() == state.keys()
    for name, value in state.items():
        torch.testing.assert_close(merged[name], value, rtol=0, atol=2e-2 if is_rounded else 2e-5, msg=name)


def test_no_pass_is_made_through_the_model_but_those_that_train_it(tmp_path):
    kind = KINDS[6]
    for _, state, steps in kind.run(lambda: trained(kind, Tower(), tmp_path, max_steps=3)):
        counters = [value.item() for name, value in state.items() if name.endswith("num_batches_tracked")]
        assert counters
        assert set(counters) == {steps * NUM_MICRO_BATCHES}


def test_an_epoch_leaves_out_what_does_not_fill_a_step(tmp_path):
    kind = KINDS[1]
    ranks = kind.run(lambda: trained(kind, Tower(), tmp_path, max_steps=-1, num_train_epochs=2))
    assert [steps for _, _, steps in ranks] == [2 * (NUM_SAMPLES // (MICRO_BATCH * NUM_MICRO_BATCHES))] * 2


def test_optimizer_and_schedule_may_be_made_for_the_whole_model(tmp_path):
    def run(kind: Kind) -> tuple[list[float], dict[str, Any], int]:
        model = seeded(lambda: Tower(dropout=0.0))
        slow = [parameter for name, parameter in model.named_parameters() if name.startswith("blocks.0")]
        others = [parameter for name, parameter in model.named_parameters() if not name.startswith("blocks.0")]
        optimizer = torch.optim.SGD([{"params": slow, "lr": 0.01}, {"params": others}], lr=0.1, momentum=0.9)
        lr_scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
        return trained(kind, model, tmp_path, optimizer=optimizer, lr_scheduler=lr_scheduler, max_steps=5)

    [(losses, _, _)] = ONE.run(lambda: run(ONE))
    for rank in KINDS[2].run(lambda: run(KINDS[2])):
        assert rank[0] == pytest.approx(losses, rel=1e-5)


class Pair(nn.Module):
    """Takes two tensors and returns two."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.tanh(self.linear(x)), y + x


class Points:
    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.randn(4, generator=torch.Generator().manual_seed(index))


@pytest.mark.parametrize("kind", [KINDS[2], KINDS[6], KINDS[7], KINDS[9]], ids=str)
def test_parts_may_be_the_children_of_a_sequential_or_be_given_and_hand_on_several_tensors(tmp_path, kind):
    """Cut by hand into stages of different sizes."""
    parts = [
        Part("0", lambda model, batch: (model.get_submodule("0")(batch),) * 2),
        *(Part(name) for name in "123"),
        Part(["4", "5"], lambda model, x, y: model.get_submodule("5")(model.get_submodule("4")(x)) + y),
    ]

    def pairs() -> nn.Sequential:
        return nn.Sequential(nn.Linear(4, 4), Pair(), Pair(), Pair(), nn.Linear(4, 4), nn.Tanh())

    def whole(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        x: Any = (batch,)
        for part in parts:
            x = part(model, *(x if isinstance(x, tuple) else (x,)))
        return x.square().mean()

    def plain() -> nn.Sequential:
        return nn.Sequential(*(nn.Linear(4, 4) for _ in range(5)))

    options: dict[str, Any] = {"dataset": Points(), "max_steps": 4}
    own = {"compute_loss": lambda output, batch: output.square().mean()}
    for make, cut, loss in (
        (pairs, {"stages": [1, 2, 1, 1], "parts": parts}, whole),
        (plain, {"stages": [1, 1, 1, 2]}, lambda model, batch: model(batch).square().mean()),
    ):
        [(losses, state, _)] = ONE.run(
            lambda make=make, loss=loss: trained(ONE, seeded(make), tmp_path, compute_loss=loss, **options)
        )
        ranks = kind.run(lambda make=make, cut=cut: trained(kind, seeded(make), tmp_path, **options, **own, **cut))
        merged = union([rank[1] for rank in ranks])
        assert ranks[0][0] == pytest.approx(losses, rel=1e-5)
        assert merged.keys() == state.keys()
        for name, value in state.items():
            torch.testing.assert_close(merged[name], value, rtol=0, atol=1e-5, msg=name)


class Widened(nn.Module):
    """Computes in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4, dtype=torch.float64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x.double()).float()


class Doubled(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.double()


@pytest.mark.parametrize("num_double", [1, 3], ids=["a stage of float64", "all but the first"])
def test_stages_of_other_dtypes_train_and_clip_as_the_whole_does(tmp_path, num_double):
    def make() -> nn.Sequential:
        if num_double == 1:
            return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), Widened(), nn.Linear(4, 4))
        last = (nn.Linear(4, 4, dtype=torch.float64) for _ in range(2))
        return nn.Sequential(nn.Linear(4, 4), Doubled(), *last)

    options: dict[str, Any] = {"dataset": Points(), "max_steps": 4, "max_grad_norm": 0.01}
    whole = {"compute_loss": lambda model, batch: model(batch).square().mean()}
    own = {"compute_loss": lambda output, batch: output.square().mean()}
    [(losses, state, _)] = ONE.run(lambda: trained(ONE, seeded(make), tmp_path, **options, **whole))
    ranks = KINDS[1].run(lambda: trained(KINDS[1], seeded(make), tmp_path, **options, **own))
    assert ranks[0][0] == pytest.approx(losses, rel=1e-5)
    merged = union([rank[1] for rank in ranks])
    for name, value in state.items():
        torch.testing.assert_close(merged[name], value, rtol=0, atol=1e-5, msg=name)


def test_only_rank_0_needs_a_dataset_when_it_reads_for_all(tmp_path):
    kind, dispatched = KINDS[2], Kind("1f1b", 4, 4, (("dispatch_batches", True),))

    def run(kind: Kind) -> list[float]:
        rank = int(os.environ["RANK"])
        dataset = SeededItems(Sentences()) if rank == 0 or kind is not dispatched else _Nothing()
        return trained(kind, seeded(Tower), tmp_path, dataset=dataset, max_steps=3)[0]

    assert dispatched.run(lambda: run(dispatched)) == kind.run(lambda: run(kind))


class _Nothing:
    """A dataset that is not there."""

    def __len__(self) -> int:
        raise AssertionError("only rank 0 reads")

    def __getitem__(self, index: int) -> Any:
        raise AssertionError("only rank 0 reads")


# ---- other stages, other trainers


def saved_and_read(kind: Kind, directory: Path, max_steps: int) -> tuple[dict[str, Any], list[int]]:
    """All tensors and values of model, optimizer and schedule at the end of a life, by name, and the samples read."""

    def life() -> tuple[list[dict[str, Any]], list[list[int]]]:
        batches: list[list[int]] = []

        def collate(items: list[dict[str, Any]]) -> Any:
            batches.append([item["id"] for item in items])
            return default_collate(items)

        trainer = kind.trainer(Tower(), directory, max_steps=max_steps, data_collator=collate)
        trainer.train()
        states = {c.key: c.stateful.state_dict() for c in trainer.get_state_components() if c.stateful is not None}
        return [cloned(states["model"]), cloned(states["optimizer"]), cloned(states["scheduler"])], batches

    ranks = kind.run(life)
    assert kind.schedule is None or all(batches == ranks[0][1] for _, batches in ranks)
    readers = [batches for _, batches in ranks] if kind.schedule is None else [ranks[0][1]]
    # In the order of the job: micro-batch by micro-batch, on each of them rank by rank.
    samples = [sample for turn in zip(*readers, strict=True) for batch in turn for sample in batch]
    return {
        f"{number}/{name}": value
        for number in range(3)
        for name, value in union([states[number] for states, _ in ranks]).items()
    }, samples


@pytest.mark.parametrize(
    "kinds",
    [
        (KINDS[2], KINDS[1], KINDS[0]),
        (KINDS[0], KINDS[9], KINDS[4]),
        (KINDS[6], KINDS[7], Kind("zbv", 4, 8), KINDS[3]),
        (KINDS[2], ONE, KINDS[2]),
        (KINDS[9], DDP, KINDS[6]),
    ],
    ids=lambda kinds: " to ".join(map(str, kinds)),
)
def test_b35_other_stages_schedules_and_trainers_go_on_from_what_was_saved(tmp_path, kinds):
    before, read = saved_and_read(kinds[0], tmp_path, 2)
    for life, kind in enumerate(kinds[1:], start=1):
        loaded, nothing = saved_and_read(kind, tmp_path, 2 * life)  # has no step to do
        assert nothing == []
        assert digests(loaded) == digests(before)
        before, more = saved_and_read(kind, tmp_path, 2 * life + 2)
        assert digests(before) != digests(loaded)
        read += more
    assert len(read) >= (2 * len(kinds)) * MICRO_BATCH * NUM_MICRO_BATCHES
    assert read == epoch_order(GlobalPosition(NUM_SAMPLES, seed=42)).tolist()[: len(read)]


@pytest.mark.parametrize(
    "schedule", [partial(StepLR, step_size=1, gamma=0.5), partial(CosineAnnealingLR, T_max=8)], ids=["step", "cosine"]
)
def test_a_schedule_goes_on_alike_where_a_rank_has_no_parameter_of_a_group(tmp_path, schedule):
    """Such a schedule makes each learning rate from the one before, which of an empty group no parameter's item tells."""
    kind = KINDS[1]

    def life(directory: Path, max_steps: int) -> tuple[list[float], dict[str, Any]]:
        torch.manual_seed(0)
        model = Tower()
        first = [parameter for name, parameter in model.named_parameters() if name.startswith("blocks.0")]
        others = [parameter for name, parameter in model.named_parameters() if not name.startswith("blocks.0")]
        optimizer = torch.optim.SGD([{"params": first, "lr": 0.1}, {"params": others}], lr=0.01)
        options = {"optimizer": optimizer, "lr_scheduler": schedule(optimizer), "max_steps": max_steps}
        trainer = kind.trainer(model, directory, **options)
        trainer.train()
        return trainer.lr_scheduler.get_last_lr(), digests({"model": trainer.model.state_dict()})

    kind.run(lambda: life(tmp_path / "in two", 3))
    assert kind.run(lambda: life(tmp_path / "in two", 6)) == kind.run(lambda: life(tmp_path / "at once", 6))


@pytest.mark.parametrize("kind", [KINDS[0], KINDS[1], KINDS[6]], ids=str)
def test_a_model_of_other_blocks_is_not_loaded_and_nothing_is_changed(tmp_path, kind):
    def case(num_blocks: int) -> tuple[str, bool]:
        trainer = kind.trainer(Tower(num_blocks), tmp_path, max_steps=2)
        before = digests(trainer.model.state_dict())
        with pytest.raises(LoadMismatch) as caught:
            trainer.train()
        return caught.value.message, digests(trainer.model.state_dict()) == before

    kind.run(lambda: kind.trainer(Tower(6), tmp_path, max_steps=1).train())
    for num_blocks, problem in ((5, "blocks.5"), (7, "blocks.6")):
        for message, is_unchanged in kind.run(lambda n=num_blocks: case(n)):
            assert problem in message
            assert is_unchanged


WARM_STARTS: dict[str, tuple[int, dict[str, Any], Callable[[str], bool]]] = {
    "a block more in the job": (7, {"missing": "keep"}, lambda name: not name.startswith("blocks.6.")),
    "a block more in the checkpoint": (5, {}, lambda name: True),
    "some of it": (7, {"include": "blocks.[01].*"}, lambda name: name.startswith(("blocks.0.", "blocks.1."))),
    "all but some of it": (7, {"exclude": "blocks.[06].*"}, lambda name: name[:9] not in ("blocks.0.", "blocks.6.")),
    "other names": (3, {"rename": {"blocks.5.": "blocks.0.", "blocks.0.": "blocks.5."}}, lambda name: True),
}


@pytest.mark.parametrize("kind", [KINDS[0], KINDS[1], KINDS[6]], ids=str)
def test_a_warm_start_into_a_pipeline_goes_by_its_rules(tmp_path, kind):
    def case(num_blocks: int, rules: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any], Any]:
        trainer = kind.trainer(Tower(num_blocks), tmp_path / "new")
        before = cloned(trainer.model.state_dict())
        with CheckpointCoordinator(trainer, tmp_path / "new", timeout_seconds=30) as coordinator:
            report = coordinator.warm_start(tmp_path / "base", **rules).components["model"]
        return before, trainer.model.state_dict(), report

    model = Tower(6)
    ONE.run(lambda: ONE.trainer(model, tmp_path / "base", max_steps=1).train())
    base = load_component(tmp_path / "base", "model")
    for num_blocks, rules, is_loaded in WARM_STARTS.values():
        ranks = kind.run(lambda n=num_blocks, rules=rules: case(n, rules))
        before, after = (union([rank[place] for rank in ranks]) for place in (0, 1))
        source = {new: base[old] for old, new in renamed(base, rules.get("rename")).items()}
        assert digests(after) == digests({name: source[name] if is_loaded(name) else before[name] for name in after})
        for _, _, report in ranks:
            assert report.loaded == sorted(filter(is_loaded, after))
            assert report.kept == sorted(after.keys() - set(report.loaded))
            assert len(report.ignored) == len(base) - len(report.loaded)


def test_the_manifest_says_how_a_pipeline_shares_its_state(tmp_path):
    kind = KINDS[6]
    kind.run(lambda: kind.trainer(Tower(), tmp_path, max_steps=1).train())
    components = CheckpointManifest.load(tmp_path / "checkpoint-1").components
    assert {key: (str(one.pattern), one.names, sorted(one.entries)) for key, one in components.items()} == {
        "model": ("per_rank", "global", ["all"]),
        "optimizer": ("per_rank", "global", ["all"]),
        "scheduler": ("replicated", "global", ["all"]),
        "trainer": ("replicated", "global", ["all"]),
        "callbacks": ("per_rank", "local", ["rank=0", "rank=1"]),
        "dataset": ("global", "global", ["all"]),
        "rng": ("per_rank", "local", ["rank=0", "rank=1"]),
    }
    assert components["model"].entries["all"].num_items == len(Tower().state_dict())
    assert {key: str(components[key].validation.result) for key in ("model", "optimizer")} == {
        "model": "equal",
        "optimizer": "equal",
    }


# ---- what several stages have


def test_a_tied_weight_that_parts_between_stages_is_found_and_named(tmp_path):
    kind = KINDS[2]

    def nudge(trainer: Trainer) -> None:
        if trainer.rank == 3:
            with torch.no_grad():
                trainer.model.get_parameter("head.weight")[3, 2] += 0.5

    outcomes = kind.run(lambda: live(kind, tmp_path, [at_step(4, lambda: None), nudge]), raw=True)
    for error in errors(outcomes):
        assert error.type_name == "ReplicaMismatch"
        assert "'model' differs between rank 0 and rank 3 at 'embedding.weight' (first at [3, 2]" in error.message


def test_a_shared_buffer_that_one_stage_changes_is_found_and_named(tmp_path):
    kind = KINDS[1]

    def nudge(trainer: Trainer) -> None:
        if trainer.rank == 1:
            trainer.model.get_buffer("table")[0] = 0

    outcomes = kind.run(lambda: live(kind, tmp_path, [nudge]), raw=True)
    for error in errors(outcomes):
        assert error.type_name == "ReplicaMismatch"
        assert "'model' differs between rank 0 and rank 1 at 'table'" in error.message


def test_what_several_stages_have_begins_alike_though_their_models_do_not(tmp_path):
    kind = KINDS[2]

    def case() -> dict[str, Any]:
        torch.manual_seed(int(os.environ["RANK"]))
        model = Tower()
        model.table.mul_(1 + int(os.environ["RANK"]))
        return cloned(kind.trainer(model, tmp_path).model.state_dict())

    merged = union(kind.run(case))
    assert digests(merged["embedding.weight"]) == digests(merged["head.weight"])
    assert merged.keys() == Tower().state_dict().keys()


def test_each_rank_keeps_its_stages_only(tmp_path):
    def case() -> list[str]:
        return [*dict(kind.trainer(Tower(), tmp_path).model.named_parameters(remove_duplicate=False))]

    kind = Kind("1f1b", 2, 2)
    first, last = kind.run(case)
    assert [name.split(".")[1] for name in first if name.endswith("linear.bias")] == ["0", "1", "2"]
    assert [name.split(".")[1] for name in last if name.endswith("linear.bias")] == ["3", "4", "5"]
    assert {"embedding.weight", "head.weight"} <= {*first} & {*last}


# ---- callbacks


class Average:
    """Keeps a mean of the losses."""

    def __init__(self, name: str | None = None) -> None:
        self.total, self.num_steps = torch.zeros(()), 0
        if name is not None:
            self.name = name

    def __call__(self, trainer: Trainer) -> None:
        self.total = self.total + trainer.progress.last_loss
        self.num_steps += 1

    def state_dict(self) -> dict[str, Any]:
        return {"total": self.total, "num_steps": self.num_steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.total, self.num_steps = state_dict["total"], state_dict["num_steps"]


@pytest.mark.parametrize("kind", [ONE, DDP, KINDS[1], KINDS[9]], ids=str)
def test_b45_callbacks_are_saved_and_restored_by_every_trainer(tmp_path, kind):
    def life(directory: Path, max_steps: int) -> tuple[float, int]:
        torch.manual_seed(0)
        callback = Average()
        hooks = [lambda trainer: None, callback]
        settings = {"max_steps": max_steps, "lr_scheduler_type": "constant"}
        kind.trainer(Tower(), directory, **settings, on_step_end=hooks).train()
        return callback.total.item(), callback.num_steps

    kind.run(lambda: life(tmp_path / "in two", 3))
    resumed = kind.run(lambda: life(tmp_path / "in two", 6))
    assert resumed == kind.run(lambda: life(tmp_path / "at once", 6))
    assert resumed[0][1] == 6


def test_b46_callbacks_are_told_apart_by_name_and_not_by_place(tmp_path, caplog):
    def life(max_steps: int, *names: str) -> list[int]:
        callbacks = [Average(name) for name in names]
        ONE.trainer(Tower(), tmp_path, max_steps=max_steps, on_step_end=callbacks).train()
        return [callback.num_steps for callback in callbacks]

    assert life(2, "a", "b") == [2, 2]
    assert life(3, "new", "b", "a") == [1, 3, 3]
    assert "callback 'new' is not in the checkpoint, and starts fresh" in caplog.text
    assert life(4) == []
    assert "the checkpoint has the state of a callback 'a', which this run does not have" in caplog.text


class MeanWeights:
    """Keeps a moving average of this rank's share of the model."""

    def __init__(self) -> None:
        self.means: dict[str, torch.Tensor] = {}

    def __call__(self, trainer: Trainer) -> None:
        for name, parameter in trainer.model.named_parameters():
            self.means[name] = 0.9 * self.means.get(name, 0.0) + 0.1 * parameter.detach()

    def state_dict(self) -> dict[str, Any]:
        return {"means": dict(self.means)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.means = state_dict["means"]


def test_what_a_callback_keeps_of_its_own_stage_comes_back_to_it_and_is_never_given_to_another(tmp_path, caplog):
    def life(max_steps: int) -> dict[str, list[float]]:
        torch.manual_seed(0)
        callback = MeanWeights()
        settings = {"max_steps": max_steps, "lr_scheduler_type": "constant"}
        KINDS[1].trainer(Tower(), tmp_path / f"{LIVES}", **settings, on_step_end=[callback]).train()
        return {name: mean.flatten().tolist() for name, mean in callback.means.items()}

    LIVES = 1
    whole = KINDS[1].run(lambda: life(4))
    LIVES = 2
    KINDS[1].run(lambda: life(2))
    assert KINDS[1].run(lambda: life(4)) == whole
    assert whole[0].keys() != whole[1].keys()

    with caplog.at_level("WARNING"):
        ONE.trainer(Tower(), tmp_path / "2", max_steps=5, on_step_end=[MeanWeights()]).train()
    assert "callback 'MeanWeights' kept tensors of other parts of the model on each rank; declare such state" in caplog.text
    assert "callback 'MeanWeights' is not in the checkpoint, and starts fresh" in caplog.text


def test_two_callbacks_of_one_name_are_refused(tmp_path):
    with pytest.raises(ValueError, match="two callbacks are called 'Average': give each an attribute `name`"):
        ONE.trainer(Tower(), tmp_path, on_step_end=[Average(), Average()])


# ---- cutting: pure


@pytest.mark.parametrize(
    ("num_parts", "stages", "expected"),
    [
        (8, 1, [8]),
        (8, 4, [2, 2, 2, 2]),
        (7, 3, [2, 2, 3]),
        (3, 3, [1, 1, 1]),
        (5, [1, 3, 1], [1, 3, 1]),
        (2, 3, "3 stages cannot be made of 2 parts"),
        (2, 0, "0 stages cannot be made of 2 parts"),
        (5, [2, 2], "stages=[2, 2] deals out 4 parts of 5"),
        (5, [5, 0], "at least one"),
        (5, [], "deals out 0 parts of 5"),
    ],
)
def test_parts_are_dealt_out_evenly_or_as_is_said(num_parts, stages, expected):
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=re.escape(expected)):
            dealt(num_parts, stages)
    else:
        assert dealt(num_parts, stages) == expected


def test_a_pruned_model_has_what_is_named_where_it_was_and_the_whole_one_keeps_all():
    model = Tower()
    names = [*model.state_dict()]
    share = pruned(model, {"blocks.2", "table"})
    assert isinstance(share, Tower)
    assert [*share.state_dict()] == [name for name in names if name.startswith("blocks.2.") or name == "table"]
    assert share.blocks.get_submodule("2") is model.blocks[2]
    assert [*model.state_dict()] == names


def test_a_share_has_names_of_the_whole_model_only():
    known = Tower().state_dict().keys()
    share = Share(pruned(Tower(), {"blocks.0", "table"}), known)
    assert share.state_dict().keys() == {name for name in known if name.startswith(("blocks.0.", "table"))}
    with pytest.raises(ValueError, match=r"the share of the model has '0\.bias', and the whole model does not"):
        Share(nn.Sequential(nn.Linear(1, 1)), known)


def hidden_tie() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = nn.Parameter(model[0].weight.detach())
    return model


@pytest.mark.parametrize(
    ("model", "stages", "problem"),
    [
        (
            Tower(),
            [[Part("embedding"), Part("blocks.9")]],
            "a part names 'blocks.9', but Tower has nothing of that name",
        ),
        (Tower(), [[Part("embedding"), Part("blocks")]], "'table' is in no part; name it, or the module it is in"),
        (hidden_tie(), [[Part("0")], [Part("1")]], "'0.weight' and '1.weight' share memory, but are two tensors"),
        (nn.Sequential(nn.Linear(4, 4), nn.Tanh()), [[Part("0")], [Part("1")]], "rank 1 would train nothing"),
    ],
)
def test_a_cut_that_leaves_out_or_parts_something_is_refused(model, stages, problem):
    with pytest.raises(ValueError, match=re.escape(problem)):
        Cut(model, stages, range(len(stages)))


def test_where_a_model_is_cut_must_be_said():
    assert [part.names for part in parts_of(nn.Sequential(nn.Linear(1, 1), nn.Tanh()))] == [("0",), ("1",)]
    with pytest.raises(ValueError, match="Linear does not say where it may be cut"):
        parts_of(nn.Linear(1, 1))
    with pytest.raises(ValueError, match=re.escape("write Part(['a', 'b'], Model.method)")):
        Part(["a", "b"])


# ---- refusals


class Growing(Sentences):
    """Sentences that are not of one length."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = super().__getitem__(0)
        return {**item, "tokens": item["tokens"].repeat(1 + index), "targets": item["targets"].repeat(1 + index)}


class Cutoff(Tower):
    """Hands on what has no gradient."""

    def embed(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return super().embed(batch).detach()


class Peeking(Tower):
    """Looks at values."""

    def embed(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return super().embed(batch) if batch["tokens"].sum().item() > 0 else torch.zeros(())


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"schedule": "dualpipe"}, "schedule must be one of gpipe, 1f1b, interleaved_1f1b"),
        ({"fp16": True}, "use bf16=True"),
        ({"stages": 4}, "schedule='1f1b' does not go with 4 stages on 2 ranks"),
        ({"stages": 3, "schedule": "interleaved_1f1b"}, "it runs the same number of the stages on each rank"),
        ({"stages": 2, "schedule": "zbv"}, "it runs 2 of the stages on each rank"),
        ({"stages": 0}, "0 stages cannot be made of 8 parts"),
        ({"stages": 9}, "9 stages cannot be made of 8 parts"),
        ({"gradient_accumulation_steps": 1}, "2 ranks and 1 micro-batches (gradient_accumulation_steps): "),
        (
            {"schedule": "interleaved_1f1b", "stages": 4, "gradient_accumulation_steps": 5},
            "5 micro-batches (gradient_accumulation_steps): Interleaved 1F1B requires",
        ),
        ({"per_device_train_batch_size": 26}, "do not fill one step of 4 micro-batches"),
        ({"model": nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))}, "Sequential has no pipeline_loss"),
        ({"model": torch.compile(Tower(), backend="eager")}, "a compiled model cannot be cut"),
        ({"model": Cutoff(), "stages": [1, 7]}, "stage 0 returns a tensor float32 [2, 5, 8] that has no gradient"),
        ({"model": Peeking()}, "stage 0: its parts cannot be run on tensors without data"),
        ({"dataset": Sentences()}, "ranks 1 read another batch than rank 0"),
        ({"dataset": SeededItems(Growing()), "per_device_train_batch_size": 1}, "collate all samples to one length"),
        ({"optimizer": "LBFGS"}, "needs a closure"),
    ],
    ids=lambda value: str(value) if isinstance(value, str) else "",
)
def test_what_a_pipeline_cannot_do_is_refused_with_what_to_write(tmp_path, options, problem):
    kind = Kind("1f1b", 2, 2)

    def case() -> None:
        given = {"model": Tower(), "parts": None} | options
        if given.get("optimizer") == "LBFGS":
            given["optimizer"] = torch.optim.LBFGS(given["model"].parameters())
        kind.trainer(directory=tmp_path, **given).train()

    for error in errors(kind.run(case, raw=True)):
        assert error.type_name == "ValueError", error.traceback
        assert problem in error.message
