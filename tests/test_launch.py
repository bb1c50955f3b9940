"""The launch scripts: that they parse and tell their usage, and what they do where it can be tried on one machine."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from forgather_ckpt.manifest import CheckpointManifest

LAUNCH = Path(__file__).parent.parent / "scripts" / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])
PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_parse(script):
    assert subprocess.run(["bash", "-n", script], capture_output=True, text=True).stderr == ""
    assert os.access(script, os.X_OK)
    if shellcheck := shutil.which("shellcheck"):
        checked = subprocess.run([shellcheck, "--severity=warning", script], capture_output=True, text=True)
        assert checked.stdout == ""


@pytest.mark.parametrize("name", [path.name for path in SCRIPTS if path.name != "quickstart.sh"])
def test_without_a_command_scripts_tell_their_usage(name):
    told = subprocess.run([LAUNCH / name], capture_output=True, text=True, env={"PATH": PATH})
    assert (told.returncode, told.stdout) == (2, "")
    assert (name in told.stderr and "MAX_RESTARTS" in told.stderr) or "usage: RUN_DIR=DIR" in told.stderr


@pytest.mark.parametrize("flag", ["-h", "--help"])
@pytest.mark.parametrize("name", ["one_node.sh", "several_nodes.sh", "simulated_nodes.sh", "elastic.sh"])
def test_asked_for_help_scripts_tell_their_own_usage(name, flag):
    told = subprocess.run([LAUNCH / name, flag], capture_output=True, text=True, env={"PATH": PATH})
    assert (told.returncode, told.stderr) == (0, "")
    assert name in told.stdout and "MAX_RESTARTS" in told.stdout


def test_the_table_names_every_script():
    table = (LAUNCH / "README.md").read_text()
    assert [path.name for path in SCRIPTS if f"| `{path.name}` |" not in table] == []


# ---- several nodes on one machine


def start_simulated(command: Sequence[str | Path], log: Path) -> subprocess.Popen[bytes]:
    with log.open("wb") as stream:
        return subprocess.Popen(
            [LAUNCH / "simulated_nodes.sh", *command],
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PATH": PATH, "NNODES": "2"},
        )


def stopped(process: subprocess.Popen[bytes], timeout: float) -> int:
    try:
        return process.wait(timeout)
    finally:
        if process.poll() is None:
            process.terminate()  # it ends its agents, and they their workers
            process.wait(30)


@pytest.mark.multiprocess
@pytest.mark.slow
def test_simulated_nodes_are_nodes_to_the_checkpoint(tmp_path):
    flags = ["--max-steps=2", "--save-steps=2", "--context=16", "--width=32", "--heads=2", "--layers=1"]
    log = tmp_path / "log"
    process = start_simulated(["-m", "forgather_ckpt.demo", *flags, "--output-dir", tmp_path / "run"], log)
    assert stopped(process, 100) == 0, log.read_text()
    manifest = CheckpointManifest.load(tmp_path / "run" / "checkpoint-2")
    assert manifest.topology.nodes == ((0,), (1,))


@pytest.mark.multiprocess
def test_simulated_nodes_that_are_stopped_leave_no_process(tmp_path):
    job = tmp_path / "job.py"
    job.write_text(
        "import os, pathlib, time\n"
        f"pathlib.Path({str(tmp_path)!r}, f'{{os.environ[\"RANK\"]}}.pid').write_text(str(os.getpid()))\n"
        "time.sleep(100)\n"
    )
    log = tmp_path / "log"
    process = start_simulated([job], log)
    try:
        deadline = time.monotonic() + 60
        while len(pids := [path.read_text() for path in tmp_path.glob("*.pid")]) < 2 or "" in pids:
            assert time.monotonic() < deadline and process.poll() is None, log.read_text()
            time.sleep(0.1)
    finally:
        process.terminate()
        code = stopped(process, 60)
    agents = [line.split()[-1] for line in log.read_text().splitlines() if line.startswith("simulated_nodes.sh: node")]
    assert code == 128 + signal.SIGTERM
    assert [pid for pid in (*pids, *agents) if Path("/proc", pid).exists()] == []


# ---- Slurm, with commands in its place that do what the test says

STUBS = {
    "srun": 'echo $$ >"$STATE/srun.pid"; echo "$*" >"$STATE/srun.args"; . "$STATE/job"',
    "scancel": 'kill "$(cat "$STATE/srun.pid")"',
    "scontrol": 'if [ "$1" = show ]; then echo node7; echo node8; else echo "$*" >>"$STATE/requeued"; fi',
    "fgckpt": 'step="$(cat "$STATE/step")"; echo "{\\"resume\\": {\\"step\\": $step}}"',
    "torchrun": "exit 99",
}


def start_slurm(state: Path, job: str) -> subprocess.Popen[str]:
    """Start the batch script at step 10 of 40; `job` is what srun does."""
    (state / "bin").mkdir()
    for name, body in STUBS.items():
        (state / "bin" / name).write_text(f"#!/bin/sh\n{body}\n")
        (state / "bin" / name).chmod(0o755)
    (state / "job").write_text(job)
    (state / "step").write_text("10")
    slurm = {"SLURM_JOB_ID": "123456", "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_JOB_NUM_NODES": "2"}
    return subprocess.Popen(
        [LAUNCH / "slurm.sbatch", "train.py", "--flag"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={"PATH": f"{state / 'bin'}:{PATH}", "STATE": str(state), "RUN_DIR": "run", "FINAL_STEP": "40", **slurm},
    )


@pytest.mark.parametrize(
    ("job", "code", "is_requeued", "says"),
    [
        ('echo 40 >"$STATE/step"; exit 1', 0, False, "finished at step 40"),
        ('echo 20 >"$STATE/step"; exit 1', 0, True, "at step 20 of 40 (torchrun: 1): back into the queue"),
        ('echo 20 >"$STATE/step"; exit 0', 0, True, "at step 20 of 40 (torchrun: 0): back into the queue"),
        ("exit 1", 1, False, "failed (torchrun: 1) without a new checkpoint since step 10"),
        ('rm "$STATE/step"; exit 1', 1, False, "failed (torchrun: 1) without a new checkpoint since step 10"),
    ],
)
def test_slurm_requeues_by_what_is_on_disk(tmp_path, job, code, is_requeued, says):
    batch = start_slurm(tmp_path, job)
    output, _ = batch.communicate(timeout=60)
    assert batch.returncode == code, output
    assert says in output
    assert (tmp_path / "requeued").exists() == is_requeued
    arguments = (tmp_path / "srun.args").read_text()
    assert "--rdzv-endpoint=node7:23456" in arguments
    assert arguments.endswith("train.py --flag\n")


def test_slurm_stops_and_requeues_before_the_time_is_over(tmp_path):
    batch = start_slurm(tmp_path, "exec sleep 100")
    deadline = time.monotonic() + 30
    while not (tmp_path / "srun.args").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    batch.send_signal(signal.SIGUSR1)
    output, _ = batch.communicate(timeout=60)
    assert batch.returncode == 0, output
    assert "back into the queue" in output
    assert (tmp_path / "requeued").read_text() == "requeue 123456\n"
