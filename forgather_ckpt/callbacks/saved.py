"""Reading saved states: what is missing or cannot be is an error, not a watcher that never answers again."""

import logging
from collections.abc import Mapping
from typing import Any

from forgather_ckpt.callbacks.watched import WatchedMetric, is_sound
from forgather_ckpt.errors import LoadMismatch

logger = logging.getLogger(__name__)


def is_of_metric(state: Mapping[str, Any], metric: WatchedMetric, name: str) -> bool:
    """Whether a state is of this metric; a warning if not: it means nothing for another one, nor the other way up."""
    key, mode = saved_item(state, "metric"), saved_item(state, "mode")
    is_same = (key, mode) == (metric.key, metric.mode)
    if not is_same:
        watched, saved = f"{metric.key} ({metric.mode})", f"{key} ({mode})"
        logger.warning("%s watches %s, its saved state is of %s: it starts fresh", name, watched, saved)
    return is_same


def saved_item(state: Mapping[str, Any], key: str) -> Any:
    if key not in state:
        raise LoadMismatch(f"this is no saved state of this callback: {key!r} is missing; it has {sorted(state)}")
    return state[key]


def saved_number(state: Mapping[str, Any], key: str) -> float | None:
    """A number that averages may go on from, or None where there was none yet."""
    value = saved_item(state, key)
    return None if value is None else sound_number(key, value)


def saved_count(state: Mapping[str, Any], key: str) -> int:
    value = saved_item(state, key)
    if type(value) is not int or value < 0:
        raise LoadMismatch(f"the saved state of this callback has {key}={value!r}, which is no count")
    return value


def saved_step(state: Mapping[str, Any], key: str) -> int | None:
    return None if saved_item(state, key) is None else saved_count(state, key)


def sound_number(key: str, value: Any) -> float:
    if type(value) not in (int, float) or not is_sound(value):
        raise LoadMismatch(f"the saved state of this callback has {key}={value!r}, which is no finite number")
    return float(value)
