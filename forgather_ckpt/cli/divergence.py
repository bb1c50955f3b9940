"""`fgckpt digests diff`: the first step and item at which two recordings part."""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click

from forgather_ckpt import digest_log, divergence
from forgather_ckpt.cli import comparison, logs, selection, sides, table, text
from forgather_ckpt.cli.differences import NUM_SHOWN
from forgather_ckpt.cli.logs import Logs
from forgather_ckpt.cli.table import Column, Table
from forgather_ckpt.digest_log import DigestLog
from forgather_ckpt.divergence import Choice, Difference, Divergence, Remarks
from forgather_ckpt.errors import CheckpointNotFound

_NUM_NAMED = 8


class _Compared(NamedTuple):
    """Two logs and where they part."""

    ranks: tuple[int, int]
    paths: tuple[Path, Path]
    num_torn_bytes: tuple[int, int]
    found: Divergence


@click.command("diff", short_help="Find the first step and item at which two recordings part.")
@click.argument("a", metavar="LOG_A")
@click.argument("b", metavar="LOG_B")
@comparison.component_option
@click.option("--exclude", multiple=True, metavar="PATTERN", help="Leave out items of such names; repeatable.")
@click.option("--all", "every", is_flag=True, help="Compare all steps, and list those that differ.")
@selection.json_option
def diff(a: str, b: str, components: tuple[str, ...], exclude: tuple[str, ...], every: bool, as_json: bool) -> int:
    """\b
    Examples:
      fgckpt digests diff runs/a runs/b
      fgckpt digests diff runs/a@0 runs/a@1
      fgckpt digests diff a/digests-rank00000.fgdl b/digests-rank00000.fgdl

    Find the first step at which two recordings part, and the items that differ there, in the order of the state. Ranks
    are matched by number; two logs that are named are compared whatever their ranks. Logs of different ranks are
    compared in what the ranks share: name a component that is each rank's own with -c to compare it all the same. Of a
    step that was recorded twice the last recording counts. Exit code 0 if all is equal, 1 if they part, 2 if that cannot
    be told, 3 if there is no log or no common step.
    """
    with sides.trouble_is_no_difference():
        one, other = logs.find(a), logs.find(b)
        choice = Choice(components, exclude)
        compared = [_compare(ranks, paths, choice, every=every) for ranks, paths in logs.pairs(one, other)]
        if as_json:
            selection.write_json("fgckpt.digests.diff/1", _diff_data(one, other, compared))
        else:
            for line in _heads(one, other):
                click.echo(line)
            _write(compared, shlex.join(["fgckpt", "digests", "diff", a, b, "--json"]), every=every)
        return int(any(pair.found.first_different is not None for pair in compared))


def _compare(ranks: tuple[int, int], paths: tuple[Path, Path], choice: Choice, *, every: bool) -> _Compared:
    with DigestLog(paths[0]) as a, DigestLog(paths[1]) as b:
        for letter, log in (("A", a), ("B", b)):
            if log.num_torn_bytes:
                click.echo(f"fgckpt: {letter}: {text.printable(str(log.path))} is {logs.cut_off(log)}", err=True)
        headers = a.last_header(), b.last_header()
        if not a.by_step.keys() & b.by_step.keys():
            have = [_steps(sorted(log.by_step)) for log in (a, b)]
            raise CheckpointNotFound(f"no step is recorded in both: {a.path} has {have[0]}, {b.path} has {have[1]}")
        known = dict.fromkeys(part.key for header in headers for part in header.parts)
        if strangers := [key for key in choice.components if key not in known]:
            raise click.UsageError(f"there is no component {strangers[0]!r}; recorded: {', '.join(known) or 'none'}")
        found = divergence.find(a, b, choice, every=every)
        if not found.num_items:
            keys = [", ".join(part.key for part in header.parts) or "nothing" for header in headers]
            raise sides.Incomparable(
                f"of rank {ranks[0]} in A and rank {ranks[1]} in B no item is left to compare; recorded are {keys[0]} in A "
                f"and {keys[1]} in B. -c names what to compare"
            )
        return _Compared(ranks, paths, (a.num_torn_bytes, b.num_torn_bytes), found)


def _steps(steps: Sequence[int]) -> str:
    if not steps:
        return "no step"
    span = f"{steps[0]}" if len(steps) == 1 else f"{steps[0]} to {steps[-1]}"
    return f"{text.plural(len(steps), 'step')} ({span})"


def _heads(a: Logs, b: Logs) -> Iterator[str]:
    for letter, side in (("A", a), ("B", b)):
        yield f"{letter}  {text.printable(side.name)}  {logs.named(sorted(side.by_rank))}"
    if not (a.is_one or b.is_one):
        for letter, ours, theirs in (("A", a, b), ("B", b, a)):
            if only := sorted(ours.by_rank.keys() - theirs.by_rank.keys()):
                yield f"only in {letter}, not compared: {logs.named(only)}"


def _write(compared: Sequence[_Compared], more: str, *, every: bool) -> None:
    table.write(_pairs_table(compared))
    for line in _remarks(compared):
        click.echo(line)
    parted = [pair for pair in compared if pair.found.first_different is not None]
    if not parted:
        click.echo(_equal_sentence(compared))
        return
    if every:
        click.echo()
        table.write(_steps_table(parted))
        for pair in parted:
            if again := pair.found.num_equal_again:
                click.echo(f"rank {_ranks(pair)}: equal again at {text.plural(again, 'later step')}")
    first = min(pair.found.first_different for pair in parted if pair.found.first_different is not None)
    there = [pair for pair in parted if pair.found.first_different == first]
    click.echo()
    table.write(_items_table(there, first))
    num_items = sum(len(pair.found.differences) for pair in there)
    if num_items > NUM_SHOWN:
        click.echo(f"… and {text.plural(num_items - NUM_SHOWN, 'more item')} ({more} has them)")
    click.echo(_sentence(compared, there, first))


def _ranks(pair: _Compared) -> str:
    one, other = pair.ranks
    return str(one) if one == other else f"{one}, {other}"


def _pairs_table(compared: Sequence[_Compared]) -> Table:
    titles = ["COMMON STEPS", "COMPARED", "ITEMS", "LAST EQUAL", "FIRST DIFFERENT", "DIFFER"]
    rows = []
    for pair in compared:
        found = pair.found
        numbers = (found.last_equal, found.first_different, len(found.differences) or None)
        rows.append(
            [
                _ranks(pair),
                f"{found.first_common}" if found.num_common == 1 else f"{found.first_common} to {found.last_common}",
                f"{found.num_compared:,} of {found.num_common:,}",
                f"{found.num_items:,}",
                *("-" if number is None else str(number) for number in numbers),
            ]
        )
    is_of_two = any(one != other for one, other in (pair.ranks for pair in compared))
    return Table(
        [Column("RANKS A, B" if is_of_two else "RANK", "right"), *(Column(title, "right") for title in titles)], rows
    )


def _remarks(compared: Sequence[_Compared]) -> Iterator[str]:
    """What was left out; the same on many ranks, so told once."""
    told = Remarks()
    for pair in compared:
        for mine, theirs in zip(_lists(told), _lists(pair.found.remarks), strict=True):
            mine.update(theirs)
    if told.own:
        keys = ", ".join(map(text.printable, told.own))
        yield f"left out, as each rank has its own: {keys} (-c compares them)"
    if told.varying:
        yield f"left out, as declared to differ between ranks: {_item_names(told.varying)}"
    for letter, items in (("A", told.only_in_a), ("B", told.only_in_b)):
        if items:
            yield f"recorded in {letter} only, not compared: {_item_names(items)}"


def _lists(remarks: Remarks) -> tuple[dict[Any, None], ...]:
    return remarks.own, remarks.varying, remarks.only_in_a, remarks.only_in_b


def _item_names(items: Mapping[tuple[str, str], None]) -> str:
    names = [text.printable(f"{component}: {name}") for component, name in list(items)[:_NUM_NAMED]]
    more = f", … ({text.plural(len(items), 'item')})" if len(items) > _NUM_NAMED else ""
    return f"{', '.join(names)}{more}"


def _steps_table(parted: Sequence[_Compared]) -> Table:
    columns = [
        Column("RANK", "right"),
        Column("STEP", "right"),
        Column("DIFFER", "right"),
        Column("FIRST IS OF"),
        Column("FIRST ITEM"),
    ]
    rows = [
        [
            _ranks(pair),
            str(step.step),
            f"{step.num_different:,}",
            text.printable(step.first.component),
            text.printable(step.first.name),
        ]
        for pair in parted
        for step in pair.found.different
    ]
    return Table(columns, rows)


def _items_table(there: Sequence[_Compared], step: int) -> Table:
    rows = [
        [
            _ranks(pair),
            str(step),
            text.printable(difference.column.component),
            text.printable(difference.column.name),
            _change(difference),
        ]
        for pair in there
        for difference in pair.found.differences
    ]
    columns = [
        Column("RANK", "right"),
        Column("STEP", "right"),
        Column("COMPONENT"),
        Column("ITEM"),
        Column("DIFFERENCE"),
    ]
    return Table(columns, rows[:NUM_SHOWN])


def _change(difference: Difference) -> str:
    match difference:
        case Difference(a=None) | Difference(b=None):
            return f"{difference.change}: {logs.described(difference.column)}"
        case Difference(change=divergence.Change.STRUCTURE, a=one, b=other):
            assert one is not None and other is not None
            return f"{logs.described(one)} → {logs.described(other)}"
        case Difference(change=divergence.Change.BYTES):
            return f"bytes of {logs.described(difference.column)}"
        case _:
            return "another value"


def _equal_sentence(compared: Sequence[_Compared]) -> str:
    num_steps = sum(pair.found.num_common for pair in compared)
    num_items = max(pair.found.num_items for pair in compared)
    ranks = f" of {text.plural(len(compared), 'rank')}" if len(compared) > 1 else ""
    equal = table.emphasised("equal", "green")
    return f"{equal}: {text.plural(num_steps, 'recorded step')}{ranks}, {text.plural(num_items, 'item')} at each"


def _sentence(compared: Sequence[_Compared], there: Sequence[_Compared], first: int) -> str:
    before = [pair.found.last_equal for pair in there if pair.found.last_equal is not None]
    # those that part first have recorded the same steps, as a rule; where not, the last that is known to be equal
    equal = f"equal up to step {max(before)}; they" if before else "they"
    where = "" if len(compared) == 1 else f" on {logs.named([pair.ranks[0] for pair in there])}"
    common = "" if before else ", the first common one"
    num_items = sum(len(pair.found.differences) for pair in there)
    of = text.plural(sum(pair.found.num_items for pair in there), "item")
    return f"{equal} {table.emphasised('part', 'red')} at step {first}{common}{where}, in {num_items:,} of {of}"


def _diff_data(a: Logs, b: Logs, compared: Sequence[_Compared]) -> dict[str, Any]:
    return {
        "a": str(Path(a.name).absolute()),
        "b": str(Path(b.name).absolute()),
        "equal": all(pair.found.first_different is None for pair in compared),
        "ranks": [_pair_data(pair) for pair in compared],
    }


def _pair_data(pair: _Compared) -> dict[str, Any]:
    found = pair.found
    return {
        **{
            letter: {"rank": rank, "path": str(path.absolute()), "cut_off_bytes": num_torn_bytes}
            for letter, rank, path, num_torn_bytes in zip(
                "ab", pair.ranks, pair.paths, pair.num_torn_bytes, strict=True
            )
        },
        "common_steps": found.num_common,
        "first_common": found.first_common,
        "last_common": found.last_common,
        "steps_only_in_a": found.num_only_in_a,
        "steps_only_in_b": found.num_only_in_b,
        "compared": found.num_compared,
        "last_equal": found.last_equal,
        "first_different": found.first_different,
        "equal_again": found.num_equal_again,
        "items": found.num_items,
        "differences": [
            {
                "component": difference.column.component,
                "name": difference.column.name,
                "change": difference.change.name.lower(),
                "a": _column_data(difference.a),
                "b": _column_data(difference.b),
            }
            for difference in found.differences
        ],
        "different_steps": [
            {
                "step": one.step,
                "items": one.num_different,
                "first": {"component": one.first.component, "name": one.first.name},
            }
            for one in found.different
        ],
        "left_out": {
            "own": list(found.remarks.own),
            "varying": _names_data(found.remarks.varying),
            "only_in_a": _names_data(found.remarks.only_in_a),
            "only_in_b": _names_data(found.remarks.only_in_b),
        },
    }


def _column_data(column: digest_log.Column | None) -> dict[str, Any] | None:
    if column is None:
        return None
    shape = None if column.shape is None else list(column.shape)
    return {"dtype": column.dtype, "shape": shape, "algorithm": column.algorithm}


def _names_data(items: Mapping[tuple[str, str], None]) -> list[dict[str, str]]:
    return [{"component": component, "name": name} for component, name in items]
