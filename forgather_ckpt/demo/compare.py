"""Whether two runs came to the same, to the last bit: their newest checkpoints, and the loss of every step.

    python -m forgather_ckpt.demo.compare runs/demo runs/undisturbed

Checkpoints are compared by the digests in their indexes; that the bytes are those is for `fgckpt verify` to say.
"""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from forgather_ckpt import catalog
from forgather_ckpt.demo import losses
from forgather_ckpt.demo.contents import contents
from forgather_ckpt.errors import CheckpointError, CheckpointNotFound


def differences(one: Path, other: Path) -> tuple[list[str], str]:
    """What differs between two runs (nothing, if they are alike), and what was compared."""
    first, second = contents(_newest(one)), contents(_newest(other))
    found = []
    if first.step != second.step:
        found.append(f"the newest checkpoints are of steps {first.step} and {second.step}")
    for what, mine, its in (("tensors", first.tensors, second.tensors), ("values", first.values, second.values)):
        if keys := _differing(mine, its):
            component, _, name = keys[0]
            found.append(f"{len(keys)} of {len(mine | its)} {what}, the first is {component} {name!r}")
    my_losses, its_losses = dict(losses.read(one)), dict(losses.read(other))
    if not my_losses or not its_losses:
        found.append(f"there is no {losses.NAME} in {other if my_losses else one}")
    elif steps := _differing(my_losses, its_losses):
        found.append(f"{len(steps)} of {len(my_losses | its_losses)} losses, the first at step {steps[0]}")
    compared = (
        f"{len(first.tensors)} tensors and {len(first.values)} values of {len(first.components)} components "
        f"at step {first.step}, {len(my_losses)} losses"
    )
    return found, compared


def _newest(run: Path) -> Path:
    found = catalog.scan(run).checkpoints
    if not found:
        raise CheckpointNotFound(f"{run} has no checkpoint", path=str(run))
    return found[0].path


def _differing(one: Mapping[Any, Any], other: Mapping[Any, Any]) -> list[Any]:
    return [key for key in sorted({**one, **other}) if one.get(key) != other.get(key)]


def main() -> int | str:
    parser = argparse.ArgumentParser(
        prog="python -m forgather_ckpt.demo.compare",
        description="Compare two runs bit for bit: the newest checkpoints, and the loss of every step. "
        "One line says what came out; the exit code is 0 if they are identical, 1 if not.",
    )
    parser.add_argument("runs", type=Path, nargs=2, metavar="RUN", help="a run directory of the demo")
    options = parser.parse_args()
    try:
        found, compared = differences(*options.runs)
    except CheckpointError as err:
        return f"error: {err}"
    print(f"different: {'; '.join(found)}" if found else f"identical, bit for bit: {compared}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
