"""Gradients of which a rank may have a part only: their mean over copies, their norm, and clipping by it.

Parameters may be plain tensors and DTensors on several meshes, side by side, as tensor parallelism leaves them; torch's
own clipping refuses such a mixture.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Partial, Replicate


def local_gradient(parameter: nn.Parameter) -> torch.Tensor | None:
    """The part of a parameter's gradient that is this rank's; what is written to it is the gradient's.

    Collective over the parameter's mesh where its gradient is laid out in another way than it, as a sum that is not yet
    taken: it is then given the parameter's layout.
    """
    if isinstance(parameter.grad, DTensor) and isinstance(parameter, DTensor):
        if parameter.grad.placements != parameter.placements:
            parameter.grad = parameter.grad.redistribute(placements=parameter.placements)
        return parameter.grad.to_local()
    return parameter.grad


def own_gradient(parameter: nn.Parameter) -> torch.Tensor:
    """As `local_gradient`; zeros, which are the gradient from then on, where the rank did not use the parameter."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    gradient = local_gradient(parameter)
    assert gradient is not None
    return gradient


def average_gradients(parameters: Iterable[nn.Parameter], group: dist.ProcessGroup) -> None:
    """Give all members of the group, of which there may be one, the mean of their gradients, the same bits. A parameter
    that one of them did not use has a gradient of zeros there."""
    exchanges = []
    for gradient in [own_gradient(parameter) for parameter in parameters if parameter.requires_grad]:
        # One by one: in a common buffer a gradient's place would decide in which order its copies are added up.
        exchanges.append((gradient, dist.all_reduce(gradient, group=group, async_op=True)))
    for gradient, work in exchanges:
        if work is not None:
            work.wait()
        gradient.div_(group.size())


def squared_norm(parameters: Iterable[nn.Parameter], device: torch.device) -> torch.Tensor:
    """The sum of the squares of all elements of these parameters' gradients, in float32; each element counts once, those
    on other ranks of a parameter's mesh too. Collective over these meshes."""
    total = torch.zeros((), device=device)
    sums: dict[Any, torch.Tensor] = defaultdict(lambda: torch.zeros((), device=device))
    for parameter in parameters:
        gradient = local_gradient(parameter)
        if gradient is None:
            continue
        square = torch.linalg.vector_norm(gradient, dtype=torch.float32).square()
        if isinstance(parameter, DTensor):
            sums[parameter.device_mesh, parameter.placements] += square
        else:
            total += square
    for (mesh, placements), partial in sums.items():  # the same order on all ranks: that of the parameters
        layout = [one if isinstance(one, Replicate) else Partial() for one in placements]
        total += DTensor.from_local(partial, mesh, layout, run_check=False).full_tensor()
    return total


def scale_gradients(parameters: Iterable[nn.Parameter], norm: torch.Tensor, max_norm: float) -> None:
    """Scale all gradients so that their norm, which is now `norm`, is at most `max_norm`."""
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for parameter in parameters:
        gradient = local_gradient(parameter)
        if gradient is not None:
            gradient.mul_(factor)


def broadcast_from_first(
    tensors: Iterable[torch.Tensor], device: torch.device, group: dist.ProcessGroup | None = None
) -> None:
    """Give all members of the group (None: all ranks) the first one's values, one tensor after the other on `device`."""
    for tensor in tensors:
        live = tensor.detach()
        if isinstance(live, DTensor):
            live = live.to_local()
        sent = live.to(device)
        dist.broadcast(sent, group=group, group_src=0)
        if sent is not live:
            live.copy_(sent)


def renew(optimizer: torch.optim.Optimizer, places: Mapping[nn.Parameter, nn.Parameter]) -> None:
    """Give an optimizer those parameters that have taken the places of the ones it was made for."""
    for group in optimizer.param_groups:
        group["params"] = [places.get(parameter, parameter) for parameter in group["params"]]
