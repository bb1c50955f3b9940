"""Which two checkpoints a command compares, and why it cannot."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import click

from forgather_ckpt import catalog, comparison, hashtree, paths, resume, strict_json
from forgather_ckpt.catalog import Catalog, Checkpoint
from forgather_ckpt.cli import selection, text
from forgather_ckpt.errors import CheckpointError, CheckpointNotFound, StorageError, UnsupportedVersion
from forgather_ckpt.manifest import MAX_BYTES

_NUM_NAMED_STEPS = 8


class Incomparable(click.ClickException):
    """There is no telling whether they differ: as with diff(1), that is not the exit code of a difference."""

    exit_code = 2

    def show(self, file: IO[Any] | None = None) -> None:
        click.echo(f"fgckpt: {text.printable(self.message)}", err=True)


@contextmanager
def trouble_is_no_difference() -> Iterator[None]:
    """Turn what keeps two checkpoints from being compared into `Incomparable`; not found and not readable stay."""
    try:
        yield
    except (CheckpointNotFound, StorageError):
        raise
    except CheckpointError as err:
        where = "" if err.path is None or err.path in err.message else f" ({err.path})"
        raise Incomparable(err.message + where) from err


def find_both(run: Path, a: str, b: str) -> tuple[Checkpoint, Checkpoint]:
    """The two checkpoints that are meant; of two run directories the newest step that both have."""
    if not (_is_run(a) and _is_run(b)):
        return read_both(_find(run, a), _find(run, b))
    catalogs = [selection.scan(Path(name)) for name in (a, b)]
    warn_of_rejected(catalogs)
    ours, theirs = (by_step(found) for found in catalogs)
    if not ours.keys() & theirs.keys():
        raise no_common_step(Path(a), Path(b))
    step = max(ours.keys() & theirs.keys())
    for letter, steps in (("A", ours), ("B", theirs)):
        if max(steps) > step:
            click.echo(f"fgckpt: step {step} is the newest that both have; {letter} goes on to {max(steps)}", err=True)
    refuse_damaged_after(step, catalogs)
    return ours[step], theirs[step]


def refuse_damaged_after(step: int, catalogs: Iterable[Catalog]) -> None:
    """`Incomparable` if a checkpoint that may be of a later step cannot be read: what it held is not taken for equal."""
    for rejected in (rejected for found in catalogs for rejected in found.rejected):
        later = paths.step_in(rejected.path.name)
        if later is None or later > step:
            raise Incomparable(
                f"{rejected.path} cannot be read, so {step} may not be the newest step that both have; to compare that one, "
                "name it: RUN@STEP"
            )


def warn_of_rejected(catalogs: Iterable[Catalog]) -> None:
    for rejected in (rejected for found in catalogs for rejected in found.rejected):
        reason = text.printable(f"{rejected.path} is not committed: {rejected.reason}")
        click.echo(f"fgckpt: {reason}; it is left out", err=True)


def _is_run(name: str) -> bool:
    """Whether this names a directory that is no checkpoint."""
    return not resume.is_selector(name) and Path(name).is_dir() and not _looks_like_checkpoint(Path(name))


def _looks_like_checkpoint(path: Path) -> bool:
    if os.path.lexists(path / paths.MANIFEST):
        return True
    return any(paths.is_index(file.name) for file in path.iterdir())


def _find(run: Path, name: str) -> Path:
    """The directory of a checkpoint: by a selector, `RUN@SELECTOR`, its path, or its run, whose newest it is."""
    path, at, selector = name.rpartition("@")
    if at and not os.path.lexists(name) and _is_run(path):
        return selection.find(Path(path), selector)
    if _is_run(name):
        return selection.find(Path(name), "latest")
    if not resume.is_selector(name) and Path(name).is_dir():
        return Path(name)
    return selection.find(run, name)


def by_step(found: Catalog) -> dict[int, Checkpoint]:
    """The committed checkpoints by step, of two of one step the newer."""
    return {checkpoint.manifest.step: checkpoint for checkpoint in reversed(found.checkpoints)}


def read_both(a: Path, b: Path) -> tuple[Checkpoint, Checkpoint]:
    try:
        return catalog.read_checkpoint(a), catalog.read_checkpoint(b)
    except UnsupportedVersion:
        one, other = algorithm_of(a), algorithm_of(b)
        if one is None or other is None or one == other:
            raise
        raise Incomparable(comparison.algorithms_differ(one, other)) from None


def algorithm_of(path: Path) -> str | None:
    """What the manifest of a checkpoint says its digests are, whether or not this version knows them."""
    try:
        with (path / paths.MANIFEST).open("rb") as stream:
            data = strict_json.loads(stream.read(MAX_BYTES + 1), what="the manifest", max_bytes=MAX_BYTES)
        return strict_json.Fields(data, "the manifest").text("algorithm")
    except (OSError, CheckpointError):
        return None


def no_common_step(a: Path, b: Path) -> Exception:
    """Why two runs have no step in common that could be compared."""
    found = [selection.scan(path) for path in (a, b)]
    algorithms = []
    for run in found:
        newer = selection.of_newer_version(run)
        algorithms.append(None if newer is None else algorithm_of(newer.path))
    known = [hashtree.ALGORITHM if run.checkpoints else None for run in found]
    one, other = (mine or its for mine, its in zip(known, algorithms, strict=True))
    if one and other and one != other:
        return Incomparable(comparison.algorithms_differ(one, other))
    steps = [", ".join(map(str, sorted(by_step(run))[-_NUM_NAMED_STEPS:])) or "none" for run in found]
    return CheckpointNotFound(
        f"no step is committed in both runs; the newest in {a}: {steps[0]}; in {b}: {steps[1]}. Compare any two with "
        "fgckpt diff RUN@STEP RUN@STEP"
    )
