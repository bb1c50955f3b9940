"""Which pieces are read together, and whether they make up whole items."""

from typing import Any, NamedTuple

import pytest

from forgather_ckpt import hashtree, pieces
from forgather_ckpt.hashtree import BLOCK_BYTES
from forgather_ckpt.index import TensorRow


class Stored(NamedTuple):
    row: TensorRow


def test_no_request_is_larger_than_a_block() -> None:
    offset, stored = 4096, []
    for size in (0, 100, BLOCK_BYTES - 100, 1, 3 * BLOCK_BYTES + 5, 10, BLOCK_BYTES, 0):
        blocks = (b"",) * hashtree.num_blocks(size)
        stored.append(Stored(TensorRow("w", 1, "uint8", (size,), "f", offset, b"", blocks=blocks)))
        offset += size
    requests = list(pieces.requests(stored))
    assert all(request[-1].stop - request[0].start <= BLOCK_BYTES for request in requests)
    assert sum(block.stop - block.start for request in requests for block in request) == offset - 4096


def row(*, box: Any = None, range: Any = None, shape: tuple[int, ...] = (4, 6)) -> TensorRow:
    return TensorRow("w", 1, "int16", shape, "f", 0, b"", box=box, range=range)


@pytest.mark.parametrize(
    ("rows", "is_whole"),
    [
        ([row()], True),
        ([row(), row()], False),
        ([row(range=(10, 24)), row(range=(0, 10))], True),
        ([row(range=(0, 10)), row(range=(9, 24))], False),
        ([row(range=(0, 10)), row(range=(10, 23))], False),
        ([row(box=((0, 4), (0, 3))), row(box=((0, 4), (3, 6)))], True),
        ([row(box=((0, 4), (0, 3))), row(box=((0, 4), (3, 6)), range=(0, 12))], True),
        ([row(box=((0, 4), (0, 3))), row(box=((0, 4), (3, 6)), range=(0, 11))], False),
        ([row(box=((0, 4), (0, 3)))], False),
        ([row(range=(0, 12)), row(shape=(24,), range=(12, 24))], False),
        ([row(shape=(0, 6))], True),
        ([row(shape=())], True),
    ],
)
def test_pieces_make_up_a_whole_or_do_not(rows: list[TensorRow], is_whole: bool) -> None:
    assert pieces._make_up_whole(rows) is is_whole
