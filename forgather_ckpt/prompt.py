"""The question to the person at the terminal: there are checkpoints, and nobody said whether to go on from them."""

import math
import select
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from forgather_ckpt.metrics import rankable
from forgather_ckpt.names import printable
from forgather_ckpt.policies import Best, Stored

USUAL_METRICS = ("eval_loss", "loss")
_AGES = ((60, "s", 1), (3600, "min", 60), (48 * 3600, "h", 3600), (math.inf, "days", 86400))
_YES = ("", "y", "yes")
_NO = ("n", "no")
_LIST = ("l", "list")
_POLL_SECONDS = 0.5

Answer = bool | int | str
"""A value for `resume_from_checkpoint`: "auto", "best", a step, or False for a fresh start."""


def is_terminal(stream_in: TextIO | None = None, stream_out: TextIO | None = None) -> bool:
    """Whether a person sees what is written (to stderr, unless given) and can answer (on stdin)."""
    streams = (stream_in or sys.stdin, stream_out or sys.stderr)
    return all(stream is not None and not stream.closed and stream.isatty() for stream in streams)


def without_terminal(run: str | Path, found: Sequence[Stored]) -> str:
    """What is said where there is nobody to ask."""
    return (
        f"{run} holds {_checkpoints(found)}, the newest of step {_newest(found).step}, nothing says whether to go on from there, "
        "and there is no terminal to ask at: say --auto-resume to go on, or --fresh to start over (in code: "
        'resume_from_checkpoint="auto" or False)'
    )


def ask(
    run: str | Path,
    found: Sequence[Stored],
    *,
    best: Best | None = None,
    while_waiting: Callable[[], None] | None = None,
    stream_in: TextIO | None = None,
    stream_out: TextIO | None = None,
) -> Answer:
    """What to resume from, asked until there is an answer. Called on one rank only.

    `found`: the checkpoints of `run`, newest first, at least one. `best` says by which metric they are told apart; without
    it that is `eval_loss`, else `loss`. On a terminal `while_waiting` is called about twice a second; what it raises ends
    the question. `KeyboardInterrupt` where the input ends.
    """
    source, out = stream_in or sys.stdin, stream_out or sys.stderr
    question = Question(run, found, best, time.time())
    while True:
        out.write(question.text)
        out.flush()
        if while_waiting is not None and source.isatty():
            while not select.select([source], [], [], _POLL_SECONDS)[0]:
                while_waiting()
        line = source.readline()
        if not line:
            out.write("\n")
            raise KeyboardInterrupt
        answer = question.answer(line)
        if answer is not None:
            return answer
        out.write(f"{question.listing if line.strip().lower() in _LIST else question.rebuke(line)}\n")


@dataclass(frozen=True)
class Question:
    """What is asked about the checkpoints of a run, newest first, and what the answers mean."""

    run: str | Path
    found: Sequence[Stored]
    best: Best | None
    now_seconds: float
    """Since 1970."""

    @property
    def text(self) -> str:
        newest = _newest(self.found)
        facts = ", ".join(filter(None, (self._age(newest), self._metric(newest))))
        return (
            f"Found {_checkpoints(self.found)} in {printable(str(self.run))}; the newest is step {newest.step:,} "
            f"({facts}).  Resume? [Y/n/list] "
        )

    @property
    def listing(self) -> str:
        """One line for each checkpoint, and what may be answered."""
        rows = [
            (
                f"step {one.step:,}",
                self._age(one),
                printable(one.kind) + ", pinned" * one.is_pinned + ", quarantined" * one.is_quarantined,
                self._metric(one),
            )
            for one in self.found
        ]
        sizes = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
        lines = [
            f"  {step:>{sizes[0]}}  {age:>{sizes[1]}}  {kind:<{sizes[2]}}  {metric}".rstrip()
            for step, age, kind, metric in rows
        ]
        return "\n".join([*lines, f"y: the newest; n: a fresh start; a step: that one{'; best' * self._has_best}"])

    def answer(self, line: str) -> Answer | None:
        """What a line means; None where it is no answer."""
        word = line.strip().lower()
        number = word.replace(",", "").replace("_", "")
        if word in _YES:
            return "auto"
        if word in _NO:
            return False
        if word == "best" and self._has_best:
            return "best"
        return next((one.step for one in self.found if str(one.step) == number), None)

    def rebuke(self, line: str) -> str:
        """What is said to a line that is no answer."""
        word = line.strip()
        if word.lower() == "best":
            return "there is no best checkpoint: none has a metric by which to tell"
        return (
            f"{printable(word)!r} is no answer: y resumes from the newest, n starts fresh, list shows all; or give the step "
            "of one of them"
        )

    @property
    def _has_best(self) -> bool:
        metric = "eval_loss" if self.best is None else self.best.metric
        return any(rankable(one.metrics.get(metric)) is not None for one in self.found)

    def _age(self, one: Stored) -> str:
        if one.saved_at_seconds is None:
            return "of unknown age"
        seconds = max(0.0, self.now_seconds - one.saved_at_seconds)  # another machine's clock may be ahead
        unit, length = next((unit, length) for limit, unit, length in _AGES if seconds < limit)
        return f"{int(seconds // length)} {unit} ago"

    def _metric(self, one: Stored) -> str:
        for name in USUAL_METRICS if self.best is None else (self.best.metric,):
            if (value := rankable(one.metrics.get(name))) is not None:
                return f"{printable(name)} {value:.5g}"
        return ""


def _newest(found: Sequence[Stored]) -> Stored:
    """The one that "auto" takes, if it is whole."""
    return next((one for one in found if not one.is_quarantined), found[0])


def _checkpoints(found: Sequence[Stored]) -> str:
    return f"{len(found):,} checkpoint{'' if len(found) == 1 else 's'}"
