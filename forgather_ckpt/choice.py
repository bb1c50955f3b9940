"""Which checkpoint is meant: what `resume` decides, over what the file system holds."""

import logging
import os
from pathlib import Path

from forgather_ckpt import catalog, files, paths, resume
from forgather_ckpt.catalog import Checkpoint
from forgather_ckpt.errors import CheckpointDamaged, CheckpointNotFound, UnsupportedVersion

logger = logging.getLogger(__name__)


def candidates(run: Path, which: str | int | Path | None) -> list[Checkpoint]:
    """The checkpoints to try, in order: `which` of a run directory, or the one at a path.

    `CheckpointNotFound` where there is none; `CheckpointDamaged` where there is nothing but damaged ones.
    """
    if isinstance(which, Path) or (isinstance(which, str) and not resume.is_selector(which)):
        if isinstance(which, str) and os.sep not in which and not Path(which).is_dir():
            raise CheckpointNotFound(f"{which!r} selects no checkpoint; use 'latest', 'latest~1', a step, or a path")
        return [_read(Path(which))]
    with files.typed_errors(run, "looking for checkpoints"):
        scanned = catalog.scan(run)
    by_path = {checkpoint.path: checkpoint for checkpoint in scanned.checkpoints}
    for rejected in scanned.rejected:
        logger.warning("%s is not a committed checkpoint: %s", rejected.path, rejected.reason)
        if isinstance(rejected.error, UnsupportedVersion):
            raise rejected.error  # perhaps the newest one; an older one must not be taken for it
    if scanned.rejected and not scanned.checkpoints:
        # "none" would be an invitation to start afresh, over them
        raise CheckpointDamaged(
            f"none of the {len(scanned.rejected)} checkpoints in {run} is whole; {scanned.rejected[0].path.name}: "
            f"{scanned.rejected[0].reason}",
            path=str(scanned.rejected[0].path),
        )
    try:
        chosen = resume.choose([checkpoint.candidate for checkpoint in scanned.checkpoints], which)
    except CheckpointNotFound as err:
        asked = str(which).removeprefix("step:")
        for rejected in scanned.rejected:
            if asked.isdigit() and rejected.path.name == paths.checkpoint(int(asked)):
                raise CheckpointDamaged(f"{err.message}; {rejected.path} is not whole: {rejected.reason}") from err
        raise
    return [by_path[one.path] for one in chosen]


def named(path: str | Path) -> Checkpoint:
    """The checkpoint at `path`: its directory, a run directory, whose newest it is, or `RUN@SELECTOR`, such as
    `runs/a@latest~1` or `runs/a@15000`."""
    place = Path(path)
    if os.path.lexists(place / paths.MANIFEST):
        return _read(place)
    run, at, selector = str(path).rpartition("@")
    if at and not os.path.lexists(place):
        if not resume.is_selector(selector):
            raise CheckpointNotFound(f"{selector!r} selects no checkpoint of {run}; use latest, latest~1, or a step")
    else:
        run, selector = str(path), "latest"
    if not Path(run).is_dir():
        raise CheckpointNotFound(f"there is no checkpoint and no run directory {run}", path=run)
    try:
        return candidates(Path(run), selector)[0]
    except CheckpointNotFound as err:
        raise CheckpointNotFound(f"{err.message} (in {run})", path=run) from None


def _read(path: Path) -> Checkpoint:
    with files.typed_errors(path, "looking for the checkpoint"):
        return catalog.read_checkpoint(path.resolve())
