"""Secrets, and how they are kept out of what is written down: told by the names of fields and the shapes of tokens."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from forgather_ckpt.values import NotPlain, encode

REDACTED = "(redacted)"

_SECRET_NAME = re.compile(r"token$|secret|passw|api_?key|credential|authorization|private_?key", re.IGNORECASE)
_SECRET_TEXT = re.compile(
    # not in the middle of a word: `multi-task-learning-of-something` holds no `sk-` token
    r"(?<![A-Za-z0-9])(?:hf_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_-]{20,}|AKIA[0-9A-Z]{16}|gh[pousr]_[A-Za-z0-9]{30,}"
    r"|github_pat_[A-Za-z0-9_]{20,}|glpat-[A-Za-z0-9_-]{20,}|xox[abprs]-[A-Za-z0-9-]{10,}|AIza[A-Za-z0-9_-]{35}"
    r"|eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]+)"
    r"|://[^/\s:@]*:[^/\s@]+@"
)
_FLAG_WITH_VALUE = re.compile(r"(?P<name>[-+~]*[A-Za-z_][\w.\-/]*)=(?P<value>.+)", re.DOTALL)
_NAMED_INSIDE = re.compile(
    # it begins where a word begins, so that a long word is gone through once
    r"(?P<name>(?<![\w.-])[\w.-]*"
    r"(?:token|secret\w*|passw\w*|(?:api|private|access)[_-]?key|credentials?|authorization|signature)[\"']?\s*[=:]\s*)"
    r"(?:\"[^\"]+\"|'[^']+'|(?:(?:bearer|basic|token)\s+)?[^\s&\"']+)",
    re.IGNORECASE,
)
"""A named secret within an argument: in a query (`?access_token=…`), a header, a piece of JSON or YAML."""


def redact(data: Any, name: str = "") -> Any:
    """`data` as plain JSON without secrets, told by the names of fields and by the shapes of well-known tokens.

    What JSON cannot hold is shown by its type.
    """
    if _SECRET_NAME.search(name) and isinstance(data, (str, bytes)) and data:
        return REDACTED
    if isinstance(data, Mapping):
        return {str(key): redact(value, str(key)) for key, value in data.items()}
    if isinstance(data, (list, tuple, set, frozenset)):
        return [redact(item, name) for item in data]
    if isinstance(data, str):
        return _SECRET_TEXT.sub(REDACTED, data)
    if isinstance(data, Path):
        return str(data)
    try:
        return encode(data)
    except NotPlain:
        return f"<{type(data).__module__}.{type(data).__qualname__}>"


def redact_arguments(arguments: Sequence[str]) -> list[str]:
    """The words of a command line without secrets: none is left out, so a reader sees where one has to be put back.

    >>> redact_arguments(["train.py", "--hub-token", "abc", "wandb.api_key=abc", "https://me:abc@host/data"])
    ['train.py', '--hub-token', '(redacted)', 'wandb.api_key=(redacted)', 'https(redacted)host/data']

    In doubt it is one: a word after a flag with a secret's name is hidden, though that flag may take no value.
    """
    shown: list[str] = []
    is_value_of_secret = False
    for word in arguments:
        if is_value_of_secret and word and not word.startswith("--"):
            shown.append(REDACTED)
            is_value_of_secret = False
            continue
        flag = _FLAG_WITH_VALUE.fullmatch(word)
        if flag is not None and _is_secret(flag["name"]):
            shown.append(f"{flag['name']}={REDACTED}")
        else:
            shown.append(_NAMED_INSIDE.sub(rf"\g<name>{REDACTED}", _SECRET_TEXT.sub(REDACTED, word)))
        is_value_of_secret = word.startswith("-") and flag is None and _is_secret(word)
    return shown


def is_redacted(data: Any) -> bool:
    """Whether something was taken out of this value, or out of a value in it."""
    if isinstance(data, Mapping):
        return any(map(is_redacted, data.values()))
    if isinstance(data, (list, tuple)):
        return any(map(is_redacted, data))
    return isinstance(data, str) and REDACTED in data


def _is_secret(flag: str) -> bool:
    return _SECRET_NAME.search(flag.replace("-", "_")) is not None
