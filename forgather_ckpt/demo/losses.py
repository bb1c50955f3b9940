"""The loss of every step in full precision, in a file beside the checkpoints.

One line a step: its number, and the loss as `float.hex` writes it, so that equal lines mean equal bits.
"""

from pathlib import Path

NAME = "losses.txt"


def read(run: Path) -> list[tuple[int, float]]:
    """`(step, loss)` of every step, in the order in which they were written."""
    try:
        text = (run / NAME).read_text()
    except FileNotFoundError:
        return []
    whole_lines = text[: text.rfind("\n") + 1].splitlines()
    return [(int(step), float.fromhex(loss)) for step, loss in map(str.split, whole_lines)]


def append(run: Path, step: int, loss: float) -> None:
    with (run / NAME).open("a") as stream:
        stream.write(_line(step, loss))


def cut(run: Path, *, before: int) -> None:
    """Keep only the steps `before` this one: a run that resumed does its later steps again."""
    run.mkdir(parents=True, exist_ok=True)
    (run / NAME).write_text("".join(_line(step, loss) for step, loss in read(run) if step < before))


def _line(step: int, loss: float) -> str:
    return f"{step} {loss.hex()}\n"
