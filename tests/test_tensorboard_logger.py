"""TensorBoard: what its own reader finds, after a resume too."""

from __future__ import annotations

import logging
import math
from pathlib import Path

import pytest
import torch

from forgather_ckpt.callbacks import TensorBoardLogger
from tests.training_events import Events

pytest.importorskip("tensorboard", reason="tensorboard, an extra, is not installed")


def scalars(directory: Path) -> dict[str, list[tuple[int, float]]]:
    """Tag -> step and value, as TensorBoard shows them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(directory), size_guidance={"scalars": 0})
    found.Reload()
    return {tag: [(one.step, one.value) for one in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def train(run: Path, to_step: int, *, step: int = 0, loss: float = 3.0) -> Events:
    events = Events([TensorBoardLogger()], run, step=step)
    while events.state.global_step < to_step:
        events.step(loss=loss)
        events.log(loss=loss)
        if events.state.global_step % 4 == 0:
            events.evaluate(eval_loss=loss + 1)
            events.save(0.5)
    return events


def test_logs_evaluations_and_the_cost_of_checkpoints_are_scalars(tmp_path: Path) -> None:
    events = Events([TensorBoardLogger()], tmp_path)
    events.step()
    events.log(loss=3.25, grad_norm=torch.tensor(1.5), learning_rate=0, note="no number", nothing=None)
    events.evaluate(eval_loss=3.5, perplexity=math.inf)
    events.save(2.5)
    events.end()
    assert scalars(tmp_path / "tensorboard") == {
        "train/loss": [(1, 3.25)],
        "train/grad_norm": [(1, 1.5)],
        "train/learning_rate": [(1, 0.0)],
        "eval/loss": [(1, 3.5)],
        "eval/perplexity": [(1, math.inf)],
        "ckpt/save_seconds": [(1, 2.5)],
    }


@pytest.mark.parametrize("died_at", [8, 10, 11])
def test_a_resumed_run_has_one_value_a_step(tmp_path: Path, died_at: int) -> None:
    train(tmp_path, died_at, loss=9.0).tell("on_train_end", error=RuntimeError("killed"))
    train(tmp_path, 16, step=8).end()
    found = scalars(tmp_path / "tensorboard")
    assert found["train/loss"] == [(step, 9.0 if step <= 8 else 3.0) for step in range(1, 17)]
    assert found["eval/loss"] == [(4, 10.0), (8, 10.0), (12, 4.0), (16, 4.0)]
    assert [step for step, _ in found["ckpt/save_seconds"]] == [4, 8, 12, 16]


def test_a_fresh_start_shows_nothing_of_the_run_before(tmp_path: Path) -> None:
    train(tmp_path, 16, loss=9.0).end()
    train(tmp_path, 4).end()
    assert scalars(tmp_path / "tensorboard")["train/loss"] == [(step, 3.0) for step in range(1, 5)]


def test_what_was_logged_is_there_after_each_checkpoint(tmp_path: Path) -> None:
    events = train(tmp_path, 4)
    assert [step for step, _ in scalars(tmp_path / "tensorboard")["train/loss"]] == [1, 2, 3, 4]
    events.end()


def test_only_the_first_rank_writes(tmp_path: Path) -> None:
    events = Events([TensorBoardLogger()], tmp_path, rank=1)
    events.log(loss=3.0)
    events.evaluate(eval_loss=3.0)
    events.save()
    events.end()
    assert list(tmp_path.iterdir()) == []


def test_a_directory_of_ones_own_is_taken(tmp_path: Path) -> None:
    events = Events([TensorBoardLogger(tmp_path / "a" / "b")], tmp_path)
    events.log(loss=3.0)
    events.end()
    assert scalars(tmp_path / "a" / "b")["train/loss"] == [(0, 3.0)]


def test_a_directory_that_cannot_be_made_is_told_once_and_harms_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "tensorboard").write_text("a file")
    with caplog.at_level(logging.WARNING):
        train(tmp_path, 8).end()
    [record] = caplog.records
    assert "nothing more is written for TensorBoard, and training goes on: " in record.getMessage()
