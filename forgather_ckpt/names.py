"""Item names: the path to a leaf of a state dict as one string, and back.

The path's keys are joined by `/`. A str key stands for itself, with `~` written `~0` and `/` written `~1`;
an int key is `~i0`, a list index `~l0`, a tuple index `~t0`; any other key is `~k` and its typed JSON, escaped
in the same way. So a flat state dict keeps its own names, and different paths have different names.
Every name is valid Unicode: a str key that is not (lone surrogates) is written as `~k` too.
"""

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from forgather_ckpt import values
from forgather_ckpt.errors import FormatError


@dataclass(frozen=True)
class ListIndex:
    """A step into a list."""

    index: int


@dataclass(frozen=True)
class TupleIndex:
    """A step into a tuple."""

    index: int


PART_MARK = "~#"
"""Between an item's name and which part of it: no name holds it, since `~` is escaped."""

_SHOWN_BOX = re.compile(r"\[\d+:\d+(?:,\d+:\d+)*\]\Z", re.ASCII)

_INT_LIMIT = 10**4000
"""Python refuses to print integers of more than 4,300 digits."""

Path: TypeAlias = tuple[Any, ...]
"""Steps from the root of a state dict to a leaf: dict keys as they are, `ListIndex`, `TupleIndex`. Never empty."""


def part_key(name: str, box: Sequence[tuple[int, int]]) -> str:
    """A name for the part of an item that lies in `box`."""
    return f"{name}{PART_MARK}{box_text(box)}"


def item_name(key: str) -> str:
    """The name of the item that `key` is, or is a part of."""
    return key.partition(PART_MARK)[0]


def shown(name: str, box: Sequence[tuple[int, int]] | None) -> str:
    """What to call an item, or the part of it in `box`: `w[0:4,8:16]`."""
    return name if box is None else f"{name}[{box_text(box)}]"


def item_shown(text: str, num_dimensions: int) -> str:
    """The name of the item that `shown` calls `text`, where it has so many dimensions: `w` of `w[0:4,8:16]`."""
    match = _SHOWN_BOX.search(text)
    return text if match is None or match[0].count(":") != num_dimensions else text[: match.start()]


def box_text(box: Sequence[tuple[int, int]]) -> str:
    """A box as it is written in file keys and messages: `0:4,8:16`."""
    return ",".join(f"{start}:{stop}" for start, stop in box)


def encode_path(path: Path) -> str:
    """The name of the leaf at `path`; `values.NotPlain` where a key is not plain data."""
    return encode_step(path[0]) if len(path) == 1 else "/".join(map(encode_step, path))


def encode_step(step: Any) -> str:
    kind = type(step)
    if kind is str:
        return _encode_text(step)
    if kind is int:
        if abs(step) >= _INT_LIMIT:
            raise values.NotPlain("an int key has at most 4,000 digits")
        return f"~i{step}"
    if kind is ListIndex:
        return f"~l{step.index}"
    if kind is TupleIndex:
        return f"~t{step.index}"
    return "~k" + _escape(values.dumps(step).decode("ascii"))


@functools.lru_cache(1 << 17)  # every save asks for the same ones
def _encode_text(step: str) -> str:
    try:
        step.encode("utf-8")
        return _escape(step)
    except UnicodeEncodeError:
        return "~k" + _escape(values.dumps(step).decode("ascii"))


def decode_path(name: str) -> Path:
    """The path that `encode_path` named; `FormatError` where no path has this name."""
    path = tuple(_decode_step(segment) for segment in name.split("/"))
    if encode_path(path) != name:
        raise FormatError(f"item name {name!r} is not in canonical form")
    return path


def _decode_step(segment: str) -> Any:
    kind, rest = segment[:2], segment[2:]
    try:
        if kind == "~i":
            return int(rest)
        if kind == "~l":
            return ListIndex(int(rest))
        if kind == "~t":
            return TupleIndex(int(rest))
    except ValueError:
        raise FormatError(f"item name segment {segment!r} has no number after {kind!r}") from None
    if kind == "~k":
        key = values.loads(_unescape(rest).encode("utf-8"))
        try:
            hash(key)
        except TypeError:
            raise FormatError(f"item name segment {segment!r} is not a dict key") from None
        return key
    return _unescape(segment)


def printable(text: str) -> str:
    """A name, or other text from a checkpoint, with what could move the cursor, or cannot be encoded, as escapes."""
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape", "surrogatepass").decode() for letter in text
    )


def _escape(text: str) -> str:
    return text.replace("~", "~0").replace("/", "~1")


def _unescape(text: str) -> str:
    return text.replace("~1", "/").replace("~0", "~")
