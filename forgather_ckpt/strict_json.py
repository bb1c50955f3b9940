"""JSON as the format's readers take it: bounded, without duplicate keys, without NaN and infinities.

Python's own reader accepts all three and, on hostile input, raises four kinds of exceptions; this one raises
`FormatError` only.
"""

import json
import math
import re
from typing import Any, TypeVar

from forgather_ckpt.errors import FormatError

T = TypeVar("T")


_LIST_OF_NUMBERS = re.compile(r"\[\n\s*(-?\d+(?:,\n\s*-?\d+)*)\n\s*\]")


_ENCODER = json.JSONEncoder(ensure_ascii=True, allow_nan=False, separators=(",", ":"))
"""Made once: `json.dumps` would make one for each of thousands of small values."""


def dumps(value: Any) -> bytes:
    """ASCII bytes of a JSON value; refuses NaN and infinities (`ValueError`)."""
    return _ENCODER.encode(value).encode("ascii")


def pretty(value: Any) -> bytes:
    """The same for people: indented, lists of numbers on one line."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, indent=1)
    # no string is hit: a string holds no line breaks, and a list that is spread out begins with one
    text = _LIST_OF_NUMBERS.sub(lambda match: f"[{' '.join(match[1].split())}]", text)
    return text.encode("ascii")


def loads(data: bytes, *, what: str, max_bytes: int) -> Any:
    """The JSON value in `data`; `what` names it in errors.

    Nesting is bounded by the interpreter's own recursion limit (about 1,000 levels).
    """
    if len(data) > max_bytes:
        raise FormatError(f"{what} is {len(data)} bytes long; at most {max_bytes} are read")
    try:
        text = data.decode("utf-8")
        return json.loads(
            text, object_pairs_hook=_unique_keys, parse_constant=_refuse_constant, parse_float=_finite_float
        )
    except RecursionError:
        raise FormatError(f"{what} is nested too deeply") from None
    except ValueError as err:  # malformed JSON, malformed UTF-8, 5,000-digit integers, and the refusals below
        raise FormatError(f"{what} is not valid: {err}") from None


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        duplicate = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"key {duplicate!r} appears twice")
    return result


def _refuse_constant(text: str) -> Any:
    raise ValueError(f"{text} is not a JSON number")


def _finite_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is out of range")
    return value


class Fields:
    """The fields of a JSON object, each read with its type checked; `FormatError` names what is wrong where.

    Fields that are not asked for are ignored: a newer minor version may add some.
    """

    def __init__(self, data: Any, where: str) -> None:
        if not isinstance(data, dict):
            raise FormatError(f"{where} is {_kind(data)}; expected an object")
        self.data: dict[str, Any] = data
        self.where = where

    def text(self, key: str) -> str:
        return self._get(key, str)

    def optional_text(self, key: str) -> str | None:
        return None if self.data.get(key) is None else self._get(key, str)

    def flag(self, key: str) -> bool:
        return self._get(key, bool)

    def number(self, key: str) -> int:
        """An integer from 0 to 2^63 - 1."""
        value = self._get(key, int)
        if isinstance(value, bool) or not 0 <= value < 2**63:
            raise FormatError(f"{self.where}: field {key!r} is {value!r}; expected a count")
        return value

    def optional_float(self, key: str) -> float | None:
        value = self.data.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise FormatError(f"{self.where}: field {key!r} is {_kind(value)}; expected a number")
        return value

    def items(self, key: str) -> list[Any]:
        return self._get(key, list)

    def mapping(self, key: str) -> dict[str, Any]:
        return self._get(key, dict)

    def optional_mapping(self, key: str) -> dict[str, Any]:
        """Empty where it is absent."""
        return self.mapping(key) if key in self.data else {}

    def texts(self, key: str) -> list[str]:
        return self._list_of(key, str)

    def numbers(self, key: str) -> list[int]:
        """A list of integers from 0 to 2^63 - 1."""
        values = self._list_of(key, int)
        if values and not 0 <= min(values) <= max(values) < 2**63:
            raise FormatError(f"{self.where}: field {key!r} holds an integer out of range")
        return values

    def digest(self, key: str) -> str:
        """A 128-bit digest as 32 hex digits."""
        value = self._get(key, str)
        if len(value) != 32 or not set(value) <= set("0123456789abcdef"):
            raise FormatError(f"{self.where}: field {key!r} is {value!r}; expected 32 hex digits")
        return value

    def _list_of(self, key: str, kind: type[T]) -> list[T]:
        values = self._get(key, list)
        for value in values:
            if type(value) is not kind:
                raise FormatError(f"{self.where}: field {key!r} holds {_kind(value)}; expected {kind.__name__} only")
        return values

    def _get(self, key: str, kind: type[T]) -> T:
        if key not in self.data:
            raise FormatError(f"{self.where} has no field {key!r}")
        value = self.data[key]
        if not isinstance(value, kind):
            raise FormatError(f"{self.where}: field {key!r} is {_kind(value)}; expected {kind.__name__}")
        return value


def _kind(value: Any) -> str:
    return "null" if value is None else f"a {type(value).__name__}"
