"""Early stopping: when a plateau or exploding gradients end a run, and that a resume changes nothing."""

from __future__ import annotations

import logging
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forgather_ckpt.callbacks import Action, Decision, EarlyStopping
from forgather_ckpt.errors import LoadMismatch
from tests.watchers import decisions, first_end, resumed, stored

FROM_THE_START = {"warmup_steps": 0}

PLATEAUS: dict[str, tuple[dict[str, Any], list[float], int | None]] = {
    "falling by more than min_delta": ({}, [3.0 - 0.02 * n for n in range(100)], None),
    "always the same": ({}, [3.0] * 100, 6),
    "rising": ({}, [3.0 + n for n in range(100)], 6),
    "a better one in time": ({}, [3.0] * 5 + [2.9] + [3.0] * 5, 11),
    "a better one too late": ({}, [3.0] * 6 + [2.9], 6),
    "better by min_delta and no more": ({"min_delta": 0.5}, [3.0] + [2.5] * 5, 6),
    "better by a little more than min_delta": ({"min_delta": 0.5}, [3.0] + [2.49] * 5, None),
    "falling so slowly that only several checks together count": ({}, [3.0 - 0.004 * n for n in range(100)], None),
    "falling too slowly": ({}, [3.0 - 0.001 * n for n in range(100)], 6),
    "noise above a falling floor": ({}, [3.0 - 0.02 * n + (n % 4) * 0.1 for n in range(100)], None),
    "patience 1": ({"patience": 1}, [3.0, 2.0, 2.0], 3),
    "patience 20": ({"patience": 20}, [3.0] * 100, 21),
    "min_delta 0, equal": ({"min_delta": 0}, [3.0] * 100, 6),
    "min_delta 0, better by next to nothing": ({"min_delta": 0}, [3.0 - 1e-9 * n for n in range(100)], None),
    "min_delta as a share, reached": ({"min_delta": "1%"}, [300.0 * 0.98**n for n in range(100)], None),
    "min_delta as a share, not reached": ({"min_delta": "1%"}, [300.0 - 0.5 * n for n in range(6)], 6),
    "accuracy that rises": ({"metric_key": "eval_accuracy"}, [0.02 * n for n in range(50)], None),
    "accuracy that falls": ({"metric_key": "eval_accuracy"}, [0.9 - 0.02 * n for n in range(50)], 6),
    "a loss of which more is better": ({"mode": "max"}, [3.0 + 0.02 * n for n in range(100)], None),
    "not a number": ({}, [3.0, 2.9, math.nan], 3),
    "infinite": ({}, [3.0, 2.9, math.inf, 2.8], 3),
    "minus infinite": ({}, [-math.inf], 1),
    "a first value": ({"patience": 1}, [3.0], None),
}


@pytest.mark.parametrize("case", PLATEAUS)
def test_so_many_checks_without_improvement_end_the_run(case: str) -> None:
    arguments, values, expected = PLATEAUS[case]
    assert first_end(EarlyStopping(**FROM_THE_START, **arguments), values) == expected


SPIKES: dict[str, tuple[dict[str, Any], list[float], int | None]] = {
    "three in a row": ({}, [1.0, 2000.0, 1001.0, 5000.0], 4),
    "two and two": ({}, [2000.0, 2000.0, 1.0, 2000.0, 2000.0], None),
    "the threshold itself": ({}, [1000.0] * 20, None),
    "one now and then is infinite, as under loss scaling": ({}, [1.0, math.inf, 1.0, math.inf, math.inf, 1.0], None),
    "three in a row that are not finite": ({}, [1.0, math.inf, math.nan, math.inf], 4),
    "large ones and infinite ones in a row": ({}, [2000.0, math.nan, 2000.0], 3),
    "a lower threshold": ({"grad_spike_threshold": 5}, [6.0, 6.0, 6.0], 3),
    "patience 1": ({"grad_spike_patience": 1}, [1.0, 2000.0], 2),
    "patience 4": ({"grad_spike_patience": 4}, [2000.0] * 4, 4),
}


@pytest.mark.parametrize("case", SPIKES)
def test_so_many_gradient_spikes_in_a_row_end_the_run(case: str) -> None:
    arguments, norms, expected = SPIKES[case]
    stopping = EarlyStopping(**FROM_THE_START, **arguments)
    ends = [stopping.update(grad_norm=norm).ends_training for norm in norms]
    assert (ends.index(True) + 1 if True in ends else None) == expected


@pytest.mark.parametrize("with_step", [True, False])
def test_by_default_a_plateau_from_the_first_step_on_ends_the_run_at_step_56(with_step: bool) -> None:
    stopping = EarlyStopping()
    ends = [stopping.update(3.0, step=step if with_step else None).ends_training for step in range(1, 101)]
    assert ends.index(True) + 1 == 56, "51 is the first that counts"


def test_by_default_gradients_that_explode_from_the_first_step_on_end_the_run_at_step_53() -> None:
    stopping = EarlyStopping()
    ends = [stopping.update(3.0 - 0.1 * step, grad_norm=1e4, step=step).ends_training for step in range(1, 101)]
    assert ends.index(True) + 1 == 53


def test_a_loss_of_the_warm_up_is_not_the_best() -> None:
    stopping = EarlyStopping()
    stopping.update(0.1, step=50)
    for step in range(51, 100):
        assert not stopping.update(3.0 - 0.02 * step, step=step).ends_training


@pytest.mark.parametrize("step", [1, 50, 51])
def test_a_loss_that_is_not_finite_ends_the_run_in_the_warm_up_too(step: int) -> None:
    decision = EarlyStopping().update(math.nan, grad_norm=1.0, step=step)
    assert decision == Decision(Action.STOP, f"at step {step} loss is nan")


def test_a_loss_that_is_not_finite_leaves_the_best_and_the_counts_alone() -> None:
    stopping, expected = EarlyStopping(), EarlyStopping()
    for step in range(51, 54):
        expected.update(3.0, step=step)
        stopping.update(3.0, step=step)
        assert stopping.update(math.nan, step=step).ends_training
    assert stored(stopping) == stored(expected)


def test_the_reason_names_the_best_and_when_it_was() -> None:
    stopping = EarlyStopping(patience=2, min_delta="1%", warmup_steps=100)
    answers = [
        stopping.update(loss, step=step)
        for step, loss in ((100, 1.0), (200, 3.25), (300, 2.75), (400, 2.74), (500, 3.5))
    ]
    assert answers[:-1] == [Decision()] * 4
    assert answers[-1] == Decision(
        Action.STOP,
        "at step 500 loss is 3.5: 2 checks in a row not more than 1% better than the best, 2.75 at step 300 (patience=2)",
    )


def test_the_reason_names_the_norm_and_the_threshold_that_it_broke() -> None:
    stopping = EarlyStopping(grad_norm_key="norm")
    answers = [stopping.update(2.0, grad_norm=norm, step=step) for step, norm in ((51, 2000), (52, 3000), (53, 4512.5))]
    assert answers[:-1] == [Decision()] * 2
    assert answers[-1] == Decision(
        Action.STOP, "at step 53 norm is 4512.5: 3 in a row above 1000 or not finite (grad_spike_patience=3)"
    )


def test_events_bring_the_loss_and_the_norm_and_each_counts_once_a_step() -> None:
    stopping, expected = EarlyStopping(), EarlyStopping()
    for step in range(51, 55):
        metrics = {"loss": 3.0, "grad_norm": 5000.0, "eval_loss": math.nan}
        answer = expected.update(3.0, grad_norm=5000.0, step=step)
        assert stopping.observe({"grad_norm": 5000.0}, step) == Decision(answer.action, answer.reason)
        assert stopping.observe(metrics, step) == answer
        assert stopping.observe(metrics, step) == answer, "the answer is given again"
        assert stopping.observe({"eval_loss": math.nan}, step) == Decision()
    assert stored(stopping) == stored(expected)


STATES = {"empty": 0, "in warm-up": 30, "with a best": 51, "stalled, with spikes": 70, "ended": 95}


def history(step: int) -> tuple[float, float]:
    """Loss and gradient norm: falling, then level; calm, with spikes now and then."""
    return max(3.0 - 0.02 * step, 1.65), 2000.0 if step % 7 in (0, 1) else 1.0


def run(stopping: EarlyStopping, steps: range) -> list[Decision]:
    return [stopping.update(loss, grad_norm=norm, step=step) for step in steps for loss, norm in [history(step)]]


@pytest.mark.parametrize("num_before", STATES.values(), ids=STATES)
def test_a_resume_changes_no_bit_of_what_follows(num_before: int) -> None:
    undisturbed, first = EarlyStopping(), EarlyStopping()
    expected = run(undisturbed, range(1, 101))
    before = run(first, range(1, num_before + 1))
    second = resumed(EarlyStopping, first)
    assert stored(second) == stored(first)
    assert before + run(second, range(num_before + 1, 101)) == expected
    assert stored(second) == stored(undisturbed)
    assert any(one.ends_training for one in expected)


@pytest.mark.parametrize(("patience", "num_more"), [(10, 6), (5, 1), (3, 1)])
def test_another_patience_counts_on_from_the_checks_that_were_saved(patience: int, num_more: int) -> None:
    before = EarlyStopping(**FROM_THE_START)
    decisions(before, [3.0] * 5)
    after = resumed(lambda: EarlyStopping(patience, **FROM_THE_START), before)
    assert first_end(after, [3.0] * 10) == num_more


@pytest.mark.parametrize("now", [dict(metric_key="eval_loss"), dict(mode="max")], ids=str)
def test_the_state_of_another_metric_is_left_and_told(now: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    stopping, other = EarlyStopping(name="stop"), EarlyStopping(name="stop", **now)
    run(stopping, range(1, 80))
    run(other, range(1, 80))
    with caplog.at_level(logging.WARNING):
        other.load_state_dict(stopping.state_dict())
    assert stored(other) == stored(EarlyStopping(name="stop", **now))
    assert "stop watches" in caplog.text and "is of loss (min): it starts fresh" in caplog.text


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("best", math.nan, "best=nan, which is no finite number"),
        ("best", None, "one of them is missing"),
        ("num_stalled", -1, "num_stalled=-1, which is no count"),
        ("num_spikes", 1.5, "num_spikes=1.5, which is no count"),
        ("step", None, "step=None, which is no count"),
    ],
)
def test_a_state_that_cannot_be_is_refused_and_changes_nothing(key: str, value: Any, problem: str) -> None:
    stopping = EarlyStopping()
    run(stopping, range(1, 80))
    before = stored(stopping)
    with pytest.raises(LoadMismatch, match=problem):
        stopping.load_state_dict({**stopping.state_dict(), key: value})
    for lost in stopping.state_dict():
        with pytest.raises(LoadMismatch, match=f"'{lost}' is missing; it has"):
            stopping.load_state_dict({name: item for name, item in stopping.state_dict().items() if name != lost})
    assert stored(stopping) == before


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (dict(patience=0), "patience must be a whole number of at least 1, not 0"),
        (dict(patience=2.5), "patience must be a whole number of at least 1, not 2.5"),
        (dict(grad_spike_patience=0), "grad_spike_patience must be a whole number of at least 1, not 0"),
        (dict(warmup_steps=-1), "warmup_steps must be a whole number of at least 0, not -1"),
        (dict(min_delta=-0.1), "min_delta=-0.1: write a number of at least 0"),
        (dict(min_delta="0.1"), "min_delta='0.1': write"),
        (dict(grad_spike_threshold=0), "grad_spike_threshold must be a number above 0, not 0"),
        (dict(grad_spike_threshold=math.nan), "grad_spike_threshold must be a number above 0, not nan"),
        (dict(grad_spike_threshold="50%"), "grad_spike_threshold must be a number above 0, not '50%'"),
        (dict(metric_key="quality"), "the metric 'quality'; write mode="),
    ],
    ids=str,
)
def test_arguments_that_mean_nothing_are_refused_with_what_to_write(arguments: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        EarlyStopping(**arguments)


@pytest.mark.parametrize(
    "given_", [dict(value="3.0"), dict(grad_norm="3.0"), dict(value=3.0, grad_norm=[1.0])], ids=str
)
def test_what_is_not_one_number_is_an_error_and_counts_for_nothing(given_: dict[str, Any]) -> None:
    stopping = EarlyStopping()
    with pytest.raises(TypeError, match="give one number"):
        stopping.update(**given_, step=60)
    assert stored(stopping) == stored(EarlyStopping())


losses = st.lists(st.one_of(st.none(), st.floats()), max_size=30)


@given(losses, losses, st.integers(0, 30), st.integers(0, 10))
def test_wherever_a_run_is_interrupted_the_decisions_are_those_of_an_undisturbed_one(
    values: list[float | None], norms: list[float | None], at: int, warmup_steps: int
) -> None:
    def make() -> EarlyStopping:
        return EarlyStopping(patience=3, warmup_steps=warmup_steps)

    told = list(zip(values, norms, strict=False))
    undisturbed, first = make(), make()
    expected = [undisturbed.update(value, grad_norm=norm) for value, norm in told]
    before = [first.update(value, grad_norm=norm) for value, norm in told[:at]]
    second = resumed(make, first)
    assert before + [second.update(value, grad_norm=norm) for value, norm in told[at:]] == expected
    assert stored(second) == stored(undisturbed)


@given(st.lists(st.floats(-1e6, 1e6), max_size=40), st.integers(1, 6))
def test_it_ends_exactly_when_the_last_checks_did_not_beat_the_best_before_them(
    values: list[float], patience: int
) -> None:
    """Against the definition for min_delta=0, where the best is the plain minimum."""
    expected = None
    for n in range(patience + 1, len(values) + 1):
        if min(values[n - patience : n]) >= min(values[: n - patience]):
            expected = n
            break
    assert first_end(EarlyStopping(patience, 0, warmup_steps=0), values) == expected
