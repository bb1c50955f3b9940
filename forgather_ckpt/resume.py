"""Which checkpoint to load: pure, over what the catalog found."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from forgather_ckpt.errors import CheckpointNotFound


@dataclass(frozen=True)
class Candidate:
    """A committed checkpoint: where it is and how it is ordered. "Newest" is the highest sequence, everywhere."""

    path: Path
    step: int
    sequence: int
    kind: str = "periodic"
    epoch: float | None = None
    """Epochs done when it was saved; None where the trainer did not say."""


def newest_first(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Newest first; of two copies of one checkpoint the one whose directory has the plain name."""
    return sorted(
        candidates,
        key=lambda found: (-found.sequence, found.path.name != f"checkpoint-{found.step}", found.path, found.step),
    )


SELECTORS = "'latest', 'latest~1', 'best', 'best~1', 'emergency', 'epoch:3', a step"
"""What may be said in place of a path."""

_MAX_DIGITS = 18
_NUMBER = rf"\d{{1,{_MAX_DIGITS}}}"
_PLACE = re.compile(rf"(?P<order>latest|best|emergency)(?:~(?P<back>{_NUMBER}))?", re.ASCII)
_EPOCH = re.compile(rf"epoch:(?P<epoch>{_NUMBER})", re.ASCII)
_STEP = re.compile(rf"(?:step:)?(?P<step>{_NUMBER})", re.ASCII)

_EPOCH_TOLERANCE = 1e-6
"""How far the end of an epoch may be from a whole number: it is a sum of fractions."""

_NUM_NAMED = 8


def is_selector(which: str) -> bool:
    """Whether `which` names a checkpoint by its place, epoch or step; otherwise it is a path."""
    return any(pattern.fullmatch(which) for pattern in (_PLACE, _EPOCH, _STEP))


def is_by_rank(which: str | int | Path | None) -> bool:
    """Whether it takes a ranking by a metric to find what `which` selects: "best", "best~1"."""
    match = _PLACE.fullmatch(which) if isinstance(which, str) else None
    return match is not None and match["order"] == "best"


def step_of(which: str | int | Path | None) -> int | None:
    """The step that `which` asks for; None where it asks for something else."""
    match = _STEP.fullmatch(str(which))
    return None if match is None else int(match["step"])


def choose(
    candidates: Sequence[Candidate], which: str | int | None, *, ranked: Sequence[Candidate] = ()
) -> list[Candidate]:
    """The checkpoints to try, in order; more than one only where the caller left the choice to us.

    `which`: None or "latest" (the newest, then the ones before it); a step, as int or `"step:15000"`; "latest~1"
    (exactly the one before the newest); "best", "best~1" (exactly the first and the second of `ranked`); "emergency",
    "emergency~1" (the newest that a signal caused); "epoch:3" (the newest that was saved when exactly
    three epochs were done, before others one that was saved because of it).
    """
    found = newest_first(candidates)
    if which is None or which == "latest":
        chosen, others = found, _steps(found)
    elif place := _PLACE.fullmatch(str(which)):
        emergencies = [one for one in found if one.kind == "emergency"]
        in_order, others = {
            "latest": (found, _steps(found)),
            "best": (ranked, f"ranked, the best first: {_listed([one.step for one in ranked])}"),
            "emergency": (emergencies, f"emergency checkpoints: {_listed([one.step for one in emergencies])}"),
        }[place["order"]]
        chosen = list(in_order[int(place["back"] or 0) :][:1])
    elif epoch := _EPOCH.fullmatch(str(which)):
        ended = {one: _epoch_that_ended(one) for one in found}
        chosen = [one for one in found if ended[one] == int(epoch["epoch"])]
        chosen = sorted(chosen, key=lambda one: one.kind != "epoch")[:1]
        known = dict.fromkeys(number for number in ended.values() if number is not None)
        others = f"epochs at whose end one was saved: {_listed(list(known))}"
    elif (step := step_of(which)) is not None:
        chosen, others = [one for one in found if one.step == step][:1], _steps(found)
    else:
        raise CheckpointNotFound(f"{which!r} selects no checkpoint; use {SELECTORS}, or a path")
    if not chosen:
        raise CheckpointNotFound(f"there is no committed checkpoint {which or 'latest'!r}; {others}")
    return chosen


def _epoch_that_ended(one: Candidate) -> int | None:
    """How many epochs were done, where none had begun that was not done."""
    if one.epoch is None or not 0.5 < one.epoch < 10**_MAX_DIGITS:
        return None
    number = round(one.epoch)
    return number if abs(one.epoch - number) <= _EPOCH_TOLERANCE else None


def _steps(found: Sequence[Candidate]) -> str:
    return f"committed steps: {_listed([one.step for one in found])}"


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers[:_NUM_NAMED])) or "none"
