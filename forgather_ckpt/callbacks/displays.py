"""Where progress is shown: a bar that is redrawn on a terminal, else lines."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol, TextIO

_REDRAW_SECONDS = 1.0
_BAR_COLUMNS = 12


class Display(Protocol):
    seconds_between: float
    """How often it is to be shown anew."""

    def show(self, percent: int, text: str) -> None: ...

    def close(self) -> None: ...


def display_for(stream: TextIO, every_seconds: float) -> Display:
    """A bar on a terminal. One that says it has no rows, as some that containers give, would show nothing of it."""
    if not stream.isatty():
        return Lines(stream, every_seconds)
    try:
        has_rows = os.get_terminal_size(stream.fileno()).lines > 0
    except OSError:  # no descriptor: a notebook
        has_rows = True
    return Bar(stream) if has_rows else Lines(stream, every_seconds)


class Lines:
    """A line each time, for files and pipes."""

    def __init__(self, stream: TextIO, every_seconds: float) -> None:
        self.seconds_between = every_seconds
        self._stream = stream

    def show(self, percent: int, text: str) -> None:
        self._stream.write(f"Training: {percent:3d}% | {text}\n")
        self._stream.flush()

    def close(self) -> None: ...


class Bar:
    """A bar at the bottom of a terminal; what is logged meanwhile goes above it, in whole lines."""

    seconds_between = _REDRAW_SECONDS

    def __init__(self, stream: TextIO) -> None:
        from tqdm import tqdm  # here: it is slow to import, and most runs have no terminal

        class Plain(tqdm):  # type: ignore[misc]
            monitor_interval = 0
            """No thread that redraws bars by itself."""

        self._bar = Plain(total=100, file=stream, dynamic_ncols=True, bar_format="Training: {bar}")
        self._stack = ExitStack()
        self._stack.enter_context(_logged_above(Plain))

    def show(self, percent: int, text: str) -> None:
        self._bar.bar_format = f"Training: {percent:3d}% |{{bar:{_BAR_COLUMNS}}}| {text}"
        self._bar.n = percent
        self._bar.refresh()

    def close(self) -> None:
        self._bar.close()
        self._stack.close()


@contextmanager
def _logged_above(bars: Any) -> Iterator[None]:
    """While this is entered, what handlers write to the terminal does not tear bars of this class.

    The handlers stay what they are, with level, filters and format; only their streams are others.
    """
    found: dict[logging.StreamHandler[Any], Any] = {}
    for logger in (logging.root, *logging.root.manager.loggerDict.values()):
        for handler in logger.handlers if isinstance(logger, logging.Logger) else ():
            if isinstance(handler, logging.StreamHandler) and handler.stream in (sys.stdout, sys.stderr):
                found[handler] = handler.stream
    last_resort = logging.lastResort
    if last_resort is not None:
        replacement = logging.StreamHandler(_Above(bars, sys.stderr))
        replacement.setLevel(last_resort.level)
        logging.lastResort = replacement
    for handler, stream in found.items():
        handler.setStream(_Above(bars, stream))
    try:
        yield
    finally:
        logging.lastResort = last_resort
        for handler, stream in found.items():
            handler.setStream(stream)


class _Above:
    """A stream whose text appears above the bars."""

    def __init__(self, bars: Any, stream: TextIO) -> None:
        self._bars, self._stream = bars, stream

    def write(self, text: str) -> int:
        with self._bars.external_write_mode(file=self._stream):
            return self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
