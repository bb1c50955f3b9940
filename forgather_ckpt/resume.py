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


def newest_first(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Newest first; of two copies of one checkpoint the one whose directory has the plain name."""
    return sorted(
        candidates,
        key=lambda found: (-found.sequence, found.path.name != f"checkpoint-{found.step}", found.path, found.step),
    )


_SELECTOR = re.compile(r"latest|latest~(?P<back>\d+)|(?:step:)?(?P<step>\d+)")


def is_selector(which: str) -> bool:
    """Whether `which` names a checkpoint by its place or step; otherwise it is a path."""
    return _SELECTOR.fullmatch(which) is not None


def choose(candidates: Sequence[Candidate], which: str | int | None) -> list[Candidate]:
    """The checkpoints to try, in order; more than one only where the caller left the choice to us.

    `which`: None or "latest" (the newest, then the ones before it); a step, as int or `"step:15000"`; "latest~1"
    (exactly the one before the newest).
    """
    found = newest_first(candidates)
    if which is None or which == "latest":
        chosen = found
    elif match := re.fullmatch(r"latest~(\d+)", str(which)):
        chosen = found[int(match[1]) :][:1]
    elif match := re.fullmatch(r"(?:step:)?(\d+)", str(which)):
        chosen = [candidate for candidate in found if candidate.step == int(match[1])][:1]
    else:
        raise CheckpointNotFound(f"{which!r} selects no checkpoint; use 'latest', 'latest~1', a step, or a path")
    if not chosen:
        steps = ", ".join(str(candidate.step) for candidate in found[:8]) or "none"
        raise CheckpointNotFound(f"there is no committed checkpoint {which or 'latest'!r}; committed steps: {steps}")
    return chosen
