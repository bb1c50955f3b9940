"""Which checkpoint to load, and which is the newest: by sequence, whatever the names and the clock say."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forgather_ckpt.errors import CheckpointNotFound
from forgather_ckpt.resume import Candidate, choose, newest_first


def candidate(step: int, sequence: int, name: str | None = None) -> Candidate:
    return Candidate(Path("run") / (name or f"checkpoint-{step}"), step, sequence)


FIRST, SECOND, THIRD = candidate(1000, 1), candidate(3000, 2), candidate(2000, 3)
FOUND = [SECOND, THIRD, FIRST]


@pytest.mark.parametrize(
    ("which", "chosen"),
    [
        (None, [THIRD, SECOND, FIRST]),
        ("latest", [THIRD, SECOND, FIRST]),
        ("latest~0", [THIRD]),
        ("latest~1", [SECOND]),
        ("latest~2", [FIRST]),
        (1000, [FIRST]),
        ("1000", [FIRST]),
        ("step:3000", [SECOND]),
    ],
)
def test_choices(which, chosen):
    assert choose(FOUND, which) == chosen


@pytest.mark.parametrize("which", ["latest~3", 5, "step:5", "0100"])
def test_what_is_not_there_is_said_with_what_is(which):
    with pytest.raises(CheckpointNotFound, match=r"committed steps: 2000, 3000, 1000"):
        choose(FOUND, which)


@pytest.mark.parametrize(
    "which", ["newest", "", "step:", "step:x", "latest~", "latest~-1", -5, 1.5, True, "checkpoint-1000"]
)
def test_what_selects_nothing_is_refused_with_what_would(which):
    with pytest.raises(CheckpointNotFound, match="use 'latest', 'latest~1', a step, or a path"):
        choose(FOUND, which)


@pytest.mark.parametrize("which", [None, "latest", 0])
def test_an_empty_run_has_nothing_to_choose(which):
    with pytest.raises(CheckpointNotFound, match="committed steps: none"):
        choose([], which)


def test_b23_the_newest_has_the_highest_sequence_not_the_highest_step_or_name():
    assert newest_first([candidate(9, 1), candidate(10, 3), candidate(2, 2)]) == [
        candidate(10, 3),
        candidate(2, 2),
        candidate(9, 1),
    ]


def test_of_two_copies_the_one_with_the_plain_name_comes_first():
    plain, copied, replaced = candidate(5, 1), candidate(5, 1, "a copy"), candidate(5, 1, "checkpoint-5.replaced-ab")
    assert newest_first([copied, replaced, plain]) == [plain, copied, replaced]
    assert choose([copied, replaced, plain], 5) == [plain]


def test_of_two_checkpoints_of_one_step_the_newer_is_taken():
    assert choose([candidate(5, 1, "old"), candidate(5, 2, "new")], 5) == [candidate(5, 2, "new")]


candidates = st.lists(
    st.builds(candidate, st.integers(0, 5), st.integers(1, 5), st.none() | st.text(max_size=3)),
    max_size=6,
    unique_by=lambda one: one.path,
)


@given(candidates, st.randoms())
def test_the_order_of_the_catalog_does_not_matter(found, random):
    ordered = newest_first(found)
    assert newest_first(random.sample(found, len(found))) == ordered
    assert [one.sequence for one in ordered] == sorted((one.sequence for one in found), reverse=True)
