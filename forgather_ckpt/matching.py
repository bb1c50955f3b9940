"""Which stored item goes into which of the job's, by name: pure."""

import fnmatch
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from forgather_ckpt.errors import DeclarationError, LoadMismatch, RankFailed

Patterns = str | Sequence[str]
"""One shell pattern of item names, or several: `"encoder.*"`."""
Rename = Mapping[str, str] | Callable[[str], str]
"""From names in the checkpoint to names in the job: `{old prefix: new prefix}`, or a function of the whole name."""

_NUM_NAMED_ITEMS = 5


@dataclass(frozen=True)
class Rules:
    """What of a checkpoint a job takes over. `include` and `exclude` are patterns of the job's names."""

    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    rename: Rename | None = None
    missing: Literal["error", "keep"] = "error"
    """What becomes of an item of the job that the checkpoint does not have."""
    cast: bool = False
    """Whether tensors of another dtype are converted to that of the job's."""

    def __post_init__(self) -> None:
        if self.rename is not None and not callable(self.rename) and not is_text_to_text(self.rename):
            raise DeclarationError(
                f"rename is {self.rename!r}; use a dict from old to new prefixes, such as {{'encoder.': 'backbone.'}}, or a "
                "function from old to new names"
            )
        if self.missing not in ("error", "keep"):
            raise DeclarationError(f"missing is {self.missing!r}; use 'error' or 'keep'")
        if not isinstance(self.cast, bool):
            raise DeclarationError(f"cast is {self.cast!r}; use True or False")

    @property
    def prefixes(self) -> Mapping[str, str]:
        return self.rename if isinstance(self.rename, Mapping) else {}

    def asks_for(self, name: str) -> bool:
        return matches(name, self.include) and not matches(name, self.exclude)


def patterns(given: Patterns, what: str) -> tuple[str, ...]:
    """The patterns in what a caller gave as `what`."""
    several = (given,) if isinstance(given, str) else given
    is_list = isinstance(several, Collection) and not isinstance(several, (bytes, Mapping))
    if not is_list or not several or not all(isinstance(one, str) and one for one in several):
        raise DeclarationError(
            f"{what} is {given!r}; use a pattern of item names, such as 'encoder.*', or a list of them"
        )
    return tuple(several)


def is_text_to_text(value: object) -> bool:
    return isinstance(value, Mapping) and all(isinstance(text, str) for pair in value.items() for text in pair)


def matches(name: str, patterns: Iterable[str]) -> bool:
    return any(re.match(fnmatch.translate(pattern), name) for pattern in patterns)


def renamed(names: Iterable[str], rename: Rename | None) -> dict[str, str]:
    """By the names of a checkpoint's items what they are called in the job. Of several prefixes the longest counts.

    `LoadMismatch` where two get one name.
    """
    found = {name: _new_name(name, rename) for name in sorted(names)}
    owners: dict[str, str] = {}
    for old, new in found.items():
        if owners.setdefault(new, old) != old:
            raise LoadMismatch(
                f"rename= calls both {owners[new]!r} and {old!r} of the checkpoint {new!r}; tell them apart"
            )
    return found


def _new_name(name: str, rename: Rename | None) -> str:
    if rename is None:
        return name
    if isinstance(rename, Mapping):
        prefix = max((old for old in rename if name.startswith(old)), key=len, default=None)
        return name if prefix is None else rename[prefix] + name[len(prefix) :]
    try:
        new = rename(name)
    except Exception as err:
        raise RankFailed(f"rename= raised {type(err).__name__} for {name!r}: {err}") from err
    if not isinstance(new, str):
        raise DeclarationError(f"rename= makes {new!r} of {name!r}; return a name, the same one where nothing changes")
    return new


@dataclass(frozen=True)
class Match:
    """What a rank takes over of one component."""

    sources: Mapping[str, str]
    """By the job's items, tied ones by their first name, the stored item (by its new name) that each is filled from."""
    doubles: Sequence[tuple[str, str]]
    """Stored items, by their new names, that are one in the job: they must be equal."""
    kept: Sequence[str]
    """The job's names that stay as they are."""
    ignored: Sequence[str]
    """The stored items, by their new names, that go nowhere."""


def match(ties: Iterable[Sequence[str]], stored: Collection[str], rules: Rules) -> Match:
    """Match the job's items with those of the checkpoint, given by their new names.

    `ties` are the names of each of the job's items: one, or those of a tied tensor. `LoadMismatch` where the
    checkpoint lacks what is asked for.
    """
    sources: dict[str, str] = {}
    doubles: list[tuple[str, str]] = []
    kept: list[str] = []
    missing: list[str] = []
    used: set[str] = set()
    for names in ties:
        asked = [name for name in names if rules.asks_for(name)]
        found = [name for name in asked if name in stored]
        if found:
            sources[names[0]] = found[0]
            doubles += [(found[0], other) for other in found[1:]]
            used.update(found)
        else:
            kept += names
            missing += asked
    if missing and rules.missing == "error":
        raise LoadMismatch(
            f"the checkpoint has no {some_of(missing)}; where it has other names for them, say so in rename=, and with "
            "missing='keep' what it lacks stays as it is"
        )
    return Match(sources, doubles, kept, sorted(name for name in stored if name not in used))


def some_of(names: Iterable[str]) -> str:
    """The first of some names, for a message."""
    ordered = sorted(names)
    shown = ", ".join(repr(name) for name in ordered[:_NUM_NAMED_ITEMS])
    return f"{shown} and {len(ordered) - _NUM_NAMED_ITEMS} more" if len(ordered) > _NUM_NAMED_ITEMS else shown
