"""Small runs to train in tests, and what they leave behind."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from forgather_ckpt import catalog, strict_json
from forgather_ckpt.callbacks import TrainerCallback, TrainerControl, TrainerState
from forgather_ckpt.data.seeding import item_generator
from forgather_ckpt.demo.contents import contents
from forgather_ckpt.trainers import Trainer, TrainingArguments
from tests.ranks import Outcome


class Noise:
    """Inputs that are noise, drawn anew in each epoch, and what a linear function makes of them."""

    def __init__(self, num_samples: int = 64, seed: int = 0) -> None:
        self.num_samples, self.seed, self.epoch = num_samples, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        x = torch.randn(4, generator=item_generator(self.seed, self.epoch, index))
        return {"x": x, "y": x.sum()}


class Net(nn.Module):
    """With dropout, so that random numbers matter, and batch statistics, so that modes do."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, 1))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return nn.functional.mse_loss(self.layers(x).squeeze(-1), y)


def trainer_of(kind: type[Trainer], run: Path | str, **given: Any) -> Trainer:
    """A trainer of `Net`; keywords are those of the trainer, or of the arguments."""
    options = {
        name: given.pop(name)
        for name in ("eval_dataset", "callbacks", "on_step_end", "compute_metrics")
        if name in given
    }
    settings: dict[str, Any] = {
        "max_steps": 12,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.01,
        "logging_steps": 4,
        "save_steps": 4,
        "control_steps": 1,
        "checkpoint_timeout_seconds": 20,
        "resume_from_checkpoint": "auto",
    }
    torch.manual_seed(0)
    dataset = given.pop("dataset", None) or Noise()
    return kind(Net(), TrainingArguments(run, **(settings | given)), dataset, **options)


class AskAt(TrainerCallback):
    """Asks for things at steps, on one rank: `AskAt({5: "should_training_stop"}, rank=1)`."""

    def __init__(self, wishes: Mapping[int, str], rank: int = 0, event: str = "on_step_end") -> None:
        self.wishes, self.rank = dict(wishes), rank
        setattr(self, event, self._ask)

    def _ask(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        wish = self.wishes.get(state.global_step)
        if wish is not None and state.rank == self.rank:
            setattr(control, wish, True)
            control.reasons.append(f"asked at {state.global_step}")


class Diary(TrainerCallback):
    """Writes down what it is told: (event, step)."""

    def __init__(self) -> None:
        self.entries: list[tuple[str, int]] = []
        self.metrics: list[tuple[int, dict[str, float]]] = []

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("on_"):
            return super().__getattribute__(name)

        def note(args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
            self.entries.append((name, state.global_step))
            if name == "on_evaluate":
                self.metrics.append((state.global_step, dict(kwargs["metrics"])))

        return note

    def of(self, event: str) -> list[int]:
        return [step for name, step in self.entries if name == event]


class Lines(logging.Handler):
    """All that the package logs, as lines."""

    def __init__(self, level: int = logging.INFO) -> None:
        super().__init__(level)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())

    def __enter__(self) -> Lines:
        self.logger = logging.getLogger("forgather_ckpt")
        self.level_before = self.logger.level
        self.logger.addHandler(self)
        self.logger.setLevel(self.level)
        return self

    def __exit__(self, *_: object) -> None:
        self.logger.removeHandler(self)
        self.logger.setLevel(self.level_before)


def kept(run: Path) -> list[tuple[int, str]]:
    """(step, kind) of the checkpoints that are there, oldest first."""
    found = catalog.scan(run).checkpoints
    return [(one.manifest.step, one.manifest.kind) for one in reversed(found)]


def logged(path: Path) -> list[dict[str, Any]]:
    """The lines of a `JsonlLogger`, but for when something happened and how long it took."""
    lines = [strict_json.loads(line, what="a line", max_bytes=10_000) for line in path.read_bytes().splitlines()]
    return [{key: value for key, value in line.items() if key not in ("time", "seconds")} for line in lines]


def same_on_all(outcomes: list[Outcome]) -> Any:
    """What every rank returned."""
    first = outcomes[0]
    for outcome in outcomes:
        assert outcome.error is None, outcome.error
        assert outcome.value == first.value
    return first.value


def bits(run: Path) -> tuple[Any, ...]:
    """All that the newest checkpoint says of its tensors and values, but for those of callbacks, which may have disturbed
    the run, and when it was evaluated."""
    found = contents(catalog.scan(run).checkpoints[0].path)
    assert {"model", "optimizer", "scheduler", "trainer", "dataset", "rng"} <= found.components
    return found.step, *(
        {key: value for key, value in items.items() if key[0] != "callbacks" and key[-1] != "evaluated_step"}
        for items in (found.tensors, found.values)
    )
