"""Writing the log of digests of one rank (`digest_log`): appending, and taking up what a dead writer has left."""

import datetime
import fcntl
import os
import weakref
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from forgather_ckpt import files
from forgather_ckpt.digest_log import CHECK, HEAD, STEP, Column, Header, Part, encoded, read_header, records
from forgather_ckpt.errors import FormatError, RunDirectoryInUse, StorageError
from forgather_ckpt.hashtree import DIGEST_BYTES


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


_Identity = tuple[int, int, int]
"""Process, device, inode: a forked child inherits `_writers`, but not the locks."""

_writers: "weakref.WeakValueDictionary[_Identity, LogWriter]" = weakref.WeakValueDictionary()
"""The logs that are open for writing here: a record lock does not keep its own process out."""


class LogWriter:
    """Appends to the log of one rank, which is made if it is not there.

    Every frame has reached the kernel when `write` returns, so a process that is killed loses at most the one that it
    was writing; nothing is synced. The log is locked, as `lease` locks a run directory: the lock ends with the process.
    In one process the newest writer of a log takes it over: the one before may belong to a job that has ended.

    `RunDirectoryInUse` if another process writes to it, `FormatError` if it is damaged or another rank's, `StorageError`
    if the file system refuses.
    """

    def __init__(
        self, path: Path, *, rank: int, world_size: int, include: Sequence[str] = ("*",), exclude: Sequence[str] = ()
    ) -> None:
        self.path = path
        self._facts = {
            "rank": rank,
            "world_size": world_size,
            "started": _now(),
            "include": tuple(include),
            "exclude": tuple(exclude),
        }
        self._columns: tuple[Sequence[Part], Sequence[Column]] | None = None
        self._check = b""
        with files.typed_errors(path, "opening the log of digests"):
            files.make_directory(path.parent)
            with suppress(FileNotFoundError):
                # before the file is opened: closing any descriptor of it gives up the lock
                if (before := _writers.get(_identity(path.stat()))) is not None:
                    before.close()
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            self._descriptor = os.open(path, flags, 0o666)
            try:
                self._lock()
                self._end = self._cut_to_whole_records(rank)
            except BaseException:
                os.close(self._descriptor)
                raise
        _writers[_identity(os.fstat(self._descriptor))] = self
        self._close = weakref.finalize(self, os.close, self._descriptor)

    def _lock(self) -> None:
        try:
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise RunDirectoryInUse(
                f"another process records to {self.path}; give each a directory of its own", path=str(self.path)
            ) from None

    def _cut_to_whole_records(self, rank: int) -> int:
        """Cut away what a writer that died has left unfinished; where the next record goes."""
        size = os.fstat(self._descriptor).st_size
        end = 0
        try:
            for record in records(self._descriptor, size):
                if end == 0 and record.kind == HEAD:
                    owner = read_header(self._descriptor, record)[0].rank
                    if owner != rank:
                        raise FormatError(f"this is the log of rank {owner}, not of rank {rank}")
                end = record.stop
        except FormatError as err:
            raise type(err)(
                f"{self.path}: {err.message}; move it away, or record into another directory", path=str(self.path)
            ) from None
        if end < size:
            os.ftruncate(self._descriptor, end)
        return end

    def write(self, step: int, parts: Sequence[Part], columns: Sequence[Column], digests: bytes) -> None:
        """Append one frame: `digests` are 16 bytes a column. Columns of one part lie together, in the order of parts.

        After an error the log ends with the last whole frame, as far as the file system permits.
        """
        if not 0 <= step < 1 << 63:
            raise ValueError(f"step {step} cannot be recorded; count steps from 0 up")
        if len(digests) != DIGEST_BYTES * len(columns):
            raise ValueError(f"{len(digests)} bytes of digests for {len(columns)} columns")
        if not self._close.alive:
            raise RunDirectoryInUse(
                f"this recording has ended: a later one of this process writes to {self.path} now", path=str(self.path)
            )
        with files.typed_errors(self.path, f"recording the digests of step {step}"):
            if os.fstat(self._descriptor).st_nlink == 0:
                raise StorageError(f"{self.path} was deleted while it was being recorded to", path=str(self.path))
            if self._columns != (parts, columns):
                _check_order(parts, columns)
                header = Header(parts=tuple(parts), columns=tuple(columns), **self._facts)  # type: ignore[arg-type]
                record = encoded(HEAD, len(columns), header.to_bytes())
                self._append(record)
                self._check = record[-CHECK.size :]
                self._columns = parts, columns
            self._append(encoded(STEP, step, self._check, digests))

    def _append(self, record: bytes) -> None:
        try:
            files.write_at(self._descriptor, record, self._end)
        except OSError:
            with suppress(OSError):
                os.ftruncate(self._descriptor, self._end)
            raise
        self._end += len(record)

    def close(self) -> None:
        """A second call does nothing."""
        self._close()


def _check_order(parts: Sequence[Part], columns: Sequence[Column]) -> None:
    """The format keeps columns by component: in any other order, digests would come back under other names."""
    keys = [part.key for part in parts]
    if len(set(keys)) < len(keys):
        raise ValueError(f"the parts {keys} name a component twice")
    places = [keys.index(column.component) for column in columns]
    if places != sorted(places):
        raise ValueError("the columns of one component must lie together, in the order of the parts")


def _identity(status: os.stat_result) -> _Identity:
    return os.getpid(), status.st_dev, status.st_ino
