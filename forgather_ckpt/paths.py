"""Every file and directory name of the format, in one place.

Readers find files through the manifest and the index only; these patterns are for writers and for people.
"""

import re
from collections.abc import Sequence

from xxhash import xxh3_64_hexdigest

MANIFEST = "checkpoint_manifest.json"
ANNOTATIONS = "annotations.json"
LEASE = ".lease"
LOAD_ATTEMPTS = ".load-attempts.json"

TEMPORARY_PREFIX = ".tmp-"
TRASH_PREFIX = ".trash-"
"""Directories with these prefixes are nobody's checkpoint: the owner of the run directory may delete them."""

_NUMBERED = re.compile(r"-(\d{5,}|part\d+)$")
"""How the names below end; a key that ends so might take the name of another component's file."""

_SAFE_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")


def checkpoint(step: int) -> str:
    return f"checkpoint-{step}"


def step_in(name: str) -> int | None:
    """The step that a directory's name says, if it is that of a checkpoint."""
    match = re.fullmatch(r"checkpoint-(\d+)", name, re.ASCII)
    return None if match is None else int(match[1])


def temporary(step: int, nonce: str) -> str:
    return f"{TEMPORARY_PREFIX}{checkpoint(step)}-{nonce}"


def replaced(step: int, nonce: str) -> str:
    return f"{checkpoint(step)}.replaced-{nonce}"


def kept(step: int, sequence: int) -> str:
    """Of one that is pinned or quarantined, once its step has been saved again: no name that a save gives."""
    return f"{checkpoint(step)}.kept-{sequence}"


def trash(name: str, nonce: str) -> str:
    return f"{TRASH_PREFIX}{name}-{nonce}"


def request(kind: str) -> str:
    """What is asked of the job that trains in a run directory."""
    return f".request-{kind}"


def taken_request(kind: str, nonce: str) -> str:
    """A request that the job has taken and is about to read."""
    return f"{TEMPORARY_PREFIX}{request(kind)}-{nonce}"


def is_temporary(name: str) -> bool:
    return name.startswith((TEMPORARY_PREFIX, TRASH_PREFIX))


def replication_report(step: int | None) -> str:
    """What a replication check that failed leaves in the run directory."""
    return "replication-report.json" if step is None else f"replication-report-{step}.json"


def index(writer: int, part: int) -> str:
    return f"index-{writer:05d}{_part(part)}.json"


def is_index(name: str) -> bool:
    return re.fullmatch(r"index-\d{5,}(-part\d+)?\.json", name) is not None


def small_tensors(writer: int, part: int) -> str:
    return f"small-{writer:05d}{_part(part)}.safetensors"


def tensors(stem: str, writer: int, part: int, *, num_writers: int) -> str:
    """The file of one component by one writer; `num_writers` is how many ranks may write the component."""
    number = "" if num_writers == 1 else f"-{writer:05d}-of-{num_writers:05d}"
    return f"{stem}{number}{_part(part)}.safetensors"


def tensors_index(stem: str) -> str:
    """The ecosystem's index of a component that lies in several safetensors files."""
    return f"{stem}.safetensors.index.json"


def _part(part: int) -> str:
    return f"-part{part}" if part else ""


def is_safe_file_name(name: object) -> bool:
    """Whether a manifest may name this file: no separators, no leading dot, nothing to escape."""
    return isinstance(name, str) and _SAFE_FILE_NAME.fullmatch(name) is not None


def stems(keys: Sequence[str]) -> dict[str, str]:
    """A file name stem for each component key; a key that is not fit for a file name gets a digest appended.

    Keys may be any strings. Keys that differ only in letter case are told apart too, for file systems that
    do not.
    """
    folded = [key.casefold() for key in keys]
    return {key: _stem(key, unique=folded.count(key.casefold()) == 1) for key in keys}


def _stem(key: str, *, unique: bool) -> str:
    fitting = re.sub(r"[^A-Za-z0-9._-]", "_", key)[:64].lstrip(".-")
    if fitting == key and unique and fitting not in ("small", "index") and not _NUMBERED.search(fitting):
        return key
    return f"{fitting or 'component'}-{xxh3_64_hexdigest(key.encode('utf-8', 'surrogatepass'))[:8]}"
