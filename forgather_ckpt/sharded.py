"""DTensors as what they are made of: a layout on a mesh, and this rank's boxes as views of its local part.

`torch.distributed.tensor` takes half a second to import, so that is left to those who have a DTensor.
"""

import functools
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeGuard

import torch
from torch import nn

from forgather_ckpt.boxes import Box, Layout, Shard, check_tiling, local_boxes, local_shape
from forgather_ckpt.errors import StructureError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.placement_types import Placement

PLAIN_TENSORS = (torch.Tensor, nn.Parameter, nn.Buffer)


class MeshLayout(NamedTuple):
    """A layout, and the ranks of the mesh that it is on, in C order."""

    layout: Layout
    ranks: tuple[int, ...]


class Part(NamedTuple):
    """A box of a DTensor, and the view of this rank's local part that holds it."""

    box: Box
    tensor: torch.Tensor


def is_dtensor(tensor: torch.Tensor) -> TypeGuard["DTensor"]:
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether the tensor is a DTensor that some mesh axis of more than one rank cuts; else its local part is all of it."""
    return is_dtensor(tensor) and tensor.numel() > 0 and any(layout_of(tensor).layout.placements)


def layout_of(tensor: "DTensor") -> MeshLayout:
    """`StructureError` for placements that hold sums of which each rank has a part only, and for meshes of which torch
    itself does not keep the order."""
    return mesh_layout(tensor.device_mesh, tuple(tensor.placements))


@functools.lru_cache(64)  # thousands of tensors are laid out alike
def mesh_layout(mesh: "DeviceMesh", placements: tuple["Placement", ...]) -> MeshLayout:
    shape = tuple(mesh.mesh.shape)
    known = tuple(_placement(one) if size > 1 else None for one, size in zip(placements, shape, strict=True))
    for axis, one in enumerate(known):
        # Process groups sort their ranks: what torch scatters and gathers along such an axis is not where the mesh says.
        if one is not None and bool((mesh.mesh.diff(dim=axis) < 0).any()):
            raise StructureError(
                f"a DTensor cannot be checkpointed on the mesh {mesh.mesh.tolist()}: its ranks do not ascend along axis "
                f"{axis}, which cuts the tensor, and torch cuts in the order of ranks; make the mesh with ascending ranks there"
            )
    return MeshLayout(Layout(shape, known), tuple(mesh.mesh.flatten().tolist()))


def _placement(placement: "Placement") -> Shard | None:
    from torch.distributed.tensor import placement_types as torch_types

    if isinstance(placement, torch_types.Replicate):
        return None
    if isinstance(placement, torch_types._StridedShard):  # before Shard, of which it was a subclass once
        return Shard(placement.dim, int(placement.split_factor))
    if isinstance(placement, torch_types.Shard):
        return Shard(placement.dim)
    raise StructureError(
        f"a DTensor with the placement {placement!r} cannot be checkpointed: no rank has its elements; redistribute it first"
    )


def coordinate_of(mesh: "DeviceMesh") -> tuple[int, ...] | None:
    """This rank's place on the mesh; None where it is not on it."""
    place = mesh.get_coordinate()
    return None if place is None else tuple(place)


def parts(tensor: "DTensor") -> list[Part]:
    """The boxes that this rank holds; none where its part is empty. Views: what is written to them is the tensor's.

    `StructureError` where the local part is not what the placements say, or no plain tensor.
    """
    layout, shape = layout_of(tensor).layout, tuple(tensor.shape)
    check_tiling(layout, shape)
    place = coordinate_of(tensor.device_mesh)
    if place is None:
        raise StructureError("this rank is not on the DTensor's mesh, and holds nothing of it; leave it out here")
    local = local_part(tensor)
    expected = local_shape(layout, shape, place)
    if tuple(local.shape) != expected:
        raise StructureError(
            f"its local part has the shape {list(local.shape)}, and its placements ({layout}) give this rank {list(expected)}"
        )
    return views(local, layout, shape, place)


def views(local: torch.Tensor, layout: Layout, shape: tuple[int, ...], place: tuple[int, ...]) -> list[Part]:
    """The boxes at `place` as views of the local part there."""
    return [
        Part(box, local[tuple(slice(start, stop) for start, stop in where)])
        for box, where in local_boxes(layout, shape, place)
    ]


def local_part(tensor: "DTensor") -> torch.Tensor:
    """This rank's part as a plain tensor that shares its memory; `StructureError` where it is none.

    A tensor subclass that wraps one tensor of the same shape and type, and says so by `__tensor_flatten__`, is unwrapped.
    """
    with torch.no_grad():
        local = tensor.to_local()
    while type(local) not in PLAIN_TENSORS:
        flatten = getattr(local, "__tensor_flatten__", None)
        inner = [getattr(local, name) for name in flatten()[0]] if flatten else []
        if len(inner) != 1 or (inner[0].shape, inner[0].dtype) != (local.shape, local.dtype):
            raise StructureError(
                f"its local part is a {type(local).__name__}, whose elements do not lie in one plain tensor; return its parts "
                "as plain tensors or DTensors of their own"
            )
        [local] = inner
    return local.detach()


def empty(
    shape: tuple[int, ...], dtype: torch.dtype, mesh: "DeviceMesh", placements: Sequence["Placement"]
) -> "DTensor":
    """A DTensor of `shape` with uninitialised memory, made without communication. As with torch's own functions, a
    negative dimension in `placements` counts from the end."""
    from torch.distributed.tensor import DTensor

    layout, place = mesh_layout(mesh, tuple(placements)).layout.of_tensor(len(shape)), coordinate_of(mesh)
    size = (0,) if place is None else local_shape(layout, shape, place)
    device = torch.device(mesh.device_type)
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    local = torch.empty(size, dtype=dtype, device=device)
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride)
