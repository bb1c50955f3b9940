"""How facts look on a terminal: sizes, ages, values, and text that came from a checkpoint."""

import json
import math
from typing import Any

from forgather_ckpt.names import printable as printable

_UNITS = ("kB", "MB", "GB", "TB", "PB")
_AGES = ((60, "s", 1), (60 * 60, "m", 60), (48 * 3600, "h", 3600), (math.inf, "d", 86400))


def size(num_bytes: int) -> str:
    """`456.7 MB`: decimal units, as disks are sold."""
    if num_bytes < 1000:
        return f"{num_bytes} B"
    value = float(num_bytes)
    for unit in _UNITS[:-1]:
        value /= 1000
        if round(value, 1) < 1000:
            return f"{value:.1f} {unit}"
    return f"{value / 1000:.1f} {_UNITS[-1]}"


def age(seconds: float) -> str:
    """`4m`, `3h`, `12d`; what lies in the future, by another machine's clock, is `0s` old."""
    seconds = max(0.0, seconds)
    for limit, unit, length in _AGES:
        if seconds < limit:
            return f"{int(seconds // length)}{unit}"
    return "?"


def plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def value(data: Any) -> str:
    """A JSON value in a line: numbers short, strings as they are."""
    if isinstance(data, str):
        return printable(data)
    if isinstance(data, float):
        return f"{data:.6g}"
    return printable(json.dumps(data))


def epoch(data: Any) -> str:
    """An epoch with 4 significant digits (all those before the point), or what the manifest has in its place."""
    if not isinstance(data, float):
        return value(data)
    return f"{data:.4g}" if abs(data) < 1000 else f"{data:.0f}"


def shortened(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[: limit - 1]}…"
