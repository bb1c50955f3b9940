"""What a callback answers when it is told a number: go on, or end the training, and exactly why."""

from dataclasses import dataclass
from enum import StrEnum


class Action(StrEnum):
    """What is to happen next."""

    CONTINUE = "continue"
    STOP = "stop"
    """End the training at this step, with a checkpoint."""
    ABORT = "abort"
    """End it without one: a save that is due or under way is given up."""


@dataclass(frozen=True)
class Decision:
    """What is to happen, with the reason where the training is to end.

    It follows from the numbers that one rank was told. Ranks may be told different ones, so the trainer lets them
    agree before any of them acts.
    """

    action: Action = Action.CONTINUE
    reason: str | None = None

    @property
    def ends_training(self) -> bool:
        return self.action is not Action.CONTINUE


CONTINUE = Decision()
