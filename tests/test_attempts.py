"""A checkpoint that kills each job that loads it is noticed; nothing about noticing it ever stops a training."""

import errno
import logging
import os
import signal
from pathlib import Path

import pytest

from forgather_ckpt import attempts, catalog, paths
from forgather_ckpt.attempts import begin, exhausted, succeeded
from tests.checkpoints import commit_one
from tests.ranks import run_ranks
from tests.system_calls import watched

A, B = "a" * 32, "b" * 32


def file_of(run: Path) -> Path:
    return run / paths.LOAD_ATTEMPTS


# ---- what counts


@pytest.mark.parametrize(
    ("history", "given_up"),
    [
        ("", ""),
        ("A A", ""),
        ("A A A", "A"),
        ("A A A A", "A"),
        ("A A ok A A", ""),
        ("A A ok A A A", "A"),
        ("A A A B", "A"),
        ("A A A B ok", "A"),  # the older one works: the newer one is not tried again
        ("A A A B ok B ok B ok B", "A"),
        ("A A A B B B", "A B"),
        ("A A A B A ok", ""),  # somebody asked for it, and it loaded
        ("A A B ok A", ""),
        ("A B A B A", "A"),
    ],
)
def test_attempts_without_a_success_add_up(tmp_path, history, given_up):
    for word in history.split():
        succeeded(tmp_path) if word == "ok" else begin(tmp_path, {"A": A, "B": B}[word])
    assert exhausted(tmp_path) == {{"A": A, "B": B}[word] for word in given_up.split()}


def test_each_attempt_is_told_its_number_and_the_limit_is_the_callers(tmp_path):
    assert [begin(tmp_path, A) for _ in range(3)] == [1, 2, 3]
    assert begin(tmp_path, B) == 1
    assert [exhausted(tmp_path, limit) for limit in (1, 3, 4)] == [{A, B}, {A}, frozenset()]


def test_after_a_success_nothing_is_left_of_it(tmp_path):
    succeeded(tmp_path)
    begin(tmp_path, A)
    assert file_of(tmp_path).exists()
    succeeded(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.multiprocess
def test_jobs_that_are_killed_while_they_load_are_counted(tmp_path):
    def load(rank: int, world_size: int) -> None:
        begin(tmp_path, A)
        os.kill(os.getpid(), signal.SIGKILL)

    for _ in range(3):
        assert exhausted(tmp_path) == frozenset()
        run_ranks(1, load, backend=None, expect_dead=[0])
    assert exhausted(tmp_path) == {A}


def test_an_attempt_is_durable_before_anything_is_loaded(tmp_path):
    with watched(tmp_path) as calls:
        begin(tmp_path, A)
    assert [name for name, *_ in calls.seen if name in ("fsync", "rename")] == ["fsync", "rename", "fsync"]


def test_the_file_is_no_checkpoint(tmp_path):
    path = commit_one(tmp_path, 1)
    begin(tmp_path, A)
    found = catalog.scan(tmp_path)
    assert ([one.path for one in found.checkpoints], found.rejected, found.unfinished) == ([path], (), ())


# ---- what goes wrong


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[1]",
        b'{"format": "another", "version": "1.0", "begun": {}}',
        b'{"format": "forgather_ckpt.load_attempts", "version": "2.0", "begun": {}}',
        b'{"format": "forgather_ckpt.load_attempts", "version": "1.0"}',
        b'{"format": "forgather_ckpt.load_attempts", "version": "1.0", "begun": {"a": -3}}',
        b'{"format": "forgather_ckpt.load_attempts", "version": "1.0", "begun": {"a": true}}',
        b" " * (attempts.MAX_BYTES + 1),
    ],
)
def test_a_damaged_file_counts_as_none_and_is_replaced(tmp_path, content, caplog):
    file_of(tmp_path).write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert exhausted(tmp_path, 1) == frozenset()
    assert "may not be noticed" in caplog.text
    assert begin(tmp_path, A) == 1
    assert exhausted(tmp_path, 1) == {A}
    file_of(tmp_path).write_bytes(content)
    succeeded(tmp_path)
    assert not file_of(tmp_path).exists()


def test_a_link_in_its_place_is_not_followed(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    elsewhere = tmp_path / "elsewhere"
    begin(tmp_path, A)
    file_of(tmp_path).rename(elsewhere)
    file_of(run).symlink_to(elsewhere)
    before = elsewhere.read_bytes()
    assert exhausted(run, 1) == frozenset()
    assert begin(run, B) == 1
    assert elsewhere.read_bytes() == before


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EIO])
@pytest.mark.parametrize("change", [lambda run: begin(run, B), succeeded], ids=["begin", "succeeded"])
def test_whatever_call_fails_it_is_told_and_stops_nobody(tmp_path, change, number, caplog):
    def attempt(fail_at: int | None) -> int:
        begin(tmp_path, A)
        with watched(tmp_path) as calls:
            calls.fail_at, calls.errno = fail_at, number
            change(tmp_path)
        return len(calls.seen)

    num_calls = attempt(None)
    for place in range(num_calls):
        caplog.clear()
        attempt(place)
        assert caplog.text.count(os.strerror(number)) >= 1, place
        assert exhausted(tmp_path, 1) <= {A, B}


def test_an_attempt_that_was_not_written_down_counts_as_none(tmp_path):
    begin(tmp_path, A)
    with watched(tmp_path) as calls:
        calls.fail_at = 1
        assert begin(tmp_path, A) == 0
    assert begin(tmp_path, A) == 2


def test_a_run_directory_that_is_not_there_stops_nobody(tmp_path):
    run = tmp_path / "none"
    succeeded(run)
    assert (begin(run, A), exhausted(run)) == (0, frozenset())
    assert not run.exists()


def test_the_file_stays_small_however_many_checkpoints_are_tried(tmp_path, monkeypatch):
    monkeypatch.setattr(attempts, "_MAX_CHECKPOINTS", 3)
    digests = [f"{number:032x}" for number in range(5)]
    for digest in digests:
        begin(tmp_path, digest)
    assert exhausted(tmp_path, 1) == set(digests[2:])
