"""The memory of this process, and whether it grows while it should not."""

import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path

from forgather_ckpt import figures

logger = logging.getLogger(__name__)

BASELINE_STEP = 10
"""By this step of a process, optimizer state, caches and buffers are there."""
LARGEST_GROWTH = 0.5


def bytes_in_use() -> int:
    """What tensors take on the CUDA device of this process where it uses one, else its resident memory.

    Between steps, so what a step needs only while it runs is not in it.
    """
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        return int(torch.cuda.memory_allocated())
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


class MemoryGrowth:
    """Compares memory with what it was when training had settled; one warning where it has grown by half."""

    def __init__(self, measure: Callable[[], int] = bytes_in_use) -> None:
        self._measure = measure
        self._num_steps = 0
        self._baseline: int | None = None
        self._has_warned = False

    def step(self) -> None:
        self._num_steps += 1
        if self._num_steps == BASELINE_STEP:
            self._baseline = self._measure()

    def look(self) -> tuple[int, int | None]:
        """Bytes now, and how many more than at step 10 of this process; None before that."""
        now = self._measure()
        if self._baseline is None:
            return now, None
        growth = now - self._baseline
        if growth > LARGEST_GROWTH * self._baseline and not self._has_warned:
            self._has_warned = True
            logger.warning(
                "memory has grown by %.0f %% in %d steps, from %s to %s: something may be kept from each step, such as "
                "losses with their graphs (keep loss.item() or loss.detach() instead)",
                100 * growth / max(1, self._baseline),
                self._num_steps - BASELINE_STEP,
                figures.byte_count(self._baseline),
                figures.byte_count(now),
            )
        return now, growth
