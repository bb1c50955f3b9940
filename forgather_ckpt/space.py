"""The room that a run's checkpoints take, and whether the next ones will fit. For rank 0.

Sizes are those of the manifests, which the catalog has compared with the files; what is not known is left out.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from forgather_ckpt import annotations, catalog, files, paths
from forgather_ckpt.catalog import Catalog, Checkpoint
from forgather_ckpt.figures import byte_count
from forgather_ckpt.manifest import KINDS

NUM_RECENT = 3
"""How many of the newest checkpoints say how large the next one will be."""

NUM_SAVES_AHEAD = 2

PINNED = "pinned"


@dataclass(frozen=True)
class Role:
    """How much of one role there is."""

    count: int = 0
    num_bytes: int = 0


@dataclass(frozen=True)
class Storage:
    """What lies in a run directory."""

    run: Path
    roles: Mapping[str, Role]
    """By kind ("periodic", …), or "pinned": each checkpoint once. In the order of `manifest.KINDS`."""
    largest_recent_bytes: int | None
    """Of the newest checkpoints, as far as one can tell from them what the next one takes; None where there is none."""
    deleting_bytes: int
    """What removed checkpoints still take that are being deleted."""
    free_bytes: int | None
    """None where the file system does not say."""

    @property
    def num_bytes(self) -> int:
        return sum(role.num_bytes for role in self.roles.values())


def storage(run: Path, found: Catalog | None = None) -> Storage:
    """What lies in a run directory now; `found`, if it has been looked through already.

    A link to a checkpoint elsewhere takes no room here.
    """
    found = found or catalog.scan(run)
    here = [checkpoint for checkpoint in found.checkpoints if not checkpoint.path.is_symlink()]
    sizes = {checkpoint.path: _size(checkpoint) for checkpoint in here}
    roles: dict[str, Role] = {}
    for checkpoint in here:
        name = _role(checkpoint)
        before = roles.get(name, Role())
        roles[name] = Role(before.count + 1, before.num_bytes + sizes[checkpoint.path])
    return Storage(
        run=run,
        roles={name: roles[name] for name in sorted(roles, key=_place)},
        largest_recent_bytes=max((sizes[checkpoint.path] for checkpoint in here[:NUM_RECENT]), default=None),
        deleting_bytes=sum(_on_disk(path) for path in found.unfinished if path.name.startswith(paths.TRASH_PREFIX)),
        free_bytes=_free(run),
    )


def line(storage: Storage) -> str:
    """`checkpoint storage: 45.2 GB (10 periodic, 5 epoch, 3 emergency), 12.3 GB free`."""
    counts = ", ".join(f"{role.count} {name}" for name, role in storage.roles.items())
    free = "" if storage.free_bytes is None else f", {byte_count(storage.free_bytes)} free"
    return f"checkpoint storage: {byte_count(storage.num_bytes)}{f' ({counts})' if counts else ''}{free}"


def shortage(storage: Storage, *, removed_per_save_bytes: int = 0) -> str | None:
    """What to say where the next two saves will not fit; None where they will, or where it is not known.

    `removed_per_save_bytes`: what retention removes after each save. What is being deleted counts as free.
    """
    largest, free = storage.largest_recent_bytes, storage.free_bytes
    if largest is None or free is None:
        return None
    free += storage.deleting_bytes
    needed = NUM_SAVES_AHEAD * largest - (NUM_SAVES_AHEAD - 1) * min(removed_per_save_bytes, largest)
    if free >= needed:
        return None
    return (
        f"the next {NUM_SAVES_AHEAD} saves will not fit: they need {byte_count(needed)}, and {byte_count(free)} are free for "
        f"{storage.run}. Make room, as with `fgckpt prune --keep-last 3`, and keep fewer (save_total_limit, now "
        f"{sum(role.count for role in storage.roles.values())} checkpoints in {byte_count(storage.num_bytes)})"
    )


def _role(checkpoint: Checkpoint) -> str:
    manifest = checkpoint.manifest
    return PINNED if annotations.read(checkpoint.path, manifest.digest).is_pinned else manifest.kind


def _place(role: str) -> tuple[int, str]:
    order = (*KINDS, PINNED)
    return (order.index(role) if role in order else len(order), role)


def _size(checkpoint: Checkpoint) -> int:
    own = files.regular_size(checkpoint.path / paths.MANIFEST) or 0
    return checkpoint.manifest.num_bytes + own


def _on_disk(directory: Path) -> int:
    """What the files in a directory take; it may be going away at this moment."""
    try:
        return sum(files.regular_size(path) or 0 for path in directory.iterdir())
    except OSError:
        return 0


def _free(run: Path) -> int | None:
    try:
        return files.free_bytes(run)
    except OSError:
        return None
