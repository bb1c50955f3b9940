"""Trainers to read, to use and to subclass: real torch underneath, and all their state declared."""

import importlib
from typing import TYPE_CHECKING, Any

from forgather_ckpt.trainers.arguments import TrainingArguments
from forgather_ckpt.trainers.ddp import DDPTrainer
from forgather_ckpt.trainers.progress import TrainResult
from forgather_ckpt.trainers.stages import Part
from forgather_ckpt.trainers.trainer import Trainer

if TYPE_CHECKING:
    from forgather_ckpt.trainers.accel import AccelTrainer as AccelTrainer
    from forgather_ckpt.trainers.fsdp import FSDPTrainer
    from forgather_ckpt.trainers.hybrid import HybridPipelineTrainer, HybridTrainer
    from forgather_ckpt.trainers.pipeline import PipelineTrainer

# Without AccelTrainer, or `import *` would need accelerate.
__all__ = [
    "DDPTrainer",
    "FSDPTrainer",
    "HybridPipelineTrainer",
    "HybridTrainer",
    "Part",
    "PipelineTrainer",
    "TrainResult",
    "Trainer",
    "TrainingArguments",
]

_MODULES = {
    "AccelTrainer": "accel",
    "FSDPTrainer": "fsdp",
    "HybridPipelineTrainer": "hybrid",
    "HybridTrainer": "hybrid",
    "PipelineTrainer": "pipeline",
}
"""Imported when they are first used: accelerate need not be there, and torch's DTensor takes half a second."""


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'forgather_ckpt.trainers' has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
