"""What a replication check found: as data, as text for people, as JSON for tools.

Pure: whoever compares fills these in, and every rank that has the same reports says the same words.
"""

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from forgather_ckpt.boxes import Box
from forgather_ckpt.errors import ReplicaMismatch
from forgather_ckpt.names import printable
from forgather_ckpt.names import shown as shown_name
from forgather_ckpt.patterns import ValidationLevel
from forgather_ckpt.replication import Verdict, describe
from forgather_ckpt.topology import Ranks

_NUM_SHOWN_SETS = 10
_NUM_SHOWN_ITEMS = 20
_NUM_SHOWN_COPIES = 4
_NUM_NAMED_SETS = 5
_NUM_NAMED_ITEMS = 5
_NUM_NAMED_VALUES = 3
_MAX_RANKS_CHARS = 60
_MAX_VALUE_CHARS = 40
_CONTEXT_CHARS = 10
"""Of two long values, shown before they differ."""
_MAX_ENTRY_CHARS = 60

MIN_WIDTH = 40
"""The narrowest text, in characters."""


@dataclass(frozen=True)
class ElementDifference:
    """How a range of one item's elements in one copy compares, bit by bit, with the same range in the reference.

    `ElementDifference(0)` is that of an empty range. `elements.measure` makes others.
    """

    num_elements: int
    """Compared."""
    num_different: int = 0
    """With other bits: -0.0 is not 0.0, and a NaN is equal to a NaN of the same payload."""
    first_index: tuple[int, ...] | None = None
    """Of the first different element, in the item's shape; () in an item without dimensions, None where all are
    equal."""
    max_abs: float | None = None
    """The largest |own - reference| of the different elements without NaN; None where there are none, or where
    elements are not numbers."""
    max_ulp: int | None = None
    """The largest distance in units in the last place, of the same elements; None for types other than floats.
    -0.0 and 0.0 are 1 apart where the type has both."""
    nan: int = 0
    """NaN elements in this copy. A complex element counts if either of its parts does."""
    inf: int = 0
    """Infinite elements in this copy."""
    reference_nan: int = 0
    reference_inf: int = 0

    def merge(self, other: "ElementDifference") -> "ElementDifference":
        """The difference over both of two disjoint ranges of the same item, in any order."""
        return ElementDifference(
            num_elements=self.num_elements + other.num_elements,
            num_different=self.num_different + other.num_different,
            # tuples of one shape are ordered as C order is
            first_index=min(_known(self.first_index, other.first_index), default=None),
            max_abs=max(_known(self.max_abs, other.max_abs), default=None),
            max_ulp=max(_known(self.max_ulp, other.max_ulp), default=None),
            nan=self.nan + other.nan,
            inf=self.inf + other.inf,
            reference_nan=self.reference_nan + other.reference_nan,
            reference_inf=self.reference_inf + other.reference_inf,
        )

    def moved(self, corner: Sequence[int]) -> "ElementDifference":
        """The same of a part that begins at `corner` of the item."""
        if self.first_index is None or not corner:
            return self
        return replace(self, first_index=tuple(at + by for at, by in zip(self.first_index, corner, strict=True)))

    def to_json(self) -> dict[str, Any]:
        return {
            "elements": self.num_elements,
            "different": self.num_different,
            "first_index": None if self.first_index is None else list(self.first_index),
            "max_abs": _json_float(self.max_abs),
            "max_ulp": self.max_ulp,
            "nan": self.nan,
            "inf": self.inf,
            "reference_nan": self.reference_nan,
            "reference_inf": self.reference_inf,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "ElementDifference":
        return cls(
            num_elements=data["elements"],
            num_different=data["different"],
            first_index=None if data["first_index"] is None else tuple(data["first_index"]),
            max_abs=None if data["max_abs"] is None else float(data["max_abs"]),
            max_ulp=data["max_ulp"],
            nan=data["nan"],
            inf=data["inf"],
            reference_nan=data["reference_nan"],
            reference_inf=data["reference_inf"],
        )

    def text(self) -> str:
        """`17 of 262144 elements, first at [17, 4], max |Δ| 3.1e-4, 4 ulp, NaN 0 against 1`, the reference first."""
        return ", ".join(
            [
                f"{self.num_different} of {_plural(self.num_elements, 'element')}",
                *_place_and_size(self),
                *([] if self.max_ulp is None else [f"{self.max_ulp} ulp"]),
                *([f"NaN {self.reference_nan} against {self.nan}"] if self.reference_nan or self.nan else []),
                *([f"Inf {self.reference_inf} against {self.inf}"] if self.reference_inf or self.inf else []),
            ]
        )


@dataclass(frozen=True)
class Copy:
    """One state of an item that is not the majority's, and the ranks that have it."""

    ranks: Ranks
    elements: ElementDifference | None = None
    """Of a tensor, against the majority's; None where it was not measured."""
    value: str | None = None
    """Of a value: as it is shown to people."""

    def to_json(self) -> dict[str, Any]:
        return {
            "ranks": list(self.ranks),
            "elements": None if self.elements is None else self.elements.to_json(),
            "value": self.value,
        }


@dataclass(frozen=True)
class ItemDifference:
    """One item whose copies differ."""

    name: str
    kind: str
    """`tensor`, `value` or `alias`."""
    dtype: str | None
    shape: tuple[int, ...] | None
    majority: Ranks
    minorities: tuple[Copy, ...]
    """One for each other state, in the order of their lowest ranks."""
    value: str | None = None
    """Of a value: the majority's, as it is shown to people."""
    box: Box | None = None
    """Of a part of a tensor: where it lies in it."""

    @property
    def minority(self) -> Ranks:
        return tuple(sorted(rank for copy in self.minorities for rank in copy.ranks))

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "kind": self.kind,
            "dtype": self.dtype,
            "shape": None if self.shape is None else list(self.shape),
            **({} if self.box is None else {"box": [list(bounds) for bounds in self.box]}),
            "majority": list(self.majority),
            "value": self.value,
            "minorities": [copy.to_json() for copy in self.minorities],
        }


@dataclass(frozen=True)
class SetDifference:
    """What differs among the ranks that hold the same items of one entry."""

    entry: str
    holders: Ranks
    majority: Ranks
    """The ranks that have the reference in all items."""
    minority: Ranks
    items: tuple[ItemDifference, ...]
    num_items_not_shown: int = 0
    """Items that differ too, of which nothing more is told."""
    num_not_measured: int = 0
    """Tensors that differ and were not compared element by element."""
    num_sets: int = 1
    """How many sets of the component's pattern the holders are of: with global names, groups may share an item."""

    @property
    def num_items(self) -> int:
        """How many items differ."""
        return len(self.items) + self.num_items_not_shown

    def to_json(self) -> dict[str, Any]:
        return {
            "entry": self.entry,
            "holders": list(self.holders),
            "majority": list(self.majority),
            "minority": list(self.minority),
            "items": [item.to_json() for item in self.items],
            "items_not_shown": self.num_items_not_shown,
            "not_measured": self.num_not_measured,
        }


@dataclass(frozen=True)
class Finding:
    """What the check found of one portion that has several holders."""

    level: ValidationLevel
    verdict: Verdict
    excluded: tuple[str, ...] = ()
    """The items that were not compared."""
    difference: SetDifference | None = None
    """None where all copies agree."""


@dataclass(frozen=True)
class ReplicationReport:
    """The outcome of comparing the copies of one component."""

    component: str
    group: str | None
    """The named process group of its pattern, where it has one."""
    level: ValidationLevel
    num_items: int
    """Compared."""
    excluded: tuple[str, ...]
    """Names of the items that were left out of the comparison."""
    seconds: float
    differences: tuple[SetDifference, ...]

    @property
    def is_equal(self) -> bool:
        return not self.differences

    def to_json(self) -> dict[str, Any]:
        return {
            "component": self.component,
            "group": self.group,
            "level": self.level.value,
            "result": _result(self),
            "items": self.num_items,
            "excluded": list(self.excluded),
            "seconds": _json_float(self.seconds),
            "differences": [difference.to_json() for difference in self.differences],
        }

    def text(self, width: int = 100) -> str:
        """Lines of at most `width` characters (at least MIN_WIDTH are used), a bounded number of them.

        For example::

            model: DIFFERS at level full (148 items compared, 2 excluded, 0.31 s)
              all: ranks 0, 2-3 against 1
                layers.2.weight  float32 [512, 512]
                  rank 1: 17 of 262144 elements, first at [17, 4], max |Δ| 3.1e-4, 4 ulp
                groups.a.lr      value 0.1
                  rank 1: 0.2
        """
        width = max(width, MIN_WIDTH)
        lines = _wrapped(_headline(self), 0, width)
        for difference in self.differences[:_NUM_SHOWN_SETS]:
            lines += _set_lines(difference, width)
        if (more := len(self.differences) - _NUM_SHOWN_SETS) > 0:
            lines.append(f"  and {_plural(more, 'more set')}")
        return "\n".join(lines)


def report_json(
    reports: Mapping[str, ReplicationReport], step: int | None, created: str, on_mismatch: str
) -> dict[str, Any]:
    """The content of `replication-report-<step>.json`. `created`: UTC, for people only."""
    return {
        "format": "forgather_ckpt.replication",
        "version": "1.0",
        "step": step,
        "created": created,
        "on_mismatch": on_mismatch,
        "components": {key: report.to_json() for key, report in reports.items()},
    }


def mismatch_error(found: Iterable[ReplicationReport]) -> ReplicaMismatch:
    """The error for copies that differ; the same text on every rank."""
    differing = [report for report in found if not report.is_equal]
    rank = differing[0].differences[0].minority[0]
    return ReplicaMismatch(error_text(differing), rank=rank, component=differing[0].component)


def error_text(reports: Iterable[ReplicationReport]) -> str:
    """One line for a `ReplicaMismatch`; empty if all are equal.

    For example, without the line break::

        'model' differs between rank 0 and ranks [3, 7] at 'layers.2.weight' (first at [17, 4], max |Δ| 3.1e-4);
        expected identical state in dp (0, 3, 7)
    """
    told = [(report, difference) for report in reports for difference in report.differences]
    parts = [_set_text(report, difference) for report, difference in told[:_NUM_NAMED_SETS]]
    if (more := len(told) - len(parts)) > 0:
        parts.append(f"and {_plural(more, 'more set')} of ranks")
    return "; ".join(parts)


def _set_text(report: ReplicationReport, difference: SetDifference) -> str:
    return (
        f"{report.component!r} differs between {_bracketed(difference.majority)} and "
        f"{_bracketed(difference.minority)}{_named_items(difference)}; expected identical state in "
        f"{(difference.num_sets == 1 and report.group) or 'all holders'} ({_ranks(difference.holders)})"
    )


def _named_items(difference: SetDifference) -> str:
    named = [f"{shown_name(item.name, item.box)!r}{_detail(item)}" for item in difference.items[:_NUM_NAMED_ITEMS]]
    more = difference.num_items - len(named)
    if not named:
        return f" in {_plural(more, 'item')}" if more else ""
    return f" at {', '.join(named)}" + (f" and {_plural(more, 'more item')}" if more else "")


def _detail(item: ItemDifference) -> str:
    """What the message says of an item in brackets: where and how far its copies are apart, over all of them."""
    measured = ElementDifference(0)
    for copy in item.minorities:
        measured = measured if copy.elements is None else measured.merge(copy.elements)
    if facts := _place_and_size(measured):
        return f" ({', '.join(facts)})"
    own, *copies = _values(item)
    others = [value for value in copies if value is not None]
    if own is None or not others:
        return ""
    shown = others[:_NUM_NAMED_VALUES] + (["…"] if len(others) > _NUM_NAMED_VALUES else [])
    return f" ({own} against {', '.join(shown)})"


def _place_and_size(elements: ElementDifference) -> list[str]:
    facts = [f"first at {list(elements.first_index)}"] if elements.first_index else []
    return facts if elements.max_abs is None else [*facts, f"max |Δ| {_number(elements.max_abs)}"]


def _headline(report: ReplicationReport) -> str:
    name = printable(f"{report.component} ({report.group})" if report.group else report.component)
    if _result(report) == "not compared":
        return f"{name}: not compared"
    facts = [f"{_plural(report.num_items, 'item')} compared"]
    if report.excluded:
        facts.append(f"{len(report.excluded)} excluded")
    facts.append(f"{report.seconds:.2f} s")
    verdict = "equal" if report.is_equal else "DIFFERS"
    return f"{name}: {verdict} at level {report.level.value} ({', '.join(facts)})"


def _result(report: ReplicationReport) -> str:
    """In the manifest's words."""
    if report.differences:
        return "differed"
    return "equal" if report.num_items else "not compared"


def _set_lines(difference: SetDifference, width: int) -> list[str]:
    shown = difference.items[:_NUM_SHOWN_ITEMS]
    sides = f"{_ranks_word(difference.majority)} {_ranks(difference.majority)} against {_ranks(difference.minority)}"
    lines = _wrapped(f"{_shown(difference.entry, _MAX_ENTRY_CHARS)}: {sides}", 2, width)
    # half of a line for each of the two columns, and two spaces between them
    facts = [_cut(_facts(item), (width - 6) // 2) for item in shown]
    names = [_shown(shown_name(item.name, item.box), width - 6 - max(map(len, facts))) for item in shown]
    column = max(map(len, names), default=0)
    for item, name, fact in zip(shown, names, facts, strict=True):
        lines.append(f"    {name:<{column}}  {fact}")
        for copy, value in zip(item.minorities[:_NUM_SHOWN_COPIES], _values(item)[1:], strict=False):
            facts_of_copy = (value or "differs") if copy.elements is None else copy.elements.text()
            lines += _wrapped(f"{_ranks_word(copy.ranks)} {_ranks(copy.ranks)}: {facts_of_copy}", 6, width)
        if (more := len(item.minorities) - _NUM_SHOWN_COPIES) > 0:
            lines.append(f"      and {_plural(more, 'more state')}")
    if (more := difference.num_items - len(shown)) > 0:
        lines.append(f"    and {_plural(more, 'more item')}")
    if difference.num_not_measured:
        lines += _wrapped(f"{_plural(difference.num_not_measured, 'tensor')} not compared element by element", 4, width)
    return lines


def _facts(item: ItemDifference) -> str:
    if item.kind == "tensor":
        return f"{item.dtype} {list(item.shape or ())}"
    value = _values(item)[0]
    return item.kind if value is None else f"{item.kind} {value}"


def _wrapped(text: str, indent: int, width: int) -> list[str]:
    return textwrap.wrap(
        text, width, initial_indent=" " * indent, subsequent_indent=" " * (indent + 4), break_on_hyphens=False
    )


def _bracketed(ranks: Ranks) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks [{_ranks(ranks)}]"


def _ranks_word(ranks: Ranks) -> str:
    return "rank" if len(ranks) == 1 else "ranks"


def _ranks(ranks: Ranks) -> str:
    """`0-3, 7`; of many runs the first ones and the number of ranks."""
    text = describe(ranks)
    if len(text) <= _MAX_RANKS_CHARS:
        return text
    return f"{text[: text.rindex(',', 0, _MAX_RANKS_CHARS)]}, … ({len(ranks)} ranks)"


def _values(item: ItemDifference) -> list[str | None]:
    """The majority's value and those of the minorities, of long ones what surrounds the first place where they differ."""
    texts = [item.value, *(copy.value for copy in item.minorities)]
    known = _known(*texts)
    # as much before that as there is room for, where little follows
    too_long = max(map(len, known), default=0) + 1 - _MAX_VALUE_CHARS
    columns = enumerate(zip(*known, strict=False))
    first = next((place for place, letters in columns if len(set(letters)) > 1), min(map(len, known), default=0))
    start = max(0, min(first - _CONTEXT_CHARS, too_long))
    head = "…" if start else ""
    return [None if text is None else _shown(head + text[start:], _MAX_VALUE_CHARS) for text in texts]


def _shown(text: str, limit: int) -> str:
    # cut before, since a value may be long, and after, since escapes are longer than what they stand for
    return _cut(printable(_cut(text, limit)), limit)


def _cut(text: str, limit: int) -> str:
    """At most `limit` characters: what is left out is the middle, since names differ at their ends."""
    if len(text) <= limit:
        return text
    tail = limit // 2
    return f"{text[: limit - 1 - tail]}…{text[len(text) - tail :]}"


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _number(value: float) -> str:
    """A magnitude with 3 significant digits, or all those before the point: `0.25`, `3.1e-4`, `12345`, `1.84e19`."""
    if value == 0 or 1e-3 <= value < 1000 or not math.isfinite(value):
        return f"{value:.3g}"
    if 1000 <= value < 1e6:
        return f"{value:.0f}"
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def _json_float(value: float | None) -> float | str | None:
    """NaN and infinities as strings: JSON has no such numbers."""
    return value if value is None or math.isfinite(value) else str(value)


def _known(*values: Any) -> Sequence[Any]:
    return [value for value in values if value is not None]
