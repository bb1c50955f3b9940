"""What is asked of a running job from outside: small files in its run directory, with the rights of their owner.

    ask(run, "save", "before the maintenance")      # anybody's process, such as `fgckpt save`
    for request in take(run): ...                   # the job's, on rank 0, about once a second

There is no port to open and nothing to listen on: who may write to the run directory as the job's user may ask, and no one
else is heard. A kind has one place; who asks twice before the job looks has asked once. The job takes a request by renaming
it away before it reads it, so that each is taken once, and one that comes meanwhile waits for the next look.
"""

import contextlib
import datetime
import logging
import os
import pwd
import secrets
import socket
import stat
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args

from forgather_ckpt import files, lease, paths, strict_json
from forgather_ckpt.errors import CheckpointNotFound, DeclarationError, FormatError
from forgather_ckpt.names import printable
from forgather_ckpt.strict_json import Fields

logger = logging.getLogger(__name__)

Kind = Literal["save", "stop", "abort"]
"""A checkpoint now; the end of the training with a checkpoint; its end without one."""

KINDS: tuple[Kind, ...] = get_args(Kind)
FORMAT = "forgather_ckpt.request"
MAX_BYTES = 64 << 10
MAX_REASON = 2000

_left_alone: set[Path] = set()
"""What cannot be removed and has been warned of."""


@dataclass(frozen=True)
class Request:
    """One thing that was asked: what, by whom (`user@host pid`), when (UTC, RFC 3339), and why, if that was said."""

    kind: Kind
    by: str
    at: str
    reason: str | None
    id: str

    def __str__(self) -> str:
        """`stop, asked by ann@login1 4711: the queue closes`, in one line."""
        return printable(f"{self.kind}, asked by {self.by}" + (f": {self.reason}" if self.reason else ""))

    def to_bytes(self) -> bytes:
        return strict_json.pretty({"format": FORMAT, **asdict(self)})

    @classmethod
    def from_bytes(cls, data: bytes, kind: Kind) -> "Request":
        """The request in the file of this kind; else `FormatError`."""
        what = "the request"
        said = Fields(strict_json.loads(data, what=what, max_bytes=MAX_BYTES), what)
        if said.text("format") != FORMAT:
            raise FormatError(f"{what} is of format {said.text('format')!r}; expected {FORMAT!r}")
        if said.text("kind") != kind:
            raise FormatError(f"{what} asks to {said.text('kind')!r} in the file of {kind!r}")
        reason = said.optional_text("reason")
        if reason is not None and len(reason) > MAX_REASON:
            raise FormatError(f"{what} gives a reason of {len(reason)} characters; at most {MAX_REASON} are read")
        return cls(kind, said.text("by"), said.text("at"), reason, said.text("id"))


def ask(run: Path, kind: Kind, reason: str | None = None) -> Request:
    """Ask something of the job that trains in `run`; it takes the place of what was asked of this kind and not yet taken.

    Whether there is such a job is not looked at: `is_live`. `CheckpointNotFound` where there is no such directory,
    `StorageError` where it may not be written to.
    """
    if kind not in KINDS:
        raise DeclarationError(f"kind is {kind!r}; use one of {', '.join(KINDS)}")
    if reason is not None and len(reason) > MAX_REASON:
        raise DeclarationError(f"the reason has {len(reason)} characters; use at most {MAX_REASON}")
    if not run.is_dir():
        raise CheckpointNotFound(f"there is no run directory {run}", path=str(run))
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    request = Request(kind, _who(), now, reason, secrets.token_hex(8))
    with files.typed_errors(run, f"asking the job to {kind}"):
        files.replace(run / paths.request(kind), request.to_bytes(), mode=0o600)
    return request


def is_pending(run: Path, kind: Kind) -> bool:
    """Whether something of this kind was asked and has not been taken yet."""
    return os.path.lexists(run / paths.request(kind))


def withdraw(run: Path, kind: Kind) -> None:
    """Ask no longer; nothing happens where the job has taken it already."""
    with files.typed_errors(run, f"withdrawing the request to {kind}"):
        (run / paths.request(kind)).unlink(missing_ok=True)


def is_live(run: Path) -> bool:
    """Whether a job holds the run directory: it has begun to train there, and has not ended or died.

    For processes that look from outside; `StorageError` where that cannot be told.
    """
    return lease.is_held(run)


def take(run: Path) -> list[Request]:
    """What was asked since the last call, each once; for rank 0 of the job that holds the lease.

    Cheap where nothing was asked: it looks for three names. Never raises: what cannot be read is warned of and removed,
    and nothing is heard from other users than the job's and root. What cannot be removed is warned of once and not
    heard: it would be heard again each time.
    """
    taken = []
    for kind in KINDS:
        path = run / paths.request(kind)
        try:
            status = os.lstat(path)
        except OSError:
            continue
        if (request := _take(path, kind, status)) is not None:
            taken.append(request)
    return taken


def discard_stale(run: Path) -> None:
    """Drop what was asked of an earlier job and not taken. For rank 0, when it has just got the lease; never raises."""
    for request in take(run):
        logger.info("dropped what was asked of an earlier job in %s at %s: %s", run, request.at, request)


def _take(path: Path, kind: Kind, status: os.stat_result) -> Request | None:
    if stat.S_ISDIR(status.st_mode):
        _warn_once(path, "it is a directory; remove it")
        return None
    aside = path.with_name(paths.taken_request(kind, secrets.token_hex(6)))
    try:
        path.rename(aside)
    except FileNotFoundError:  # withdrawn at this moment
        return None
    except OSError as err:
        _warn_once(path, f"it cannot be removed: {err.strerror or err}")
        return None
    try:
        return _read(aside, kind)
    except FormatError as err:
        logger.warning("%s is not followed, and removed: %s", path, err.message)
    except OSError as err:
        logger.warning("%s is not followed, and removed: %s", path, err.strerror or err)
    finally:
        with contextlib.suppress(OSError):
            aside.unlink()
    return None


def _read(path: Path, kind: Kind) -> Request:
    if files.regular_size(path) is None:
        raise FormatError("it is not a regular file")
    descriptor = files.open_to_read(path)
    try:
        status = os.fstat(descriptor)
        if status.st_uid not in (os.geteuid(), 0):
            raise FormatError(
                f"it belongs to user {status.st_uid}; only the job's user, {os.geteuid()}, and root are heard"
            )
        if status.st_size > MAX_BYTES:
            raise FormatError(f"it has {status.st_size} bytes; at most {MAX_BYTES} are read")
        buffer = bytearray(status.st_size)
        count = files.read_at(descriptor, memoryview(buffer), 0)
    finally:
        os.close(descriptor)
    return Request.from_bytes(bytes(buffer[:count]), kind)


def _warn_once(path: Path, why: str) -> None:
    if path not in _left_alone:
        _left_alone.add(path)
        logger.warning("%s is not followed: %s", path, why)


def _who() -> str:
    """`user@host pid`; the number of a user without a name."""
    try:
        user = pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        user = str(os.geteuid())
    return f"{user}@{socket.gethostname()} {os.getpid()}"
