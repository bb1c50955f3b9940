"""`fgckpt bisect`: the first step at which two runs part, and what differs there."""

import itertools
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click

from forgather_ckpt import parting
from forgather_ckpt.catalog import Catalog, Checkpoint
from forgather_ckpt.cli import comparison, differences, selection, sides, text
from forgather_ckpt.cli.differences import Deltas
from forgather_ckpt.comparison import Comparison
from forgather_ckpt.parting import Parting

_NUM_NAMED_STEPS = 8

Pair = tuple[Checkpoint, Checkpoint]


@click.command("bisect", short_help="Find the first step at which two runs part.")
@click.argument("run_a", type=click.Path(file_okay=False, path_type=Path), metavar="RUN_A")
@click.argument("run_b", type=click.Path(file_okay=False, path_type=Path), metavar="RUN_B")
@comparison.component_option
@click.option("--all", "every", is_flag=True, help="Compare all common steps, and do not assume that runs stay apart.")
@comparison.logical_option
@click.option("--tensors", "with_tensors", is_flag=True, help="Read the tensors that differ first; tell how far apart.")
@selection.json_option
def bisect(
    run_a: Path, run_b: Path, components: tuple[str, ...], every: bool, logical: bool, with_tensors: bool, as_json: bool
) -> int:
    """\b
    Example: fgckpt bisect runs/a runs/replay

    Find the first step that both run directories have and at which their checkpoints differ, and tell what differs
    there: that is what came first. No tensor is read. Steps are halved, as runs that have parted stay apart: each
    step of training goes on from the one before. --all compares every step instead. Exit code 0 if they are equal,
    1 if they part, 2 if that cannot be told, 3 if they have no step in common.
    """
    with sides.trouble_is_no_difference():
        catalogs = [_scan(run) for run in (run_a, run_b)]
        ours, theirs = (sides.by_step(found) for found in catalogs)
        pairs = {step: (ours[step], theirs[step]) for step in sorted(ours.keys() & theirs.keys())}
        sides.warn_of_rejected(catalogs)
        if not pairs:
            raise sides.no_common_step(run_a, run_b)
        comparison.check_components(itertools.chain.from_iterable(pairs.values()), components)

        def is_equal(step: int) -> bool:
            found, _ = _compare(pairs[step], components, read_unknown=logical or with_tensors, read_all=False)
            if not found.is_equal and not found.is_different:
                comparison.verdict(found, f"step {step}: ")
            return found.is_equal

        result = (parting.find_in_all if every else parting.find)(list(pairs), is_equal)
        first = result.first_different
        parted = (
            None if first is None else _compare(pairs[first], components, read_unknown=logical, read_all=with_tensors)
        )
    only = sorted(ours.keys() - pairs.keys()), sorted(theirs.keys() - pairs.keys())
    if as_json:
        at = None if first is None or parted is None else differences.data(*pairs[first], *parted)
        selection.write_json("fgckpt.bisect/1", _data((run_a, run_b), list(pairs), only, result, at))
    else:
        click.echo(_steps(list(pairs), only, result))
        for line in _answer(list(pairs), result, is_halved=not every):
            click.echo(line)
        if first is not None and parted is not None:
            click.echo()
            one, other = pairs[first]
            differences.write(one, other, *parted, every=False, more=_list_all(one, other, components))
    if first is None:
        sides.refuse_damaged_after(list(pairs)[-1], catalogs)
    return 0 if first is None else 1


def _scan(run: Path) -> Catalog:
    selection.refuse_checkpoint(run)
    return selection.scan(run)


def _compare(pair: Pair, components: Sequence[str], *, read_unknown: bool, read_all: bool) -> tuple[Comparison, Deltas]:
    found = comparison.compare(*pair, components)
    is_unclear = not found.is_equal and not found.is_different
    if read_all or (read_unknown and is_unclear):
        return comparison.measured(*pair, found)
    return found, {}


# ---- for people


def _list_all(a: Checkpoint, b: Checkpoint, components: Sequence[str]) -> str:
    """The command that lists all items that differ."""
    chosen = [word for key in components for word in ("-c", key)]
    return shlex.join(["fgckpt", "diff", str(a.path), str(b.path), *chosen, "--all"])


def _steps(common: Sequence[int], only: tuple[Sequence[int], Sequence[int]], result: Parting) -> str:
    span = f"{common[0]}" if len(common) == 1 else f"{common[0]} to {common[-1]}"
    return (
        f"{text.plural(len(common), 'common step')} ({span}), {len(result.compared):,} compared; "
        f"{len(only[0]):,} only in A, {len(only[1]):,} only in B"
    )


def _answer(common: Sequence[int], result: Parting, *, is_halved: bool) -> Iterator[str]:
    if result.first_different is None:
        yield (
            f"equal at step {common[-1]}, the last common one, so they have not parted before: runs that part stay apart "
            "(--all compares every step)"
            if is_halved and len(common) > 1
            else f"equal at {text.plural(len(common), 'common step')}"
        )
        return
    if result.last_equal is None:
        yield f"they differ from the first common step, {result.first_different}: they parted at it or before"
    else:
        yield f"equal up to step {result.last_equal}, different at step {result.first_different}"
    if again := result.equal_again:
        more = ", …" if len(again) > _NUM_NAMED_STEPS else ""
        named = ", ".join(map(str, again[:_NUM_NAMED_STEPS]))
        yield f"equal again at {text.plural(len(again), 'later step')}: {named}{more}"


# ---- for programs


def _data(
    runs: tuple[Path, Path],
    common: Sequence[int],
    only: tuple[Sequence[int], Sequence[int]],
    result: Parting,
    at: dict[str, Any] | None,
) -> dict[str, Any]:
    """`at` is the comparison at the first step that differs, as `fgckpt diff` gives it."""
    return {
        "a": str(runs[0].absolute()),
        "b": str(runs[1].absolute()),
        "common_steps": list(common),
        "only_in_a": list(only[0]),
        "only_in_b": list(only[1]),
        "compared": list(result.compared),
        "last_equal": result.last_equal,
        "first_different": result.first_different,
        "equal_again": list(result.equal_again),
        "at": at,
    }
