"""Data loading that resumes at the exact sample: in constant time, shuffled, at any world size."""

from forgather_ckpt.data.dispatch import DispatchingLoader
from forgather_ckpt.data.loader import StatefulLoader, in_groups
from forgather_ckpt.data.position import GlobalPosition, merge_positions
from forgather_ckpt.data.sampler import ShardedBatches
from forgather_ckpt.data.seeding import SeededItems, item_generator

__all__ = [
    "DispatchingLoader",
    "GlobalPosition",
    "SeededItems",
    "ShardedBatches",
    "StatefulLoader",
    "in_groups",
    "item_generator",
    "merge_positions",
]
