"""`fgckpt diff`: which items differ between two checkpoints, from their manifests and indexes."""

import functools
import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from forgather_ckpt import catalog, comparison
from forgather_ckpt.catalog import Checkpoint
from forgather_ckpt.cli import differences, selection, sides, text
from forgather_ckpt.cli.differences import Deltas
from forgather_ckpt.comparison import Change, Comparison, Difference, Side

if TYPE_CHECKING:
    from forgather_ckpt.deltas import Delta


def component_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """`--component`, which may be given several times."""
    return click.option(
        "-c", "--component", "components", multiple=True, metavar="KEY", help="Compare only this component; repeatable."
    )(command)


logical_option = click.option(
    "--logical", is_flag=True, help="Read the tensors that were cut for other ranks, of which no digests tell."
)


@click.command("diff", short_help="Tell which items differ between two checkpoints.")
@click.argument("a", metavar="A")
@click.argument("b", metavar="B")
@selection.run_option
@component_option
@click.option(
    "--tensors", "with_tensors", is_flag=True, help="Read the tensors that differ; tell how far apart they are."
)
@logical_option
@click.option(
    "--all", "every", is_flag=True, help=f"List all items that differ, not the first {differences.NUM_SHOWN}."
)
@selection.json_option
def diff(
    a: str,
    b: str,
    run: Path,
    components: tuple[str, ...],
    with_tensors: bool,
    logical: bool,
    every: bool,
    as_json: bool,
) -> int:
    """\b
    Examples:
      fgckpt diff 100 200 -d runs/a
      fgckpt diff runs/a runs/b
      fgckpt diff runs/a@100 runs/replay@100 --tensors

    Tell which items differ between the checkpoints A and B: SELECTORs (in the run directory --dir), checkpoint
    directories, RUN@SELECTOR, or two run directories, which stand for the newest step that both have. Compared are
    the digests that were taken when they were written; no tensor is read, and it does not matter how many ranks wrote
    them. Exit code 0 if all is equal, 1 if something differs, 2 if that cannot be told.
    """
    with sides.trouble_is_no_difference():
        one, other = sides.find_both(run, a, b)
        check_components([one, other], components)
        found = compare(one, other, components)
        deltas: Deltas = {}
        if with_tensors:
            found, deltas = measured(one, other, found)
        elif logical:
            found, _ = measured(one, other, found, only={Change.UNKNOWN})
    if as_json:
        selection.write_json("fgckpt.diff/1", differences.data(one, other, found, deltas))
    else:
        differences.write(one, other, found, deltas, every=every)
    return verdict(found)


def verdict(found: Comparison, where: str = "") -> int:
    """The exit code. `sides.Incomparable` where nothing is known to differ, and something is not known to be equal."""
    if found.is_different:
        return 1
    if found.is_equal:
        return 0
    num_unknown = sum(component.count(Change.UNKNOWN) for component in found.components)
    raise sides.Incomparable(
        f"{where}{text.plural(num_unknown, 'tensor')} cannot be told to be equal or not without reading: they were cut into "
        "other pieces in A than in B; add --logical"
    )


def check_components(checkpoints: Iterable[Checkpoint], components: Collection[str]) -> None:
    """Refuse what is no component of any of the checkpoints."""
    known = dict.fromkeys(key for checkpoint in checkpoints for key in checkpoint.manifest.components)
    if strangers := [key for key in components if key not in known]:
        raise click.UsageError(f"there is no component {strangers[0]!r}; known: {', '.join(known) or 'none'}")


def compare(a: Checkpoint, b: Checkpoint, components: Collection[str]) -> Comparison:
    return comparison.compare(_side(a), _side(b), components or None)


def _side(checkpoint: Checkpoint) -> Side:
    return Side(checkpoint.manifest, functools.partial(catalog.read_index, checkpoint.path, checkpoint.manifest))


def measured(
    a: Checkpoint, b: Checkpoint, found: Comparison, only: Collection[Change] = tuple(Change)
) -> tuple[Comparison, Deltas]:
    """Read the tensors that differ, or may. What only the bytes could tell is known after it."""
    try:
        from forgather_ckpt import deltas  # torch and numpy, for those who ask only
    except ImportError as err:
        raise click.UsageError(f"reading tensors needs torch and numpy, which cannot be imported here: {err}") from err

    read: dict[tuple[str, str, str], Delta] = {}
    to_read = [
        (difference, pair)
        for difference in found.differences
        if (pair := difference.tensors) and difference.change in only
    ]
    with _progress(len(to_read)) as advance:
        for difference, (one, other) in to_read:
            read[_place(difference)] = deltas.measure(difference.component, (a.path, one), (b.path, other))
            advance()
    settled = found.settled(lambda difference: not read[_place(difference)].elements.num_different)
    kept = {
        number: read[_place(difference)]
        for number, difference in enumerate(settled.differences)
        if _place(difference) in read
    }
    return settled, kept


def _place(difference: Difference) -> tuple[str, str, str]:
    return difference.component, difference.entry, difference.name


@contextmanager
def _progress(num_tensors: int) -> Iterator[Callable[[], None]]:
    """Tell a person who looks how many tensors have been read."""
    num_done = 0

    def advance() -> None:
        nonlocal num_done
        num_done += 1
        if sys.stderr.isatty():
            click.echo(f"\rread {num_done:,} of {text.plural(num_tensors, 'tensor')}", err=True, nl=False)

    yield advance
    if num_done and sys.stderr.isatty():
        click.echo("\r\x1b[K", err=True, nl=False)
