"""`fgckpt save` and `fgckpt stop`: ask a job that is training for a checkpoint, or to end."""

import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from forgather_ckpt import catalog, requests
from forgather_ckpt.catalog import Checkpoint
from forgather_ckpt.cli import selection, text
from forgather_ckpt.cli.selection import Refused
from forgather_ckpt.errors import DeclarationError
from forgather_ckpt.requests import Kind, Request

TAKEN_SECONDS = 60.0
"""How long a job may take to look: it does so between steps, about once a second."""

POLL_SECONDS = 0.2

_FAILED = 1

_wait_option = click.option(
    "--wait", "wait_seconds", type=click.FloatRange(min=0), metavar="SECONDS",
    help="Return when it is done, or fail after SECONDS.  [default: return when the job has taken the request]",
)  # fmt: skip
_no_wait_option = click.option("--no-wait", is_flag=True, help="Return at once, whether or not the job takes it.")
_reason_option = click.option("--reason", metavar="TEXT", help="Why; the job writes it into its log.")


@click.command("save", short_help="Ask a running job for a checkpoint.")
@selection.run_argument
@_wait_option
@_no_wait_option
@_reason_option
@selection.json_option
def save(run: Path, wait_seconds: float | None, no_wait: bool, reason: str | None, as_json: bool) -> int:
    """\b
    Example: fgckpt save runs/gpt2 --wait 300

    Ask the job that trains in the run directory DIR for a checkpoint after the current step. Only the user who started
    the job, or root, is heard. Exit code 4 if no job is training there or it does not take the request, 1 if no
    checkpoint came of it in time.
    """
    deadline = _deadline(wait_seconds, no_wait)
    last = _newest_sequence(run)

    def is_taken() -> bool:
        nonlocal last
        found = _newest_sequence(run)
        if not requests.is_pending(run, "save"):
            return True
        last = found  # committed while the request still waited: not the answer to it
        return False

    request = _ask(run, "save", reason)
    taken = not no_wait and _wait_until_taken(run, request, is_taken, deadline)
    saved = None
    if taken and wait_seconds is not None:
        _until(lambda: _newest_sequence(run) > last or not requests.is_live(run), deadline)
        newest = _newest(run)
        saved = newest if newest is not None and newest.manifest.sequence > last else None
    where = text.printable(str(run))
    if as_json:
        data = {**_data(run, request), "taken": taken, "checkpoint": None if saved is None else _place(saved)}
        selection.write_json("fgckpt.save/1", data)
    elif saved is not None:
        click.echo(f"saved {text.printable(str(saved.path))}")
    elif wait_seconds is None:
        click.echo(f"{where}: asked for a checkpoint{'; the job saves after this step' if taken else ''}")
    if wait_seconds is not None and saved is None:
        how = f"within {wait_seconds:g} s" if requests.is_live(run) else "before it ended"
        click.echo(f"fgckpt: the job in {where} took the request, but saved nothing {how}", err=True)
        return _FAILED
    return 0


@click.command("stop", short_help="Ask a running job to end.")
@selection.run_argument
@click.option("--now", is_flag=True, help="Without a checkpoint: what was trained since the last one is lost.")
@_wait_option
@_no_wait_option
@_reason_option
@selection.json_option
def stop(run: Path, now: bool, wait_seconds: float | None, no_wait: bool, reason: str | None, as_json: bool) -> int:
    """\b
    Example: fgckpt stop runs/gpt2 --wait 600

    Ask the job that trains in the run directory DIR to end after the current step, with a checkpoint, or, with --now,
    without one. Only the user who started the job, or root, is heard. Exit code 4 if no job is training there or it
    does not take the request, 1 if it goes on after the time to wait.
    """
    deadline = _deadline(wait_seconds, no_wait)
    request = _ask(run, "abort" if now else "stop", reason)
    taken = not no_wait and _wait_until_taken(
        run, request, lambda: not requests.is_pending(run, request.kind), deadline
    )
    ended = taken and wait_seconds is not None and _until(lambda: not requests.is_live(run), deadline)
    newest = _newest(run) if ended else None
    where = text.printable(str(run))
    if as_json:
        data = {**_data(run, request), "taken": taken, "ended": ended}
        selection.write_json("fgckpt.stop/1", {**data, "resume": None if newest is None else _place(newest)})
    elif ended:
        resume = "nothing to resume from" if newest is None else f"resume → step {newest.manifest.step}"
        click.echo(f"{where}: the job has ended; {resume}")
    elif wait_seconds is None:
        how = f"ends after this step, {'without' if now else 'with'} a checkpoint"
        click.echo(f"{where}: asked to end{f'; the job {how}' if taken else ''}")
    if wait_seconds is not None and not ended:
        click.echo(f"fgckpt: the job in {where} took the request, but is there after {wait_seconds:g} s", err=True)
        return _FAILED
    return 0


def _deadline(wait_seconds: float | None, no_wait: bool) -> float:
    """By the monotonic clock: until when to wait."""
    if no_wait and wait_seconds is not None:
        raise click.UsageError("give --wait SECONDS or --no-wait, not both")
    return time.monotonic() + (TAKEN_SECONDS if wait_seconds is None else wait_seconds)


def _ask(run: Path, kind: Kind, reason: str | None) -> Request:
    selection.refuse_checkpoint(run)
    selection.scan(run)
    if not requests.is_live(run):
        raise Refused(f"no job is training in {run}")
    try:
        return requests.ask(run, kind, reason)
    except DeclarationError as err:
        raise click.UsageError(err.message) from None


def _wait_until_taken(run: Path, request: Request, is_taken: Callable[[], bool], deadline: float) -> bool:
    """True when the job has taken the request; `Refused` if it ends before, or does not take it in time."""
    is_in_time = _until(lambda: is_taken() or not requests.is_live(run), deadline)
    if not requests.is_pending(run, request.kind):
        return True
    if is_in_time:
        requests.withdraw(run, request.kind)
        raise Refused(f"the job in {run} ended before it took the request")
    raise Refused(
        f"the job in {run} has not taken the request in time. It stays asked until the job looks, between two steps; a "
        "job that does not train with the trainers or a CheckpointManager never does"
    )


def _until(is_so: Callable[[], bool], deadline: float) -> bool:
    while not is_so():
        if time.monotonic() >= deadline:
            return False
        time.sleep(POLL_SECONDS)
    return True


def _newest(run: Path) -> Checkpoint | None:
    return next(iter(catalog.scan(run).checkpoints), None)


def _newest_sequence(run: Path) -> int:
    newest = _newest(run)
    return 0 if newest is None else newest.manifest.sequence


def _data(run: Path, request: Request) -> dict[str, Any]:
    return {"run": str(run.absolute()), "request": asdict(request)}


def _place(checkpoint: Checkpoint) -> dict[str, Any]:
    manifest = checkpoint.manifest
    return {"step": manifest.step, "sequence": manifest.sequence, "path": str(checkpoint.path.absolute())}
