"""Flip one bit in the middle of a checkpoint's largest tensor, as a failing disk would.

    python -m forgather_ckpt.demo.damage runs/demo/checkpoint-60

Nothing else about the file changes: not its size, and not what any header says.
"""

import argparse
import sys
from pathlib import Path

from forgather_ckpt.demo.contents import read_indexes
from forgather_ckpt.errors import CheckpointError


def damage(checkpoint: Path, component: str) -> str:
    """Flip the lowest bit of one byte; returns what was done, as a sentence."""
    rows = [
        row
        for index in read_indexes(checkpoint)
        for entry in index.entries
        if entry.component == component
        for row in entry.tensors
    ]
    if not rows:
        raise ValueError(f"{checkpoint} has no tensors in a component {component!r}")
    row = max(rows, key=lambda row: row.num_bytes)
    at = row.offset + row.num_bytes // 2
    with (checkpoint / row.file).open("r+b") as stream:
        stream.seek(at)
        byte = stream.read(1)[0]
        stream.seek(at)
        stream.write(bytes([byte ^ 1]))
    return (
        f"byte {at} of {checkpoint.name}/{row.file} is now {byte ^ 1}, not {byte}: "
        f"in the middle of the tensor {row.name!r} of component {component!r}"
    )


def main() -> int | str:
    parser = argparse.ArgumentParser(
        prog="python -m forgather_ckpt.demo.damage",
        description="Flip one bit in the middle of a checkpoint's largest tensor, as a failing disk would.",
    )
    parser.add_argument("checkpoint", type=Path, help="its directory, such as runs/demo/checkpoint-60")
    parser.add_argument("--component", default="model", help="whose tensor (%(default)s)")
    options = parser.parse_args()
    try:
        print(damage(options.checkpoint, options.component))
    except (CheckpointError, ValueError) as err:
        return f"error: {err}"
    return 0


if __name__ == "__main__":
    sys.exit(main())
