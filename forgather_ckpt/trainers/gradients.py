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
from torch.distributed.tensor import DTensor, Partial, Replicate, distribute_tensor


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
    """The sum of the squares of all elements of these parameters' gradients; each element counts once, those on other
    ranks of a parameter's mesh too. Collective over these meshes.

    A float64, whatever the gradients are: ranks whose parameters have other dtypes can sum it up further.
    """
    total = torch.zeros((), device=device, dtype=torch.float64)
    sums: dict[Any, torch.Tensor] = defaultdict(lambda: torch.zeros_like(total))
    for parameter in parameters:
        gradient = local_gradient(parameter)
        if gradient is None:
            continue
        precision = torch.promote_types(gradient.dtype, torch.float32)
        square = torch.linalg.vector_norm(gradient, dtype=precision).double().square()
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
    """Give an optimizer those parameters that have taken the places of the ones it was made for, and what state it has of
    these, cut as they are.

    `ValueError` where its state is not of its parameter's shape, so that it cannot be known which part goes where.
    """
    for group in optimizer.param_groups:
        group["params"] = [places.get(parameter, parameter) for parameter in group["params"]]
    for old, new in places.items():
        if old is not new and (state := optimizer.state.pop(old, None)):
            optimizer.state[new] = {key: _cut_like(new, key, value) for key, value in state.items()}


def _cut_like(parameter: nn.Parameter, key: str, value: Any) -> Any:
    """An item of an optimizer's state of a parameter that was whole, and is a DTensor now. Steps stay as they are."""
    if not isinstance(value, torch.Tensor) or value.dim() == 0 or not isinstance(parameter, DTensor):
        return value
    if value.shape != parameter.shape:
        raise ValueError(
            f"the optimizer has state already, and {key!r} of a parameter of shape {list(parameter.shape)} is "
            f"{list(value.shape)}: it cannot be known how to cut it; give an optimizer that has no state yet, or make it in "
            "create_optimizer()"
        )
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
