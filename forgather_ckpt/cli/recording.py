"""`fgckpt digests`: what was recorded step by step."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click

from forgather_ckpt import digest_log, divergence
from forgather_ckpt.cli import logs, selection, table, text
from forgather_ckpt.cli.divergence import diff
from forgather_ckpt.cli.table import Column, Table
from forgather_ckpt.digest_log import DigestLog, Header
from forgather_ckpt.divergence import Repeats
from forgather_ckpt.errors import FormatError


@click.group("digests", short_help="Look at the digests that were recorded step by step.")
def digests() -> None:
    """\b
    Examples:
      fgckpt digests diff runs/a runs/b
      fgckpt digests diff runs/a@0 runs/a@1
      fgckpt digests show runs/a

    Look at what DigestRecorder has recorded at every step, and compare two recordings. A LOG is a log file, a directory
    of logs, a run directory that has them in its directory "digests", or one rank's of those: DIR@RANK.
    """


digests.add_command(diff)


class _Shown(NamedTuple):
    """What there is to tell of one log that can be read."""

    path: Path
    rank: int | None
    num_steps: int
    num_recordings: int
    first_step: int | None
    last_step: int | None
    num_bytes: int
    num_torn_bytes: int
    cut_off: str
    header: Header | None
    """The last one; None where nothing is recorded."""
    repeats: Repeats


class _Damaged(NamedTuple):
    """A log that cannot be read, and why."""

    path: Path
    rank: int | None
    reason: str


@digests.command("show", short_help="Show what was recorded.")
@click.argument("log", metavar="LOG")
@click.option("--items", "with_items", is_flag=True, help="List the items.")
@selection.json_option
def show(log: str, with_items: bool, as_json: bool) -> int:
    """\b
    Example: fgckpt digests show runs/a

    Show which steps and items the logs hold, with digests of which algorithms. Every byte is read and checked; of steps
    that were recorded again, as by a job that resumed, it is told whether that gave the same digests. Exit code 0 if all
    is well (also if a log was cut off, as a job that is killed leaves it), 1 if a log is damaged.
    """
    path = Path(log)
    found = [path] if path.is_file() else list(logs.find(log).by_rank.values())
    shown = [_look(path) for path in found]
    if as_json:
        selection.write_json("fgckpt.digests.show/1", _data(log, shown, with_items=with_items))
    else:
        table.write(_logs_table(shown))
        for one in shown:
            for line in _notes(one):
                click.echo(line)
        _write_items(shown, with_items=with_items)
    return int(any(isinstance(one, _Damaged) for one in shown))


def _look(path: Path) -> _Shown | _Damaged:
    rank = digest_log.rank_in(path.name)
    try:
        with DigestLog(path) as log:
            header = log.last_header() if log.num_headers else None
            return _Shown(
                path,
                rank if header is None else header.rank,
                len(log.by_step),
                log.num_frames,
                min(log.by_step, default=None),
                max(log.by_step, default=None),
                log.num_bytes,
                log.num_torn_bytes,
                logs.cut_off(log),
                header,
                divergence.repeats(log),
            )
    except FormatError as err:
        return _Damaged(path, rank, err.message)


def _logs_table(shown: Sequence[_Shown | _Damaged]) -> Table:
    columns = [
        Column("RANK", "right"),
        Column("STEPS", "right"),
        Column("FROM", "right"),
        Column("TO", "right"),
        Column("ITEMS", "right"),
        Column("SIZE", "right"),
        Column("STATE"),
    ]
    rows = []
    for one in shown:
        if isinstance(one, _Damaged):
            rows.append([_number(one.rank), *["-"] * 5, table.emphasised("DAMAGED", "red")])
            continue
        rows.append(
            [
                _number(one.rank),
                f"{one.num_steps:,}",
                _number(one.first_step),
                _number(one.last_step),
                "-" if one.header is None else f"{len(one.header.columns):,}",
                text.size(one.num_bytes),
                "cut off" if one.num_torn_bytes else "whole" if one.num_steps else "empty",
            ]
        )
    return Table(columns, rows)


def _number(number: int | None) -> str:
    return "-" if number is None else str(number)


def _notes(one: _Shown | _Damaged) -> Iterator[str]:
    name = text.printable(one.path.name)
    if isinstance(one, _Damaged):
        yield f"{name}: {text.printable(one.reason)}"
        return
    if one.num_torn_bytes:
        yield f"{name}: {one.cut_off}"
    if repeats := one.repeats.num_steps:
        yield f"{name}: {text.plural(repeats, 'step')} recorded more than once, {_compared_again(one.repeats)}"


def _compared_again(repeats: Repeats) -> str:
    first = repeats.first_different
    parts = []
    if first is not None:
        parts.append(
            f"with other digests from step {first.step} on: {text.plural(first.num_different, 'item')} there, the first is "
            f"{text.printable(f'{first.first.component}: {first.first.name}')}"
        )
    elif repeats.num_incomparable < repeats.num_steps:
        parts.append("each time with the same digests")
    if repeats.num_incomparable:
        parts.append(
            f"{text.plural(repeats.num_incomparable, 'step')} with digests that cannot be compared, of another algorithm or "
            "of tensors that are cut otherwise"
        )
    return "; ".join(parts)


def _write_items(shown: Sequence[_Shown | _Damaged], *, with_items: bool) -> None:
    """Of the first log that can be read: the components as they are recorded now."""
    headers = (one.header for one in shown if isinstance(one, _Shown))
    header = next((header for header in headers if header is not None), None)
    if header is None:
        return
    click.echo()
    rows = []
    for part in header.parts:
        columns = [column for column in header.columns if column.component == part.key]
        num_tensors = sum(column.dtype is not None for column in columns)
        rows.append(
            [
                text.printable(part.key),
                text.printable(part.pattern or "-"),
                f"{num_tensors:,}",
                f"{len(columns) - num_tensors:,}",
                ", ".join(text.printable(name) for name in sorted({column.algorithm for column in columns})) or "-",
            ]
        )
    titles = [Column("TENSORS", "right"), Column("VALUES", "right"), Column("ALGORITHMS")]
    table.write(Table([Column("COMPONENT"), Column("PATTERN"), *titles], rows))
    if with_items:
        click.echo()
        names = [
            [
                text.printable(column.component),
                text.printable(column.name),
                logs.described(column),
                text.printable(column.algorithm),
            ]
            for column in header.columns
        ]
        table.write(Table([Column("COMPONENT"), Column("ITEM"), Column("WHAT"), Column("ALGORITHM")], names))


def _data(name: str, shown: Sequence[_Shown | _Damaged], *, with_items: bool) -> dict[str, Any]:
    return {"log": str(Path(name).absolute()), "ranks": [_log_data(one, with_items=with_items) for one in shown]}


def _log_data(one: _Shown | _Damaged, *, with_items: bool) -> dict[str, Any]:
    data: dict[str, Any] = {"rank": one.rank, "path": str(one.path.absolute())}
    if isinstance(one, _Damaged):
        return {**data, "damage": one.reason}
    first = one.repeats.first_different
    data |= {
        "damage": None,
        "bytes": one.num_bytes,
        "cut_off_bytes": one.num_torn_bytes,
        "steps": one.num_steps,
        "first_step": one.first_step,
        "last_step": one.last_step,
        "recordings": one.num_recordings,
        "recorded_again": {
            "steps": one.repeats.num_steps,
            "first_different": None if first is None else first.step,
            "not_comparable": one.repeats.num_incomparable,
        },
    }
    header = one.header
    if header is None:
        return data
    data |= {
        "world_size": header.world_size,
        "started": header.started,
        "include": list(header.include),
        "exclude": list(header.exclude),
        "components": [
            {"key": part.key, "pattern": part.pattern, "varies": list(part.varies)} for part in header.parts
        ],
        "num_items": len(header.columns),
    }
    if with_items:
        data["items"] = [
            {
                "component": column.component,
                "name": column.name,
                "dtype": column.dtype,
                "shape": None if column.shape is None else list(column.shape),
                "algorithm": column.algorithm,
            }
            for column in header.columns
        ]
    return data
