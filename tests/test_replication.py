"""The verdict on copies that must be equal."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forgather_ckpt.replication import Verdict, describe, vote


@pytest.mark.parametrize(
    "case",
    [
        ("a", (0,)),
        ("aaaa", (0, 1, 2, 3)),
        ("aaba", (0, 1, 3), (2,)),
        ("baaa", (1, 2, 3), (0,)),
        ("ab", (0,), (1,)),
        ("ba", (0,), (1,)),
        ("abba", (0, 3), (1, 2)),
        ("abcd", (0,), (1,), (2,), (3,)),
        ("abbcc", (1, 2), (0,), (3, 4)),
        ("cabcab", (0, 3), (1, 4), (2, 5)),
    ],
)
def test_the_majority_is_the_reference_and_in_a_tie_the_lowest_rank(case):
    digests, *classes = case
    verdict = vote({rank: letter.encode() for rank, letter in enumerate(digests)})
    assert verdict == Verdict(tuple(classes))
    assert verdict.majority == classes[0]
    assert verdict.minority == tuple(sorted(set(range(len(digests))) - set(classes[0])))
    assert verdict.is_equal == (len(classes) == 1)


def test_ranks_are_those_of_the_job_not_positions():
    assert vote({7: b"a", 3: b"b", 5: b"a"}) == Verdict(((5, 7), (3,)))


@given(st.dictionaries(st.integers(0, 20), st.sampled_from([b"a", b"b", b"c"]), min_size=1), st.randoms())
def test_the_verdict_is_the_same_in_any_order_and_names_every_rank_once(digests, random):
    verdict = vote(digests)
    assert vote(dict(random.sample(list(digests.items()), len(digests)))) == verdict
    assert sorted(rank for ranks in verdict.classes for rank in ranks) == sorted(digests)
    assert sorted(verdict.majority + verdict.minority) == sorted(digests)
    assert all(len({digests[rank] for rank in ranks}) == 1 for ranks in verdict.classes)
    reference = digests[verdict.majority[0]]
    assert all(digests[rank] == reference for rank in verdict.majority)
    assert all(digests[rank] != reference for rank in verdict.minority)
    assert all(list(digests.values()).count(digests[rank]) <= len(verdict.majority) for rank in verdict.minority)


@pytest.mark.parametrize(
    ("ranks", "shown"),
    [
        ((), ""),
        ((3,), "3"),
        ((0, 1), "0-1"),
        ((0, 1, 2, 3, 7), "0-3, 7"),
        ((0, 2, 4), "0, 2, 4"),
        ((5, 6, 9, 10), "5-6, 9-10"),
    ],
)
def test_ranks_are_shown_in_runs(ranks, shown):
    assert describe(ranks) == shown
