"""`fgckpt pin` and `quarantine`: a person's word that a checkpoint stays, whatever the policies say, or is set aside."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from forgather_ckpt import annotations, catalog, choice, resume
from forgather_ckpt.annotations import Annotations
from forgather_ckpt.catalog import Checkpoint
from forgather_ckpt.cli import selection, text
from forgather_ckpt.errors import CheckpointNotFound

Change = Callable[[Annotations], Annotations]

_selectors = click.argument("selectors", nargs=-1, required=True, metavar="SELECTOR...")
_note_option = click.option("--note", metavar="TEXT", help="Why, to be noted beside the checkpoint.")


@click.command("pin", short_help="Keep checkpoints, whatever the policies say.")
@_selectors
@selection.run_option
@_note_option
@selection.json_option
def pin(selectors: tuple[str, ...], run: Path, note: str | None, as_json: bool) -> None:
    """\b
    Example: fgckpt pin best 15000 -d runs/gpt2 --note "for the paper"

    Pin checkpoints: neither a training nor `fgckpt prune` removes them, until `fgckpt unpin`. A job may be training.
    """
    _annotate(_find(run, selectors), as_json, "pinned", _noting(note, is_pinned=True))


@click.command("unpin", short_help="Leave checkpoints to the policies again.")
@_selectors
@selection.run_option
@_note_option
@selection.json_option
def unpin(selectors: tuple[str, ...], run: Path, note: str | None, as_json: bool) -> None:
    """\b
    Example: fgckpt unpin 15000 -d runs/gpt2

    Take the pins away: the next save or `fgckpt prune` removes those that no policy keeps.
    """
    _annotate(_find(run, selectors), as_json, "unpinned", _noting(note, is_pinned=False))


@click.command("quarantine", short_help="Set checkpoints aside: no resume takes them by itself.")
@_selectors
@selection.run_option
@click.option("--why", required=True, metavar="TEXT", help="What is wrong, to be noted beside the checkpoint.")
@selection.json_option
def quarantine(selectors: tuple[str, ...], run: Path, why: str, as_json: bool) -> None:
    """\b
    Example: fgckpt quarantine 15000 -d runs/gpt2 --why "saved after the loss went up"

    Set checkpoints aside. "latest", "best" and the like pass over them, no policy counts them, and nothing removes them;
    only their step or path still names them. A job may be training.
    """
    found = _find(run, selectors)
    _annotate(found, as_json, "quarantined", lambda noted: dataclasses.replace(noted, quarantined=why))


@click.command("unquarantine", short_help="Take checkpoints for good again.")
@_selectors
@selection.run_option
@selection.json_option
def unquarantine(selectors: tuple[str, ...], run: Path, as_json: bool) -> None:
    """\b
    Example: fgckpt unquarantine 15000 -d runs/gpt2

    Take back `fgckpt quarantine`, or what `fgckpt verify --quarantine` has done. Checkpoints are named by their steps or
    paths.
    """
    found = [one for selector in selectors for one in _find_quarantined(run, selector)]
    _annotate(found, as_json, "unquarantined", lambda noted: dataclasses.replace(noted, quarantined=None))


def _noting(note: str | None, *, is_pinned: bool) -> Change:
    def change(noted: Annotations) -> Annotations:
        notes = noted.notes if note is None else (*noted.notes, note)
        return dataclasses.replace(noted, is_pinned=is_pinned, notes=notes)

    return change


def _find(run: Path, selectors: Sequence[str]) -> list[Checkpoint]:
    return [catalog.read_checkpoint(selection.find(run, selector)) for selector in selectors]


def _find_quarantined(run: Path, selector: str) -> list[Checkpoint]:
    """The quarantined ones of a step, also where it has been saved again since, or the one at a path."""
    if not resume.is_selector(selector):
        found = _find(run, [selector])
        aside = choice.quarantined(found)
    else:
        found = list(selection.scan(run).checkpoints)
        aside = choice.quarantined(found)
        found = [one for one in found if one.manifest.step == resume.step_of(selector)]
    if meant := [one for one in found if one.path in aside]:
        return meant
    known = ", ".join(path.name for path in aside) or "none"
    raise CheckpointNotFound(f"{selector!r} names no quarantined checkpoint, by its step or path; quarantined: {known}")


def _annotate(found: Sequence[Checkpoint], as_json: bool, done: str, change: Change) -> None:
    told: list[dict[str, Any]] = []
    for checkpoint in {checkpoint.path.resolve(): checkpoint for checkpoint in found}.values():
        noted = annotations.annotate(checkpoint.path, change, digest=checkpoint.manifest.digest)
        if not as_json:
            click.echo(f"{done} {text.printable(str(checkpoint.path))}")
        told.append(
            {
                "path": str(checkpoint.path.absolute()),
                "step": checkpoint.manifest.step,
                "pinned": noted.is_pinned,
                "quarantined": noted.quarantined,
                "notes": list(noted.notes),
            }
        )
    if as_json:
        selection.write_json(f"fgckpt.{click.get_current_context().info_name}/1", {"checkpoints": told})
