"""What is asked of a running job: heard once, from its own user only, and whatever lies there harms nothing."""

import json
import os
import stat
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forgather_ckpt import lease, paths, requests
from forgather_ckpt.catalog import scan
from forgather_ckpt.errors import CheckpointNotFound, DeclarationError, FormatError, StorageError
from forgather_ckpt.lease import Lease
from forgather_ckpt.requests import KINDS, MAX_BYTES, MAX_REASON, Kind, Request, ask, discard_stale, is_live, take
from tests.json_mutations import mutated
from tests.system_calls import num_open_files
from tests.test_lease import HOLD, output, process


def place(run: Path, kind: str = "save") -> Path:
    return run / paths.request(kind)


def names(run: Path) -> list[str]:
    return sorted(path.name for path in run.iterdir())


# ---- asking and taking


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reason", [None, "", "the queue closes at 6 – \x1b[31m", "x" * MAX_REASON])
def test_what_is_asked_is_taken_once_as_it_was_said(tmp_path, kind, reason):
    asked = ask(tmp_path, kind, reason)
    assert (asked.kind, asked.reason) == (kind, reason)
    assert asked.by.endswith(f"@{os.uname().nodename} {os.getpid()}")
    assert asked.at.endswith("+00:00")
    assert stat.S_IMODE(place(tmp_path, kind).stat().st_mode) == 0o600
    assert names(tmp_path) == [paths.request(kind)]
    assert take(tmp_path) == [asked]
    assert take(tmp_path) == []
    assert names(tmp_path) == []


def test_kinds_do_not_take_each_other_s_place(tmp_path):
    asked = {kind: ask(tmp_path, kind, None) for kind in reversed(KINDS)}
    assert take(tmp_path) == [asked[kind] for kind in KINDS]


def test_who_asks_twice_has_asked_once(tmp_path):
    ask(tmp_path, "save", "first")
    second = ask(tmp_path, "save", "second")
    assert take(tmp_path) == [second]
    assert take(tmp_path) == []


def test_one_that_comes_while_another_is_taken_waits_for_the_next_look(tmp_path, monkeypatch):
    first = ask(tmp_path, "stop", "first")
    rename, later = Path.rename, []

    def rename_then_ask(path: Path, target: Path) -> Path:
        moved = rename(path, target)
        if not later:
            later.append(ask(tmp_path, "stop", "later"))
        return moved

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", rename_then_ask)
        assert take(tmp_path) == [first]
    assert take(tmp_path) == later


def test_however_many_look_at_once_each_is_taken_once(tmp_path):
    asked = []
    for _ in range(20):
        asked.append(ask(tmp_path, "save", None))
        with ThreadPoolExecutor(4) as pool:
            taken = [one for found in pool.map(lambda _: take(tmp_path), range(4)) for one in found]
        assert taken == asked[-1:]
    assert len({one.id for one in asked}) == len(asked)


def test_a_request_is_pending_until_it_is_taken_or_withdrawn(tmp_path):
    assert not requests.is_pending(tmp_path, "save")
    ask(tmp_path, "save")
    assert requests.is_pending(tmp_path, "save")
    assert not requests.is_pending(tmp_path, "stop")
    take(tmp_path)
    assert not requests.is_pending(tmp_path, "save")
    ask(tmp_path, "save")
    for _ in range(2):
        requests.withdraw(tmp_path, "save")
        assert not requests.is_pending(tmp_path, "save")
    assert take(tmp_path) == []


def test_what_was_asked_of_an_earlier_job_is_dropped(tmp_path):
    for kind in KINDS:
        ask(tmp_path, kind)
    discard_stale(tmp_path)
    assert names(tmp_path) == []
    asked = ask(tmp_path, "stop")
    assert take(tmp_path) == [asked]


def test_a_request_is_no_checkpoint_and_no_unfinished_save(tmp_path):
    ask(tmp_path, "save")
    found = scan(tmp_path)
    assert (found.checkpoints, found.rejected, found.unfinished) == ((), (), ())


@pytest.mark.parametrize(
    ("run", "kind", "reason", "error", "told"),
    [
        ("nothing", "save", None, CheckpointNotFound, "there is no run directory"),
        (".", "dance", None, DeclarationError, "kind is 'dance'; use one of save, stop, abort"),
        (".", "save", "x" * (MAX_REASON + 1), DeclarationError, "use at most 2000"),
    ],
)
def test_what_cannot_be_asked_is_refused(tmp_path, run, kind, reason, error, told):
    with pytest.raises(error, match=told):
        ask(tmp_path / run, kind, reason)
    assert names(tmp_path) == []


def test_a_place_that_is_taken_by_a_directory_is_a_typed_error_and_nothing_is_left(tmp_path):
    place(tmp_path).mkdir()
    with pytest.raises(StorageError, match="asking the job to save failed"):
        ask(tmp_path, "save")
    assert names(tmp_path) == [paths.request("save")]


# ---- what may lie there


def nothing_asked(run: Path, kind: Kind = "save") -> None:
    place(run, kind).write_bytes(Request(kind, "me", "now", None, "1").to_bytes())


def planted_link(run: Path) -> None:
    (run / "precious").write_bytes(Request("save", "me", "now", None, "1").to_bytes())
    place(run).symlink_to("precious")


PLANTED: dict[str, tuple[Callable[[Path], object], str]] = {
    "a link": (planted_link, "it is not a regular file"),
    "a pipe": (lambda run: os.mkfifo(place(run)), "it is not a regular file"),
    "nothing": (lambda run: place(run).touch(), "the request is not valid"),
    "no JSON": (lambda run: place(run).write_bytes(b"save, please"), "the request is not valid"),
    "no object": (lambda run: place(run).write_bytes(b"[]"), "expected an object"),
    "deep": (lambda run: place(run).write_bytes(b"[" * 50000), "the request is nested too deeply"),
    "not UTF-8": (lambda run: place(run).write_bytes(b"\xff\xfe"), "the request is not valid"),
    "huge": (lambda run: place(run).write_bytes(bytes(MAX_BYTES + 1)), f"at most {MAX_BYTES} are read"),
    "another kind": (
        lambda run: place(run).write_bytes(Request("stop", "me", "now", None, "1").to_bytes()),
        "the request asks to 'stop' in the file of 'save'",
    ),
    "another format": (
        lambda run: place(run).write_text(json.dumps({"format": "forgather_ckpt"})),
        "the request is of format 'forgather_ckpt'",
    ),
    "a long reason": (
        lambda run: place(run).write_bytes(Request("save", "me", "now", "x" * (MAX_REASON + 1), "1").to_bytes()),
        "a reason of 2001 characters",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", PLANTED)
def test_what_cannot_be_believed_is_warned_of_once_and_removed(tmp_path, what, caplog):
    plant, told = PLANTED[what]
    plant(tmp_path)
    before = num_open_files()
    asked = ask(tmp_path, "stop")
    assert take(tmp_path) == [asked]
    [message] = caplog.messages
    assert message.startswith(f"{place(tmp_path)} is not followed, and removed: ")
    assert told in message
    assert take(tmp_path) == []
    assert len(caplog.messages) == 1
    assert names(tmp_path) == (["precious"] if what == "a link" else [])
    assert num_open_files() == before
    asked = ask(tmp_path, "save")
    assert take(tmp_path) == [asked]


def test_other_users_are_not_heard(tmp_path, monkeypatch, caplog):
    asked = ask(tmp_path, "stop")
    uid = os.geteuid()
    with monkeypatch.context() as patch:
        patch.setattr(os, "geteuid", lambda: uid + 1)
        heard = take(tmp_path)
    assert heard == ([asked] if uid == 0 else [])
    if uid != 0:
        assert f"it belongs to user {uid}; only the job's user, {uid + 1}, and root are heard" in caplog.text


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to another user")
def test_a_file_of_another_user_is_not_heard(tmp_path, caplog):
    ask(tmp_path, "stop")
    os.chown(place(tmp_path, "stop"), 12345, -1)
    assert take(tmp_path) == []
    assert "it belongs to user 12345; only the job's user, 0, and root are heard" in caplog.text
    assert names(tmp_path) == []


def test_a_directory_in_its_place_stays_and_is_warned_of_once(tmp_path, caplog):
    (place(tmp_path) / "mine").mkdir(parents=True)
    asked = ask(tmp_path, "stop")
    assert [take(tmp_path), take(tmp_path), take(tmp_path)] == [[asked], [], []]
    assert caplog.messages == [f"{place(tmp_path)} is not followed: it is a directory; remove it"]
    assert (place(tmp_path) / "mine").is_dir()


def test_one_that_cannot_be_removed_is_not_heard_again_and_again(tmp_path, monkeypatch, caplog):
    nothing_asked(tmp_path)

    def refuse(path: Path, _: Path) -> Path:
        raise PermissionError(1, "Operation not permitted", str(path))

    monkeypatch.setattr(Path, "rename", refuse)
    assert [take(tmp_path) for _ in range(3)] == [[], [], []]
    assert caplog.messages == [f"{place(tmp_path)} is not followed: it cannot be removed: Operation not permitted"]


@pytest.mark.parametrize("run", ["nothing", "file"])
def test_looking_where_there_is_no_directory_finds_nothing(tmp_path, run):
    (tmp_path / "file").touch()
    assert take(tmp_path / run) == []
    discard_stale(tmp_path / run)


def test_where_nothing_was_asked_three_names_are_looked_at_and_nothing_else(tmp_path, monkeypatch):
    looked: list[str] = []
    lstat = os.lstat
    with monkeypatch.context() as patch:
        patch.setattr(os, "lstat", lambda path: (looked.append(Path(path).name), lstat(path))[1])
        for name in ("open", "stat", "listdir", "scandir"):
            patch.delattr(os, name)
        take(tmp_path)
    assert looked == [paths.request(kind) for kind in KINDS]


@given(st.data())
def test_any_json_is_a_request_or_a_format_error(data):
    request = Request("save", "me@here 1", "2024-01-02T03:04:05+00:00", "why", "ab")
    changed = mutated(data, json.loads(request.to_bytes()))
    try:
        request = Request.from_bytes(json.dumps(changed).encode(), "save")
    except FormatError:
        return
    assert request.kind == "save"
    assert Request.from_bytes(request.to_bytes(), "save") == request


@given(st.text(max_size=50), st.none() | st.text(max_size=50))
def test_a_request_is_told_in_one_line(by, reason):
    told = str(Request("stop", by, "now", reason, "1"))
    assert told.startswith("stop, asked by ")
    assert told.isprintable()


# ---- is there a job


def test_a_run_directory_is_live_while_a_job_holds_it(tmp_path):
    assert not is_live(tmp_path)
    with process(tmp_path, HOLD) as owner:
        assert owner.stdout.readline() == "held\n"
        before = num_open_files()
        assert [is_live(tmp_path), is_live(tmp_path)] == [True, True]
        assert num_open_files() == before
        owner.communicate("")
    assert (tmp_path / paths.LEASE).exists()
    assert not is_live(tmp_path)


def test_a_dead_job_is_not_live(tmp_path):
    with process(tmp_path, HOLD) as owner:
        assert owner.stdout.readline() == "held\n"
        owner.kill()
        owner.wait()
        assert not is_live(tmp_path)


def test_who_asks_of_itself_is_told_so_and_keeps_its_lease(tmp_path):
    held = Lease(tmp_path)
    assert is_live(tmp_path)
    assert output(tmp_path, "print(lease.is_held(run))") == ["True"]
    held.release()
    assert not is_live(tmp_path)


def test_looking_takes_nothing(tmp_path):
    Lease(tmp_path).release()
    assert not is_live(tmp_path)
    assert output(tmp_path, "held = attempt(); print('held' if held else 'refused')") == ["held"]


@pytest.mark.parametrize("there", [False, True])
def test_where_there_is_no_lease_or_no_directory_no_job_is_live(tmp_path, there):
    assert not is_live(tmp_path if there else tmp_path / "nothing")
    assert names(tmp_path) == []


def test_a_planted_link_in_place_of_the_lease_is_a_typed_error(tmp_path):
    (tmp_path / "precious").touch()
    (tmp_path / paths.LEASE).symlink_to("precious")
    before = dict(lease._held)
    with pytest.raises(StorageError, match="looking at the lease"):
        is_live(tmp_path)
    assert lease._held == before
