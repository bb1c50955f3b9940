"""The file of metrics: lines of JSON, each of a step, which is cut back to the step that a run goes on from."""

import itertools
import json
import logging
import os
import weakref
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Self

from forgather_ckpt import files
from forgather_ckpt.errors import FormatError

logger = logging.getLogger(__name__)

_BEGINNING = b'{"step":'


class MetricsLog:
    """Appends lines. OSError or StorageError where the disk fails: the line is then not there, nor any part of it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
        self._close = weakref.finalize(self, os.close, self._descriptor)
        self._end = os.fstat(self._descriptor).st_size

    @classmethod
    def open(cls, path: Path, *, after: int | None) -> Self:
        """The log at `path`, cut back to lines of steps up to `after`; with None a new one, and the one that is there
        is kept under another name.

        A file that is no such log is left alone: the log is then the first of `metrics-2.jsonl`, `metrics-3.jsonl`, …
        that is none of those, and that one is cut back.
        """
        files.make_directory(path.parent)
        for candidate in _names(path):
            try:
                lines, is_torn = _lines(candidate.read_bytes() if candidate.exists() else b"")
            except FormatError as err:
                logger.warning("%s is left alone, as it is no log of metrics: %s", candidate, err.message)
                continue
            if after is None and lines:
                candidate.rename(_first_free(candidate))
            else:
                kept = [line for step, line in lines if after is None or step <= after]
                if is_torn or len(kept) < len(lines):
                    files.replace(candidate.resolve(), b"".join(kept))
            log = cls(candidate)
            files.sync_directory(path.parent)
            return log
        raise AssertionError("names do not end")

    def append(self, line: bytes) -> None:
        try:
            files.write_at(self._descriptor, line, self._end)
        except OSError:
            with suppress(OSError):
                os.ftruncate(self._descriptor, self._end)
            raise
        self._end += len(line)

    def sync(self) -> None:
        os.fsync(self._descriptor)

    def close(self) -> None:
        self._close()


def _names(path: Path) -> Iterator[Path]:
    yield path
    for number in itertools.count(2):
        yield path.with_name(f"{path.stem}-{number}{path.suffix}")


def _first_free(path: Path) -> Path:
    names = (path.with_name(f"{path.name}.old-{number}") for number in itertools.count(1))
    return next(name for name in names if not name.exists())


def _lines(data: bytes) -> tuple[list[tuple[int, bytes]], bool]:
    """The whole lines, each with its step, and whether something torn comes after them.

    A process that was killed leaves a part of a line, a machine that lost power zeros. FormatError where anything else
    than lines of a log and such an end is there.
    """
    *whole, rest = data.split(b"\n")
    found: list[tuple[int, bytes]] = []
    for number, line in enumerate(whole, 1):
        step = _step_of(line)
        if step is None:
            if number == len(whole) and not rest and _may_be_torn(line):
                return found, True
            raise FormatError(f"line {number} is not a JSON object with a step")
        found.append((step, line + b"\n"))
    if not _may_be_torn(rest):
        raise FormatError(f"what comes after line {len(whole)} is no beginning of a line")
    return found, bool(rest)


def _step_of(line: bytes) -> int | None:
    try:
        step = json.loads(line)["step"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return step if type(step) is int else None


def _may_be_torn(rest: bytes) -> bool:
    return rest.startswith(_BEGINNING) or _BEGINNING.startswith(rest.rstrip(b"\0"))
