"""Which logs of digests a command is about, and how it tells of them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from forgather_ckpt import digest_log
from forgather_ckpt.cli import text
from forgather_ckpt.digest_log import Column, DigestLog
from forgather_ckpt.errors import CheckpointNotFound

_NUM_NAMED = 8


class Logs(NamedTuple):
    """The logs that one argument means, by rank."""

    name: str
    by_rank: Mapping[int, Path]
    is_one: bool
    """One log was asked for, whatever its rank."""


def find(name: str) -> Logs:
    """The logs that a LOG means: a file, a directory, a run directory, `DIR@RANK`. `CheckpointNotFound` if there are none."""
    path, at, rank = name.rpartition("@")
    if at and rank.isascii() and rank.isdigit() and Path(path).is_dir() and not Path(name).exists():
        logs = _in_directory(Path(path))
        if int(rank) not in logs:
            raise CheckpointNotFound(f"{path} has no log of rank {int(rank)}; it has those of {named(list(logs))}")
        return Logs(name, {int(rank): logs[int(rank)]}, is_one=True)
    if Path(name).is_dir():
        return Logs(name, _in_directory(Path(name)), is_one=False)
    with DigestLog(Path(name)) as log:
        return Logs(name, {log.last_header().rank: Path(name)}, is_one=True)


def _in_directory(directory: Path) -> Mapping[int, Path]:
    for place in (directory, directory / digest_log.DIRECTORY):
        if place.is_dir() and (logs := digest_log.logs_in(place)):
            return logs
    raise CheckpointNotFound(
        f"{directory} holds no logs of digests, such as {digest_log.file_name(0)}; a DigestRecorder makes them",
        path=str(directory),
    )


def pairs(a: Logs, b: Logs) -> list[tuple[tuple[int, int], tuple[Path, Path]]]:
    """Which logs are compared, with their ranks: those of equal rank, or the two that were asked for."""
    if a.is_one and b.is_one:
        [(rank, path)], [(other_rank, other)] = a.by_rank.items(), b.by_rank.items()
        return [((rank, other_rank), (path, other))]
    common = sorted(a.by_rank.keys() & b.by_rank.keys())
    if not common:
        raise CheckpointNotFound(
            f"no rank has a log in both: {a.name} has {named(list(a.by_rank))}, {b.name} has {named(list(b.by_rank))}; "
            "compare any two with DIR@RANK"
        )
    return [((rank, rank), (a.by_rank[rank], b.by_rank[rank])) for rank in common]


def named(ranks: Sequence[int]) -> str:
    more = ", …" if len(ranks) > _NUM_NAMED else ""
    return f"rank{'' if len(ranks) == 1 else 's'} {', '.join(map(str, ranks[:_NUM_NAMED]))}{more}"


def cut_off(log: DigestLog) -> str:
    after = f"after step {log.steps[-1]}" if log.num_frames else "before the first step"
    return f"cut off {after}: {text.plural(log.num_torn_bytes, 'byte')} of an unfinished record follow"


def described(column: Column) -> str:
    return "a value" if column.dtype is None else f"{text.printable(column.dtype)} {list(column.shape or ())}"
