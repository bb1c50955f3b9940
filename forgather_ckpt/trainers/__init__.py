"""Trainers to read, to use and to subclass: real torch underneath, and all their state declared."""

from forgather_ckpt.trainers.arguments import TrainingArguments
from forgather_ckpt.trainers.ddp import DDPTrainer
from forgather_ckpt.trainers.progress import TrainResult
from forgather_ckpt.trainers.trainer import Trainer

__all__ = ["DDPTrainer", "TrainResult", "Trainer", "TrainingArguments"]
