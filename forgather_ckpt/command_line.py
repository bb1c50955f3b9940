"""The options of a script of which nothing is known but the words that it was started with."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

_NUMBER = re.compile(r"-\.?\d[\d._eE+-]*")
_ASSIGNMENT = re.compile(r"(?P<name>[+~]*[A-Za-z_][\w.]*)=(?P<value>.*)", re.DOTALL)
_TURNED_ON = {"false": "true", "False": "True", "no": "yes", "off": "on", "0": "1"}


@dataclass(frozen=True)
class Option:
    """One option among the words `[start, stop)`: `--name value`, `--name=value`, `name=value` (as hydra has it), or
    `--name` alone."""

    name: str
    """As Python would write it: without dashes before it, with `_` within it."""
    spelled: str
    """As it was written: `--learning-rate`."""
    value: str | None
    is_joined: bool
    start: int
    stop: int

    @property
    def is_flag(self) -> bool:
        return self.spelled.startswith("-")

    def with_value(self, value: str) -> list[str]:
        return joined_or_not(self.spelled, value, self.is_joined)


@dataclass(frozen=True)
class Style:
    """How a script's options are written."""

    separator: str = "-"
    """Between the words of a name: `-` or `_`."""
    is_joined: bool = False
    """`--name=value` and not `--name value`."""
    is_assigned: bool = False
    """`name=value`, without dashes."""

    def spelled(self, name: str) -> str:
        return name if self.is_assigned else "--" + name.replace("_", self.separator)

    def option(self, name: str, value: str | None) -> list[str]:
        flag = self.spelled(name)
        if self.is_assigned:
            return [f"{flag}={'true' if value is None else value}"]
        return [flag] if value is None else joined_or_not(flag, value, self.is_joined)


def joined_or_not(flag: str, value: str, is_joined: bool) -> list[str]:
    # a value that looks like a flag would be taken for one
    return [f"{flag}={value}"] if is_joined or looks_like_a_flag(value) else [flag, value]


def looks_like_a_flag(word: str) -> bool:
    return len(word) > 1 and word.startswith("-") and _NUMBER.fullmatch(word) is None


def plain_name(spelled: str) -> str:
    """`--learning-rate` as `learning_rate`."""
    return spelled.lstrip("-+~").replace("-", "_")


def options_in(words: Sequence[str]) -> Iterator[Option]:
    """The options, in order. A word after a flag counts as its value, unless it looks like a flag itself."""
    at = 0
    while at < len(words) and words[at] != "--":
        word, start = words[at], at
        at += 1
        if looks_like_a_flag(word):
            spelled, equals, value = word.partition("=")
            if equals:
                yield Option(plain_name(spelled), spelled, value, True, start, at)
            elif at < len(words) and not looks_like_a_flag(words[at]):
                at += 1
                yield Option(plain_name(spelled), spelled, words[at - 1], False, start, at)
            else:
                yield Option(plain_name(spelled), spelled, None, False, start, at)
        elif (assigned := _ASSIGNMENT.fullmatch(word)) is not None:
            yield Option(plain_name(assigned["name"]), assigned["name"], assigned["value"], True, start, at)


def style_of(words: Sequence[str]) -> Style:
    """How most of the options are written; the usual way where there are none."""
    found = list(options_in(words))
    flags = [option for option in found if option.spelled.startswith("--")]
    names = [option.spelled[2:] for option in flags]
    has_dashes, has_underscores = any("-" in name for name in names), any("_" in name for name in names)
    valued = [option for option in flags if option.value is not None]
    return Style(
        separator="_" if has_underscores and not has_dashes else "-",
        is_joined=2 * sum(option.is_joined for option in valued) > len(valued),
        is_assigned=bool(found) and not flags,
    )


def with_option(words: Sequence[str], name: str, value: str | None, style: Style) -> list[str]:
    """The words with one option set: replaced where it stands (the last of several, as parsers take it), else added
    behind the others. A switch (None) turns on what was given as off (`--bf16 false`)."""
    found = [option for option in options_in(words) if option.name == plain_name(name)]
    if not found:
        end = list(words).index("--") if "--" in words else len(words)
        return [*words[:end], *style.option(name, value), *words[end:]]
    last = found[-1]
    if value is None:
        turned_on = _TURNED_ON.get(last.value or "")
        written = list(words[last.start : last.stop]) if turned_on is None else last.with_value(turned_on)
    elif last.value is None:
        written = style.option(name, value)
    else:
        written = last.with_value(value)
    result = [*words[: last.start], *written, *words[last.stop :]]
    for option in reversed(found[:-1]):
        del result[option.start : option.stop]
    return result
