"""What is done behind the saves of a run, without the run."""

import errno
import logging
from pathlib import Path

import pytest

from forgather_ckpt import catalog, pruning, space
from forgather_ckpt.housekeeping import Housekeeping
from forgather_ckpt.policies import Latest
from tests.test_space import save


def keep_house(run: Path, monkeypatch: pytest.MonkeyPatch, *, keep: int, free_saves: float) -> list[int]:
    """Save five times, with room for so many more after each; the steps after which it was said that these will not fit."""
    told_at = []
    housekeeping = Housekeeping(run, Latest(keep), grace_seconds=30.0)
    monkeypatch.setattr(housekeeping._deleter, "delete", pruning.delete_trash)  # not in the background
    for step in range(1, 6):
        path = save(run, step, size=100_000)
        [size] = {space._size(one) for one in catalog.scan(run).checkpoints if one.path == path}
        monkeypatch.setattr(space, "_free", lambda _, room=int(free_saves * size): room)
        monkeypatch.setattr(housekeeping, "_warn_once", lambda about, _, step=step: told_at.append(step))
        housekeeping.after_save(path, step=step, seconds=1.0, elapsed_seconds=float(step), note=None)
    housekeeping.close()
    return told_at


@pytest.mark.parametrize(
    ("keep", "free_saves", "told_at"),
    [
        (5, 2.1, []),
        (5, 1.5, [1, 2, 3, 4, 5]),
        (2, 1.5, [1, 2]),  # from the third on, each save removes one before the next
        (2, 0.5, [1, 2, 3, 4, 5]),
    ],
)
def test_a_word_before_the_disk_is_full_reckons_with_what_retention_removes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep: int, free_saves: float, told_at: list[int]
) -> None:
    assert keep_house(tmp_path, monkeypatch, keep=keep, free_saves=free_saves) == told_at


def test_what_fails_is_told_and_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object, **__: object) -> pruning.Pruned:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(pruning, "prune", fail)
    with caplog.at_level(logging.INFO, "forgather_ckpt"):
        housekeeping = Housekeeping(tmp_path, Latest(1), grace_seconds=30.0)
        path = save(tmp_path, 1)
        housekeeping.after_save(path, step=1, seconds=1.0, elapsed_seconds=1.0, note=None)
        housekeeping.close()
    assert caplog.messages == [
        f"saved {path}",
        "after the save of checkpoint-1: OSError: [Errno 5] Input/output error",
    ]
