"""The metrics of a run, a line of JSON each, in one history that resumes do not fork."""

import datetime
import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from forgather_ckpt import strict_json
from forgather_ckpt.callbacks.events import TrainerCallback, TrainerControl, TrainerState
from forgather_ckpt.callbacks.metrics_log import MetricsLog
from forgather_ckpt.callbacks.watched import number_of
from forgather_ckpt.errors import CheckpointError

logger = logging.getLogger(__name__)

T = TypeVar("T")

NAME = "metrics.jsonl"


class JsonlLogger(TrainerCallback):
    """Appends what happens to `<output_dir>/metrics.jsonl`, or `path`, on rank 0:

        {"step":100,"epoch":0.5,"time":"2026-11-21T14:30:00+00:00","loss":3.2,"learning_rate":0.0003}
        {"step":100,"epoch":0.5,"time":"2026-11-21T14:30:02+00:00","eval_loss":3.4}
        {"step":100,"epoch":0.5,"time":"2026-11-21T14:30:05+00:00","checkpoint":"checkpoint-100","kind":"periodic","seconds":3.1}

    Each line is strict JSON; what is not finite is written as "NaN", "Infinity", "-Infinity".

    A resume at step s goes on from the lines up to s: later ones are removed, as their steps are done again, and so is a
    line that a killed process left unfinished. A fresh start keeps the log that is there as `metrics.jsonl.old-1`. A file
    that has anything but such lines is left alone, with a warning, and the log is `metrics-2.jsonl`.

    A line has left the process when the event returns, and is on the disk with the next checkpoint. Where the disk fails,
    that is logged once, and what cannot be written is lost.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        self.path = None if path is None else Path(path)
        """Of the log; once training has begun, of the one that is written."""
        self._asked = self.path
        self._log: MetricsLog | None = None
        self._has_failed = False

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        self._has_failed = False
        path = Path(args.output_dir) / NAME if self._asked is None else self._asked
        is_fresh = state.global_step == 0 and state.resumed_from is None
        self._log = self._attempt(lambda: MetricsLog.open(path, after=None if is_fresh else state.global_step))
        self.path = path if self._log is None else self._log.path

    def on_log(
        self, args: Any, state: TrainerState, control: TrainerControl, *, logs: Mapping[str, Any], **kwargs: Any
    ) -> None:
        self._write(state, logs)

    def on_evaluate(
        self, args: Any, state: TrainerState, control: TrainerControl, *, metrics: Mapping[str, Any], **kwargs: Any
    ) -> None:
        self._write(state, metrics)

    def on_save(
        self, args: Any, state: TrainerState, control: TrainerControl, *, path: Path, kind: str, **kwargs: Any
    ) -> None:
        self._write(state, {"checkpoint": path.name, "kind": kind, "seconds": state.last_save_seconds})
        if self._log is not None:
            self._attempt(self._log.sync)

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        log, self._log = self._log, None
        if log is not None:
            self._attempt(log.sync)
            log.close()

    def _write(self, state: TrainerState, values: Mapping[str, Any]) -> None:
        if self._log is None:
            return
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        record = {"step": state.global_step, "epoch": state.epoch, "time": now}
        record |= {name: value for name, value in values.items() if name not in record}
        line = strict_json.dumps({name: _plain(value) for name, value in record.items()}) + b"\n"
        log = self._log
        self._attempt(lambda: log.append(line))

    def _attempt(self, operation: Callable[[], T]) -> T | None:
        try:
            return operation()
        except (OSError, CheckpointError) as err:
            if not self._has_failed:
                self._has_failed = True
                logger.warning("metrics are not written for now, and training goes on: %s", err)
            return None


def _plain(value: Any) -> Any:
    """As strict JSON can hold it: what is not finite by name, tensors and numpy scalars as numbers, others as text."""
    match value:
        case None | bool() | str() | int():
            return value
        case float():
            return value if math.isfinite(value) else _NOT_FINITE[str(value)]
        case Mapping():
            return {str(key): _plain(item) for key, item in value.items()}
        case list() | tuple():
            return [_plain(item) for item in value]
        case _:
            try:
                return _plain(number_of("value", value))
            except TypeError:
                return str(value)


_NOT_FINITE = {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}
