"""The indexes of a checkpoint, from which its items are found."""

from pathlib import Path

from forgather_ckpt import catalog
from forgather_ckpt.assembly import Stored, gather
from forgather_ckpt.errors import FormatError
from forgather_ckpt.index import Index, IndexEntry
from forgather_ckpt.manifest import CheckpointManifest


class Library:
    """The indexes of a checkpoint, each read and verified once, when an entry of it is asked for."""

    def __init__(self, path: Path, manifest: CheckpointManifest) -> None:
        self.manifest = manifest
        self._path = path
        self._indexes: dict[str, Index] = {}

    def entry(self, component: str, entry: str) -> Stored:
        """The items of an entry that the manifest has; `FormatError` or `CheckpointDamaged` where they are not whole."""
        parts: list[IndexEntry] = []
        for name, pairs in self.manifest.indexes.items():
            if (component, entry) in pairs:
                found = self._read(name).entries
                parts += [part for part in found if (part.component, part.entry) == (component, entry)]
        stored = gather(component, parts)
        expected = self.manifest.components[component].entries[entry]
        if len(stored.names) != expected.num_items:
            raise FormatError(
                f"component {component!r}, entry {entry!r}: {len(stored.names)} items in the indexes, "
                f"{expected.num_items} in the manifest",
                component=component,
            )
        return stored

    def _read(self, name: str) -> Index:
        if name not in self._indexes:
            self._indexes[name] = catalog.read_index(self._path, self.manifest, name)
        return self._indexes[name]
