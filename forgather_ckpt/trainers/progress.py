"""How far a run has come, and what `Trainer.train` returns."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch


@dataclass
class Progress:
    """What a trainer counts; the same on every rank, and saved as its own component.

    Save and log times follow from `step`, so no other phase is kept.
    """

    step: int = 0
    """Optimizer steps done."""
    epoch: int = 0
    """Epochs done."""
    last_loss: torch.Tensor = field(default_factory=lambda: torch.zeros(()))
    loss_sum: torch.Tensor = field(default_factory=lambda: torch.zeros(()))
    """Over the steps since the last log. On the training device, so that a step does not wait for it."""
    num_losses: int = 0
    evaluated_step: int | None = -1
    """At which the callbacks were last told of an evaluation, -1 for none; None if it was not saved."""

    def add_step(self, loss: torch.Tensor) -> None:
        self.step += 1
        self.last_loss = loss
        self.loss_sum = self.loss_sum.to(loss.device) + loss
        self.num_losses += 1

    def take_mean_loss(self) -> float:
        """The mean loss since the last call."""
        mean = self.loss_sum.item() / self.num_losses
        self.loss_sum, self.num_losses = torch.zeros_like(self.loss_sum), 0
        return mean

    def state_dict(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "epoch": self.epoch,
            "last_loss": self.last_loss.item(),
            "loss_sum": self.loss_sum.item(),
            "num_losses": self.num_losses,
            "evaluated_step": self.evaluated_step,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.step = int(state_dict["step"])
        self.epoch = int(state_dict["epoch"])
        self.last_loss = torch.tensor(state_dict["last_loss"])
        self.loss_sum = torch.tensor(state_dict["loss_sum"])
        self.num_losses = int(state_dict["num_losses"])
        self.evaluated_step = state_dict.get("evaluated_step")


@dataclass(frozen=True)
class TrainResult:
    """What a run came to."""

    steps: int
    """Optimizer steps of the whole run, those before a resume included."""
    loss: float | None
    """Of the last step; None if there was none."""
    resumed_from: Path | None
    stop_reason: str | None = None
    """What ended the training before its time."""
    exit_code: int = 0
    """For the process: 0 where the training ended by itself or by a decision, 128 and the signal's number after a signal."""
