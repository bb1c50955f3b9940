"""`fgckpt ls`: the checkpoints of a run directory, one line each, from their manifests and what was noted beside them."""

import datetime
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from forgather_ckpt import annotations, choice, files, paths, pruning, retention
from forgather_ckpt.annotations import Annotations
from forgather_ckpt.catalog import Catalog, Checkpoint
from forgather_ckpt.cli import selection, table, text
from forgather_ckpt.cli.table import Column, Table
from forgather_ckpt.errors import DeclarationError
from forgather_ckpt.policies import Best, Stored

_USUAL_METRICS = ("eval_loss", "loss")
_NUM_NAMED = 3
_NUM_BEST = 3
_SIGNAL = re.compile(r"\bSIG[A-Z][A-Z0-9]*\b")


@dataclass(frozen=True)
class Standing:
    """What a checkpoint is in its run: roles, and what became known of it after it was saved."""

    roles: tuple[str, ...]
    metrics: Mapping[str, Any]
    noted: Annotations


@click.command("ls", short_help="List the checkpoints of a run directory.")
@selection.run_argument
@selection.json_option
def ls(run: Path, as_json: bool) -> None:
    """\b
    Example: fgckpt ls runs/gpt2

    List the checkpoints of the run directory DIR, newest first. DIR is $FGCKPT_DIR, else the current directory,
    unless given. ROLES say what a checkpoint is there for: latest, best (by the metric that has a column), epoch, emergency
    (after which signal), final, pinned, quarantined; else periodic. STATE is "ok" for a committed checkpoint: its
    manifest is whole and all files have their sizes. `fgckpt verify` checks the bytes too.
    """
    selection.refuse_checkpoint(run)
    catalog = selection.scan(run)
    best = _ranking(catalog)
    noted = [annotations.read(one.path, one.manifest.digest) for one in catalog.checkpoints]
    standings = standings_of(pruning.survey(catalog), noted, best)
    if as_json:
        selection.write_json("fgckpt.ls/1", _data(run, catalog, standings))
        return
    if catalog.checkpoints or catalog.rejected:
        metric = shown_metric([one.metrics for one in standings], best)
        table.write(listing(catalog, standings, metric, datetime.datetime.now(datetime.UTC)))
    click.echo(_summary(run, catalog, standings))


def _ranking(catalog: Catalog) -> Best | None:
    try:
        return choice.ranking(catalog)
    except DeclarationError:  # somebody's training arguments; that nothing is the best is seen in the list
        return None


def standings_of(found: Sequence[Stored], noted: Sequence[Annotations], best: Best | None) -> list[Standing]:
    """What each checkpoint is in its run, newest first as they are given."""
    counted = retention.countable(found)
    derived = {one.path: ["latest"] for one in counted[:1]}
    for place, (one, _) in enumerate(best.ranked(counted)[: max(_NUM_BEST, best.n)] if best else []):
        derived.setdefault(one.path, []).append(f"best~{place}" if place else "best")
    return [
        Standing((*derived.get(one.path, []), *_own_roles(one)), one.metrics, said)
        for one, said in zip(found, noted, strict=True)
    ]


def _own_roles(one: Stored) -> Iterator[str]:
    if one.kind != "periodic":
        yield one.kind
    if one.is_pinned:
        yield "pinned"
    if one.is_quarantined:
        yield "quarantined"


def listing(catalog: Catalog, standings: Sequence[Standing], metric: str | None, now: datetime.datetime) -> Table:
    """The table: committed checkpoints, newest first, then what only looks like one."""
    columns = [
        Column("STEP", "right"),
        Column("EPOCH", "right"),
        Column("AGE", "right"),
        Column("ROLES"),
        *([] if metric is None else [Column(text.printable(metric), "right")]),
        Column("SIZE", "right"),
        Column("FILES", "right"),
        Column("STATE"),
    ]
    rows = [
        _row(checkpoint, standing, metric, now)
        for checkpoint, standing in zip(catalog.checkpoints, standings, strict=True)
    ]
    for rejected in reversed(catalog.rejected):
        step = paths.step_in(rejected.path.name)
        first = text.printable(rejected.path.name) if step is None else str(step)
        rows.append([first, *["-"] * (len(columns) - 2), f"rejected: {text.printable(rejected.reason)}"])
    return Table(columns, rows)


def shown_metric(metrics: Sequence[Mapping[str, Any]], best: Best | None) -> str | None:
    """The one metric that has a column: the one that ranks, the usual ones, else the first that the newest checkpoint has."""
    named = [name for of_one in metrics for name in of_one]
    preferred = [*([] if best is None else [best.metric]), *_USUAL_METRICS]
    return next((name for name in preferred if name in named), named[0] if named else None)


def _row(checkpoint: Checkpoint, standing: Standing, metric: str | None, now: datetime.datetime) -> list[str]:
    manifest = checkpoint.manifest
    return [
        str(manifest.step),
        "-" if manifest.epoch is None else text.epoch(manifest.epoch),
        age_of(manifest.created, now),
        text.printable(", ".join(_with_signal(role, standing.noted) for role in standing.roles) or manifest.kind),
        *([] if metric is None else [_metric(standing.metrics, metric)]),
        text.size(manifest.num_bytes),
        str(len(manifest.files)),
        _state(checkpoint, standing.noted),
    ]


def _with_signal(role: str, noted: Annotations) -> str:
    """`emergency SIGTERM`, where that was noted."""
    signal = _SIGNAL.search("; ".join(noted.notes)) if role == "emergency" else None
    return role if signal is None else f"{role} {signal[0]}"


def _metric(metrics: Mapping[str, Any], name: str) -> str:
    return text.shortened(text.value(metrics[name]), 20) if name in metrics else "-"


def _state(checkpoint: Checkpoint, noted: Annotations) -> str:
    name = checkpoint.path.name
    parts = ["ok"]
    if name != paths.checkpoint(checkpoint.manifest.step):
        parts.append(f"as {text.printable(name)}")
    if noted.quarantined is not None:
        parts.append(f"quarantined: {text.printable(noted.quarantined)}")
    return ", ".join(parts)


def age_of(created: str, now: datetime.datetime) -> str:
    try:
        return text.age((now - datetime.datetime.fromisoformat(created)).total_seconds())
    except (ValueError, TypeError):  # TypeError: a time without a zone
        return "?"


def _resumed_next(catalog: Catalog, standings: Sequence[Standing]) -> Checkpoint | None:
    """What a resume from "latest" takes, if it is not damaged; None where all are quarantined."""
    pairs = zip(catalog.checkpoints, standings, strict=True)
    return next((checkpoint for checkpoint, standing in pairs if "latest" in standing.roles), None)


def _summary(directory: Path, catalog: Catalog, standings: Sequence[Standing]) -> str:
    if (newer := selection.of_newer_version(catalog)) is not None:
        resume = f"resume refused: {text.printable(newer.path.name)} is of a newer format"
    elif (taken := _resumed_next(catalog, standings)) is not None:
        resume = f"resume → step {taken.manifest.step}"
    elif catalog.checkpoints:
        resume = "resume refused: all checkpoints are quarantined"
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


def _data(directory: Path, catalog: Catalog, standings: Sequence[Standing]) -> dict[str, Any]:
    taken = _resumed_next(catalog, standings) if selection.of_newer_version(catalog) is None else None
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
                "roles": list(standing.roles),
                "metrics": dict(standing.metrics),
                "pinned": standing.noted.is_pinned,
                "quarantined": standing.noted.quarantined,
                "notes": list(standing.noted.notes),
                "bytes": checkpoint.manifest.num_bytes,
                "files": len(checkpoint.manifest.files),
                "digest": checkpoint.manifest.digest,
            }
            for checkpoint, standing in zip(catalog.checkpoints, standings, strict=True)
        ],
        "rejected": [
            {"path": str(rejected.path.absolute()), "reason": rejected.reason} for rejected in catalog.rejected
        ],
        "unfinished": [str(path.absolute()) for path in catalog.unfinished],
        "resume": None if taken is None else {"step": taken.manifest.step, "path": str(taken.path.absolute())},
        "free_bytes": files.free_bytes(directory),
    }
