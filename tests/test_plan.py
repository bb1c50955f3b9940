"""Who writes which bytes: every byte has one writer, shares are even, and every rank comes to the same answer."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forgather_ckpt import plan
from forgather_ckpt.hashtree import BLOCK_BYTES
from forgather_ckpt.plan import MIN_PIECE_BYTES, Extent, Piece, deal

MIB = 1 << 20

sizes = (
    st.integers(0, 100) | st.integers(0, 64 * MIB) | st.integers(16 * MIB, 4096 * MIB) | st.sampled_from([0, 16 * MIB])
)
extents = st.lists(sizes, max_size=30).map(
    lambda sizes: [Extent(f"layers.{number}.weight", size) for number, size in enumerate(sizes)]
)
writers = st.sets(st.integers(0, 40), min_size=1, max_size=16).map(lambda ranks: tuple(sorted(ranks)))


def loads(shares: dict[int, list[Piece]]) -> dict[int, int]:
    return {rank: sum(piece.stop - piece.start for piece in share) for rank, share in shares.items()}


@given(extents, writers)
def test_every_byte_has_exactly_one_writer(extents, writers):
    shares = deal(extents, writers)
    assert set(shares) == set(writers)
    pieces: dict[str, list[Piece]] = {extent.name: [] for extent in extents}
    for share in shares.values():
        for piece in share:
            pieces[piece.name].append(piece)
    for extent in extents:
        position = 0
        for piece in sorted(pieces[extent.name], key=lambda piece: piece.stop):
            assert piece.start == position
            position = piece.stop
        assert position == extent.num_bytes
        assert pieces[extent.name], "an empty tensor has a writer too"


@given(extents, writers, st.randoms())
def test_the_order_of_the_input_does_not_matter(extents, writers, random):
    shares = deal(extents, writers)
    assert deal(random.sample(extents, len(extents)), tuple(random.sample(writers, len(writers)))) == shares


@given(extents, writers)
def test_shares_are_even_or_nothing_is_left_to_split(extents, writers):
    shares = deal(extents, writers)
    mean = sum(extent.num_bytes for extent in extents) / len(writers)
    largest = max(loads(shares).values())
    if len(writers) > 1 and largest > plan.IMBALANCE * mean:
        whole = [piece for share in shares.values() for piece in share if piece.start == 0]
        sizes = {extent.name: extent.num_bytes for extent in extents}
        assert all(piece.stop < 2 * MIN_PIECE_BYTES + BLOCK_BYTES for piece in whole if piece.stop == sizes[piece.name])
        # the rank with most of it got its last piece as the least loaded one, and no piece can be cut any more
        assert largest <= mean + max(2 * MIN_PIECE_BYTES + BLOCK_BYTES, mean / 4)


@given(extents, writers)
def test_pieces_are_large_and_start_at_blocks(extents, writers):
    sizes = {extent.name: extent.num_bytes for extent in extents}
    for share in deal(extents, writers).values():
        assert share == sorted(share)
        for piece in share:
            is_whole = piece.stop - piece.start == sizes[piece.name]
            assert is_whole or piece.stop - piece.start >= MIN_PIECE_BYTES
            assert piece.start % BLOCK_BYTES == 0
            assert piece.stop % BLOCK_BYTES == 0 or piece.stop == sizes[piece.name]
        assert not any(
            one.name == other.name and one.stop == other.start for one, other in itertools.pairwise(share)
        ), "neighbours on one rank are one piece"


@given(st.lists(st.integers(0, 15 * MIB), min_size=32, max_size=60), st.integers(2, 4))
def test_tensors_that_deal_out_evenly_stay_whole(sizes, num_writers):
    extents = [Extent(str(number), size) for number, size in enumerate(sizes)]
    for share in deal(extents, tuple(range(num_writers))).values():
        assert all(piece.start == 0 and piece.stop == sizes[int(piece.name)] for piece in share)


@pytest.mark.parametrize(
    ("extents", "writers", "expected"),
    [
        ([], (0, 1), {0: [], 1: []}),
        ([("a", 5)], (3,), {3: [("a", 0, 5)]}),
        ([("b", 2), ("a", 1)], (0,), {0: [("a", 0, 1), ("b", 0, 2)]}),
        ([("a", 4), ("b", 3), ("c", 2)], (0, 1), {0: [("a", 0, 4)], 1: [("b", 0, 3), ("c", 0, 2)]}),
        ([("a", 31 * MIB)], (0, 1), {0: [("a", 0, 31 * MIB)], 1: []}),
        ([("a", 32 * MIB)], (0, 1), {0: [("a", 0, 16 * MIB)], 1: [("a", 16 * MIB, 32 * MIB)]}),
        (
            [("a", 33 * MIB + 7)],
            (0, 1),
            {0: [("a", 16 * MIB, 33 * MIB + 7)], 1: [("a", 0, 16 * MIB)]},
        ),
        (
            [("a", 64 * MIB)],
            (2, 5, 7),
            {2: [("a", 0, 16 * MIB), ("a", 48 * MIB, 64 * MIB)], 5: [("a", 16 * MIB, 32 * MIB)], 7: [("a", 32 * MIB, 48 * MIB)]},
        ),
        ([("a", 0), ("b", 0)], (0, 1), {0: [("a", 0, 0), ("b", 0, 0)], 1: []}),
    ],
)  # fmt: skip
def test_shares(extents, writers, expected):
    assert deal([Extent(*extent) for extent in extents], writers) == expected


def test_the_plan_does_not_depend_on_the_hash_seed():
    code = (
        "from forgather_ckpt.plan import Extent, deal\n"
        "extents = {Extent(f'layers.{i}', (i % 7) << 23) for i in range(60)}\n"
        "print(deal(list(extents), (0, 1, 2, 3, 4)))"
    )
    shown = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(plan.__file__).parents[1])},
            check=True,
            capture_output=True,
        ).stdout
        for seed in ("0", "1", "2")
    }
    assert len(shown) == 1
