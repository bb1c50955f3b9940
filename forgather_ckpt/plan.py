"""Who writes which bytes: pure, deterministic, the same on every rank, without communication.

Every rank derives its own part from what was agreed (the items and their holders). A test joins the parts of
all ranks and proves that every byte has exactly one writer.
"""

import heapq
import itertools
from collections.abc import Sequence
from typing import NamedTuple

from forgather_ckpt.hashtree import BLOCK_BYTES
from forgather_ckpt.topology import Ranks

MIN_PIECE_BYTES = 16 << 20
"""No tensor is split into smaller pieces: many small requests would cost more than they balance."""
IMBALANCE = 1.25
"""Whole tensors are dealt as long as the largest share is at most this much above the mean."""


class Extent(NamedTuple):
    """The bytes of one tensor that lie with each of its holders, in C order."""

    name: str
    num_bytes: int


class Piece(NamedTuple):
    """The bytes `start` to `stop` of the extent called `name`: what one rank writes."""

    name: str
    start: int
    stop: int


def deal(extents: Sequence[Extent], writers: Ranks) -> dict[int, list[Piece]]:
    """Deal `extents`, which every one of `writers` holds, out over them so that each writes about the same.

    The result does not depend on the order of `extents`. Whole tensors go first, the largest first, each to the
    least loaded rank; only where that leaves somebody with more than 25 % above the mean are large ones split, at
    block boundaries, so that block digests of a tensor are those of its pieces.
    """
    if len(writers) == 1:
        return {writers[0]: [Piece(name, 0, size) for name, size in sorted(extents)]}
    whole = [Piece(name, 0, size) for name, size in extents]
    shares = _deal_pieces(whole, writers)
    mean = sum(size for _, size in extents) / len(writers)
    if max(_load(share) for share in shares.values()) > IMBALANCE * mean:
        pieces = [part for piece in whole for part in _cut(piece, mean)]
        if len(pieces) > len(whole):
            shares = _deal_pieces(pieces, writers)
    return {rank: _merge(sorted(share)) for rank, share in shares.items()}


def _deal_pieces(pieces: Sequence[Piece], writers: Ranks) -> dict[int, list[Piece]]:
    shares: dict[int, list[Piece]] = {rank: [] for rank in writers}
    loads = [(0, rank) for rank in sorted(writers)]
    for piece in sorted(pieces, key=lambda piece: (piece.start - piece.stop, piece)):
        load, rank = loads[0]
        shares[rank].append(piece)
        heapq.heapreplace(loads, (load + piece.stop - piece.start, rank))
    return shares


def _merge(pieces: Sequence[Piece]) -> list[Piece]:
    """Join neighbouring pieces of one tensor that fell to the same rank."""
    merged: list[Piece] = []
    for piece in pieces:
        if merged and merged[-1].name == piece.name and merged[-1].stop == piece.start:
            merged[-1] = merged[-1]._replace(stop=piece.stop)
        else:
            merged.append(piece)
    return merged


def _load(share: Sequence[Piece]) -> int:
    return sum(piece.stop - piece.start for piece in share)


def _cut(piece: Piece, mean: float) -> list[Piece]:
    """Split a whole tensor into pieces of an eighth of the mean share, but at least `MIN_PIECE_BYTES`."""
    piece_blocks = -(-max(MIN_PIECE_BYTES, int(mean / 8)) // BLOCK_BYTES)
    full_blocks = piece.stop // BLOCK_BYTES  # a shorter last block goes with the last piece
    num_pieces = full_blocks // piece_blocks
    if num_pieces < 2:
        return [piece]
    cuts = [full_blocks * number // num_pieces * BLOCK_BYTES for number in range(num_pieces)] + [piece.stop]
    return [Piece(piece.name, start, stop) for start, stop in itertools.pairwise(cuts)]
