"""An accident on order: the process dies in the middle of writing a checkpoint. For the demonstration only."""

import os
import signal
from unittest import mock

from forgather_ckpt.trainers import Trainer


class KillInSave:
    """Ends this process by SIGKILL when it has written half of its first tensors for the checkpoint of `step`.

    A hook for `on_step_end`, which runs before the save. Only a run that began at the first step dies, so that
    the same command started again survives.
    """

    def __init__(self, step: int) -> None:
        self.step = step
        self._first_step: int | None = None

    def __call__(self, trainer: Trainer) -> None:
        if self._first_step is None:
            self._first_step = trainer.progress.step
        if self._first_step == 1 and trainer.progress.step == self.step:
            mock.patch("os.pwrite", _write_half_and_die).start()


_pwrite = os.pwrite


def _write_half_and_die(descriptor: int, data: memoryview | bytes, offset: int) -> int:
    if offset == 0:  # the header of the file; the tensors come next
        return _pwrite(descriptor, data, offset)
    _pwrite(descriptor, memoryview(data)[: len(data) // 2], offset)
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("SIGKILL was survived")
