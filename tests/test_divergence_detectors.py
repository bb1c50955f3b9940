"""Divergence detectors: what they see, what they do not, and that a resume changes nothing."""

from __future__ import annotations

import bisect
import itertools
import logging
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from forgather_ckpt import CheckpointCoordinator, SharingPattern, StateComponent
from forgather_ckpt.callbacks import (
    Action,
    Decision,
    DualTimeScaleDivergenceDetector,
    DualWindowDivergenceDetector,
    EarlyStopping,
)
from forgather_ckpt.errors import LoadMismatch
from forgather_ckpt.trainers.callbacks import CallbackStates
from tests.test_docs import blocks_of, table_of
from tests.watchers import decisions, first_end, resumed, stored

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "divergence.md"

Detector = DualTimeScaleDivergenceDetector | DualWindowDivergenceDetector
Make = Callable[..., Detector]

KINDS: dict[str, Make] = {"scales": DualTimeScaleDivergenceDetector, "windows": DualWindowDivergenceDetector}
kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)

TRACE = [3.154, 7.860, 8.272, 8.389, 8.407]
"""Evaluation losses of a real run that diverged."""

NOISE = [0.1 * math.sin(7.0 * n) for n in range(400)]


def noisy(level: float, num_values: int) -> list[float]:
    return [level + NOISE[n] for n in range(num_values)]


def small_windows(**arguments: Any) -> DualWindowDivergenceDetector:
    return DualWindowDivergenceDetector(3, 8, **arguments)


# ---- what ends a run, and what does not

MODERATE = {"scales": dict(short_alpha=0.2, long_alpha=0.02), "windows": dict(short_window=5, long_window=50)}

SEQUENCES: dict[str, tuple[dict[str, Any], list[float], bool]] = {
    "a level with noise": ({}, noisy(2.8, 400), False),
    "a falling loss": ({}, [11 * 0.97**n for n in range(200)], False),
    "one outlier": ({}, [*noisy(2.8, 60), 11.0, *noisy(2.8, 60)], False),
    "outliers far apart": ({}, [11.0 if n % 40 == 39 else 2.8 for n in range(400)], False),
    "a lasting jump": ({}, [*noisy(2.8, 60), *noisy(8.0, 20)], True),
    "a lasting jump that is too small": ({}, [*noisy(2.8, 60), *noisy(4.0, 200)], False),
    "the same jump, with a share as threshold": ({"threshold": "40%"}, [*noisy(2.8, 60), *noisy(4.2, 60)], True),
    "half that jump, with a share as threshold": ({"threshold": "40%"}, [*noisy(2.8, 60), *noisy(3.5, 200)], False),
    "a lasting fall of a loss": ({}, [*noisy(8.0, 60), *noisy(2.8, 60)], False),
    "a jump before the long average has forgotten the start": ({}, [11.0, *noisy(2.8, 25), *noisy(8.0, 25)], True),
    "a slow drift": ({}, [2.8 + 0.01 * n for n in range(400)], True),
    "a slow drift, not looked for": ({"drift_threshold": None}, [2.8 + 0.01 * n for n in range(400)], False),
    "a slow drift that stays below its own threshold": (
        {"drift_threshold": 5.0},
        [2.8 + 0.01 * n for n in range(400)],
        False,
    ),
    "a drift of so many percent of the best": (
        {"threshold": 100.0, "drift_threshold": "50%"},
        [2.8 + 0.01 * n for n in range(400)],
        True,
    ),
    "a fall in accuracy": (
        {"metric_key": "eval_accuracy", "threshold": 0.2},
        [*noisy(0.8, 60), *noisy(0.4, 40)],
        True,
    ),
    "a rise in accuracy": (
        {"metric_key": "eval_accuracy", "threshold": 0.2},
        [*noisy(0.4, 60), *noisy(0.8, 60)],
        False,
    ),
    "a rise of a metric whose lowest value is the best by mode": (
        {"metric_key": "surprise", "mode": "min"},
        [*noisy(2.8, 60), *noisy(8.0, 20)],
        True,
    ),
    "a rise of a loss whose highest value is the best by mode": (
        {"mode": "max"},
        [*noisy(2.8, 60), *noisy(8.0, 20)],
        False,
    ),
    "a rise of the gradient norm": ({"metric_key": "grad_norm"}, [*noisy(1.0, 60), *noisy(9.0, 20)], True),
    "rising negative values": ({"threshold": "50%"}, [*noisy(-4.0, 60), *noisy(-1.0, 20)], True),
    "always zero, with a share as threshold": ({"threshold": "50%"}, [0.0] * 100, False),
    "a constant level beyond the threshold": ({}, [100.0] * 200, False),
    "one value": ({}, [100.0], False),
    "one value, not a number": ({}, [math.nan], True),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", SEQUENCES)
def test_a_lasting_worsening_ends_the_run_and_nothing_else(kind: str, case: str) -> None:
    arguments, values, ends = SEQUENCES[case]
    assert (first_end(KINDS[kind](**MODERATE[kind], **arguments), values) is not None) == ends


@pytest.mark.parametrize(
    ("arguments", "num_bad"),
    [
        (dict(threshold=1.0), 3),
        (dict(threshold=1.0, drift_threshold=None), 3),
        (dict(), 5),
        (dict(drift_threshold=None), 6),
        (dict(short_alpha=0.2, threshold=1.5), 2),
        (dict(threshold="30%"), 3),
    ],
    ids=str,
)
def test_the_trace_of_a_real_run_ends_it_within_few_evaluations(arguments: dict[str, Any], num_bad: int) -> None:
    going_on = [*TRACE, *[TRACE[-1]] * 10]
    assert first_end(DualTimeScaleDivergenceDetector(**arguments), going_on) == 1 + num_bad


@pytest.mark.parametrize(("arguments", "num_bad"), [(dict(), 4), (dict(threshold=1.0), 3)], ids=str)
def test_the_trace_ends_a_run_that_had_a_short_window_of_good_evaluations(
    arguments: dict[str, Any], num_bad: int
) -> None:
    before = [TRACE[0]] * 10
    values = [*before, *TRACE[1:], TRACE[-1]]
    assert first_end(DualWindowDivergenceDetector(**arguments), values) == len(before) + num_bad


def test_windows_say_nothing_until_the_short_one_is_full() -> None:
    detector = DualWindowDivergenceDetector(3, 8, threshold=0.1)
    assert [one.ends_training for one in decisions(detector, [1.0, 50.0, 90.0, 90.0])] == [False, False, False, True]


def test_the_windows_end_at_sharp_edges() -> None:
    detector = DualWindowDivergenceDetector(1, 4, threshold=30.0, drift_threshold=None)
    values = [100.0, 0.0, 0.0, 0.0, 30.0, 40.0]
    # The means of four are 100, 50, 33.3, 25, 7.5 and 17.5, the first of them of fewer.
    assert first_end(detector, values) is None
    assert first_end(detector, [0.0, 0.0, 0.0, 40.0]) == 4


@kinds
def test_the_threshold_itself_is_reached(kind: Make) -> None:
    sizes = (1.0, 0.5) if kind is DualTimeScaleDivergenceDetector else (1, 2)
    for value, ends in ((4.0, True), (3.999, False)):
        detector = kind(*sizes, threshold=1.0, drift_threshold=None)
        assert first_end(detector, [2.0, value]) == (2 if ends else None)


REASONS: list[tuple[Detector, list[float], str]] = [
    (
        DualTimeScaleDivergenceDetector(threshold=1.0),
        TRACE[:4],
        "the short average of eval_loss is 4.51931, 1.21616 above its long average, 3.30314 "
        "(threshold=1, short_alpha=0.1, long_alpha=0.01)",
    ),
    (
        DualTimeScaleDivergenceDetector(threshold=100, drift_threshold="50%"),
        TRACE,
        "the short average of eval_loss is 4.90808, 1.75408 above the best that it was, 3.154 "
        "(drift_threshold=50%, short_alpha=0.1, long_alpha=0.01)",
    ),
    (
        DualWindowDivergenceDetector(1, 4, threshold="25%", metric_key="eval_accuracy"),
        [0.75, 0.75, 0.25],
        "the short average of eval_accuracy is 0.25, 0.333333 below its long average, 0.583333 "
        "(threshold=25%, short_window=1, long_window=4)",
    ),
    (DualTimeScaleDivergenceDetector(), [2.8, math.inf], "eval_loss is inf"),
]


@pytest.mark.parametrize(("detector", "values", "reason"), REASONS)
def test_the_reason_says_what_was_compared_with_what(detector: Detector, values: list[float], reason: str) -> None:
    *before, last = values
    assert not any(one.ends_training for one in decisions(detector, before))
    assert detector.update(last, step=1500) == Decision(Action.STOP, f"at step 1500 {reason}")


@kinds
@pytest.mark.parametrize("action", ["stop", "abort"])
def test_the_action_is_the_one_that_was_asked_for(kind: Make, action: Any) -> None:
    detector = kind(action=action)
    assert detector.update(2.8) == Decision(Action.CONTINUE, None)
    assert detector.update(math.nan) == Decision(Action(action), "eval_loss is nan")


# ---- the defects of an earlier implementation, by their numbers


@pytest.mark.parametrize("make", [*KINDS.values(), EarlyStopping])
def test_b46_states_follow_names_when_callbacks_are_added_and_reordered(make: Callable[..., Any]) -> None:
    watching, other = make(), make(metric_key="grad_norm")
    decisions(watching, noisy(2.8, 20))
    decisions(other, noisy(1.0, 20))
    states = CallbackStates([watching, other]).state_dict()
    new, other_again, watching_again = make(metric_key="train_loss"), make(metric_key="grad_norm"), make()
    CallbackStates([new, other_again, watching_again]).load_state_dict(states)
    assert (stored(watching_again), stored(other_again)) == (stored(watching), stored(other))
    assert stored(new) == stored(make(metric_key="train_loss"))


@kinds
def test_b46_two_detectors_of_one_metric_have_names_of_their_own(kind: Make) -> None:
    early, late = kind(threshold=1.0, name="early"), kind(threshold=5.0, name="late")
    assert CallbackStates([early, late]).state_dict().keys() == {"early", "late"}
    with pytest.raises(ValueError, match="give each an attribute `name` of its own"):
        CallbackStates([kind(), kind()])


@kinds
def test_b50_a_detector_that_has_seen_nothing_is_saved_and_restored(kind: Make) -> None:
    detector = resumed(kind, kind())
    assert stored(detector) == stored(kind())
    assert decisions(detector, TRACE) == decisions(kind(), TRACE)


@kinds
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e308, torch.tensor(math.nan), np.float32("inf")])
def test_b51_what_is_not_finite_ends_the_run_at_once_and_leaves_the_averages_alone(kind: Make, value: Any) -> None:
    for mode in ("min", "max"):
        for num_before in (0, 1, 50):
            detector = kind(mode=mode)
            decisions(detector, noisy(2.8, num_before))
            before = stored(detector)
            assert detector.update(value).ends_training
            assert detector.update(value, step=7).ends_training
            assert stored(detector) == before
    detector = kind()
    assert not any(one.ends_training for one in decisions(detector, noisy(2.8, 20)))
    assert detector.update(value).ends_training
    assert first_end(detector, noisy(9.0, 20)) is not None, "the detector is dead"


@kinds
@pytest.mark.parametrize(
    ("arguments", "good", "bad"),
    [
        (dict(metric_key="eval_accuracy"), 0.9, 0.5),
        (dict(metric_key="val/f1"), 0.9, 0.5),
        (dict(metric_key="eval_loss"), 0.5, 0.9),
        (dict(metric_key="perplexity"), 0.5, 0.9),
        (dict(metric_key="grad_norm"), 0.5, 0.9),
        (dict(use_eval_loss=False), 0.5, 0.9),
        (dict(metric_key="eval_quality", mode="max"), 0.9, 0.5),
    ],
    ids=str,
)
def test_b52_the_worse_direction_ends_the_run_and_the_better_one_does_not(
    kind: Make, arguments: dict[str, Any], good: float, bad: float
) -> None:
    assert first_end(kind(threshold=0.1, **arguments), [*[good] * 20, *[bad] * 20]) is not None
    assert first_end(kind(threshold=0.1, **arguments), [*[bad] * 20, *[good] * 20]) is None


@kinds
def test_b52_a_name_that_does_not_tell_the_direction_is_refused(kind: Make) -> None:
    with pytest.raises(ValueError, match="the metric 'eval_quality'; write mode=\"min\" if lower is better"):
        kind(metric_key="eval_quality")
    with pytest.raises(ValueError, match="mode='lower' for the metric 'eval_loss'; write mode="):
        kind(mode="lower")


@kinds
def test_b53_a_slow_steady_drift_ends_the_run(kind: Make) -> None:
    drift = [2.8 + 0.01 * n for n in range(5000)]
    assert first_end(kind(drift_threshold=None), drift) is None
    assert first_end(kind(), drift) in (210, 211)


@pytest.mark.parametrize("sizes", [(3, 5), (2, 8), (3, 12), (9, 200)], ids=str)
def test_b54_windows_of_another_size_take_effect_when_they_are_restored(sizes: tuple[int, int]) -> None:
    values, more = noisy(2.8, 300), noisy(9.0, 30)
    before = DualWindowDivergenceDetector(10, 100, drift_threshold=None)
    decisions(before, values)

    def resized() -> DualWindowDivergenceDetector:
        return DualWindowDivergenceDetector(*sizes, threshold=1.0, drift_threshold=None)

    after, undisturbed = resumed(resized, before), resized()
    # All numbers that are still known, which the new windows are cut from.
    decisions(undisturbed, values[-100:])
    assert after.state_dict()["averages"] == undisturbed.state_dict()["averages"]
    ends = decisions(after, more)
    assert ends == decisions(undisturbed, more)
    assert any(one.ends_training for one in ends)
    assert len(after.state_dict()["averages"]["numbers"]) == min(sizes[1], 100 + len(more))


def test_b54_a_state_that_was_taken_does_not_change_with_the_detector() -> None:
    detector = small_windows()
    decisions(detector, noisy(2.8, 20))
    state, then = detector.state_dict(), stored(detector)
    decisions(detector, TRACE)
    again = small_windows()
    again.load_state_dict(state)
    decisions(again, TRACE)
    assert state["averages"]["numbers"] == noisy(2.8, 20)[-8:]
    fresh = small_windows()
    fresh.load_state_dict(state)
    state["averages"]["numbers"].clear()
    fresh.state_dict()["averages"]["numbers"].clear()
    assert stored(fresh) == then


def test_b54_other_arguments_than_the_saved_ones_are_told(caplog: pytest.LogCaptureFixture) -> None:
    detector = DualTimeScaleDivergenceDetector()
    decisions(detector, TRACE)
    with caplog.at_level(logging.WARNING):
        resumed(DualTimeScaleDivergenceDetector, detector)
        assert not caplog.records
        resumed(lambda: DualTimeScaleDivergenceDetector(short_alpha=0.2), detector)
    assert "'short_alpha': 0.1" in caplog.text and "goes on with {'short_alpha': 0.2" in caplog.text


@kinds
def test_b55_a_metric_that_two_events_of_a_step_bring_is_counted_once(kind: Make) -> None:
    once, twice = kind(), kind()
    for n, value in enumerate([*noisy(2.8, 30), *TRACE]):
        metrics = {"eval_loss": value, "loss": 100.0}
        expected = once.update(value, step=100 * n)
        assert twice.observe(metrics, 100 * n) == expected
        assert twice.observe({"loss": 100.0}, 100 * n + 50) == Decision()
        assert twice.observe(metrics, 100 * n) == expected, "the answer is given again"
    assert stored(twice) == stored(once)


@kinds
def test_b55_an_evaluation_that_is_done_again_after_a_resume_is_counted_once(kind: Make) -> None:
    detector = kind()
    detector.update(2.8, step=100)
    after = resumed(kind, detector)
    after.update(2.8, step=100)
    assert stored(after) == stored(detector)


@kinds
def test_b57_zero_is_a_value_of_a_metric_and_no_other_key_stands_for_it(kind: Make) -> None:
    detector, expected = kind(metric_key="loss"), kind(metric_key="loss")
    for step, value in enumerate([0.0, 0.0, 0.5]):
        detector.observe({"loss": value, "eval_loss": 9.0}, step)
        expected.update(value, step=step)
    detector.observe({"eval_loss": 9.0}, 3)
    assert stored(detector) == stored(expected)


# ---- saved and restored

STATES = {"empty": 0, "one value": 1, "mid-window": 5, "full": 8, "long full": 40}


@pytest.mark.parametrize("make", [DualTimeScaleDivergenceDetector, DualWindowDivergenceDetector, small_windows])
@pytest.mark.parametrize("num_before", STATES.values(), ids=STATES)
def test_a_resume_changes_no_bit_of_what_follows(make: Make, num_before: int) -> None:
    values = [*noisy(2.8, 45), *noisy(9.0, 30)]
    undisturbed, first = make(), make()
    expected = decisions(undisturbed, values)
    before = decisions(first, values[:num_before])
    second = resumed(make, first)
    assert stored(second) == stored(first)
    assert before + decisions(second, values[num_before:]) == expected
    assert stored(second) == stored(undisturbed)
    assert any(one.ends_training for one in expected)


def test_a_checkpoint_brings_the_detectors_back(tmp_path: Path) -> None:
    def callbacks() -> tuple[list[Any], StateComponent]:
        watchers = [make() for make in (*KINDS.values(), EarlyStopping)]
        return watchers, StateComponent("callbacks", CallbackStates(watchers), SharingPattern.GLOBAL)

    watchers, component = callbacks()
    for watcher in watchers:
        decisions(watcher, [*noisy(2.8, 70), math.nan])
    with CheckpointCoordinator([component], tmp_path) as checkpoints:
        checkpoints.save_checkpoint(1)
    again, component = callbacks()
    with CheckpointCoordinator([component], tmp_path) as checkpoints:
        checkpoints.load_checkpoint()
    assert [stored(watcher) for watcher in again] == [stored(watcher) for watcher in watchers]


def test_the_best_average_so_far_outlives_a_change_of_windows() -> None:
    detector = small_windows()
    decisions(detector, [2.0] * 4)
    larger = resumed(lambda: DualWindowDivergenceDetector(5, 10, threshold=100.0, drift_threshold=1.0), detector)
    assert first_end(larger, [3.5] * 10) == 4, "(2 + 4 · 3.5) / 5 is 1.2 above 2"


@kinds
@pytest.mark.parametrize("now", [dict(metric_key="loss"), dict(mode="max")], ids=str)
def test_the_state_of_another_metric_is_left_and_told(
    kind: Make, now: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    detector = kind(name="watch")
    decisions(detector, noisy(2.8, 30))
    other = kind(name="watch", **now)
    decisions(other, noisy(5.0, 30))
    with caplog.at_level(logging.WARNING):
        other.load_state_dict(detector.state_dict())
    assert stored(other) == stored(kind(name="watch", **now))
    assert "its saved state is of eval_loss (min): it starts fresh" in caplog.text


BAD_STATES: list[tuple[str, Any, str]] = [
    ("best", math.nan, "best=nan, which is no finite number"),
    ("best", "2.8", "best='2.8', which is no finite number"),
    ("step", -1, "step=-1, which is no count"),
    ("step", True, "step=True, which is no count"),
    ("averages", {}, "is missing; it has \\[\\]"),
    ("averages", {"short": 1.0, "long": None, "numbers": 3}, "one of them is missing|is a int, not a list"),
    ("averages", {"short": math.inf, "long": 1.0, "numbers": [1.0, math.inf]}, "=inf, which is no finite number"),
]


@kinds
@pytest.mark.parametrize(("key", "value", "problem"), BAD_STATES)
def test_a_state_that_cannot_be_is_refused_and_changes_nothing(kind: Make, key: str, value: Any, problem: str) -> None:
    detector = kind()
    decisions(detector, noisy(2.8, 20))
    before = stored(detector)
    with pytest.raises(LoadMismatch, match=problem):
        detector.load_state_dict({**detector.state_dict(), key: value})
    for lost in detector.state_dict():
        with pytest.raises(LoadMismatch, match=f"'{lost}' is missing; it has"):
            detector.load_state_dict({name: item for name, item in detector.state_dict().items() if name != lost})
    assert stored(detector) == before


# ---- arguments and values

REFUSED: list[tuple[Make, dict[str, Any], str]] = [
    (DualTimeScaleDivergenceDetector, dict(short_alpha=0.0), "short_alpha must be above 0 and at most 1, not 0.0"),
    (DualTimeScaleDivergenceDetector, dict(long_alpha=1.5), "long_alpha must be above 0 and at most 1, not 1.5"),
    (DualTimeScaleDivergenceDetector, dict(long_alpha=math.nan), "long_alpha must be above 0"),
    (DualTimeScaleDivergenceDetector, dict(short_alpha=True), "short_alpha must be above 0 and at most 1, not True"),
    (DualTimeScaleDivergenceDetector, dict(short_alpha=0.01), "short_alpha=0.01 must be above long_alpha=0.01"),
    (DualWindowDivergenceDetector, dict(short_window=0), "short_window must be a whole number of at least 1, not 0"),
    (
        DualWindowDivergenceDetector,
        dict(long_window=50.0),
        "long_window must be a whole number of at least 1, not 50.0",
    ),
    (DualWindowDivergenceDetector, dict(short_window=100), "short_window=100 must be below long_window=100"),
    *(
        (kind, arguments, problem)
        for kind in KINDS.values()
        for arguments, problem in [
            (dict(threshold=0), "threshold=0: write a number above 0, such as threshold=2.0, or a share"),
            (dict(threshold=-1.0), "threshold=-1.0: write a number above 0"),
            (dict(threshold=math.inf), "threshold=inf: write a number above 0"),
            (dict(threshold=True), "threshold=True: write a number above 0"),
            (dict(threshold=None), "threshold=None: write a number above 0"),
            (dict(threshold="2.0"), "threshold='2.0': write .*, such as threshold=\"50%\""),
            (dict(threshold="many%"), "threshold='many%': write"),
            (dict(threshold="nan%"), "threshold='nan%': write"),
            (dict(drift_threshold="0%"), "drift_threshold='0%': write a number above 0"),
            (dict(action="halt"), "action='halt': write \"stop\""),
        ]
    ),
]


@pytest.mark.parametrize(("make", "arguments", "problem"), REFUSED)
def test_arguments_that_mean_nothing_are_refused_with_what_to_write(
    make: Make, arguments: dict[str, Any], problem: str
) -> None:
    with pytest.raises(ValueError, match=problem):
        make(**arguments)


@kinds
@pytest.mark.parametrize("value", [torch.tensor(2.5), torch.tensor([2.5]), np.float64(2.5), np.float32(2.5)], ids=repr)
def test_tensors_and_numpy_scalars_of_one_element_are_numbers(kind: Make, value: Any) -> None:
    detector, expected = kind(), kind()
    detector.update(value)
    expected.update(2.5)
    assert stored(detector) == stored(expected)


@kinds
@pytest.mark.parametrize("value", ["2.5", None, True, [2.5], torch.tensor([1.0, 2.0]), 10**400], ids=str)
def test_what_is_not_one_number_is_an_error_that_quotes_it(kind: Make, value: Any) -> None:
    detector = kind()
    with pytest.raises(TypeError, match=r"eval_loss is .*; give one number"):
        detector.update(value)
    assert stored(detector) == stored(kind())


def test_the_callbacks_need_neither_torch_nor_numpy() -> None:
    code = "import sys, forgather_ckpt.callbacks; print(sorted({'torch', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == "[]\n"


# ---- properties

moderate = st.floats(-1e6, 1e6, allow_nan=False)
any_floats = st.lists(st.floats(), max_size=40)
makes = st.sampled_from([DualTimeScaleDivergenceDetector, small_windows])
settings_of_detectors = st.fixed_dictionaries(
    {
        "threshold": st.one_of(st.floats(1e-3, 1e4), st.sampled_from(["1%", "50%", "300%"])),
        "drift_threshold": st.one_of(st.none(), st.just("same"), st.floats(1e-3, 1e4)),
        "mode": st.sampled_from(["min", "max"]),
    }
)


@given(makes, settings_of_detectors, any_floats, st.integers(0, 40))
def test_wherever_a_run_is_interrupted_the_decisions_are_those_of_an_undisturbed_one(
    make: Make, arguments: dict[str, Any], values: list[float], at: int
) -> None:
    undisturbed, first = make(**arguments), make(**arguments)
    expected = decisions(undisturbed, values)
    before = decisions(first, values[:at])
    second = resumed(lambda: make(**arguments), first)
    assert before + decisions(second, values[at:]) == expected
    assert stored(second) == stored(undisturbed)


@given(makes, settings_of_detectors, any_floats)
def test_whatever_comes_in_the_state_stays_finite(make: Make, arguments: dict[str, Any], values: list[float]) -> None:
    detector = make(**arguments)
    for value in values:
        decision = detector.update(value)
        assert decision.ends_training or math.isfinite(value)
        assert decision.ends_training == (decision.reason is not None)
    assert all(math.isfinite(number) for number in numbers_in(detector.state_dict()))


def numbers_in(state: Any) -> Iterator[float]:
    """All floats in plain data."""
    if isinstance(state, float):
        yield state
    elif isinstance(state, dict | list):
        for item in state.values() if isinstance(state, dict) else state:
            yield from numbers_in(item)


@given(makes, settings_of_detectors, st.lists(moderate, max_size=40))
def test_max_is_min_of_the_negated_values(make: Make, arguments: dict[str, Any], values: list[float]) -> None:
    other = {**arguments, "mode": "max" if arguments["mode"] == "min" else "min"}
    negated = decisions(make(**other), [-value for value in values])
    assert [one.action for one in decisions(make(**arguments), values)] == [one.action for one in negated]


@given(makes, settings_of_detectors, st.lists(st.floats(-1e3, 1e3), max_size=40))
def test_a_metric_that_never_gets_worse_never_ends_a_run(
    make: Make, arguments: dict[str, Any], values: list[float]
) -> None:
    improving = sorted(values, reverse=arguments["mode"] == "min")
    if isinstance(arguments["threshold"], str):
        improving = [value + math.copysign(1.0, value) for value in improving]
    assert first_end(make(**arguments), improving) is None


@given(makes, st.floats(0.1, 100.0), st.floats(1.1, 10.0), st.lists(st.floats(-0.01, 0.01), min_size=60, max_size=60))
def test_a_lasting_jump_beyond_the_threshold_is_always_seen(
    make: Make, threshold: float, factor: float, noise: list[float]
) -> None:
    values = [threshold * (one + (factor if n >= 20 else 0)) for n, one in enumerate(noise)]
    ends = first_end(make(threshold=threshold), values)
    assert ends is not None and ends > 20


# ---- the documentation

NUM_QUIET, NUM_WATCHED = 200, 1000
"""Evaluations before the jump, all alike, and after it."""

BASELINES = {"loss": 3.0, "accuracy": 0.9}


def evaluations_until_seen(make: Callable[[], Detector], jump: float) -> int | None:
    detector = make()
    baseline = BASELINES["accuracy" if detector.metric.mode == "max" else "loss"]
    after = baseline + (jump if detector.metric.mode == "min" else -jump)
    for _ in range(NUM_QUIET):
        assert not detector.update(baseline).ends_training
    return first_end(detector, [after] * NUM_WATCHED)


def row_of(code: str) -> list[str]:
    """The cells of the table for a detector that is made by this code."""

    def make() -> Detector:
        return eval(code.strip("`"))

    hundredths = 1 + bisect.bisect_left(
        range(1, 1000), True, key=lambda jump: evaluations_until_seen(make, jump / 100) is not None
    )
    smallest = hundredths / 100
    times = [evaluations_until_seen(make, jump) for jump in (smallest, 2 * smallest)]
    return [code, f"{smallest:.2f}", *map(str, times)]


def test_the_table_says_which_jumps_are_seen_and_when() -> None:
    _, *rows = table_of(PAGE, "detector")
    assert rows, "the page has no table"
    codes = [row[0] for row in rows]
    assert {f"`{kind.__name__}()`" for kind in KINDS.values()} <= set(codes), "a default is missing"
    expected = [row_of(code) for code in codes]
    assert rows == expected, "the table should be:\n" + "\n".join(f"| {' | '.join(row)} |" for row in expected)


def bad_evaluations_of_the_trace(make: Callable[[], Detector], num_good: int) -> str:
    going_on = [*[TRACE[0]] * num_good, *TRACE[1:], *[TRACE[-1]] * NUM_WATCHED]
    ended_after = first_end(make(), going_on)
    return "never" if ended_after is None else str(ended_after - num_good)


def test_the_table_says_after_how_many_evaluations_the_trace_ends_a_run() -> None:
    _, *rows = table_of(PAGE, "on the trace")
    codes = [row[0] for row in rows]
    assert {f"`{kind.__name__}()`" for kind in KINDS.values()} <= set(codes), "a default is missing"
    expected = []
    for code in codes:

        def make(code: str = code) -> Detector:
            return eval(code.strip("`"))

        expected.append([code, *(bad_evaluations_of_the_trace(make, num_good) for num_good in (1, 10))])
    assert rows == expected, "the table should be:\n" + "\n".join(f"| {' | '.join(row)} |" for row in expected)


def test_the_table_of_the_trace_has_what_the_detector_computes() -> None:
    detector, short, long = DualTimeScaleDivergenceDetector(), TRACE[0], TRACE[0]
    expected = []
    for number, value in enumerate([*TRACE, TRACE[-1]], 1):
        short, long = (level + alpha * (value - level) for level, alpha in ((short, 0.1), (long, 0.01)))
        figures = (value, short, long, short - long, short - TRACE[0])
        expected.append([str(number), *(f"{figure:.3f}" for figure in figures)])
        assert detector.update(value).ends_training == (number == 6)
        averages = detector.state_dict()["averages"]
        assert (averages["short"], averages["long"]) == pytest.approx((short, long))
    _, *rows = table_of(PAGE, "evaluation")
    assert rows == expected, "the table should be:\n" + "\n".join(f"| {' | '.join(row)} |" for row in expected)


def test_the_programs_of_the_page_run_and_say_what_is_shown(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = list(blocks_of(PAGE))
    shown = [(block, after) for block, after in itertools.pairwise(blocks) if after.language == "console"]
    assert shown
    for program, console in shown:
        exec(program.text, {})
        assert capsys.readouterr().out == console.text + "\n"
    assert len(blocks) == 2 * len(shown)
