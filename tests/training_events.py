"""A training without one: the events of its steps, in the order in which a trainer tells them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from forgather_ckpt.callbacks import TrainerCallback, TrainerControl, TrainerState
from forgather_ckpt.trainers.arguments import TrainingArguments
from forgather_ckpt.trainers.events import StepMetrics


class Events:
    """Tells callbacks what happens; `control` has what they asked for."""

    def __init__(
        self, callbacks: Sequence[TrainerCallback], run: Path, *, step: int = 0, max_steps: int = 100, rank: int = 0
    ) -> None:
        self.callbacks = callbacks
        self.args = TrainingArguments(run)
        self.control = TrainerControl()
        checkpoint = run / f"checkpoint-{step}" if step else None
        self.state = TrainerState(
            step,
            max_steps,
            rank=rank,
            resumed_from=checkpoint,
            last_checkpoint=checkpoint,
            last_checkpoint_step=step or None,
        )
        self.tell("on_train_begin")

    def tell(self, event: str, **facts: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, event)(self.args, self.state, self.control, **facts)

    def step(self, **metrics: Any) -> None:
        """One step; numbers come as a trainer gives them, as tensors that nobody has read."""
        self.state.global_step += 1
        self.state.epoch = self.state.global_step / 10
        self.tell("on_step_begin")
        self.tell("on_step_end", metrics=StepMetrics({name: torch.as_tensor(value) for name, value in metrics.items()}))

    def log(self, **logs: Any) -> None:
        self.tell("on_log", logs=logs)

    def evaluate(self, **metrics: Any) -> None:
        self.tell("on_evaluate", metrics=metrics)

    def save(self, seconds: float = 2.0, kind: str = "periodic") -> None:
        path = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        self.state.last_checkpoint, self.state.last_checkpoint_step = path, self.state.global_step
        self.state.last_save_seconds = seconds
        self.tell("on_save", path=path, kind=kind)

    def end(self) -> None:
        self.tell("on_train_end", error=None)
