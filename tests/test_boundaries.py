"""The ends of steps and epochs, where several things are due at once or asked for: in which order they are done, that none is
lost, and that a resume from there has nothing to make up for."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from forgather_ckpt import catalog, requests
from forgather_ckpt.callbacks import JsonlLogger, TrainerCallback
from forgather_ckpt.demo.contents import contents
from forgather_ckpt.trainers import DDPTrainer, Trainer, TrainingArguments
from tests.ranks import run_ranks
from tests.runs import AskAt, Diary, Net, Noise, kept, logged, same_on_all, trainer_of

SHORT = Noise(16)
"""An epoch of 4 steps."""
EVALUATED = Noise(8, seed=1)


def train(run: Path, *callbacks: TrainerCallback, **given: Any) -> Trainer:
    options = {"dataset": SHORT, "save_steps": 1000, "logging_steps": 1000, "max_steps": 10} | given
    trainer = trainer_of(Trainer, run, callbacks=list(callbacks), **options)
    trainer.train()
    return trainer


class At(TrainerCallback):
    """Does something at an event of a step."""

    def __init__(self, event: str, step: int, act: Any) -> None:
        self.step, self.act = step, act
        setattr(self, event, self._act)

    def _act(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            self.act()


class Death(Exception):
    """Ends a life."""


def die() -> None:
    raise Death


def dies_at(step: int) -> Any:
    def hook(trainer: Trainer) -> None:
        if trainer.progress.step == step:
            raise Death

    return hook


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


# ---- what is asked for


@pytest.mark.parametrize("strategy", [{"eval_strategy": "epoch"}, {"eval_steps": 4}], ids=str)
def test_a_save_that_is_asked_for_in_an_evaluation_is_made(tmp_path, strategy):
    wish = AskAt({4: "should_save", 8: "should_save"}, event="on_evaluate")
    train(tmp_path, wish, eval_dataset=EVALUATED, **strategy)
    assert [step for step, _ in kept(tmp_path)] == [4, 8, 10]


def test_a_save_whose_time_comes_in_an_evaluation_is_made(tmp_path, monkeypatch):
    offset = [0.0]
    now = time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: now() + offset[0])

    def take_an_hour() -> None:
        offset[0] += 3600

    slow = [At("on_evaluate", step, take_an_hour) for step in (4, 8)]
    train(tmp_path, *slow, eval_dataset=EVALUATED, eval_strategy="epoch", save_seconds=3000.0)
    assert [step for step, _ in kept(tmp_path)] == [4, 8, 10]


@pytest.mark.parametrize(("event", "step", "saved"), [("on_evaluate", 4, 4), ("on_train_begin", 0, 1)])
def test_a_save_that_is_asked_for_from_outside_is_made_as_soon_as_it_can_be(tmp_path, event, step, saved):
    ask = At(event, step, lambda: requests.ask(tmp_path, "save"))
    train(tmp_path, ask, eval_dataset=EVALUATED, eval_strategy="epoch")
    assert [step for step, _ in kept(tmp_path)] == [saved, 10]


def test_what_is_asked_for_at_the_start_and_at_the_end_of_an_epoch_is_done(tmp_path):
    diary = Diary()
    wishes = [
        AskAt({0: "should_evaluate"}, event="on_train_begin"),
        AskAt({4: "should_log", 8: "should_evaluate"}, event="on_epoch_end"),
    ]
    train(tmp_path, *wishes, diary, eval_dataset=EVALUATED, eval_steps=1000)
    assert (diary.of("on_evaluate"), diary.of("on_log")) == ([0, 8], [4])


@pytest.mark.parametrize("event", ["on_step_end", "on_epoch_end", "on_evaluate"])
def test_after_a_signal_there_is_an_emergency_checkpoint_also_where_nothing_else_is_saved(tmp_path, event):
    trainer = trainer_of(
        Trainer,
        tmp_path,
        dataset=SHORT,
        eval_dataset=EVALUATED,
        eval_strategy="epoch",
        save_strategy="no",
        callbacks=[At(event, 4, terminate)],
    )
    assert trainer.train().exit_code == 128 + signal.SIGTERM
    assert kept(tmp_path) == [(4, "emergency")]


def test_a_save_that_is_asked_for_at_the_last_step_is_made_also_where_nothing_else_is_saved(tmp_path):
    train(tmp_path, AskAt({10: "should_save"}), save_strategy="no")
    assert [step for step, _ in kept(tmp_path)] == [10]


@pytest.mark.parametrize("event", ["on_step_end", "on_evaluate", "on_log"])
def test_an_epoch_may_be_ended_from_any_event_of_a_step(tmp_path, event):
    diary = Diary()
    wish = AskAt({4: "should_epoch_stop"}, event=event)
    settings = {"eval_dataset": EVALUATED, "eval_steps": 4, "save_strategy": "epoch", "logging_steps": 4}
    train(tmp_path, wish, diary, dataset=Noise(64), max_steps=22, **settings)
    assert diary.of("on_epoch_end") == [4, 20]
    assert diary.of("on_evaluate") == [4, 8, 12, 16, 20]
    assert kept(tmp_path) == [(4, "epoch"), (20, "epoch"), (22, "final")]


# ---- the ends of epochs


@pytest.mark.parametrize("end", [{"max_steps": 8}, {"max_steps": -1, "num_train_epochs": 2}], ids=str)
@pytest.mark.parametrize("num_samples", [16, 18])
def test_the_last_epoch_ends_as_the_others_do(tmp_path, end, num_samples):
    diary = Diary()
    each_epoch = {"eval_dataset": EVALUATED, "eval_strategy": "epoch", "save_strategy": "epoch"}
    train(tmp_path, diary, dataset=Noise(num_samples), **each_epoch, **end)
    assert (diary.of("on_evaluate"), diary.of("on_epoch_end")) == ([4, 8], [4, 8])
    assert kept(tmp_path) == [(4, "epoch"), (8, "epoch")]
    assert [one.manifest.epoch for one in catalog.scan(tmp_path).checkpoints] == [2, 1]


def test_the_checkpoint_of_an_epoch_is_one_whatever_else_asks_for_it(tmp_path):
    wishes = AskAt({8: "should_save"}), AskAt({12: "should_save"}, event="on_epoch_end")
    train(tmp_path, *wishes, save_strategy="epoch", save_total_limit=1, keep_epoch_checkpoints=True, max_steps=16)
    assert kept(tmp_path) == [(4, "epoch"), (8, "epoch"), (12, "epoch"), (16, "epoch")]


def test_to_be_kept_the_ends_of_epochs_are_saved_beside_the_steps(tmp_path):
    train(tmp_path, save_steps=3, save_total_limit=1, keep_epoch_checkpoints=True)
    assert kept(tmp_path) == [(4, "epoch"), (8, "epoch"), (10, "final")]
    train(tmp_path / "fewer", save_steps=3, save_total_limit=1, keep_epoch_checkpoints=1)
    assert kept(tmp_path / "fewer") == [(8, "epoch"), (10, "final")]


def test_at_the_end_of_an_epoch_it_is_told_and_judged_before_it_is_saved(tmp_path):
    diary = Diary()
    train(tmp_path, diary, eval_dataset=EVALUATED, eval_strategy="epoch", save_strategy="epoch", max_steps=4)
    assert [event for event, step in diary.entries if step == 4] == [
        *("on_step_end", "on_epoch_end", "on_evaluate", "on_save", "on_train_end")
    ]


@pytest.mark.parametrize(
    ("settings", "death"),
    [
        ({"max_steps": 10, "save_steps": 4}, 6),
        ({"max_steps": -1, "num_train_epochs": 3, "save_steps": 4}, 11),
        ({"max_steps": -1, "num_train_epochs": 3, "save_steps": 3}, 8),
    ],
    ids=str,
)
def test_an_epoch_that_was_ended_early_stays_ended_after_a_resume(tmp_path, settings, death):
    """Also at a step where a save is due, and with a schedule that counts the steps that are left."""

    def life(run: Path, *hooks: Any) -> tuple[list[float], int]:
        rates: list[float] = []

        def note(trainer: Trainer) -> None:
            rates.append(trainer.lr_scheduler.get_last_lr()[0])

        wish = AskAt({4: "should_epoch_stop"})
        trainer = trainer_of(Trainer, run, dataset=Noise(32), **settings, callbacks=[wish], on_step_end=[note, *hooks])
        trainer.train()
        return rates, trainer.total_steps

    expected, total_steps = life(tmp_path / "undisturbed")
    with pytest.raises(Death):
        life(tmp_path / "resumed", dies_at(death))
    found, found_steps = life(tmp_path / "resumed")
    assert (found, found_steps) == (expected[-len(found) :], total_steps)
    assert contents(newest(tmp_path / "resumed")) == contents(newest(tmp_path / "undisturbed"))


def newest(run: Path) -> Path:
    return catalog.scan(run).checkpoints[0].path


# ---- after a signal


@pytest.mark.parametrize(
    ("settings", "step"),
    [
        ({"eval_steps": 3}, 6),
        ({"eval_strategy": "epoch"}, 4),
        ({"eval_steps": 5}, 10),
        ({"eval_strategy": "no", "eval_on_save": True, "save_steps": 3}, 6),
        ({"eval_strategy": "no", "eval_on_save": True, "save_strategy": "epoch"}, 8),
    ],
    ids=str,
)
def test_an_evaluation_that_a_signal_kept_from_its_step_is_made_by_the_resume(tmp_path, settings, step):
    def life(run: Path, *callbacks: TrainerCallback) -> Any:
        diary = Diary()
        logger = JsonlLogger(run / "metrics.jsonl")
        train(run, diary, logger, *callbacks, eval_dataset=EVALUATED, logging_steps=2, **settings)
        return diary.metrics

    expected = life(tmp_path / "undisturbed")
    before = life(tmp_path / "stopped", At("on_step_end", step, terminate))
    after = life(tmp_path / "stopped")
    assert step in [at for at, _ in after]
    assert before + after == expected
    if step < 10:  # else there is nothing to save any more
        assert contents(newest(tmp_path / "stopped")) == contents(newest(tmp_path / "undisturbed"))
    assert evaluations(tmp_path / "stopped") == evaluations(tmp_path / "undisturbed")


def evaluations(run: Path) -> list[dict[str, Any]]:
    return [line for line in logged(run / "metrics.jsonl") if "eval_loss" in line]


def test_an_evaluation_is_made_once_where_a_resume_on_more_ranks_leaves_no_step_of_the_epoch(tmp_path):
    settings: dict[str, Any] = {"eval_dataset": EVALUATED, "eval_steps": 2, "eval_on_save": True, "save_steps": 4}

    def case(rank: int, world_size: int) -> Any:
        diary = Diary()
        trainer_of(DDPTrainer, tmp_path, dataset=Noise(20), callbacks=[diary], max_steps=7, **settings).train()
        return diary.of("on_epoch_end"), diary.of("on_evaluate")

    train(tmp_path, dataset=Noise(20), max_steps=4, **settings)
    assert same_on_all(run_ranks(2, case)) == ([4, 6], [6, 7])


def test_an_evaluation_that_was_made_is_not_made_again_by_a_resume(tmp_path):
    diary = Diary()
    settings = {"eval_dataset": EVALUATED, "eval_strategy": "epoch", "save_strategy": "epoch"}
    train(tmp_path, **settings, max_steps=4)
    train(tmp_path, diary, **settings, max_steps=8)
    assert diary.of("on_evaluate") == [8]


# ---- gradients


def test_gradients_of_parameters_that_the_optimizer_has_not_do_not_pile_up(tmp_path):
    """They count when gradients are clipped, and a resume would begin without them."""

    def life(run: Path, *hooks: Any) -> None:
        torch.manual_seed(0)
        model = Net()
        head = model.get_submodule("layers.3")
        assert isinstance(head, nn.Linear)
        args = TrainingArguments(
            run, max_steps=8, save_steps=4, per_device_train_batch_size=4, resume_from_checkpoint="auto"
        )
        optimizer = torch.optim.AdamW(head.parameters(), lr=0.1)
        Trainer(model, args, Noise(), optimizer=optimizer, on_step_end=hooks).train()

    life(tmp_path / "undisturbed")
    with pytest.raises(Death):
        life(tmp_path / "resumed", dies_at(6))
    life(tmp_path / "resumed")
    assert contents(newest(tmp_path / "resumed")) == contents(newest(tmp_path / "undisturbed"))
