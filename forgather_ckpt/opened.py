"""A checkpoint that is open for reading, by one process and without the job: no process group, none of its code.

Tensors are whole, however many ranks wrote them and however they were cut. What lies in one piece is mapped into
memory, so that it takes none until it is used, and processes on one machine share it; all else is read.
"""

import mmap
import os
from collections.abc import Mapping, Sequence
from operator import index
from pathlib import Path
from typing import Any

import torch

from forgather_ckpt import choice, files, reading, structure, values
from forgather_ckpt.assembly import Stored, destinations
from forgather_ckpt.boxes import Box, inside, whole_box
from forgather_ckpt.component import Available, StateDict
from forgather_ckpt.dtypes import ITEM_BYTES
from forgather_ckpt.errors import DeclarationError, FormatError, LoadMismatch
from forgather_ckpt.index import TensorRow
from forgather_ckpt.library import Library
from forgather_ckpt.manifest import CheckpointManifest, ComponentRecord
from forgather_ckpt.matching import Patterns, matches, patterns, some_of
from forgather_ckpt.reading import Region, Wanted


def open_checkpoint(path: str | Path, *, device: Any = "cpu", verify: bool = True) -> "OpenCheckpoint":
    """Open a checkpoint, in one process and without a process group.

    >>> open_checkpoint("runs/a/checkpoint-1000").tensor("model", "blocks.0.weight")

    `path`: its directory, `RUN@SELECTOR` (`"runs/a@latest~1"`, `"runs/a@1000"`), or a run directory, whose newest one
    it is. Tensors come to `device`. Every byte is compared with its digest when it is asked for; with `verify=False`
    none is, and a mapped tensor is read when it is used.
    """
    if not isinstance(path, (str, Path)) or not str(path):
        raise DeclarationError(f"path is {path!r}; use a checkpoint, a run directory, or RUN@SELECTOR")
    try:
        place = torch.device(device)
    except (RuntimeError, TypeError) as err:
        raise DeclarationError(f"device is {device!r}; use one such as 'cpu' or 'cuda:0' ({err})") from None
    if place.type == "meta":
        raise DeclarationError(
            "device is 'meta', which has no memory; use another one, or names(), which tells dtypes and shapes"
        )
    found = choice.named(path)
    return OpenCheckpoint(found.path, found.manifest, place, verify=verify)


def load_component(
    path: str | Path,
    component: str,
    names: Patterns | None = None,
    *,
    entry: str | None = None,
    device: Any = "cpu",
    verify: bool = True,
) -> StateDict:
    """The state dict of one component of a checkpoint: `open_checkpoint(path).load(component)`.

    >>> model.load_state_dict(load_component("runs/a@latest", "model"))
    """
    return open_checkpoint(path, device=device, verify=verify).load(component, names, entry=entry)


class OpenCheckpoint:
    """A committed checkpoint, as `open_checkpoint` returns it. Nothing has to be closed.

    A mapped tensor is private: what is written to it is nobody else's, and never reaches the file. It outlives this
    object, and the removal of the checkpoint (on a network file system, `clone()` it before another machine removes
    that).

    Where a component was stored by sets of ranks of their own (PER_RANK with local names), `entry` says whose state
    is meant, as `"rank=0"`; `LoadMismatch` where the checkpoint does not have what is asked for.
    """

    def __init__(self, path: Path, manifest: CheckpointManifest, device: torch.device, *, verify: bool) -> None:
        self.path = path
        self.manifest = manifest
        self.device = device
        self._verify = verify
        self._library = Library(path, manifest)
        self._stored: dict[tuple[str, str], Stored] = {}
        self._files: dict[str, mmap.mmap | None] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}}  # another process maps them for itself

    @property
    def step(self) -> int:
        return self.manifest.step

    @property
    def components(self) -> Mapping[str, ComponentRecord]:
        """What the manifest says of each."""
        return self.manifest.components

    def names(self, component: str, *, entry: str | None = None) -> dict[str, Available]:
        """The items of a component in their order, each with dtype and shape; both None for what is not a tensor."""
        stored = self._entry(component, entry)
        available = stored.available()
        orders = {name: rows[0].order for name, rows in stored.tensors.items()}
        orders |= {name: row.order for name, row in stored.values.items()}
        for name, alias in stored.aliases.items():
            available[name], orders[name] = available[alias.target], alias.order
        return {name: available[name] for name in sorted(available, key=orders.__getitem__)}

    def tensor(
        self, component: str, name: str, box: Sequence[tuple[int, int]] | None = None, *, entry: str | None = None
    ) -> torch.Tensor:
        """A tensor, or the part of it in `box`, which is `(start, stop)` for each dimension: of that, only the blocks
        are read in which it lies.

        `CheckpointDamaged` where its bytes are not those that were written.
        """
        stored = self._entry(component, entry)
        rows = stored.rows_of(name)
        if rows is None:
            what = "is a value, not a tensor; use load()" if name in stored.values else _unknown(name, stored.names)
            raise LoadMismatch(f"{self._told(component)}: {name!r} {what}", component=component)
        if box is None:
            return self._tensors(component, {name: rows})[name]
        part = _checked(box, rows[0])
        if not self._verify and (mapped := self._mapped(rows)) is not None:
            return mapped[inside(part, whole_box(rows[0].shape))]
        tensor = self._empty(rows[0], tuple(stop - start for start, stop in part))
        wanted = list(destinations(component, rows, Region(part, tensor)))
        reading.read(self.path, wanted, verify=self._verify)
        return tensor

    def load(self, component: str, names: Patterns | None = None, *, entry: str | None = None) -> StateDict:
        """The state dict of a component: values in their types, tied tensors tied.

        `names`: only the items that match, a shell pattern or several. `CheckpointDamaged` where the bytes of a tensor
        are not those that were written.
        """
        stored = self._entry(component, entry)
        if names is not None:
            chosen = patterns(names, "names")
            wanted = {name for name in stored.names if matches(name, chosen)}
            if not wanted:
                raise LoadMismatch(
                    f"{self._told(component)}: no item matches {names!r}; it has {some_of(stored.names)}",
                    component=component,
                )
            stored = stored.only(wanted)
        tensors = self._tensors(component, stored.tensors)
        leaves: list[tuple[int, str, Any]] = [
            (rows[0].order, name, tensors[name]) for name, rows in stored.tensors.items()
        ]
        leaves += [(row.order, name, values.decode(row.value)) for name, row in stored.values.items()]
        leaves += [(row.order, name, tensors[row.target]) for name, row in stored.aliases.items()]
        try:
            return structure.restore(leaves)
        except FormatError as err:
            if names is None:
                raise
            raise LoadMismatch(
                f"{self._told(component)}: {names!r} matches some items of a list, but not all: {err.message}",
                component=component,
            ) from None

    def _entry(self, component: str, entry: str | None) -> Stored:
        if component not in self.components:
            what = f"has no component {component!r}; it has {sorted(self.components)}"
            raise LoadMismatch(f"the checkpoint of step {self.step} {what}", component=component)
        entries = list(self.components[component].entries)
        if not entries:
            raise LoadMismatch(f"{self._told(component)} is empty: no rank held anything of it", component=component)
        if entry is None and len(entries) == 1:
            [entry] = entries
        if entry not in entries:
            problem = f"there is no entry {entry!r}" if entry else "each set of ranks has a state of its own"
            raise LoadMismatch(
                f"{self._told(component)}: {problem}; choose with entry= one of {', '.join(map(repr, entries))}",
                component=component,
            )
        if (component, entry) not in self._stored:
            self._stored[component, entry] = self._library.entry(component, entry)
        return self._stored[component, entry]

    def _told(self, component: str) -> str:
        return f"component {component!r} of the checkpoint of step {self.step}"

    def _tensors(self, component: str, wanted: Mapping[str, Sequence[TensorRow]]) -> dict[str, torch.Tensor]:
        """Whole tensors by name, mapped or read, and verified."""
        found: dict[str, torch.Tensor] = {}
        to_read: list[Wanted] = []
        for name, rows in wanted.items():
            mapped = self._mapped(rows)
            if mapped is None:
                found[name] = self._empty(rows[0], rows[0].shape)
                to_read += destinations(component, rows, Region(whole_box(rows[0].shape), found[name]))
            else:
                found[name] = mapped
                # read, not looked at in the mapping: a disk that fails is an error there, and a dead process here
                to_read += [Wanted(component, rows[0], None)] if self._verify else []
        reading.read(self.path, to_read, verify=self._verify)
        return found

    def _empty(self, row: TensorRow, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.empty(shape, dtype=getattr(torch, row.dtype), device=self.device)

    def _mapped(self, rows: Sequence[TensorRow]) -> torch.Tensor | None:
        """A tensor whose memory is the file's; None where it cannot be."""
        row = rows[0]
        is_in_place = row.is_whole and row.num_bytes > 0 and row.offset % ITEM_BYTES[row.dtype] == 0
        if self.device.type != "cpu" or not is_in_place:
            return None
        if row.file not in self._files:
            self._files[row.file] = _map(self.path / row.file, self.manifest.files[row.file].size)
        mapping = self._files[row.file]
        if mapping is None:
            return None
        # a storage of its own for each tensor, which ends where the tensor does
        flat = torch.frombuffer(mapping, dtype=torch.uint8, count=row.num_bytes, offset=row.offset)
        return flat.view(getattr(torch, row.dtype)).view(row.shape)


def _map(path: Path, size: int) -> mmap.mmap | None:
    """A file's first `size` bytes as memory that is copied when it is written to; None where it cannot be mapped."""
    with files.typed_errors(path, "opening the checkpoint"):
        descriptor = files.open_to_read(path)
    try:
        return mmap.mmap(descriptor, size, access=mmap.ACCESS_COPY)
    except (OSError, ValueError):
        return None
    finally:
        os.close(descriptor)


def _checked(box: Sequence[tuple[int, int]], row: TensorRow) -> Box:
    """`box`, if it lies in the tensor; `DeclarationError` where it does not."""
    try:
        part = tuple((index(start), index(stop)) for start, stop in box)
    except (TypeError, ValueError):
        part = ()
    is_inside = all(0 <= start <= stop <= length for (start, stop), length in zip(part, row.shape, strict=False))
    if len(part) != len(row.shape) or not is_inside:
        raise DeclarationError(f"box is {box!r}; use (start, stop) for each dimension of {list(row.shape)}")
    return part


def _unknown(name: str, known: set[str]) -> str:
    return f"is not there; it has {some_of(known)}"
