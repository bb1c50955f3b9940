"""Checkpoints made by hand, without a job: for what happens to whole directories."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from forgather_ckpt import commit, files, hashtree, writing
from forgather_ckpt.catalog import scan
from forgather_ckpt.commit import Draft
from forgather_ckpt.manifest import CheckpointManifest, FileRecord
from forgather_ckpt.structure import capture
from forgather_ckpt.topology import Topology
from forgather_ckpt.writing import Assignment, OwnedPiece, Written

DATA_FILE = "model.safetensors"


def fill(draft: Draft, content: bytes) -> CheckpointManifest:
    """Write a data file into the draft; the manifest that goes with it."""
    files.write_new(draft.directory / DATA_FILE, content)
    return CheckpointManifest(
        step=draft.step,
        sequence=draft.sequence,
        kind="periodic",
        created="2024-01-02T03:04:05+00:00",
        topology=Topology.single(),
        components={},
        files={DATA_FILE: FileRecord(len(content), hashtree.digest(content).hex(), 0)},
        indexes={},
    )


def commit_one(run: Path, step: int, content: bytes = b"content") -> Path:
    """A committed checkpoint."""
    draft = commit.begin(run, step)
    path, _ = commit.publish(draft, fill(draft, content))
    return path


def contents(run: Path) -> list[bytes]:
    """What the committed checkpoints of a run hold, newest first."""
    return [(checkpoint.path / DATA_FILE).read_bytes() for checkpoint in scan(run).checkpoints]


def tree(directory: Path) -> dict[str, bytes | None]:
    """Every path below a directory, with the content of files."""
    return {
        str(path.relative_to(directory)): path.read_bytes() if path.is_file() else None
        for path in sorted(directory.rglob("*"))
    }


def assign(
    component: str, state_dict: Any, *, num_writers: int = 1, parts: Mapping[str, tuple[int, int]] | None = None
) -> Assignment:
    """All of a state; of the tensors in `parts` only some bytes."""
    state = capture(state_dict)
    parts = parts or {}
    pieces = [OwnedPiece(item, *parts.get(name, (0, item.num_bytes))) for name, item in state.tensors.items()]
    return Assignment(
        component, "all", pieces, tuple(state.values.values()), tuple(state.aliases.values()), num_writers=num_writers
    )


def write(directory: Path, *assignments: Assignment, writer: int = 0) -> Written:
    """All files of one writer."""
    stems = {assignment.component: assignment.component for assignment in assignments}
    return writing.write(directory, assignments, writer=writer, stems=stems)
