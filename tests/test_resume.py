"""A run that died and was resumed is the run that was not disturbed, bit for bit: with dropout, with shuffling.

Compared are all ids of all batches, all losses, and at the end every tensor of model and optimizer, the schedule
and the random generators, on every rank.
"""

import hashlib
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from forgather_ckpt.data import SeededItems
from forgather_ckpt.data.position import GlobalPosition
from forgather_ckpt.data.sampler import epoch_order
from forgather_ckpt.errors import CheckpointError
from forgather_ckpt.manifest import CheckpointManifest
from forgather_ckpt.trainers import DDPTrainer, Trainer, TrainingArguments
from tests.gpus import nodes_on_gpus
from tests.ranks import Outcome, run_ranks, values

pytestmark = pytest.mark.multiprocess

NUM_STEPS, SAVE_STEPS = 10, 4


class Points:
    """Points that are noisy in another way in every epoch, drawn from the global generator."""

    def __len__(self) -> int:
        return 53

    def __getitem__(self, index: int) -> dict[str, Any]:
        x = torch.randn(6, generator=torch.Generator().manual_seed(index)) + 0.1 * torch.randn(6)
        return {"id": index, "x": x, "y": x.sum()}


class Net(nn.Module):
    """Not used in the order in which it is registered, and with a buffer that each rank changes for itself."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(16, 1)
        self.middle = nn.Linear(33, 16)
        self.first = nn.Linear(6, 33)
        self.norm = nn.BatchNorm1d(16)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.dropout(self.norm(self.middle(torch.tanh(self.first(x))))))


Hook = Callable[[Trainer], None]


@dataclass(frozen=True)
class Kind:
    """A way to train."""

    trainer: type[Trainer]
    world_size: int
    settings: tuple[tuple[str, Any], ...] = ()
    backend: str = "gloo"

    @property
    def name(self) -> str:
        settings = [f"{key}={value}" for key, value in self.settings]
        backend = [self.backend] if self.backend != "gloo" else []
        return "-".join([self.trainer.__name__, str(self.world_size), *backend, *settings])


KINDS = [
    Kind(Trainer, 1),
    Kind(Trainer, 1, (("fp16", True),)),
    Kind(DDPTrainer, 2),
    Kind(DDPTrainer, 2, (("dispatch_batches", True),)),
    Kind(Trainer, 1, (("dataloader_num_workers", 2),)),
    Kind(DDPTrainer, 2, (("dispatch_batches", True), ("dataloader_num_workers", 2))),
]
GPU_KINDS = [
    Kind(Trainer, 1, (("device", "cuda"),)),
    Kind(Trainer, 1, (("device", "cuda"), ("fp16", True))),
    Kind(DDPTrainer, 2, (("device", "cuda"),), "nccl"),
    Kind(DDPTrainer, 2, (("device", "cuda"), ("dispatch_batches", True)), "nccl"),
]


@dataclass(frozen=True)
class Life:
    """What one life of a rank's process came to."""

    first_step: int
    batches: list[list[int]]
    losses: list[tuple[int, str]]
    state: dict[str, str]


def digests(value: Any, path: str = "") -> dict[str, str]:
    """A digest of every leaf of nested state."""
    if isinstance(value, dict):
        return {k: v for key, item in value.items() for k, v in digests(item, f"{path}/{key}").items()}
    if isinstance(value, list | tuple):
        return {k: v for n, item in enumerate(value) for k, v in digests(item, f"{path}/{n}").items()}
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
    if isinstance(value, np.ndarray):
        return {path: hashlib.sha256(value.tobytes()).hexdigest()}
    return {path: repr(value)}


def live(kind: Kind, run: Path, *, hooks: tuple[Hook, ...] = (), **settings: Any) -> Life:
    """One life of one rank: train, resuming if there is something to resume."""
    batches = []

    def loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        batches.append(batch["id"].tolist())
        return nn.functional.mse_loss(model(batch["x"]).squeeze(-1), batch["y"])

    defaults: dict[str, Any] = {
        "max_steps": NUM_STEPS,
        "per_device_train_batch_size": 3,
        "gradient_accumulation_steps": 2,
        "learning_rate": 0.01,
        "warmup_steps": 2,
        "logging_steps": 1,
        "save_steps": SAVE_STEPS,
        "resume_from_checkpoint": "auto",
        "checkpoint_timeout_seconds": 30,
    }
    args = TrainingArguments(run, **(defaults | dict(kind.settings) | settings))
    # Another model in each life and on each rank: what a run resumes with must come from the checkpoint.
    torch.manual_seed(int.from_bytes(os.urandom(4)) if any(run.glob("checkpoint-*")) else 1)
    trainer = kind.trainer(Net(), args, SeededItems(Points()), compute_loss=loss, on_step_end=hooks)
    trainer.train()
    components = [c for c in trainer.get_state_components() if c.stateful is not None]
    state = {c.key: c.stateful.state_dict() for c in components if c.stateful is not None}
    return Life(
        trainer.history[0][0],
        batches,
        [(step, value.hex()) for step, value in trainer.history],
        digests(state),
    )


def run(kind: Kind, case: Callable[[int, int], Any], **options: Any) -> list[Outcome]:
    backend = kind.backend if kind.trainer is DDPTrainer else None
    if backend == "nccl":
        options["nodes"] = nodes_on_gpus(kind.world_size)
    return run_ranks(kind.world_size, case, backend=backend, **options)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Kind], list[Life]]:
    """What every rank comes to in a run of this kind that nothing disturbs."""

    @cache
    def of(kind: Kind) -> list[Life]:
        directory = tmp_path_factory.mktemp("undisturbed")
        return values(run(kind, lambda rank, world_size: live(kind, directory)))

    return of


def assert_continues(resumed: list[Life], whole: list[Life], *, from_step: int) -> None:
    assert len(resumed) == len(whole)
    for life, expected in zip(resumed, whole, strict=True):
        assert life.first_step == from_step + 1
        assert life.losses == expected.losses[from_step:]
        assert life.batches == expected.batches[len(expected.batches) - len(life.batches) :]
        assert len(life.losses) == NUM_STEPS - from_step
        assert life.state == expected.state


class Stop(Exception):
    """Ends a life without any fault."""


class Fault(Exception):
    """A bug in somebody's training step."""


def at_step(step: int, act: Callable[[], None]) -> Hook:
    def hook(trainer: Trainer) -> None:
        if trainer.progress.step == step:
            act()

    return hook


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stop() -> None:
    raise Stop


def fail() -> None:
    raise Fault


# ---- deaths between saves


@pytest.mark.parametrize(
    "kind", [*KINDS, *(pytest.param(kind, marks=pytest.mark.gpu) for kind in GPU_KINDS)], ids=lambda kind: kind.name
)
def test_b33_a_run_that_was_stopped_goes_on_exactly(tmp_path, undisturbed, kind):
    def first_life(rank: int, world_size: int) -> None:
        with pytest.raises(Stop):
            live(kind, tmp_path, hooks=(at_step(NUM_STEPS // 2, stop),))

    values(run(kind, first_life))
    resumed = values(run(kind, lambda rank, world_size: live(kind, tmp_path)))
    assert_continues(resumed, undisturbed(kind), from_step=4)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_an_exception_in_a_step_of_one_rank_ends_all_and_the_run_goes_on_exactly(tmp_path, undisturbed, kind):
    def first_life(rank: int, world_size: int) -> None:
        live(kind, tmp_path, hooks=(at_step(6, fail),) if rank == world_size - 1 else ())

    outcomes = run(kind, first_life)
    assert all(outcome.error is not None for outcome in outcomes)
    assert outcomes[-1].error is not None and outcomes[-1].error.type_name == "Fault"
    resumed = values(run(kind, lambda rank, world_size: live(kind, tmp_path)))
    assert_continues(resumed, undisturbed(kind), from_step=4)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("which", ["first", "last"])
def test_a_killed_rank_ends_all_and_the_run_goes_on_exactly(tmp_path, undisturbed, kind, which):
    victim = 0 if which == "first" else kind.world_size - 1

    def first_life(rank: int, world_size: int) -> None:
        live(kind, tmp_path, hooks=(at_step(9, kill),) if rank == victim else ())

    outcomes = run(kind, first_life, expect_dead=[victim])
    assert [outcome.is_dead or outcome.error is not None for outcome in outcomes] == [True] * kind.world_size
    resumed = values(run(kind, lambda rank, world_size: live(kind, tmp_path)))
    assert_continues(resumed, undisturbed(kind), from_step=8)


@pytest.mark.parametrize("kind", [Kind(DDPTrainer, 4)], ids=lambda kind: kind.name)
def test_more_ranks_than_two_add_up_gradients_in_the_same_order_after_a_resume(tmp_path, undisturbed, kind):
    """Two ranks would not show it: a + b is b + a. On two simulated nodes."""

    def first_life(rank: int, world_size: int) -> None:
        with pytest.raises(Stop):
            live(kind, tmp_path, hooks=(at_step(4, stop),), save_steps=3)

    values(run(kind, first_life, nodes=[3, 1]))
    assert CheckpointManifest.load(tmp_path / "checkpoint-3").topology.nodes == ((0, 1, 2), (3,))
    resumed = values(run(kind, lambda rank, world_size: live(kind, tmp_path), nodes=[3, 1]))
    assert_continues(resumed, undisturbed(kind), from_step=3)


# ---- deaths in the middle of a save


def killing(function: Callable[..., Any], call: int) -> Callable[..., Any]:
    """The function, but its n-th call is the end of the process."""
    calls = iter(range(1, call + 1))

    def counted(*args: Any, **kwargs: Any) -> Any:
        if next(calls, call + 1) == call:
            kill()
        return function(*args, **kwargs)

    return counted


def kill_at_call(name: str, call: int) -> Hook:
    """The n-th call of this function of `os` in the save of step 8 is the end."""
    function = getattr(os, name)

    def hook(trainer: Trainer) -> None:
        setattr(os, name, killing(function, call) if trainer.progress.step == 8 else function)

    return hook


def kill_in_state_dict(trainer: Trainer) -> None:
    if trainer.progress.step == 8:
        trainer.lr_scheduler.state_dict = kill  # type: ignore[method-assign]


def assert_survives(kind: Kind, directory: Path, victim: int, death: Hook, whole: list[Life]) -> bool:
    """One life with this death in it, and the next; whether there was the death."""

    def first_life(rank: int, world_size: int) -> None:
        live(kind, directory, hooks=(death,) if rank == victim else ())

    outcomes = run(kind, first_life, expect_dead=[victim])
    if not outcomes[victim].is_dead:
        values(outcomes)
        return False
    told = [outcome.error for outcome in outcomes if outcome.rank != victim]
    assert all(error is not None and CheckpointError.__name__ in error.mro for error in told), told
    resumed = values(run(kind, lambda rank, world_size: live(kind, directory)))
    from_step = resumed[0].first_step - 1
    assert from_step in (4, 8)
    assert_continues(resumed, whole, from_step=from_step)
    return True


RANKS = pytest.mark.parametrize(
    ("kind", "victim"),
    [(KINDS[0], 0), (KINDS[2], 0), (KINDS[2], 1)],
    ids=lambda value: value.name if isinstance(value, Kind) else f"rank {value}",
)


@RANKS
def test_a_rank_killed_while_its_state_is_taken_leaves_the_last_checkpoint(tmp_path, undisturbed, kind, victim):
    assert assert_survives(kind, tmp_path, victim, kill_in_state_dict, undisturbed(kind))


@RANKS
def test_a_rank_killed_at_any_sync_of_a_save_leaves_one_good_checkpoint(tmp_path, undisturbed, kind, victim):
    call = 1
    while assert_survives(kind, tmp_path / str(call), victim, kill_at_call("fsync", call), undisturbed(kind)):
        call += 1
    assert call > 2, "a rank syncs its data and its index, at the least"


@pytest.mark.parametrize("kind", [KINDS[0], KINDS[2]], ids=lambda kind: kind.name)
def test_rank_0_killed_at_any_rename_of_a_save_leaves_one_good_checkpoint(tmp_path, undisturbed, kind):
    call = 1
    while assert_survives(kind, tmp_path / str(call), 0, kill_at_call("rename", call), undisturbed(kind)):
        call += 1
    assert call > 1


def test_damaged_checkpoints_are_passed_over_and_the_run_goes_on_exactly(tmp_path, undisturbed):
    kind = KINDS[2]
    whole = values(run(kind, lambda rank, world_size: live(kind, tmp_path)))
    assert [life.state for life in whole] == [life.state for life in undisturbed(kind)]
    for step in (8, 10):
        for file in (tmp_path / f"checkpoint-{step}").glob("*.safetensors"):
            content = bytearray(file.read_bytes())
            content[-1] ^= 1
            file.write_bytes(content)
    resumed = values(run(kind, lambda rank, world_size: live(kind, tmp_path)))
    assert_continues(resumed, whole, from_step=4)


# ---- another world size


def in_order_of_reading(ranks: list[list[list[int]]]) -> list[int]:
    """All samples that the ranks got, step by step."""
    return [sample for step in zip(*ranks, strict=True) for batch in step for sample in batch]


@pytest.mark.parametrize("dispatch_batches", [False, True])
@pytest.mark.parametrize(("old", "new"), [(1, 2), (2, 1), (2, 4), (4, 2)])
def test_another_world_size_neither_repeats_nor_leaves_out_a_sample(tmp_path, old, new, dispatch_batches):
    settings = (("dispatch_batches", dispatch_batches),)
    before, after = Kind(DDPTrainer, old, settings), Kind(DDPTrainer, new, settings)

    def first_life(rank: int, world_size: int) -> list[list[int]]:
        return live(before, tmp_path, max_steps=1).batches

    def other_life(directory: Path, step: int) -> tuple[Life, str]:
        states: list[str] = []
        hook = at_step(step, lambda: states.extend(digests(torch.get_rng_state()).values()))
        return live(after, directory, max_steps=step, hooks=(hook,)), states[0]

    first = in_order_of_reading(values(run(before, first_life)))
    lives, states = zip(*values(run(after, lambda rank, world_size: other_life(tmp_path, 2))), strict=True)
    assert all(life.first_step == 2 for life in lives)
    read = first + in_order_of_reading([life.batches for life in lives])
    assert read == epoch_order(GlobalPosition(53, seed=42)).tolist()[: len(read)]
    assert len(first) == old * 6
    assert len(read) == old * 6 + new * 6
    # Random streams belong to a rank of one world size: new ones begin, one a rank, and not those of step 1 again.
    fresh = [state for _, state in values(run(after, lambda rank, world_size: other_life(tmp_path / "fresh", 1)))]
    assert len({*states, *fresh}) == 2 * new


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (Kind(DDPTrainer, 2, (("dispatch_batches", True),)), Kind(DDPTrainer, 2)),
        (Kind(DDPTrainer, 2), Kind(DDPTrainer, 2, (("dispatch_batches", True),))),
        (Kind(Trainer, 1), Kind(DDPTrainer, 2)),
        (Kind(DDPTrainer, 2), Kind(Trainer, 1)),
    ],
    ids=str,
)
def test_b34_who_reads_the_data_may_change_between_runs(tmp_path, before, after):
    def first_life(rank: int, world_size: int) -> list[list[int]]:
        return live(before, tmp_path, max_steps=1).batches

    def next_life(rank: int, world_size: int) -> Life:
        return live(after, tmp_path, max_steps=2)

    first = in_order_of_reading(values(run(before, first_life)))
    lives = values(run(after, next_life))
    assert all(life.first_step == 2 for life in lives)
    read = first + in_order_of_reading([life.batches for life in lives])
    assert len(read) > len(first)
    assert read == epoch_order(GlobalPosition(53, seed=42)).tolist()[: len(read)]
