"""The progress bar: what its lines say, how seldom it looks at the device, and that a bar is not torn."""

from __future__ import annotations

import fcntl
import io
import logging
import os
import re
import struct
import termios
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from forgather_ckpt import figures
from forgather_ckpt.callbacks import ProgressBar
from forgather_ckpt.callbacks.memory_growth import BASELINE_STEP, MemoryGrowth, bytes_in_use
from forgather_ckpt.callbacks.step_times import StepTimes
from tests.ranks import run_ranks, values
from tests.training_events import Events


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


class Run:
    """A training whose steps take a second each, shown in lines or on a terminal."""

    def __init__(
        self,
        run: Path,
        *,
        stream: Any = None,
        every_seconds: float = 30,
        memory: Callable[[], int] = lambda: 10**9,
        **place: Any,
    ) -> None:
        self.clock, self.stream = Clock(), stream or io.StringIO()
        self.bar = ProgressBar(every_seconds, self.stream, clock=self.clock, memory=memory)
        self.events = Events([self.bar], run, **place)

    def steps(self, count: int, loss: float | torch.Tensor = 3.0, seconds: float = 1.0) -> None:
        for _ in range(count):
            self.clock.now += seconds
            self.events.step(loss=loss)

    def save(self, seconds: float) -> None:
        self.clock.now += seconds
        self.events.save(seconds)

    @property
    def lines(self) -> list[str]:
        return self.stream.getvalue().splitlines()


# ---- lines


def test_a_line_says_all_that_is_known(tmp_path: Path) -> None:
    memory = iter([14_000_000_000, 14_245_000_000])
    run = Run(tmp_path, every_seconds=503, memory=memory.__next__, step=8750, max_steps=20_000)
    run.steps(100, loss=9.0, seconds=2)
    run.save(3.0)
    run.steps(149, loss=3.0, seconds=2)
    run.steps(1, loss=4.0, seconds=2)
    assert run.lines == [
        "Training:  45% | step 9000/20000 | loss 4.00 (avg 3.02) | 0.50 it/s | eta 6h08m | ckpt 150 steps ago (3.0 s, 0.6 %)"
        " | mem 14.2 GB +245 MB"
    ], "11,000 steps of 2 s, and a 249th part of the save for each, are 6:08:52"


def test_a_line_comes_every_so_many_seconds_and_at_the_end(tmp_path: Path) -> None:
    run = Run(tmp_path, max_steps=100)
    run.steps(29)
    assert run.lines == []
    run.steps(71)
    run.events.end()
    assert [re.findall(r"step (\d+)/", line) for line in run.lines] == [["30"], ["60"], ["90"], ["100"]]
    assert run.lines[-1] == (
        "Training: 100% | step 100/100 | loss 3.00 (avg 3.00) | 1.00 it/s | took 1m40s | no ckpt | mem 1.00 GB +0 B"
    )


@pytest.mark.parametrize(
    ("place", "num_steps", "line"),
    [
        (dict(max_steps=100), 0, "Training:   0% | step 0/100 | took 0s | no ckpt | mem 1.00 GB"),
        (dict(step=100, max_steps=100), 0, "Training: 100% | step 100/100 | took 0s | ckpt 0 steps ago | mem 1.00 GB"),
        (
            dict(max_steps=100),
            1,
            "Training:   1% | step 1/100 | loss 3.00 (avg 3.00) | took 1s | no ckpt | mem 1.00 GB",
        ),
        (
            dict(step=50, max_steps=100),
            1,
            "Training:  51% | step 51/100 | loss 3.00 (avg 3.00) | took 1s | ckpt 1 step ago | mem 1.00 GB",
        ),
        (dict(max_steps=0), 0, "Training:   0% | step 0/0 | took 0s | no ckpt | mem 1.00 GB"),
    ],
    ids=str,
)
def test_what_is_not_known_yet_is_left_out(tmp_path: Path, place: dict[str, int], num_steps: int, line: str) -> None:
    run = Run(tmp_path, **place)
    run.steps(num_steps)
    run.events.end()
    assert run.lines == [line]


def test_the_average_is_that_of_the_last_50_steps_of_this_process(tmp_path: Path) -> None:
    run = Run(tmp_path, every_seconds=1)
    for loss in range(1, 61):
        run.steps(1, loss=float(loss))
    averages = [float(found) for line in run.lines for found in re.findall(r"avg ([\d.]+)", line)]
    assert averages[0] == 1.0
    assert averages[49] == 25.5
    assert averages[59] == 35.5


def test_a_loss_that_is_not_finite_is_shown(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.steps(30, loss=float("nan"))
    assert "| loss nan (avg nan) |" in run.lines[0]


def test_no_step_waits_for_the_device_while_no_line_is_due(tmp_path: Path) -> None:
    run = Run(tmp_path, every_seconds=100)
    unreadable = torch.empty((), device="meta")
    run.steps(49, loss=unreadable)
    with pytest.raises(RuntimeError, match="meta"):
        float(unreadable)
    run.steps(51, loss=2.5)
    assert "loss 2.50 (avg 2.50)" in run.lines[0], "losses that have left the window are never read"


def test_only_the_first_rank_shows_anything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(tmp_path, every_seconds=1, rank=1)
    run.steps(5)
    run.save(1.0)
    run.events.evaluate(eval_loss=1.0)
    run.events.end()
    assert run.lines == []
    assert capsys.readouterr() == ("", "")


def test_a_second_training_begins_anew(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.steps(10, loss=100.0, seconds=100.0)
    run.events.end()
    run.stream.truncate(0)
    run.events = Events([run.bar], tmp_path, max_steps=100)
    run.steps(2, loss=2.0)
    run.events.end()
    assert "loss 2.00 (avg 2.00) | 1.00 it/s | took 2s | " in run.lines[-1]


@pytest.mark.parametrize("every_seconds", [-1, float("nan"), "30", True])
def test_a_time_that_means_nothing_is_refused(every_seconds: Any) -> None:
    with pytest.raises(ValueError, match="every_seconds must be a number of at least 0, not"):
        ProgressBar(every_seconds)


# ---- times


def test_saves_and_evaluations_are_no_part_of_the_time_of_a_step_but_of_the_time_that_is_left(tmp_path: Path) -> None:
    run = Run(tmp_path, every_seconds=10**9, max_steps=1101)
    run.steps(1, seconds=500.0)
    for _ in range(10):
        run.steps(10)
        run.clock.now += 4.0
        run.events.evaluate(eval_loss=1.0)
        run.save(6.0)
    run.steps(1)
    times = run.bar._shown.times
    assert times.seconds_per_step == 1.0
    assert times.seconds_left(1000) == pytest.approx(1000 * (1 + 100 / 101))


def test_steps_that_all_have_a_save_between_them_are_timed_with_it() -> None:
    times = StepTimes()
    for now in (0.0, 3.0, 6.0):
        times.step(now)
        times.interrupt()
    assert times.seconds_per_step == 3.0
    assert times.seconds_left(10) == 30.0


def test_only_recent_steps_count() -> None:
    times, now = StepTimes(), 0.0
    for number in range(100):
        now += 5.0 if number < 50 else 1.0
        times.step(now)
    assert times.seconds_per_step == 1.0


@pytest.mark.parametrize("moments", [[], [0.0], [2.0, 2.0, 2.0]], ids=str)
def test_without_times_nothing_is_said(moments: list[float]) -> None:
    times = StepTimes()
    for now in moments:
        times.step(now)
    assert times.seconds_per_step is None and times.seconds_left(100) is None


# ---- memory


def test_memory_that_grows_by_more_than_half_is_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    sizes = iter([100e6, 1000e6, 1500e6, 1501e6, 3000e6])
    growth = MemoryGrowth(lambda: int(next(sizes)))
    with caplog.at_level(logging.WARNING):
        assert growth.look() == (100_000_000, None)
        for _ in range(BASELINE_STEP + 40):
            growth.step()
        assert growth.look() == (1_500_000_000, 500_000_000)
        assert not caplog.records
        growth.look()
        growth.look()
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == [
        "memory has grown by 50 % in 40 steps, from 1.00 GB to 1.50 GB"
    ]


def test_memory_is_that_of_this_process() -> None:
    before = bytes_in_use()
    held = bytearray(b"x" * 200_000_000)
    assert 150_000_000 < bytes_in_use() - before < 450_000_000
    del held


@pytest.mark.gpu
def test_memory_is_that_of_tensors_where_cuda_is_used() -> None:
    """In a process of its own: this one shall not use CUDA (tests/ranks.py)."""

    def case(rank: int, world_size: int) -> None:
        held = torch.zeros(100_000_000, dtype=torch.uint8, device="cuda")
        assert bytes_in_use() == torch.cuda.memory_allocated() >= held.nbytes

    values(run_ranks(1, case, backend=None))


# ---- on a terminal


def screen_lines(stream: io.StringIO) -> list[str]:
    """What is on the screen: a carriage return begins the line anew."""
    lines = []
    for line in stream.getvalue().split("\n"):
        shown = ""
        for part in line.split("\r"):
            shown = part + shown[len(part) :]
        lines.append(shown.rstrip())
    return lines


def test_a_bar_is_redrawn_in_one_line(tmp_path: Path) -> None:
    run = Run(tmp_path, stream=Terminal(), step=5, max_steps=100)
    run.steps(45)
    [line] = screen_lines(run.stream)
    run.events.end()
    assert re.fullmatch(
        r"Training:  50% \|█+ +\| step 50/100 \| loss 3.00 .* \| eta 50s \| ckpt 45 steps ago \| mem .*", line
    )
    last, after = screen_lines(run.stream)
    assert "| step 50/100 |" in last and after == ""


def read_to_the_end(controlling: int) -> str:
    """What was written to a terminal that is closed at its other end, which reads as an error there."""
    text = b""
    with suppress(OSError):
        while part := os.read(controlling, 4096):
            text += part
    os.close(controlling)
    return text.decode()


@pytest.mark.parametrize(
    ("rows", "first"), [(40, "Training:  10% |█"), (0, "Training:  10% | step 10/100 |")], ids=["usual", "without rows"]
)
def test_a_terminal_of_no_size_gets_lines(tmp_path: Path, rows: int, first: str) -> None:
    controlling, attached = os.openpty()
    fcntl.ioctl(attached, termios.TIOCSWINSZ, struct.pack("HHHH", rows, 170, 0, 0))
    with os.fdopen(attached, "w", encoding="utf-8") as terminal:
        run = Run(tmp_path, stream=terminal, every_seconds=10, max_steps=100)
        run.steps(10)
        run.events.end()
    assert screen_lines(io.StringIO(read_to_the_end(controlling)))[0].startswith(first)


def test_a_bar_is_redrawn_once_a_second_whatever_the_pace(tmp_path: Path) -> None:
    run = Run(tmp_path, stream=Terminal(), max_steps=10_000)
    run.steps(800, seconds=1 / 64)
    shown = re.findall(r"step (\d+)/", run.stream.getvalue())
    run.events.end()
    assert list(map(int, shown)) == [64 * number for number in range(1, 13)]


@contextmanager
def handling(name: str, stream: io.StringIO, level: int, form: str) -> Iterator[logging.Logger]:
    """A logger with a handler of its own."""
    logger, handler = logging.getLogger(f"test_progress_bar.{name}"), logging.StreamHandler(stream)
    handler.setLevel(level)
    handler.setFormatter(logging.Formatter(form))
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield logger
        assert handler.stream is stream
    finally:
        logger.removeHandler(handler)


def test_log_lines_do_not_tear_the_bar(tmp_path: Path) -> None:
    with (
        redirect_stderr(Terminal()) as terminal,
        handling("app", terminal, logging.WARNING, "%(levelname)s %(message)s") as app,
        handling("library", terminal, logging.ERROR, "%(message)s") as library,
    ):
        run = Run(tmp_path, stream=terminal, max_steps=100)
        run.steps(10)
        app.warning("first")
        library.warning("below the level of its handler")
        run.steps(10)
        library.error("second")
        run.steps(10)
        run.events.end()
        app.warning("third")
    first, second, bar, *after = screen_lines(terminal)
    assert [first, second, *after] == ["WARNING first", "second", "WARNING third", ""]
    assert bar.startswith("Training:  30% |")


def test_warnings_of_a_program_that_configures_no_logging_do_not_tear_the_bar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.root, "handlers", [])
    before = logging.lastResort
    with redirect_stderr(Terminal()) as terminal:
        run = Run(tmp_path, stream=terminal, max_steps=100)
        run.steps(10)
        logging.getLogger("test_progress_bar").info("not shown")
        logging.getLogger("test_progress_bar").warning("a warning")
        run.events.end()
    warning, bar, after = screen_lines(terminal)
    assert (warning, bar[:14], after) == ("a warning", "Training:  10%", "")
    assert logging.lastResort is before


# ---- figures


@pytest.mark.parametrize(
    ("figure", "text"),
    [
        (figures.digits(0.471), "0.47"),
        (figures.digits(9.996), "10.0"),
        (figures.digits(99.96), "100"),
        (figures.digits(12345.6), "12346"),
        (figures.loss(3.2), "3.20"),
        (figures.loss(0.000123), "0.000123"),
        (figures.loss(float("inf")), "inf"),
        (figures.byte_count(999), "999 B"),
        (figures.byte_count(999_600), "1.00 MB"),
        (figures.byte_count(14_051_000_000), "14.1 GB"),
        (figures.byte_count(245_000_000, signed=True), "+245 MB"),
        (figures.byte_count(-12_000_000, signed=True), "-12.0 MB"),
        (figures.byte_count(5e15), "5000 TB"),
        (figures.duration(0), "0s"),
        (figures.duration(59.6), "1m00s"),
        (figures.duration(725), "12m05s"),
        (figures.duration(6.5 * 3600), "6h30m"),
        (figures.duration(76 * 3600 + 59), "3d04h"),
        (figures.rate(0.47), "0.47 it/s"),
        (figures.rate(0.04), "25.0 s/it"),
    ],
)
def test_figures_are_short(figure: str, text: str) -> None:
    assert figure == text
