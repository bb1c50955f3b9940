"""What started a process is told without secrets, and from it comes the command that resumes."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from forgather_ckpt import strict_json
from forgather_ckpt.launch import Program, describe_launch, program_of, tell
from forgather_ckpt.redaction import REDACTED, redact_arguments
from forgather_ckpt.resume_command import NotTold, ResumeCommand, resume_command
from tests.torchrun import torchrun

PATH = "/runs/a/checkpoint-4"
FAKE_TOKEN = "hf_" + "a1" * 17


# ---- which program


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("python train.py --a 1", Program(("python",), False, "train.py", ("--a", "1"))),
        ("/v/bin/python3.12 -u -m pkg.job x", Program(("/v/bin/python3.12", "-u"), True, "pkg.job", ("x",))),
        ("python -X dev -W error -O t.py", Program(("python", "-X", "dev", "-W", "error", "-O"), False, "t.py", ())),
        ("python -um pkg", Program(("python", "-u"), True, "pkg", ())),
        ("python3 t.py -m x -c y", Program(("python3",), False, "t.py", ("-m", "x", "-c", "y"))),
        ("python -c pass", None),
        ("python -", None),
        ("python", None),
        ("python -m", None),
        ("bash train.sh", None),
        ("", None),
    ],
)
def test_the_program_of_a_command(command: str, expected: Program | None) -> None:
    found = program_of(command.split())
    assert found == expected
    if found is not None and "-um" not in command:
        assert list(found.words) == command.split()


# ---- secrets


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (["--hub-token", "abc", "--lr", "1"], ["--hub-token", REDACTED, "--lr", "1"]),
        (["--hub_token=abc"], [f"--hub_token={REDACTED}"]),
        (["wandb.api_key=abc", "+auth.password=a,b"], [f"wandb.api_key={REDACTED}", f"+auth.password={REDACTED}"]),
        (["--api-key", "--verbose"], ["--api-key", "--verbose"]),
        (["--password", "-abc"], ["--password", REDACTED]),
        (["--env", "WANDB_API_KEY=abc"], ["--env", f"WANDB_API_KEY={REDACTED}"]),
        (["--x", FAKE_TOKEN], ["--x", REDACTED]),
        (["s3://user:pass@host/data"], [f"s3{REDACTED}host/data"]),
        (["https://h/x?access_token=abc&page=2"], [f"https://h/x?access_token={REDACTED}&page=2"]),
        (["train --my-token=abc"], [f"train --my-token={REDACTED}"]),
        (["--header=Authorization: Bearer abc"], [f"--header=Authorization: {REDACTED}"]),
        (['--json={"api_key": "a b, c", "n": 1}'], [f'--json={{"api_key": {REDACTED}, "n": 1}}']),
        (["--tokenizer", "gpt2", "--max-tokens", "5"], ["--tokenizer", "gpt2", "--max-tokens", "5"]),
        (["--out", "runs/multi-task-learning-of-all-things"], ["--out", "runs/multi-task-learning-of-all-things"]),
        (["https://host/path@2", "git@host:repo", "a=b"], ["https://host/path@2", "git@host:repo", "a=b"]),
    ],
)  # fmt: skip
def test_no_secret_of_a_command_line_is_told(words: list[str], shown: list[str]) -> None:
    assert redact_arguments(words) == shown


def test_a_long_word_is_gone_through_in_no_time() -> None:
    words = ["a_" * 32_000, "token" * 12_000, "x.secret" * 8_000]
    assert redact_arguments(words) == words


# ---- what is told

TORCHRUN = {"TORCHELASTIC_RUN_ID": "x", "GROUP_WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "4", "WORLD_SIZE": "8"}
SLURM = {"SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NUM_NODES": "2"}
WORKER = "/v/bin/python -u train.py --lr 1"


@pytest.mark.parametrize(
    ("argv", "environ", "ancestors", "expected"),
    [
        (WORKER, {}, ["bash"], {"launcher": "python"}),
        (
            WORKER,
            TORCHRUN,
            ["/v/bin/python /v/bin/torchrun --nnodes 2 train.py --lr 1"],
            {"launcher": "torchrun", "nodes": 2, "processes_per_node": 4},
        ),
        (
            WORKER,
            TORCHRUN | SLURM,
            ["python -m torch.distributed.run train.py", "slurmstepd"],
            {"launcher": "torchrun", "nodes": 2, "processes_per_node": 4},
        ),
        (WORKER, TORCHRUN, [], {"launcher": "torchrun", "nodes": 2, "processes_per_node": 4}),
        (WORKER, TORCHRUN | {"WORLD_SIZE": "7"}, [], {"launcher": "torchrun", "nodes": 2}),
        (
            WORKER,
            TORCHRUN,
            ["python /v/bin/accelerate launch train.py"],
            {"launcher": "accelerate", "nodes": 2, "processes_per_node": 4},
        ),
        (
            WORKER,
            {},
            ["python -m accelerate.commands.launch train.py"],
            {"launcher": "accelerate", "nodes": 1, "processes_per_node": 1},
        ),
        (WORKER, {}, ["python /v/bin/accelerate config"], {"launcher": "python"}),
        (WORKER, SLURM, ["slurmstepd"], {"launcher": "slurm", "nodes": 2, "processes_per_node": 4}),
        (WORKER, SLURM | {"SLURM_NTASKS_PER_NODE": "6"}, [], {"launcher": "slurm", "nodes": 2}),
        (WORKER, {"SLURM_JOB_ID": "5", "SLURM_NTASKS": "8"}, ["bash"], {"launcher": "python"}),
    ],
)
def test_the_launcher_is_told_from_the_environment_and_the_parents(
    argv: str, environ: Mapping[str, str], ancestors: list[str], expected: dict[str, Any]
) -> None:
    facts = tell(argv.split(), environ, [words.split() for words in ancestors])
    assert facts.pop("argv") == argv.split()
    command = facts.pop("launch_command", None)
    assert facts == expected
    is_seen = bool(ancestors) and expected["launcher"] in ("torchrun", "accelerate")
    assert command == (ancestors[0].split() if is_seen else None)


def test_a_spawned_process_tells_of_the_script_that_spawned_it() -> None:
    child = ["python", "-c", "from multiprocessing.spawn import spawn_main; spawn_main()", "--multiprocessing-fork"]
    assert tell(child, {}, [["python", "train.py"], ["bash"]])["argv"] == ["python", "train.py"]
    assert tell(child, {}, [child, ["python", "train.py"]])["argv"] == ["python", "train.py"]


def test_words_that_are_too_many_are_left_out() -> None:
    assert "argv" not in tell(["python", "train.py", "x" * (1 << 20)], {}, [])


def test_words_that_are_no_text_can_be_written_down() -> None:
    facts = tell(["python", "train.py", os.fsdecode(b"\xff")], {}, [])
    data = strict_json.dumps(facts)
    assert strict_json.loads(data, what="facts", max_bytes=len(data)) == facts


TELLING = "import json, sys\nfrom forgather_ckpt.launch import describe_launch\n"


@pytest.fixture
def script(tmp_path: Path) -> Path:
    """A script that writes what started it, one file for each rank."""
    path = tmp_path / "train.py"
    path.write_text(
        TELLING + "import os\nfrom pathlib import Path\n"
        "Path(__file__).with_name(f'rank-{os.environ.get(\"RANK\", 0)}.json').write_text(json.dumps(describe_launch()))\n"
    )
    return path


def told_by(script: Path, rank: int = 0) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads(script.with_name(f"rank-{rank}.json").read_text())
    return facts


@pytest.mark.multiprocess
def test_a_process_of_torchrun_tells_of_torchrun(script: Path) -> None:
    result = torchrun([script, "--hub-token", "abc", "--steps=4"], nproc=2)
    assert result.returncode == 0, result.output
    for rank in range(2):
        facts = told_by(script, rank)
        assert (facts["launcher"], facts["nodes"], facts["processes_per_node"]) == ("torchrun", 1, 2)
        assert facts["argv"][-4:] == [str(script), "--hub-token", REDACTED, "--steps=4"]
        assert "--nproc-per-node=2" in facts["launch_command"]
        command = resume_command(facts, PATH, world_size=2)
        tail = [str(script), "--hub-token", REDACTED, "--steps=4", "--resume-from-checkpoint", PATH]
        assert command.words[command.words.index(str(script)) :] == tuple(tail)
        assert command.words[1:3] == ("-m", "torch.distributed.run")


@pytest.mark.multiprocess
def test_a_process_of_accelerate_tells_of_accelerate(script: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes=1", script, "--steps", "4"],
        check=True,
        capture_output=True,
        timeout=100,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"},
    )
    facts = told_by(script)
    assert facts["launcher"] == "accelerate"
    words = resume_command(facts, PATH, world_size=1).words
    assert words[-5:] == (str(script), "--steps", "4", "--resume-from-checkpoint", PATH)
    assert words[1:5] == ("-m", "accelerate.commands.launch", "--cpu", "--num_processes=1")


def test_a_plain_process_tells_of_itself(script: Path, tmp_path: Path) -> None:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "TORCHELASTIC_"))}
    subprocess.run([sys.executable, "-X", "dev", script.name], check=True, timeout=60, cwd=tmp_path, env=clean)
    assert told_by(script) == {
        "launcher": "python",
        "argv": [sys.executable, "-X", "dev", script.name],
        "cwd": str(tmp_path),
    }


def test_a_working_directory_that_is_gone_is_not_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert "cwd" not in describe_launch()


# ---- the command


def launched(
    command: str, *, launcher: str = "python", head: str | None = None, cwd: str = "/work", **facts: Any
) -> dict[str, Any]:
    """What a manifest says of a job: the worker's command, and the launcher's words before the script."""
    said = {"launcher": launcher, "argv": shlex.split(command), "cwd": cwd, **facts}
    program = program_of(said["argv"])
    if head is not None and program is not None:
        said["launch_command"] = [*shlex.split(head), program.name, *program.arguments]
    return said


def resumed(launch: Mapping[str, Any], **options: Any) -> ResumeCommand:
    return resume_command(launch, PATH, options.pop("overrides", {}), **{"world_size": 1, "cwd": "/work", **options})


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("", "--resume-from-checkpoint P"),
        ("--steps 4", "--steps 4 --resume-from-checkpoint P"),
        ("--max-steps=4", "--max-steps=4 --resume-from-checkpoint=P"),
        ("--max_steps 4", "--max_steps 4 --resume_from_checkpoint P"),
        ("max_steps=4 model.width=5", "max_steps=4 model.width=5 resume_from_checkpoint=P"),
        ("--resume-from-checkpoint /old --steps 4", "--resume-from-checkpoint P --steps 4"),
        ("--resume_from_checkpoint=/old --steps 4", "--resume_from_checkpoint=P --steps 4"),
        ("--resume auto --steps 4", "--resume P --steps 4"),
        ("--resume=/old", "--resume=P"),
        ("resume=auto steps=4", "resume=P steps=4"),
        ("+resume_from_checkpoint=/old", "+resume_from_checkpoint=P"),
        ("--auto-resume --steps 4", "--steps 4 --resume-from-checkpoint P"),
        ("--fresh data/", "data/ --resume-from-checkpoint P"),
        ("--auto_resume True --lr_x 4", "--lr_x 4 --resume_from_checkpoint P"),
        ("--resume", "--resume-from-checkpoint P"),
        ("--resume --steps 4", "--steps 4 --resume-from-checkpoint P"),
        ("--resume config.yaml", "config.yaml --resume-from-checkpoint P"),
        ("--resume-from-checkpoint --steps 4", "--resume-from-checkpoint P --steps 4"),
        ("--resume a --resume-from-checkpoint b", "--resume-from-checkpoint P"),
        ("--steps 4 -- file", "--steps 4 --resume-from-checkpoint P -- file"),
        ("train --steps 4", "train --steps 4 --resume-from-checkpoint P"),
    ],
)
def test_the_scripts_own_option_says_where_to_resume(arguments: str, expected: str) -> None:
    command = resumed(launched(f"python train.py {arguments}"))
    assert shlex.join(command.words) == f"python train.py {expected.replace('P', PATH)}"
    assert str(command) == shlex.join(command.words)


@pytest.mark.parametrize(
    ("arguments", "overrides", "expected"),
    [
        ("--lr 1 --x", {"lr": "2"}, "--lr 2 --x"),
        ("--lr=1", {"lr": "2"}, "--lr=2"),
        ("--learning-rate 1", {"learning_rate": "2"}, "--learning-rate 2"),
        ("--learning_rate 1", {"learning-rate": "2"}, "--learning_rate 2"),
        ("lr=1 x=2", {"lr": "2"}, "lr=2 x=2"),
        ("optim.lr=1", {"optim.lr": "2"}, "optim.lr=2"),
        ("--lr 1 --x 5 --lr 3", {"lr": "2"}, "--x 5 --lr 2"),
        ("--x 5", {"max_steps": "2"}, "--x 5 --max-steps 2"),
        ("--a_b=5 --c=6", {"max_steps": "2"}, "--a_b=5 --c=6 --max_steps=2"),
        ("--bf16 --x 5", {"bf16": None}, "--bf16 --x 5"),
        ("--x 5", {"bf16": None}, "--x 5 --bf16"),
        ("--bf16", {"bf16": "false"}, "--bf16 false"),
        ("--bf16 false --x 5", {"bf16": None}, "--bf16 true --x 5"),
        ("--bf16=0", {"bf16": None}, "--bf16=1"),
        ("--bf16 True", {"bf16": None}, "--bf16 True"),
        ("--bf16 data/", {"bf16": None}, "--bf16 data/"),
        ("--offset -1 --x 5", {"offset": "-2"}, "--offset -2 --x 5"),
        ("--x 5", {"name": "-dash"}, "--x 5 --name=-dash"),
        ("--x 5", {"name": "two words"}, "--x 5 --name 'two words'"),
    ],
)
def test_overrides_are_written_as_the_script_writes_its_options(
    arguments: str, overrides: dict[str, str | None], expected: str
) -> None:
    command = resumed(launched(f"python train.py --resume auto {arguments}"), overrides=overrides)
    assert shlex.join(command.words) == f"python train.py --resume {PATH} {expected}"


def test_overrides_of_a_script_without_flags_are_assignments() -> None:
    command = resumed(launched("python train.py resume=auto a=5"), overrides={"max_steps": "2", "bf16": None})
    assert str(command) == f"python train.py resume={PATH} a=5 max_steps=2 bf16=true"


def test_an_override_of_the_resume_option_counts_before_the_path() -> None:
    assert "--resume latest" in str(resumed(launched("python train.py --resume no"), overrides={"resume": "latest"}))


TORCH = {"launcher": "torchrun", "head": "/v/bin/python /v/bin/torchrun --standalone --nproc_per_node 2", "nodes": 1}


@pytest.mark.parametrize(
    ("launch", "options", "expected"),
    [
        (launched(WORKER, **TORCH), {}, "/v/bin/torchrun --standalone --nproc_per_node 2 train.py"),
        (
            launched("python -u -m job --lr 1", **(TORCH | {"head": f"{TORCH['head']} -m"})),
            {},
            "/v/bin/torchrun --standalone --nproc_per_node 2 -m job",
        ),
        (
            launched(WORKER, **TORCH),
            {"processes_per_node": 4},
            "/v/bin/torchrun --standalone --nproc_per_node 4 train.py",
        ),
        (
            launched("python -u -m job --lr 1", **(TORCH | {"head": "torchrun --standalone -m"})),
            {"processes_per_node": 4},
            "torchrun --standalone --nproc-per-node 4 -m job",
        ),
        (launched(WORKER, **TORCH), {"launcher": "python"}, "/v/bin/python -u train.py"),
        (
            launched(WORKER, **TORCH),
            {"launcher": "slurm", "nodes": 2},
            "srun --nodes=2 --ntasks-per-node=2 /v/bin/python -u train.py",
        ),
        (
            launched(WORKER, **TORCH),
            {"launcher": "accelerate"},
            "accelerate launch --num_processes=2 --num_machines=1 train.py",
        ),
        (
            launched(WORKER, launcher="accelerate", head="accelerate launch --num_processes 2 --cpu", nodes=1),
            {"processes_per_node": 3},
            "accelerate launch --num_processes 3 --cpu train.py",
        ),
        (
            launched("python -m job --lr 1"),
            {"launcher": "torchrun", "world_size": 1},
            "torchrun --standalone --nproc-per-node=1 -m job",
        ),
        (
            launched(WORKER, launcher="torchrun", nodes=2, processes_per_node=4),
            {"world_size": 8},
            "torchrun --nnodes=2 --nproc-per-node=4 --rdzv-backend=c10d --rdzv-endpoint=HOST:PORT train.py",
        ),
    ],
)
def test_the_launcher_is_the_one_that_was_used_or_the_one_that_is_asked_for(
    launch: dict[str, Any], options: dict[str, Any], expected: str
) -> None:
    command = resumed(launch, **{"world_size": 2, **options})
    assert shlex.join(command.words) == f"{expected} --lr 1 --resume-from-checkpoint {PATH}"


def test_a_launcher_on_the_path_is_called_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = tmp_path / "torchrun"
    there.touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    launch = launched(WORKER, launcher="torchrun", head=f"/v/bin/python {there} --standalone")
    assert resumed(launch).words[0] == "torchrun"
    monkeypatch.setenv("PATH", "/nowhere")
    assert resumed(launch).words[0] == str(there)


@pytest.mark.parametrize(
    ("launch", "options", "note"),
    [
        (launched("python train.py --hub-token '(redacted)'"), {}, '1 secret left out.*put it back where "\\(redacted\\)"'),
        (launched("python train.py"), {}, "started without an option for resuming: --resume-from-checkpoint must be"),
        (launched("python train.py --resume auto"), {"overrides": {"lr": "1"}}, "was started without --lr"),
        (launched("python train.py --resume config.yaml"), {}, "--resume was a switch and is left out"),
        (launched("python train.py", cwd="/elsewhere"), {}, "the job was started in /elsewhere: run it there"),
        (launched(WORKER, launcher="torchrun", nodes=1), {}, "the options of torchrun were not recorded"),
        (launched(WORKER, launcher="torchrun", nodes=2, head="torchrun --nnodes 2"), {}, "on each of the 2 nodes"),
        (launched(WORKER, launcher="torchrun", head="torchrun --max-restarts=3"), {}, "begin from this checkpoint again"),
        (launched(WORKER, **TORCH), {"launcher": "python"}, "starts a single process"),
        (launched(WORKER), {"launcher": "torchrun", "nodes": 2}, "where HOST:PORT stands"),
    ],
)  # fmt: skip
def test_what_has_to_be_known_is_said(launch: dict[str, Any], options: dict[str, Any], note: str) -> None:
    notes = resumed(launch, **{"world_size": 2, **options}).notes
    assert any(re.search(note, one) for one in notes), notes


def test_nothing_is_said_where_there_is_nothing_to_know() -> None:
    assert resumed(launched("python train.py --resume auto")).notes == ()


@pytest.mark.parametrize(
    ("launch", "problem"),
    [
        ({}, "does not say how its job was started"),
        ({"argv": "python train.py"}, "does not say how its job was started"),
        ({"argv": ["python", "-c", "pass"]}, "interactive session"),
        ({"argv": ["/usr/bin/python", "-m", "ipykernel_launcher", "-f", "x.json"]}, "interactive session"),
        ({"argv": ["python", "/v/bin/IPython"]}, "interactive session"),
        (launched(WORKER, launcher="torchrun", nodes=2), "say --nproc-per-node"),
    ],
)
def test_what_cannot_be_started_again_is_refused(launch: dict[str, Any], problem: str) -> None:
    with pytest.raises(NotTold, match=problem):
        resume_command(launch, PATH, world_size=7)


@pytest.mark.parametrize(
    "word", ["two words", "it's", "a\nb\\'", "\x1b[31m", "ü", "$HOME `x`", os.fsdecode(b"\xff\xfe1")]
)
def test_the_shell_reads_the_words_that_were_meant(word: str) -> None:
    command = resumed({"launcher": "python", "argv": ["python", "train.py", word]})
    assert str(command).isprintable()
    shown = subprocess.run(
        ["bash", "-c", f"printf '%s\\0' {command}"], check=True, capture_output=True, timeout=20
    ).stdout
    assert shown.split(b"\0")[:-1] == [os.fsencode(one) for one in command.words]
