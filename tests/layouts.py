"""One model in every layout that a trainer can give it: for what is saved by one and read by another.

layout = Layout("hybrid", {"dp": 2, "tp": 2})
lives = layout.run(lambda: live(layout, directory))     # one a rank
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel
from torch.utils.data import default_collate

from forgather_ckpt.data import SeededItems
from forgather_ckpt.data.position import GlobalPosition
from forgather_ckpt.data.sampler import epoch_order
from forgather_ckpt.trainers import (
    DDPTrainer,
    FSDPTrainer,
    HybridTrainer,
    Part,
    PipelineTrainer,
    Trainer,
    TrainingArguments,
)
from tests.gpus import nodes_on_gpus
from tests.ranks import Outcome, run_ranks, values
from tests.test_pipeline import NUM_SAMPLES, NUM_TOKENS, Sentences, union
from tests.test_resume import (
    NUM_STEPS,
    SAVE_STEPS,
    Hook,
    Life,
    assert_continues,
    at_step,
    digests,
    fail,
    in_order_of_reading,
    kill,
    kill_in_state_dict,
    stop,
)

WIDTH, HIDDEN = 6, 12
GLOBAL_BATCH, NUM_MICRO_BATCHES = 32, 4
"""Samples of an optimizer step in every layout, and how many times each rank goes through the model for it."""


class Block(nn.Module):
    """With dropout on whole and on cut activations, and a buffer that each rank changes for itself."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, HIDDEN)
        self.down = nn.Linear(HIDDEN, WIDTH)
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("mean", torch.zeros(WIDTH))

    def forward(self, x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        y = self.down(self.dropout(torch.tanh(self.up(self.norm(x) * table))))
        if self.training:
            with torch.no_grad():
                self.mean.lerp_(y.float().mean((0, 1)), 0.1)
        return x + self.dropout(y)


class Net(nn.Module):
    """Blocks that share a table, between an embedding and a head that are tied. Dimensions of 1, 6, 12 and 16: on four
    and eight ranks some parts are shorter, and some empty."""

    def __init__(self, num_blocks: int = 4, dropout: float = 0.25) -> None:
        super().__init__()
        self.embedding = nn.Embedding(NUM_TOKENS, WIDTH)
        self.gain = nn.Parameter(torch.ones(1))
        self.register_buffer("table", torch.linspace(0.5, 1.5, WIDTH))
        self.blocks = nn.ModuleList(Block(dropout) for _ in range(num_blocks))
        self.head = nn.Linear(WIDTH, NUM_TOKENS, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        x = self.embed(batch)
        for number in range(len(self.blocks)):
            x = self.block(x, f"{number}")
        return self.pipeline_loss(self.head(x), batch)

    def embed(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return self.embedding(batch["tokens"]) * self.gain

    def block(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return self.blocks.get_submodule(name)(x, self.table)

    def pipeline_parts(self) -> list[Part]:
        blocks = [
            Part([f"blocks.{name}", "table"], functools.partial(Net.block, name=name)) for name in self.blocks._modules
        ]
        return [Part(["embedding", "gain"], Net.embed), *blocks, Part("head")]

    def pipeline_loss(self, logits: torch.Tensor, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return nn.functional.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten())


@dataclass(frozen=True)
class Layout:
    """A trainer and its mesh. `kind`: one, ddp, fsdp, pipeline or hybrid; `axes`: the mesh, in order; of fsdp with two,
    the first has copies (HSDP)."""

    kind: str
    axes: Mapping[str, int] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    nodes: tuple[int, ...] | None = None
    device: str = "cpu"
    """"cuda": NCCL, and a GPU a rank where there are so many (tests/gpus.py)."""

    def __str__(self) -> str:
        axes = "×".join(f"{name}{size}" for name, size in self.axes.items())
        nodes = f"nodes{list(self.nodes)}" if self.nodes else ""
        device = "" if self.device == "cpu" else self.device
        return "-".join(filter(None, [self.kind, axes, nodes, device, *map(str, self.settings)]))

    def __hash__(self) -> int:
        return hash(str(self))

    @property
    def world_size(self) -> int:
        return math.prod(self.axes.values())

    @property
    def num_readers(self) -> int:
        """How many shares a batch is dealt out in."""
        return math.prod(size for name, size in self.axes.items() if name not in ("pp", "tp"))

    def mesh(self) -> DeviceMesh:
        return init_device_mesh(self.device, tuple(self.axes.values()), mesh_dim_names=tuple(self.axes))

    def trainer(self, model: nn.Module, directory: Path, dataset: Any = None, **options: Any) -> Trainer:
        """A trainer of this layout; what is not an option of trainers is a setting."""
        own = {
            "on_step_end",
            "callbacks",
            "eval_dataset",
            "data_collator",
            "optimizer",
            "lr_scheduler",
            "compute_loss",
            "shard",
            "tp_plan",
            "schedule",
        }
        defaults: dict[str, Any] = {
            "max_steps": NUM_STEPS,
            "per_device_train_batch_size": GLOBAL_BATCH // NUM_MICRO_BATCHES // self.num_readers,
            "gradient_accumulation_steps": NUM_MICRO_BATCHES,
            "learning_rate": 0.01,
            "max_grad_norm": 0.5,
            "warmup_steps": 2,
            "logging_steps": 1,
            "save_steps": SAVE_STEPS,
            "resume_from_checkpoint": "auto",
            "checkpoint_timeout_seconds": 30,
        }
        settings = defaults | dict(self.settings) | options
        args = TrainingArguments(directory, **{key: value for key, value in settings.items() if key not in own})
        given = {key: value for key, value in settings.items() if key in own}
        dataset = SeededItems(Sentences()) if dataset is None else dataset
        if "pp" not in self.axes:
            given.setdefault("compute_loss", lambda model, batch: model(batch))
        match self.kind:
            case "one":
                return Trainer(model, args, dataset, **given)
            case "ddp":
                return DDPTrainer(model, args, dataset, **given)
            case "fsdp":
                return FSDPTrainer(model, args, dataset, mesh=self.mesh(), **given)
            case "pipeline":
                return PipelineTrainer(model, args, dataset, **given)
            case "hybrid":
                plan = {"blocks.*.up": ColwiseParallel(), "blocks.*.down": RowwiseParallel()}
                cut = {"tp_plan": plan} if "tp" in self.axes else {}
                return HybridTrainer(model, args, dataset, mesh=self.mesh(), **(cut | given))
        raise ValueError(f"no kind {self.kind!r}")

    def outcomes(self, case: Callable[[], Any], **options: Any) -> list[Outcome]:
        backend = None if self.kind == "one" else "gloo" if self.device == "cpu" else "nccl"
        nodes = nodes_on_gpus(self.world_size) if self.device == "cuda" and self.nodes is None else self.nodes
        return run_ranks(
            self.world_size, lambda rank, world_size: case(), backend=backend, nodes=nodes, timeout=100, **options
        )

    def run(self, case: Callable[[], Any]) -> list[Any]:
        """What `case` returns on each rank."""
        return values(self.outcomes(case))


def live(layout: Layout, run: Path, hooks: Sequence[Hook] = (), **settings: Any) -> Life:
    """One life of one rank: train, resuming if there is something to resume."""
    batches: list[list[int]] = []

    def collate(items: list[dict[str, Any]]) -> Any:
        batches.append([item["id"] for item in items])
        return default_collate(items)

    # Another model in each life and on each rank: what a run resumes with must come from the checkpoint.
    torch.manual_seed(int.from_bytes(os.urandom(4)) if any(run.glob("checkpoint-*")) else 1)
    trainer = layout.trainer(Net(), run, on_step_end=hooks, data_collator=collate, **settings)
    trainer.train()
    losses = [(step, value.hex()) for step, value in trainer.history]
    first_step = losses[0][0] if losses else trainer.progress.step + 1
    return Life(first_step, batches, losses, digests(local(states(trainer))))


def undisturbed_lives(factory: pytest.TempPathFactory) -> Callable[[Layout], list[Life]]:
    """What every rank comes to in a run of a layout that nothing disturbs; each run is made once."""

    @functools.cache
    def of(layout: Layout) -> list[Life]:
        directory = factory.mktemp("undisturbed")
        return layout.run(lambda: live(layout, directory))

    return of


ENDINGS: dict[str, Hook] = {
    "a stop": at_step(NUM_STEPS // 2, stop),
    "an exception": at_step(6, fail),
    "a kill": at_step(6, kill),
    "a kill in mid-save": kill_in_state_dict,
}
DEATHS = [ending for ending in ENDINGS if ending != "a stop"]


def assert_goes_on(layout: Layout, run: Path, ending: str, whole: Sequence[Life], *, victim: int | None = None) -> None:
    """A life that ends so on one rank, or on all, and the next one, which goes on from the save of step 4 as `whole` did."""

    def first_life() -> None:
        live(layout, run, [lambda trainer: ENDINGS[ending](trainer) if victim in (None, trainer.rank) else None])

    outcomes = layout.outcomes(first_life, expect_dead=[] if victim is None else [victim])
    assert all(outcome.is_dead or outcome.error is not None for outcome in outcomes)
    assert [outcome.rank for outcome in outcomes if outcome.is_dead] == ([victim] if "kill" in ending else [])
    assert_continues(layout.run(lambda: live(layout, run)), list(whole), from_step=4)


def saved_and_read(layout: Layout, directory: Path, max_steps: int) -> tuple[dict[str, Any], list[int]]:
    """A life of all ranks: at its end, all whole tensors and values of model, optimizer and schedule by name, as all have
    them that have them; and the samples that the job read, in the order of the job."""

    def life() -> tuple[dict[str, Any], list[list[int]], int]:
        batches: list[list[int]] = []

        def collate(items: list[dict[str, Any]]) -> Any:
            batches.append([item["id"] for item in items])
            return default_collate(items)

        trainer = layout.trainer(Net(), directory, max_steps=max_steps, data_collator=collate)
        trainer.train()
        found = whole(states(trainer))
        kept = {f"{key}/{name}": found[key][name] for key in ("model", "optimizer", "scheduler") for name in found[key]}
        if "pp" in layout.axes:  # which reads the micro-batches of a step at once
            steps = [batches[n : n + NUM_MICRO_BATCHES] for n in range(0, len(batches), NUM_MICRO_BATCHES)]
            batches = [[sample for batch in step for sample in batch] for step in steps]
        return kept, batches, trainer.loader.rank

    ranks = layout.run(life)
    readers = {reader: batches for _, batches, reader in ranks}
    assert len(readers) == layout.num_readers
    assert all(batches == readers[reader] for _, batches, reader in ranks)
    return union([kept for kept, _, _ in ranks]), in_order_of_reading([readers[reader] for reader in sorted(readers)])


def order_of_reading(num_samples: int) -> list[int]:
    """The first so many samples of an undisturbed run, in any layout: of each epoch what fills steps."""
    used = NUM_SAMPLES // GLOBAL_BATCH * GLOBAL_BATCH
    epochs = [
        epoch_order(GlobalPosition(NUM_SAMPLES, seed=42, epoch=epoch)) for epoch in range(num_samples // used + 1)
    ]
    return torch.cat([order[:used] for order in epochs])[:num_samples].tolist()


def states(trainer: Trainer) -> dict[str, Any]:
    """All that a trainer declares, by component."""
    return {c.key: c.stateful.state_dict() for c in trainer.get_state_components() if c.stateful is not None}


def local(state: Any) -> Any:
    """Nested state with this rank's parts in the place of DTensors."""
    return _converted(state, lambda tensor: tensor.to_local())


def whole(state: Any) -> Any:
    """Nested state with whole tensors in the place of DTensors, all copied to host memory. Collective."""
    return _converted(state, lambda tensor: tensor.full_tensor())


def _converted(state: Any, convert: Callable[[DTensor], torch.Tensor]) -> Any:
    if isinstance(state, dict):
        return {key: _converted(value, convert) for key, value in state.items()}
    if isinstance(state, DTensor):
        state = convert(state)
    return state.detach().to("cpu", copy=True) if isinstance(state, torch.Tensor) else state
