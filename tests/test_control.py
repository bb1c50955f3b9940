"""What ranks wish for, what becomes of it, and when they look: pure."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forgather_ckpt.control import NOTHING, Pace, Wishes, merged, refuse_unlike
from forgather_ckpt.errors import DeclarationError

flags = st.booleans()
wishes = st.builds(
    Wishes,
    save=flags,
    evaluate=flags,
    log=flags,
    end_epoch=flags,
    stop=flags,
    abort=flags,
    signal=st.none() | st.sampled_from([2, 10, 15]),
    reasons=st.lists(st.sampled_from(["a", "b", "c"]), max_size=3, unique=True).map(tuple),
)


@given(wishes)
def test_wishes_come_through_as_json(one: Wishes) -> None:
    assert Wishes.from_json(json.loads(json.dumps(one.to_json()))) == one


def test_no_wish_takes_no_room_and_is_false() -> None:
    assert NOTHING.to_json() == {} and not NOTHING and not NOTHING.ends_training
    assert Wishes(log=True) and not Wishes(log=True).ends_training


@given(st.lists(wishes, min_size=1, max_size=4))
def test_what_any_rank_wants_all_do(given_by_rank: list[Wishes]) -> None:
    job = merged(given_by_rank)
    for flag in ("save", "evaluate", "log", "end_epoch", "stop", "abort"):
        assert getattr(job, flag) == any(getattr(one, flag) for one in given_by_rank)
    signals = [one.signal for one in given_by_rank if one.signal is not None]
    assert job.signal == (signals[0] if signals else None)
    assert {reason.split(" (")[0] for reason in job.reasons} == {r for one in given_by_rank for r in one.reasons}


@given(wishes, wishes)
def test_joining_forgets_nothing_and_nothing_changes_nothing(one: Wishes, other: Wishes) -> None:
    assert one | NOTHING == NOTHING | one == one | one == one
    joined = one | other
    assert joined.ends_training == (one.ends_training or other.ends_training)
    assert set(joined.reasons) == {*one.reasons, *other.reasons}


def test_reasons_say_on_which_ranks_where_not_on_all() -> None:
    job = merged([Wishes(reasons=("all", "few")), Wishes(reasons=("all",)), Wishes(reasons=("all", "few"))])
    assert job.reasons == ("all", "few (rank 0, 2)")


@pytest.mark.parametrize(
    ("every", "seconds", "step", "next_step"),
    [
        (5, None, 0, 5),
        (5, 0.001, 4, 5),
        (5, 100.0, 5, 10),
        (1, None, 7, 8),
        (None, None, 7, 8),
        (None, 0.1, 7, 17),
        (None, 10.0, 7, 8),
        (None, 0.001, 7, 57),
        (None, 0.0, 7, 57),
    ],
)
def test_when_the_ranks_look_next(every: int | None, seconds: float | None, step: int, next_step: int) -> None:
    pace = Pace(every)
    assert pace.after(step, seconds) == next_step
    pace.next_step = next_step
    assert [pace.is_due(one) for one in (next_step - 1, next_step, next_step + 1)] == [False, True, True]


def test_ranks_that_were_told_different_things_are_named() -> None:
    refuse_unlike([{"a": 1, "b": 2}] * 3)
    with pytest.raises(DeclarationError, match="b is 2 on rank 0 and 3 on rank 1-2; it must be the same on all ranks"):
        refuse_unlike([{"a": 1, "b": 2}, {"a": 1, "b": 3}, {"a": 1, "b": 3}])
    with pytest.raises(DeclarationError, match="b is 2 on rank 0 and None on rank 1"):
        refuse_unlike([{"b": 2}, {}])
