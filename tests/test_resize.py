"""The table of changes: what one layout saved, another loads bit by bit, and goes on with the next sample.

On up to eight real processes. Sums in another order give other bits, so training goes on to other weights; what was
loaded is exact.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from forgather_ckpt import CheckpointCoordinator
from tests.layouts import Layout, Net, order_of_reading, saved_and_read
from tests.test_cli import Fgckpt, fgckpt
from tests.test_resume import digests

__all__ = ["fgckpt"]

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]


def ddp(dp: int) -> Layout:
    return Layout("ddp", {"dp": dp})


def fsdp(shard: int) -> Layout:
    return Layout("fsdp", {"shard": shard})


def hsdp(copies: int, shard: int) -> Layout:
    return Layout("fsdp", {"copies": copies, "shard": shard})


def pipeline(stages: int, schedule: str = "1f1b") -> Layout:
    return Layout("pipeline", {"pp": stages}, {"schedule": schedule})


def hybrid(**axes: int) -> Layout:
    return Layout("hybrid", axes)


ONE = Layout("one")

CHANGES = [
    (ddp(2), ddp(4)),
    (ddp(4), ddp(1)),
    (ddp(3), ONE),
    (ONE, ddp(2)),
    (pipeline(4), pipeline(2)),
    (pipeline(2), pipeline(1)),
    (pipeline(4), ONE),
    (pipeline(2, "gpipe"), pipeline(2, "interleaved_1f1b")),
    (pipeline(2, "zbv"), pipeline(4, "gpipe")),
    (fsdp(4), fsdp(2)),
    (fsdp(2), fsdp(8)),
    (fsdp(4), fsdp(3)),
    (fsdp(4), ddp(2)),
    (ddp(2), fsdp(4)),
    (fsdp(4), ONE),
    (ONE, fsdp(2)),
    (hybrid(dp=1, tp=2), hybrid(dp=1, tp=4)),
    (hybrid(dp=1, tp=4), hybrid(dp=2, tp=2)),
    (hybrid(dp=2, tp=2), hybrid(dp=1, tp=4)),
    (ddp(2), hybrid(dp=1, tp=2)),
    (hybrid(dp=2, pp=2), hybrid(dp=2, tp=2)),
    (hybrid(dp=2, pp=2), hybrid(dp=4, pp=1)),
    (hybrid(dp=4, pp=1), hybrid(dp=1, pp=2)),
    (hybrid(dp=2, pp=2, tp=2), fsdp(4)),
    (hsdp(2, 2), fsdp(4)),
    (fsdp(4), hsdp(2, 2)),
    (hsdp(2, 4), hsdp(4, 2)),
]


@pytest.mark.parametrize(("before", "after"), CHANGES, ids=str)
def test_another_layout_loads_the_same_bits_and_goes_on_with_the_next_sample(
    before: Layout, after: Layout, tmp_path: Path
):
    saved, first = saved_and_read(before, tmp_path, 1)
    loaded, nothing = saved_and_read(after, tmp_path, 1)  # has no step to do
    assert nothing == []
    assert loaded.keys() == saved.keys()
    assert digests(loaded) == digests(saved)
    trained, more = saved_and_read(after, tmp_path, 2)
    assert digests(trained) != digests(loaded)
    assert more
    assert first + more == order_of_reading(len(first + more))


def pass_on(layout: Layout, source: Path, target: Path) -> None:
    """What `layout` saves of what it has loaded, without a step in between."""

    def case() -> None:
        trainer = layout.trainer(Net(), target)
        with CheckpointCoordinator(trainer, source, timeout_seconds=30) as coordinator:
            coordinator.load_checkpoint()
        with CheckpointCoordinator(trainer, target, timeout_seconds=30) as coordinator:
            coordinator.save_checkpoint(1)

    layout.run(case)


CHAIN = [ddp(2), pipeline(2), fsdp(4), hybrid(dp=2, tp=2), hsdp(2, 2), ONE]


def test_what_trainers_hand_on_to_each_other_stays_equal_by_logical_digests(fgckpt: Fgckpt, tmp_path: Path):
    saved_and_read(CHAIN[0], tmp_path / "0", 1)
    for number, layout in enumerate(CHAIN[1:], start=1):
        pass_on(layout, tmp_path / f"{number - 1}", tmp_path / f"{number}")
    options = ("-c", "model", "-c", "optimizer", "-c", "scheduler")
    for number in range(1, len(CHAIN)):
        result = fgckpt("diff", f"{tmp_path / '0'}@1", f"{tmp_path / str(number)}@1", "--logical", *options)
        assert result.code == 0, (str(CHAIN[number]), result.out, result.err)
        assert "not known" not in result.out
    whole = fgckpt("diff", f"{tmp_path / '0'}@1", f"{tmp_path / '5'}@1", *options)
    assert whole.code == 0, "of whole tensors, the indexes tell it"
    cut = fgckpt("diff", f"{tmp_path / '0'}@1", f"{tmp_path / '2'}@1", *options)
    assert cut.code == 2, "of cut ones on a CPU, only reading does"
    assert "add --logical" in cut.err
