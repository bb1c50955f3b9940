"""Callbacks that watch a metric, through a checkpoint and back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from forgather_ckpt.callbacks import Decision
from forgather_ckpt.values import dumps, loads


def first_end(watcher: Any, values: Sequence[Any]) -> int | None:
    """After how many of the values the training is to end; None if it goes on."""
    return next((n for n, value in enumerate(values, 1) if watcher.update(value).ends_training), None)


def decisions(watcher: Any, values: Sequence[Any]) -> list[Decision]:
    return [watcher.update(value) for value in values]


def stored(watcher: Any) -> bytes:
    """The state as a checkpoint holds it: equal bytes are equal bits."""
    return dumps(watcher.state_dict())


def resumed(make: Callable[[], Any], watcher: Any) -> Any:
    """A new watcher with the state of this one."""
    other = make()
    other.load_state_dict(loads(stored(watcher)))
    return other
