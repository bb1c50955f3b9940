"""How far a training is: on a terminal a bar, elsewhere a line now and then."""

import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

from forgather_ckpt import figures
from forgather_ckpt.callbacks.displays import Display, display_for
from forgather_ckpt.callbacks.events import TrainerCallback, TrainerControl, TrainerState
from forgather_ckpt.callbacks.memory_growth import MemoryGrowth, bytes_in_use
from forgather_ckpt.callbacks.step_times import WINDOW, StepTimes


class ProgressBar(TrainerCallback):
    """Shows, on rank 0, how far the training is.

        Training:  45% | step 9000/20000 | loss 3.20 (avg 3.41) | 0.47 it/s | eta 6h30m | ckpt 150 steps ago (3.1 s,
        0.6 %) | mem 14.0 GB +245 MB

    In this order: the loss of the last step, and the mean of the last 50; steps a second, by the last 50, saves and
    evaluations left out; the time that is left, with saves and evaluations as often as so far; how many steps would be
    lost now, how long training stood still for the last save, and the share of the time that all saves took; memory, on
    the CUDA device where there is one, and by how much it has grown since step 10 of this process, with a warning when
    that is more than half.

    `stream` (stderr) gets a bar if it is a terminal, which log lines do not tear, otherwise a line every `every_seconds`
    and one at the end. The loss is read from the device only when it is shown.
    """

    def __init__(
        self,
        every_seconds: float = 30,
        stream: TextIO | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        memory: Callable[[], int] = bytes_in_use,
    ) -> None:
        if isinstance(every_seconds, bool) or not isinstance(every_seconds, int | float) or not every_seconds >= 0:
            raise ValueError(f"every_seconds must be a number of at least 0, not {every_seconds!r}")
        self._every_seconds, self._stream = every_seconds, stream
        self._clock, self._memory = clock, memory
        self._shown: _Progress | None = None

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        stream = sys.stderr if self._stream is None else self._stream
        display = display_for(stream, self._every_seconds)
        self._shown = _Progress(display, self._clock, MemoryGrowth(self._memory))

    def on_step_end(
        self, args: Any, state: TrainerState, control: TrainerControl, *, metrics: Mapping[str, Any], **kwargs: Any
    ) -> None:
        if self._shown is not None:
            self._shown.step(state, _unread(metrics, "loss"))

    def on_evaluate(
        self, args: Any, state: TrainerState, control: TrainerControl, *, metrics: Mapping[str, Any], **kwargs: Any
    ) -> None:
        if self._shown is not None:
            self._shown.times.interrupt()

    def on_save(
        self, args: Any, state: TrainerState, control: TrainerControl, *, path: Path, kind: str, **kwargs: Any
    ) -> None:
        if self._shown is not None:
            self._shown.save(state)

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        shown, self._shown = self._shown, None
        if shown is not None:
            shown.end(state)


class _Progress:
    """What is known of one training, from its first event to its last."""

    def __init__(self, display: Display, clock: Callable[[], float], memory: MemoryGrowth) -> None:
        self.times = StepTimes()
        self._display, self._clock, self._memory = display, clock, memory
        self._began = clock()
        self._due = self._began + display.seconds_between
        self._losses: deque[Any] = deque(maxlen=WINDOW)
        """Numbers, and tensors that nobody has waited for yet."""
        self._save_seconds = 0.0

    def step(self, state: TrainerState, loss: Any) -> None:
        now = self._clock()
        self.times.step(now)
        self._memory.step()
        if loss is not None:
            self._losses.append(loss)
        if now >= self._due:
            self._due = now + self._display.seconds_between
            seconds = self.times.seconds_left(max(0, state.max_steps - state.global_step))
            self._show(state, None if seconds is None else f"eta {figures.duration(seconds)}")

    def save(self, state: TrainerState) -> None:
        self.times.interrupt()
        self._save_seconds += state.last_save_seconds or 0.0

    def end(self, state: TrainerState) -> None:
        try:
            self._show(state, f"took {figures.duration(self._clock() - self._began)}")
        finally:
            self._display.close()

    def _show(self, state: TrainerState, time_part: str | None) -> None:
        percent = 100 * state.global_step // state.max_steps if state.max_steps > 0 else 0
        parts = [
            f"step {state.global_step}/{state.max_steps}",
            self._loss_part(),
            self._rate_part(),
            time_part,
            self._checkpoint_part(state),
            self._memory_part(),
        ]
        self._display.show(min(100, percent), " | ".join(part for part in parts if part is not None))

    def _loss_part(self) -> str | None:
        if not self._losses:
            return None
        read = [float(loss) for loss in self._losses]
        self._losses.clear()
        self._losses.extend(read)
        return f"loss {figures.loss(read[-1])} (avg {figures.loss(sum(read) / len(read))})"

    def _rate_part(self) -> str | None:
        seconds = self.times.seconds_per_step
        return None if seconds is None else figures.rate(1 / seconds)

    def _checkpoint_part(self, state: TrainerState) -> str:
        if state.last_checkpoint_step is None:
            return "no ckpt"
        num_steps = state.global_step - state.last_checkpoint_step
        ago = f"ckpt {num_steps} step{'' if num_steps == 1 else 's'} ago"
        elapsed = self._clock() - self._began
        if state.last_save_seconds is None or elapsed <= 0:
            return ago
        share = 100 * self._save_seconds / elapsed
        return f"{ago} ({state.last_save_seconds:.1f} s, {share:.1f} %)"

    def _memory_part(self) -> str:
        now, growth = self._memory.look()
        grown = "" if growth is None else f" {figures.byte_count(growth, signed=True)}"
        return f"mem {figures.byte_count(now)}{grown}"


def _unread(metrics: Mapping[str, Any], key: str) -> Any:
    """The value, as a tensor that nobody waits for where the trainer gives one; None where there is none."""
    return getattr(metrics, "tensor", metrics.get)(key)
