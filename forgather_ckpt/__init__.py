"""Checkpoints for distributed training: declare how state is shared, and the rest is done.

Names are imported when they are first used, so that `fgckpt ls` on a login node does not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from forgather_ckpt.component import StateComponent, Target
    from forgather_ckpt.coordinator import CheckpointCoordinator
    from forgather_ckpt.differences import ReplicationReport
    from forgather_ckpt.errors import CheckpointError, CheckpointNotFound, ReplicaMismatch
    from forgather_ckpt.load import LoadReport
    from forgather_ckpt.manager import CheckpointManager
    from forgather_ckpt.manifest import CheckpointManifest
    from forgather_ckpt.opened import OpenCheckpoint, load_component, open_checkpoint
    from forgather_ckpt.optimizer import NamedOptimizer
    from forgather_ckpt.patterns import SharingPattern, ValidationLevel
    from forgather_ckpt.recorder import DigestRecorder
    from forgather_ckpt.rng import RNGState
    from forgather_ckpt.topology import Topology
    from forgather_ckpt.warm_start import WarmStartReport

_MODULES = {
    "CheckpointCoordinator": "coordinator",
    "CheckpointError": "errors",
    "CheckpointManager": "manager",
    "CheckpointManifest": "manifest",
    "CheckpointNotFound": "errors",
    "DigestRecorder": "recorder",
    "LoadReport": "load",
    "NamedOptimizer": "optimizer",
    "OpenCheckpoint": "opened",
    "RNGState": "rng",
    "ReplicaMismatch": "errors",
    "ReplicationReport": "differences",
    "SharingPattern": "patterns",
    "StateComponent": "component",
    "Target": "component",
    "Topology": "topology",
    "ValidationLevel": "patterns",
    "WarmStartReport": "warm_start",
    "load_component": "opened",
    "open_checkpoint": "opened",
}

__all__ = [
    "CheckpointCoordinator",
    "CheckpointError",
    "CheckpointManager",
    "CheckpointManifest",
    "CheckpointNotFound",
    "DigestRecorder",
    "LoadReport",
    "NamedOptimizer",
    "OpenCheckpoint",
    "RNGState",
    "ReplicaMismatch",
    "ReplicationReport",
    "SharingPattern",
    "StateComponent",
    "Target",
    "Topology",
    "ValidationLevel",
    "WarmStartReport",
    "load_component",
    "open_checkpoint",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'forgather_ckpt' has no attribute {name!r}")
    return getattr(import_module(f"forgather_ckpt.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
