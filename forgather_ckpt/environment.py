"""What a manifest says of the world around a checkpoint: versions, the code's commit, arguments without secrets."""

import platform
import re
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from forgather_ckpt.values import NotPlain, encode

_PACKAGES = ("forgather-ckpt", "torch", "numpy", "safetensors", "xxhash", "accelerate", "transformers")
_SECRET_NAME = re.compile(r"token$|secret|passw|api_?key|credential|authorization|private_?key", re.IGNORECASE)
_SECRET_TEXT = re.compile(
    r"hf_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_-]{20,}|AKIA[0-9A-Z]{16}|gh[pousr]_[A-Za-z0-9]{30,}"
    r"|eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]+|://[^/\s:@]+:[^/\s@]+@"
)
REDACTED = "(redacted)"


def describe() -> dict[str, Any]:
    """Versions and the commit of the code in the working directory; what cannot be told is absent."""
    facts: dict[str, Any] = {"python": platform.python_version(), "platform": sys.platform}
    for package in _PACKAGES:
        try:
            facts[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    if (commit := _commit(Path.cwd())) is not None:
        facts["commit"] = commit
    return facts


def _commit(directory: Path) -> str | None:
    """The commit that is checked out around `directory`, read from git's own files."""
    git = next((found for parent in (directory, *directory.parents) if (found := parent / ".git").is_dir()), None)
    if git is None:
        return None
    try:
        head = (git / "HEAD").read_text().strip()
        if not head.startswith("ref: "):
            return head
        reference = head.removeprefix("ref: ")
        if (git / reference).is_file():
            return (git / reference).read_text().strip()
        packed = (git / "packed-refs").read_text().splitlines()
        return next((line.split()[0] for line in packed if line.endswith(f" {reference}")), None)
    except OSError:
        return None


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
