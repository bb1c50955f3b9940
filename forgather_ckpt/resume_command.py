"""The command that goes on from a checkpoint, made from what its manifest says of the one that began it."""

import os
import re
import shlex
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from forgather_ckpt.command_line import options_in, style_of, with_option
from forgather_ckpt.launch import LAUNCHERS, Launcher, Program, program_of
from forgather_ckpt.redaction import is_redacted

FLAG = "resume_from_checkpoint"
_WITH_VALUE = (FLAG, "resume")
_SWITCHES = ("auto_resume", "fresh")
RESUMING = (*_WITH_VALUE, *_SWITCHES)
"""The options that say where a script begins, by name."""
_TRUTHS = ("true", "false", "yes", "no", "1", "0")
_NO_CHECKPOINT = re.compile(r".*\.(?:ya?ml|json|toml|py|cfg|ini|txt)")
_NOTEBOOKS = ("ipykernel_launcher", "ipykernel", "IPython", "jupyter")


class NotTold(ValueError):
    """The manifest does not say how the job was started, or what it says cannot be started again."""


@dataclass(frozen=True)
class ResumeCommand:
    """The words of the command, and what a person has to know before running it."""

    words: tuple[str, ...]
    launcher: Launcher
    world_size: int | None
    """Of the job that it starts; None where nodes had different numbers of processes."""
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        """As it is given to a shell; words that a terminal would not show as they are in bash's `$'…'`."""
        return " ".join(map(_quoted, self.words))


@dataclass
class _Job:
    """What the words are made from."""

    program: Program
    launcher: Launcher
    nodes: int
    processes_per_node: int | None
    notes: list[str] = field(default_factory=list)

    @property
    def target(self) -> list[str]:
        """The script and its arguments, as launchers take them."""
        return [*(("-m",) if self.program.is_module else ()), self.program.name, *self.program.arguments]


def resume_command(
    launch: Mapping[str, Any],
    path: str | Path,
    overrides: Mapping[str, str | None] | None = None,
    *,
    world_size: int,
    launcher: Launcher | None = None,
    nodes: int | None = None,
    processes_per_node: int | None = None,
    cwd: str | Path | None = None,
) -> ResumeCommand:
    """The command that resumes from the checkpoint at `path`.

    `launch` is what the manifest has under `environment["launch"]`, `world_size` that of the saved job. `overrides` are
    options of the script by name (`learning_rate`), None for a switch. They, and the option that says where to resume,
    replace the script's own, written as it writes them; an override of that option counts before `path`. `launcher`,
    `nodes` and `processes_per_node` are as they were unless given; `cwd` is where the command will be run.

    `NotTold` where the manifest does not say enough.
    """
    program = _program_in(launch)
    used: Launcher = launch["launcher"] if launch.get("launcher") in LAUNCHERS else "python"
    nodes_before, each_before = _count(launch.get("nodes")) or 1, _count(launch.get("processes_per_node"))
    if each_before is None and world_size % nodes_before == 0:
        each_before = world_size // nodes_before
    job = _Job(program, launcher or used, nodes or nodes_before, processes_per_node or each_before)
    settings = dict(overrides or {})
    asked = [value for name in _WITH_VALUE if (value := settings.pop(name, None)) is not None]
    arguments = _resuming(list(program.arguments), asked[0] if asked else str(path), job.notes)
    style = style_of(program.arguments)
    for name, value in settings.items():
        if not any(option.name == name.replace("-", "_") for option in options_in(program.arguments)):
            job.notes.append(f"the script was started without {style.spelled(name)}: it must be one of its options")
        arguments = with_option(arguments, name, value, style)
    job.program = Program(program.interpreter, program.is_module, program.name, tuple(arguments))

    head = _recorded_head(launch, program) if job.launcher == used else None
    if head is not None:
        words = [*_with_counts(head, job, nodes, processes_per_node), *job.target[job.program.is_module :]]
    else:
        words = _written_anew(job, is_as_before=job.launcher == used)
    words = [*_shortened(words[:2]), *words[2:]]
    _note_the_rest(job, words, launch, cwd)
    return ResumeCommand(tuple(words), job.launcher, _world_size(job, used, world_size), tuple(job.notes))


def _world_size(job: _Job, used: Launcher, saved: int) -> int | None:
    if job.launcher == "python":
        return saved if used == "python" else 1
    return None if job.processes_per_node is None else job.nodes * job.processes_per_node


def _program_in(launch: Mapping[str, Any]) -> Program:
    argv = launch.get("argv")
    if not isinstance(argv, Sequence) or isinstance(argv, str) or not all(isinstance(word, str) for word in argv):
        raise NotTold(
            "the checkpoint does not say how its job was started; start it as before, and add --resume-from-checkpoint"
        )
    program = program_of(argv)
    if program is None or program.name.split(".")[0] in _NOTEBOOKS or Path(program.name).stem in _NOTEBOOKS:
        raise NotTold(
            "the checkpoint was saved by an interactive session, which no command starts again; resume there with "
            "TrainingArguments(resume_from_checkpoint=...)"
        )
    return program


def _count(said: object) -> int | None:
    return said if isinstance(said, int) and not isinstance(said, bool) and said > 0 else None


def _resuming(arguments: list[str], path: str, notes: list[str]) -> list[str]:
    """The script's arguments with its own options for resuming replaced by the one that names `path`."""
    style = style_of(arguments)
    kept, place = list(arguments), None
    for option in reversed(list(options_in(arguments))):
        if option.name in _WITH_VALUE:
            if option.name == FLAG or (option.value is not None and _may_name_a_checkpoint(option.value)):
                written = style.option(FLAG, path) if option.value is None else option.with_value(path)
                if place is None:
                    place = option.start
                    kept[option.start : option.stop] = written
                else:
                    # options are told from the last to the first, so that those before keep their place; the last counts
                    del kept[option.start : option.stop]
                continue
            notes.append(f"{option.spelled} was a switch and is left out; {style.spelled(FLAG)} is in its place")
        if option.name in (*_SWITCHES, "resume"):
            has_truth = option.value is not None and option.value.lower() in _TRUTHS
            stop = option.stop if option.is_joined or has_truth else option.start + 1
            del kept[option.start : stop]
    if place is None:
        if not any(option.name in RESUMING for option in options_in(arguments)):
            notes.append(
                f"the script was started without an option for resuming: {style.spelled(FLAG)} must be one that "
                "it has (forgather_ckpt.resume_arguments adds it)"
            )
        kept = with_option(kept, FLAG, path, style)
    return kept


def _may_name_a_checkpoint(value: str) -> bool:
    """Whether this is what `--resume` takes, and not a positional argument after a switch of that name."""
    return _NO_CHECKPOINT.fullmatch(value.lower()) is None


def _recorded_head(launch: Mapping[str, Any], program: Program) -> list[str] | None:
    """The launcher's own words as they were, up to the script; None where they were not recorded."""
    if launch.get("launcher") == "python":
        return [*program.interpreter, *(("-m",) if program.is_module else ())]
    command, tail = launch.get("launch_command"), [program.name, *program.arguments]
    if isinstance(command, Sequence) and list(command[-len(tail) :]) == tail:
        return [str(word) for word in command[: -len(tail)]]
    return None


def _with_counts(head: list[str], job: _Job, nodes: int | None, processes_per_node: int | None) -> list[str]:
    """The launcher's words with other numbers of nodes and processes, where such were asked for."""
    wanted: dict[str, int | None]
    match job.launcher:
        case "torchrun":
            wanted = {"nnodes": nodes, "nproc_per_node": processes_per_node}
        case "accelerate":
            total = job.nodes * (job.processes_per_node or 1)
            wanted = {"num_machines": nodes, "num_processes": total if nodes or processes_per_node else None}
        case _:
            return head
    program = program_of(head)
    begin = len(program.interpreter) + 1 + program.is_module if program is not None else 1
    if job.launcher == "accelerate" and head[begin : begin + 1] == ["launch"]:
        begin += 1
    options, style = head[begin:], style_of(head[begin:])
    # a last `-m` belongs to the script
    tail = [options.pop()] if job.program.is_module and options and options[-1] == "-m" else []
    for name, count in wanted.items():
        if count is not None:
            options = with_option(options, name, str(count), style)
    return [*head[:begin], *options, *tail]


def _written_anew(job: _Job, *, is_as_before: bool) -> list[str]:
    """The command of a launcher whose own words are not known."""
    nodes, each = job.nodes, job.processes_per_node
    if is_as_before and job.launcher != "python":
        job.notes.append(f"the options of {_NAMES[job.launcher]} were not recorded: add those that it had")
    if each is None and job.launcher != "python":
        raise NotTold("the nodes of the job had different numbers of processes: say --nproc-per-node")
    match job.launcher:
        case "torchrun":
            if nodes == 1:
                return ["torchrun", "--standalone", f"--nproc-per-node={each}", *job.target]
            job.notes.append("put a host and port of one of the nodes where HOST:PORT stands")
            return [
                "torchrun",
                f"--nnodes={nodes}",
                f"--nproc-per-node={each}",
                "--rdzv-backend=c10d",
                "--rdzv-endpoint=HOST:PORT",
                *job.target,
            ]
        case "accelerate":
            words = ["accelerate", "launch", f"--num_processes={nodes * (each or 1)}", f"--num_machines={nodes}"]
            if nodes > 1:
                job.notes.append("put the number of the node where RANK stands, and node 0's address where HOST stands")
                words += ["--machine_rank=RANK", "--main_process_ip=HOST", "--main_process_port=29500"]
            return [*words, *job.target]
        case "slurm":
            return ["srun", f"--nodes={nodes}", f"--ntasks-per-node={each}", *job.program.words]
        case "python":
            return list(job.program.words)


_NAMES: Mapping[Launcher, str] = {
    "torchrun": "torchrun",
    "accelerate": "accelerate launch",
    "slurm": "srun",
    "python": "python",
}


def _shortened(words: Sequence[str]) -> list[str]:
    """`/venv/bin/python /venv/bin/torchrun` as `torchrun`, where that is what the name means here."""
    if len(words) == 2 and Path(words[1]).name in ("torchrun", "accelerate") and program_of(words) is not None:
        words = words[1:]
    if not words:
        return []
    name = Path(words[0]).name
    return [name if shutil.which(name) == words[0] else words[0], *words[1:]]


def _quoted(word: str) -> str:
    if word.isprintable():
        return shlex.quote(word)
    letters = (chr(byte) if 32 <= byte < 127 and byte not in b"\\'" else f"\\x{byte:02x}" for byte in os.fsencode(word))
    return f"$'{''.join(letters)}'"


def _note_the_rest(job: _Job, words: Sequence[str], launch: Mapping[str, Any], cwd: str | Path | None) -> None:
    if num := sum(map(is_redacted, words)):
        job.notes.append(
            f"{num} secret{'' if num == 1 else 's'} left out of the checkpoint: put {'it' if num == 1 else 'them'} back "
            'where "(redacted)" stands'
        )
    if job.nodes > 1 and job.launcher in ("torchrun", "accelerate"):
        job.notes.append(
            f"start it on each of the {job.nodes} nodes; this is the line of one of them, so a number of the node in it differs"
        )
    if job.launcher == "python" and launch.get("launcher") not in ("python", None):
        job.notes.append("this starts a single process")
    restarts = [option.value for option in options_in(words) if option.name == "max_restarts"]
    if restarts and restarts[-1] != "0":
        job.notes.append(
            "where torchrun restarts the processes after a failure, they begin from this checkpoint again, not from newer "
            "ones: for a long run, write auto in place of the path once it has saved"
        )
    where = launch.get("cwd")
    if isinstance(where, str) and cwd is not None and Path(where) != Path(cwd):
        job.notes.append(f"the job was started in {where}: run it there")
