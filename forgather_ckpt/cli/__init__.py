"""`fgckpt`: look at the checkpoints of a run, check, compare and remove them, without torch and without a job.

Data goes to stdout, messages and progress to stderr.
"""

import io
import sys
from collections.abc import Sequence
from enum import IntEnum

import click

from forgather_ckpt.cli.anatomy import show
from forgather_ckpt.cli.asking import save, stop
from forgather_ckpt.cli.bisection import bisect
from forgather_ckpt.cli.comparison import diff
from forgather_ckpt.cli.listing import ls
from forgather_ckpt.cli.pinning import pin, quarantine, unpin, unquarantine
from forgather_ckpt.cli.recording import digests
from forgather_ckpt.cli.removal import prune
from forgather_ckpt.cli.resumption import resume_command_
from forgather_ckpt.cli.text import printable
from forgather_ckpt.cli.verification import verify
from forgather_ckpt.errors import (
    CheckpointError,
    CheckpointNotFound,
    CheckpointQuarantined,
    RunDirectoryInUse,
    StorageError,
)


class Exit(IntEnum):
    """The exit codes, the same for all commands."""

    FINE = 0
    FOUND_SOMETHING = 1
    USAGE = 2
    NOT_FOUND = 3
    REFUSED = 4
    IO = 5
    INTERRUPTED = 130


_MEANINGS = {
    Exit.FINE: "fine, nothing found",
    Exit.FOUND_SOMETHING: (
        "the check found something: a checkpoint is damaged; with diff and bisect: they differ; with save and stop: not "
        "done in time"
    ),
    Exit.USAGE: "wrong usage; with diff and bisect also: no telling, a checkpoint is damaged or of other digests",
    Exit.NOT_FOUND: "no such run directory or checkpoint, or none that is not quarantined",
    Exit.REFUSED: "refused, as a job writes to the run directory; with save and stop: as none does",
    Exit.IO: "the file system failed: not readable, no permission",
    Exit.INTERRUPTED: "interrupted",
}

_EPILOG = (
    "\b\nA SELECTOR is one of\n"
    "  latest, latest~1      the newest committed checkpoint, the one before it\n"
    "  best, best~1          the best by the metric of the training (eval_loss), the second best\n"
    "  emergency             the newest that a signal caused\n"
    "  epoch:3               the one of the end of the third epoch\n"
    "  15000, step:15000     the checkpoint of that step, also where it is quarantined\n"
    "  PATH                  a checkpoint directory\n"
    "  RUN, RUN@SELECTOR     with diff: the newest one of a run directory, or that one\n"
    "\n\b\nExit codes:\n" + "\n".join(f"  {code:<3}  {meaning}" for code, meaning in _MEANINGS.items())
)


@click.group("fgckpt", context_settings={"help_option_names": ["-h", "--help"]}, epilog=_EPILOG)
def fgckpt() -> None:
    """\b
    Example:
      fgckpt ls runs/gpt2
      fgckpt show latest -d runs/gpt2
      fgckpt verify --all -d runs/gpt2
      fgckpt diff 100 200 -d runs/gpt2
      fgckpt bisect runs/gpt2 runs/replay
      fgckpt resume-command best -d runs/gpt2
      fgckpt prune --keep-last 3 --keep-best 2 -d runs/gpt2
      fgckpt save runs/gpt2

    Look at the checkpoints of a run, check them, compare them, remove some, and ask a running job for one. Data goes to
    stdout, messages to stderr; --json gives every command's data to programs.
    """


fgckpt.add_command(ls)
fgckpt.add_command(show)
fgckpt.add_command(verify)
fgckpt.add_command(diff)
fgckpt.add_command(bisect)
fgckpt.add_command(digests)
fgckpt.add_command(prune)
fgckpt.add_command(pin)
fgckpt.add_command(unpin)
fgckpt.add_command(quarantine)
fgckpt.add_command(unquarantine)
fgckpt.add_command(save)
fgckpt.add_command(stop)
fgckpt.add_command(resume_command_)


def main(arguments: Sequence[str] | None = None) -> int:
    """The script `fgckpt`; returns its exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(
                errors="backslashreplace"
            )  # a terminal without `→` gets the rest of the line all the same
    try:
        code = fgckpt.main(arguments, prog_name="fgckpt", standalone_mode=False)
    except click.ClickException as err:
        err.show()
        return err.exit_code
    except (click.Abort, KeyboardInterrupt):
        return _fail("interrupted", Exit.INTERRUPTED)
    except CheckpointError as err:
        where = "" if err.path is None or err.path in err.message else f" ({err.path})"
        return _fail(err.message + where, _code_of(err))
    except OSError as err:
        return _fail(str(err), Exit.IO)
    return code if isinstance(code, int) else Exit.FINE


def _code_of(error: CheckpointError) -> Exit:
    match error:
        case CheckpointNotFound() | CheckpointQuarantined():
            return Exit.NOT_FOUND
        case RunDirectoryInUse():
            return Exit.REFUSED
        case StorageError():
            return Exit.IO
        case _:
            return Exit.FOUND_SOMETHING


def _fail(message: str, code: Exit) -> Exit:
    click.echo(f"fgckpt: {printable(message)}", err=True)
    return code
