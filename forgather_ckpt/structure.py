"""State dicts as flat lists of named items, and back.

A dict is always descended into; a list or tuple only where a dict or a tensor lies below it, otherwise it is one
value. What is not a tensor is a value and must be plain data (see `values`). Tensors are references to live
memory: nothing is copied here. Of a DTensor that a mesh cuts, this rank has some boxes, each of them a part.
"""

import functools
import gc
import itertools
from collections import OrderedDict
from collections.abc import Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from forgather_ckpt import hashtree, names, sharded, values
from forgather_ckpt.boxes import Box
from forgather_ckpt.dtypes import ITEM_BYTES
from forgather_ckpt.errors import FormatError, StructureError
from forgather_ckpt.names import ListIndex, Path, TupleIndex
from forgather_ckpt.portions import WHOLE, Held, layout_name
from forgather_ckpt.sharded import PLAIN_TENSORS, MeshLayout

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

_DICTS = (dict, OrderedDict)
"""Descended into. An OrderedDict, which modules return, comes back as a dict, which keeps its order too."""


class TensorItem(NamedTuple):
    """What this rank has of a tensor of a state dict, all of it or one box: `tensor` is live memory."""

    name: str
    order: int
    tensor: torch.Tensor
    box: Box | None = None
    """None for a whole tensor."""
    whole_shape: tuple[int, ...] | None = None
    """Of the whole tensor, where that is not the shape of `tensor`."""
    layout: str = WHOLE
    """Which of its state's layouts the box comes from."""
    dtensor: torch.Tensor | None = None
    """That this is the local part of, where that is all of it."""

    @property
    def key(self) -> str:
        """What tells parts of a state apart: the name of a whole tensor, the name and the box of a part."""
        return self.name if self.box is None else names.part_key(self.name, self.box)

    @property
    def dtype(self) -> str:
        return dtype_name(self.tensor.dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole tensor."""
        return tuple(self.tensor.shape) if self.whole_shape is None else self.whole_shape

    @property
    def num_bytes(self) -> int:
        return self.tensor.nbytes

    @property
    def structure(self) -> bytes:
        """What its record in its state's digest says besides its bytes."""
        shape = self.tensor.shape if self.whole_shape is None else self.whole_shape
        return _structure(self.tensor.dtype, shape, self.box)


class ShardedItem(NamedTuple):
    """A DTensor of a state dict that its mesh cuts into parts; `tensor` is the live one."""

    name: str
    order: int
    tensor: "DTensor"
    layout: str

    @property
    def dtype(self) -> str:
        return dtype_name(self.tensor.dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)


class ValueItem(NamedTuple):
    """A value of a state dict, and its typed JSON."""

    name: str
    order: int
    value: Any
    data: bytes


class AliasItem(NamedTuple):
    """Another name of the same tensor: tied weights."""

    name: str
    order: int
    target: str


@dataclass(frozen=True)
class State:
    """The items of one state dict, by name."""

    tensors: Mapping[str, TensorItem]
    """By key: whole tensors, and the parts of sharded ones that this rank holds."""
    values: Mapping[str, ValueItem]
    aliases: Mapping[str, AliasItem]
    sharded: Mapping[str, ShardedItem] = field(default_factory=dict)
    """Those of which this rank holds nothing, too."""
    layouts: Mapping[str, MeshLayout] = field(default_factory=dict)
    """Of the sharded tensors, by the name that says how they are cut."""

    @property
    def names(self) -> set[str]:
        return {*self._whole(), *self.sharded, *self.values, *self.aliases}

    @property
    def num_items(self) -> int:
        return len(self._whole()) + len(self.sharded) + len(self.values) + len(self.aliases)

    def held(self) -> dict[str, Held]:
        """How much this rank holds of each layout, what is whole first."""
        whole = self._whole()
        num_whole = len(whole) + len(self.values) + len(self.aliases)
        found = {WHOLE: Held(None, (), num_whole, sum(item.num_bytes for item in whole.values()))}
        parts: dict[str, list[int]] = {name: [] for name in self.layouts}
        for item in self.tensors.values():
            if item.box is not None:
                parts[item.layout].append(item.num_bytes)
        for name, (layout, ranks) in self.layouts.items():
            found[name] = Held(layout, ranks, len(parts[name]), sum(parts[name]))
        return found

    def _whole(self) -> Mapping[str, TensorItem]:
        if not self.sharded:
            return self.tensors
        return {key: item for key, item in self.tensors.items() if item.box is None}

    def tensor_item(self, name: str) -> TensorItem | ShardedItem | None:
        """The tensor of that name, whole or sharded; None where there is none."""
        return self.sharded.get(name) or self.tensors.get(name)

    def tensor_parts(self, name: str) -> list[TensorItem]:
        """What this rank has of the tensor of that name: it, or some boxes of it."""
        if name not in self.sharded:
            return [self.tensors[name]]
        return [item for item in self.tensors.values() if item.name == name]

    def table(self) -> list[list[Any]]:
        """What must be equal between copies besides the bytes, in the order of names: `[name, kind, …]` an item."""
        rows: list[list[Any]] = [[item.name, "tensor", item.dtype, list(item.shape)] for item in self._whole().values()]
        rows += [[item.name, "tensor", item.dtype, list(item.shape), item.layout] for item in self.sharded.values()]
        rows += [[item.name, "value"] for item in self.values.values()]
        rows += [[item.name, "alias", item.target] for item in self.aliases.values()]
        return sorted(rows)

    def structure_digest(self) -> bytes:
        """Equal where the tables are, and only there."""
        records = [(item.name, item.structure, b"") for item in self._whole().values()]
        records += [
            (item.name, hashtree.tensor_structure(item.dtype, item.shape) + b" " + item.layout.encode(), b"")
            for item in self.sharded.values()
        ]
        records += [(item.name, b"value", b"") for item in self.values.values()]
        records += [(item.name, b"alias " + item.target.encode(), b"") for item in self.aliases.values()]
        return hashtree.state_digest(records)


@contextmanager
def collector_paused() -> Iterator[None]:
    """No automatic garbage collection inside. The items of a large state are many new objects, none of them garbage, and
    would set off full collections that take as long as the work itself."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def capture(state_dict: Any) -> State:
    """The items of `state_dict`; `StructureError` with the path of the first leaf that cannot be stored."""
    if not isinstance(state_dict, Mapping):
        raise StructureError(f"state_dict() returned a {type(state_dict).__name__}; expected a dict")
    walk = _Walk()
    try:
        walk.visit_dict(state_dict, ())
    except RecursionError:
        raise _too_deep(()) from None
    layouts = {name: layout for layout, name in walk.layouts.items()}
    return State(walk.tensors, walk.values, walk.aliases, walk.sharded, layouts)


class _Walk:
    def __init__(self) -> None:
        self.tensors: dict[str, TensorItem] = {}
        self.values: dict[str, ValueItem] = {}
        self.aliases: dict[str, AliasItem] = {}
        self.sharded: dict[str, ShardedItem] = {}
        self.layouts: dict[MeshLayout, str] = {}
        self._order = 0
        self._owners: dict[Hashable, list[tuple[str, torch.Tensor]]] = {}
        """By where they begin, the tensors that no other name had before."""

    def visit_dict(self, mapping: Mapping[Any, Any], path: Path) -> None:
        odd = [key for key in mapping if type(key) is not str]
        if len({self._name((*path, key)) for key in odd}) < len(odd):
            raise StructureError(f"{describe_path(path)}: two keys have one name, as NaNs have; use other keys")
        for key, value in mapping.items():
            self._visit(value, (*path, key))

    def _visit(self, value: Any, path: Path) -> None:
        if len(path) > values.MAX_DEPTH:
            raise _too_deep(path)
        if isinstance(value, torch.Tensor):
            self._add_tensor(value, path)
        elif type(value) in _DICTS and value:
            self.visit_dict(value, path)
        elif type(value) in (list, tuple) and _has_items(value):
            step = ListIndex if type(value) is list else TupleIndex
            for index, item in enumerate(value):
                self._visit(item, (*path, step(index)))
        elif isinstance(value, dict) and _holds_tensor(value):
            kind = type(value).__name__
            raise StructureError(
                f"{self._name(path)}: a {kind} that holds tensors would come back as a dict; return dict(…) of it"
            )
        else:
            self._add_value({} if type(value) in _DICTS else value, path)

    def _name(self, path: Path) -> str:
        try:
            return names.encode_path(path)
        except values.NotPlain as err:
            raise StructureError(f"{describe_path(path)}: the key {path[-1]!r}: {err.reason}") from None

    def _add_tensor(self, tensor: torch.Tensor, path: Path) -> None:
        name = self._name(path)
        try:
            whole = tensor if type(tensor) in PLAIN_TENSORS else self._local_or_none(tensor)
            if whole is not None and (reason := _why_not_storable(whole)):
                raise StructureError(reason)
            self._order += 1
            if (owner := self._owner(tensor, name)) != name:
                self.aliases[name] = AliasItem(name, self._order, owner)
            elif whole is None:
                self._add_sharded(tensor, name)
            elif whole is tensor:
                self.tensors[name] = TensorItem(name, self._order, _without_grad(tensor))
            else:
                shape = tuple(tensor.shape)
                item = TensorItem(name, self._order, whole.detach(), whole_shape=shape, dtensor=tensor.detach())
                self.tensors[name] = item
        except StructureError as err:
            raise StructureError(f"{name}: {err.message}") from None

    def _owner(self, tensor: torch.Tensor, name: str) -> str:
        """The first name of the same tensor. What else two must have in common is asked only where they begin alike."""
        if type(tensor) in PLAIN_TENSORS:
            start: Hashable = tensor.data_ptr()
            if not start:
                return name
        elif (start := _memory_of_local(tensor)) is None:
            return name
        if (others := self._owners.get(start)) is None:
            self._owners[start] = [(name, tensor)]
            return name
        memory = memory_of(tensor)
        if memory is not None:
            for owner, other in others:
                if memory_of(other) == memory:
                    return owner
            others.append((name, tensor))
        return name

    def _local_or_none(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """The memory of a tensor of another type that is all on this rank; None where its mesh cuts it."""
        if not sharded.is_dtensor(tensor):
            return tensor
        return None if sharded.is_sharded(tensor) else sharded.local_part(tensor)

    def _add_sharded(self, tensor: Any, name: str) -> None:
        layout = sharded.layout_of(tensor)
        own = self.layouts.setdefault(layout, layout_name(layout.layout, len(self.layouts)))
        shape = tuple(tensor.shape)
        self.sharded[name] = ShardedItem(name, self._order, _without_grad(tensor), own)
        for box, part in sharded.parts(tensor):
            item = TensorItem(name, self._order, part, box, shape, own)
            if reason := _why_not_storable(part):
                raise StructureError(reason)
            self.tensors[item.key] = item

    def _add_value(self, value: Any, path: Path) -> None:
        name = self._name(path)
        try:
            data = values.dumps(value)
        except values.NotPlain as err:
            raise StructureError(f"{'/'.join((name, *err.steps))}: {err.reason}") from None
        self._order += 1
        self.values[name] = ValueItem(name, self._order, value, data)


def memory_of(tensor: torch.Tensor) -> Hashable | None:
    """What two tensors have in common exactly if they are one: names of tied weights. None where that has no meaning."""
    if type(tensor) not in PLAIN_TENSORS:
        return _memory_of_local(tensor)
    if not tensor.numel() or tensor.is_conj() or tensor.is_neg():
        return None
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def _memory_of_local(tensor: torch.Tensor) -> Hashable | None:
    """Of a DTensor. All ranks must see the same ties, so a local part may be empty: then its storage is asked for
    itself, as it has no address."""
    if not sharded.is_dtensor(tensor) or not tensor.numel():
        return None
    local = sharded.local_part(tensor)
    storage = local.untyped_storage()
    start = storage.data_ptr() if local.numel() else storage._cdata
    return start, local.storage_offset(), tensor.shape, tensor.placements, tensor.dtype, local.device


def _without_grad(tensor: Any) -> Any:
    """The tensor, of which a view is made only where it must be: that would cost more than all the rest."""
    return tensor.detach() if tensor.requires_grad else tensor


@functools.cache
def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@functools.lru_cache(1 << 14)  # thousands of tensors are alike
def _structure(dtype: torch.dtype, shape: tuple[int, ...], box: Box | None) -> bytes:
    return hashtree.tensor_structure(dtype_name(dtype), shape, box)


def _too_deep(path: Path) -> StructureError:
    where = f"{describe_path(path[:4])}/…" if path else "the state dict"
    return StructureError(f"{where}: is nested deeper than {values.MAX_DEPTH} levels, or contains itself")


def describe_path(path: Path) -> str:
    return "/".join(step if isinstance(step, str) else repr(step) for step in path)


def _has_items(sequence: list[Any] | tuple[Any, ...]) -> bool:
    """Whether a dict or a tensor lies somewhere below, so that its leaves deserve names of their own."""
    return any(
        isinstance(item, (torch.Tensor, dict)) or (type(item) in (list, tuple) and _has_items(item))
        for item in sequence
    )


def _holds_tensor(value: Any) -> bool:
    if isinstance(value, dict):
        return any(_holds_tensor(item) for item in value.values())
    return isinstance(value, torch.Tensor) or (type(value) in (list, tuple) and any(map(_holds_tensor, value)))


_STORABLE = frozenset(getattr(torch, name) for name in ITEM_BYTES if hasattr(torch, name))


def _why_not_storable(tensor: torch.Tensor) -> str | None:
    if _is_plain(tensor) and tensor.dtype in _STORABLE:
        return None
    if type(tensor) not in PLAIN_TENSORS:
        return f"tensors of type {type(tensor).__name__} cannot be checkpointed; return plain tensors"
    if tensor.is_nested:
        return "nested tensors cannot be checkpointed; store their parts"
    if tensor.is_meta:
        return "a meta tensor has no data; materialize it first, as by module.to_empty(device=…)"
    if tensor.is_quantized:
        return "quantized tensors cannot be checkpointed; store int_repr(), scale and zero point"
    if tensor.layout != torch.strided:
        return f"tensors of layout {tensor.layout} cannot be checkpointed; store their indices and values"
    return f"tensors of dtype {tensor.dtype} cannot be checkpointed; convert them"


def _is_plain(tensor: torch.Tensor) -> bool:
    return (
        type(tensor) in PLAIN_TENSORS
        and tensor.layout is torch.strided
        and not (tensor.is_nested or tensor.is_meta or tensor.is_quantized)
    )


def restore(items: Iterable[tuple[int, str, Any]]) -> dict[Any, Any]:
    """The state dict from `(order, name, value)` of its leaves, in any order.

    `FormatError` where the names do not form one: a leaf below a leaf, or a list with holes.
    """
    try:
        return _restore(items)
    except RecursionError:
        raise FormatError("the stored state is nested too deeply") from None


def _restore(items: Iterable[tuple[int, str, Any]]) -> dict[Any, Any]:
    root = _Node(dict)
    for _, name, value in sorted(items, key=lambda item: item[:2]):
        path, segments = names.decode_path(name), name.split("/")
        if _container_of(path[0]) is not dict:
            raise FormatError(f"item name {name!r} begins with an index; a state is a dict")
        node = root
        for segment, (step, following) in zip(segments, itertools.pairwise(path), strict=False):
            node = node.descend(segment, step, _container_of(following), name)
        node.add(segments[-1], path[-1], value, name)
    built: dict[Any, Any] = root.build()
    return built


def _container_of(step: Any) -> type:
    return list if type(step) is ListIndex else tuple if type(step) is TupleIndex else dict


class _Node:
    """A container that is being rebuilt.

    Steps are told apart by their segments of names: 1, True and 1.0 are equal keys of a dict, and a NaN is not equal
    to itself, but their names are.
    """

    def __init__(self, kind: type) -> None:
        self.kind = kind
        self.children: dict[str, tuple[Any, Any]] = {}

    def descend(self, segment: str, step: Any, kind: type, name: str) -> "_Node":
        _, child = self.children.setdefault(segment, (step, _Node(kind)))
        if not isinstance(child, _Node) or child.kind is not kind:
            raise FormatError(f"item name {name!r} contradicts another name of the same state")
        return child

    def add(self, segment: str, step: Any, value: Any, name: str) -> None:
        if segment in self.children:
            raise FormatError(f"item {name!r} appears twice")
        self.children[segment] = (step, value)

    def build(self) -> Any:
        built = [(step, child.build() if isinstance(child, _Node) else child) for step, child in self.children.values()]
        if self.kind is dict:
            mapping = dict(built)
            if len(mapping) != len(built):
                raise FormatError(f"a dict of {len(built)} items has equal keys: {[step for step, _ in built][:8]}")
            return mapping
        indexes = sorted(step.index for step, _ in built)
        if indexes != list(range(len(built))):
            raise FormatError(f"a list of {len(built)} items has the indexes {indexes[:8]}")
        by_index = {step.index: value for step, value in built}
        return self.kind(by_index[index] for index in indexes)
