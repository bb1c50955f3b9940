"""From a fresh directory to a checkpoint: begin, publish, abandon. Called by rank 0 alone.

The order, of which each step makes the next one safe (DESIGN invariants 1-3):

    begin      make .tmp-checkpoint-<step>-<nonce>, a directory that no reader trusts
    (all)      data files: create exclusively, write, fsync each; index files likewise; report
    publish    manifest: write, fsync; fsync the directory; rename it to its final name; fsync the parent

A checkpoint of the same step is replaced by exchanging the two directories in one step. Where the file system
refuses that, the old one is renamed to `checkpoint-<step>.replaced-<nonce>`, where the catalog still finds it,
then the new one takes the name, then the old one is discarded: at every instant one of the two is there. What is pinned
or quarantined is never discarded: it keeps a name of its own, `checkpoint-<step>.kept-<sequence>`.
"""

import contextlib
import logging
import os
import secrets
from dataclasses import dataclass
from pathlib import Path

from forgather_ckpt import annotations, files, paths
from forgather_ckpt.catalog import read_checkpoint, scan
from forgather_ckpt.errors import CheckpointError, StorageError
from forgather_ckpt.manifest import CheckpointManifest

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Draft:
    """A checkpoint that is being written and that no reader sees."""

    run: Path
    step: int
    sequence: int
    nonce: str

    @property
    def directory(self) -> Path:
        return self.run / paths.temporary(self.step, self.nonce)

    @property
    def final(self) -> Path:
        return self.run / paths.checkpoint(self.step)


def begin(run: Path, step: int) -> Draft:
    """Make the directory that a new checkpoint of `step` is written to.

    The final name may be taken by an earlier checkpoint, which will be replaced, but not by anything else.
    """
    with files.typed_errors(run, "making a directory for the checkpoint"):
        files.make_directory(run)
        draft = Draft(run, step, scan(run).next_sequence, secrets.token_hex(6))
        if os.path.lexists(draft.final) and not (draft.final / paths.MANIFEST).exists():
            raise StorageError(
                f"{draft.final} exists and is not a checkpoint of ours (it has no {paths.MANIFEST}); move it away",
                path=str(draft.final),
            )
        draft.directory.mkdir()
        return draft


def publish(draft: Draft, manifest: CheckpointManifest) -> tuple[Path, str]:
    """Commit: when this returns, the checkpoint survives power loss; until then the previous one does.

    Returns where it is, and the manifest's digest.
    """
    data = manifest.to_bytes()
    digest = CheckpointManifest.from_bytes(
        data
    ).digest  # what could not be read back is refused now, not after the rename
    with files.typed_errors(draft.directory, "committing the checkpoint"):
        files.write_new(draft.directory / paths.MANIFEST, data)
        files.sync_directory(draft.directory)
        old = _take_name(draft)
        files.sync_directory(draft.run)
    if old is not None:
        _discard_quietly(old, draft.nonce)
    return draft.final, digest


def _take_name(draft: Draft) -> Path | None:
    """Give the draft its final name; returns where the checkpoint that had the name is now."""
    if not draft.final.exists():
        draft.directory.rename(draft.final)
        return None
    if (kept := _name_to_keep(draft)) is not None:
        draft.final.rename(kept)
        files.sync_directory(draft.run)
        draft.directory.rename(draft.final)
        logger.warning("%s is pinned or quarantined: it stays, as %s, beside the new one of its step", draft.final, kept)
        return None
    if files.exchange(draft.directory, draft.final):
        return draft.directory
    old = draft.run / paths.replaced(draft.step, draft.nonce)
    draft.final.rename(old)
    files.sync_directory(draft.run)
    draft.directory.rename(draft.final)
    return old


def _name_to_keep(draft: Draft) -> Path | None:
    """Where the checkpoint that has the draft's final name goes if it is to stay; None if it may be replaced."""
    try:
        found = read_checkpoint(draft.final)
    except CheckpointError:
        return None
    with contextlib.suppress(CheckpointError):  # what cannot be read may say that it is pinned
        noted = annotations.load(found.path, found.manifest.digest)
        if not noted.is_pinned and noted.quarantined is None:
            return None
    return draft.run / paths.kept(draft.step, found.manifest.sequence)


def abandon(draft: Draft) -> None:
    """Remove what a failed save left. Never raises: the failure itself is the news.

    If the sync after an exchange failed, the old checkpoint lies under the draft's name, and it may be the only
    durable one: it stays.
    """
    with contextlib.suppress(CheckpointError, OSError):
        if read_checkpoint(draft.directory).manifest.sequence != draft.sequence:
            return
    _discard_quietly(draft.directory, draft.nonce)


def sweep(run: Path) -> None:
    """Delete what dead jobs left: unfinished saves, and replaced checkpoints whose successor is there.

    Only for the owner of the run directory's lease.
    """
    found = scan(run)
    named = {checkpoint.path.name: checkpoint.manifest.sequence for checkpoint in found.checkpoints}
    left = [
        checkpoint.path
        for checkpoint in found.checkpoints
        if checkpoint.path.name.startswith(paths.replaced(checkpoint.manifest.step, ""))
        and named.get(paths.checkpoint(checkpoint.manifest.step), 0) > checkpoint.manifest.sequence
    ]
    for path in (*found.unfinished, *left):
        _discard_quietly(path, secrets.token_hex(6))


def _discard_quietly(path: Path, nonce: str) -> None:
    # What stays behind is no checkpoint, and the next owner of the run directory sweeps it.
    with contextlib.suppress(OSError):
        files.discard(path, nonce)
