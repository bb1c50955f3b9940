"""How the stored pieces of a component become a state dict: which bytes go where, before any is read.

Per item the destination is, in this order: what the stateful's `load_targets` says; the live tensor of that name,
filled in place where dtype, shape and layout fit; else a new tensor in host memory. Of a DTensor only the parts that
this rank holds are filled, from whatever parts were stored.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from forgather_ckpt import sharded, structure, values
from forgather_ckpt.boxes import overlap, whole_box
from forgather_ckpt.component import Available, Target
from forgather_ckpt.errors import CheckpointError, FormatError, LoadMismatch
from forgather_ckpt.index import AliasRow, IndexEntry, TensorRow, ValueRow
from forgather_ckpt.memory import flat_bytes, is_flat
from forgather_ckpt.pieces import item_problems
from forgather_ckpt.reading import Region, Wanted
from forgather_ckpt.structure import ShardedItem, State, TensorItem


@dataclass(frozen=True)
class Stored:
    """All rows of one entry of a component, from all its writers, by item name."""

    component: str
    tensors: Mapping[str, Sequence[TensorRow]]
    """The pieces of each tensor, in order; together they are the whole."""
    values: Mapping[str, ValueRow]
    aliases: Mapping[str, AliasRow]

    @property
    def names(self) -> set[str]:
        return {*self.tensors, *self.values, *self.aliases}

    def available(self) -> dict[str, Available]:
        """What `load_targets` is told."""
        told = {name: Available(rows[0].dtype, rows[0].shape) for name, rows in self.tensors.items()}
        return told | {name: Available(None, None) for name in self.values}

    def only(self, wanted: set[str]) -> "Stored":
        """The items in `wanted`. An alias of a tensor that is not wanted becomes that tensor, under its own name."""
        kept = {name: rows for name, rows in self.tensors.items() if name in wanted}
        aliases = {name: alias for name, alias in self.aliases.items() if name in wanted and alias.target in wanted}
        for name in wanted & (set(self.aliases) - set(aliases)):
            alias = self.aliases[name]
            kept[name] = [row._replace(name=name, order=alias.order) for row in self.tensors[alias.target]]
        return Stored(self.component, kept, {name: row for name, row in self.values.items() if name in wanted}, aliases)

    def rows_of(self, name: str) -> Sequence[TensorRow] | None:
        """The pieces of the tensor that has this name, or this second name; None where it is a value."""
        return self.tensors.get(self.aliases[name].target if name in self.aliases else name)

    def renamed(self, names: Mapping[str, str]) -> "Stored":
        """The same items, each under the name that `names` has for its own."""
        return Stored(
            self.component,
            {names[name]: [row._replace(name=names[name]) for row in rows] for name, rows in self.tensors.items()},
            {names[name]: row._replace(name=names[name]) for name, row in self.values.items()},
            {
                names[name]: row._replace(name=names[name], target=names[row.target])
                for name, row in self.aliases.items()
            },
        )


def gather(component: str, parts: Sequence[IndexEntry]) -> Stored:
    """Join what the writers stored of one entry; `FormatError` where it does not make up whole items."""
    for item, problem in item_problems(parts):
        raise FormatError(f"component {component!r}: {item!r}: {problem}", component=component)
    pieces: dict[str, list[TensorRow]] = defaultdict(list)
    for part in parts:
        for row in part.tensors:
            pieces[row.name].append(row)
    for rows in pieces.values():
        rows.sort(key=lambda row: (row.box or (), row.bounds))
    return Stored(
        component,
        pieces,
        {row.name: row for part in parts for row in part.values},
        {row.name: row for part in parts for row in part.aliases},
    )


def content_of(rows: Sequence[TensorRow]) -> bytes:
    """What is equal for stored tensors of equal bytes, unless they were cut differently."""
    return b"".join(row.digest for row in rows) if rows[0].logical is None else rows[0].logical


@dataclass
class Assembly:
    """A state dict in the making: `wanted` says what to read where; when that is done, `state_dict` returns it."""

    wanted: list[Wanted] = field(default_factory=list)
    made: dict[str, tuple[str, tuple[int, ...]]] = field(default_factory=dict)
    """By name the dtype and shape of the tensors that are read."""
    _leaves: list[tuple[int, str, Any]] = field(default_factory=list)
    _copies: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)

    def add(self, order: int, name: str, leaf: Any) -> None:
        """A leaf that is not read."""
        self._leaves.append((order, name, leaf))

    @property
    def values(self) -> dict[str, Any]:
        """What is not a tensor, by item name."""
        return {name: leaf for _, name, leaf in self._leaves if not isinstance(leaf, torch.Tensor)}

    def state_dict(self) -> dict[Any, Any]:
        """The state dict, after the bytes have been read. Called once: it hands its tensors over."""
        with torch.no_grad():
            for target, source in self._copies:
                target.copy_(source)
        return structure.restore(self._leaves)


def assemble(
    stored: Stored,
    live: State | None,
    targets: Mapping[str, Target | None],
    *,
    staged: bool = False,
    cast: bool = False,
) -> Assembly:
    """Plan the state dict of `stored`. With `staged`, nothing is read into live memory.

    `LoadMismatch` where a live tensor, that no target replaces, has another dtype or shape than the stored one; with
    `cast` only where it has another shape.
    """
    assembly = Assembly()
    tensors: dict[str, torch.Tensor] = {}
    for name, rows in stored.tensors.items():
        if name in targets and targets[name] is None:
            continue
        tensor = _place(assembly, stored.component, rows, live, targets.get(name), staged=staged, cast=cast)
        tensors[name] = tensor
        assembly.made[name] = structure.dtype_name(tensor.dtype), rows[0].shape
        assembly.add(rows[0].order, name, tensor)
    for name, value in stored.values.items():
        if name not in targets or targets[name] is not None:
            assembly.add(value.order, name, values.decode(value.value))
    for name, alias in stored.aliases.items():
        if alias.target in tensors:
            assembly.add(alias.order, name, tensors[alias.target])
    return assembly


def _place(
    assembly: Assembly,
    component: str,
    rows: Sequence[TensorRow],
    live: State | None,
    target: Target | None,
    *,
    staged: bool,
    cast: bool,
) -> torch.Tensor:
    """The tensor that will be in the state dict, with its pieces' destinations noted."""
    first = rows[0]
    dtype = getattr(torch, first.dtype)
    existing = None
    if live is not None and target is None:
        # what is one tensor in the job may have been several when it was saved, of equal bytes
        existing = live.tensor_item(live.aliases[first.name].target if first.name in live.aliases else first.name)
    if existing is not None:
        if cast:
            dtype = existing.tensor.dtype
        if (structure.dtype_name(dtype), first.shape) != (existing.dtype, existing.shape):
            converts = "" if first.shape != existing.shape else ", have it converted by warm_start(…, cast=True)"
            raise LoadMismatch(
                f"component {component!r}: {first.name!r} is {first.dtype} {list(first.shape)} in the checkpoint and "
                f"{existing.dtype} {list(existing.shape)} in the job; build the job as it was saved{converts}, or give the "
                "stateful a load_targets()",
                component=component,
            )
        dtensor = existing.tensor if isinstance(existing, ShardedItem) else existing.dtensor
        if dtensor is not None:
            regions = _regions(existing)
            if not all(_is_dense(region.tensor) for region in regions):
                raise LoadMismatch(
                    f"component {component!r}: the local part of {first.name!r} has elements that share memory (an expanded "
                    "tensor), and cannot be filled; make it contiguous",
                    component=component,
                )
            # its stateful expects a DTensor; so with `staged`, the copy waits until that gets its state
            _fill(assembly, component, rows, regions, staged=staged)
            return dtensor
        if not staged and _is_dense(existing.tensor):
            _fill(assembly, component, rows, _regions(existing))
            return existing.tensor
    try:
        if target is not None and target.mesh is not None and target.placements is not None:
            dtensor = sharded.empty(first.shape, dtype, target.mesh, target.placements)
            made: torch.Tensor = dtensor
            regions = [Region(box, part) for box, part in sharded.parts(dtensor)]
        else:
            device = torch.device("cpu" if target is None or staged else target.device)
            if device.type == "meta":
                raise LoadMismatch("the meta device has no memory; materialize what it is to be like first")
            made = torch.empty(first.shape, dtype=dtype, device=device)
            regions = [Region(whole_box(first.shape), made)]
    except Exception as err:
        told = err.message if isinstance(err, CheckpointError) else f"{type(err).__name__}: {err}"
        raise LoadMismatch(
            f"component {component!r}: {first.name!r}, {first.dtype} {list(first.shape)}, cannot be made where it is to go: "
            f"{told}",
            component=component,
        ) from err
    _fill(assembly, component, rows, regions)
    return made


def _regions(item: TensorItem | ShardedItem) -> list[Region]:
    """Where the elements lie that this rank has of a live tensor."""
    if isinstance(item, ShardedItem):
        return [Region(box, part) for box, part in sharded.parts(item.tensor)]
    return [Region(whole_box(item.shape), item.tensor)]


def _fill(
    assembly: Assembly, component: str, rows: Sequence[TensorRow], regions: Sequence[Region], *, staged: bool = False
) -> None:
    """Note which stored pieces go where in the regions; with `staged` by way of host memory."""
    for region in regions:
        if staged:
            buffer = torch.empty(region.tensor.shape, dtype=region.tensor.dtype)
            assembly._copies.append((region.tensor, buffer))
            region = Region(region.box, buffer)
        assembly.wanted += destinations(component, rows, region)


def destinations(component: str, rows: Sequence[TensorRow], region: Region) -> Iterator[Wanted]:
    """Which pieces of a stored tensor fill a region of it, and where each goes."""
    is_alike = structure.dtype_name(region.tensor.dtype) == rows[0].dtype
    flat = flat_bytes(region.tensor) if is_alike and is_flat(region.tensor) else None
    for row in rows:
        box = whole_box(row.shape) if row.box is None else row.box
        if box == region.box and flat is not None:
            start, stop = row.bounds
            yield Wanted(component, row, flat[start:stop])
        elif overlap(box, region.box) is not None:
            yield Wanted(component, row, region)


def _is_dense(tensor: torch.Tensor) -> bool:
    """Whether each element has memory of its own, so that the tensor can be filled in place."""
    if tensor.is_conj() or tensor.is_neg():
        return False
    expected = 1
    for stride, length in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if length > 1:
            if stride < expected:
                return False
            expected = stride * length
    return True
