"""What is kept: tables of checkpoints in, kept steps and reasons out; and what holds whatever the history of a run."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forgather_ckpt.errors import DeclarationError
from forgather_ckpt.policies import AnyOf, Best, Emergency, Epochs, Every, Latest, Opinion, Pinned, Policy, Stored
from forgather_ckpt.retention import (
    Protected,
    Verdict,
    best_checkpoints_summary,
    countable,
    decide,
    from_arguments,
    refuse_replaced,
    unranked_newest,
)

RUN = Path("run")


def stored(step: int, sequence: int, loss: object = None, **said: object) -> Stored:
    metrics = {} if loss is None else {"eval_loss": loss}
    name = said.pop("name", f"checkpoint-{step}")
    fields = {"digest": f"{step}.{sequence}", "metrics": metrics, **said}
    return Stored(RUN / str(name), step, sequence, **fields)  # type: ignore[arg-type]


def saved(*losses: object, kinds: Mapping[int, str] | None = None) -> list[Stored]:
    """One checkpoint a step, from step 1, each with its loss."""
    kinds = kinds or {}
    return [stored(step, step, loss, kind=kinds.get(step, "periodic")) for step, loss in enumerate(losses, start=1)]


def kept(verdicts: Sequence[Verdict]) -> list[int]:
    return sorted(verdict.checkpoint.step for verdict in verdicts if verdict.keep)


def reasons(verdicts: Sequence[Verdict]) -> dict[int, str]:
    return {verdict.checkpoint.step: "; ".join(verdict.reasons) for verdict in verdicts}


# ---- the policies, one by one

KINDS = {2: "epoch", 3: "emergency", 4: "epoch", 6: "emergency", 7: "final"}
SEVEN = saved(*[None] * 7, kinds=KINDS)


@pytest.mark.parametrize(
    ("policy", "steps"),
    [
        (Latest(1), [7]),
        (Latest(3), [4, 5, 7]),
        (Latest(100), [1, 2, 4, 5, 7]),
        (Latest(None), [1, 2, 4, 5, 7]),
        (Epochs(), [2, 4, 7]),
        (Epochs(1), [4, 7]),
        (Emergency(), [3, 6, 7]),
        (Emergency(1), [6, 7]),
        (Emergency(None), [3, 6, 7]),
        (Every(steps=3), [3, 6, 7]),
        (Every(steps=100), [7]),
        (Pinned(), [7]),
        (AnyOf(()), [7]),
        (Latest(1) | Epochs() | Emergency(1), [2, 4, 6, 7]),
        (Latest(2) | (Epochs(1) | Emergency(1)), [4, 5, 6, 7]),
    ],
    ids=str,
)
def test_policies_keep_what_they_say_and_the_newest(policy, steps):
    assert kept(decide(policy, SEVEN)) == steps


@pytest.mark.parametrize(
    ("steps", "kept_steps"),
    [
        ([500, 1000, 1500, 2000, 2500], [1000, 2000, 2500]),
        ([300, 600, 900, 1200, 1500, 1800, 2100], [1200, 2100]),
        ([0, 999, 5003, 5004], [5003, 5004]),
        ([1003, 1000, 1001], [1000, 1001]),
    ],
)
def test_every_thousand_steps_keeps_the_first_at_or_after_each_multiple(steps, kept_steps):
    found = [stored(step, sequence) for sequence, step in enumerate(steps)]
    assert kept(decide(Every(steps=1000), found)) == kept_steps


def test_every_day_keeps_the_first_of_each_day_whatever_the_clock_did():
    hours = [1, 5, 23, 25, 30, 3, 60, None, 61]
    found = [
        stored(step, step, saved_at_seconds=None if hour is None else hour * 3600.0) for step, hour in enumerate(hours)
    ]
    verdicts = decide(Every(seconds=86_400), found)
    assert reasons(verdicts) == {
        0: "every 86400 seconds",
        1: "no policy keeps it",
        2: "no policy keeps it",
        3: "every 86400 seconds",
        4: "no policy keeps it",
        5: "no policy keeps it",
        6: "every 86400 seconds",
        7: "when it was saved is not known",
        8: "newest",
    }
    assert kept(verdicts) == [0, 3, 6, 7, 8]


def test_every_decision_has_its_reason():
    found = saved(2.0, math.nan, 1.0, None, 3.0, kinds={1: "epoch", 2: "emergency", 4: "epoch"})
    policy = Latest(2) | Best(1, "eval_loss") | Epochs(1) | Emergency(1) | Every(steps=5)
    assert [str(verdict) for verdict in decide(policy, found, Protected(resumed_from="3.3"))] == [
        "keep checkpoint-5: newest; latest 1 of 2; every 5 steps",
        "keep checkpoint-4: latest 2 of 2; epoch 1 of 1",
        "keep checkpoint-3: resumed from; best 1 of 1 (eval_loss 1, lowest is best)",
        "keep checkpoint-2: emergency 1 of 1",
        "remove checkpoint-1: latest 4, 2 kept; best 2, 1 kept (eval_loss 2, lowest is best); epoch 2, 1 kept",
    ]
    assert reasons(decide(Best(1, "eval_loss"), found))[2] == "its 'eval_loss' is no finite number"
    assert reasons(decide(Best(1, "eval_loss"), found))[4] == "it has no metric 'eval_loss'"


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Latest(0), r"Latest: n is 0; use a number, from 1, or Latest\(None\) for all of them"),
        (lambda: Latest(-1), "Latest: n is -1"),
        (lambda: Latest(True), "Latest: n is True"),
        (lambda: Latest(2.0), r"Latest: n is 2\.0"),
        (lambda: Epochs(0), r"Epochs: n is 0; use a number, from 1, or Epochs\(\)"),
        (lambda: Emergency(-3), r"or Emergency\(None\)"),
        (lambda: Best(0, "eval_loss"), "Best: n is 0; use a number, from 1$"),
        (lambda: Best(None, "eval_loss"), "Best: n is None"),
        (lambda: Best(1, ""), "metric is ''; use the name of a metric, such as 'eval_loss'"),
        (lambda: Best(1, "eval_loss", "lower"), "mode is 'lower'; use 'min' or 'max'"),
        (lambda: Best(2, "quality"), r"does not tell which way .* say Best\(2, 'quality', mode='min'\) or mode='max'"),
        (lambda: Every(), r"use either Every\(steps=10_000\) or Every\(seconds=86_400\)"),
        (lambda: Every(steps=1, seconds=1), "use either"),
        (lambda: Every(steps=0), "steps is 0; use a number of steps, from 1"),
        (lambda: Every(seconds=0), "seconds is 0; use a number of seconds, above 0"),
        (lambda: Every(seconds=math.inf), "seconds is inf"),
    ],
)
def test_a_policy_that_makes_no_sense_is_refused_with_what_to_write(make, said):
    with pytest.raises(DeclarationError, match=said):
        make()


def test_only_policies_can_be_joined():
    with pytest.raises(TypeError):
        Latest(1) | 3


class _OddSteps(Policy):
    def judge(self, found):
        return (Opinion(one, True, "odd") for one in found if one.step % 2)


def test_a_policy_may_be_anybodys():
    assert kept(decide(_OddSteps() | Latest(1), saved(*[None] * 6))) == [1, 3, 5, 6]


# ---- what is never removed


@pytest.mark.parametrize(
    ("protected", "steps"),
    [
        (Protected(), [4]),
        (Protected(resumed_from="1.1"), [1, 4]),
        (Protected(in_flight=frozenset({"1.1", "3.3"})), [1, 3, 4]),
        (Protected(verified=frozenset({"1.1", "2.2"})), [2, 4]),
        (Protected(resumed_from="of another run", verified=frozenset({"9.9"})), [4]),
    ],
)
def test_what_the_job_needs_is_never_removed(protected, steps):
    assert kept(decide(AnyOf(()), saved(*[None] * 4), protected)) == steps


def test_pinned_ones_stay_and_take_no_place_of_others():
    found = [dataclasses.replace(one, is_pinned=one.step in (1, 4)) for one in saved(*[None] * 5)]
    assert kept(decide(Latest(2), found)) == [1, 4, 5]
    assert reasons(decide(Latest(2) | Pinned(), found))[1] == "pinned"


def test_quarantined_ones_stay_and_count_for_nothing():
    found = [dataclasses.replace(one, is_quarantined=one.step in (2, 5)) for one in saved(3.0, 1.0, 2.5, 2.0, 0.5)]
    verdicts = decide(Latest(1) | Best(2, "eval_loss"), found)
    assert kept(verdicts) == [2, 3, 4, 5]
    assert reasons(verdicts) == {
        5: "quarantined: set aside for a person to look at",
        4: "newest; latest 1 of 1; best 1 of 2 (eval_loss 2, lowest is best)",
        3: "best 2 of 2 (eval_loss 2.5, lowest is best)",
        2: "quarantined: set aside for a person to look at",
        1: "latest 3, 1 kept; best 3, 2 kept (eval_loss 3, lowest is best)",
    }


def test_what_is_not_ours_counts_and_stays():
    found = [dataclasses.replace(one, hold="a link" if one.step == 2 else None) for one in saved(3.0, 1.0, 2.0, 4.0)]
    assert kept(decide(Best(1, "eval_loss"), found)) == [2, 4]


def test_copies_count_once_and_ours_is_the_one_that_counts():
    one, two, three = saved(1.0, 2.0, 3.0)
    copy = dataclasses.replace(one, path=RUN / "best so far", hold="not our name")
    found = [copy, one, two, three]
    assert countable(found) == [three, two, one]
    verdicts = decide(Best(2, "eval_loss"), found)
    assert all(verdict.keep for verdict in verdicts)
    alike = dataclasses.replace(one, path=RUN / "checkpoint-1.replaced-ab")
    assert [str(verdict) for verdict in decide(Best(2, "eval_loss"), [alike, one, two, three])][-1] == (
        "remove checkpoint-1.replaced-ab: a copy of another one"
    )


def test_an_empty_run_has_nothing_to_decide():
    assert decide(Latest(1) | Best(1, "eval_loss"), []) == []


# ---- ties and equal steps


@pytest.mark.parametrize("mode", ["min", "max"])
def test_of_equal_metrics_the_one_that_was_saved_first_ranks_first(mode):
    found = saved(1.0, 1.0, 1.0, 1.0)
    assert kept(decide(Best(2, "eval_loss", mode), found)) == [1, 2, 4]
    assert kept(decide(Best(1, "eval_loss"), saved(0.0, -0.0, 5.0))) == [1, 3]


def test_two_checkpoints_of_one_step_are_two():
    older = stored(5, 1, 1.0, name="checkpoint-5.replaced-ab")
    newer = stored(5, 2, 2.0)
    last = stored(6, 3, 3.0)
    assert reasons(decide(Best(1, "eval_loss"), [older, last])) == {
        6: "newest",
        5: "best 1 of 1 (eval_loss 1, lowest is best)",
    }
    assert [verdict.checkpoint for verdict in decide(Latest(2), [older, newer, last]) if verdict.keep] == [last, newer]


# ---- what the source documents and the earlier system got wrong


def test_document_001_the_best_is_in_the_list_before_anything_is_removed():
    """Its list of the best was extended after the removal: every new best was at risk until the next save."""
    present: list[Stored] = []
    for new in saved(5.0, 4.0, 3.0, 6.0, 7.0, 8.0, 2.0, 9.0, 9.5, 9.9):
        verdicts = decide(Latest(1) | Best(1, "eval_loss"), [*present, new])
        present = [verdict.checkpoint for verdict in verdicts if verdict.keep]
        assert new in present
    assert sorted(one.step for one in present) == [7, 10]


def test_document_001_exactly_as_many_are_best_as_were_asked_for():
    verdicts = decide(Latest(1) | Best(2, "eval_loss"), saved(5.0, 4.0, 3.0, 2.0, 1.0))
    best = [verdict for verdict in verdicts if any(reason.startswith("best") for reason in verdict.reasons)]
    assert [verdict.checkpoint.step for verdict in best if verdict.keep] == [5, 4]


def test_document_001_a_checkpoint_that_the_summary_names_is_there():
    """checkpoint-23750 was second best in the log, and deleted."""
    losses = {22500: 2.95, 23750: 2.8901, 25000: 2.8557, 26250: 3.154, 27500: 7.860, 28750: 8.272, 30000: 8.389}
    present: list[Stored] = []
    best = Best(2, "eval_loss")
    for sequence, (step, loss) in enumerate(losses.items()):
        verdicts = decide(Latest(3) | best, [*present, stored(step, sequence, loss)])
        present = [verdict.checkpoint for verdict in verdicts if verdict.keep]
    assert sorted(one.step for one in present) == [23750, 25000, 27500, 28750, 30000]
    assert best_checkpoints_summary(best, present) == (
        "Best checkpoints (N=2):\n  run/checkpoint-25000: eval_loss=2.8557\n  run/checkpoint-23750: eval_loss=2.8901"
    )


@pytest.mark.parametrize("losses", [(), (None, None), (math.nan, math.inf)])
def test_a_summary_without_any_best_says_so(losses):
    assert best_checkpoints_summary(Best(2, "eval_loss"), saved(*losses)) == (
        "Best checkpoints: none; no checkpoint has a finite 'eval_loss'"
    )


def test_b23_the_newest_is_the_one_that_was_saved_last_not_the_one_of_the_highest_step():
    found = [stored(1000, 4), stored(3000, 1), stored(2000, 2), stored(500, 3)]
    assert kept(decide(Latest(2), found)) == [500, 1000]


def test_b24_the_checkpoint_just_written_stays_though_it_is_not_among_the_best():
    assert kept(decide(from_arguments(save_total_limit=2, preserve_best_model=True, preserve_n_best=2), saved(1.0, 2.0, 3.0))) == [
        1, 2, 3,
    ]  # fmt: skip
    assert kept(decide(Best(2, "eval_loss"), saved(1.0, 2.0, 3.0))) == [1, 2, 3]


def test_b24_none_keeps_all_and_zero_is_refused():
    assert kept(decide(from_arguments(save_total_limit=None), saved(*[None] * 20))) == list(range(1, 21))
    with pytest.raises(DeclarationError, match=r"save_total_limit is 0; use None to keep all .* or a number from 1"):
        from_arguments(save_total_limit=0)


def test_b25_the_best_lie_outside_the_limit():
    policy = from_arguments(save_total_limit=3, preserve_best_model=True, preserve_n_best=2)
    assert kept(decide(policy, saved(1.0, 2.0, 3.0, 4.0, 5.0, 6.0))) == [1, 2, 4, 5, 6]
    policy = from_arguments(save_total_limit=5, preserve_best_model=True, preserve_n_best=3)
    assert len(kept(decide(policy, saved(*range(20))))) == 8


def test_b27_what_is_kept_does_not_depend_on_how_paths_are_written():
    relative = saved(1.0, 2.0, 3.0, 4.0)
    absolute = [dataclasses.replace(one, path=Path("/elsewhere") / one.path) for one in relative]
    policy, protected = Latest(1) | Best(1, "eval_loss"), Protected(resumed_from="2.2")
    assert kept(decide(policy, relative, protected)) == kept(decide(policy, absolute, protected)) == [1, 2, 4]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            {"load_best_model_at_end": True, "metric_for_best_model": "loss"},
            r"load_best_model_at_end=True, metric_for_best_model='loss' is not supported: .* "
            r"Write preserve_best_model=True, best_model_metric='loss', eval_on_save=True$",
        ),
        ({"load_best_model_at_end": True}, "Write preserve_best_model=True, eval_on_save=True$"),
        (
            {"output_dir": "run", "metric_for_best_model": "accuracy", "greater_is_better": True},
            r"Write preserve_best_model=True, best_model_metric='accuracy', best_model_greater_is_better=True, eval_on_save=True$",
        ),
        (
            {"greater_is_better": False},
            "Write preserve_best_model=True, best_model_greater_is_better=False, eval_on_save=True$",
        ),
        ({"load_best_model_at_end": False}, "Leave it out$"),
        ({"metric_for_best_model": None, "greater_is_better": None}, "Leave it out$"),
    ],
)
def test_b48_the_old_arguments_are_refused_and_the_new_form_shown(given, said):
    with pytest.raises(DeclarationError, match=said):
        refuse_replaced(given)


def test_b48_other_arguments_are_not_looked_at():
    refuse_replaced({"output_dir": "run", "preserve_best_model": True})


@pytest.mark.parametrize(
    ("policy", "values", "best"),
    [
        (Best(2, "eval_loss"), (3.0, 2.0, 2.5), [2, 3]),
        (Best(2, "eval_accuracy"), (0.80, 0.90, 0.85), [2, 3]),
        (Best(2, "eval_accuracy", "min"), (0.80, 0.90, 0.85), [1, 3]),
    ],
)
def test_b56_the_worst_of_the_best_is_the_one_that_goes(policy, values, best):
    found = [stored(step, step, metrics={policy.metric: value}) for step, value in enumerate(values, start=1)]
    assert sorted(one.step for one, _ in policy.ranked(found)[:2]) == best


@pytest.mark.parametrize(
    ("losses", "best"),
    [
        ((0.0, 1.0, 2.0), 1),
        ((0, 1.0, 2.0), 1),
        ((math.nan, 2.0, 3.0), 2),
        ((-math.inf, 2.0, 3.0), 2),
        (({"$float": "nan"}, 2.0, 3.0), 2),
        (("0.1", 2.0, 3.0), 2),
        ((True, 2.0, 3.0), 2),
        ((10**400, 2.0, 3.0), 2),
        ((-1e308, -1e307, 3.0), 1),
    ],
)
def test_b57_zero_is_a_value_and_what_is_no_finite_number_never_ranks(losses, best):
    assert kept(decide(Best(1, "eval_loss"), saved(*losses, 9.0))) == [best, 4]


def test_b57_another_metric_is_never_taken_instead():
    found = [stored(1, 1, metrics={"loss": 0.1}), stored(2, 2, 3.0), stored(3, 3, 4.0)]
    assert kept(decide(Best(1, "eval_loss"), found)) == [2, 3]
    assert kept(decide(Best(1, "loss"), found)) == [1, 3]


@pytest.mark.parametrize(
    ("metric", "greater_is_better", "policy"),
    [
        ("loss", None, Best(1, "eval_loss", "min")),
        ("eval_loss", None, Best(1, "eval_loss", "min")),
        ("perplexity", None, Best(1, "eval_perplexity", "min")),
        ("eval_accuracy", None, Best(1, "eval_accuracy", "max")),
        ("eval_accuracy", False, Best(1, "eval_accuracy", "min")),
        ("quality", True, Best(1, "eval_quality", "max")),
    ],
)
def test_b57_the_direction_is_the_metrics_or_the_one_that_was_said(metric, greater_is_better, policy):
    made = from_arguments(
        preserve_best_model=True, best_model_metric=metric, best_model_greater_is_better=greater_is_better
    )
    assert made == Latest(10) | policy | Emergency(10)


def test_b58_a_diverged_checkpoint_does_not_push_the_good_one_out():
    policy = from_arguments(save_total_limit=1, preserve_best_model=True)
    assert kept(decide(policy, saved(3.1, 8.4))) == [1, 2]


def test_b60_a_checkpoint_without_the_metric_is_no_candidate_and_that_is_said():
    policy = Latest(5) | Best(1, "eval_loss")
    assert unranked_newest(policy, saved(3.0, None)) == [
        "checkpoint-2 cannot be among the best: it has no metric 'eval_loss'; evaluate before each save "
        "(eval_on_save=True, with an eval_dataset)"
    ]
    assert unranked_newest(policy, saved(None, kinds={1: "emergency"})) == [
        "checkpoint-1 cannot be among the best: it has no metric 'eval_loss'; after a signal there is no time to evaluate"
    ]
    assert unranked_newest(Best(1, "eval_accuracy"), saved(3.0)) == [
        "checkpoint-1 cannot be among the best: it has no metric 'eval_accuracy', only 'eval_loss'; rank by one of these "
        "(best_model_metric)"
    ]
    assert unranked_newest(policy, saved(3.0, math.nan)) == [
        "checkpoint-2 cannot be among the best: its 'eval_loss' is no finite number"
    ]
    assert unranked_newest(policy, saved(None, 3.0)) == []
    assert unranked_newest(Latest(5), saved(None)) == []
    assert unranked_newest(policy, []) == []


# ---- arguments


@pytest.mark.parametrize(
    ("arguments", "policy"),
    [
        ({}, Latest(10) | Emergency(10)),
        ({"save_total_limit": 3, "preserve_n_best": 4}, Latest(3) | Emergency(10)),
        ({"preserve_best_model": True, "preserve_n_best": 2}, Latest(10) | Best(2, "eval_loss", "min") | Emergency(10)),
        ({"keep_epoch_checkpoints": True}, Latest(10) | Epochs() | Emergency(10)),
        ({"keep_epoch_checkpoints": 1}, Latest(10) | Epochs(1) | Emergency(10)),
        ({"keep_epoch_checkpoints": 0, "keep_emergency_checkpoints": 0}, Latest(10)),
        ({"keep_emergency_checkpoints": 2}, Latest(10) | Emergency(2)),
    ],
    ids=str,
)
def test_arguments_build_a_policy(arguments, policy):
    assert from_arguments(**arguments) == policy


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"save_total_limit": -1}, "save_total_limit is -1"),
        ({"save_total_limit": "3"}, "save_total_limit is '3'"),
        ({"save_total_limit": True}, "save_total_limit is True"),
        ({"preserve_best_model": 1}, "preserve_best_model is 1; use True or False"),
        ({"preserve_n_best": 0}, "preserve_n_best is 0; use a number from 1, or preserve_best_model=False"),
        ({"keep_epoch_checkpoints": None}, "keep_epoch_checkpoints is None; use True for all, False for none, or how many"),
        ({"keep_emergency_checkpoints": True}, "keep_emergency_checkpoints is True; use a number, from 0"),
        ({"preserve_best_model": True, "best_model_metric": ""}, "best_model_metric is ''"),
        (
            {"preserve_best_model": True, "best_model_metric": "quality"},
            r"best_model_metric='quality' does not tell .* say best_model_greater_is_better=True or",
        ),
        (
            {"preserve_best_model": True, "best_model_greater_is_better": "yes"},
            "best_model_greater_is_better is 'yes'; use True, False, or None to ask the name",
        ),
    ],
)  # fmt: skip
def test_arguments_that_make_no_sense_are_refused_with_what_to_write(arguments, said):
    with pytest.raises(DeclarationError, match=said):
        from_arguments(**arguments)


# ---- whatever the history

counts = st.integers(1, 4)
single_policies = st.one_of(
    st.builds(Latest, st.none() | counts),
    st.builds(Best, counts, st.just("eval_loss"), st.sampled_from(["min", "max"])),
    st.builds(Epochs, st.none() | counts),
    st.builds(Emergency, st.none() | counts),
    st.builds(Every, steps=st.integers(1, 9)),
    st.builds(Every, seconds=st.sampled_from([1, 7.5, 40])),
    st.just(Pinned()),
)
policies = st.lists(single_policies, max_size=4).map(lambda some: AnyOf(tuple(some)))
losses = st.none() | st.just(math.nan) | st.integers(0, 5)
places = st.integers(0, 99)
events = st.one_of(
    st.tuples(st.just("save"), st.integers(1, 3), st.sampled_from(["periodic", "epoch", "emergency", "final"]), losses),
    st.tuples(st.just("save"), st.integers(1, 3), st.just("periodic"), losses),
    st.tuples(st.just("die in a save")),
    st.tuples(st.just("die in a removal"), places),
    st.tuples(st.just("resume"), places),
    st.tuples(st.just("pin"), places),
    st.tuples(st.just("unpin"), places),
    st.tuples(st.just("quarantine"), places),
    st.tuples(st.just("evaluate"), places, losses),
)


class Run:
    """A run directory as a history left it: checkpoints by name, and what the job that runs now has resumed from."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.present: dict[Path, Stored] = {}
        self.step = 0
        self.protected = Protected()
        self.removals_until_death: int | None = None

    def play(self, event: tuple) -> None:
        match event:
            case ("save", steps, kind, loss):
                self.step += steps
                sequence = 1 + max((one.sequence for one in self.present.values()), default=0)
                new = stored(self.step, sequence, loss, kind=kind, saved_at_seconds=10.0 * sequence)
                self.present[new.path] = new
                self.prune()
            case ("die in a save",):
                self.resume_from(self.newest())
            case ("die in a removal", number):
                self.removals_until_death = number % 3
            case ("resume", number):
                self.resume_from(self.pick(number))
            case ("pin" | "unpin" as verb, number):
                self.note(number, is_pinned=verb == "pin")
            case ("quarantine", number):
                if (one := self.pick(number)) and one.digest != self.protected.resumed_from:
                    self.note(number, is_quarantined=True)
            case ("evaluate", number, loss):
                self.note(number, metrics={} if loss is None else {"eval_loss": loss})

    def newest(self) -> Stored | None:
        return max(countable(list(self.present.values())), key=lambda one: one.sequence, default=None)

    def pick(self, number: int) -> Stored | None:
        ordered = sorted(self.present.values(), key=lambda one: one.sequence)
        return ordered[number % len(ordered)] if ordered else None

    def note(self, number: int, **said: object) -> None:
        if (one := self.pick(number)) is not None:
            self.present[one.path] = dataclasses.replace(one, **said)  # type: ignore[arg-type]

    def resume_from(self, one: Stored | None) -> None:
        self.step = one.step if one else 0
        self.protected = Protected(resumed_from=one.digest if one else None)

    def prune(self) -> None:
        """Remove, the oldest first; where the job dies on the way, a new one resumes from the newest."""
        before = list(self.present.values())
        verdicts = decide(self.policy, before, self.protected)
        check_verdicts(self, before, verdicts)
        doomed = [verdict.checkpoint for verdict in reversed(verdicts) if not verdict.keep]
        for one in doomed[: self.removals_until_death]:
            del self.present[one.path]
        left = decide(self.policy, list(self.present.values()), self.protected)
        assert kept_paths(left) == kept_paths(verdicts), "however far the removal came, the rest of it is decided alike"
        if self.removals_until_death is not None:
            self.removals_until_death = None
            self.resume_from(self.newest())


def kept_paths(verdicts: Sequence[Verdict]) -> set[Path]:
    return {verdict.checkpoint.path for verdict in verdicts if verdict.keep}


def check_verdicts(run: Run, before: Sequence[Stored], verdicts: Sequence[Verdict]) -> None:
    """Kept is exactly the union, computed here in another way."""
    assert [verdict.checkpoint for verdict in verdicts] == sorted(before, key=lambda one: -one.sequence)
    assert all(verdict.reasons for verdict in verdicts)
    usable = sorted((one for one in before if not one.is_quarantined), key=lambda one: one.sequence)
    expected = {one.path for one in before if one.is_pinned or one.is_quarantined}
    expected |= {one.path for one in usable[-1:]}
    expected |= {one.path for one in before if one.digest == run.protected.resumed_from}
    assert isinstance(run.policy, AnyOf)
    for policy in run.policy.policies:
        expected |= {one.path for one in by_definition(policy, usable)}
    assert kept_paths(verdicts) == expected


def by_definition(policy: Policy, oldest_first: Sequence[Stored]) -> list[Stored]:
    def last(n: int | None, some: list[Stored]) -> list[Stored]:
        return some if n is None else some[-n:]

    match policy:
        case Latest(n):
            return last(n, [one for one in oldest_first if one.kind != "emergency"])
        case Epochs(n):
            return last(n, [one for one in oldest_first if one.kind == "epoch"])
        case Emergency(n):
            return last(n, [one for one in oldest_first if one.kind == "emergency"])
        case Best(n, metric, mode):
            finite = [one for one in oldest_first if isinstance(one.metrics.get(metric), int)]
            better = (lambda a, b: a < b) if mode == "min" else (lambda a, b: a > b)

            def num_better(one: Stored) -> int:
                mine = one.metrics[metric]
                return sum(
                    better(other.metrics[metric], mine)
                    or (other.metrics[metric] == mine and other.sequence < one.sequence)
                    for other in finite
                )

            return [one for one in finite if num_better(one) < n]
        case Every(steps=None, seconds=seconds):
            first = {one.saved_at_seconds // seconds: one for one in reversed(oldest_first)}
            return list(first.values())
        case Every(steps=steps):
            numbers = {one.step // steps for one in oldest_first} - {0}
            return [
                min((one for one in oldest_first if one.step // steps == n), key=lambda one: one.step) for n in numbers
            ]
        case Pinned():
            return []
        case other:
            raise AssertionError(other)


@given(policies, st.lists(events, max_size=30))
def test_whatever_happens_to_a_run_exactly_the_union_is_kept(policy, history):
    run = Run(policy)
    for event in history:
        run.play(event)


@given(counts, counts, st.sampled_from(["min", "max"]), st.lists(st.tuples(losses, st.none() | places), max_size=30))
def test_the_best_of_all_time_are_there_however_often_the_job_dies(n, limit, mode, history):
    """The list of the best is not kept anywhere, so no death can lose it, and it is never out of date."""
    run = Run(AnyOf((Latest(limit), Best(n, "eval_loss", mode))))
    everything = []
    for loss, death in history:
        if death is not None:
            run.play(("die in a removal", death))
        run.play(("save", 1, "periodic", loss))
        everything.append(next(one for one in run.present.values() if one.step == run.step))
        assert set(map(str, by_definition(Best(n, "eval_loss", mode), everything))) <= set(
            map(str, run.present.values())
        )
        assert run.newest() == everything[-1]


@given(policies, st.lists(losses, min_size=1, max_size=12), st.randoms())
def test_the_order_in_which_checkpoints_are_found_does_not_matter(policy, values, random):
    found = saved(*values)
    assert decide(policy, random.sample(found, len(found))) == decide(policy, found)


@given(policies, policies, st.lists(losses, max_size=12))
def test_joining_policies_joins_what_they_keep(one, other, values):
    found = saved(*values)
    both = kept_paths(decide(one | other, found))
    assert both == kept_paths(decide(one, found)) | kept_paths(decide(other, found))
