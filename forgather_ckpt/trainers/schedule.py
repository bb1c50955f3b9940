"""When things happen in a run, from absolute step numbers alone: so a resume keeps every grid."""

import math

from forgather_ckpt.triggers import is_multiple as is_multiple


def lr_factor(kind: str, step: int, *, warmup_steps: int, total_steps: int) -> float:
    """What the learning rate is multiplied by after `step` optimizer steps of `total_steps`.

    It rises linearly from 0 over the warmup, then stays (constant), or falls to 0 at `total_steps`, in a line
    or in half a cosine.
    """
    if step < warmup_steps:
        return step / warmup_steps
    done = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    match kind:
        case "constant":
            return 1.0
        case "linear":
            return 1.0 - done
        case "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * done))
    raise ValueError(f"there is no learning rate schedule {kind!r}")
