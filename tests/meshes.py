"""A small model on meshes of every kind, for tests of sharded tensors."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

LAYOUTS = {"one": 1, "fsdp": 4, "tp": 2, "hsdp": 4, "fsdp over tp": 4}
"""By name, the number of ranks that a layout is tried on."""


def plain(seed: int = 0) -> nn.Sequential:
    """The model, whole; its shapes are cut unevenly."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 9), nn.Linear(9, 6), nn.BatchNorm1d(6))


def parallel(layout: str, world_size: int, *, seed: int = 0) -> nn.Sequential:
    """The model, laid out; equal on all ranks as a whole."""
    model = plain(seed)
    match layout:
        case "one":
            return model
        case "fsdp":
            mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("dp",))
        case "hsdp":
            mesh = init_device_mesh("cpu", (2, world_size // 2), mesh_dim_names=("rep", "dp"))
        case "tp":
            mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
        case "fsdp over tp":
            mesh = init_device_mesh("cpu", (world_size // 2, 2), mesh_dim_names=("dp", "tp"))
        case _:
            raise ValueError(layout)
    if "tp" in layout:
        cuts = {"0": ColwiseParallel(use_local_output=False), "1": RowwiseParallel()}
        parallelize_module(model, mesh["tp"] if mesh.ndim > 1 else mesh, cuts)
    if layout != "tp":
        over = mesh["dp"] if layout == "fsdp over tp" else mesh
        for layer in model[:2]:
            fully_shard(layer, mesh=over)
        fully_shard(model, mesh=over)
    return model


def stepped(model: nn.Module) -> torch.optim.AdamW:
    """An optimizer that has made one step, with the parameters themselves as gradients."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for parameter in model.parameters():
        parameter.grad = parameter.detach().clone()
    optimizer.step()
    return optimizer
