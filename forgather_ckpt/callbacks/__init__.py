"""What is told what happens in a training: watchers that say when it should end, and what shows and logs how it goes.

None imports torch; the watchers are usable by themselves.
"""

from forgather_ckpt.callbacks.decision import Action, Decision
from forgather_ckpt.callbacks.divergence import DualTimeScaleDivergenceDetector, DualWindowDivergenceDetector
from forgather_ckpt.callbacks.early_stopping import EarlyStopping
from forgather_ckpt.callbacks.events import TrainerCallback, TrainerControl, TrainerState
from forgather_ckpt.callbacks.jsonl_logger import JsonlLogger
from forgather_ckpt.callbacks.progress_bar import ProgressBar
from forgather_ckpt.callbacks.tensorboard import TensorBoardLogger

__all__ = [
    "TrainerCallback",
    "TrainerControl",
    "TrainerState",
    "DualTimeScaleDivergenceDetector",
    "DualWindowDivergenceDetector",
    "EarlyStopping",
    "Action",
    "Decision",
    "ProgressBar",
    "JsonlLogger",
    "TensorBoardLogger",
]
