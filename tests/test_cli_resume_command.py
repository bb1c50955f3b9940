"""`fgckpt resume-command`: what it prints runs, resumes, and nothing else is on stdout."""

from __future__ import annotations

import dataclasses
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from forgather_ckpt import paths
from forgather_ckpt.annotations import annotate
from forgather_ckpt.cli import main
from forgather_ckpt.manifest import CheckpointManifest
from tests.checkpoints import commit_one
from tests.test_cli import Fgckpt, fgckpt  # noqa: F401
from tests.torchrun import torchrun

ARGUMENTS = {"learning_rate": 0.1, "max_steps": 12, "per_device_train_batch_size": 4, "bf16": True, "device": None}
LAUNCH = {
    "launcher": "torchrun",
    "nodes": 1,
    "processes_per_node": 2,
    "argv": ["/v/bin/python", "-u", "train.py", "--width", "8", "--learning-rate=0.1", "--resume", "auto"],
    "launch_command": [
        *("/v/bin/torchrun", "--standalone", "--nproc-per-node", "2", "train.py"),
        *("--width", "8", "--learning-rate=0.1", "--resume", "auto"),
    ],
    "cwd": "/elsewhere",
}

Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Make a checkpoint whose manifest says how its job was started."""

    def make(step: int, launch: dict[str, Any] | None = LAUNCH, **changes: Any) -> Path:
        path = commit_one(tmp_path, step)
        manifest = dataclasses.replace(
            CheckpointManifest.load(path),
            training_args=ARGUMENTS,
            environment={} if launch is None else {"launch": launch},
            **changes,
        )
        (path / paths.MANIFEST).write_bytes(manifest.to_bytes())
        return path

    return make


def test_the_command_alone_is_on_stdout(fgckpt: Fgckpt, make: Make, tmp_path: Path) -> None:  # noqa: F811
    make(2)
    newest = make(4)
    head = "/v/bin/torchrun --standalone --nproc-per-node 2 train.py --width 8 --learning-rate=0.1"
    result = fgckpt("resume-command", "-d", tmp_path)
    assert (result.code, result.out) == (0, f"{head} --resume {newest}\n")
    assert result.err == "note: the job was started in /elsewhere: run it there\n"
    assert fgckpt("resume-command", "latest~1", "-d", tmp_path).out.endswith("checkpoint-2\n")
    assert fgckpt("resume-command", newest).out == result.out
    assert fgckpt("resume-command", "-d", tmp_path, "--compare").out == result.out


@pytest.mark.parametrize(
    ("words", "written"),
    [
        (["--learning-rate", "1e-4"], "--width 8 --learning-rate=1e-4 --resume P"),
        (["latest", "--learning-rate=1e-4"], "--width 8 --learning-rate=1e-4 --resume P"),
        (["--learning_rate", "1e-4", "--width=16"], "--width 16 --learning-rate=1e-4 --resume P"),
        (["width=16"], "--width 16 --learning-rate=0.1 --resume P"),
        (["--resume", "auto"], "--width 8 --learning-rate=0.1 --resume auto"),
        (["--", "--nodes", "5"], "--width 8 --learning-rate=0.1 --resume P --nodes 5"),
        (["--offset", "-1"], "--width 8 --learning-rate=0.1 --resume P --offset -1"),
    ],
)
def test_options_of_the_script_replace_its_own(
    fgckpt: Fgckpt,  # noqa: F811
    make: Make,
    tmp_path: Path,
    words: list[str],
    written: str,
) -> None:
    path = make(4)
    selector, given = (words[:1], words[1:]) if words[0] == "latest" else ([], words)
    result = fgckpt("resume-command", *selector, "-d", tmp_path, *given)
    assert result.out.partition(" train.py ")[2] == written.replace("P", str(path)) + "\n", result.err


def test_compared_are_the_arguments_that_are_given_and_the_number_of_ranks(
    fgckpt: Fgckpt,  # noqa: F811
    make: Make,
    tmp_path: Path,
) -> None:
    make(4)
    result = fgckpt(
        *("resume-command", "-d", tmp_path, "--compare", "--nproc-per-node", "4", "--learning-rate", "1e-4"),
        *("--per-device-train-batch-size", "4", "--no-bf16", "--width", "16", "--device", "cpu"),
    )
    rows = {line.split("  ")[0].strip(): line for line in result.err.splitlines() if not line.startswith((" ", "note"))}
    words = ("same", "fine", "risky", "ignored")
    shown = {name: next(word for word in words if word in row.split()) for name, row in rows.items()}
    assert shown == {
        "learning_rate": "ignored",
        "per_device_train_batch_size": "same",
        "bf16": "risky",
        "device": "risky",
        "width": "risky",
        "world size": "fine",
        "samples per step": "risky",
    }
    assert {"8", "16"} <= set(rows["width"].split())


def test_a_quarantined_checkpoint_is_resumed_from_knowingly(fgckpt: Fgckpt, make: Make, tmp_path: Path) -> None:  # noqa: F811
    annotate(make(4), lambda noted: dataclasses.replace(noted, quarantined="a bad disk"))
    assert "note: the checkpoint is quarantined: a bad disk" in fgckpt("resume-command", "4", "-d", tmp_path).err
    data = fgckpt("resume-command", "4", "-d", tmp_path, "--json").data
    assert "the checkpoint is quarantined: a bad disk" in data["notes"]


def test_json_has_the_words_and_the_changes(fgckpt: Fgckpt, make: Make, tmp_path: Path) -> None:  # noqa: F811
    path = make(4)
    result = fgckpt("resume-command", "-d", tmp_path, "--json", "--learning-rate", "1e-4", "--depth", "3")
    data = result.data
    assert data["schema"] == "fgckpt.resume-command/1"
    assert (data["step"], data["path"], data["launcher"], data["world_size"]) == (4, str(path), "torchrun", 2)
    assert data["words"][-5:] == ["--learning-rate=1e-4", "--resume", str(path), "--depth", "3"]
    changes = {change["name"]: change for change in data["changes"]}
    assert changes["learning_rate"]["after"] == 1e-4
    assert changes["learning_rate"]["verdict"] == "ignored"
    assert "before" not in changes["depth"]
    assert any("without --depth" in note for note in data["notes"])
    assert result.err == ""


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--max-steps", "many"], "the checkpoint has 12 there; write a whole number"),
        (["--learning-rate", "x"], "the checkpoint has 0.1 there; write a number"),
        (["--max-steps"], "--max-steps: it has no value; the checkpoint has 12 there"),
        (["--max-steps", "--bf16"], "--max-steps: it has no value"),
        (["--bf16", "maybe"], "the checkpoint has True there; write true or false"),
        (["latest", "stray"], "'stray' is no option of the script"),
        (["--launcher", "mpirun"], "is not one of"),
    ],
)
def test_wrong_words_are_refused(fgckpt: Fgckpt, make: Make, tmp_path: Path, words: list[str], problem: str) -> None:  # noqa: F811
    make(4)
    result = fgckpt("resume-command", "-d", tmp_path, *words)
    assert (result.code, result.out) == (2, "")
    assert problem in result.err


def test_a_checkpoint_that_does_not_say_how_it_was_made_has_no_command(
    fgckpt: Fgckpt,  # noqa: F811
    make: Make,
    tmp_path: Path,
) -> None:
    make(4, launch=None)
    result = fgckpt("resume-command", "-d", tmp_path)
    assert (result.code, result.out) == (2, "")
    assert "does not say how its job was started; start it as before" in result.err
    assert fgckpt("resume-command", "5", "-d", tmp_path).code == 3


def test_a_path_with_an_equals_sign_is_a_selector(fgckpt: Fgckpt, make: Make, tmp_path: Path, monkeypatch: Any) -> None:  # noqa: F811
    make(4).rename(tmp_path / "lr=1")
    monkeypatch.chdir(tmp_path)
    assert fgckpt("resume-command", "lr=1").out.endswith("/lr=1\n")


JOB = """
import argparse, os
import torch
from torch import nn
from forgather_ckpt.resume_arguments import add_resume_arguments, resume_choice
from forgather_ckpt.trainers import DDPTrainer, TrainingArguments
from tests.test_trainers import Points, Regression

parser = argparse.ArgumentParser()
parser.add_argument("--output-dir")
parser.add_argument("--max-steps", type=int)
parser.add_argument("--hub-token", default="")
add_resume_arguments(parser)
options = parser.parse_args()
args = TrainingArguments(
    options.output_dir, max_steps=options.max_steps, save_steps=2, per_device_train_batch_size=2, device="cpu",
    resume_from_checkpoint=resume_choice(options), strict_args=options.strict_args, lr_scheduler_type="constant",
)
result = DDPTrainer(Regression(), args, Points(32)).train()
if os.environ["RANK"] == "0":
    print(f"token {options.hub_token!r}, from {result.resumed_from}, to step {result.steps}")
torch.distributed.destroy_process_group()
"""


@pytest.mark.multiprocess
@pytest.mark.slow
def test_the_printed_command_resumes_the_job(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script, run = tmp_path / "train.py", tmp_path / "run"
    script.write_text(JOB)
    first = torchrun([script, "--output-dir", run, "--max-steps", "4", "--fresh", "--hub-token", "hush"], nproc=2)
    assert first.returncode == 0, first.output
    assert b"hush" not in (run / "checkpoint-4" / paths.MANIFEST).read_bytes()

    assert main(["resume-command", "2", "-d", str(run), "--max-steps", "6"]) == 0
    printed = capsys.readouterr()
    assert "1 secret left out" in printed.err
    again = subprocess.run(
        ["bash", "-c", printed.out.replace("'(redacted)'", "hush")],
        capture_output=True,
        text=True,
        timeout=110,
        cwd=Path(__file__).parents[1],
        env={
            **os.environ,
            "PYTHONPATH": str(Path(__file__).parents[1]),
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "lo",
        },
    )
    assert again.returncode == 0, again.stderr
    assert f"token 'hush', from {run}/checkpoint-2, to step 6" in again.stdout
