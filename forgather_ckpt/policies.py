"""What wants a checkpoint kept: policies, each by itself, and their union. Pure.

    Latest(3) | Best(2, "eval_loss") | Epochs() | Emergency(10) | Every(steps=10_000)

A policy sees what `retention.decide` counts, newest first, and says of each what it thinks and why. "Newest" is the
highest sequence.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from forgather_ckpt.errors import DeclarationError
from forgather_ckpt.metrics import Mode, mode_of, rankable


@dataclass(frozen=True)
class Stored:
    """A committed checkpoint, as far as retention is concerned with it."""

    path: Path
    step: int
    sequence: int
    digest: str
    """Its manifest's own digest: what it is, wherever it lies and however its path is written."""
    kind: str = "periodic"
    saved_at_seconds: float | None = None
    """Since 1970, by the clock of the machine that saved it; None where that is not known."""
    metrics: Mapping[str, Any] = field(default_factory=dict)
    is_pinned: bool = False
    is_quarantined: bool = False
    hold: str | None = None
    """Why it is not ours to remove; None for one that is."""


@dataclass(frozen=True)
class Opinion:
    """What one policy has to say of one checkpoint."""

    checkpoint: Stored
    keep: bool
    reason: str


class Policy(ABC):
    """Something that wants some checkpoints kept. `a | b` keeps what either of them keeps."""

    @abstractmethod
    def judge(self, found: Sequence[Stored]) -> Iterator[Opinion]:
        """Opinions on some or all of `found`: distinct checkpoints, newest first, quarantined ones left out."""

    def __or__(self, other: "Policy") -> "Policy":
        if not isinstance(other, Policy):
            return NotImplemented
        return AnyOf((*parts(self), *parts(other)))


@dataclass(frozen=True)
class AnyOf(Policy):
    """The union of several policies; `AnyOf(())` keeps nothing by itself."""

    policies: tuple[Policy, ...]

    def judge(self, found: Sequence[Stored]) -> Iterator[Opinion]:
        for policy in self.policies:
            yield from policy.judge(found)


@dataclass(frozen=True)
class Latest(Policy):
    """The newest `n`, or all with None. Emergencies do not count: ten interruptions push no regular one out."""

    n: int | None

    def __post_init__(self) -> None:
        _check_count("Latest", self.n, "Latest(None) for all of them")

    def judge(self, found: Sequence[Stored]) -> Iterator[Opinion]:
        return _newest(self.n, [one for one in found if one.kind != "emergency"], "latest")


@dataclass(frozen=True)
class Epochs(Policy):
    """Those that were saved as the end of an epoch: the newest `n`, or all."""

    n: int | None = None

    def __post_init__(self) -> None:
        _check_count("Epochs", self.n, "Epochs() for all of them")

    def judge(self, found: Sequence[Stored]) -> Iterator[Opinion]:
        return _newest(self.n, [one for one in found if one.kind == "epoch"], "epoch")


@dataclass(frozen=True)
class Emergency(Policy):
    """Those that were saved because of a signal: the newest `n`."""

    n: int | None = 10

    def __post_init__(self) -> None:
        _check_count("Emergency", self.n, "Emergency(None) for all of them")

    def judge(self, found: Sequence[Stored]) -> Iterator[Opinion]:
        return _newest(self.n, [one for one in found if one.kind == "emergency"], "emergency")


@dataclass(frozen=True)
class Best(Policy):
    """The `n` best by a metric, which is looked up under exactly this name.

    `mode`: "min" or "max"; None asks the name, and a name that does not tell is refused.
    """

    n: int
    metric: str
    mode: Mode | None = None

    def __post_init__(self) -> None:
        _check_count("Best", self.n, None)
        if not isinstance(self.metric, str) or not self.metric:
            raise DeclarationError(f"Best: metric is {self.metric!r}; use the name of a metric, such as 'eval_loss'")
        if self.mode not in ("min", "max", None):
            raise DeclarationError(f"Best: mode is {self.mode!r}; use 'min' or 'max'")
        if self.mode is None and mode_of(self.metric) is None:
            raise DeclarationError(
                f"the name {self.metric!r} does not tell which way is better; say Best({self.n}, {self.metric!r}, mode='min') "
                "or mode='max'"
            )

    @property
    def is_higher_better(self) -> bool:
        return (self.mode or mode_of(self.metric)) == "max"

    def ranked(self, found: Sequence[Stored]) -> list[tuple[Stored, float]]:
        """Those that can be ranked, with their values, the best first."""
        values = [(one, value) for one in found if (value := rankable(one.metrics.get(self.metric))) is not None]
        sign = -1.0 if self.is_higher_better else 1.0
        return sorted(values, key=lambda pair: (sign * pair[1], pair[0].sequence, pair[0].path))

    def judge(self, found: Sequence[Stored]) -> Iterator[Opinion]:
        ranked = self.ranked(found)
        for rank, (one, value) in enumerate(ranked, start=1):
            told = f"{self.metric} {value:.6g}, {'highest' if self.is_higher_better else 'lowest'} is best"
            if rank <= self.n:
                yield Opinion(one, True, f"best {rank} of {self.n} ({told})")
            else:
                yield Opinion(one, False, f"best {rank}, {self.n} kept ({told})")
        paths = {one.path for one, _ in ranked}
        for one in found:
            if one.path not in paths:
                yield Opinion(one, False, self.why_unranked(one))

    def why_unranked(self, one: Stored) -> str:
        """What keeps a checkpoint without a usable value from being among the best."""
        if self.metric in one.metrics:
            return f"its {self.metric!r} is no finite number"
        return f"it has no metric {self.metric!r}"


@dataclass(frozen=True)
class Every(Policy):
    """One at regular distances, for good: of a long run, something is left from all of it.

    `steps`: the first at or after each multiple of so many steps (but not of 0). `seconds`: the first that was saved in
    each interval of so many seconds since 1970, so `seconds=86400` keeps one a day. What has no time is kept.
    """

    steps: int | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.seconds is None):
            raise DeclarationError("Every: use either Every(steps=10_000) or Every(seconds=86_400)")
        if self.steps is not None and not (is_count(self.steps) and self.steps > 0):
            raise DeclarationError(f"Every: steps is {self.steps!r}; use a number of steps, from 1")
        if self.seconds is not None and (rankable(self.seconds) is None or not self.seconds > 0):
            raise DeclarationError(f"Every: seconds is {self.seconds!r}; use a number of seconds, above 0")

    def judge(self, found: Sequence[Stored]) -> Iterator[Opinion]:
        if self.steps is not None:
            yield from self._by_steps(self.steps, found)
        if self.seconds is not None:
            yield from self._by_seconds(self.seconds, found)

    def _by_steps(self, steps: int, found: Sequence[Stored]) -> Iterator[Opinion]:
        taken = {0}
        for one in sorted(found, key=lambda one: (one.step, -one.sequence)):
            interval = one.step // steps
            if interval not in taken:
                taken.add(interval)
                yield Opinion(one, True, f"every {steps} steps")

    def _by_seconds(self, seconds: float, found: Sequence[Stored]) -> Iterator[Opinion]:
        taken: set[float] = set()
        for one in reversed(found):
            if one.saved_at_seconds is None:
                yield Opinion(one, True, "when it was saved is not known")
                continue
            interval = one.saved_at_seconds // seconds
            if interval not in taken:
                taken.add(interval)
                yield Opinion(one, True, f"every {seconds:g} seconds")


@dataclass(frozen=True)
class Pinned(Policy):
    """Those that a person has pinned. `decide` keeps them whatever the policies are; this one alone keeps nothing else."""

    def judge(self, found: Sequence[Stored]) -> Iterator[Opinion]:
        return (Opinion(one, True, "pinned") for one in found if one.is_pinned)


def parts(policy: Policy) -> tuple[Policy, ...]:
    """The policies that a union consists of; of any other policy, itself."""
    return policy.policies if isinstance(policy, AnyOf) else (policy,)


def bests(policy: Policy) -> list[Best]:
    """The policies in it that rank checkpoints by a metric."""
    return [one for one in parts(policy) if isinstance(one, Best)]


def _newest(n: int | None, found: Sequence[Stored], word: str) -> Iterator[Opinion]:
    for rank, one in enumerate(found, start=1):
        if n is None:
            yield Opinion(one, True, f"{word} {rank}, all kept")
        elif rank <= n:
            yield Opinion(one, True, f"{word} {rank} of {n}")
        else:
            yield Opinion(one, False, f"{word} {rank}, {n} kept")


def is_count(value: object) -> bool:
    """Whether `value` is a whole number from 0."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _check_count(name: str, n: object, instead: str | None) -> None:
    if instead is not None and n is None:
        return
    if not is_count(n) or n == 0:
        raise DeclarationError(f"{name}: n is {n!r}; use a number, from 1{f', or {instead}' if instead else ''}")
