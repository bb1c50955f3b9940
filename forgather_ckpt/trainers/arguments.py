"""What a training run is told: names and defaults as in Hugging Face's `TrainingArguments`, where they exist."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from forgather_ckpt.policies import Policy
from forgather_ckpt.retention import from_arguments, refuse_replaced
from forgather_ckpt.signals import signal_numbers
from forgather_ckpt.triggers import SaveSchedule

STRATEGIES = ("no", "steps", "epoch")
CHECK_LEVELS = ("quick", "tensor", "full")
LR_SCHEDULERS = ("constant", "linear", "cosine")


@dataclass(frozen=True)
class TrainingArguments:
    """Settings of one run; refused here, with what to write instead, rather than hours later."""

    output_dir: str | Path
    seed: int = 42

    max_steps: int = -1
    """Optimizer steps of the whole run, those before a resume included; -1: as many as `num_train_epochs` has."""
    num_train_epochs: int = 3
    per_device_train_batch_size: int = 8
    gradient_accumulation_steps: int = 1

    learning_rate: float = 5e-5
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm; 0 clips nothing."""
    lr_scheduler_type: str = "linear"
    warmup_steps: int = 0

    logging_steps: int = 500

    eval_strategy: str = "steps"
    """When the evaluation dataset is gone through, where there is one: "no", "steps" or "epoch"."""
    eval_steps: int = 250
    """With "steps": evaluate when the step number is a multiple of this."""
    max_eval_batches: int | None = 50
    """Of each rank, the first of the dataset; None for all."""
    per_device_eval_batch_size: int | None = None
    """None: that of training."""

    save_strategy: str = "steps"
    save_steps: int = 500
    """With "steps": save when the step number is a multiple of this, so that a resume keeps the grid."""
    save_seconds: float | None = None
    """Save too whenever training has gone on for a multiple of so many seconds, over all lives of the run."""
    on_storage_error: Literal["warn", "error"] = "warn"
    """When the file system fails in a save, as on a full disk: "warn" goes on and tries again when the next one is due;
    the last save of a run is always an error."""
    eval_on_save: bool = False
    """Evaluate before each save, so that every checkpoint can be among the best."""
    save_total_limit: int | None = 10
    """How many of the newest checkpoints are kept, beside the best and the others below; None: all."""
    preserve_best_model: bool = False
    preserve_n_best: int = 1
    best_model_metric: str = "loss"
    """Of the evaluation: "loss" is `eval_loss`."""
    best_model_greater_is_better: bool | None = None
    """None: the metric's name tells."""
    keep_epoch_checkpoints: bool | int = False
    """True for all that are saved at the ends of epochs, or how many; with "steps" they are saved too, then."""
    keep_emergency_checkpoints: int = 10
    """Those that were saved after a signal, beside the newest."""

    stop_signals: Sequence[str] = ("SIGTERM", "SIGINT", "SIGUSR1")
    """On any rank: the training ends with an emergency checkpoint."""
    grace_seconds: float = 30.0
    """What remains between a signal and the kill; a save that takes longer is warned of."""
    control_steps: int | None = None
    """Every so many steps the ranks look whether one of them is to stop or to save; None: about once a second."""

    validate_replication_steps: int = 0
    """Compare the ranks' copies every so many steps too, not only at saves; 0: only at saves."""
    validate_replication_level: str | None = None
    """Of these checks: "quick", "tensor" or "full"; None: what each component says."""
    on_replica_mismatch: Literal["error", "warn"] = "error"
    """When copies differ: "error" ends the training, "warn" goes on, and saves store the majority's."""
    resume_from_checkpoint: bool | int | str | Path | None = None
    """"auto": the newest good checkpoint, a fresh start if there is none; True or "latest": an error if there is none;
    "best"; a step (int) or a path: exactly that one; False: a fresh start. None: where there are checkpoints, the person
    at the terminal is asked, and without a terminal it is an error."""
    max_load_attempts: int = 3
    """A newest checkpoint on which the job has died so often while it loaded it is passed over."""
    strict_args: bool = False
    """Refuse to resume with arguments that are risky to change; else they are told."""

    fp16: bool = False
    bf16: bool = False
    dataloader_num_workers: int = 0
    dispatch_batches: bool = False
    """Rank 0 reads the data for all ranks. It changes who reads, not which rank gets which samples."""
    device: str | None = None
    """None: the accelerator of this process if there is one, else the CPU."""
    checkpoint_timeout_seconds: float = 600.0

    def __new__(cls, *_: Any, **given: Any) -> "TrainingArguments":
        refuse_replaced(given)
        for name in given.keys() & _ELSEWHERE.keys():
            raise ValueError(f"{name}={given[name]!r} is not an argument here: {_ELSEWHERE[name]}")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for name, least in _AT_LEAST.items():
            value = getattr(self, name)
            if value is None and name in _OPTIONAL:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be a whole number of at least {least}, not {value!r}")
        for name in ("learning_rate", "weight_decay", "max_grad_norm"):
            value = getattr(self, name)
            if not _is_number(value) or not 0 <= value < float("inf"):
                raise ValueError(f"{name} must be a finite number of at least 0, not {value!r}")
        for name in ("fp16", "bf16", "dispatch_batches", "eval_on_save", "strict_args"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, not {getattr(self, name)!r}")
        if (
            isinstance(self.max_steps, bool)
            or not isinstance(self.max_steps, int)
            or (self.max_steps < 1 and self.max_steps != -1)
        ):
            raise ValueError(
                f"max_steps must be at least 1, or -1 to train for num_train_epochs, not {self.max_steps!r}"
            )
        for name in ("save_strategy", "eval_strategy"):
            if getattr(self, name) not in STRATEGIES:
                raise ValueError(f"{name} must be one of {', '.join(STRATEGIES)}, not {getattr(self, name)!r}")
        if not _is_number(self.grace_seconds) or not self.grace_seconds > 0:
            raise ValueError(f"grace_seconds must be above 0, not {self.grace_seconds!r}")
        signal_numbers(self.stop_signals, "stop_signals")
        self.retention_policy()
        if self.preserve_n_best != 1 and not self.preserve_best_model:
            raise ValueError(
                f"preserve_n_best={self.preserve_n_best!r} keeps nothing by itself; write preserve_best_model=True, "
                f"preserve_n_best={self.preserve_n_best!r}"
            )
        if self.keep_epoch_checkpoints and self.save_strategy == "no":
            raise ValueError(
                f"keep_epoch_checkpoints={self.keep_epoch_checkpoints!r} has none to keep with save_strategy=\"no\"; write "
                '"epoch", or "steps" to save in between too'
            )
        self.save_schedule()
        if self.lr_scheduler_type not in LR_SCHEDULERS:
            raise ValueError(
                f"lr_scheduler_type must be one of {', '.join(LR_SCHEDULERS)}, not {self.lr_scheduler_type!r}; "
                "any other one is made by hand and given to the trainer as lr_scheduler="
            )
        if self.validate_replication_level not in (None, *CHECK_LEVELS):
            raise ValueError(
                f"validate_replication_level must be one of {', '.join(CHECK_LEVELS)}, or None for what each component says, "
                f"not {self.validate_replication_level!r}"
            )
        if self.on_replica_mismatch not in ("error", "warn"):
            raise ValueError(f'on_replica_mismatch must be "error" or "warn", not {self.on_replica_mismatch!r}')
        if self.on_storage_error not in ("error", "warn"):
            raise ValueError(f'on_storage_error must be "error" or "warn", not {self.on_storage_error!r}')
        if self.fp16 and self.bf16:
            raise ValueError("fp16 and bf16 exclude each other; on hardware that has both, bf16 needs no loss scaling")
        if not _is_number(self.checkpoint_timeout_seconds) or not self.checkpoint_timeout_seconds > 0:
            raise ValueError(f"checkpoint_timeout_seconds must be above 0, not {self.checkpoint_timeout_seconds!r}")
        self._check_resume()

    def _check_resume(self) -> None:
        match self.resume_from_checkpoint:
            case None | bool() | Path():
                pass
            case int(step) if step < 0:
                raise ValueError(f"resume_from_checkpoint={step} is no step; write False to start fresh")
            case str(text) if text == "" or text.isdigit():
                raise ValueError(
                    f"resume_from_checkpoint={text!r}: write a step as a number, resume_from_checkpoint=1000, "
                    'or "latest", "auto", or a path'
                )
            case int() | str():
                pass
            case other:
                raise ValueError(
                    f"resume_from_checkpoint={other!r} is a {type(other).__name__}: write True, False, a step as a number, "
                    '"latest", "auto", or a path'
                )

    def retention_policy(self) -> Policy:
        """Which checkpoints are kept."""
        return from_arguments(
            save_total_limit=self.save_total_limit,
            preserve_best_model=self.preserve_best_model,
            preserve_n_best=self.preserve_n_best,
            best_model_metric=self.best_model_metric,
            best_model_greater_is_better=self.best_model_greater_is_better,
            keep_epoch_checkpoints=self.keep_epoch_checkpoints,
            keep_emergency_checkpoints=self.keep_emergency_checkpoints,
        )

    def save_schedule(self) -> SaveSchedule:
        """When checkpoints are saved."""
        return SaveSchedule(
            steps=self.save_steps if self.save_strategy == "steps" else None,
            epochs=self.save_strategy == "epoch" or bool(self.keep_epoch_checkpoints),
            seconds=self.save_seconds,
            at_end=self.save_strategy != "no",
        )

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        """The dtype of the forward pass under mixed precision, None without it."""
        return torch.float16 if self.fp16 else torch.bfloat16 if self.bf16 else None

    def to_json(self) -> dict[str, Any]:
        """The settings as plain data, for the manifest."""
        return {name: str(value) if isinstance(value, Path) else value for name, value in asdict(self).items()}


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


_ELSEWHERE = {
    "evaluation_strategy": "write eval_strategy=",
    "overwrite_output_dir": "write resume_from_checkpoint=False to start over, and remove what is there by hand",
    "report_to": "give the trainer callbacks=[JsonlLogger()], or TensorBoardLogger()",
    "no_cuda": 'write device="cpu"',
    "use_cpu": 'write device="cpu"',
}
"""What Hugging Face's trainer takes and is said in another way here."""

_AT_LEAST = {
    "seed": 0,
    "num_train_epochs": 1,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "warmup_steps": 0,
    "logging_steps": 1,
    "save_steps": 1,
    "eval_steps": 1,
    "max_eval_batches": 1,
    "per_device_eval_batch_size": 1,
    "control_steps": 1,
    "max_load_attempts": 1,
    "validate_replication_steps": 0,
    "dataloader_num_workers": 0,
}

_OPTIONAL = {"max_eval_batches", "per_device_eval_batch_size", "control_steps"}
