"""Figures for people, in three digits or so."""

import math

_BYTE_UNITS = ("B", "kB", "MB", "GB", "TB")


def digits(value: float) -> str:
    """`0.47`, `12.3`, `345`."""
    size = abs(value)
    return f"{value:.{2 if size < 9.995 else 1 if size < 99.95 else 0}f}"


def loss(value: float) -> str:
    """`3.20`, `0.000123`, `nan`."""
    return f"{value:#.3g}" if math.isfinite(value) else f"{value:g}"


def byte_count(value: float, *, signed: bool = False) -> str:
    """`14.0 GB`; signed, `+245 MB`: decimal units."""
    for unit in _BYTE_UNITS:
        if abs(value) < 999.5 or unit == _BYTE_UNITS[-1]:
            break
        value /= 1000
    figure = f"{value:.0f}" if unit == "B" else digits(value)
    return f"{'+' if signed and value >= 0 else ''}{figure} {unit}"


def duration(seconds: float) -> str:
    """`45s`, `12m05s`, `6h30m`, `3d04h`: two units."""
    seconds = max(0, round(seconds))
    minutes, hours, days = seconds // 60, seconds // 3600, seconds // 86400
    if days:
        return f"{days}d{hours % 24:02}h"
    if hours:
        return f"{hours}h{minutes % 60:02}m"
    if minutes:
        return f"{minutes}m{seconds % 60:02}s"
    return f"{seconds}s"


def rate(per_second: float) -> str:
    """Steps a second, or seconds a step where they are slow."""
    return f"{digits(per_second)} it/s" if per_second >= 0.1 else f"{digits(1 / per_second)} s/it"
