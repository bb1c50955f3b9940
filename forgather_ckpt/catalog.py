"""The committed checkpoints of a run directory. The one rule of "committed" is `read_checkpoint`.

Used by load, retention, resume and the command line alike. Directory names and modification times decide
nothing: a checkpoint is what has a valid manifest and all the files that it names, in their sizes.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from forgather_ckpt import files, hashtree, paths
from forgather_ckpt.errors import CheckpointDamaged, CheckpointNotFound, FormatError
from forgather_ckpt.index import Index
from forgather_ckpt.manifest import CheckpointManifest
from forgather_ckpt.resume import Candidate, newest_first


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint."""

    path: Path
    manifest: CheckpointManifest

    @property
    def candidate(self) -> Candidate:
        manifest = self.manifest
        return Candidate(self.path, manifest.step, manifest.sequence, manifest.kind, manifest.epoch)


@dataclass(frozen=True)
class Rejected:
    """A directory with a manifest that is not a checkpoint, and why not."""

    path: Path
    error: FormatError

    @property
    def reason(self) -> str:
        return self.error.message


@dataclass(frozen=True)
class Catalog:
    """What a run directory holds: its checkpoints, newest first, what only looks like one, and unfinished saves."""

    checkpoints: tuple[Checkpoint, ...]
    rejected: tuple[Rejected, ...]
    unfinished: tuple[Path, ...]

    @property
    def next_sequence(self) -> int:
        return 1 + max((checkpoint.manifest.sequence for checkpoint in self.checkpoints), default=0)


def read_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint at `path`, if it is committed.

    Committed: the manifest parses, its own digest matches, and every file that it names is a regular file of the
    size it gives. `CheckpointNotFound` where there is no manifest, `FormatError` where it does not hold.
    """
    file = path / paths.MANIFEST
    if not os.path.lexists(file):
        raise CheckpointNotFound(f"{path} is not a checkpoint: it has no {paths.MANIFEST}", path=str(path))
    if files.regular_size(file) is None:
        raise FormatError(f"{paths.MANIFEST} is not a regular file", path=str(file))
    manifest = CheckpointManifest.load(file)
    for name, record in manifest.files.items():
        size = files.regular_size(path / name)
        if size != record.size:
            found = "is missing" if size is None else f"has {size} bytes"
            raise FormatError(f"{name} {found}; the manifest expects {record.size} bytes", path=str(path / name))
    return Checkpoint(path, manifest)


def scan(run: Path) -> Catalog:
    """Look through a run directory; one that does not exist yet holds nothing.

    A link to a checkpoint elsewhere counts, one to a checkpoint beside it does not. What has our indexes and no
    manifest is told, so that a checkpoint that lost it is not taken for none.
    """
    checkpoints, rejected, unfinished = [], [], []
    try:
        entries = sorted(os.scandir(run), key=lambda entry: (entry.is_symlink(), entry.name))
    except FileNotFoundError:
        entries = []
    seen = set()
    for entry in entries:
        path = run / entry.name
        if not entry.is_dir():
            continue
        if paths.is_temporary(entry.name):
            unfinished.append(path)
            continue
        try:
            status = entry.stat()
        except FileNotFoundError:  # removed at this moment
            continue
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        try:
            checkpoints.append(read_checkpoint(path))
        except CheckpointNotFound as err:
            if _has_index(path):
                rejected.append(Rejected(path, FormatError(f"{err.message}, but our indexes", path=str(path))))
        except FormatError as err:
            rejected.append(Rejected(path, err))
    by_path = {checkpoint.path: checkpoint for checkpoint in checkpoints}
    ordered = newest_first([checkpoint.candidate for checkpoint in checkpoints])
    return Catalog(tuple(by_path[found.path] for found in ordered), tuple(rejected), tuple(unfinished))


def _has_index(path: Path) -> bool:
    try:
        return any(paths.is_index(file.name) for file in path.iterdir())
    except OSError:
        return False


def read_file(path: Path, size: int) -> bytes:
    """A whole small file of a checkpoint, of exactly `size` bytes."""
    with files.typed_errors(path, "reading the checkpoint"):
        descriptor = files.open_to_read(path)
        try:
            buffer = bytearray(size)
            count = files.read_at(descriptor, memoryview(buffer), 0)
        finally:
            os.close(descriptor)
    if count != size:
        raise FormatError(f"{path.name} has {count} bytes; the manifest expects {size}", path=str(path))
    return bytes(buffer)


def read_index(path: Path, manifest: CheckpointManifest, name: str) -> Index:
    """One index file of the checkpoint at `path`, verified; `CheckpointDamaged` where it has another digest."""
    record = manifest.files[name]
    data = read_file(path / name, record.size)
    if hashtree.digest(data).hex() != record.digest:
        raise CheckpointDamaged(f"{name} does not have the digest that the manifest gives", path=str(path / name))
    return Index.from_bytes(data, what=name, sizes={name: record.size for name, record in manifest.files.items()})
