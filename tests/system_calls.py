"""Watching and breaking the calls by which the package changes a directory."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from forgather_ckpt import files

NAMES = ("open", "pwrite", "posix_fallocate", "ftruncate", "fsync", "mkdir", "rename", "replace", "unlink", "rmdir")


class Calls:
    """What was called, in order: `("fsync", "run/checkpoint-1")`. Paths are those at the time of the call."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, ...]] = []
        self.after: Callable[[], None] = lambda: None
        """Called after every call."""
        self.fail_at: int | None = None
        """The number of the call that fails, instead of being made."""
        self.errno = errno.EIO
        self._is_inside = False

    def make(self, name: str, real: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._is_inside:
            return real(*args, **kwargs)
        self.seen.append(
            (name, *(str(_path_of(arg)) for arg in args if isinstance(arg, int | str | Path) and arg != 0))
        )
        if self.fail_at == len(self.seen) - 1:
            raise OSError(self.errno, os.strerror(self.errno), str(_path_of(args[0])))
        result = real(*args, **kwargs)
        self._is_inside = True
        try:
            self.after()
        finally:
            self._is_inside = False
        return result


def _path_of(arg: Any) -> Any:
    return Path(f"/proc/self/fd/{arg}").resolve() if isinstance(arg, int) else arg


@contextmanager
def watched(run: Path) -> Iterator[Calls]:
    """Watch what is done below `run`, in the block and on any thread."""
    calls = Calls()

    def wrap(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if not str(_path_of(args[0])).startswith(str(run)) and "dir_fd" not in kwargs:
                return real(*args, **kwargs)
            return calls.make(name, real, args, kwargs)

        return wrapper

    with pytest.MonkeyPatch.context() as patch:
        for name in NAMES:
            patch.setattr(os, name, wrap(name, getattr(os, name)))
        patch.setattr(files, "exchange", wrap("exchange", files.exchange))
        yield calls


def num_open_files() -> int:
    """How many descriptors this process holds."""
    return len(list(Path("/proc/self/fd").iterdir()))
