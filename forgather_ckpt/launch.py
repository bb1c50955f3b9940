"""What started this process, so that it can be started again: the launcher, how many processes, the words of the command."""

import contextlib
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from forgather_ckpt.redaction import redact_arguments

Launcher = Literal["torchrun", "accelerate", "slurm", "python"]
LAUNCHERS: tuple[Launcher, ...] = ("torchrun", "accelerate", "slurm", "python")

_MAX_CHARS = 64 << 10
"""A longer command line is left out: the manifest is small, and for people."""
_NUM_ANCESTORS = 4
_PYTHON = re.compile(r"(?:python|pypy)[\d.]*(?:-[\w.]+)?t?")
_TAKES_A_WORD = ("-X", "-W", "--check-hash-based-pycs")
_MODULES: Mapping[str, Launcher] = {
    "torch.distributed.run": "torchrun",
    "torch.distributed.launch": "torchrun",
    "accelerate.commands.launch": "accelerate",
}


@dataclass(frozen=True)
class Program:
    """The parts of a command that runs Python: `python -u -m package.job --steps 5`."""

    interpreter: tuple[str, ...]
    """With its options."""
    is_module: bool
    name: str
    """A script's path, or a module's name."""
    arguments: tuple[str, ...]

    @property
    def words(self) -> tuple[str, ...]:
        return (*self.interpreter, *(("-m",) if self.is_module else ()), self.name, *self.arguments)


def program_of(command: Sequence[str]) -> Program | None:
    """The script or module that a Python command runs.

    None for other commands, and for what has neither: an interactive session, `-c`, a program from stdin.
    """
    if not command or not _PYTHON.fullmatch(Path(command[0]).name):
        return None
    at = 1
    while at < len(command):
        word = command[at]
        if re.fullmatch(r"-[a-zA-Z]*m", word) and word not in _TAKES_A_WORD:
            options = (word[:-1],) if word != "-m" else ()
            rest = tuple(command[at + 1 :])
            return Program((*command[:at], *options), True, rest[0], rest[1:]) if rest else None
        if word == "-" or re.fullmatch(r"-[a-zA-Z]*c", word):
            return None
        if not word.startswith("-"):
            return Program(tuple(command[:at]), False, word, tuple(command[at + 1 :]))
        at += 2 if word in _TAKES_A_WORD else 1
    return None


def describe_launch() -> dict[str, Any]:
    """What started this process: as plain data for the manifest, without secrets; what cannot be told is absent.

    `launcher` ("torchrun", "accelerate", "slurm", or "python" where it is none of these), `nodes`, `processes_per_node`,
    `argv` (the words of this process's own command, the interpreter's included), `launch_command` (the words of the
    launcher's, as it was started on this node) and `cwd`.
    """
    facts = tell(sys.orig_argv, os.environ, list(islice(_ancestors(), _NUM_ANCESTORS)))
    with contextlib.suppress(OSError):  # the directory may be gone
        facts["cwd"] = str(Path.cwd())
    return facts


def tell(argv: Sequence[str], environ: Mapping[str, str], ancestors: Sequence[Sequence[str]]) -> dict[str, Any]:
    """What `describe_launch` tells, from the command of this process and those of its ancestors, the nearest first."""
    if "--multiprocessing-fork" in argv:  # started by the script, which is the nearest that was not started like this
        argv = next((words for words in ancestors if "--multiprocessing-fork" not in words and program_of(words)), argv)
    found = next(((name, words) for words in ancestors if (name := _launcher_in(words)) is not None), None)
    facts: dict[str, Any] = {}
    if "TORCHELASTIC_RUN_ID" in environ:
        # accelerate starts several processes through torchrun's own code; only its command tells the two apart
        facts["launcher"] = found[0] if found is not None else "torchrun"
        facts |= _processes(environ, nodes="GROUP_WORLD_SIZE", on_node="LOCAL_WORLD_SIZE", in_all="WORLD_SIZE")
    elif found is not None and found[0] == "accelerate":
        facts |= {"launcher": "accelerate", "nodes": 1, "processes_per_node": 1}
    elif "SLURM_STEP_NUM_TASKS" in environ:
        facts["launcher"] = "slurm"
        facts |= _processes(
            environ,
            nodes="SLURM_STEP_NUM_NODES",
            on_node="SLURM_NTASKS_PER_NODE",
            in_all="SLURM_STEP_NUM_TASKS",
        )
    else:
        facts["launcher"] = "python"
    if _fits(argv):
        facts["argv"] = redact_arguments(argv)
    if found is not None and found[0] == facts["launcher"] and _fits(found[1]):
        facts["launch_command"] = redact_arguments(found[1])
    return facts


def _launcher_in(command: Sequence[str]) -> Launcher | None:
    """The launcher that a command runs, by the name of its program."""
    program = program_of(command)
    if program is not None and program.is_module:
        return _MODULES.get(program.name)
    words = (program.name, *program.arguments) if program is not None else command
    match [Path(words[0]).name if words else "", *words[1:2]]:
        case ["torchrun", *_]:
            return "torchrun"
        case ["accelerate", "launch"] | ["accelerate-launch", *_]:
            return "accelerate"
    return None


def _processes(environ: Mapping[str, str], *, nodes: str, on_node: str, in_all: str) -> dict[str, int]:
    """How many nodes and processes on each. Nodes of different sizes have no such number."""
    counts = {name: int(text) for name in (nodes, on_node, in_all) if (text := environ.get(name, "")).isdigit()}
    num_nodes, total = counts.get(nodes), counts.get(in_all)
    if num_nodes is None:
        return {}
    if total is not None and num_nodes > 0 and total % num_nodes == 0:
        each = total // num_nodes
        if counts.get(on_node, each) == each:
            return {"nodes": num_nodes, "processes_per_node": each}
    return {"nodes": num_nodes}


def _ancestors() -> Iterator[list[str]]:
    """The commands of the parent, its parent, and so on, where the system shows them (Linux)."""
    pid = os.getppid()
    while pid > 1:
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes()
            # the second field is a name in parentheses, which may hold anything
            status = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        except OSError:
            return
        yield [os.fsdecode(word) for word in words.split(b"\0")[:-1]]
        pid = int(status[1])


def _fits(words: Sequence[str]) -> bool:
    return sum(map(len, words)) <= _MAX_CHARS
