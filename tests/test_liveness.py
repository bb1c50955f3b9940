"""Whether a process is dead: only when that is certain."""

import dataclasses
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from forgather_ckpt import strict_json
from forgather_ckpt.liveness import ProcessId

OWN = ProcessId.own()


def identify(pid: int) -> ProcessId:
    started = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    return ProcessId(OWN.realm, pid, started)


@pytest.fixture
def child():
    with subprocess.Popen([sys.executable, "-c", "print('up', flush=True); input()"], stdin=-1, stdout=-1) as process:
        assert process.stdout.readline() == b"up\n"
        yield process
        process.kill()


def test_a_process_knows_itself():
    assert OWN == ProcessId.own() == identify(os.getpid())
    assert OWN.realm
    assert not OWN.is_dead(OWN)


def test_a_living_and_a_stopped_process_are_not_dead(child):
    process = identify(child.pid)
    assert not process.is_dead(OWN)
    child.send_signal(signal.SIGSTOP)
    assert not process.is_dead(OWN)
    child.send_signal(signal.SIGCONT)


def test_a_killed_process_is_dead_even_before_it_is_reaped(child):
    process = identify(child.pid)
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert process.is_dead(OWN), "a zombie"
    child.wait()
    assert process.is_dead(OWN)


def test_a_later_process_with_the_same_pid_is_another(child):
    assert dataclasses.replace(identify(child.pid), started="1").is_dead(OWN)


@pytest.mark.parametrize("realm", ["", "another boot:4026531836"])
def test_of_processes_elsewhere_nothing_is_known(realm):
    elsewhere = dataclasses.replace(OWN, realm=realm, pid=2**22 + 1)
    assert not elsewhere.is_dead(OWN)
    assert not OWN.is_dead(elsewhere)
    assert not elsewhere.is_dead(elsewhere) or realm
    assert dataclasses.replace(OWN, pid=2**22 + 1).is_dead(OWN)


def test_a_name_with_parentheses_does_not_confuse(tmp_path):
    program = tmp_path / "a) S 1 (b"
    program.symlink_to("/bin/sleep")
    with subprocess.Popen([program, "60"]) as process:
        assert not identify(process.pid).is_dead(OWN)
        process.kill()


def test_it_survives_json():
    data = strict_json.loads(strict_json.dumps(OWN.to_json()), what="id", max_bytes=1000)
    assert ProcessId.from_json(data) == OWN


def test_where_the_system_tells_nothing_nobody_is_dead(monkeypatch):
    def refuse(*_, **__):
        raise OSError

    monkeypatch.setattr("pathlib.Path.read_text", refuse)
    own = ProcessId.own()
    assert (own.realm, own.pid) == ("", os.getpid())
    assert not own.is_dead(own)
