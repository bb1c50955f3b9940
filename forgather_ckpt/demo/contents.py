"""What a checkpoint holds, item by item, as its indexes say; no torch, and no tensor is read."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from forgather_ckpt import catalog, hashtree
from forgather_ckpt.errors import CheckpointDamaged
from forgather_ckpt.index import Index


@dataclass(frozen=True)
class Contents:
    """A digest for every item: `tensors` and `values` by (component, entry, name)."""

    step: int
    tensors: dict[tuple[str, str, str], str]
    values: dict[tuple[str, str, str], str]

    @property
    def components(self) -> set[str]:
        return {component for component, _, _ in (*self.tensors, *self.values)}


def read_indexes(checkpoint: Path) -> Iterator[Index]:
    """All indexes of a committed checkpoint, each compared with its digest in the manifest."""
    manifest = catalog.read_checkpoint(checkpoint).manifest
    sizes = {name: record.size for name, record in manifest.files.items()}
    for name in manifest.indexes:
        data = catalog.read_file(checkpoint / name, sizes[name])
        if hashtree.digest(data).hex() != manifest.files[name].digest:
            raise CheckpointDamaged(f"{name} does not have the digest that the manifest gives", path=name)
        yield Index.from_bytes(data, what=name, sizes=sizes)


def contents(checkpoint: Path) -> Contents:
    """The digests of a checkpoint's items, with their dtypes and shapes.

    A tensor that several ranks wrote in pieces counts once where they recorded the digest of the whole, else
    once a piece.
    """
    tensors: dict[tuple[str, str, str], str] = {}
    values: dict[tuple[str, str, str], str] = {}
    for index in read_indexes(checkpoint):
        for entry in index.entries:
            for row in entry.tensors:
                is_known_whole = row.is_whole or row.logical is not None
                name = row.name if is_known_whole else f"{row.name} {row.box or ''}{row.range or ''}"
                structure = f"{row.dtype} {list(row.shape)}"
                tensors[entry.component, entry.entry, name] = f"{structure} {(row.logical or row.digest).hex()}"
            for value in entry.values:
                values[entry.component, entry.entry, value.name] = value.digest.hex()
            for alias in entry.aliases:
                values[entry.component, entry.entry, alias.name] = f"is {alias.target}"
    return Contents(catalog.read_checkpoint(checkpoint).manifest.step, tensors, values)
