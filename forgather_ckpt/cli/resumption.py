"""`fgckpt resume-command`: the command that goes on from a checkpoint, and what other arguments would do to the run."""

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from forgather_ckpt import annotations, catalog
from forgather_ckpt.catalog import Checkpoint
from forgather_ckpt.changes import NOT_RECORDED, Change, compare_arguments, text
from forgather_ckpt.cli import selection
from forgather_ckpt.cli.text import printable
from forgather_ckpt.command_line import looks_like_a_flag, options_in, plain_name
from forgather_ckpt.launch import LAUNCHERS, Launcher
from forgather_ckpt.manifest import CheckpointManifest
from forgather_ckpt.resume_command import RESUMING, NotTold, resume_command

_ASSIGNMENT = re.compile(r"[+~]*[A-Za-z_][\w.]*=.*", re.DOTALL)
_TRUTHS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


class _NoTelling(click.ClickException):
    """The checkpoint does not say how its job was started."""

    exit_code = 2


@click.command(
    "resume-command",
    short_help="Print the command that resumes from a checkpoint.",
    context_settings={"ignore_unknown_options": True},
)
@click.argument("words", nargs=-1, type=click.UNPROCESSED, metavar="[SELECTOR] [OPTIONS OF THE SCRIPT]...")
@selection.run_option
@click.option("--compare", is_flag=True, help="Show on stderr what the other arguments do to the run.")
@click.option("--launcher", type=click.Choice(LAUNCHERS), help="Start it with this one; as it was, unless given.")
@click.option("--nodes", type=click.IntRange(min=1), help="On so many nodes; as it was, unless given.")
@click.option(
    "--nproc-per-node", type=click.IntRange(min=1), help="So many processes on each; as it was, unless given."
)
@selection.json_option
def resume_command_(
    words: tuple[str, ...],
    run: Path,
    compare: bool,
    launcher: Launcher | None,
    nodes: int | None,
    nproc_per_node: int | None,
    as_json: bool,
) -> None:
    """\b
    Example: fgckpt resume-command latest -d runs/gpt2 --compare --learning-rate 1e-4

    Print the command that resumes from the checkpoint SELECTOR (latest, unless given): the one that started its job, with
    the script's own option for resuming. Options that are not listed below are the script's: each replaces what it was
    started with, written as the script's own are. Those with a single dash, and those of the same name as one below, go
    behind `--`. Only the command goes to stdout; the table of --compare, and what has to be known before running it, go
    to stderr.
    """
    selector, given = _split(words)
    overrides = _overrides(given)
    checkpoint = catalog.read_checkpoint(selection.find(run, selector))
    manifest = checkpoint.manifest
    launch = manifest.environment.get("launch")
    launch = launch if isinstance(launch, Mapping) else {}
    try:
        command = resume_command(
            launch,
            checkpoint.path.absolute(),
            overrides,
            world_size=manifest.world_size,
            launcher=launcher,
            nodes=nodes,
            processes_per_node=nproc_per_node,
            cwd=Path.cwd(),
        )
    except NotTold as err:
        raise _NoTelling(f"{checkpoint.path}: {err}") from None
    changes = _changes(manifest, launch, overrides, command.world_size or manifest.world_size)
    if as_json:
        selection.write_json(
            "fgckpt.resume-command/1",
            {
                "path": str(checkpoint.path.absolute()),
                "step": manifest.step,
                "command": str(command),
                "words": list(command.words),
                "launcher": command.launcher,
                "world_size": command.world_size,
                "cwd": launch.get("cwd"),
                "changes": [_json_of(change) for change in changes],
                "notes": [*command.notes, *_quarantine_of(checkpoint)],
            },
        )
        return
    if compare:
        click.echo(text(changes, with_same=True, width=shutil.get_terminal_size((100, 24)).columns), err=True)
    for note in (*command.notes, *_quarantine_of(checkpoint)):
        click.echo(f"note: {printable(note)}", err=True)
    click.echo(str(command))


def _split(words: Sequence[str]) -> tuple[str, Sequence[str]]:
    """The selector, if it is the first word, and the script's options."""
    if words and not looks_like_a_flag(words[0]) and (not _ASSIGNMENT.fullmatch(words[0]) or Path(words[0]).exists()):
        return words[0], words[1:]
    return "latest", words


def _overrides(words: Sequence[str]) -> dict[str, str | None]:
    """By name, what the script is to be given; None for a switch."""
    overrides: dict[str, str | None] = {}
    at = 0
    for option in options_in(words):
        if option.start > at:
            break
        overrides[option.name] = option.value
        at = option.stop
    if at < len(words):
        raise click.UsageError(
            f"{printable(words[at])!r} is no option of the script: write --name VALUE, --name=VALUE or name=VALUE"
        )
    return overrides


def _changes(
    manifest: CheckpointManifest, launch: Mapping[str, Any], overrides: Mapping[str, str | None], world_size: int
) -> list[Change]:
    """What the overrides, and another number of ranks, change. What the training arguments do not have is compared with
    the words that the script was started with."""
    before, now = dict(manifest.training_args), dict(manifest.training_args)
    started_with = {option.name: option.value for option in options_in(launch.get("argv", ()))}
    asked = []
    for name, value in overrides.items():
        if name in RESUMING:
            continue
        positive = name.removeprefix("no_")
        if value is None and name != positive and isinstance(before.get(positive), bool):
            asked.append(positive)
            now[positive] = False
            continue
        if value is None and type(before.get(name)) in (int, float, str):
            raise click.UsageError(f"{_spelled(name)}: it has no value; the checkpoint has {before[name]!r} there")
        if name not in before and name in started_with:
            before[name] = True if started_with[name] is None else started_with[name]
        asked.append(name)
        now[name] = _typed(name, value, before.get(name, NOT_RECORDED))
    changes = compare_arguments(
        before, now, saved_world_size=manifest.world_size, world_size=world_size, step=manifest.step
    )
    return [change for change in changes if change.name in (*asked, "world size", "samples per step")]


def _typed(name: str, value: str | None, before: Any) -> Any:
    """The text of an override as the type that the argument had; `UsageError` where it is none."""
    if value is None:
        return True
    kinds: dict[type, str] = {bool: "true or false", int: "a whole number", float: "a number"}
    try:
        match before:
            case bool():
                return _TRUTHS[value.lower()]
            case int():
                return int(value) if re.fullmatch(r"[+-]?\d+", value) else float(value)
            case float():
                return float(value)
            case str():
                return value
            case _:
                return json.loads(value)
    except (KeyError, ValueError):
        if type(before) not in kinds:
            return {"None": None, "True": True, "False": False}.get(value, value)
        raise click.UsageError(
            f"{_spelled(name)} {value}: the checkpoint has {before!r} there; write {kinds[type(before)]}"
        ) from None


def _spelled(name: str) -> str:
    return f"--{plain_name(name).replace('_', '-')}"


def _json_of(change: Change) -> dict[str, Any]:
    """A value that one side does not have is absent."""
    values = {"before": change.before, "after": change.after}
    return {
        "name": change.name,
        **{side: value for side, value in values.items() if value is not NOT_RECORDED},
        "verdict": change.verdict,
        "why": change.why,
    }


def _quarantine_of(checkpoint: Checkpoint) -> list[str]:
    reason = annotations.read(checkpoint.path, checkpoint.manifest.digest).quarantined
    return [] if reason is None else [f"the checkpoint is quarantined: {reason}"]
