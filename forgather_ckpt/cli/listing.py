"""`fgckpt ls`: the checkpoints of a run directory, one line each, from their manifests alone."""

import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from forgather_ckpt import files, paths
from forgather_ckpt.catalog import Catalog, Checkpoint
from forgather_ckpt.cli import selection, table, text
from forgather_ckpt.cli.table import Column, Table
from forgather_ckpt.manifest import CheckpointManifest

_USUAL_METRICS = ("eval_loss", "loss")
_NUM_NAMED = 3


@click.command("ls", short_help="List the checkpoints of a run directory.")
@click.argument(
    "directory", type=click.Path(file_okay=False, path_type=Path), envvar="FGCKPT_DIR", default=".", metavar="[DIR]"
)
@selection.json_option
def ls(directory: Path, as_json: bool) -> None:
    """\b
    Example: fgckpt ls runs/gpt2

    List the checkpoints of the run directory DIR, newest first. DIR is $FGCKPT_DIR, else the current directory,
    unless given. STATE is "ok" for a committed checkpoint: its manifest is whole and all files have their sizes.
    `fgckpt verify` checks the bytes too.
    """
    selection.refuse_checkpoint(directory)
    catalog = selection.scan(directory)
    if as_json:
        selection.write_json("fgckpt.ls/1", _data(directory, catalog))
        return
    if catalog.checkpoints or catalog.rejected:
        table.write(listing(catalog, datetime.datetime.now(datetime.UTC)))
    click.echo(_summary(directory, catalog))


def listing(catalog: Catalog, now: datetime.datetime) -> Table:
    """The table: committed checkpoints, newest first, then what only looks like one."""
    metric = shown_metric(catalog.checkpoints)
    columns = [
        Column("STEP", "right"),
        Column("EPOCH", "right"),
        Column("AGE", "right"),
        Column("KIND"),
        *([] if metric is None else [Column(text.printable(metric), "right")]),
        Column("SIZE", "right"),
        Column("FILES", "right"),
        Column("STATE"),
    ]
    rows = [_row(checkpoint, metric, now) for checkpoint in catalog.checkpoints]
    for rejected in reversed(catalog.rejected):
        step = paths.step_in(rejected.path.name)
        first = text.printable(rejected.path.name) if step is None else str(step)
        rows.append([first, *["-"] * (len(columns) - 2), f"rejected: {text.printable(rejected.reason)}"])
    return Table(columns, rows)


def shown_metric(checkpoints: Sequence[Checkpoint]) -> str | None:
    """The one metric that has a column: the usual ones first, else the first that the newest checkpoint has."""
    named = [name for checkpoint in checkpoints for name in checkpoint.manifest.metrics]
    return next((name for name in _USUAL_METRICS if name in named), named[0] if named else None)


def _row(checkpoint: Checkpoint, metric: str | None, now: datetime.datetime) -> list[str]:
    manifest = checkpoint.manifest
    name = checkpoint.path.name
    return [
        str(manifest.step),
        "-" if manifest.epoch is None else text.epoch(manifest.epoch),
        age_of(manifest.created, now),
        text.printable(manifest.kind),
        *([] if metric is None else [_metric(manifest, metric)]),
        text.size(manifest.num_bytes),
        str(len(manifest.files)),
        "ok" if name == paths.checkpoint(manifest.step) else f"ok, as {text.printable(name)}",
    ]


def _metric(manifest: CheckpointManifest, name: str) -> str:
    return text.shortened(text.value(manifest.metrics[name]), 20) if name in manifest.metrics else "-"


def age_of(created: str, now: datetime.datetime) -> str:
    try:
        return text.age((now - datetime.datetime.fromisoformat(created)).total_seconds())
    except (ValueError, TypeError):  # TypeError: a time without a zone
        return "?"


def _summary(directory: Path, catalog: Catalog) -> str:
    if (newer := selection.of_newer_version(catalog)) is not None:
        resume = f"resume refused: {text.printable(newer.path.name)} is of a newer format"
    elif catalog.checkpoints:
        resume = f"resume → step {catalog.checkpoints[0].manifest.step}"
    else:
        resume = "nothing to resume from"
    parts = [
        text.plural(len(catalog.checkpoints), "checkpoint"),
        text.size(sum(checkpoint.manifest.num_bytes for checkpoint in catalog.checkpoints)),
        f"free {text.size(files.free_bytes(directory))}",
        resume,
    ]
    saves = [path.name for path in catalog.unfinished if path.name.startswith(paths.TEMPORARY_PREFIX)]
    removals = [path.name for path in catalog.unfinished if path.name not in saves]
    for names, what in ((saves, "unfinished save"), (removals, "unfinished removal")):
        if names:
            shown = ", ".join([*map(text.printable, names[:_NUM_NAMED]), *(["…"] if len(names) > _NUM_NAMED else [])])
            parts.append(f"{text.plural(len(names), what)} ignored ({shown})")
    return "  ".join(parts)


def _data(directory: Path, catalog: Catalog) -> dict[str, Any]:
    is_open = catalog.checkpoints and selection.of_newer_version(catalog) is None
    newest = catalog.checkpoints[0] if is_open else None
    return {
        "run": str(directory.absolute()),
        "checkpoints": [
            {
                "path": str(checkpoint.path.absolute()),
                "step": checkpoint.manifest.step,
                "sequence": checkpoint.manifest.sequence,
                "epoch": checkpoint.manifest.epoch,
                "kind": checkpoint.manifest.kind,
                "created": checkpoint.manifest.created,
                "world_size": checkpoint.manifest.world_size,
                "metrics": dict(checkpoint.manifest.metrics),
                "bytes": checkpoint.manifest.num_bytes,
                "files": len(checkpoint.manifest.files),
                "digest": checkpoint.manifest.digest,
            }
            for checkpoint in catalog.checkpoints
        ],
        "rejected": [
            {"path": str(rejected.path.absolute()), "reason": rejected.reason} for rejected in catalog.rejected
        ],
        "unfinished": [str(path.absolute()) for path in catalog.unfinished],
        "resume": None if newest is None else {"step": newest.manifest.step, "path": str(newest.path.absolute())},
        "free_bytes": files.free_bytes(directory),
    }
