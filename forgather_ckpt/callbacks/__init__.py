"""What watches a run and says when it should end; each is usable by itself, and none imports torch."""

from forgather_ckpt.callbacks.decision import Action, Decision
from forgather_ckpt.callbacks.divergence import DualTimeScaleDivergenceDetector, DualWindowDivergenceDetector
from forgather_ckpt.callbacks.early_stopping import EarlyStopping

__all__ = [
    "Action",
    "Decision",
    "DualTimeScaleDivergenceDetector",
    "DualWindowDivergenceDetector",
    "EarlyStopping",
]
