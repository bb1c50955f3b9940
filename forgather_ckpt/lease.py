"""One writing job per run directory.

The lease is a POSIX record lock (`fcntl.lockf`) on `.lease` in the run directory, held by rank 0. The kernel (or
the NFS server) releases it when its owner dies, however it dies, so a dead owner's lease is taken over at once;
unlike `flock` it is not inherited by forked data workers. The file's content says who holds it.
"""

import contextlib
import datetime
import errno
import fcntl
import json
import os
import socket
import time
from pathlib import Path

from forgather_ckpt import files, paths
from forgather_ckpt.errors import RunDirectoryInUse

PATIENCE_SECONDS = 2.0
"""How long to wait for an owner that is just exiting, as after a restart."""

_Identity = tuple[int, int, int]
"""Process, device, inode: a forked child inherits `_held`, but not the locks."""

_held: dict[_Identity, tuple[int, int]] = {}
"""Identity -> (descriptor, number of holders). A record lock belongs to the process and is lost when any descriptor
of the file is closed, so there must be one descriptor a file."""


class Lease:
    """The right to write to a run directory, until `release`."""

    def __init__(self, run: Path) -> None:
        with files.typed_errors(run, "taking the lease of the run directory"):
            files.make_directory(run)
            self._identity = _acquire(run / paths.LEASE)

    def release(self) -> None:
        """Give the lease back; a second call does nothing."""
        if self._identity is None:
            return
        descriptor, holders = _held.pop(self._identity)
        if holders > 1:
            _held[self._identity] = (descriptor, holders - 1)
        else:
            os.close(descriptor)
        self._identity = None


def is_held(run: Path) -> bool:
    """Whether some process, this one included, holds the lease of the run directory at this moment.

    It asks by trying for a shared lock, and gives that back at once: a job that is just starting waits longer than that.
    Never where another thread of this process may be about to take the lease: closing the file would lose its lock.
    """
    path = run / paths.LEASE
    with files.typed_errors(path, "looking at the lease of the run directory"):
        try:
            if _identity(os.stat(path)) in _held:
                return True
            descriptor = files.open_to_read(path)
        except FileNotFoundError:
            return False
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as err:
            if err.errno not in (errno.EACCES, errno.EAGAIN):
                raise
            return True
        finally:
            os.close(descriptor)
        return False


def _acquire(path: Path) -> _Identity | None:
    with contextlib.suppress(FileNotFoundError):
        identity = _identity(os.stat(path))
        if identity in _held:
            descriptor, holders = _held[identity]
            _held[identity] = (descriptor, holders + 1)
            return identity
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        _lock(descriptor, path)
        owner = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "since": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }
        os.ftruncate(descriptor, 0)
        files.write_at(descriptor, json.dumps(owner).encode(), 0)
    except BaseException:
        os.close(descriptor)
        raise
    identity = _identity(os.fstat(descriptor))
    _held[identity] = (descriptor, 1)
    return identity


def _identity(status: os.stat_result) -> _Identity:
    return os.getpid(), status.st_dev, status.st_ino


def _lock(descriptor: int, path: Path) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except OSError as err:
            if err.errno not in (errno.EACCES, errno.EAGAIN):
                raise
            if time.monotonic() > deadline:
                owner = os.pread(descriptor, 1000, 0).decode("utf-8", "replace") or "unknown"
                raise RunDirectoryInUse(
                    f"another job writes to {path.parent}: {owner}. Stop it, or use another output_dir",
                    path=str(path.parent),
                ) from None
        time.sleep(0.05)
