"""The log of metrics: strict JSON, one history over all resumes, and no harm where the disk fails."""

from __future__ import annotations

import datetime
import logging
import math
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from forgather_ckpt import strict_json
from forgather_ckpt.callbacks import JsonlLogger
from forgather_ckpt.trainers import Trainer, TrainingArguments
from tests.runs import logged
from tests.training_events import Events

NAME = "metrics.jsonl"


def train(run: Path, to_step: int, *, step: int = 0, loss: float = 3.0, logger: JsonlLogger | None = None) -> Events:
    """Steps up to this one, each of which is logged; an evaluation at every second, a checkpoint at every fourth."""
    events = Events([logger or JsonlLogger()], run, step=step, rank=0)
    while events.state.global_step < to_step:
        events.step(loss=loss)
        events.log(loss=loss)
        if events.state.global_step % 2 == 0:
            events.evaluate(eval_loss=loss + 1)
        if events.state.global_step % 4 == 0:
            events.save()
    return events


def lines(path: Path) -> list[dict[str, Any]]:
    """All lines, each read as strict JSON."""
    text = path.read_bytes()
    assert text == b"" or text.endswith(b"\n")
    return [strict_json.loads(line, what="a line", max_bytes=10_000) for line in text.splitlines()]


def history(path: Path) -> list[tuple[int, str]]:
    """Step and kind of each line."""
    return [(line["step"], next(key for key in line if key not in ("step", "epoch", "time"))) for line in lines(path)]


def undisturbed(to_step: int) -> list[tuple[int, str]]:
    whole = []
    for step in range(1, to_step + 1):
        whole += [(step, "loss")] + [(step, "eval_loss")] * (step % 2 == 0) + [(step, "checkpoint")] * (step % 4 == 0)
    return whole


def fill(path: Path, num_lines: int) -> bytes:
    path.write_bytes(b"".join(strict_json.dumps({"step": step, "loss": 3.0}) + b"\n" for step in range(num_lines)))
    return path.read_bytes()


# ---- what is written


def test_logs_evaluations_and_checkpoints_are_a_line_each(tmp_path: Path) -> None:
    before = datetime.datetime.now(datetime.UTC).replace(microsecond=0)
    events = Events([JsonlLogger()], tmp_path)
    for _ in range(5):
        events.step()
    events.log(loss=3.25, learning_rate=1e-4)
    events.evaluate(eval_loss=3.5, eval_accuracy=0.25)
    events.save(3.1, kind="emergency")
    events.end()
    found = lines(tmp_path / NAME)
    times = [datetime.datetime.fromisoformat(line.pop("time")) for line in found]
    assert found == [
        {"step": 5, "epoch": 0.5, "loss": 3.25, "learning_rate": 1e-4},
        {"step": 5, "epoch": 0.5, "eval_loss": 3.5, "eval_accuracy": 0.25},
        {"step": 5, "epoch": 0.5, "checkpoint": "checkpoint-5", "kind": "emergency", "seconds": 3.1},
    ]
    assert all(before <= time <= datetime.datetime.now(datetime.UTC) for time in times)


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (3, 3),
        (0.1, 0.1),
        (True, True),
        (None, None),
        ("warm-up", "warm-up"),
        ("ü\n", "ü\n"),
        (math.nan, "NaN"),
        (math.inf, "Infinity"),
        (-math.inf, "-Infinity"),
        (torch.tensor(2.5), 2.5),
        (torch.tensor([math.nan]), "NaN"),
        (np.float32("inf"), "Infinity"),
        (np.float64(0.5), 0.5),
        (np.int64(7), 7),
        ([1, math.nan], [1, "NaN"]),
        ({"a": (1, torch.tensor(2.0)), 3: None}, {"a": [1, 2.0], "3": None}),
        (torch.tensor([1.0, 2.0]), "tensor([1., 2.])"),
        (Path("a"), "a"),
    ],
    ids=repr,
)
def test_any_value_makes_a_line_of_strict_json(tmp_path: Path, value: Any, written: Any) -> None:
    events = Events([JsonlLogger()], tmp_path)
    events.log(value=value)
    assert lines(tmp_path / NAME)[0]["value"] == written


def test_a_metric_called_step_does_not_hide_the_step(tmp_path: Path) -> None:
    events = Events([JsonlLogger()], tmp_path)
    events.step()
    events.log(step=99, epoch=7, loss=3.0)
    [line] = lines(tmp_path / NAME)
    assert (line["step"], line["epoch"], line["loss"]) == (1, 0.1, 3.0)


def test_a_line_has_left_the_process_when_the_event_returns(tmp_path: Path) -> None:
    events = Events([JsonlLogger()], tmp_path)
    for number in range(1, 4):
        events.log(loss=3.0)
        assert len(lines(tmp_path / NAME)) == number


def test_a_path_of_ones_own_is_taken_and_its_directory_made(tmp_path: Path) -> None:
    path = tmp_path / "logs" / "mine.jsonl"
    train(tmp_path, 4, logger=JsonlLogger(str(path))).end()
    assert history(path) == undisturbed(4)
    assert not (tmp_path / NAME).exists()


def test_only_the_first_rank_writes(tmp_path: Path) -> None:
    events = Events([JsonlLogger()], tmp_path, rank=1)
    events.log(loss=3.0)
    events.evaluate(eval_loss=3.0)
    events.save()
    events.end()
    assert list(tmp_path.iterdir()) == []


# ---- one history


@pytest.mark.parametrize("died_at", [8, 9, 10, 11])
def test_a_run_that_was_interrupted_and_resumed_has_the_history_of_an_undisturbed_one(
    tmp_path: Path, died_at: int
) -> None:
    train(tmp_path, died_at, loss=9.0)
    train(tmp_path, 16, step=8).end()
    assert history(tmp_path / NAME) == undisturbed(16)
    assert [line["loss"] for line in lines(tmp_path / NAME) if "loss" in line] == [9.0] * 8 + [3.0] * 8
    assert [path.name for path in tmp_path.iterdir()] == [NAME]


def test_a_resume_from_an_older_checkpoint_takes_back_all_after_it(tmp_path: Path) -> None:
    train(tmp_path, 16).end()
    train(tmp_path, 6, step=4).end()
    assert history(tmp_path / NAME) == undisturbed(6)


def test_a_log_that_ends_at_the_checkpoint_is_not_written_anew(tmp_path: Path) -> None:
    train(tmp_path, 8).end()
    before = (tmp_path / NAME).stat().st_ino
    train(tmp_path, 12, step=8).end()
    assert (tmp_path / NAME).stat().st_ino == before
    assert history(tmp_path / NAME) == undisturbed(12)


WHOLE = b'{"step":1,"loss":3.0}\n{"step":2,"loss":2.5}\n'

TORN = [
    b'{"step":3,"lo',
    b'{"st',
    b"{",
    b'{"step":3,"loss":1.0}',
    b'{"step":3,"lo' + bytes(500),
    bytes(4096),
    b'{"step":3,"lo\n',
    bytes(100) + b"\n",
    b"\n",
]


@pytest.mark.parametrize("end", TORN, ids=lambda end: repr(end[:30]))
@pytest.mark.parametrize("whole", [WHOLE, b""], ids=["after lines", "alone"])
def test_a_torn_end_is_cut_away(tmp_path: Path, whole: bytes, end: bytes) -> None:
    (tmp_path / NAME).write_bytes(whole + end)
    events = Events([JsonlLogger()], tmp_path, step=2)
    assert (tmp_path / NAME).read_bytes() == whole
    events.step()
    events.log(loss=7.0)
    assert history(tmp_path / NAME)[-1] == (3, "loss")


def test_a_torn_end_of_an_attempt_that_logged_nothing_is_cut_away_at_a_fresh_start(tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(b'{"step":1,"lo')
    train(tmp_path, 4).end()
    assert history(tmp_path / NAME) == undisturbed(4)
    assert [path.name for path in tmp_path.iterdir()] == [NAME]


def test_a_fresh_start_keeps_the_log_of_the_run_before(tmp_path: Path) -> None:
    for number in range(3):
        train(tmp_path, 4, loss=float(number)).end()
    names = [NAME, f"{NAME}.old-1", f"{NAME}.old-2"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert [lines(tmp_path / name)[0]["loss"] for name in names] == [2.0, 0.0, 1.0]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"step,loss\n1,3.0\n", "line 1 is not a JSON object with a step"),
        (b'{"loss":3.0}\n{"step":1}\n', "line 1 is not"),
        (b'{"step":1}\n{"step":2,"lo\n{"step":3}\n', "line 2 is not"),
        (b'{"step":1}\n\n{"step":3}\n', "line 2 is not"),
        (b'{"step":"1"}\n{"step":2}\n', "line 1 is not"),
        (b'{"step":true}\n{"step":2}\n', "line 1 is not"),
        (b'[1]\n{"step":2}\n', "line 1 is not"),
        (b"[" * 100_000 + b'\n{"step":2}\n', "line 1 is not"),
        (b'{"step":1}\nnotes of mine\n', "line 2 is not"),
        (b"notes of mine", "what comes after line 0 is no beginning of a line"),
        (b"\xff\xfe\n\n", "line 1 is not"),
    ],
    ids=lambda content: repr(content[:30]),
)
@pytest.mark.parametrize("step", [0, 4])
def test_a_file_of_something_else_is_left_alone_and_the_log_has_another_name(
    tmp_path: Path, content: bytes, problem: str, step: int, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / NAME).write_bytes(content)
    logger = JsonlLogger()
    with caplog.at_level(logging.WARNING):
        train(tmp_path, 8, step=step, logger=logger).end()
    assert (tmp_path / NAME).read_bytes() == content
    assert "is left alone, as it is no log of metrics" in caplog.text and problem in caplog.text
    assert logger.path == tmp_path / "metrics-2.jsonl"
    assert history(logger.path) == [one for one in undisturbed(8) if one[0] > step]
    train(tmp_path, 12, step=4).end()
    assert history(logger.path) == [one for one in undisturbed(12) if one[0] > step], "a resume goes on there"


def test_a_log_behind_a_link_is_cut_where_it_lies(tmp_path: Path) -> None:
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    run.mkdir()
    elsewhere.mkdir()
    fill(elsewhere / "log", 10)
    (run / NAME).symlink_to(elsewhere / "log")
    train(run, 8, step=4).end()
    assert (run / NAME).is_symlink()
    assert [line["step"] for line in lines(elsewhere / "log")] == [0, 1, 2, 3, 4, 5, 6, 6, 7, 8, 8, 8]


class Parabola(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.w * x).square().sum()


def train_in_earnest(run: Path, **options: Any) -> None:
    samples = [torch.arange(3.0) + number for number in range(40)]
    args = TrainingArguments(
        run,
        max_steps=20,
        learning_rate=1e-3,
        logging_steps=2,
        eval_steps=3,
        save_steps=4,
        resume_from_checkpoint="auto",
    )
    Trainer(Parabola(), args, samples, eval_dataset=samples[:8], callbacks=[JsonlLogger()], **options).train()


def test_the_log_of_a_trainer_that_was_interrupted_and_resumed_is_that_of_an_undisturbed_one(tmp_path: Path) -> None:
    """But for the times: when something happened, and how long a save took."""

    class Interrupted(Exception):
        pass

    def interrupt(trainer: Trainer) -> None:
        if trainer.progress.step == 11:
            raise Interrupted

    train_in_earnest(tmp_path / "undisturbed")
    with pytest.raises(Interrupted):
        train_in_earnest(tmp_path / "resumed", on_step_end=[interrupt])
    assert [line["step"] for line in lines(tmp_path / "resumed" / NAME)][-1] == 10
    train_in_earnest(tmp_path / "resumed")
    assert logged(tmp_path / "resumed" / NAME) == logged(tmp_path / "undisturbed" / NAME)


# ---- a disk that fails


@contextmanager
def no_file_larger_than(num_bytes: int) -> Iterator[None]:
    """As a full disk: writes beyond fail, after a part of them."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_disk_that_is_full_is_told_once_and_leaves_no_part_of_a_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    events = Events([JsonlLogger()], tmp_path)
    events.log(loss=1.0)
    size = (tmp_path / NAME).stat().st_size
    with caplog.at_level(logging.WARNING), no_file_larger_than(size + 10):
        for _ in range(3):
            events.log(loss=2.0)
        assert (tmp_path / NAME).stat().st_size == size
    events.log(loss=3.0)
    events.end()
    assert [record.getMessage() for record in caplog.records] == [
        "metrics are not written for now, and training goes on: [Errno 27] File too large"
    ]
    assert [line["loss"] for line in lines(tmp_path / NAME)] == [1.0, 3.0]


@pytest.mark.parametrize("step", [0, 2])
def test_a_log_that_cannot_be_opened_is_told_and_harms_nothing(
    tmp_path: Path, step: int, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / NAME).mkdir()
    with caplog.at_level(logging.WARNING):
        train(tmp_path, 8, step=step).end()
    assert [record.getMessage()[:46] for record in caplog.records] == ["metrics are not written for now, and training "]


def test_a_log_that_cannot_be_cut_is_as_it_was(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = fill(tmp_path / NAME, 1000)
    with caplog.at_level(logging.WARNING), no_file_larger_than(100):
        train(tmp_path, 502, step=500).end()
    assert (tmp_path / NAME).read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == [NAME]
    assert len(caplog.records) == 1
