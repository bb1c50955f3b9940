"""Changed arguments: the verdict on each, and that a resumed run bears it out."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from forgather_ckpt.changes import (
    NOT_COMPARED,
    NOT_RECORDED,
    RULES,
    Change,
    Verdict,
    compare_arguments,
    refuse_risky,
    told,
)
from forgather_ckpt.changes import text as table
from forgather_ckpt.errors import LoadMismatch
from forgather_ckpt.manifest import CheckpointManifest
from forgather_ckpt.redaction import REDACTED
from forgather_ckpt.trainers import Trainer, TrainingArguments
from tests.test_trainers import Points

FINE, RISKY, IGNORED, SAME = Verdict.FINE, Verdict.RISKY, Verdict.IGNORED, Verdict.SAME

STEP = 4
BEGUN: dict[str, Any] = {
    "max_steps": 12,
    "per_device_train_batch_size": 4,
    "learning_rate": 0.1,
    "weight_decay": 0.01,
    "warmup_steps": 2,
    "save_steps": STEP,
    "device": "cpu",
}
CONSTANT: dict[str, Any] = {"lr_scheduler_type": "constant"}


def arguments(**settings: Any) -> dict[str, Any]:
    return TrainingArguments("runs/a", **{**BEGUN, **settings}).to_json()


def verdicts(
    before: dict[str, Any], now: dict[str, Any], *, ranks: tuple[int, int] = (1, 1), step: int = STEP
) -> dict[str, Verdict]:
    changes = compare_arguments(before, now, saved_world_size=ranks[0], world_size=ranks[1], step=step)
    return {change.name: change.verdict for change in changes if change.is_changed}


def test_every_argument_has_a_rule() -> None:
    names = {field.name for field in dataclasses.fields(TrainingArguments)}
    assert names == {*RULES, *NOT_COMPARED}


@pytest.mark.parametrize(
    ("before", "now", "ranks", "expected"),
    [
        ({}, {}, (1, 1), {}),
        ({}, {"learning_rate": 1.0, "weight_decay": 0.5}, (1, 1), {"learning_rate": IGNORED, "weight_decay": IGNORED}),
        ({}, {"save_steps": 5, "logging_steps": 7}, (1, 1), {"save_steps": FINE, "logging_steps": FINE}),
        ({}, {"seed": 1}, (1, 1), {"seed": IGNORED}),
        ({}, {"seed": 1}, (2, 2), {"seed": IGNORED}),
        (
            {},
            {"seed": 1, "per_device_train_batch_size": 2},
            (2, 4),
            {"seed": FINE, "per_device_train_batch_size": FINE, "world size": FINE},
        ),
        ({}, {}, (2, 4), {"world size": FINE, "samples per step": RISKY}),
        (
            {},
            {"per_device_train_batch_size": 8},
            (1, 1),
            {"per_device_train_batch_size": FINE, "samples per step": RISKY},
        ),
        (
            {},
            {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
            (1, 1),
            {"per_device_train_batch_size": FINE, "gradient_accumulation_steps": FINE},
        ),
        ({}, {"max_steps": 24}, (1, 1), {"max_steps": RISKY}),
        (CONSTANT, {**CONSTANT, "max_steps": 24}, (1, 1), {"max_steps": FINE}),
        (CONSTANT, {**CONSTANT, "max_steps": 4}, (1, 1), {"max_steps": RISKY}),
        ({}, {"num_train_epochs": 9}, (1, 1), {"num_train_epochs": IGNORED}),
        ({"max_steps": -1}, {"max_steps": -1, "num_train_epochs": 9}, (1, 1), {"num_train_epochs": RISKY}),
        ({}, {"warmup_steps": 0}, (1, 1), {"warmup_steps": RISKY}),
        (CONSTANT, {**CONSTANT, "warmup_steps": 4}, (1, 1), {"warmup_steps": IGNORED}),
        (CONSTANT, {**CONSTANT, "warmup_steps": 5}, (1, 1), {"warmup_steps": RISKY}),
        ({}, {"device": "cuda:1"}, (1, 1), {"device": RISKY}),
        ({"device": "cuda:0"}, {"device": "cuda:1"}, (1, 1), {"device": FINE}),
        ({}, {"resume_from_checkpoint": "auto", "strict_args": True}, (1, 1), {}),
    ],
)
def test_verdicts(before: Any, now: Any, ranks: tuple[int, int], expected: dict[str, Verdict]) -> None:
    assert verdicts(arguments(**before), arguments(**now), ranks=ranks) == expected


@pytest.mark.parametrize(
    ("before", "now", "expected"),
    [
        ({"width": 4}, {"width": 8}, {"width": RISKY}),
        ({"width": 4}, {}, {"width": RISKY}),
        ({}, {"save_seconds": 5.0}, {"save_seconds": FINE}),
        ({}, {"seed": 5}, {"seed": RISKY}),
        ({"max_grad_norm": 1}, {"max_grad_norm": 1.0}, {}),
        ({"bf16": True}, {"bf16": 1}, {"bf16": RISKY}),
        ({"shape": [1, 2]}, {"shape": (1, 2)}, {}),
        ({"x": {"$float": "nan"}}, {"x": float("nan")}, {}),
        ({"hub_token": REDACTED}, {"hub_token": "another"}, {}),
        ({"data": f"https{REDACTED}host"}, {"data": "https://host"}, {}),
        ({"list": [REDACTED, 1]}, {"list": ["a", 2]}, {}),
    ],
)
def test_what_the_rules_do_not_know_is_compared_as_plain_json(before: Any, now: Any, expected: Any) -> None:
    assert verdicts(before, now) == expected


def test_the_secrets_of_this_run_are_in_no_change() -> None:
    changes = compare_arguments({}, {"hub_token": "hush"}, saved_world_size=1, world_size=1)
    assert "hush" not in repr(changes)


def test_the_reasons_say_numbers() -> None:
    changes = compare_arguments(arguments(), arguments(max_steps=3), saved_world_size=1, world_size=1, step=STEP)
    assert "step 4: the run ends at once" in table(changes)


# ---- what the trainer really does


class Dropping(nn.Module):
    """Draws random numbers in the forward pass, so that a resume with other generators is seen."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.3), nn.Linear(8, 1))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return nn.functional.mse_loss(self.layers(x).squeeze(-1).float(), y)


def run(directory: Path, **settings: Any) -> tuple[torch.Tensor, list[float]]:
    """The weights at the end, and the learning rate after each step."""
    torch.manual_seed(0)
    rates: list[float] = []

    def remember(trainer: Trainer) -> None:
        rates.append(trainer.optimizer.param_groups[0]["lr"])

    args = TrainingArguments(directory, **{**BEGUN, **settings})
    trainer = Trainer(Dropping(), args, Points(64), on_step_end=[remember])
    trainer.train()
    return torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()]), rates


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("begun")
    run(directory)
    return directory / f"checkpoint-{STEP}"


@pytest.fixture(scope="module")
def undisturbed(begun: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[torch.Tensor, list[float]]:
    return resume(begun, tmp_path_factory.mktemp("undisturbed"))


def resume(begun: Path, directory: Path, **settings: Any) -> tuple[torch.Tensor, list[float]]:
    shutil.copytree(begun, directory / begun.name)
    return run(directory, resume_from_checkpoint=STEP, save_strategy="no", **settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"learning_rate": 1.0},
        {"weight_decay": 0.5},
        {"seed": 1},
        {"num_train_epochs": 9},
        {"dispatch_batches": True},
        {"logging_steps": 1},
        {"checkpoint_timeout_seconds": 60.0},
        {"max_grad_norm": 0.01},
        {"lr_scheduler_type": "constant"},
        {"warmup_steps": 0},
        {"max_steps": 24},
        {"max_steps": 3},
        {"per_device_train_batch_size": 8},
        {"gradient_accumulation_steps": 2},
        {"bf16": True},
        {"fp16": True},
    ],
    ids=lambda settings: "-".join(f"{name}={value}" for name, value in settings.items()),
)
def test_the_verdict_is_what_a_resumed_run_shows(
    begun: Path, undisturbed: tuple[torch.Tensor, list[float]], tmp_path: Path, settings: dict[str, Any]
) -> None:
    saved = CheckpointManifest.load(begun)
    changes = compare_arguments(
        saved.training_args, arguments(**settings), saved_world_size=1, world_size=1, step=saved.step
    )
    is_risky = any(change.verdict is RISKY for change in changes if change.name != "output_dir")
    try:
        weights, rates = resume(begun, tmp_path, **settings)
    except LoadMismatch as err:
        assert is_risky
        assert "scaler" in err.message
    else:
        assert torch.equal(weights, undisturbed[0]) != is_risky
        assert is_risky or rates == undisturbed[1]


def test_a_longer_run_stretches_the_schedule_and_the_rate_jumps(
    begun: Path, undisturbed: tuple[torch.Tensor, list[float]], tmp_path: Path
) -> None:
    _, rates = resume(begun, tmp_path, max_steps=24)
    assert undisturbed[1][0] == pytest.approx(0.07)  # after step 5 of 12, 2 of them warm-up: 0.1 * 7/10
    assert rates[0] == pytest.approx(0.1 * 19 / 22)


# ---- what is shown


def some() -> list[Change]:
    return compare_arguments(
        arguments(), arguments(learning_rate=1.0, save_steps=5, max_steps=24), saved_world_size=1, world_size=1
    )


def test_the_table_has_what_changed() -> None:
    lines = table(some(), width=200).splitlines()
    assert [line.split()[:5] for line in lines] == [
        ["max_steps", "12", "→", "24", "risky"],
        ["learning_rate", "0.1", "→", "1", "ignored"],
        ["save_steps", "4", "→", "5", "fine"],
    ]
    assert "the learning rate jumps" in lines[0]


def test_asked_for_the_table_has_the_others_too() -> None:
    shown = table(some(), with_same=True)
    assert "world size" in shown
    assert " =  " in shown
    assert table([]) == ""


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_table_fits_a_terminal(width: int) -> None:
    changes = [*some(), Change("name", "long " * 40, "\x1b[31m" * 20, RISKY, "because " * 40)]
    shown = table(changes, width=width)
    assert "\x1b" not in shown
    longest_cells = 13 + 32 + 32 + 7 + 1 + 8
    assert max(map(len, shown.splitlines())) <= max(width, longest_cells)
    assert max(len(line) for line in table(some(), width=width).splitlines()) <= width


def test_what_one_side_lacks_is_said() -> None:
    shown = table([Change("width", NOT_RECORDED, 8, RISKY, "why")])
    assert shown.split() == ["width", "(not", "recorded)", "→", "8", "risky", "why"]


def test_a_log_is_told_of_what_is_not_fine() -> None:
    assert [line.split()[0] for line in told(some()).splitlines() if not line.startswith(" ")] == [
        "max_steps",
        "learning_rate",
    ]
    assert told([change for change in some() if change.verdict is FINE]) == ""


def test_risky_changes_are_refused_and_no_others() -> None:
    with pytest.raises(LoadMismatch, match=r"(?s)resume without strict_args:\nmax_steps +12 +→ +24") as caught:
        refuse_risky(some())
    assert "learning_rate" not in caught.value.message.replace("the learning rate", "")
    refuse_risky([change for change in some() if change.verdict is not RISKY])
