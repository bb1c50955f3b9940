"""`fgckpt pin` and `fgckpt unpin`: a person's word that a checkpoint stays, whatever the policies say."""

import dataclasses
from pathlib import Path
from typing import Any

import click

from forgather_ckpt import annotations, catalog
from forgather_ckpt.annotations import Annotations
from forgather_ckpt.cli import selection, text

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
    _annotate(selectors, run, note, as_json, is_pinned=True)


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
    _annotate(selectors, run, note, as_json, is_pinned=False)


def _annotate(selectors: tuple[str, ...], run: Path, note: str | None, as_json: bool, *, is_pinned: bool) -> None:
    """Pin or unpin all that are meant; where one of them is not there, none."""

    def change(noted: Annotations) -> Annotations:
        notes = noted.notes if note is None else (*noted.notes, note)
        return dataclasses.replace(noted, is_pinned=is_pinned, notes=notes)

    found = [catalog.read_checkpoint(selection.find(run, selector)) for selector in selectors]
    told: list[dict[str, Any]] = []
    for checkpoint in {checkpoint.path.resolve(): checkpoint for checkpoint in found}.values():
        noted = annotations.annotate(checkpoint.path, change)
        if not as_json:
            click.echo(f"{'pinned' if is_pinned else 'unpinned'} {text.printable(str(checkpoint.path))}")
        told.append(
            {
                "path": str(checkpoint.path.absolute()),
                "step": checkpoint.manifest.step,
                "pinned": noted.is_pinned,
                "notes": list(noted.notes),
            }
        )
    if as_json:
        selection.write_json(f"fgckpt.{'pin' if is_pinned else 'unpin'}/1", {"checkpoints": told})
