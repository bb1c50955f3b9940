"""Deleting in the background: nobody waits for it, it fails in the log only, and it ends in bounded time."""

import threading
from pathlib import Path

import pytest

from forgather_ckpt import files
from forgather_ckpt.deleter import Deleter

PATIENCE_SECONDS = 30


def trash(directory: Path, name: str) -> Path:
    path = directory / f".trash-{name}"
    path.mkdir()
    (path / "file").write_bytes(b"x")
    return path


def held_up(monkeypatch: pytest.MonkeyPatch) -> tuple[threading.Event, list[tuple[str, str]]]:
    """Deletions wait for the event; (what, on which thread) of each."""
    go, seen = threading.Event(), []
    delete = files.delete

    def wait(path: Path) -> None:
        assert go.wait(PATIENCE_SECONDS)
        seen.append((path.name, threading.current_thread().name))
        delete(path)

    monkeypatch.setattr(files, "delete", wait)
    return go, seen


def test_who_gives_something_to_delete_does_not_wait_for_it(tmp_path, monkeypatch):
    go, seen = held_up(monkeypatch)
    deleter = Deleter()
    paths = [trash(tmp_path, name) for name in "ab"]
    for path in (*paths, paths[0]):
        deleter.delete(path)
    assert all(path.exists() for path in paths) and seen == []
    go.set()
    deleter.close(PATIENCE_SECONDS)
    assert seen == [(".trash-a", "forgather_ckpt deleter"), (".trash-b", "forgather_ckpt deleter")], (
        "each once, in order"
    )
    assert list(tmp_path.iterdir()) == []
    deleter.close(PATIENCE_SECONDS)


def test_a_failure_is_logged_and_the_next_one_is_deleted_all_the_same(tmp_path, monkeypatch, caplog):
    delete = files.delete
    bad, good = trash(tmp_path, "bad"), trash(tmp_path, "good")

    def fail(path: Path) -> None:
        if path == bad:
            raise PermissionError(1, "not permitted", str(path))
        delete(path)

    monkeypatch.setattr(files, "delete", fail)
    deleter = Deleter()
    deleter.delete(bad)
    deleter.delete(good)
    deleter.close(PATIENCE_SECONDS)
    assert bad.exists() and not good.exists()
    assert f"{bad} could not be deleted" in caplog.text


def test_the_end_does_not_wait_for_ever(tmp_path, monkeypatch, caplog):
    go, _ = held_up(monkeypatch)
    deleter = Deleter()
    path = trash(tmp_path, "slow")
    deleter.delete(path)
    deleter.close(0.01)
    assert path.exists()
    assert "not all deleted in 0.01 s; the next job deletes the rest" in caplog.text
    go.set()


def test_where_nothing_is_to_be_deleted_there_is_no_thread():
    before = threading.active_count()
    Deleter().close(PATIENCE_SECONDS)
    assert threading.active_count() == before
