"""Real text that every machine with Python has: the sources of its standard library."""

import sysconfig
from pathlib import Path

import torch

_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__"}


class StandardLibrary:
    """Windows of `context + 1` bytes, one every `context` bytes, over all `.py` files in the order of their names.

    The same on every rank and at every start, as long as Python is not updated in between.
    """

    def __init__(self, context: int, root: str | Path | None = None) -> None:
        self.context = context
        root = Path(root or sysconfig.get_path("stdlib"))
        text = bytearray(b"\n".join(path.read_bytes() for path in source_files(root)))
        if len(text) <= context:
            raise ValueError(f"{root} holds {len(text)} bytes of Python sources; a window takes {context + 1}")
        self.text = torch.frombuffer(text, dtype=torch.uint8)

    def __len__(self) -> int:
        return (len(self.text) - 1) // self.context

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"there are {len(self)} windows; {index} is none of them")
        start = index * self.context
        return {"window": self.text[start : start + self.context + 1]}


def source_files(root: Path) -> list[Path]:
    """The library's own modules below `root`, without its tests and without installed packages."""
    found = [path for path in root.rglob("*.py") if _LEFT_OUT.isdisjoint(path.relative_to(root).parts)]
    return sorted((path for path in found if path.is_file()), key=lambda path: path.relative_to(root).as_posix())
