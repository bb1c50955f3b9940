"""Which run directory and which checkpoints a command is about, and the options that all commands share."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, TypeVar

import click

from forgather_ckpt import catalog, choice, paths, resume, strict_json
from forgather_ckpt.catalog import Catalog, Rejected
from forgather_ckpt.cli import text
from forgather_ckpt.errors import CheckpointNotFound, UnsupportedVersion

F = TypeVar("F", bound=Callable[..., Any])


class Refused(click.ClickException):
    """What was asked for is possible, but not as things are; nothing was done."""

    exit_code = 4

    def show(self, file: IO[Any] | None = None) -> None:
        click.echo(f"fgckpt: {text.printable(self.message)}", err=True)


def run_option(command: F) -> F:
    """`--dir`: the run directory."""
    return click.option(
        "-d",
        "--dir",
        "run",
        type=click.Path(file_okay=False, path_type=Path),
        envvar="FGCKPT_DIR",
        show_envvar=True,
        default=".",
        show_default="the current directory",
        help="The run directory: output_dir of the training.",
    )(command)


def run_argument(command: F) -> F:
    """`[DIR]`: the run directory, of commands that are about nothing else."""
    return click.argument(
        "run", type=click.Path(file_okay=False, path_type=Path), envvar="FGCKPT_DIR", default=".", metavar="[DIR]"
    )(command)


def json_option(command: F) -> F:
    """`--json`: data for programs."""
    return click.option("--json", "as_json", is_flag=True, help="Write one JSON object to stdout.")(command)


def write_json(schema: str, data: dict[str, Any]) -> None:
    click.echo(strict_json.dumps({"schema": schema, **data}).decode("ascii"))


def scan(run: Path) -> Catalog:
    """The catalog of a run directory that must exist."""
    if not run.is_dir():
        raise CheckpointNotFound(f"there is no run directory {run}", path=str(run))
    return catalog.scan(run)


def refuse_checkpoint(run: Path) -> None:
    """A checkpoint is no run directory; who names one means what is in it."""
    if os.path.lexists(run / paths.MANIFEST):
        raise CheckpointNotFound(
            f"{str(run)!r} is a checkpoint, not a run directory; see `fgckpt show {run}`, or `fgckpt ls {run.absolute().parent}`",
            path=str(run),
        )


def of_newer_version(found: Catalog) -> Rejected | None:
    """A checkpoint that a newer version wrote: a resume from "latest" refuses to take an older one for it."""
    return next((rejected for rejected in found.rejected if isinstance(rejected.error, UnsupportedVersion)), None)


def find(run: Path, selector: str) -> Path:
    """The directory that a selector means. One given by its path, or by its step alone, need not be committed."""
    if not resume.is_selector(selector):
        return _by_path(run, selector)
    found = scan(run)
    try:
        return choice.chosen_of(found, selector)[0].path
    except CheckpointNotFound as err:
        step = resume.step_of(selector)
        for rejected in found.rejected:
            if step is not None and rejected.path.name == paths.checkpoint(step):
                return rejected.path
        raise CheckpointNotFound(f"{err.message} (in {run})", path=str(run)) from None


def _by_path(run: Path, selector: str) -> Path:
    for path in (Path(selector), run / selector):
        if os.path.lexists(path / paths.MANIFEST):
            return path
    if Path(selector).is_dir():
        raise CheckpointNotFound(f"{selector!r} is not a checkpoint; if it is a run directory, say --dir {selector}")
    directory, at, _ = selector.rpartition("@")
    if at and not Path(directory).is_dir():
        raise CheckpointNotFound(f"{selector!r} selects no checkpoint: there is no run directory {directory}")
    raise CheckpointNotFound(
        f"{selector!r} selects no checkpoint; use {resume.SELECTORS}, or the path of a checkpoint directory"
    )
