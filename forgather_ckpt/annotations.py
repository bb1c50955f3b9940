"""What became known of a checkpoint after its commit: `annotations.json` beside its manifest.

Pinned, quarantined, notes, and metrics of a later evaluation of that step. It is replaced as a whole (temporary file,
sync, rename, sync of the directory), never written in place, and it never decides whether a checkpoint is committed:
where it is missing or damaged there are none.

It names the checkpoint that it is about by the digest of the manifest. If a checkpoint is replaced by a newer one of
the same step just as it is being annotated, what was said of the old one does not become true of the new one.
"""

import contextlib
import fcntl
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from forgather_ckpt import catalog, files, hashtree, paths, strict_json
from forgather_ckpt.environment import redact
from forgather_ckpt.errors import CheckpointNotFound, FormatError, StorageError, UnsupportedVersion
from forgather_ckpt.manifest import check_version
from forgather_ckpt.strict_json import Fields

logger = logging.getLogger(__name__)

FORMAT = "forgather_ckpt.annotations"
VERSION = "1.0"
MAX_BYTES = 4 << 20
PATIENCE_SECONDS = 2.0
"""How long to wait for another process that is annotating the same checkpoint."""


@dataclass(frozen=True)
class Annotations:
    """What was noted of one checkpoint. `Annotations()` says nothing."""

    is_pinned: bool = False
    quarantined: str | None = None
    """Why it was set aside; None for a checkpoint that is in use."""
    notes: tuple[str, ...] = ()
    metrics: Mapping[str, Any] = field(default_factory=dict)
    """Of later evaluations; they count before those of the manifest. As plain JSON, like the manifest's."""

    def to_bytes(self, checkpoint: str) -> bytes:
        """The file's bytes; `checkpoint` is the digest of the manifest. `FormatError` where they could not be read back."""
        said = {
            "format": FORMAT,
            "version": VERSION,
            "checkpoint": checkpoint,
            "pinned": self.is_pinned,
            "quarantined": self.quarantined,
            "notes": list(self.notes),
            "metrics": redact(self.metrics),
        }
        data = strict_json.pretty({**said, "digest": _digest(said)})
        self.from_bytes(data, checkpoint)
        return data

    @classmethod
    def from_bytes(cls, data: bytes, checkpoint: str) -> "Annotations":
        """What the bytes say of the checkpoint whose manifest has this digest; else `FormatError`."""
        what = "the annotations file"
        said = Fields(strict_json.loads(data, what=what, max_bytes=MAX_BYTES), what)
        if said.text("format") != FORMAT:
            raise FormatError(f"{what} is of format {said.text('format')!r}; expected {FORMAT!r}")
        check_version(said.text("version"), what)
        if said.digest("digest") != _digest({key: value for key, value in said.data.items() if key != "digest"}):
            raise FormatError(f"{what} does not have the digest that it claims; it was damaged or edited")
        if said.digest("checkpoint") != checkpoint:
            raise FormatError(f"{what} is about another checkpoint than the one that it lies in")
        return cls(
            said.flag("pinned"),
            said.optional_text("quarantined"),
            tuple(said.texts("notes")),
            said.mapping("metrics"),
        )


def _digest(said: Mapping[str, Any]) -> str:
    """Of all fields but itself, as compact JSON in the order of the file."""
    return hashtree.digest(strict_json.dumps(said)).hex()


def load(path: Path, checkpoint: str) -> Annotations:
    """Of the checkpoint at `path`, whose manifest has the digest `checkpoint`; none where there is no file.

    `FormatError` where there is one that cannot be believed, `StorageError` where it cannot be read.
    """
    file = path / paths.ANNOTATIONS
    if not os.path.lexists(file):
        return Annotations()
    size = files.regular_size(file)
    if size is None:
        raise FormatError(f"{paths.ANNOTATIONS} is not a regular file", path=str(file))
    if size > MAX_BYTES:
        raise FormatError(f"{paths.ANNOTATIONS} has {size} bytes; at most {MAX_BYTES} are read", path=str(file))
    try:
        return Annotations.from_bytes(catalog.read_file(file, size), checkpoint)
    except FormatError as err:
        raise err.at(path=str(file)) from None


def read(path: Path, checkpoint: str) -> Annotations:
    """As `load`, but what cannot be believed or read counts as none, with a warning."""
    try:
        return load(path, checkpoint)
    except (FormatError, StorageError) as err:
        logger.warning("%s: ignored: %s", path / paths.ANNOTATIONS, err.message)
        return Annotations()


def annotate(path: Path, change: Callable[[Annotations], Annotations], *, digest: str | None = None) -> Annotations:
    """Replace the annotations of the committed checkpoint at `path` by what `change` makes of them; durable on return.
    With `digest`, only if that is its manifest's: else it is `CheckpointNotFound`, as another one has taken its place.

    >>> annotate(path, lambda noted: dataclasses.replace(noted, is_pinned=True))

    Processes that annotate one checkpoint at the same time take turns, where the file system knows `flock`. A file of a
    newer format is refused, a damaged one is replaced.
    """
    checkpoint = catalog.read_checkpoint(path).manifest.digest
    if digest not in (None, checkpoint):
        raise CheckpointNotFound(f"{path} is another checkpoint by now: its step has been saved again", path=str(path))
    with files.typed_errors(path, "annotating the checkpoint"), _alone(path):
        try:
            before = load(path, checkpoint)
        except UnsupportedVersion:
            raise
        except FormatError as err:
            logger.warning("%s is replaced: %s", path / paths.ANNOTATIONS, err.message)
            before = Annotations()
        after = change(before)
        files.replace(path / paths.ANNOTATIONS, after.to_bytes(checkpoint))
    return after


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """No other process is in here for the same checkpoint. `StorageError` where one does not leave in time."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        deadline = time.monotonic() + PATIENCE_SECONDS
        # NFS has no such lock of a directory: there, whoever renames last wins, and the file is still whole
        with contextlib.suppress(OSError):
            while not _try_lock(descriptor):
                if time.monotonic() > deadline:
                    raise StorageError(
                        f"another process has been annotating {path} for {PATIENCE_SECONDS:g} s; try again",
                        path=str(path),
                    )
                time.sleep(0.02)
        yield
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
