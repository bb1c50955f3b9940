"""GPUs for the ranks of a test, which share them where there are too few.

NCCL refuses two ranks of one machine on one GPU, and takes for a machine what has one NCCL_HOSTID. So the ranks are put on
simulated nodes with as many ranks as there are GPUs: those of other nodes are reached through sockets, as on other machines.
"""

from __future__ import annotations

import torch


def nodes_on_gpus(world_size: int) -> list[int]:
    """How many ranks each node has, so that each rank's local rank is a GPU's number."""
    per_node = max(1, torch.cuda.device_count())
    full, rest = divmod(world_size, per_node)
    return [per_node] * full + [rest] * (rest > 0)
