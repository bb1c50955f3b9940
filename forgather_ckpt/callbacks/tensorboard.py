"""The metrics of a run for TensorBoard."""

import importlib.util
import logging
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from forgather_ckpt.callbacks.events import TrainerCallback, TrainerControl, TrainerState
from forgather_ckpt.callbacks.watched import number_of

if TYPE_CHECKING:
    from torch.utils.tensorboard.writer import SummaryWriter

logger = logging.getLogger(__name__)

NAME = "tensorboard"


class TensorBoardLogger(TrainerCallback):
    """Writes scalars to `<output_dir>/tensorboard`, or `directory`, on rank 0; show them with `tensorboard --logdir`.

    Metrics of logs are `train/loss`, those of evaluations `eval/loss`; `ckpt/save_seconds` is how long training stood
    still for a checkpoint. Values that are no numbers are left out.

    A resume at step s makes TensorBoard forget what comes after s, as those steps are done again; a fresh start in the
    same directory, everything.

    ImportError where tensorboard is not installed, with what to install. Where the disk fails, that is logged once and
    nothing more is written.
    """

    def __init__(self, directory: str | Path | None = None) -> None:
        if importlib.util.find_spec("tensorboard") is None:
            raise ImportError(
                'TensorBoardLogger needs tensorboard, which is not installed: pip install "forgather-ckpt[tensorboard]"'
            )
        self._directory = None if directory is None else Path(directory)
        self._writer: SummaryWriter | None = None

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        from torch.utils.tensorboard.writer import SummaryWriter

        directory = self._directory or Path(args.output_dir) / NAME
        try:
            self._writer = SummaryWriter(str(directory), purge_step=state.global_step + 1)
        except OSError as err:
            self._give_up(err)

    def on_log(
        self, args: Any, state: TrainerState, control: TrainerControl, *, logs: Mapping[str, Any], **kwargs: Any
    ) -> None:
        self._write("train", state, logs)

    def on_evaluate(
        self, args: Any, state: TrainerState, control: TrainerControl, *, metrics: Mapping[str, Any], **kwargs: Any
    ) -> None:
        self._write("eval", state, metrics)

    def on_save(
        self, args: Any, state: TrainerState, control: TrainerControl, *, path: Path, kind: str, **kwargs: Any
    ) -> None:
        self._write("ckpt", state, {"save_seconds": state.last_save_seconds})
        self._attempt("flush")

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._attempt("close")
        self._writer = None

    def _write(self, group: str, state: TrainerState, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            tag = f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"{group}/{name}"
            with suppress(TypeError):
                self._attempt("add_scalar", tag, number_of(tag, value), state.global_step)

    def _attempt(self, method: str, *arguments: Any) -> None:
        if self._writer is not None:
            try:
                getattr(self._writer, method)(*arguments)
            except OSError as err:
                self._give_up(err)

    def _give_up(self, err: OSError) -> None:
        self._writer = None
        logger.warning("nothing more is written for TensorBoard, and training goes on: %s", err)
