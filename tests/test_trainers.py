"""The training loop: arguments, schedules, one step, what is saved when, and what a resume takes up."""

import dataclasses
import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from forgather_ckpt.annotations import annotate
from forgather_ckpt.component import StateComponent
from forgather_ckpt.errors import (
    CheckpointError,
    CheckpointNotFound,
    CheckpointQuarantined,
    DeclarationError,
    ReplicaMismatch,
)
from forgather_ckpt.manifest import CheckpointManifest
from forgather_ckpt.patterns import SharingPattern
from forgather_ckpt.trainers import DDPTrainer, Trainer, TrainingArguments
from forgather_ckpt.trainers.schedule import is_multiple, lr_factor
from tests.ranks import errors, run_ranks, values


class Points:
    """Points and what a linear function makes of them."""

    def __init__(self, num_samples: int = 32) -> None:
        self.x = torch.randn(num_samples, 4, generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"x": self.x[index], "y": self.x[index].sum()}


class Regression(nn.Module):
    """A linear model that returns its own loss."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 1)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return nn.functional.mse_loss(self.linear(x).squeeze(-1), y)


def make_model() -> Regression:
    torch.manual_seed(0)
    return Regression()


def make_args(output_dir: Path | str, **settings: Any) -> TrainingArguments:
    small = {"max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 0.1, "logging_steps": 1}
    return TrainingArguments(output_dir, **(small | {"save_strategy": "no"} | settings))


class Stop(Exception):
    """Ends a training from a hook."""


def stop_at(step: int) -> Callable[[Trainer], None]:
    def hook(trainer: Trainer) -> None:
        if trainer.progress.step == step:
            raise Stop

    return hook


def saves(output_dir: Path) -> list[tuple[int, str]]:
    """(step, kind) of the checkpoints, oldest first."""
    manifests = [CheckpointManifest.load(path) for path in output_dir.glob("checkpoint-*")]
    return [(saved.step, saved.kind) for saved in sorted(manifests, key=lambda saved: saved.sequence)]


# ---- arguments


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"save_strategy": "best"}, "save_strategy must be one of no, steps, epoch"),
        ({"lr_scheduler_type": "cosine_with_restarts"}, "given to the trainer as lr_scheduler="),
        ({"save_steps": 0}, "save_steps must be a whole number of at least 1"),
        ({"save_steps": 0.1}, "save_steps must be a whole number of at least 1, not 0.1"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps must be"),
        ({"num_train_epochs": 0.5}, "num_train_epochs must be a whole number"),
        ({"dataloader_num_workers": -1}, "dataloader_num_workers must be"),
        ({"max_steps": 0}, "or -1 to train for num_train_epochs"),
        ({"learning_rate": math.nan}, "learning_rate must be a finite number"),
        ({"max_grad_norm": -1.0}, "max_grad_norm must be a finite number of at least 0"),
        ({"fp16": True, "bf16": True}, "exclude each other"),
        ({"checkpoint_timeout_seconds": 0}, "checkpoint_timeout_seconds must be above 0"),
        ({"validate_replication_steps": -1}, "validate_replication_steps must be a whole number of at least 0"),
        ({"validate_replication_level": "none"}, "validate_replication_level must be one of quick, tensor, full"),
        ({"on_storage_error": "ignore"}, 'on_storage_error must be "error" or "warn"'),
        ({"on_replica_mismatch": "ignore"}, 'on_replica_mismatch must be "error" or "warn"'),
        ({"resume_from_checkpoint": "1000"}, "write a step as a number, resume_from_checkpoint=1000"),
        ({"resume_from_checkpoint": ""}, '"latest", "auto", or a path'),
        ({"resume_from_checkpoint": -1}, "write False to start fresh"),
        ({"resume_from_checkpoint": {"step": 1}}, "resume_from_checkpoint={'step': 1} is a dict: write True, False"),
        ({"resume_from_checkpoint": [1]}, "resume_from_checkpoint=[1] is a list"),
        ({"resume_from_checkpoint": 1.0}, "resume_from_checkpoint=1.0 is a float"),
        ({"learning_rate": "5e-5"}, "learning_rate must be a finite number of at least 0, not '5e-5'"),
        ({"weight_decay": None}, "weight_decay must be a finite number of at least 0, not None"),
        ({"max_grad_norm": True}, "max_grad_norm must be a finite number of at least 0, not True"),
        ({"max_steps": True}, "max_steps must be at least 1"),
        ({"checkpoint_timeout_seconds": "60"}, "checkpoint_timeout_seconds must be above 0, not '60'"),
        ({"bf16": "no"}, "bf16 must be True or False, not 'no'"),
        ({"fp16": 1}, "fp16 must be True or False, not 1"),
        ({"dispatch_batches": None}, "dispatch_batches must be True or False, not None"),
        ({"stop_signals": "SIGTERM"}, "stop_signals='SIGTERM' is a string; use a tuple of names, ('SIGTERM',)"),
        ({"stop_signals": ("TERM",)}, "stop_signals names 'TERM', which is no signal that a training can handle"),
        ({"stop_signals": None}, "stop_signals=None is no list of names; use a tuple of names, ('SIGTERM',), or ()"),
        ({"preserve_n_best": 3}, "write preserve_best_model=True, preserve_n_best=3"),
        ({"keep_epoch_checkpoints": True, "save_strategy": "no"}, 'none to keep with save_strategy="no"; write "epoch", or'),
        ({"evaluation_strategy": "steps"}, "evaluation_strategy='steps' is not an argument here: write eval_strategy="),
        ({"report_to": "tensorboard"}, "give the trainer callbacks=[JsonlLogger()], or TensorBoardLogger()"),
        ({"overwrite_output_dir": True}, "write resume_from_checkpoint=False to start over"),
        ({"no_cuda": True}, 'write device="cpu"'),
    ],
)
def test_wrong_settings_are_refused_with_what_to_write(settings, problem):
    with pytest.raises((ValueError, DeclarationError), match=re.escape(problem)):
        TrainingArguments("runs", **settings)


def test_a_device_that_is_not_there_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for device in ("cuda", "cuda:1"):
        with pytest.raises(
            ValueError, match=f"device='{device}', but torch finds no CUDA device.*write device=\"cpu\""
        ):
            Trainer(make_model(), make_args(tmp_path, device=device), Points())


def test_what_the_loop_cannot_step_is_refused_when_the_trainer_is_made(tmp_path):
    model = make_model()
    with pytest.raises(ValueError, match=r"LBFGS\.step\(\) needs a closure.*or override apply_gradients"):
        Trainer(model, make_args(tmp_path), Points(), optimizer=torch.optim.LBFGS(model.parameters()))
    sgd = torch.optim.SGD(model.parameters())
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(sgd)
    with pytest.raises(ValueError, match=r"ReduceLROnPlateau\.step\(\) needs a metric.*or override apply_gradients"):
        Trainer(model, make_args(tmp_path), Points(), optimizer=sgd, lr_scheduler=plateau)

    class Own(Trainer):
        def apply_gradients(self) -> None:
            self.optimizer.step()
            self.lr_scheduler.step(1.0)

    Own(model, make_args(tmp_path), Points(), optimizer=sgd, lr_scheduler=plateau).train()


def test_settings_become_plain_data():
    settings = TrainingArguments(Path("runs/a"), resume_from_checkpoint=Path("runs/b/checkpoint-1")).to_json()
    assert settings["output_dir"] == "runs/a"
    assert settings["resume_from_checkpoint"] == "runs/b/checkpoint-1"
    assert settings["save_steps"] == 500


# ---- schedules


@pytest.mark.parametrize(("every", "expected"), [(1, [1, 2, 3, 4, 5, 6, 7]), (3, [3, 6]), (7, [7]), (8, [])])
def test_what_happens_every_so_many_steps_happens_at_multiples(every, expected):
    assert [step for step in range(8) if is_multiple(step, every)] == expected


@pytest.mark.parametrize(
    ("kind", "warmup_steps", "expected"),
    [
        ("constant", 0, [1, 1, 1, 1, 1, 1]),
        ("constant", 2, [0, 0.5, 1, 1, 1, 1]),
        ("linear", 0, [1, 0.75, 0.5, 0.25, 0, 0]),
        ("linear", 2, [0, 0.5, 1, 0.5, 0, 0]),
        ("cosine", 0, [1, 0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5, 0, 0]),
        ("cosine", 4, [0, 0.25, 0.5, 0.75, 1, 0]),
    ],
)
def test_learning_rate_factors_over_four_steps(kind, warmup_steps, expected):
    factors = [lr_factor(kind, step, warmup_steps=warmup_steps, total_steps=4) for step in range(6)]
    assert factors == pytest.approx(expected)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"save_steps": 2, "max_steps": 5}, [(2, "periodic"), (4, "periodic"), (5, "final")]),
        ({"save_steps": 2, "max_steps": 4}, [(2, "periodic"), (4, "periodic")]),
        ({"save_steps": 1, "max_steps": 3}, [(1, "periodic"), (2, "periodic"), (3, "periodic")]),
        ({"save_steps": 9, "max_steps": 3}, [(3, "final")]),
        ({"save_strategy": "no", "max_steps": 3}, []),
        ({"save_strategy": "epoch", "max_steps": -1, "num_train_epochs": 2}, [(8, "epoch"), (16, "epoch")]),
        ({"save_strategy": "epoch", "max_steps": 10}, [(8, "epoch"), (10, "final")]),
        ({"save_strategy": "epoch", "max_steps": 8}, [(8, "epoch")]),
    ],
)
def test_b44_saves_are_on_their_grid_and_the_last_step_is_saved_once(tmp_path, settings, expected):
    Trainer(make_model(), make_args(tmp_path, **({"save_strategy": "steps"} | settings)), Points()).train()
    assert saves(tmp_path) == expected


def test_b43_a_resume_keeps_the_grid_of_saves(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 4, "max_steps": 13}
    with pytest.raises(Stop):
        Trainer(make_model(), make_args(tmp_path, **settings), Points(), on_step_end=[stop_at(7)]).train()
    resumed = Trainer(make_model(), make_args(tmp_path, **settings, resume_from_checkpoint=True), Points())
    result = resumed.train()
    assert saves(tmp_path) == [(4, "periodic"), (8, "periodic"), (12, "periodic"), (13, "final")]
    assert (result.steps, result.resumed_from) == (13, tmp_path / "checkpoint-4")
    again = Trainer(make_model(), make_args(tmp_path, **settings, resume_from_checkpoint=True), Points()).train()
    assert (again.steps, again.loss, again.resumed_from) == (13, result.loss, tmp_path / "checkpoint-13")
    assert len(saves(tmp_path)) == 4


def test_an_epoch_is_not_saved_again_when_training_goes_on(tmp_path):
    settings = {"save_strategy": "epoch", "resume_from_checkpoint": "auto"}
    Trainer(make_model(), make_args(tmp_path, **settings, max_steps=8), Points()).train()
    result = Trainer(make_model(), make_args(tmp_path, **settings, max_steps=17), Points()).train()
    assert saves(tmp_path) == [(8, "epoch"), (16, "epoch"), (17, "final")]
    assert result.resumed_from == tmp_path / "checkpoint-8"


# ---- one step


def same_parameters(first: nn.Module, second: nn.Module, **tolerance: float) -> bool:
    pairs = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    return all(torch.allclose(one, other, **tolerance) for one, other in pairs)


def test_accumulated_micro_batches_count_as_one_batch(tmp_path):
    at_once = Trainer(make_model(), make_args(tmp_path, per_device_train_batch_size=8), Points())
    in_parts = Trainer(
        make_model(),
        make_args(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4),
        Points(),
    )
    at_once.train(), in_parts.train()
    assert same_parameters(at_once.model, in_parts.model, rtol=1e-5, atol=1e-6)
    assert [loss for _, loss in in_parts.history] == pytest.approx([loss for _, loss in at_once.history], rel=1e-5)


def test_the_last_step_of_an_epoch_takes_the_micro_batches_that_are_left(tmp_path):
    seen: list[int] = []

    class Counting(Trainer):
        def training_step(self, batches: Sequence[Any]) -> torch.Tensor:
            seen.append(len(batches))
            return super().training_step(batches)

    settings = {"max_steps": -1, "num_train_epochs": 2, "gradient_accumulation_steps": 3}
    trainer = Counting(make_model(), make_args(tmp_path, **settings), Points())
    assert trainer.total_steps == 6
    assert trainer.train().steps == 6
    assert seen == [3, 3, 2, 3, 3, 2]


def test_gradients_are_clipped_to_the_norm(tmp_path):
    model = make_model()
    before = [parameter.clone() for parameter in model.parameters()]
    args = make_args(tmp_path, max_grad_norm=0.01, max_steps=1)
    Trainer(model, args, Points(), optimizer=torch.optim.SGD(model.parameters(), lr=1.0)).train()
    moved = torch.cat([(new - old).flatten() for new, old in zip(model.parameters(), before, strict=True)])
    assert moved.norm().item() == pytest.approx(0.01, rel=1e-3)


def test_after_an_overflow_neither_weights_nor_schedule_move(tmp_path):
    def infinite_once(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        loss: torch.Tensor = model(**batch)
        return loss * math.inf if trainer.progress.step == 0 else loss

    args = make_args(tmp_path, fp16=True, max_steps=1, warmup_steps=2)
    trainer = Trainer(make_model(), args, Points(), compute_loss=infinite_once)
    trainer.train()
    assert same_parameters(trainer.model, make_model(), rtol=0, atol=0)
    assert trainer.lr_scheduler.last_epoch == 0
    assert trainer.scaler.get_scale() == 2.0**15


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_the_forward_pass_runs_in_the_precision_asked_for(tmp_path, precision):
    dtypes = []

    def loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        output = model.linear(batch["x"])
        dtypes.append(output.dtype)
        return output.float().mean()

    trainer = Trainer(make_model(), make_args(tmp_path, **{precision: True}), Points(), compute_loss=loss)
    trainer.train()
    assert set(dtypes) == {{"fp16": torch.float16, "bf16": torch.bfloat16}[precision]}
    assert all(parameter.dtype == torch.float32 for parameter in trainer.model.parameters())


def test_the_history_holds_the_mean_since_the_last_entry(tmp_path):
    each = Trainer(make_model(), make_args(tmp_path, max_steps=5), Points())
    every_second = Trainer(make_model(), make_args(tmp_path, max_steps=5, logging_steps=2), Points())
    result, _ = each.train(), every_second.train()
    losses = dict(each.history)
    assert every_second.history == [
        (2, pytest.approx((losses[1] + losses[2]) / 2)),
        (4, pytest.approx((losses[3] + losses[4]) / 2)),
    ]
    assert result.loss == losses[5]
    assert result.steps == 5


class Returns(nn.Module):
    def __init__(self, wrap: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))
        self.wrap = wrap

    def forward(self, x: torch.Tensor, y: torch.Tensor | None = None) -> Any:
        return self.wrap((x @ self.weight - (x.sum(-1) if y is None else y)).square().mean())


LOSSES = {
    "alone": lambda loss: loss,
    "first in a tuple": lambda loss: (loss, "logits"),
    "in a dict": lambda loss: {"loss": loss, "logits": None},
}
COLLATORS = {
    "dict": None,
    "tuple": lambda items: tuple(torch.stack([item[key] for item in items]) for key in "xy"),
    "tensor": lambda items: torch.stack([item["x"] for item in items]),
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("batch", COLLATORS)
def test_a_model_may_take_its_batch_and_return_its_loss_in_these_ways(tmp_path, loss, batch):
    args = make_args(tmp_path, max_steps=1)
    trainer = Trainer(Returns(LOSSES[loss]), args, Points(), data_collator=COLLATORS[batch])
    assert trainer.train().loss == pytest.approx(0.0)


@pytest.mark.parametrize("wrap", [lambda loss: None, lambda loss: loss.expand(3)], ids=["nothing", "a vector"])
def test_a_model_without_a_loss_needs_a_function(tmp_path, wrap):
    with pytest.raises(TypeError, match=r"Returns returned .* which is no loss; .* or give compute_loss="):
        Trainer(Returns(wrap), make_args(tmp_path), Points()).train()


# ---- what a trainer refuses, and what it is made of


def test_trainer_refuses_to_be_one_of_several(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match="one of 2: use DDPTrainer"):
        Trainer(make_model(), make_args(tmp_path), Points())


def test_ddp_trainer_needs_torchrun(tmp_path, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(RuntimeError, match="start it with torchrun"):
        DDPTrainer(make_model(), make_args(tmp_path), Points())


def test_a_training_step_that_gives_no_tensor_is_told_what_to_return(tmp_path):
    class Own(Trainer):
        def training_step(self, batches: Any) -> Any:
            return super().training_step(batches).item()

    with pytest.raises(TypeError, match=r"Own\.training_step returned .*; return this rank's mean loss, a tensor"):
        Own(make_model(), make_args(tmp_path), Points()).train()


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"train_dataset": Points(3)}, "3 samples do not fill one batch of 4 on each of 1 ranks"),
        ({"train_dataset": None}, "needs train_dataset="),
        ({"train_dataset": Points(), "lr_scheduler": "a schedule"}, "give that one too, as optimizer="),
    ],
)
def test_impossible_trainers_are_refused(tmp_path, options, problem):
    with pytest.raises(ValueError, match=problem):
        Trainer(make_model(), make_args(tmp_path), **options)


def declared(trainer: Trainer) -> list[tuple[str, str, str]]:
    return [(c.key, str(c.sharing_pattern), str(c.validation_level)) for c in trainer.get_state_components()]


@pytest.mark.parametrize("fp16", [False, True])
def test_one_process_declares_its_state_global_and_the_generators_last(tmp_path, fp16):
    scaler = [("scaler", "global", "none")] if fp16 else []
    assert declared(Trainer(make_model(), make_args(tmp_path, fp16=fp16), Points())) == [
        ("model", "global", "none"),
        ("optimizer", "global", "none"),
        ("scheduler", "global", "none"),
        *scaler,
        ("trainer", "global", "none"),
        ("callbacks", "per_rank", "none"),
        ("dataset", "global", "none"),
        ("rng", "per_rank", "none"),
    ]


@pytest.mark.multiprocess
@pytest.mark.parametrize("dispatch_batches", [False, True])
def test_ddp_declares_its_state_replicated_and_its_data_by_who_reads_it(tmp_path, dispatch_batches):
    def case(rank: int, world_size: int) -> list[tuple[str, str, str]]:
        return declared(DDPTrainer(make_model(), make_args(tmp_path, dispatch_batches=dispatch_batches), Points()))

    assert (
        values(run_ranks(2, case))
        == [
            [
                ("model", "replicated", "tensor"),
                ("optimizer", "replicated", "quick"),
                ("scheduler", "replicated", "quick"),
                ("trainer", "replicated", "quick"),
                ("callbacks", "per_rank", "none"),
                ("dataset", "global" if dispatch_batches else "per_rank", "none"),
                ("rng", "per_rank", "none"),
            ]
        ]
        * 2
    )


def model_names(trainer: Trainer) -> list[str]:
    (component,) = [c for c in trainer.get_state_components() if c.key == "model"]
    assert component.stateful is not None
    return list(component.stateful.state_dict())


def test_the_names_of_a_compiled_model_are_its_own(tmp_path):
    compiled = torch.compile(make_model(), backend="eager")
    trainer = Trainer(compiled, make_args(tmp_path), Points())
    assert model_names(trainer) == ["linear.weight", "linear.bias"]
    assert trainer.wrapped is compiled


def test_a_custom_optimizer_and_schedule_are_used(tmp_path):
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
    Trainer(model, make_args(tmp_path, max_steps=2), Points(), optimizer=optimizer, lr_scheduler=schedule).train()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.125)


def test_hooks_run_after_each_step_and_before_its_save(tmp_path):
    seen = []

    def hook(trainer: Trainer) -> None:
        seen.append((trainer.progress.step, len(trainer.history), len(saves(tmp_path))))

    args = make_args(tmp_path, max_steps=3, save_strategy="steps", save_steps=1)
    Trainer(make_model(), args, Points(), on_step_end=[hook]).train()
    assert seen == [(1, 1, 0), (2, 2, 1), (3, 3, 2)]


# ---- resume


@pytest.mark.parametrize("choice", [True, "latest"])
def test_b42_resuming_where_there_is_nothing_is_an_error_that_names_auto(tmp_path, choice):
    with pytest.raises(CheckpointNotFound, match='resume_from_checkpoint="auto" the run starts fresh'):
        Trainer(make_model(), make_args(tmp_path, resume_from_checkpoint=choice), Points()).train()


def test_b42_auto_starts_fresh_where_there_is_nothing(tmp_path):
    result = Trainer(make_model(), make_args(tmp_path, resume_from_checkpoint="auto"), Points()).train()
    assert (result.steps, result.resumed_from) == (4, None)


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    """A run directory with checkpoints of steps 1, 2 and 3."""
    output_dir = tmp_path_factory.mktemp("run")
    args = make_args(output_dir, max_steps=3, save_strategy="steps", save_steps=1)
    Trainer(make_model(), args, Points()).train()
    return output_dir


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (False, None),
        (True, "checkpoint-3"),
        ("latest", "checkpoint-3"),
        ("auto", "checkpoint-3"),
        (1, "checkpoint-1"),
        (2, "checkpoint-2"),
        ("path of 2", "checkpoint-2"),
    ],
)
def test_the_checkpoint_asked_for_is_taken(finished_run, choice, expected):
    if choice == "path of 2":
        choice = str(finished_run / "checkpoint-2")
    trainer = Trainer(make_model(), make_args(finished_run, resume_from_checkpoint=choice), Points())
    resumed_from = trainer.train().resumed_from
    assert resumed_from == (finished_run / expected if expected else None)
    assert trainer.history[0][0] == (int(expected[-1]) if expected else 0) + 1


def test_a_quarantined_checkpoint_is_passed_over_and_a_run_with_no_other_does_not_start_afresh(tmp_path):
    def go_on(choice: Any) -> Path | None:
        settings = {"max_steps": 3, "save_strategy": "no", "resume_from_checkpoint": choice}
        return Trainer(make_model(), make_args(tmp_path, **settings), Points()).train().resumed_from

    Trainer(make_model(), make_args(tmp_path, max_steps=2, save_strategy="steps", save_steps=1), Points()).train()
    first, second = tmp_path / "checkpoint-1", tmp_path / "checkpoint-2"
    annotate(second, lambda noted: dataclasses.replace(noted, quarantined="it diverged"))
    assert [go_on(choice) for choice in ("auto", True, 2)] == [first, first, second]
    annotate(first, lambda noted: dataclasses.replace(noted, quarantined="so did it"))
    for choice in ("auto", "latest", "best"):
        with pytest.raises(CheckpointQuarantined, match="are quarantined, checkpoint-2: it diverged; name a step"):
            go_on(choice)


@pytest.mark.parametrize("choice", [7, "checkpoint-of-elsewhere"])
def test_a_checkpoint_that_is_not_there_is_an_error(finished_run, choice):
    with pytest.raises(CheckpointError):
        Trainer(make_model(), make_args(finished_run, resume_from_checkpoint=choice), Points()).train()


def test_the_scaler_and_the_loss_window_are_taken_up(tmp_path):
    settings = {"fp16": True, "save_strategy": "steps", "save_steps": 3, "max_steps": 8, "logging_steps": 4}
    undisturbed = Trainer(make_model(), make_args(tmp_path / "a", **settings), Points())
    undisturbed.train()
    with pytest.raises(Stop):
        Trainer(make_model(), make_args(tmp_path / "b", **settings), Points(), on_step_end=[stop_at(4)]).train()
    resumed = Trainer(make_model(), make_args(tmp_path / "b", **settings, resume_from_checkpoint=True), Points())
    resumed.train()
    assert resumed.scaler.state_dict() == undisturbed.scaler.state_dict()
    assert resumed.scaler.get_scale() < 2.0**16, "the overflow of the first steps is to be remembered"
    assert resumed.history == undisturbed.history


def test_a_longer_run_may_go_on_from_a_shorter_one(tmp_path):
    settings = {"save_strategy": "steps", "resume_from_checkpoint": "auto", "lr_scheduler_type": "constant"}
    Trainer(make_model(), make_args(tmp_path, **settings, max_steps=3), Points()).train()
    longer = Trainer(make_model(), make_args(tmp_path, **settings, max_steps=6), Points())
    longer.train()
    undisturbed = Trainer(make_model(), make_args(tmp_path / "b", max_steps=6, lr_scheduler_type="constant"), Points())
    undisturbed.train()
    assert longer.history == undisturbed.history[3:]


def test_a_save_that_fails_ends_the_training_with_its_error(tmp_path):
    class Unstorable:
        def state_dict(self) -> dict[str, Any]:
            return {"hook": print}

        def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...

    class Extended(Trainer):
        def get_state_components(self) -> list[StateComponent]:
            return [*super().get_state_components(), StateComponent("extra", Unstorable(), SharingPattern.GLOBAL)]

    trainer = Extended(make_model(), make_args(tmp_path, save_strategy="steps", save_steps=2), Points())
    with pytest.raises(CheckpointError, match="hook"):
        trainer.train()
    assert trainer.progress.step == 2
    assert saves(tmp_path) == []


# ---- several processes


@pytest.mark.multiprocess
def test_ddp_trains_as_one_process_with_the_whole_batch(tmp_path):
    def case(rank: int, world_size: int) -> dict[str, torch.Tensor]:
        args = make_args(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2)
        trainer = DDPTrainer(make_model(), args, Points())
        trainer.train()
        return dict(trainer.model.state_dict()) | {"losses": torch.tensor([loss for _, loss in trainer.history])}

    alone = Trainer(make_model(), make_args(tmp_path, gradient_accumulation_steps=2), Points())
    alone.train()
    expected = dict(alone.model.state_dict()) | {"losses": torch.tensor([loss for _, loss in alone.history])}
    first, second = values(run_ranks(2, case))
    for name, tensor in expected.items():
        assert torch.equal(first[name], second[name])
        assert torch.allclose(first[name], tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.multiprocess
def test_gradients_are_exchanged_once_a_step(tmp_path):
    def case(rank: int, world_size: int) -> int:
        exchanges = []

        def counted(state: None, bucket: torch.distributed.GradBucket) -> torch.futures.Future[torch.Tensor]:
            exchanges.append(bucket.index())
            work = torch.distributed.all_reduce(bucket.buffer(), async_op=True)
            return work.get_future().then(lambda done: done.value()[0])

        trainer = DDPTrainer(make_model(), make_args(tmp_path, gradient_accumulation_steps=2), Points())
        trainer.wrapped.register_comm_hook(None, counted)
        return trainer.train().steps - len(exchanges)

    assert values(run_ranks(2, case)) == [0, 0]


class Normalised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("flags", torch.tensor([True, False]))
        self.linear = nn.Linear(4, 1)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return nn.functional.mse_loss(self.linear(self.norm(x)).squeeze(-1), y)


@pytest.mark.multiprocess
def test_models_made_differently_and_buffers_that_drift_are_saved_as_replicas(tmp_path):
    def case(rank: int, world_size: int) -> list[tuple[int, str]]:
        torch.manual_seed(rank)
        args = make_args(tmp_path, save_strategy="steps", save_steps=2)
        DDPTrainer(Normalised(), args, Points()).train()
        return saves(tmp_path)

    assert values(run_ranks(2, case)) == [[(2, "periodic"), (4, "periodic")]] * 2


def flip_at(step: int, on_rank: int) -> Callable[[Trainer], None]:
    def hook(trainer: Trainer) -> None:
        if trainer.progress.step == step and trainer.rank == on_rank:
            trainer.model.linear.weight.data.view(torch.int32)[0, 2] ^= 1 << 16

    return hook


@pytest.mark.multiprocess
@pytest.mark.parametrize("level", [None, "quick", "full"])
def test_a_copy_that_changes_between_saves_is_found_within_the_steps_asked_for(level, tmp_path):
    def case(rank: int, world_size: int) -> tuple[str, int]:
        args = make_args(tmp_path, max_steps=9, validate_replication_steps=3, validate_replication_level=level)
        trainer = DDPTrainer(Normalised(), args, Points(), on_step_end=[flip_at(4, on_rank=1)])
        with pytest.raises(ReplicaMismatch) as refused:
            trainer.train()
        return refused.value.message, trainer.progress.step

    (message, step), other = values(run_ranks(2, case))
    assert (message, step) == other
    assert step == 6
    assert "'model' differs between rank 0 and rank 1 at 'linear.weight' (first at [0, 2]" in message
    assert json.loads((tmp_path / "replication-report-6.json").read_text())["step"] == 6


@pytest.mark.multiprocess
def test_with_warn_training_goes_on_and_saves_the_majority(tmp_path):
    def case(rank: int, world_size: int) -> int:
        settings = {"save_strategy": "steps", "save_steps": 4, "validate_replication_steps": 1}
        args = make_args(tmp_path, on_replica_mismatch="warn", **settings)
        trainer = DDPTrainer(make_model(), args, Points(), on_step_end=[flip_at(4, on_rank=2)])
        trainer.train()
        return trainer.progress.step

    outcomes = run_ranks(3, case)
    assert values(outcomes) == [4] * 3
    assert CheckpointManifest.load(tmp_path / "checkpoint-4").components["model"].trusted == {"all": (0, 1)}


@pytest.mark.multiprocess
def test_ddp_makes_the_process_group_that_it_needs(tmp_path):
    def case(rank: int, world_size: int) -> tuple[str, int]:
        trainer = DDPTrainer(make_model(), make_args(tmp_path, max_steps=1), Points())
        trainer.train()
        return torch.distributed.get_backend(), trainer.world_size

    assert values(run_ranks(2, case, backend=None)) == [("gloo", 2)] * 2


@pytest.mark.multiprocess
def test_only_rank_0_needs_a_dataset_when_it_dispatches(tmp_path):
    def case(rank: int, world_size: int, dispatch_batches: bool) -> list[tuple[int, float]]:
        args = make_args(tmp_path, dispatch_batches=dispatch_batches)
        trainer = DDPTrainer(make_model(), args, Points() if rank == 0 or not dispatch_batches else None)
        trainer.train()
        return trainer.history

    dispatched = values(run_ranks(2, lambda rank, world_size: case(rank, world_size, True)))
    assert dispatched == values(run_ranks(2, lambda rank, world_size: case(rank, world_size, False)))


@pytest.mark.multiprocess
def test_a_failed_save_is_the_same_error_on_every_rank(tmp_path):
    class Divided(DDPTrainer):
        def get_state_components(self) -> list[StateComponent]:
            if self.rank == 1:
                self.model.linear.weight.data[0, 2] += 1
            return super().get_state_components()

    def case(rank: int, world_size: int) -> None:
        Divided(make_model(), make_args(tmp_path, save_strategy="steps", save_steps=2), Points()).train()

    told = errors(run_ranks(2, case))
    assert [error.type_name for error in told] == ["ReplicaMismatch"] * 2
    assert told[0].message == told[1].message
    assert "linear.weight" in told[0].message
    assert saves(tmp_path) == []
