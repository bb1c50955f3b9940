"""The question where to resume from, on a real terminal and without one, and the options for scripts."""

from __future__ import annotations

import argparse
import io
import os
import pty
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from forgather_ckpt import prompt
from forgather_ckpt.policies import Best, Stored
from forgather_ckpt.prompt import Question
from forgather_ckpt.resume_arguments import add_resume_arguments, resume_choice
from forgather_ckpt.trainers import TrainingArguments

NOW = 1_000_000.0


def stored(step: int, *, age: float = 250.0, **facts: Any) -> Stored:
    return Stored(Path(f"runs/gpt2/checkpoint-{step}"), step, step, f"{step:032x}", saved_at_seconds=NOW - age, **facts)


FOUND = [
    stored(19_000, metrics={"loss": 3.3, "eval_loss": 3.23451}),
    stored(18_500, age=3 * 3600, kind="epoch", metrics={"eval_loss": float("nan")}, is_pinned=True),
    stored(900, age=5 * 86400, kind="emergency"),
]


def question(found: list[Stored] = FOUND, best: Best | None = None) -> Question:
    return Question("runs/gpt2", found, best, NOW)


# ---- what is asked


def test_the_question_tells_of_the_newest() -> None:
    assert question().text == (
        "Found 3 checkpoints in runs/gpt2; the newest is step 19,000 (4 min ago, eval_loss 3.2345).  Resume? [Y/n/list] "
    )


@pytest.mark.parametrize(
    ("newest", "best", "told"),
    [
        (stored(5, metrics={"loss": 2.0}), None, "step 5 (4 min ago, loss 2)"),
        (stored(5, metrics={"loss": float("inf")}), None, "step 5 (4 min ago)"),
        (stored(5, metrics={"loss": 2.0, "acc": 0.5}), Best(1, "acc"), "step 5 (4 min ago, acc 0.5)"),
        (stored(5, metrics={"loss": 2.0}), Best(1, "acc"), "step 5 (4 min ago)"),
        (stored(5, age=-50), None, "step 5 (0 s ago)"),
        (stored(5, age=47 * 3600), None, "step 5 (47 h ago)"),
        (stored(5, age=49 * 3600), None, "step 5 (2 days ago)"),
        (Stored(Path("x"), 5, 5, "0"), None, "step 5 (of unknown age)"),
    ],
)
def test_what_is_told_of_it(newest: Stored, best: Best | None, told: str) -> None:
    assert f"Found 1 checkpoint in runs/gpt2; the newest is {told}.  Resume?" in question([newest], best).text


def test_what_is_quarantined_is_not_the_newest() -> None:
    aside, usable = stored(9, is_quarantined=True), stored(7)
    assert "Found 2 checkpoints in runs/gpt2; the newest is step 7 (" in question([aside, usable]).text
    assert "the newest of step 7, nothing says" in prompt.without_terminal("runs/gpt2", [aside, usable])
    assert "periodic, quarantined" in question([aside, usable]).listing
    assert question([aside, usable]).answer("9\n") == 9


def test_the_list_has_a_line_for_each() -> None:
    assert question().listing.splitlines() == [
        "  step 19,000   4 min ago  periodic       eval_loss 3.2345",
        "  step 18,500     3 h ago  epoch, pinned",
        "     step 900  5 days ago  emergency",
        "y: the newest; n: a fresh start; a step: that one; best",
    ]


@pytest.mark.parametrize(
    ("line", "answer"),
    [
        ("\n", "auto"),
        ("Y\n", "auto"),
        (" yes \n", "auto"),
        ("n\n", False),
        ("No\n", False),
        ("18500\n", 18_500),
        ("18,500\n", 18_500),
        ("best\n", "best"),
        ("17\n", None),
        ("-900\n", None),
        ("what?\n", None),
        ("²\n", None),
    ],
)
def test_answers(line: str, answer: bool | int | str | None) -> None:
    found = question().answer(line)
    assert found == answer
    assert type(found) is type(answer)
    if answer is not None:
        TrainingArguments("runs", resume_from_checkpoint=answer)


def test_best_is_no_answer_where_nothing_tells_which_is() -> None:
    asked = question(FOUND, Best(1, "accuracy", "max"))
    assert asked.answer("best") is None
    assert "none has a metric" in asked.rebuke("best")
    assert "best" not in asked.listing


def test_what_is_no_answer_is_asked_again() -> None:
    out = io.StringIO()
    answers = io.StringIO("later\x1b[31m\nlist\n900\nn\n")
    assert prompt.ask("runs/gpt2", FOUND, stream_in=answers, stream_out=out) == 900
    assert out.getvalue().count("Resume? [Y/n/list] ") == 3
    assert "'later\\\\x1b[31m' is no answer: y resumes from the newest" in out.getvalue()
    assert "step 18,500" in out.getvalue()


def test_the_end_of_the_input_is_an_interruption() -> None:
    with pytest.raises(KeyboardInterrupt):
        prompt.ask("runs/gpt2", FOUND, stream_in=io.StringIO("maybe\n"), stream_out=io.StringIO())


# ---- a terminal


@contextmanager
def terminal() -> Iterator[tuple[int, io.TextIOWrapper, io.TextIOWrapper]]:
    """The person's end, and what the program reads from and writes to."""
    person, program = pty.openpty()
    with os.fdopen(program, closefd=False) as source, os.fdopen(program, "w", closefd=False) as out:
        yield person, source, out
    os.close(program)
    os.close(person)


def test_a_person_at_a_terminal_is_asked() -> None:
    with terminal() as (person, source, out):
        assert prompt.is_terminal(source, out)
        os.write(person, b"list\nbest\n")
        assert prompt.ask("runs/gpt2", FOUND, stream_in=source, stream_out=out) == "best"
        seen = b""
        while b"Found 3 checkpoints in runs/gpt2" not in seen:  # behind the echo of what the person typed
            seen += os.read(person, 1 << 16)


def test_while_the_person_thinks_the_others_are_kept_waiting() -> None:
    calls = []

    def beat() -> None:
        calls.append(len(calls))
        if len(calls) == 2:
            os.write(person, b"n\n")

    with terminal() as (person, source, out):
        assert prompt.ask("runs/gpt2", FOUND, while_waiting=beat, stream_in=source, stream_out=out) is False
    assert len(calls) >= 2


def test_a_stop_while_waiting_ends_the_question() -> None:
    def stopped() -> None:
        raise KeyboardInterrupt

    with terminal() as (_, source, out), pytest.raises(KeyboardInterrupt):
        prompt.ask("runs/gpt2", FOUND, while_waiting=stopped, stream_in=source, stream_out=out)


def test_control_d_is_an_interruption() -> None:
    with terminal() as (person, source, out), pytest.raises(KeyboardInterrupt):
        os.write(person, b"\x04")
        prompt.ask("runs/gpt2", FOUND, while_waiting=lambda: None, stream_in=source, stream_out=out)


def test_a_pipe_is_no_terminal() -> None:
    with terminal() as (_, source, out), Path(os.devnull).open() as nothing:
        assert not prompt.is_terminal(nothing, out)
        assert not prompt.is_terminal(source, io.StringIO())
    assert not prompt.is_terminal(source, out)  # closed by now


def test_a_process_without_stdin_has_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", None)
    assert not prompt.is_terminal()


def test_without_a_terminal_the_error_names_both_ways_out() -> None:
    message = prompt.without_terminal("runs/gpt2", FOUND)
    assert "runs/gpt2 holds 3 checkpoints, the newest of step 19000" in message
    for way in ("--auto-resume", "--fresh", 'resume_from_checkpoint="auto" or False'):
        assert way in message


def test_the_time_is_that_of_now(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    monkeypatch.setattr(time, "time", lambda: NOW)
    prompt.ask("runs/gpt2", FOUND, stream_in=io.StringIO("\n"), stream_out=out)
    assert "(4 min ago" in out.getvalue()


# ---- options of scripts


def parse(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int)
    add_resume_arguments(parser)
    return parser.parse_args(words)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], None),
        (["--steps", "4"], None),
        (["--auto-resume"], "auto"),
        (["--auto_resume"], "auto"),
        (["--fresh"], False),
        (["--resume-from-checkpoint", "auto"], "auto"),
        (["--resume_from_checkpoint=latest"], "latest"),
        (["--resume-from-checkpoint", "no"], False),
        (["--resume-from-checkpoint", "1000"], 1000),
        (["--resume-from-checkpoint", "best~1"], "best~1"),
        (["--resume-from-checkpoint", "emergency"], "emergency"),
        (["--resume-from-checkpoint", "epoch:3"], "epoch:3"),
        (["--resume-from-checkpoint", "runs/a/checkpoint-4"], "runs/a/checkpoint-4"),
        (["--resume-from-checkpoint", "tests"], "tests"),
    ],
)
def test_the_options_say_what_to_resume_from(
    words: list[str], expected: bool | int | str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(__file__).parents[1])
    choice = resume_choice(parse(*words))
    assert choice == expected
    assert type(choice) is type(expected)
    TrainingArguments("runs", resume_from_checkpoint=choice)


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--auto-resume", "--fresh"], "not allowed with argument"),
        (["--fresh", "--resume-from-checkpoint", "4"], "not allowed with argument"),
        (["--resume-from-checkpoint", "newest"], "'newest' is no checkpoint: write auto, latest, best, no, a step"),
        (["--resume-from-checkpoint", ""], "'' is no checkpoint"),
    ],
)
def test_what_makes_no_sense_is_refused(words: list[str], problem: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        parse(*words)
    assert problem in capsys.readouterr().err


def test_strict_args_is_a_switch() -> None:
    assert parse().strict_args is False
    assert parse("--strict-args").strict_args is True
