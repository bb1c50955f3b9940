"""Loads that were begun, and of which nothing was heard: `.load-attempts.json` in the run directory. For rank 0.

A checkpoint may be whole and still kill each job that loads it: out of memory, a driver that fails, a file server that
hangs until the scheduler loses patience. No error is raised then, so the attempt is written down before anything is
loaded, and struck out when the first step after it is done, or the job has ended before that in some other way than by
the death of a rank. What is left counts the jobs that died in between.

Nothing here raises into a training: a file that cannot be read or written is logged, and counts as no attempts.
"""

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from forgather_ckpt import catalog, files, paths, strict_json
from forgather_ckpt.errors import CheckpointError, FormatError
from forgather_ckpt.manifest import check_version
from forgather_ckpt.strict_json import Fields

logger = logging.getLogger(__name__)

FORMAT = "forgather_ckpt.load_attempts"
VERSION = "1.0"
MAX_BYTES = 1 << 20
LIMIT = 3
"""Attempts after which a checkpoint is given up, unless said otherwise."""

_MAX_CHECKPOINTS = 1000


@dataclass(frozen=True)
class _Attempts:
    """By digest of the manifest, the one begun last at the end."""

    begun: Mapping[str, int] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        return strict_json.pretty({"format": FORMAT, "version": VERSION, "begun": dict(self.begun)})

    @classmethod
    def from_bytes(cls, data: bytes) -> "_Attempts":
        what = "the file of load attempts"
        said = Fields(strict_json.loads(data, what=what, max_bytes=MAX_BYTES), what)
        if said.text("format") != FORMAT:
            raise FormatError(f"{what} is of format {said.text('format')!r}; expected {FORMAT!r}")
        check_version(said.text("version"), what)
        begun = Fields(said.mapping("begun"), f"{what}, begun")
        return cls({digest: begun.number(digest) for digest in begun.data})


def begin(run: Path, digest: str) -> int:
    """Count one more attempt to load the checkpoint whose manifest has this digest; how many there are now.

    Durable when it returns, before anything is loaded. 0 where it could not be written down.
    """
    begun = dict(_read(run).begun)
    count = begun.pop(digest, 0) + 1
    latest = [*begun.items(), (digest, count)][-_MAX_CHECKPOINTS:]
    return count if _write(run, _Attempts(dict(latest))) else 0


def succeeded(run: Path, limit: int = LIMIT) -> None:
    """The load that was begun last is over: a step has been done since, or it ended with an error, which is no crash.

    Other checkpoints that were given up stay so: the job has gone on from an older one, and is not to die of them again
    before it has saved a newer one. The file is removed when it has nothing more to say.
    """
    others = list(_read(run).begun.items())[:-1]
    given_up = {digest: count for digest, count in others if count >= limit}
    if given_up:
        _write(run, _Attempts(given_up))
        return
    path = run / paths.LOAD_ATTEMPTS
    try:
        path.unlink(missing_ok=True)
        if run.is_dir():
            files.sync_directory(run)
    except OSError as err:
        _log(path, err)


def exhausted(run: Path, limit: int = LIMIT) -> frozenset[str]:
    """The digests of the manifests of checkpoints whose load was begun `limit` times or more, always in vain."""
    return frozenset(digest for digest, count in _read(run).begun.items() if count >= limit)


def _read(run: Path) -> _Attempts:
    path = run / paths.LOAD_ATTEMPTS
    if not os.path.lexists(path):
        return _Attempts()
    try:
        size = files.regular_size(path)
        if size is None or size > MAX_BYTES:
            raise FormatError("it is not a regular file of a plausible size")
        return _Attempts.from_bytes(catalog.read_file(path, size))
    except (CheckpointError, OSError) as err:
        _log(path, err)
        return _Attempts()


def _write(run: Path, attempts: _Attempts) -> bool:
    path = run / paths.LOAD_ATTEMPTS
    try:
        files.replace(path, attempts.to_bytes())
    except OSError as err:
        _log(path, err)
        return False
    return True


def _log(path: Path, err: Exception) -> None:
    logger.warning(
        "%s: %s; a checkpoint that kills each job that loads it may not be noticed",
        path,
        err.message if isinstance(err, CheckpointError) else err,
    )
