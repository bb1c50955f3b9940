"""Which checkpoint is meant: what `resume` decides, over what the file system holds."""

import logging
import os
from collections.abc import Collection, Sequence
from pathlib import Path

from forgather_ckpt import annotations, catalog, files, paths, pruning, resume, retention
from forgather_ckpt.catalog import Catalog, Checkpoint
from forgather_ckpt.errors import (
    CheckpointDamaged,
    CheckpointNotFound,
    CheckpointQuarantined,
    DeclarationError,
    UnsupportedVersion,
)
from forgather_ckpt.names import printable
from forgather_ckpt.policies import Best

logger = logging.getLogger(__name__)


def candidates(run: Path, which: str | int | Path | None, *, avoid: Collection[str] = ()) -> list[Checkpoint]:
    """The checkpoints to try, in order: `which` of a run directory, or the one at a path.

    `avoid`: digests of manifests, such as of those at which the job died before; where the choice is ours (None or
    "latest") they are passed over with a warning.

    Quarantined ones are passed over, newer ones with a warning, unless `which` is a step or a path.

    `CheckpointNotFound` where there is none, or none but those to avoid; `CheckpointDamaged` or `CheckpointQuarantined`
    where there is nothing but such ones.
    """
    if isinstance(which, Path) or (isinstance(which, str) and not resume.is_selector(which)):
        if isinstance(which, str) and os.sep not in which and not Path(which).is_dir():
            raise CheckpointNotFound(f"{which!r} selects no checkpoint; use {resume.SELECTORS}, or a path")
        named = _read(Path(which))
        _tell_of_quarantine([named], named)
        return [named]
    with files.typed_errors(run, "looking for checkpoints"):
        found = catalog.scan(run)
    for rejected in found.rejected:
        logger.warning("%s is not a committed checkpoint: %s", rejected.path, rejected.reason)
        if isinstance(rejected.error, UnsupportedVersion):
            raise rejected.error  # perhaps the newest one; an older one must not be taken for it
    if found.rejected and not found.checkpoints:
        # "none" would be an invitation to start afresh, over them
        raise CheckpointDamaged(
            f"none of the {len(found.rejected)} checkpoints in {run} is whole; {found.rejected[0].path.name}: "
            f"{found.rejected[0].reason}",
            path=str(found.rejected[0].path),
        )
    try:
        chosen = chosen_of(found, which)
    except CheckpointNotFound as err:
        step = resume.step_of(which)
        for rejected in found.rejected:
            if step is not None and rejected.path.name == paths.checkpoint(step):
                raise CheckpointDamaged(f"{err.message}; {rejected.path} is not whole: {rejected.reason}") from err
        raise
    _tell_of_quarantine(found.checkpoints, chosen[0])
    return _without(chosen, avoid, run) if which in (None, "latest") else chosen


def _tell_of_quarantine(found: Sequence[Checkpoint], chosen: Checkpoint) -> None:
    aside = quarantined(found)
    for one in found:
        if one.path == chosen.path and one.path in aside:
            logger.warning("%s is taken as it was named, though quarantined: %s", one.path, printable(aside[one.path]))
        elif one.path in aside and chosen.path not in aside and one.manifest.sequence >= chosen.manifest.sequence:
            logger.warning("%s is passed over: quarantined: %s", one.path, printable(aside[one.path]))


def _without(chosen: list[Checkpoint], avoid: Collection[str], run: Path) -> list[Checkpoint]:
    left = [one for one in chosen if one.manifest.digest not in avoid]
    if not left:
        raise CheckpointNotFound(
            f"all checkpoints of {run} are to be avoided (of steps {', '.join(str(one.manifest.step) for one in chosen)}), "
            "as loading them failed again and again; name one to load it all the same",
            path=str(run),
        )
    for one in chosen:
        if one.manifest.digest in avoid:
            logger.warning("%s is passed over: it is to be avoided", one.path)
    return left


def chosen_of(found: Catalog, which: str | int | None, *, ranked: Sequence[Path] | None = None) -> list[Checkpoint]:
    """The checkpoints of a run directory to try, in order, as `resume.choose` has it, or `CheckpointNotFound`. One that
    is quarantined is found by its step alone; `CheckpointQuarantined` where there are only such.

    `ranked`: the best first; by default as `ranking` says.
    """
    checkpoints = found.checkpoints if resume.step_of(which) is not None else usable(found)
    by_path = {checkpoint.path: checkpoint for checkpoint in checkpoints}
    if ranked is None:
        ranked = _ranked(found) if resume.is_by_rank(which) else []
    chosen = resume.choose(
        [checkpoint.candidate for checkpoint in by_path.values()],
        which,
        ranked=[by_path[path].candidate for path in ranked],
    )
    return [by_path[one.path] for one in chosen]


def quarantined(found: Sequence[Checkpoint]) -> dict[Path, str]:
    """Those that a person has set aside, and copies of them, in their order, each with the reason."""
    reasons = {
        one.manifest.digest: reason
        for one in found
        if (reason := annotations.read(one.path, one.manifest.digest).quarantined) is not None
    }
    return {one.path: reasons[one.manifest.digest] for one in found if one.manifest.digest in reasons}


def usable(found: Catalog) -> list[Checkpoint]:
    """Those that are not quarantined, newest first; `CheckpointQuarantined` where all are."""
    aside = quarantined(found.checkpoints)
    left = [one for one in found.checkpoints if one.path not in aside]
    if aside and not left:
        newest = found.checkpoints[0]
        raise CheckpointQuarantined(
            f"all checkpoints of {newest.path.parent} are quarantined, {newest.path.name}: "
            f"{printable(aside[newest.path])}; name a step to load it all the same, or take it back: fgckpt unquarantine "
            f"{newest.manifest.step}",
            path=str(newest.path),
        )
    return left


def ranking(found: Catalog) -> Best:
    """By what the checkpoints of a run are ranked: as its newest one's training arguments say, else by the lowest `eval_loss`.

    `DeclarationError` where the arguments do not make sense.
    """
    return retention.ranking(found.checkpoints[0].manifest.training_args if found.checkpoints else {})


def _ranked(found: Catalog) -> list[Path]:
    """The checkpoints that have the metric, the best first; `CheckpointNotFound`, with the reason, where none has it."""
    if not found.checkpoints:
        return []
    try:
        best = ranking(found)
    except DeclarationError as err:
        raise CheckpointNotFound(f"'best' means nothing in this run: {err.message}") from None
    stored = retention.countable(pruning.survey(found))
    if ranked := best.ranked(stored):
        return [one.path for one, _ in ranked]
    has = sorted({name for one in stored for name in one.metrics})
    raise CheckpointNotFound(
        f"there is no best checkpoint: none has a finite {best.metric!r}; metrics that they have: "
        f"{', '.join(has) or 'none'}. Evaluate before saving (eval_on_save=True), set best_model_metric to what is there, "
        "or name another one: 'latest' or a step"
    )


def named(path: str | Path) -> Checkpoint:
    """The checkpoint at `path`: its directory, a run directory, whose newest it is, or `RUN@SELECTOR`, such as
    `runs/a@latest~1`, `runs/a@best` or `runs/a@15000`."""
    place = Path(path)
    if os.path.lexists(place / paths.MANIFEST):
        return _read(place)
    run, at, selector = str(path).rpartition("@")
    if at and not os.path.lexists(place):
        if not resume.is_selector(selector):
            raise CheckpointNotFound(f"{selector!r} selects no checkpoint of {run}; use {resume.SELECTORS}")
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
