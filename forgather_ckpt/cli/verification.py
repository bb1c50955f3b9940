"""`fgckpt verify`: check every byte of checkpoints against the digests taken when they were written."""

import dataclasses
import os
import sys
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import click

from forgather_ckpt import annotations, catalog, choice, resume
from forgather_ckpt import verify as offline
from forgather_ckpt.annotations import Annotations
from forgather_ckpt.cli import selection, table, text
from forgather_ckpt.errors import CheckpointError, CheckpointNotFound
from forgather_ckpt.resume import Candidate
from forgather_ckpt.verify import Problem, Verification

_NUM_SHOWN = 20


@click.command("verify", short_help="Check every byte of checkpoints.")
@click.argument("selectors", nargs=-1, metavar="[SELECTOR]...")
@selection.run_option
@click.option("--all", "every", is_flag=True, help="Check all checkpoints of the run directory, newest first.")
@click.option(
    "--quarantine", is_flag=True, help="Set aside what is damaged: neither a resume nor a policy takes it any more."
)
@selection.json_option
def verify(selectors: tuple[str, ...], run: Path, every: bool, quarantine: bool, as_json: bool) -> int:
    """\b
    Example: fgckpt verify --all -d runs/gpt2

    Read checkpoints (latest, unless SELECTORs are given) and check every byte against the digests that were taken
    when they were written. Exit code 1 if any is damaged; the file, the tensor and the bytes are named.
    """
    if every and selectors:
        raise click.UsageError("give SELECTORs or --all, not both")
    directories = _everything(run) if every else [selection.find(run, selector) for selector in selectors or ["latest"]]
    results = []
    for directory in dict.fromkeys(directories):
        result = _verify_one(directory)
        while not result.is_good and _digest_at(directory) not in (None, result.digest):
            result = _verify_one(directory)  # a job has saved that step again meanwhile
        if not result.is_good and not os.path.lexists(directory):
            click.echo(f"fgckpt: {text.printable(str(directory))} is gone: it was removed meanwhile", err=True)
            continue
        results.append(result)
        if not as_json:
            for line in _report(result):
                click.echo(line)
        if quarantine and not result.is_good:
            _quarantine(result)
    if as_json:
        selection.write_json("fgckpt.verify/1", _data(results))
    else:
        for line in _advice(results):
            click.echo(line)
    _warn_of_rejected(run, directories)
    return 0 if all(result.is_good for result in results) else 1


def _everything(run: Path) -> list[Path]:
    found = selection.scan(run)
    directories = [*(good.path for good in found.checkpoints), *(rejected.path for rejected in found.rejected)]
    if not directories:
        raise CheckpointNotFound(f"there is no checkpoint in {run}", path=str(run))
    return directories


def _verify_one(directory: Path) -> Verification:
    if not sys.stderr.isatty():
        return offline.verify(directory)
    shown = -1

    def on_progress(num_done: int, num_total: int) -> None:
        nonlocal shown
        percent = 100 * num_done // max(1, num_total)
        if percent != shown:
            shown = percent
            click.echo(f"\r{text.printable(directory.name)}  {percent} % of {text.size(num_total)}", err=True, nl=False)

    try:
        return offline.verify(directory, on_progress=on_progress)
    finally:
        click.echo("\r\x1b[K", err=True, nl=False)


def _report(result: Verification) -> Iterator[str]:
    name = text.printable(result.path.name)
    facts = f"{text.plural(result.num_files, 'file')}  {text.size(result.num_bytes)}  {result.seconds:.1f} s"
    if result.is_good:
        yield f"{table.emphasised('ok', 'green')}       {name}  {facts}"
    else:
        yield f"{table.emphasised('DAMAGED', 'red')}  {name}  {facts}"
    for problem in result.problems[:_NUM_SHOWN]:
        yield f"         {text.printable(_sentence(problem))}"
    if len(result.problems) > _NUM_SHOWN:
        yield f"         … and {text.plural(len(result.problems) - _NUM_SHOWN, 'more problem')} (all with --json)"
    if result.untidy:
        yield f"         not part of it: {', '.join(map(text.printable, result.untidy[:_NUM_SHOWN]))}"


def _digest_at(directory: Path) -> str | None:
    """Which checkpoint a directory holds now; None where it holds none."""
    try:
        return catalog.read_checkpoint(directory).manifest.digest
    except CheckpointError:
        return None


def _quarantine(result: Verification) -> None:
    if _digest_at(result.path) is None:
        return  # nothing takes it for a checkpoint as it is
    reason = _sentence(result.problems[0])

    def change(noted: Annotations) -> Annotations:
        return dataclasses.replace(noted, quarantined=noted.quarantined or reason)

    annotations.annotate(result.path, change, digest=result.digest)


def _sentence(problem: Problem) -> str:
    component = "" if problem.component is None else f"component {problem.component!r}: "
    item = "" if problem.item is None else f"{problem.item!r}: "
    return f"{problem.file}: {component}{item}{problem.detail}"


def next_resume(candidates: Sequence[Candidate], damaged: Collection[Path]) -> Candidate | None:
    """What a resume from "latest" takes: the newest that is not known to be damaged."""
    newest = resume.newest_first(candidates)
    return next((candidate for candidate in newest if candidate.path.resolve() not in damaged), None)


def _advice(results: Sequence[Verification]) -> Iterator[str]:
    """For each run directory with damage, what is set aside, and what a resume would use."""
    damaged = {result.path.resolve() for result in results if not result.is_good}
    checked = {result.path.resolve() for result in results}
    for run in dict.fromkeys(path.parent for path in damaged):
        found = catalog.scan(run)
        aside = choice.quarantined(found.checkpoints)
        whole = [one for one in found.checkpoints if one.path.resolve() in damaged]
        for one in whole:
            if one.path in aside:
                yield f"quarantined {text.printable(one.path.name)}"
        if (newer := selection.of_newer_version(found)) is not None:
            yield f"→ resume latest would refuse: {text.printable(newer.path.name)} is of a newer format"
        else:
            usable = [one.candidate for one in found.checkpoints if one.path not in aside]
            yield _next_resume_told(run, next_resume(usable, damaged), checked)
        if loose := [str(one.manifest.step) for one in whole if one.path not in aside]:
            yield f"→ to set aside what is damaged: fgckpt verify {' '.join(loose)} --quarantine -d {text.printable(str(run))}"


def _next_resume_told(run: Path, chosen: Candidate | None, checked: Collection[Path]) -> str:
    if chosen is None:
        return f"→ resume latest in {text.printable(str(run))} would find nothing good"
    how = "" if chosen.path.resolve() in checked else " (not checked here)"
    return f"→ resume latest would use step {chosen.step}{how}"


def _warn_of_rejected(run: Path, directories: Sequence[Path]) -> None:
    """A check of "latest" must not be silent about newer ones that are not even committed."""
    checked = {directory.resolve() for directory in directories}
    for rejected in catalog.scan(run).rejected:
        if rejected.path.resolve() not in checked:
            reason = text.printable(f"{rejected.path.name} is not committed: {rejected.reason}")
            click.echo(f"fgckpt: {reason}; see `fgckpt verify --all`", err=True)


def _data(results: Sequence[Verification]) -> dict[str, Any]:
    return {
        "checkpoints": [
            {
                "path": str(result.path.absolute()),
                "step": result.step,
                "good": result.is_good,
                "files": result.num_files,
                "bytes": result.num_bytes,
                "seconds": round(result.seconds, 6),
                "problems": [dataclasses.asdict(problem) for problem in result.problems],
                "untidy": list(result.untidy),
            }
            for result in results
        ]
    }
