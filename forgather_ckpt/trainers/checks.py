"""What a trainer refuses before it begins, with what to write instead."""

import inspect

import torch
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau


def refuse_missing_device(device: str | None) -> None:
    if device is None or torch.device(device).type != "cuda":
        return
    if not torch.cuda.is_available():
        raise ValueError(
            f'device={device!r}, but torch finds no CUDA device here (torch {torch.__version__}); write device="cpu", or '
            "None for what there is"
        )


def refuse_unusable(optimizer: torch.optim.Optimizer, lr_scheduler: LRScheduler) -> None:
    """Refuse what the loop, which calls `step()` without arguments, could not drive."""
    parameters = list(inspect.signature(type(optimizer).step).parameters.values())[1:]
    if any(one.default is one.empty and one.kind is one.POSITIONAL_OR_KEYWORD for one in parameters):
        raise ValueError(
            f"{type(optimizer).__name__}.step() needs a closure that computes the loss again, and the training loop gives "
            "none; use an optimizer that steps without one, or override apply_gradients"
        )
    if isinstance(lr_scheduler, ReduceLROnPlateau):
        raise ValueError(
            "ReduceLROnPlateau.step() needs a metric, and the training loop gives none; use a schedule that depends on the "
            "step alone, or override apply_gradients"
        )
