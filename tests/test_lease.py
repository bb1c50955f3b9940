"""One writing job per run directory: the second is refused, a dead one's place is taken."""

import json
import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from forgather_ckpt import lease, paths
from forgather_ckpt.errors import RunDirectoryInUse, StorageError
from forgather_ckpt.lease import Lease
from tests.system_calls import num_open_files

PRELUDE = """
import os, sys, time
from pathlib import Path
from forgather_ckpt import lease
from forgather_ckpt.errors import CheckpointError
from forgather_ckpt.lease import Lease
lease.PATIENCE_SECONDS = 0.0
run = Path(sys.argv[1])
def attempt():
    try:
        return Lease(run)
    except CheckpointError as err:
        print(type(err).__name__, err.message, flush=True)
"""


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(lease, "PATIENCE_SECONDS", 0.0)


@contextmanager
def process(run, code):
    """Another process; what it prints line by line, and its pid. It ends when its standard input does."""
    environment = {**os.environ, "PYTHONPATH": str(Path(lease.__file__).parents[1])}
    with subprocess.Popen(
        [sys.executable, "-c", PRELUDE + code, str(run)],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as child:
        yield child


HOLD = "held = attempt(); print('held', flush=True); sys.stdin.read()"
TRY = "held = attempt(); print('held' if held else 'refused', flush=True)"


def output(run, code) -> list[str]:
    with process(run, code) as child:
        return child.communicate("")[0].splitlines()


def test_a_second_process_is_refused_by_host_and_pid(tmp_path):
    with process(tmp_path, HOLD) as owner:
        assert owner.stdout.readline() == "held\n"
        with pytest.raises(RunDirectoryInUse) as caught:
            Lease(tmp_path)
        assert f"another job writes to {tmp_path}" in caught.value.message
        assert f'"pid": {owner.pid}' in caught.value.message
        assert os.uname().nodename in caught.value.message
        assert "Stop it, or use another output_dir" in caught.value.message
        assert caught.value.path == str(tmp_path)
        owner.communicate("")
    Lease(tmp_path).release()


def test_the_owner_is_told_of_itself(tmp_path):
    held = Lease(tmp_path)
    [line, refused] = output(tmp_path, TRY)
    assert line.startswith("RunDirectoryInUse")
    assert f'"pid": {os.getpid()}' in line
    assert refused == "refused"
    held.release()


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM])
def test_a_dead_owner_s_lease_is_taken_over(tmp_path, signum):
    with process(tmp_path, HOLD) as owner:
        assert owner.stdout.readline() == "held\n"
        owner.send_signal(signum)
        owner.wait()
        held = Lease(tmp_path)
        assert json.loads((tmp_path / paths.LEASE).read_text())["pid"] == os.getpid()
        held.release()


def test_a_stopped_owner_is_not_dead(tmp_path):
    with process(tmp_path, HOLD) as owner:
        assert owner.stdout.readline() == "held\n"
        owner.send_signal(signal.SIGSTOP)
        with pytest.raises(RunDirectoryInUse):
            Lease(tmp_path)
        owner.send_signal(signal.SIGCONT)
        owner.communicate("")


def test_an_owner_that_is_just_leaving_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "PATIENCE_SECONDS", 60.0)
    with process(tmp_path, HOLD) as owner:
        assert owner.stdout.readline() == "held\n"
        monkeypatch.setattr(lease.time, "sleep", lambda _: owner.communicate("") if owner.poll() is None else None)
        Lease(tmp_path).release()


def test_one_process_may_hold_it_several_times(tmp_path):
    first, second = Lease(tmp_path), Lease(tmp_path)
    first.release()
    assert output(tmp_path, TRY)[-1] == "refused"
    first.release()
    assert output(tmp_path, TRY)[-1] == "refused"
    second.release()
    assert output(tmp_path, TRY) == ["held"]


def test_the_same_directory_under_another_name_is_the_same(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to("run")
    first, second = Lease(tmp_path / "run"), Lease(tmp_path / "link")
    first.release()
    assert output(tmp_path / "run", TRY)[-1] == "refused"
    second.release()


def test_directories_have_leases_of_their_own(tmp_path):
    held = Lease(tmp_path / "one")
    assert output(tmp_path / "other", TRY) == ["held"]
    held.release()


FORK_THAT_OUTLIVES = """
held = attempt()
if os.fork() == 0:
    print('child', flush=True)
    sys.stdin.read()
os._exit(0)
"""


def test_a_forked_child_does_not_keep_a_dead_owner_s_lease(tmp_path):
    with process(tmp_path, FORK_THAT_OUTLIVES) as owner:
        assert owner.stdout.readline() == "child\n"
        owner.wait()
        held = Lease(tmp_path)
        held.release()
        owner.stdin.close()


FORK_THAT_WANTS_IT = """
held = attempt()
if os.fork() == 0:
    print('held' if attempt() else 'refused', flush=True)
    os._exit(0)
os.wait()
"""


def test_a_forked_child_is_another_process(tmp_path):
    [line, refused] = output(tmp_path, FORK_THAT_WANTS_IT)
    assert line.startswith("RunDirectoryInUse another job writes to")
    assert refused == "refused"


FORK_THAT_LEAVES = """
held = attempt()
if os.fork() == 0:
    held.release()
    os._exit(0)
os.wait()
print('held', flush=True)
sys.stdin.read()
"""


def test_a_forked_child_cannot_give_it_away(tmp_path):
    with process(tmp_path, FORK_THAT_LEAVES) as owner:
        assert owner.stdout.readline() == "held\n"
        with pytest.raises(RunDirectoryInUse):
            Lease(tmp_path)
        owner.communicate("")


def test_a_planted_link_is_refused_and_its_target_stays(tmp_path):
    (tmp_path / "precious").write_text("precious")
    run = tmp_path / "run"
    run.mkdir()
    (run / paths.LEASE).symlink_to(tmp_path / "precious")
    with pytest.raises(StorageError, match="taking the lease of the run directory failed"):
        Lease(run)
    assert (tmp_path / "precious").read_text() == "precious"


def test_a_run_directory_that_cannot_be_made_is_a_typed_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=r"taking the lease of the run directory failed at .*file"):
        Lease(tmp_path / "file" / "run")


def test_no_descriptor_stays_open(tmp_path):
    with process(tmp_path, HOLD) as owner:
        assert owner.stdout.readline() == "held\n"
        before = num_open_files()
        for _ in range(3):
            with pytest.raises(RunDirectoryInUse):
                Lease(tmp_path)
            Lease(tmp_path / "other").release()
        assert num_open_files() == before
        owner.communicate("")
