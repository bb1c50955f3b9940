"""When to save: the same grid whatever resumes lie in between, and an interval that costs least."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forgather_ckpt.errors import DeclarationError
from forgather_ckpt.triggers import SaveSchedule, advice, advised_interval, is_multiple, overhead

DAY = 86400.0


# ---- when


@pytest.mark.parametrize(
    ("schedule", "asked", "due"),
    [
        (SaveSchedule(steps=10), {"step": 20}, "periodic"),
        (SaveSchedule(steps=10), {"step": 21}, None),
        (SaveSchedule(steps=10), {"step": 0}, None),
        (SaveSchedule(steps=10), {"step": 21, "is_epoch_end": True}, None),
        (SaveSchedule(steps=10, epochs=True), {"step": 20, "is_epoch_end": True}, "epoch"),
        (SaveSchedule(epochs=True), {"step": 20}, None),
        (SaveSchedule(), {"step": 7, "is_end": True}, "final"),
        (SaveSchedule(steps=7), {"step": 7, "is_end": True}, "final"),
        (SaveSchedule(epochs=True), {"step": 7, "is_end": True, "is_epoch_end": True}, "epoch"),
        (SaveSchedule(at_end=False), {"step": 7, "is_end": True, "is_epoch_end": True}, None),
        (SaveSchedule(steps=7, at_end=False), {"step": 7, "is_end": True}, "periodic"),
        (SaveSchedule(seconds=60), {"step": 3, "previous_elapsed_seconds": 59, "elapsed_seconds": 61}, "periodic"),
        (SaveSchedule(seconds=60), {"step": 3, "previous_elapsed_seconds": 59, "elapsed_seconds": 60}, "periodic"),
        (SaveSchedule(seconds=60), {"step": 3, "previous_elapsed_seconds": 60, "elapsed_seconds": 119.9}, None),
        (SaveSchedule(seconds=60), {"step": 3, "previous_elapsed_seconds": 50, "elapsed_seconds": 500}, "periodic"),
        (SaveSchedule(seconds=60, steps=5), {"step": 5}, "periodic"),
    ],
)
def test_what_is_due(schedule, asked, due):
    assert schedule.due(**asked) == due


@pytest.mark.parametrize(
    ("schedule", "saves"),
    [
        (SaveSchedule(at_end=False), False),
        (SaveSchedule(), True),
        (SaveSchedule(steps=1, at_end=False), True),
        (SaveSchedule(seconds=0.5, at_end=False), True),
        (SaveSchedule(epochs=True, at_end=False), True),
    ],
)
def test_a_schedule_says_whether_it_saves_at_all(schedule, saves):
    assert schedule.saves is saves


def steps_saved(schedule: SaveSchedule, lengths: list[float], crashes: set[int]) -> list[int]:
    """At which steps a run saves whose steps take so long. It dies once before each of `crashes`, and goes on from what
    it saved last."""
    left = set(crashes)
    step, elapsed = saved = 0, 0.0
    found = []
    while step < len(lengths):
        if step in left:
            left.remove(step)
            step, elapsed = saved
            continue
        before, elapsed = elapsed, elapsed + lengths[step]
        step += 1
        if schedule.due(step, previous_elapsed_seconds=before, elapsed_seconds=elapsed):
            saved = step, elapsed
            found.append(step)
    return sorted(set(found))


@given(st.lists(st.floats(0.01, 50), min_size=1, max_size=60), st.floats(1, 100), st.sets(st.integers(0, 60)))
def test_the_clock_keeps_its_phase_over_crashes_and_resumes(lengths, seconds, crashes):
    schedule = SaveSchedule(seconds=seconds)
    undisturbed = steps_saved(schedule, lengths, set())
    assert steps_saved(schedule, lengths, crashes) == undisturbed
    ends = [sum(lengths[:count]) for count in range(len(lengths) + 1)]
    intervals = {end // seconds for end in ends} - {0}
    assert len(undisturbed) == len(intervals)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"steps": 0}, "steps is 0; use a number of steps, from 1"),
        ({"steps": 2.5}, "steps is 2.5"),
        ({"steps": True}, "steps is True"),
        ({"seconds": 0}, "seconds is 0; use a number above 0"),
        ({"epochs": 2}, "epochs is 2; use True, at the end of each epoch, or False"),
        ({"seconds": math.nan}, "seconds is nan"),
        ({"seconds": "60"}, "seconds is '60'"),
    ],
)
def test_a_schedule_that_means_nothing_is_refused(arguments, problem):
    with pytest.raises(DeclarationError, match=problem):
        SaveSchedule(**arguments)


@pytest.mark.parametrize(("step", "every", "expected"), [(0, 5, False), (4, 5, False), (5, 5, True), (10, 5, True)])
def test_grids_begin_with_their_first_multiple(step, every, expected):
    assert is_multiple(step, every) is expected


# ---- how often


def slow_minimum(save: float, mtbf: float) -> float:
    """The interval of least overhead, by looking at very many."""
    intervals = [mtbf * 1.002**power for power in range(-5000, 1000)]
    return min(intervals, key=lambda interval: overhead(save, interval, mtbf).total)


@pytest.mark.parametrize("mtbf", [3600.0, DAY, 30 * DAY])
@pytest.mark.parametrize("part", [1e-6, 1e-4, 1e-2, 0.1, 0.5])
def test_the_advised_interval_costs_hardly_more_than_the_best_one(part, mtbf):
    save = part * mtbf
    best = slow_minimum(save, mtbf)
    advised = advised_interval(save, mtbf)
    assert advised == pytest.approx(best, rel=0.03)
    assert overhead(save, advised, mtbf).total <= overhead(save, best, mtbf).total + 2e-4


@pytest.mark.parametrize("save", [2 * DAY, 5 * DAY])
def test_where_saves_take_longer_than_failures_take_to_come_the_estimate_is_their_distance(save):
    assert advised_interval(save, DAY) == DAY


def test_short_saves_follow_young():
    assert advised_interval(1e-3, DAY) == pytest.approx(math.sqrt(2 * 1e-3 * DAY), rel=1e-3)
    assert advised_interval(0, DAY) == 0


def simulated(save: float, interval: float, mtbf: float, failures: list[float]) -> float:
    """The part of the time that is lost in a run which these lifetimes interrupt; without restarts."""
    whole = saved = 0.0
    for lifetime in failures:
        whole += lifetime
        saved += lifetime // (interval + save) * interval
    return 1 - saved / whole


def test_the_overhead_is_that_of_a_run_with_failures_at_random():
    random.seed(0)
    failures = [random.expovariate(1 / DAY) for _ in range(100_000)]
    for save, interval in [(60, 600), (60, 3600), (600, 20_000), (3600, DAY)]:
        expected = overhead(save, interval, DAY).total
        assert simulated(save, interval, DAY, failures) == pytest.approx(expected, rel=0.02)


def test_an_interval_that_is_never_reached_costs_everything():
    lost = overhead(1.0, 1e6, 1.0)
    assert (lost.saving, lost.repeating, lost.total) == (0, 1, 1)


@pytest.mark.parametrize(
    ("function", "arguments", "problem"),
    [
        (advised_interval, (-1, DAY), "save_seconds is -1"),
        (advised_interval, (1, 0), "mean_seconds_between_failures is 0"),
        (advised_interval, (1, math.inf), "mean_seconds_between_failures is inf"),
        (overhead, (1, 0, DAY), "interval_seconds is 0"),
        (overhead, (math.nan, 1, DAY), "save_seconds is nan"),
        (advice, (1, 0, 500), "seconds_per_step is 0"),
    ],
)
def test_durations_that_mean_nothing_are_refused(function, arguments, problem):
    with pytest.raises(ValueError, match=problem):
        function(*arguments)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (
            (3.1, 0.47, 500),
            "a save takes 3.1 s; with a failure every 24 h, save every 12 min (about 1,550 steps of 0.47 s): 0.4 % of the "
            "time goes into saves, 0.4 % into work done again; now every 500 steps: 1.3 % and 0.1 %",
        ),
        (
            (200.0, 12.0, 20, 7 * DAY),
            "a save takes 3 min; with a failure every 7 days, save every 4 h (about 1,280 steps of 12 s): 1.3 % of the time "
            "goes into saves, 1.3 % into work done again; now every 20 steps: 45.4 % and 0.0 %",
        ),
        (
            (0.001, 60.0, 1),
            "a save takes 0.001 s; with a failure every 24 h, save every 60 s (each step): 0.0 % of the time goes into "
            "saves, 0.0 % into work done again; now every 1 step: 0.0 % and 0.0 %",
        ),
    ],
)
def test_the_advice_in_words(arguments, told):
    assert advice(*arguments) == told
