"""`fgckpt prune`: remove the checkpoints that no policy keeps, after saying which and why."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import click

from forgather_ckpt import choice, pruning, requests, retention
from forgather_ckpt.catalog import Catalog
from forgather_ckpt.cli import selection, table, text
from forgather_ckpt.cli.selection import Refused
from forgather_ckpt.cli.table import Column, Table
from forgather_ckpt.errors import DeclarationError, StorageError
from forgather_ckpt.lease import Lease
from forgather_ckpt.metrics import Mode
from forgather_ckpt.policies import AnyOf, Best, Emergency, Epochs, Every, Latest, Policy, parts
from forgather_ckpt.pruning import Pruned
from forgather_ckpt.retention import Protected, Verdict

_COUNT = click.IntRange(min=1)
_WHAT_TO_SAY = "say what to keep, such as --keep-last 3 --keep-best 1 --keep-epochs"


def _count_or_all(said: str) -> int | Literal["all"]:
    if said == "all":
        return "all"
    if not (said.isascii() and said.isdigit() and 0 < int(said) < 2**63):
        raise click.BadParameter(f"{said!r} is neither a count from 1 nor 'all'")
    return int(said)


@dataclass(frozen=True)
class _Keep:
    """What the options ask to keep; None where one was not given."""

    last: int | None
    best: int | None
    metric: str | None
    mode: Mode | None
    epochs: int | Literal["all"] | None
    emergency: int | None
    every_steps: int | None
    every_seconds: float | None


@click.command("prune", short_help="Remove checkpoints that no policy keeps; with --yes only.")
@selection.run_option
@click.option("--keep-last", "last", type=_COUNT, metavar="N", help="Keep the newest N, emergencies not counted.")
@click.option("--keep-best", "best", type=_COUNT, metavar="N", help="Keep the best N.")
@click.option("--metric", help="By what --keep-best ranks.  [default: what the training did, or eval_loss]")
@click.option("--mode", type=click.Choice(["min", "max"]), help="Whether the lowest or the highest METRIC is best.")
@click.option(
    "--keep-epochs", "epochs", type=_count_or_all, is_flag=False, flag_value="all", metavar="[N|all]",
    help="Keep those of the ends of the newest N epochs; all, unless N is given.",
)  # fmt: skip
@click.option("--keep-emergency", "emergency", type=_COUNT, metavar="N", help="Keep the newest N emergencies.")
@click.option("--keep-every-steps", "every_steps", type=_COUNT, metavar="N", help="Keep one in every N steps.")
@click.option(
    "--keep-every-seconds", "every_seconds", type=click.FloatRange(min=0, min_open=True), metavar="N",
    help="Keep one in every N seconds.",
)  # fmt: skip
@click.option("--yes", is_flag=True, help="Remove them; without it nothing is removed.")
@selection.json_option
def prune(run: Path, yes: bool, as_json: bool, **options: Any) -> int:
    """\b
    Example: fgckpt prune -d runs/gpt2 --keep-last 3 --keep-best 2

    Say which checkpoints of the run directory would be removed, and why; with --yes, remove them. What any of the
    options keeps stays, and so do the newest, pinned and quarantined ones, and what no save has put there. Without
    options it is the policy of the training that wrote the newest one. What is damaged counts for nothing and stays.

    Refused while a job holds the run directory: that one removes by its own policy.
    """
    keep = _Keep(**options)
    selection.refuse_checkpoint(run)
    with _lease(run) if yes else nullcontext():
        found = selection.scan(run)
        policy = _policy(found, keep) if found.checkpoints else AnyOf(())
        if yes and found.checkpoints:
            pruned = _remove(run, policy)
        else:
            pruned = Pruned(retention.decide(policy, pruning.survey(found)))
    _tell(run, found, policy, pruned, as_json=as_json, is_done=yes)
    if not yes and requests.is_live(run):
        click.echo(
            f"fgckpt: a job is training in {text.printable(str(run))}; while it does, --yes is refused", err=True
        )
    return 5 if pruned.failed else 0


@contextmanager
def _lease(run: Path) -> Iterator[None]:
    """The right to remove, which is a job's while there is one."""
    selection.scan(run)  # a run directory that is not there is not made
    if requests.is_live(run):
        raise Refused(
            f"a job is training in {run}: it removes checkpoints by its own policy. Wait for its end, or end it with "
            f"fgckpt stop {run} --wait 600"
        )
    lease = Lease(run)
    try:
        yield
    finally:
        lease.release()


def _remove(run: Path, policy: Policy) -> Pruned:
    pruned = pruning.prune(run, policy, Protected())
    if not pruned.verdicts:
        raise StorageError("nothing was removed, for the reason given above", path=str(run))
    return pruned


# ---- the policy


def _policy(found: Catalog, keep: _Keep) -> Policy:
    if keep.best is None and (keep.metric is not None or keep.mode is not None):
        raise click.UsageError("--metric and --mode are about --keep-best; give --keep-best N too")
    try:
        asked = list(_asked(found, keep))
    except DeclarationError as err:
        raise click.UsageError(err.message) from None
    return AnyOf(tuple(asked)) if asked else _policy_of_training(found)


def _asked(found: Catalog, keep: _Keep) -> Iterator[Policy]:
    if keep.last is not None:
        yield Latest(keep.last)
    if keep.best is not None:
        yield _best(found, keep.best, keep.metric, keep.mode)
    if keep.epochs is not None:
        yield Epochs(None if keep.epochs == "all" else keep.epochs)
    if keep.emergency is not None:
        yield Emergency(keep.emergency)
    if keep.every_steps is not None:
        yield Every(steps=keep.every_steps)
    if keep.every_seconds is not None:
        yield Every(seconds=keep.every_seconds)


def _best(found: Catalog, n: int, metric: str | None, mode: Mode | None) -> Best:
    """The policy that keeps the best; refused where it could rank none and would let all of them go."""
    try:
        usual = Best(n, metric, mode) if metric is not None else choice.ranking(found)
    except DeclarationError as err:
        raise click.UsageError(f"{err.message}. Here: --metric NAME --mode min, or --mode max") from None
    best = Best(n, usual.metric, mode or usual.mode)
    stored = retention.countable(pruning.survey(found))
    if not best.ranked(stored):
        has = sorted({name for one in stored for name in one.metrics})
        raise Refused(
            f"no checkpoint has a finite {best.metric!r}, so --keep-best would keep none; metrics that they have: "
            f"{', '.join(has) or 'none'}. Use --metric NAME, or leave --keep-best out"
        )
    return best


def _policy_of_training(found: Catalog) -> Policy:
    newest = found.checkpoints[0]
    try:
        policy = retention.from_training_arguments(newest.manifest.training_args)
    except DeclarationError as err:
        raise click.UsageError(
            f"the training arguments in {newest.path.name} give no policy: {err.message}. Here, {_WHAT_TO_SAY}"
        ) from None
    if policy is None:
        raise click.UsageError(
            f"the training arguments in {newest.path.name} do not tell what to keep (no save_total_limit); {_WHAT_TO_SAY}"
        )
    return policy


# ---- what is told


def _tell(run: Path, found: Catalog, policy: Policy, pruned: Pruned, *, as_json: bool, is_done: bool) -> None:
    sizes = {checkpoint.path: checkpoint.manifest.num_bytes for checkpoint in found.checkpoints}
    if as_json:
        selection.write_json("fgckpt.prune/1", _data(run, found, policy, pruned, sizes, is_done=is_done))
        return
    if pruned.verdicts or found.rejected:
        table.write(_table(found, pruned, sizes))
    if pruned.verdicts:
        click.echo(f"policy: {text.printable(' | '.join(map(repr, parts(policy))))}")
    click.echo(_summary(pruned, sizes, is_done=is_done))


def _table(found: Catalog, pruned: Pruned, sizes: dict[Path, int]) -> Table:
    columns = [Column("VERDICT"), Column("CHECKPOINT"), Column("SIZE", "right"), Column("WHY")]
    rows = []
    for verdict in pruned.verdicts:
        path = verdict.checkpoint.path
        reasons = [*verdict.reasons, *([f"NOT REMOVED: {pruned.failed[path]}"] if path in pruned.failed else [])]
        rows.append(
            [
                "KEEP" if verdict.keep else "REMOVE",
                text.printable(path.name),
                text.size(sizes.get(path, 0)),
                text.printable("; ".join(reasons)),
            ]
        )
    rows += [
        ["SKIP", text.printable(rejected.path.name), "-", text.printable(f"no checkpoint: {rejected.reason}")]
        for rejected in found.rejected
    ]
    return Table(columns, rows)


def _summary(pruned: Pruned, sizes: dict[Path, int], *, is_done: bool) -> str:
    kept = [verdict for verdict in pruned.verdicts if verdict.keep]
    doomed = [verdict for verdict in pruned.verdicts if not verdict.keep]
    if not doomed:
        return f"nothing to remove: {_amount(kept, sizes)}, all kept"
    if not is_done:
        return f"keep {_amount(kept, sizes)}, remove {_amount(doomed, sizes)}: nothing removed yet, add --yes"
    gone = [verdict for verdict in doomed if verdict.checkpoint.path not in pruned.failed]
    left = f"; {len(pruned.failed)} could not be removed" if pruned.failed else ""
    return f"kept {_amount(kept, sizes)}, removed {_amount(gone, sizes)}{left}"


def _amount(verdicts: Sequence[Verdict], sizes: dict[Path, int]) -> str:
    return f"{text.plural(len(verdicts), 'checkpoint')} ({text.size(_num_bytes(verdicts, sizes))})"


def _num_bytes(verdicts: Sequence[Verdict], sizes: dict[Path, int]) -> int:
    return sum(sizes.get(verdict.checkpoint.path, 0) for verdict in verdicts)


def _data(
    run: Path, found: Catalog, policy: Policy, pruned: Pruned, sizes: dict[Path, int], *, is_done: bool
) -> dict[str, Any]:
    return {
        "run": str(run.absolute()),
        "policy": [repr(part) for part in parts(policy)],
        "dry_run": not is_done,
        "checkpoints": [
            {
                "path": str(verdict.checkpoint.path.absolute()),
                "step": verdict.checkpoint.step,
                "sequence": verdict.checkpoint.sequence,
                "bytes": sizes.get(verdict.checkpoint.path, 0),
                "keep": verdict.keep,
                "reasons": list(verdict.reasons),
                "removed": is_done and verdict.checkpoint.path in pruned.removed,
                "error": pruned.failed.get(verdict.checkpoint.path),
            }
            for verdict in pruned.verdicts
        ],
        "skipped": [{"path": str(rejected.path.absolute()), "reason": rejected.reason} for rejected in found.rejected],
        "keep_bytes": _num_bytes([verdict for verdict in pruned.verdicts if verdict.keep], sizes),
        "remove_bytes": _num_bytes([verdict for verdict in pruned.verdicts if not verdict.keep], sizes),
    }
