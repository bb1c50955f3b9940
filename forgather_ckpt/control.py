"""What ranks wish for at a step, and what all of them do: pure.

A wish of one rank, of a callback or a signal, is everybody's. So the ranks exchange their wishes and act on the union, at
one step and alike, or a rank that stops by itself leaves the others waiting for its gradients.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self

from forgather_ckpt.errors import DeclarationError
from forgather_ckpt.replication import describe


@dataclass(frozen=True)
class Wishes:
    """What is wanted at a step: by one rank, or, merged, by the job."""

    save: bool = False
    evaluate: bool = False
    log: bool = False
    end_epoch: bool = False
    stop: bool = False
    """End the training with a checkpoint."""
    abort: bool = False
    """End it without one."""
    signal: int | None = None
    """The number of the signal that ends the training, with an emergency checkpoint."""
    reasons: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Flags may come as tensors or numpy scalars, as comparisons of a loss give them, and a reason by itself."""
        for name in ("save", "evaluate", "log", "end_epoch", "stop", "abort"):
            object.__setattr__(self, name, bool(getattr(self, name)))
        if isinstance(self.reasons, str):
            object.__setattr__(self, "reasons", (self.reasons,))

    @property
    def ends_training(self) -> bool:
        return self.stop or self.abort or self.signal is not None

    def __or__(self, other: "Wishes") -> "Wishes":
        """What either wants."""
        return Wishes(
            save=self.save or other.save,
            evaluate=self.evaluate or other.evaluate,
            log=self.log or other.log,
            end_epoch=self.end_epoch or other.end_epoch,
            stop=self.stop or other.stop,
            abort=self.abort or other.abort,
            signal=other.signal if self.signal is None else self.signal,
            reasons=tuple(dict.fromkeys((*self.reasons, *other.reasons))),
        )

    def __bool__(self) -> bool:
        return any(getattr(self, one.name) not in (False, None, ()) for one in fields(self))

    def to_json(self) -> dict[str, Any]:
        """Only what is wanted: mostly nothing."""
        return {
            one.name: list(value) if isinstance(value, tuple) else value
            for one in fields(self)
            if (value := getattr(self, one.name)) not in (False, None, ())
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        return cls(**{**data, "reasons": tuple(data.get("reasons", ()))})


NOTHING = Wishes()


def merged(wishes: Sequence[Wishes]) -> Wishes:
    """What the job does, of what each rank wishes, in rank order. Reasons say on which ranks, where not on all."""
    ranks_of: dict[str, list[int]] = {}
    for rank, one in enumerate(wishes):
        for reason in dict.fromkeys(one.reasons):
            ranks_of.setdefault(reason, []).append(rank)
    union = functools.reduce(Wishes.__or__, wishes, Wishes())
    told = tuple(
        reason if len(ranks) == len(wishes) else f"{reason} (rank {describe(tuple(ranks))})"
        for reason, ranks in ranks_of.items()
    )
    return replace(union, reasons=told)


def refuse_unlike(facts: Sequence[Mapping[str, Any]]) -> None:
    """`DeclarationError` where ranks, in their order, were told different things: they would come to a log, a save or the
    end at different steps, and wait for each other."""
    for name, expected in facts[0].items():
        unlike = tuple(rank for rank, own in enumerate(facts) if own.get(name) != expected)
        if unlike:
            raise DeclarationError(
                f"{name} is {expected!r} on rank 0 and {facts[unlike[0]].get(name)!r} on rank {describe(unlike)}; it must be "
                "the same on all ranks",
                rank=unlike[0],
            )


@dataclass
class Pace:
    """At which steps the ranks look at each other's wishes, where nothing else brings them together.

    Every `every_steps` steps, or with None about every `SECONDS`: the first rank measures how long steps take, and says
    at each look when the next one is.
    """

    every_steps: int | None = None
    next_step: int = 0

    SECONDS = 1.0
    MAX_STEPS = 50
    """However fast steps are: they may become slow at any moment. A look costs about a millisecond."""

    def is_due(self, step: int) -> bool:
        return step >= self.next_step

    def after(self, step: int, seconds_per_step: float | None) -> int:
        """The step of the look after the one at `step`."""
        if self.every_steps is not None:
            return (step // self.every_steps + 1) * self.every_steps
        if seconds_per_step is None:
            return step + 1
        return step + max(1, min(self.MAX_STEPS, int(self.SECONDS / max(seconds_per_step, 1e-6))))
