"""The shipped callbacks in a training: what they make of its events, and what they ask of it."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from forgather_ckpt import callbacks as shipped
from forgather_ckpt.callbacks import (
    DualTimeScaleDivergenceDetector,
    DualWindowDivergenceDetector,
    EarlyStopping,
    JsonlLogger,
    ProgressBar,
    TensorBoardLogger,
    TrainerCallback,
    TrainerControl,
)
from forgather_ckpt.trainers.events import StepMetrics
from tests.training_events import Events
from tests.watchers import resumed, stored

ROOT = Path(__file__).parent.parent

Make = Callable[..., Any]


def small_windows(**arguments: Any) -> DualWindowDivergenceDetector:
    return DualWindowDivergenceDetector(3, 8, **arguments)


def early_stopping(**arguments: Any) -> EarlyStopping:
    return EarlyStopping(warmup_steps=0, **arguments)


detectors = pytest.mark.parametrize("make", [DualTimeScaleDivergenceDetector, small_windows], ids=["scales", "windows"])


def asked(control: TrainerControl) -> set[str]:
    """The flags that are up."""
    return {field.name for field in dataclasses.fields(control) if getattr(control, field.name) is True}


STOP, ABORT = {"should_training_stop"}, {"should_abort_without_save"}


# ---- detectors


@detectors
@pytest.mark.parametrize(("action", "flags"), [("stop", STOP), ("abort", ABORT)])
def test_a_loss_of_evaluations_that_jumps_ends_the_training_and_the_reason_is_told(
    tmp_path: Path, make: Make, action: str, flags: set[str]
) -> None:
    events = Events([make(action=action)], tmp_path)
    for loss in [3.0] * 10:
        events.step(loss=loss)
        events.log(loss=1000.0)
        events.evaluate(eval_loss=loss)
    assert asked(events.control) == set() and events.control.reasons == []
    for loss in [9.0] * 10:
        events.step(loss=loss)
        events.evaluate(eval_loss=loss)
    assert asked(events.control) == flags
    [reason] = events.control.reasons
    assert reason.startswith("at step 1") and "the short average of eval_loss is " in reason


@detectors
def test_a_loss_of_logs_is_watched_where_that_was_asked_for(tmp_path: Path, make: Make) -> None:
    events = Events([make(use_eval_loss=False)], tmp_path)
    for loss in [3.0] * 10 + [9.0] * 10:
        events.step(loss=loss)
        events.evaluate(eval_loss=3.0)
        events.log(loss=loss)
    assert asked(events.control) == STOP


@detectors
def test_b55_a_metric_in_a_log_and_an_evaluation_of_one_step_is_counted_once(tmp_path: Path, make: Make) -> None:
    once, twice = make(), make()
    events, doubled = Events([once], tmp_path), Events([twice], tmp_path)
    for step in range(20):
        loss = 3.0 if step < 10 else 9.0
        events.step()
        events.evaluate(eval_loss=loss)
        doubled.step()
        doubled.log(eval_loss=loss, loss=7.0)
        doubled.evaluate(eval_loss=loss)
        assert asked(events.control) == asked(doubled.control)
    assert stored(once) == stored(twice)
    assert asked(events.control) == STOP


@pytest.mark.parametrize("make", [DualTimeScaleDivergenceDetector, small_windows, EarlyStopping])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_metric_that_does_not_come_is_told_of_once_and_by_one_rank(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, make: Make, rank: int
) -> None:
    def told(key: str, tell: Callable[[Events], None]) -> list[str]:
        caplog.clear()
        events = Events([make(metric_key=key, mode="min")], tmp_path, rank=rank)
        for _ in range(3):
            events.step(loss=1.0)
            tell(events)
        events.tell("on_train_end", error=None)
        return [message.split(" ", 1)[1] for message in caplog.messages]

    def log_and_evaluate(events: Events) -> None:
        events.log(loss=1.0, learning_rate=0.1)
        events.evaluate(eval_loss=1.0)

    told_at_first = {
        "eval_los": ["watches 'eval_los', which the evaluation of step 1 does not have, only eval_loss"],
        "los": ["watches 'los', which the log of step 1 does not have, only loss, learning_rate"],
        "eval_loss": [],
        "loss": [],
    }
    for key, lines in told_at_first.items():
        assert told(key, log_and_evaluate) == (lines if rank == 0 else [])
    never = ["has watched nothing: 'eval_loss' never came"]
    assert told("eval_loss", lambda events: events.log(loss=1.0)) == (never if rank == 0 else [])


@detectors
def test_b55_the_values_of_single_steps_are_not_what_a_detector_averages(tmp_path: Path, make: Make) -> None:
    detector = make(use_eval_loss=False)
    events = Events([detector], tmp_path)
    for _ in range(20):
        events.step(loss=math.nan)
    assert stored(detector) == stored(make(use_eval_loss=False))
    assert asked(events.control) == set()


# ---- early stopping


def test_logs_are_the_checks_of_early_stopping_and_steps_are_not(tmp_path: Path) -> None:
    events = Events([EarlyStopping()], tmp_path, max_steps=1000)
    ended_at = None
    while events.state.global_step < 300 and ended_at is None:
        events.step(loss=3.0, grad_norm=1.0)
        if events.state.global_step % 25 == 0:
            events.log(loss=3.0)
        if asked(events.control):
            ended_at = events.state.global_step
    assert ended_at == 200, "the first log after the warm-up of 50 steps is at 75, the fifth that is no better at 200"
    assert events.control.reasons == [
        "at step 200 loss is 3: 5 checks in a row not more than 0.01 better than the best, 3 at step 75 (patience=5)"
    ]


def test_the_checks_may_be_evaluations(tmp_path: Path) -> None:
    events = Events([early_stopping(metric_key="eval_loss", patience=2)], tmp_path)
    for loss in (3.0, 2.0, 2.0):
        events.step(loss=loss)
        events.log(loss=9.0)
        events.evaluate(eval_loss=loss)
    assert asked(events.control) == set()
    events.step(loss=2.0)
    events.evaluate(eval_loss=2.0)
    assert asked(events.control) == STOP


def test_gradients_that_explode_between_two_logs_end_the_training_at_the_third(tmp_path: Path) -> None:
    events = Events([early_stopping()], tmp_path)
    for norm in (1.0, 2000.0, 2000.0, 1.0, 2000.0, math.inf):
        events.step(loss=3.0, grad_norm=norm)
    assert asked(events.control) == set()
    events.step(loss=3.0, grad_norm=2000.0)
    assert asked(events.control) == STOP
    assert events.control.reasons == [
        "at step 7 grad_norm is 2000: 3 in a row above 1000 or not finite (grad_spike_patience=3)"
    ]


def test_a_log_that_brings_the_norm_of_its_step_does_not_count_it_again(tmp_path: Path) -> None:
    events = Events([early_stopping()], tmp_path)
    for _ in range(2):
        events.step(loss=3.0, grad_norm=2000.0)
        events.log(loss=3.0, grad_norm=2000.0)
    assert asked(events.control) == set()


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_ends_the_training_at_its_step_and_in_the_warm_up_too(
    tmp_path: Path, loss: float
) -> None:
    stopping = EarlyStopping()
    events = Events([stopping], tmp_path)
    events.step(loss=3.0)
    events.step(loss=loss)
    assert asked(events.control) == STOP
    assert events.control.reasons == [f"at step 2 loss is {loss:g}"]


def test_a_training_that_clips_no_gradients_has_no_norm_and_is_watched_all_the_same(tmp_path: Path) -> None:
    events = Events([early_stopping(patience=1)], tmp_path)
    for _ in range(2):
        events.step(loss=3.0)
        events.log(loss=3.0)
    assert asked(events.control) == STOP


def test_only_the_loss_and_the_norm_are_read_from_the_device(tmp_path: Path) -> None:
    events = Events([early_stopping()], tmp_path)
    unread = torch.empty((), device="meta")
    events.tell("on_step_end", metrics=StepMetrics({"loss": 3.0, "grad_norm": 1.0, "learning_rate": unread}))
    assert asked(events.control) == set()


# ---- once asked


watchers = pytest.mark.parametrize(
    "make", [DualTimeScaleDivergenceDetector, small_windows, early_stopping], ids=["scales", "windows", "stopping"]
)


@watchers
def test_the_end_is_asked_for_with_one_reason_while_the_ranks_come_to_agree(tmp_path: Path, make: Make) -> None:
    events = Events([make(metric_key="loss")], tmp_path)
    for loss in (math.nan, math.nan, 3.0):
        events.step(loss=loss)
        events.log(loss=loss)
    assert asked(events.control) == STOP
    assert events.control.reasons == ["at step 1 loss is nan"]


@watchers
def test_a_request_that_was_taken_and_not_followed_is_made_again(tmp_path: Path, make: Make) -> None:
    events = Events([make(metric_key="loss")], tmp_path)
    for loss in (math.nan, 3.0, 3.0):
        events.control.clear()
        events.step(loss=loss)
        events.log(loss=loss)
        assert asked(events.control) == STOP
        assert events.control.reasons == ["at step 1 loss is nan"]


def test_one_that_aborts_is_heard_beside_one_that_stops_for_the_same_reason(tmp_path: Path) -> None:
    stopping, aborting = DualTimeScaleDivergenceDetector(), DualTimeScaleDivergenceDetector(action="abort")
    events = Events([stopping, aborting], tmp_path)
    events.step()
    events.evaluate(eval_loss=math.nan)
    assert asked(events.control) == STOP | ABORT


def test_two_callbacks_give_both_their_reasons(tmp_path: Path) -> None:
    events = Events([DualTimeScaleDivergenceDetector(action="abort"), EarlyStopping()], tmp_path)
    events.step()
    events.evaluate(eval_loss=math.nan)
    events.log(loss=math.inf)
    assert asked(events.control) == STOP | ABORT
    assert events.control.reasons == ["at step 1 eval_loss is nan", "at step 1 loss is inf"]


# ---- a resume


AFTER: dict[str, tuple[Make, list[float], list[float], int | None]] = {
    # callback, losses until it ended the run, losses after the resume, after how many of those it ends it again
    "scales, good again": (DualTimeScaleDivergenceDetector, [3.0] * 10 + [9.0] * 10, [3.1] * 50, None),
    "scales, as bad as before": (DualTimeScaleDivergenceDetector, [3.0] * 10 + [9.0] * 10, [9.0] * 50, 1),
    "scales, worse than the best by less than the threshold": (
        DualTimeScaleDivergenceDetector,
        [3.0] * 10 + [9.0] * 10,
        [4.9] * 50,
        None,
    ),
    "scales, good again, then bad": (
        DualTimeScaleDivergenceDetector,
        [3.0] * 10 + [9.0] * 10,
        [3.0] * 10 + [9.0] * 10,
        14,
    ),
    "windows, good again": (small_windows, [3.0] * 10 + [9.0] * 10, [3.1] * 50, None),
    "windows, as bad as before": (small_windows, [3.0] * 10 + [9.0] * 10, [9.0] * 50, 3),
    "without drift, a new level is taken": (
        lambda: DualTimeScaleDivergenceDetector(drift_threshold=None),
        [3.0] * 10 + [9.0] * 10,
        [9.0] * 50,
        None,
    ),
    "a value that was not finite": (DualTimeScaleDivergenceDetector, [3.0, math.nan], [3.0] * 50, None),
    "still not finite": (DualTimeScaleDivergenceDetector, [3.0, math.nan], [3.0, math.nan], 2),
    "plateau, better again": (
        lambda: early_stopping(metric_key="eval_loss"),
        [3.0] * 6,
        [3.0] * 4 + [2.9] * 5,
        None,
    ),
    "plateau, no better than the best before": (
        lambda: early_stopping(metric_key="eval_loss"),
        [3.0] * 6,
        [3.5, 3.4, 3.3, 3.2, 3.1],
        5,
    ),
}


@pytest.mark.parametrize("case", AFTER)
def test_a_run_that_was_ended_and_is_resumed_goes_on_until_new_values_end_it(tmp_path: Path, case: str) -> None:
    make, before, after, expected = AFTER[case]
    watcher = make()
    events = Events([watcher], tmp_path)
    for loss in before:
        if not asked(events.control):
            events.step()
            events.evaluate(eval_loss=loss)
    assert asked(events.control) == STOP
    step = events.state.global_step

    watcher = resumed(make, watcher)
    events = Events([watcher], tmp_path, step=step)
    events.evaluate(eval_loss=3.0 if math.isnan(before[-1]) else before[-1])
    assert asked(events.control) == set(), "the evaluation of that very step is no new value"
    ended_after = None
    for number, loss in enumerate(after, 1):
        if ended_after is None:
            events.step()
            events.evaluate(eval_loss=loss)
            ended_after = number if asked(events.control) else None
    assert ended_after == expected


def test_gradient_spikes_that_ended_a_run_do_not_end_it_again_after_a_resume(tmp_path: Path) -> None:
    stopping = early_stopping()
    events = Events([stopping], tmp_path)
    for _ in range(3):
        events.step(grad_norm=2000.0)
    assert asked(events.control) == STOP
    events = Events([resumed(early_stopping, stopping)], tmp_path, step=3)
    events.step(grad_norm=2000.0)
    events.step(grad_norm=1.0)
    assert asked(events.control) == set()
    for _ in range(3):
        events.step(grad_norm=2000.0)
    assert asked(events.control) == STOP


LOSSES = [3.0 + math.sin(7.0 * n) for n in range(30)] + [9.0] * 20


def tell_until_the_end(watcher: Any, run: Path, *, step: int = 0, to_step: int = len(LOSSES)) -> int | None:
    """The step at which the training ends."""
    events = Events([watcher], run, step=step)
    for number, loss in enumerate(LOSSES[step:to_step], step + 1):
        events.step(loss=loss, grad_norm=2000.0 if number % 4 < 2 else 1.0)
        events.log(loss=loss)
        events.evaluate(eval_loss=loss)
        if asked(events.control):
            return number
    return None


@pytest.mark.parametrize("make", [DualTimeScaleDivergenceDetector, small_windows, lambda: early_stopping(patience=20)])
def test_an_interruption_before_the_end_changes_no_bit(tmp_path: Path, make: Make) -> None:
    undisturbed = make()
    ended_at = tell_until_the_end(undisturbed, tmp_path)
    assert ended_at is not None and ended_at > 20
    for at in range(ended_at):
        first = make()
        assert tell_until_the_end(first, tmp_path, to_step=at) is None
        second = resumed(make, first)
        assert tell_until_the_end(second, tmp_path, step=at) == ended_at
        assert stored(second) == stored(undisturbed)


# ---- all of them


def test_what_is_shipped_is_a_trainer_callback() -> None:
    """What a trainer calls is what they define: a method of another name or with other arguments is never called."""
    given: list[TrainerCallback] = [
        DualTimeScaleDivergenceDetector(),
        DualWindowDivergenceDetector(),
        EarlyStopping(),
        ProgressBar(),
        JsonlLogger(),
    ]
    classes = {value for name in shipped.__all__ if inspect.isclass(value := getattr(shipped, name))}
    assert {type(one) for one in given} | {TensorBoardLogger} == {
        one for one in classes if issubclass(one, TrainerCallback) and one is not TrainerCallback
    }
    for kind in (*map(type, given), TensorBoardLogger):
        for name, method in inspect.getmembers(kind, inspect.isfunction):
            if name.startswith("on_"):
                assert hasattr(TrainerCallback, name), f"{kind.__name__}.{name} is no event"
                expected = inspect.signature(getattr(TrainerCallback, name)).parameters
                assert list(inspect.signature(method).parameters) == list(expected)


def test_a_callback_that_overrides_nothing_does_nothing(tmp_path: Path) -> None:
    events = Events([TrainerCallback()], tmp_path)
    events.step(loss=1.0)
    events.log(loss=1.0)
    events.evaluate(eval_loss=1.0)
    events.save()
    events.end()
    assert asked(events.control) == set() and list(tmp_path.iterdir()) == []


def test_without_tensorboard_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec

    def without_tensorboard(name: str, *args: Any) -> Any:
        return None if name == "tensorboard" else find_spec(name, *args)

    monkeypatch.setattr(importlib.util, "find_spec", without_tensorboard)
    with pytest.raises(ImportError, match=r'pip install "forgather-ckpt\[tensorboard\]"'):
        TensorBoardLogger()


def test_what_is_slow_to_import_is_imported_when_training_begins() -> None:
    code = (
        "import sys; from forgather_ckpt.callbacks import *; ProgressBar(); JsonlLogger();"
        "print(sorted({'torch', 'numpy', 'tensorboard', 'tqdm'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == "[]\n"
