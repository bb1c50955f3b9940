"""What a manifest says of the world around a checkpoint: versions, the code's commit, arguments without secrets."""

import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from forgather_ckpt.launch import describe_launch
from forgather_ckpt.redaction import REDACTED as REDACTED
from forgather_ckpt.redaction import redact as redact

_PACKAGES = ("forgather-ckpt", "torch", "numpy", "safetensors", "xxhash", "accelerate", "transformers")


def describe() -> dict[str, Any]:
    """Versions, the commit of the code in the working directory, and what started this process (`describe_launch`).

    What cannot be told is absent.
    """
    facts: dict[str, Any] = {"python": platform.python_version(), "platform": sys.platform}
    for package in _PACKAGES:
        try:
            facts[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    if (commit := _commit(Path.cwd())) is not None:
        facts["commit"] = commit
    facts["launch"] = describe_launch()
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
