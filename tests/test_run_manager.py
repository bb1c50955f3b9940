"""When a run saves, what it keeps, and when it ends: with real trainers, on one and two processes."""

import errno
import logging
import os
import re
import signal
import threading
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy
import pytest
import torch

from forgather_ckpt import (
    CheckpointManager,
    CheckpointNotFound,
    SharingPattern,
    StateComponent,
    annotations,
    catalog,
    files,
    load_component,
    pruning,
    requests,
    retention,
    run_clock,
    space,
)
from forgather_ckpt.callbacks import TrainerCallback
from forgather_ckpt.errors import DeclarationError, NoSpace, RankFailed
from forgather_ckpt.manifest import CheckpointManifest
from forgather_ckpt.policies import Best, Latest
from forgather_ckpt.trainers import DDPTrainer, Trainer
from forgather_ckpt.trainers.run import Run
from forgather_ckpt.triggers import SaveSchedule
from tests.components import Box
from tests.ranks import errors, run_ranks, values
from tests.runs import AskAt, Diary, Lines, Noise, kept, same_on_all, trainer_of

pytestmark = pytest.mark.multiprocess

NUM_RANKS = 2


def train(run: Path, **given: Any) -> Any:
    """Train on two ranks; what each rank's training came to: (steps, reason, exit code)."""

    def case(rank: int, world_size: int) -> Any:
        made = {name: value(rank) if callable(value) else value for name, value in given.items()}
        result = trainer_of(DDPTrainer, run, **made).train()
        return result.steps, result.stop_reason, result.exit_code

    return same_on_all(run_ranks(NUM_RANKS, case, timeout=90))


# ---- flags


@pytest.mark.parametrize("event", ["on_step_end", "on_log", "on_evaluate"])
@pytest.mark.parametrize("rank", [0, 1])
def test_b59_a_stop_on_one_rank_stops_all_at_that_step_with_a_checkpoint(tmp_path, rank, event):
    steps = train(
        tmp_path,
        eval_dataset=lambda _: Noise(10, seed=1),
        eval_steps=2,
        logging_steps=2,
        callbacks=lambda _: [AskAt({6: "should_training_stop"}, rank, event)],
    )
    assert steps == (6, f"asked at 6 (rank {rank})", 0)
    assert kept(tmp_path) == [(4, "periodic"), (6, "final")]


@pytest.mark.parametrize("rank", [0, 1])
def test_an_abort_on_one_rank_ends_all_without_a_checkpoint(tmp_path, rank):
    result = train(tmp_path, callbacks=lambda _: [AskAt({8: "should_abort_without_save"}, rank)])
    assert result == (8, f"asked at 8 (rank {rank})", 0)
    assert kept(tmp_path) == [(4, "periodic")], "the save that was due at step 8 was given up"


@pytest.mark.parametrize("rank", [0, 1])
def test_an_abort_at_the_last_step_gives_the_last_checkpoint_up_also_where_nobody_looks_at_that_step(tmp_path, rank):
    settings = {"save_steps": 5, "logging_steps": 100, "control_steps": 100}
    result = train(tmp_path, callbacks=lambda _: [AskAt({12: "should_abort_without_save"}, rank)], **settings)
    assert result == (12, f"asked at 12 (rank {rank})", 0)
    assert kept(tmp_path) == [(5, "periodic"), (10, "periodic")]


def test_an_evaluation_asked_for_at_the_last_step_is_made(tmp_path):
    diary = Diary()
    settings = {"eval_steps": 100, "logging_steps": 100, "control_steps": 100, "max_steps": 6}
    asks = AskAt({6: "should_evaluate"})
    trainer_of(Trainer, tmp_path, eval_dataset=Noise(8), callbacks=[diary, asks], **settings).train()
    assert diary.of("on_evaluate") == [6]


def test_b58_an_abort_in_the_evaluation_before_a_save_cancels_that_save(tmp_path):
    result = train(
        tmp_path,
        eval_dataset=lambda _: Noise(10, seed=1),
        eval_strategy="no",
        eval_on_save=True,
        save_total_limit=1,
        callbacks=lambda _: [AskAt({8: "should_abort_without_save"}, 1, "on_evaluate")],
    )
    assert result == (8, "asked at 8 (rank 1)", 0)
    assert kept(tmp_path) == [(4, "periodic")], "nor has it pushed the good one out"


def test_a_save_that_one_rank_asks_for_is_made_by_all(tmp_path):
    train(tmp_path, callbacks=lambda _: [AskAt({5: "should_save", 7: "should_save"}, 1)])
    assert [step for step, _ in kept(tmp_path)] == [4, 5, 7, 8, 12]


def test_an_evaluation_and_a_log_that_one_rank_asks_for_are_made_by_all(tmp_path):
    def case(rank: int, world_size: int) -> Any:
        diary = Diary()
        wishes = AskAt({3: "should_evaluate", 5: "should_log"}, rank=1)
        trainer_of(
            DDPTrainer, tmp_path, max_steps=6, eval_steps=6, eval_dataset=Noise(10), callbacks=[diary, wishes]
        ).train()
        return diary.of("on_evaluate"), diary.of("on_log")

    assert same_on_all(run_ranks(NUM_RANKS, case)) == ([3, 6], [4, 5])


def test_b59_an_epoch_that_one_rank_ends_is_left_by_all_and_the_next_one_is_trained(tmp_path):
    def case(rank: int, world_size: int) -> Any:
        diary = Diary()
        trainer = trainer_of(
            DDPTrainer,
            tmp_path,
            max_steps=-1,
            num_train_epochs=2,
            callbacks=[diary, AskAt({3: "should_epoch_stop"}, rank=1)],
        )
        result = trainer.train()
        return result.steps, trainer.progress.epoch, diary.of("on_epoch_begin"), diary.of("on_epoch_end")

    # 64 samples make 8 steps of an epoch on two ranks
    assert same_on_all(run_ranks(NUM_RANKS, case)) == (11, 2, [0, 3], [3, 11])


@pytest.mark.parametrize(
    ("event", "step", "expected"),
    [("on_train_begin", 0, (0, [])), ("on_epoch_end", 8, (8, [8]))],
)
def test_a_stop_at_the_start_or_at_the_end_of_an_epoch_is_followed_there(tmp_path, event, step, expected):
    steps, *_ = train(
        tmp_path,
        control_steps=100,
        save_steps=100,
        logging_steps=100,
        max_steps=50,
        callbacks=lambda _: [AskAt({step: "should_training_stop"}, 1, event)],
    )
    assert (steps, [saved for saved, _ in kept(tmp_path)]) == expected


def test_flags_are_followed_within_the_steps_between_two_looks(tmp_path):
    steps, *_ = train(
        tmp_path,
        control_steps=5,
        save_steps=100,
        logging_steps=100,
        max_steps=30,
        per_device_train_batch_size=2,  # an epoch, at whose end they look too, has 16 steps
        callbacks=lambda _: [AskAt({6: "should_training_stop"}, 1)],
    )
    assert steps == 10


def test_without_a_number_of_steps_the_ranks_look_about_once_a_second(tmp_path):
    steps, *_ = train(
        tmp_path,
        control_steps=None,
        save_steps=1000,
        logging_steps=1000,
        max_steps=1000,
        callbacks=lambda _: [AskAt({3: "should_training_stop"}, 1)],
    )
    assert 3 <= steps <= 3 + 2 * 50


# ---- callbacks


class Broken(TrainerCallback):
    def on_step_end(self, *_: Any, **__: Any) -> None:
        raise ValueError("broken on purpose")

    def on_log(self, *_: Any, **__: Any) -> None:
        raise RuntimeError("and again")


@pytest.mark.parametrize("kind", [Trainer, DDPTrainer])
def test_b47_a_broken_callback_harms_neither_the_training_nor_the_others(tmp_path, kind):
    def case(rank: int, world_size: int) -> Any:
        diary = Diary()
        with Lines() as told:
            result = trainer_of(kind, tmp_path, max_steps=4, callbacks=[Broken(), diary]).train()
        return result.steps, diary.of("on_step_end"), [line for line in told.lines if "Broken" in line]

    steps, told, lines = run_ranks(1, case)[0].value
    assert (steps, told) == (4, [1, 2, 3, 4])
    assert lines == [
        "callback Broken.on_step_end failed at step 1; it will be called again",
        "callback Broken.on_log failed at step 4; it will be called again",
        "callback Broken.on_step_end failed 4 times; the first one is in the log above",
        "callback Broken.on_log failed 1 times; the first one is in the log above",
    ]


class Counts(TrainerCallback):
    """Counts steps, and keeps the count."""

    def __init__(self, name: str) -> None:
        self.name, self.count = name, 0

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.count += 1

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]


class FailsToSave(Counts):
    def state_dict(self) -> dict[str, Any]:
        raise ValueError("no state today")


class CannotBeStored(Counts):
    def state_dict(self) -> dict[str, Any]:
        return {"count": print}


class FailsToLoad(Counts):
    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise TypeError("what is this")


@pytest.mark.parametrize(
    ("broken", "told"),
    [
        (FailsToSave, ["not saved: ValueError: no state today", "'broken' is not in the checkpoint, and starts fresh"]),
        (CannotBeStored, ["not saved: StructureError: ", "'broken' is not in the checkpoint, and starts fresh"]),
        (FailsToLoad, ["'broken' did not take its state: TypeError: what is this"]),
    ],
)
def test_b47_a_callback_whose_state_fails_loses_only_its_own(tmp_path, broken, told):
    counts: list[list[int]] = []
    with Lines(logging.WARNING) as lines:
        for max_steps in (4, 8):
            callbacks = [Counts("first"), broken("broken"), Counts("last")]
            trainer_of(Trainer, tmp_path, max_steps=max_steps, callbacks=callbacks).train()
            counts.append([callback.count for callback in callbacks])
    assert counts == [[4, 4, 4], [8, 4, 8]]
    for part in told:
        assert any(part in line for line in lines.lines), lines.lines


def test_b46_callbacks_keep_their_states_in_another_order_and_with_new_ones_among_them(tmp_path):
    trainer_of(Trainer, tmp_path, max_steps=4, callbacks=[Counts("a"), Counts("b")]).train()
    callbacks = [Counts("new"), Counts("b"), Counts("a")]
    callbacks[1].count = callbacks[2].count = 100
    trainer_of(Trainer, tmp_path, max_steps=5, callbacks=callbacks).train()
    assert [callback.count for callback in callbacks] == [1, 5, 5]


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        (lambda rank: {"dataset": Noise(64 - rank)}, "len(train_dataset) is 64 on rank 0 and 63 on rank 1"),
        (lambda rank: {"max_steps": 12 + rank}, "max_steps is 12 on rank 0 and 13 on rank 1"),
        (lambda rank: {"logging_steps": 4 - rank}, "logging_steps is 4 on rank 0 and 3 on rank 1"),
        (
            lambda rank: {"eval_dataset": Noise(8) if rank else None},
            "has eval_dataset is False on rank 0 and True on rank 1",
        ),
    ],
)
def test_b49_ranks_that_would_end_or_meet_at_different_steps_are_told_before_the_first_one(tmp_path, given, problem):
    def case(rank: int, world_size: int) -> Any:
        trainer_of(DDPTrainer, tmp_path, **given(rank)).train()

    for error in errors(run_ranks(NUM_RANKS, case)):
        assert f"{problem}; it must be the same on all ranks" in error.message


def test_b49_a_trainer_may_evaluate_without_training(tmp_path):
    def case(rank: int, world_size: int) -> Any:
        trainer_of(DDPTrainer, tmp_path, eval_dataset=Noise(10), eval_on_save=True).train()
        saved = CheckpointManifest.load(tmp_path / "checkpoint-12").metrics["eval_loss"]
        fresh = trainer_of(DDPTrainer, tmp_path, eval_dataset=Noise(10))
        before = fresh.evaluate()["eval_loss"]
        fresh.model.load_state_dict(load_component(tmp_path / "checkpoint-12", "model"))
        return before != saved, fresh.evaluate()["eval_loss"] == saved

    assert same_on_all(run_ranks(NUM_RANKS, case)) == (True, True)


def test_events_come_in_order(tmp_path):
    diary = Diary()
    trainer_of(
        Trainer,
        tmp_path,
        max_steps=3,
        save_steps=2,
        eval_steps=2,
        logging_steps=2,
        eval_dataset=Noise(8),
        callbacks=[diary],
    ).train()
    step = [("on_step_begin", 0), ("on_step_end", 1)]
    assert diary.entries == [
        ("on_train_begin", 0),
        ("on_epoch_begin", 0),
        *step,
        ("on_step_begin", 1),
        ("on_log", 2),
        ("on_step_end", 2),
        ("on_evaluate", 2),
        ("on_save", 2),
        ("on_step_begin", 2),
        ("on_step_end", 3),
        ("on_save", 3),
        ("on_train_end", 3),
    ]


def test_the_end_is_told_however_the_training_ends(tmp_path):
    class Ends(TrainerCallback):
        def __init__(self) -> None:
            self.errors: list[str] = []

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.errors.append(repr(kwargs["error"]))

    def fail(trainer: Trainer) -> None:
        raise OSError("gone")

    ends = Ends()
    with pytest.raises(OSError, match="gone"):
        trainer_of(Trainer, tmp_path, callbacks=[ends], on_step_end=[fail]).train()
    trainer_of(Trainer, tmp_path, callbacks=[ends]).train()
    assert ends.errors == ["OSError('gone')", "None"]


def test_what_is_no_callback_is_refused(tmp_path):
    for callbacks, problem in [
        ([print], r"make it a subclass of forgather_ckpt\.callbacks\.TrainerCallback"),
        ([Diary], r"callbacks= has the class Diary; give an instance, Diary\(…\)"),
        (Diary(), r"is no list; write callbacks=\[…\], or leave it out"),
        (None, r"callbacks=None is no list; write callbacks=\[…\], or leave it out"),
    ]:
        with pytest.raises(TypeError, match=problem):
            trainer_of(Trainer, tmp_path, callbacks=callbacks)


def test_what_one_callback_changes_in_the_metrics_no_other_one_sees(tmp_path):
    class Clears(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, *, logs: Any, **kwargs: Any) -> None:
            logs.clear()

        def on_evaluate(self, args: Any, state: Any, control: Any, *, metrics: Any, **kwargs: Any) -> None:
            metrics.clear()

    diary = Diary()
    trainer_of(
        Trainer, tmp_path, max_steps=4, eval_on_save=True, eval_dataset=Noise(8), callbacks=[Clears(), diary]
    ).train()
    assert diary.metrics and all(metrics for _, metrics in diary.metrics)
    assert "eval_loss" in catalog.scan(tmp_path).checkpoints[0].manifest.metrics


def test_an_event_that_no_trainer_tells_and_a_flag_that_there_is_not_are_told_of(tmp_path):
    class Misspelt(TrainerCallback):
        def on_eval(self, *facts: Any, **kwargs: Any) -> None: ...

        def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_trainig_stop = True

    with Lines(logging.WARNING) as told:
        trainer_of(Trainer, tmp_path, max_steps=4, callbacks=[Misspelt()]).train()
    assert told.lines == [
        "callback Misspelt has on_eval, which no trainer calls",
        "callback Misspelt.on_log failed at step 4; it will be called again",
        "callback Misspelt.on_log failed 1 times; the first one is in the log above",
    ]


# ---- what is kept


def losses_of(values: Sequence[float]) -> Any:
    """A `compute_metrics` that tells these, one an evaluation."""
    left = iter(values)
    return lambda model, batch: {"loss": torch.tensor(next(left))}


def test_document_001_the_best_is_known_before_anything_is_deleted(tmp_path):
    """Steps 4, 8, …: the second is the best, and is never without a place, though the limit is 1."""
    seen: list[list[int]] = []

    class Look(TrainerCallback):
        def on_save(self, *_: Any, **__: Any) -> None:
            seen.append([step for step, _ in kept(tmp_path)])

    trainer_of(
        Trainer,
        tmp_path,
        max_steps=20,
        save_total_limit=1,
        preserve_best_model=True,
        eval_on_save=True,
        eval_strategy="no",
        max_eval_batches=1,
        eval_dataset=Noise(4),
        compute_metrics=losses_of([3.0, 1.0, 2.0, 4.0, 5.0]),
        callbacks=[Look()],
    ).train()
    assert seen == [[4], [8], [8, 12], [8, 16], [8, 20]]


def test_b25_b56_document_001_two_best_beside_three_newest_and_no_more(tmp_path):
    trainer_of(
        Trainer,
        tmp_path,
        max_steps=32,
        save_total_limit=3,
        preserve_best_model=True,
        preserve_n_best=2,
        eval_on_save=True,
        eval_strategy="no",
        max_eval_batches=1,
        eval_dataset=Noise(4),
        compute_metrics=losses_of([3.0, 2.0, 2.5, 9.0, 8.0, 7.0, 6.0, 5.0]),
    ).train()
    assert [step for step, _ in kept(tmp_path)] == [8, 12, 24, 28, 32]


def test_document_001_each_line_is_logged_once_and_the_summary_says_which_are_best(tmp_path):
    def case(rank: int, world_size: int) -> Any:
        with Lines() as told:
            trainer_of(
                DDPTrainer,
                tmp_path,
                preserve_best_model=True,
                preserve_n_best=2,
                eval_on_save=True,
                eval_strategy="no",
                max_eval_batches=1,
                eval_dataset=Noise(8),
                compute_metrics=losses_of([3.0, 2.0, 2.5]),
            ).train()
        return told.lines

    outcomes = run_ranks(NUM_RANKS, case)
    lines, others = outcomes[0].value, outcomes[1].value
    assert others == []
    saved = [tmp_path / f"checkpoint-{step}" for step in (4, 8, 12)]
    best = [line for line in lines if "best checkpoint" in line]
    assert best == [
        f"new best checkpoint: {saved[0]} (eval_loss=3)",
        f"new best checkpoint: {saved[1]} (eval_loss=2)",
        f"best checkpoint 2 of 2: {saved[2]} (eval_loss=2.5)",
    ]
    rule = "=" * 60
    assert lines[-1].splitlines() == [
        rule,
        "Training complete!",
        "Best checkpoints (N=2):",
        f"  {saved[1]}: eval_loss=2",
        f"  {saved[2]}: eval_loss=2.5",
        rule,
    ]
    assert len(lines) == len(set(lines))


def test_the_summary_is_rank_0s_alone(tmp_path):
    def case(rank: int, world_size: int) -> str:
        components = [StateComponent("counter", Box({"count": 0}), SharingPattern.REPLICATED)]
        with CheckpointManager(components, tmp_path, policy=Latest(1) | Best(1, "eval_loss")) as manager:
            manager.save(1, metrics={"eval_loss": 2.5})
            return manager.get_best_checkpoints_summary()

    assert values(run_ranks(NUM_RANKS, case)) == [
        f"Best checkpoints (N=1):\n  {tmp_path / 'checkpoint-1'}: eval_loss=2.5",
        "",
    ]


def test_the_best_are_known_after_a_resume_and_from_another_place(tmp_path, monkeypatch):
    options: dict[str, Any] = {
        "save_total_limit": 1,
        "preserve_best_model": True,
        "eval_on_save": True,
        "eval_strategy": "no",
        "max_eval_batches": 1,
        "eval_dataset": Noise(4),
    }
    trainer_of(Trainer, tmp_path / "run", max_steps=8, compute_metrics=losses_of([1.0, 2.0]), **options).train()
    monkeypatch.chdir(tmp_path)
    trainer_of(Trainer, "run", max_steps=16, compute_metrics=losses_of([3.0, 4.0]), **options).train()
    assert [step for step, _ in kept(tmp_path / "run")] == [4, 8, 16], "the best, the one resumed from, the newest"


def test_b60_a_save_without_the_metric_is_told_of(tmp_path):
    with Lines(logging.WARNING) as told:
        trainer_of(Trainer, tmp_path, max_steps=4, preserve_best_model=True).train()
    assert told.lines == [
        "checkpoint-4 cannot be among the best: it has no metric 'eval_loss', only 'loss'; evaluate before each save "
        "(eval_on_save=True, with an eval_dataset)"
    ]


def test_metrics_of_a_later_evaluation_of_a_saved_step_count(tmp_path):
    """Evaluated at step 4, when that was saved: the next save finds it the best, and keeps it."""

    class EvaluateLate(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 4:
                run.evaluate()

    trainer = trainer_of(
        Trainer,
        tmp_path,
        max_steps=16,
        save_total_limit=1,
        preserve_best_model=True,
        eval_strategy="no",
        eval_dataset=Noise(4),
        callbacks=[EvaluateLate()],
    )
    with trainer.create_manager() as manager:
        run = Run(trainer, manager)
        run.go()
        summary = manager.get_best_checkpoints_summary()
    newest = catalog.scan(tmp_path).checkpoints[-1]
    assert set(annotations.load(newest.path, newest.manifest.digest).metrics) == {"eval_loss"}
    assert [step for step, _ in kept(tmp_path)] == [4, 16]
    assert f"{tmp_path / 'checkpoint-4'}: eval_loss=" in summary


@pytest.mark.parametrize("failing", ["scan", "decide"])
def test_a_failure_of_retention_is_logged_and_training_goes_on(tmp_path, monkeypatch, failing):
    def fail(*_: Any, **__: Any) -> Any:
        raise OSError(5, "the disk is in a bad mood")

    monkeypatch.setattr(*{"scan": (pruning, "survey"), "decide": (retention, "decide")}[failing], fail)
    with Lines(logging.WARNING) as told:
        result = trainer_of(Trainer, tmp_path, max_steps=4).train()
    assert result.steps == 4
    assert any("the disk is in a bad mood" in line for line in told.lines)


# ---- a file system that fails


def full_at(monkeypatch: pytest.MonkeyPatch, *steps: int) -> Any:
    """A hook: the disk is full at the saves of these steps."""
    create = files.create
    now: list[int] = [0]

    def no_room(path: Path, size: int, **options: Any) -> int:
        if now[0] in steps:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return create(path, size, **options)

    monkeypatch.setattr(files, "create", no_room)
    return lambda trainer: now.__setitem__(0, trainer.progress.step)


def test_training_does_not_wait_until_old_checkpoints_are_deleted(tmp_path, monkeypatch):
    may_delete, delete = threading.Event(), files.delete
    monkeypatch.setattr(files, "delete", lambda path: (may_delete.wait(5), delete(path)))
    counter = StateComponent("counter", Box({"count": 0}), SharingPattern.GLOBAL)
    with CheckpointManager([counter], tmp_path, schedule=SaveSchedule(steps=1), policy=Latest(1)) as manager:
        for step in (1, 2, 3):
            manager.after_step(step)
        assert len(list(tmp_path.glob(".trash-*"))) == 2
        may_delete.set()
    assert [step for step, _ in kept(tmp_path)] == [3]
    assert not list(tmp_path.glob(".trash-*"))


def test_training_goes_on_over_a_full_disk_and_saves_again_when_there_is_room(tmp_path, monkeypatch):
    hook = full_at(monkeypatch, 4, 8)

    def case(rank: int, world_size: int) -> Any:
        diary = Diary()
        with Lines(logging.ERROR) as told:
            result = trainer_of(DDPTrainer, tmp_path, max_steps=14, on_step_end=[hook], callbacks=[diary]).train()
        return result.steps, diary.of("on_save"), told.lines

    outcomes = run_ranks(NUM_RANKS, case)
    assert [outcome.value[:2] for outcome in outcomes] == [(14, [12, 14])] * NUM_RANKS
    told = outcomes[0].value[2]
    assert [line.split(":")[0] for line in told] == [f"step {step} is not saved, training goes on" for step in (4, 8)]
    assert "No space left on device" in told[0] and "bytes are free there" in told[0]
    assert outcomes[1].value[2] == []
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lease", "checkpoint-12", "checkpoint-14"]


@pytest.mark.parametrize(("settings", "step"), [({"on_storage_error": "error"}, 4), ({}, 12)])
def test_a_full_disk_is_an_error_where_that_is_asked_for_and_at_the_end(tmp_path, monkeypatch, settings, step):
    trainer = trainer_of(
        Trainer, tmp_path, save_steps=4, max_steps=12, on_step_end=[full_at(monkeypatch, step)], **settings
    )
    if not settings:
        trainer = trainer_of(Trainer, tmp_path, save_steps=5, on_step_end=[full_at(monkeypatch, step)])
    with pytest.raises(NoSpace):
        trainer.train()
    assert trainer.progress.step == step


# ---- when it saves


def test_saves_and_evaluations_keep_their_grids_over_resumes(tmp_path):
    diary = Diary()
    options: dict[str, Any] = {"save_steps": 3, "eval_steps": 5, "eval_dataset": Noise(8), "callbacks": [diary]}
    trainer_of(Trainer, tmp_path, max_steps=7, **options).train()
    trainer_of(Trainer, tmp_path, max_steps=16, **options).train()
    assert diary.of("on_save") == [3, 6, 7, 9, 12, 15, 16]
    assert diary.of("on_evaluate") == [5, 10, 15]


def test_saves_by_the_clock_go_on_from_the_training_time_of_the_run(tmp_path, monkeypatch):
    """A clock that each step moves by 10 s: a save is due each 25 s, over both lives."""
    seconds = 0.0

    def advance(_: Trainer) -> None:
        nonlocal seconds
        seconds += 10.0

    monkeypatch.setattr(run_clock, "time", SimpleNamespace(monotonic=lambda: seconds))
    diary = Diary()
    options: dict[str, Any] = {
        "save_strategy": "no",
        "save_seconds": 25.0,
        "on_step_end": [advance],
        "callbacks": [diary],
    }
    trainer_of(Trainer, tmp_path, max_steps=6, **options).train()
    assert diary.of("on_save") == [3, 5]
    assert CheckpointManifest.load(tmp_path / "checkpoint-5").elapsed_seconds == 50
    trainer_of(Trainer, tmp_path, max_steps=12, **options).train()
    assert diary.of("on_save") == [3, 5, 8, 10], "70 s is not 75: it was not step 7 that was due"


@pytest.mark.parametrize("kind", ["save", "stop", "abort"])
def test_what_is_asked_from_outside_is_done_once(tmp_path, kind):
    def ask(trainer: Trainer) -> None:
        if trainer.progress.step == 5:
            requests.ask(tmp_path, kind, "a test")

    result = trainer_of(Trainer, tmp_path, save_steps=100, on_step_end=[ask]).train()
    assert result.exit_code == 0
    steps = [step for step, _ in kept(tmp_path)]
    assert (result.steps, steps) == {"save": (12, [5, 12]), "stop": (5, [5]), "abort": (5, [])}[kind]
    assert ("a test" in (result.stop_reason or "")) == (kind != "save")


def test_what_was_asked_of_an_earlier_job_is_dropped(tmp_path):
    requests.ask(tmp_path, "stop")
    assert trainer_of(Trainer, tmp_path).train().steps == 12


# ---- a loop of one's own


def loop(run: Path, num_steps: int, *, die_after: int | None = None, wishes: Any = (), **given: Any) -> Any:
    """Train something that counts; (first step, steps done, exit code)."""
    counter = Box({"count": 0})
    components = [StateComponent("counter", counter, SharingPattern.REPLICATED)]
    with CheckpointManager(
        components, run, **{"schedule": SaveSchedule(steps=4), "control_steps": 3, **given}
    ) as manager:
        first = step = manager.resume("auto")
        assert counter.items["count"] == step
        while step < num_steps:
            step += 1
            counter.items["count"] += 1
            if die_after == step:
                raise KeyError("a bug")
            if manager.after_step(step, metrics={"loss": 1.0 / step}, **dict(wishes).get(step, {})):
                break
        manager.finish(step, metrics={"loss": 1.0 / step})
    return first, step, manager.exit_code


def test_a_loop_of_ones_own_saves_and_goes_on(tmp_path):
    assert loop(tmp_path, 6) == (0, 6, 0)
    assert kept(tmp_path) == [(4, "periodic"), (6, "final")]
    assert loop(tmp_path, 9, policy=Latest(1)) == (6, 9, 0)
    assert kept(tmp_path) == [(6, "final"), (9, "final")]


@pytest.mark.parametrize("culprit", [0, 1])
def test_a_rank_that_leaves_with_an_error_is_not_waited_for_and_its_error_is_told(tmp_path, culprit):
    def case(rank: int, world_size: int) -> str:
        with pytest.raises((KeyError, RankFailed)) as caught:
            loop(tmp_path, 9, die_after=6 if rank == culprit else None)
        return str(caught.value)

    told = values(run_ranks(2, case))
    assert told.pop(culprit) == "'a bug'"
    assert told == [f"step 6 failed: rank {culprit} has closed its coordinator after KeyError: 'a bug'"]


@pytest.mark.parametrize("make", [torch.tensor, numpy.float32, numpy.array, lambda value: torch.tensor([value])])
def test_metrics_may_be_tensors_and_numpy_scalars(tmp_path, make):
    counter = StateComponent("counter", Box({"count": 0}), SharingPattern.GLOBAL)
    with CheckpointManager(
        [counter], tmp_path, schedule=SaveSchedule(steps=1), policy=Latest(1) | Best(1, "eval_loss")
    ) as manager:
        for step, loss in enumerate([2.0, 0.5, 3.0, 4.0], start=1):
            manager.after_step(step, metrics={"eval_loss": make(loss)})
        manager.note_metrics(4, {"eval_loss": make(0.25)})
        manager.after_step(5, metrics={"eval_loss": make(5.0)})
    assert [step for step, _ in kept(tmp_path)] == [4, 5]


@pytest.mark.parametrize("make", [torch.tensor, numpy.int64])
def test_steps_may_be_tensors_and_numpy_scalars(tmp_path, make):
    counter = StateComponent("counter", Box({"count": 0}), SharingPattern.GLOBAL)
    with CheckpointManager([counter], tmp_path, schedule=SaveSchedule(steps=2)) as manager:
        for step in range(1, 4):
            manager.after_step(make(step))
        manager.save(make(3))
        manager.finish(make(4))
        assert type(manager.last_step) is int
    assert kept(tmp_path) == [(2, "periodic"), (3, "periodic"), (4, "final")]


@pytest.mark.parametrize("make", [torch.tensor, numpy.bool_])
def test_wishes_may_be_tensors_and_numpy_scalars(tmp_path, make):
    counter = StateComponent("counter", Box({"count": 0}), SharingPattern.GLOBAL)
    with CheckpointManager([counter], tmp_path, schedule=SaveSchedule(steps=1)) as manager:
        assert not manager.after_step(1, stop=make(False), reasons="not yet")
        assert manager.after_step(2, stop=make(True), reasons="enough")
        assert manager.ending.reasons == ("enough",)


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"policy": [Latest(2)]}, "policy is [Latest(n=2)]; use policies joined by |"),
        ({"policy": Latest}, "use policies joined by |"),
        ({"policy": 3}, "policy is 3; use policies joined by |"),
        ({"schedule": 500}, "schedule is 500; use SaveSchedule(steps=500)"),
        ({"on_storage_error": "ignore"}, "on_storage_error is 'ignore'; use"),
        ({"control_steps": 0}, "control_steps is 0; use a whole number, from 1"),
        ({"max_load_attempts": None}, "max_load_attempts is None; use a whole number, from 1"),
        ({"stop_signals": "SIGTERM"}, "stop_signals='SIGTERM' is a string; use a tuple of names"),
        ({"grace_seconds": "30"}, "grace_seconds is '30'; use a number of seconds, above 0"),
    ],
)
def test_what_a_manager_cannot_use_is_refused_when_it_is_made(tmp_path, given, problem):
    counter = StateComponent("counter", Box({"count": 0}), SharingPattern.GLOBAL)
    with pytest.raises(DeclarationError, match=re.escape(problem)):
        CheckpointManager([counter], tmp_path, **given)


@pytest.mark.parametrize("rank", [0, 1])
def test_an_abort_at_the_last_step_leaves_no_last_checkpoint(tmp_path, rank):
    def case(own: int, world_size: int) -> Any:
        wishes = {10: {"abort": True}} if own == rank else {}
        return loop(tmp_path, 10, wishes=wishes)

    assert same_on_all(run_ranks(NUM_RANKS, case)) == (0, 10, 0)
    assert kept(tmp_path) == [(4, "periodic"), (8, "periodic")]


def test_the_end_of_an_epoch_is_saved_where_the_schedule_has_epochs(tmp_path):
    components = [StateComponent("counter", Box({"count": 0}), SharingPattern.REPLICATED)]
    with CheckpointManager(components, tmp_path, schedule=SaveSchedule(steps=4, epochs=True)) as manager:
        for step in range(1, 8):
            manager.after_step(step, is_epoch_end=step in (3, 4))
        manager.finish(7)
    assert kept(tmp_path) == [(3, "epoch"), (4, "epoch"), (7, "final")]


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        (lambda rank: {"policy": Latest(3) if rank else [Latest(3)]}, "policy is [Latest(n=3)]"),
        (lambda rank: {"control_steps": 5 * rank}, "control_steps is 0; use a whole number"),
        (lambda rank: {"control_steps": 5 + rank}, "control_steps is '5' on rank 0 and '6' on rank 1"),
        (lambda rank: {"schedule": SaveSchedule(steps=4, at_end=rank == 0)}, "schedule is 'SaveSchedule(steps=4, "),
        (lambda rank: {"schedule": SaveSchedule(at_end=rank == 0)}, "schedule is 'SaveSchedule(steps=None, "),
        (lambda rank: {"stop_signals": ("SIGTERM",) if rank else "SIGTERM"}, "stop_signals='SIGTERM' is a string"),
        (lambda rank: {"resume": "auto" if rank else None}, "resume is 'None' on rank 0 and 'auto' on rank 1"),
    ],
)
def test_managers_that_are_not_alike_are_refused_on_all_ranks_at_once(tmp_path, given, problem):
    def case(rank: int, world_size: int) -> Any:
        options = given(rank)
        which = options.pop("resume", "auto")
        components = [StateComponent("counter", Box({"count": 0}), SharingPattern.REPLICATED)]
        with CheckpointManager(components, tmp_path, timeout_seconds=20, **options) as manager:
            manager.resume(which)

    first, second = (error.message for error in errors(run_ranks(NUM_RANKS, case)))
    assert first == second
    assert problem in first


def test_a_disk_on_which_the_next_saves_will_not_fit_is_told_of_once(tmp_path, monkeypatch):
    monkeypatch.setattr(space, "_free", lambda run: 1000)
    with Lines() as told:
        loop(tmp_path, 40)
    assert len([line for line in told.lines if "the next 2 saves will not fit" in line]) == 1
    [line] = [line for line in told.lines if line.startswith("checkpoint storage: ")]
    assert line.endswith(" (10 periodic), 1.00 kB free"), "at the tenth save"
    assert len([line for line in told.lines if line.startswith("a save takes ")]) == 1


@pytest.mark.parametrize("rank", [0, 1])
def test_a_wish_between_two_looks_is_not_lost(tmp_path, rank):
    def case(own: int, world_size: int) -> Any:
        wishes = {5: {"stop": True, "reasons": ("enough",)}} if own == rank else {}
        return loop(tmp_path, 20, wishes=wishes, schedule=SaveSchedule(steps=100))

    assert same_on_all(run_ranks(NUM_RANKS, case)) == (0, 6, 0), "they look at steps 3, 6, …"
    assert kept(tmp_path) == [(6, "final")]


def test_a_run_that_fails_again_and_again_between_saves_does_not_give_its_checkpoint_up(tmp_path):
    loop(tmp_path, 4)
    for _ in range(5):
        with pytest.raises(KeyError):
            loop(tmp_path, 9, die_after=6)
    assert loop(tmp_path, 9)[0] == 4


def test_a_fresh_start_beside_checkpoints_says_what_becomes_of_them(tmp_path):
    trainer_of(Trainer, tmp_path).train()
    with Lines(logging.WARNING) as told:
        trainer_of(Trainer, tmp_path, max_steps=4, save_total_limit=1, resume_from_checkpoint=False).train()
    assert told.lines == [
        f"a fresh start in {tmp_path}, which holds 3 checkpoints, the newest of step 12: this run's policy counts them with "
        "its own and removes what it does not keep, and its saves replace those of the same step"
    ]
    assert [step for step, _ in kept(tmp_path)] == [4]


def test_best_is_by_the_policy_of_the_job(tmp_path):
    policy = Latest(1) | Best(1, "loss", "max")
    loop(tmp_path, 12, policy=policy)
    counter = Box({"count": 0})
    components = [StateComponent("counter", counter, SharingPattern.REPLICATED)]
    with CheckpointManager(components, tmp_path, policy=policy) as manager:
        assert (manager.resume("best"), counter.items["count"]) == (4, 4)
    loop(tmp_path / "more", 12, policy=Latest(4))
    with CheckpointManager(components, tmp_path / "more", policy=Best(1, "loss", "max")) as manager:
        assert [manager.resume(which) for which in ("best", "best~1", "best~2")] == [4, 8, 12]
    with (
        CheckpointManager(components, tmp_path, policy=Best(1, "score")) as manager,
        pytest.raises(CheckpointNotFound, match="none has a finite 'score'"),
    ):
        manager.resume("best")


@pytest.mark.parametrize("control_steps", [10, None])
def test_after_a_rollback_the_ranks_look_at_wishes_as_soon_as_ever(tmp_path, control_steps):
    counter = StateComponent("counter", Box({"count": 0}), SharingPattern.REPLICATED)
    with CheckpointManager(
        [counter], tmp_path, schedule=SaveSchedule(steps=1000), control_steps=control_steps
    ) as manager:
        manager.save(5)
        for step in range(6, 900):
            manager.after_step(step)
        assert manager.resume(5) == 5
        os.kill(os.getpid(), signal.SIGTERM)
        ended = next(step for step in range(6, 900) if manager.after_step(step))
    assert ended <= 5 + 50


def test_a_step_of_another_run_is_not_saved_here(tmp_path):
    """At which this one ends at once; nor are metrics noted on what happens to be here of that step."""
    other, own = tmp_path / "other", tmp_path / "own"
    for run in (other, own):
        trainer_of(Trainer, run, max_steps=4).train()
    path = str(other / "checkpoint-4")
    trainer_of(Trainer, tmp_path / "new", max_steps=4, resume_from_checkpoint=path).train()
    assert kept(tmp_path / "new") == [(4, "final")]
    evaluated = {"eval_dataset": Noise(8), "callbacks": [AskAt({4: "should_evaluate"}, event="on_train_begin")]}
    trainer_of(Trainer, own, max_steps=6, save_steps=100, resume_from_checkpoint=path, **evaluated).train()
    assert not (own / "checkpoint-4" / "annotations.json").exists()
    assert not (other / "checkpoint-4" / "annotations.json").exists()


@pytest.mark.parametrize("ending", ["dies", "raises"])
def test_a_checkpoint_on_which_another_rank_dies_each_time_is_given_up_and_one_on_which_it_raises_is_not(
    tmp_path, ending
):
    train(tmp_path, max_steps=8)

    def case(rank: int, world_size: int) -> Any:
        def end(trainer: Trainer, *_: Any) -> Any:
            if rank == 1 and ending == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            if rank == 1:
                raise KeyError("a bug")

        trainer = trainer_of(DDPTrainer, tmp_path)
        step_of = trainer.training_step

        def training_step(batches: Any) -> Any:
            assert trainer.state.resumed_from is not None
            if trainer.state.resumed_from.name == "checkpoint-8":
                end(trainer)
            return step_of(batches)

        with mock.patch.object(trainer, "training_step", training_step):
            return trainer.train().resumed_from

    for _ in range(3):
        outcomes = run_ranks(NUM_RANKS, case, expect_dead=[1] if ending == "dies" else [])
        assert all(outcome.is_dead or outcome.error is not None for outcome in outcomes)
    outcomes = run_ranks(NUM_RANKS, case)
    if ending == "dies":
        assert same_on_all(outcomes) == tmp_path / "checkpoint-4"
    else:
        assert all(outcome.error is not None for outcome in outcomes)


def test_a_policy_that_keeps_less_makes_room_on_a_full_disk(tmp_path, monkeypatch):
    trainer_of(Trainer, tmp_path, max_steps=12, save_steps=2).train()
    hook = full_at(monkeypatch, 14)
    trainer_of(Trainer, tmp_path, max_steps=15, save_steps=14, save_total_limit=2, on_step_end=[hook]).train()
    assert [step for step, _ in kept(tmp_path)] == [12, 15], "12 is what it went on from"


# ---- signals


def signalled(run: Path, number: int, ranks: Sequence[int], at: int = 5) -> Any:
    """Train on two ranks that send themselves a signal after a step."""

    def hook(rank: int) -> Any:
        def send(trainer: Trainer) -> None:
            if rank in ranks and trainer.progress.step == at:
                os.kill(os.getpid(), number)

        return [send]

    return train(run, on_step_end=hook)


@pytest.mark.parametrize("ranks", [(0,), (1,), (0, 1)])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_to_any_rank_ends_all_with_an_emergency_checkpoint_and_its_exit_code(tmp_path, number, ranks):
    steps, reason, exit_code = signalled(tmp_path, number, ranks)
    assert (steps, exit_code) == (5, 128 + number)
    assert kept(tmp_path) == [(4, "periodic"), (5, "emergency")]
    assert reason == f"{signal.Signals(number).name} received" + ("" if len(ranks) == 2 else f" (rank {ranks[0]})")
    newest = catalog.scan(tmp_path).checkpoints[0]
    assert annotations.load(newest.path, newest.manifest.digest).notes == (reason,)


def test_after_a_signal_the_run_goes_on_to_the_same_bits(tmp_path):
    def case(rank: int, world_size: int) -> Any:
        states = []
        for run, at in (("whole", None), ("cut", 5)):

            def send(trainer: Trainer, at: int | None = at) -> None:
                if trainer.progress.step == at and rank == 1:
                    os.kill(os.getpid(), signal.SIGTERM)

            ends = []
            for _ in range(2 if at else 1):
                trainer = trainer_of(DDPTrainer, tmp_path / run, on_step_end=[send])
                ends.append(trainer.train().exit_code)
            state = {name: value.tolist() for name, value in trainer.model.state_dict().items()}
            states.append((ends, state))
        return states

    whole, cut = same_on_all(run_ranks(NUM_RANKS, case))
    assert (whole[0], cut[0]) == ([0], [143, 0])
    assert whole[1] == cut[1]


def test_the_handlers_of_before_are_back(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    trainer_of(Trainer, tmp_path, max_steps=2).train()
    assert signal.getsignal(signal.SIGTERM) is before


def test_emergencies_are_a_pool_of_their_own(tmp_path):
    """Twelve interruptions push no regular checkpoint out, and only the newest ten of them stay."""

    def send(trainer: Trainer) -> None:
        if trainer.progress.step % 4 == 1 and trainer.progress.step > 8:
            os.kill(os.getpid(), signal.SIGTERM)

    for _ in range(13):
        trainer_of(Trainer, tmp_path, max_steps=54, save_total_limit=2, save_steps=4, on_step_end=[send]).train()
    found = kept(tmp_path)
    assert [step for step, kind in found if kind == "emergency"] == [17, 21, 25, 29, 33, 37, 41, 45, 49, 53]
    assert [step for step, kind in found if kind != "emergency"] == [52, 54]


def test_a_save_that_takes_longer_than_the_grace_is_told_of_once(tmp_path):
    with Lines(logging.WARNING) as told:
        trainer_of(Trainer, tmp_path, grace_seconds=1e-6).train()
    assert [line[:13] for line in told.lines] == ["a save took 0"]
