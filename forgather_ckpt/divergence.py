"""At which step and in which item two logs of digests part: told from the logs alone.

Steps are compared in their order, those that both logs have, frame by frame: as one piece of bytes where both hold
the same columns. Of a step that was recorded several times the last recording counts. Memory is that of two frames
and their headers, whatever the number of steps.

Logs of two ranks are compared in what the ranks share: components that were declared to be each rank's own, items
that were declared to differ, and parts of tensors that one of them alone has, are left out.
"""

import fnmatch
import glob
import itertools
import operator
import re
import shlex
import struct
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

from forgather_ckpt import names
from forgather_ckpt.digest_log import Column, DigestLog, Frame, Header
from forgather_ckpt.errors import FormatError
from forgather_ckpt.hashtree import DIGEST_BYTES
from forgather_ckpt.patterns import SharingPattern

_DIGEST = struct.Struct(f"{DIGEST_BYTES}s")


class Change(StrEnum):
    """How an item of A differs from that of the same name in B."""

    BYTES = "bytes"
    """A tensor of the same dtype and shape."""
    VALUE = "value"
    STRUCTURE = "structure"
    """A tensor of another dtype or shape, or a value on one side."""
    ONLY_IN_A = "only in A"
    ONLY_IN_B = "only in B"


@dataclass(frozen=True)
class Difference:
    """One item that differs."""

    change: Change
    a: Column | None
    b: Column | None

    @property
    def column(self) -> Column:
        found = self.a or self.b
        assert found is not None
        return found


@dataclass(frozen=True)
class Choice:
    """What is to be compared."""

    components: Collection[str] = ()
    """All where it is empty. One that is named is compared between two ranks too, whatever it was declared."""
    exclude: Sequence[str] = ()
    """Shell patterns of item names that are left out."""


class StepSummary(NamedTuple):
    """How many items differ at a step, and the first of them."""

    step: int
    num_different: int
    first: Column


@dataclass
class Remarks:
    """What was not compared, each in the order in which it was met, without repeats."""

    own: dict[str, None] = field(default_factory=dict)
    """Components that are each rank's own."""
    varying: dict[tuple[str, str], None] = field(default_factory=dict)
    """(component, item) that differ between ranks by design."""
    only_in_a: dict[tuple[str, str], None] = field(default_factory=dict)
    """(component, item) that only A recorded, and B was told not to, or has not the component of, or that is a part of a
    tensor that B, another rank, has not."""
    only_in_b: dict[tuple[str, str], None] = field(default_factory=dict)


@dataclass(frozen=True)
class Divergence:
    """Where two logs part, among the steps that both have."""

    num_common: int
    first_common: int | None
    last_common: int | None
    num_only_in_a: int
    num_only_in_b: int
    num_compared: int
    """Of the common steps: up to the first that differs, unless all were asked for."""
    last_equal: int | None
    """The common step before the first that differs; the last one where none differs."""
    first_different: int | None
    differences: tuple[Difference, ...]
    """At the first step that differs: in the order of A's state, then what only B has."""
    num_items: int
    """That were compared at the first step that differs, or at the last one, both sides together."""
    different: tuple[StepSummary, ...]
    """Of every step that differs and was compared."""
    num_equal_again: int
    """Steps after the first that differs, of those that were compared, which are equal."""
    remarks: Remarks


def find(a: DigestLog, b: DigestLog, choice: Choice | None = None, *, every: bool = False) -> Divergence:
    """Compare up to the first step that differs, or with `every` all that both have.

    `FormatError` where a digest of one algorithm would have to be compared with one of another, or a tensor with one that
    was cut otherwise, and where a frame that is needed is damaged.
    """
    common = sorted(a.by_step.keys() & b.by_step.keys())
    remarks = Remarks()
    matchings = _Matchings(choice or Choice(), remarks)
    different: list[StepSummary] = []
    differences: tuple[Difference, ...] = ()
    last_equal: int | None = None
    num_items = num_compared = num_equal_again = 0
    for step in common:
        one, other = a.frame(a.by_step[step]), b.frame(b.by_step[step])
        matching = matchings.of(one, other)
        num_compared += 1
        if not different:
            num_items = matching.num_items
        if matching.is_equal(one.digests, other.digests):
            if different:
                num_equal_again += 1
            else:
                last_equal = step
            continue
        places = matching.places(one.digests, other.digests)
        found = matching.differences(one.header, other.header, places if not different else places[:1])
        if not different:
            differences = found
        different.append(StepSummary(step, len(matching.known) + len(places), found[0].column))
        if not every:
            break
    return Divergence(
        len(common),
        common[0] if common else None,
        common[-1] if common else None,
        len(a.by_step) - len(common),
        len(b.by_step) - len(common),
        num_compared,
        last_equal,
        different[0].step if different else None,
        differences,
        num_items,
        tuple(different),
        num_equal_again,
        remarks,
    )


@dataclass(frozen=True)
class Repeats:
    """The steps that a log holds more than once, as a job that resumes from an earlier step records them again."""

    num_steps: int
    first_different: StepSummary | None
    """The lowest step at which two recordings differ. After an exact resume there is none."""
    num_incomparable: int = 0
    """Of the steps, those of which recordings cannot be compared: the job went on with digests of another algorithm, or
    with tensors that are cut otherwise."""


def repeats(log: DigestLog) -> Repeats:
    """Read a whole log, and compare each recording of a step with the one before it; `FormatError` on damage."""
    matchings = _Matchings(Choice(), Remarks())
    before: dict[int, int] = {}
    repeated: set[int] = set()
    incomparable: set[int] = set()
    first: StepSummary | None = None
    for number, frame in enumerate(log.frames()):
        if frame.step in before:
            repeated.add(frame.step)
            earlier = log.frame(before[frame.step])
            try:
                matching = matchings.of(earlier, frame)
            except FormatError:
                incomparable.add(frame.step)
            else:
                if (first is None or frame.step < first.step) and not matching.is_equal(earlier.digests, frame.digests):
                    places = matching.places(earlier.digests, frame.digests)
                    found = matching.differences(earlier.header, frame.header, places[:1])
                    first = StepSummary(frame.step, len(matching.known) + len(places), found[0].column)
        before[frame.step] = number
    return Repeats(len(repeated), first, len(incomparable))


class _Run(NamedTuple):
    """Columns that follow each other on both sides, from `a` and `b` on, whose digests can be compared."""

    a: int
    b: int
    length: int


@dataclass(frozen=True)
class _Matching:
    """Which columns of A are compared with which of B."""

    runs: Sequence[_Run]
    known: Sequence[tuple[int, Difference]]
    """Differences that need no digests, with the place in A where they are told."""
    num_items: int

    def is_equal(self, a: bytes, b: bytes) -> bool:
        return not self.known and all(_part(a, run.a, run.length) == _part(b, run.b, run.length) for run in self.runs)

    def places(self, a: bytes, b: bytes) -> list[tuple[int, int]]:
        """The places in A and in B of the items whose digests differ."""
        found = []
        for run in self.runs:
            one, other = _part(a, run.a, run.length), _part(b, run.b, run.length)
            if one != other:
                differ = map(operator.ne, _DIGEST.iter_unpack(one), _DIGEST.iter_unpack(other))
                offsets = itertools.compress(range(run.length), differ)
                found += [(run.a + offset, run.b + offset) for offset in offsets]
        return found

    def differences(self, a: Header, b: Header, places: Sequence[tuple[int, int]]) -> tuple[Difference, ...]:
        """In the order of A's columns, then what only B has."""
        found = list(self.known)
        for place, other in places:
            column = a.columns[place]
            change = Change.VALUE if column.dtype is None else Change.BYTES
            found.append((place, Difference(change, column, b.columns[other])))
        return tuple(difference for _, difference in sorted(found, key=operator.itemgetter(0)))


def _part(digests: bytes, first: int, count: int) -> bytes:
    return digests[first * DIGEST_BYTES : (first + count) * DIGEST_BYTES]


class _Matchings:
    """The matching of the headers of two frames; the last one is kept, as headers seldom change."""

    def __init__(self, choice: Choice, remarks: Remarks) -> None:
        self._choice = choice
        self._remarks = remarks
        self._last: tuple[tuple[int, int], _Matching] | None = None

    def of(self, a: Frame, b: Frame) -> _Matching:
        key = a.header_number, b.header_number
        if self._last is None or self._last[0] != key:
            try:
                self._last = key, _match(a.header, b.header, self._choice, self._remarks)
            except FormatError as err:
                raise type(err)(f"step {a.step}: {err.message}") from None
        return self._last[1]


def _match(a: Header, b: Header, choice: Choice, remarks: Remarks) -> _Matching:
    is_left_out = _left_out(a, b, choice, remarks)
    ours = [(place, column) for place, column in enumerate(a.columns) if not is_left_out(column)]
    theirs = {column[:2]: (place, column) for place, column in enumerate(b.columns) if not is_left_out(column)}
    tensors = [{_tensor(column) for _, column in side} for side in (ours, theirs.values())]
    known: list[tuple[int, Difference]] = []
    pairs: list[tuple[int, int]] = []
    only = _only(a, b)
    num_items = 0
    for place, column in ours:
        match = theirs.pop(column[:2], None)
        if match is None:
            if not _is_other_part(a, b, column, tensors[1]) and only(column):
                known.append((place, Difference(Change.ONLY_IN_A, column, None)))
            else:
                remarks.only_in_a[column.component, column.name] = None
                continue
        else:
            _refuse_other_algorithm(column, match[1])
            if column == match[1]:
                pairs.append((place, match[0]))
            else:
                known.append((place, Difference(Change.STRUCTURE, column, match[1])))
        num_items += 1
    for _, column in theirs.values():
        if not _is_other_part(a, b, column, tensors[0]) and only(column):
            known.append((len(a.columns), Difference(Change.ONLY_IN_B, None, column)))
            num_items += 1
        else:
            remarks.only_in_b[column.component, column.name] = None
    return _Matching(list(_runs(pairs)), known, num_items)


def _left_out(a: Header, b: Header, choice: Choice, remarks: Remarks) -> Callable[[Column], bool]:
    own: set[str] = set()
    varying: dict[str, Sequence[str]] = {}
    if a.rank != b.rank:
        shared = (None, SharingPattern.REPLICATED.value)
        parts = [part for part in (*a.parts, *b.parts) if part.key not in choice.components]
        own = {part.key for part in parts if part.pattern not in shared}
        varying = {part.key: part.varies for part in parts}
    varies = {key: _any_of(patterns) for key, patterns in varying.items() if patterns}
    excluded = _any_of(choice.exclude)

    def is_left_out(column: Column) -> bool:
        name = _tensor(column)[1]
        if choice.components and column.component not in choice.components:
            return True
        if excluded(name) or excluded(column.name):
            return True
        if column.component in own:
            remarks.own[column.component] = None
            return True
        if column.component in varies and varies[column.component](name):
            remarks.varying[column.component, column.name] = None
            return True
        return False

    return is_left_out


def _any_of(patterns: Sequence[str]) -> Callable[[str], bool]:
    if not patterns:
        return lambda name: False
    matches = re.compile("|".join(map(fnmatch.translate, patterns))).match
    return lambda name: matches(name) is not None


def _only(a: Header, b: Header) -> Callable[[Column], bool]:
    """Whether it is a difference that only one side has an item, and not just that the other was not told to record it."""
    components = {part.key for part in a.parts} & {part.key for part in b.parts}
    is_same_recording = (a.include, a.exclude) == (b.include, b.exclude)
    return lambda column: is_same_recording and column.component in components


def _tensor(column: Column) -> tuple[str, str]:
    """Component and name of an item; of a part of a tensor, those of the tensor."""
    return column.component, names.item_shown(column.name, len(column.shape or ()))


def _is_other_part(a: Header, b: Header, column: Column, others: Collection[tuple[str, str]]) -> bool:
    """Whether an item that one side alone has is a part of a tensor that is its rank's own, and no difference; `others`
    are those of which the other side has something. `FormatError` where one rank has the tensor cut otherwise."""
    component, name = _tensor(column)
    if a.rank != b.rank:
        return name != column.name or (component, name) in others
    if (component, name) in others:
        raise FormatError(
            f"{component}: {name!r} is cut otherwise in A than in B: only one of them has {column.name!r}. Digests of unlike "
            "parts say nothing about each other; compare runs on the same number of ranks in the same layout, or leave such "
            f"items out: --exclude {shlex.quote(glob.escape(name))}"
        )
    return False


def _refuse_other_algorithm(a: Column, b: Column) -> None:
    if a.dtype is None or b.dtype is None or a.algorithm == b.algorithm:
        return
    raise FormatError(
        f"{a.component}: {a.name!r} was recorded with {a.algorithm} in A and {b.algorithm} in B. Digests of different "
        "algorithms are never compared: they differ for equal bytes too. Record both with the tensors on the same kind of "
        f"device, or leave such items out: --exclude {shlex.quote(glob.escape(_tensor(a)[1]))}"
    )


def _runs(pairs: Sequence[tuple[int, int]]) -> Iterator[_Run]:
    """Pairs of places, those of A rising, as runs."""
    start = 0
    for number in range(1, len(pairs) + 1):
        if number < len(pairs) and pairs[number] == (pairs[number - 1][0] + 1, pairs[number - 1][1] + 1):
            continue
        yield _Run(*pairs[start], number - start)
        start = number
