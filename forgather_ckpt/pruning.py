"""Removing checkpoints that no policy keeps: look, decide, remove. For the owner of the run directory, on rank 0.

It runs after a commit and before the next save begins: what is removed goes by its name, and a save may put another
checkpoint in that place. A removal is a commit in reverse: rename to `.trash-…`, sync the run directory, delete.

    survey     the catalog, with what was noted beside each checkpoint
    decide     retention.decide: pure
    remove     the oldest first; each is looked at once more: one that changed meanwhile stays for now

Nothing that goes wrong here ends a training: it is logged, and what stays is found again the next time.
"""

import datetime
import logging
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from forgather_ckpt import annotations, catalog, files, paths, retention
from forgather_ckpt.catalog import Catalog, Checkpoint
from forgather_ckpt.errors import CheckpointError, StorageError
from forgather_ckpt.policies import Policy, Stored
from forgather_ckpt.retention import Protected, Verdict

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pruned:
    """What was decided, newest first, and what came of it."""

    verdicts: Sequence[Verdict] = ()
    removed: Sequence[Path] = ()
    failed: Mapping[Path, str] = field(default_factory=dict)
    """What should have gone and is still there, and why."""
    left: Catalog | None = field(default=None, compare=False)
    """What the run directory holds now; None where it could not be looked through."""


def survey(found: Catalog) -> list[Stored]:
    """The committed checkpoints of a run directory, as retention sees them, newest first."""
    return [_stored(checkpoint) for checkpoint in found.checkpoints]


def _stored(checkpoint: Checkpoint) -> Stored:
    manifest, hold = checkpoint.manifest, _hold(checkpoint)
    try:
        noted = annotations.load(checkpoint.path, manifest.digest)
    except CheckpointError as err:
        noted = annotations.Annotations()
        hold = hold or f"what was noted of it cannot be read, it may be pinned: {err.message}"
    return Stored(
        path=checkpoint.path,
        step=manifest.step,
        sequence=manifest.sequence,
        digest=manifest.digest,
        kind=manifest.kind,
        saved_at_seconds=_seconds(manifest.created),
        metrics={**manifest.metrics, **noted.metrics},
        is_pinned=noted.is_pinned,
        is_quarantined=noted.quarantined is not None,
        hold=hold,
    )


def _hold(checkpoint: Checkpoint) -> str | None:
    """Why a checkpoint is not ours to remove: somebody else put it there, or gave it its name."""
    name, step = checkpoint.path.name, checkpoint.manifest.step
    if checkpoint.path.is_symlink():
        return "a link: it lies elsewhere"
    if name != paths.checkpoint(step) and not name.startswith(paths.replaced(step, "")):
        return f"{name} is not a name that a save gives"
    return None


def _seconds(created: str) -> float | None:
    try:
        time = datetime.datetime.fromisoformat(created)
        return (time if time.tzinfo else time.replace(tzinfo=datetime.UTC)).timestamp()
    except (ValueError, OverflowError):
        return None


def prune(run: Path, policy: Policy, protected: Protected, *, delete: Callable[[Path], None] | None = None) -> Pruned:
    """Remove from the run directory what `policy` does not keep. Never raises; what fails is logged and told.

    What earlier removals left in the trash goes too. `delete` is given what was renamed away, which may take long to
    delete; by default that is done before this returns.
    """
    delete = delete or delete_trash
    try:
        found = catalog.scan(run)
        stored = survey(found)
        verdicts = retention.decide(policy, stored, protected)
        for told in retention.unranked_newest(policy, stored):
            logger.warning("%s", told)
        for path in found.unfinished:
            if path.name.startswith(paths.TRASH_PREFIX):
                delete(path)
        return _carry_out(found, run, verdicts, delete)
    except Exception as err:  # a policy may be anybody's code
        logger.warning("no checkpoint was removed from %s: %s", run, _told(err))
        return Pruned()


def _carry_out(found: Catalog, run: Path, verdicts: Sequence[Verdict], delete: Callable[[Path], None]) -> Pruned:
    doomed = [verdict for verdict in reversed(verdicts) if not verdict.keep]
    if doomed:
        files.sync_directory(run)  # what is kept is found after a power loss before anything goes
    removed, trashed, failed = [], [], {}
    for verdict in doomed:
        path = verdict.checkpoint.path
        trash = None
        try:
            if _stored(catalog.read_checkpoint(path)) != verdict.checkpoint:
                raise StorageError("it changed since it was looked at")
            trash = files.set_aside(path, secrets.token_hex(6))
        except (CheckpointError, OSError) as err:
            if os.path.lexists(path):
                failed[path] = _told(err)
                logger.warning("%s was not removed: %s", path, failed[path])
                continue
            logger.warning("%s: what was removed could not be deleted: %s", path, _told(err))
        removed.append(path)
        logger.info("removed %s: %s", path, "; ".join(verdict.reasons))
        if trash is not None:
            trashed.append(trash)
            delete(trash)
    kept = tuple(one for one in found.checkpoints if one.path not in removed)
    return Pruned(verdicts, removed, failed, Catalog(kept, found.rejected, (*found.unfinished, *trashed)))


def delete_trash(trash: Path) -> None:
    """Delete what was renamed away; a failure is logged, and the next one who owns the run directory tries again."""
    try:
        files.delete(trash)
    except OSError as err:
        logger.warning("%s could not be deleted: %s", trash, _told(err))


def _told(err: BaseException) -> str:
    return err.message if isinstance(err, CheckpointError) else str(err) or type(err).__name__
