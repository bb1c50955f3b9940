"""What stays the same over all saves and loads of a coordinator."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forgather_ckpt.bulk import Channels
from forgather_ckpt.comm import Comm
from forgather_ckpt.declarations import Source
from forgather_ckpt.topology import Topology


@dataclass(frozen=True)
class Job:
    """The ranks, who declares the components, and the run directory."""

    comm: Comm
    channels: Channels
    topology: Topology
    source: Source
    run: Path
    run_id: str
    """Of this start of the job; equal on all ranks."""
    on_mismatch: str
    training_args: Mapping[str, Any]
