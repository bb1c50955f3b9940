"""Training arguments that are not what they were when the checkpoint was saved, and what each change does to the run.

Every verdict is about the trainers of this package, with the optimizer and schedule that they make. Those are loaded
whole: the rates and decay that they hold are the checkpoint's, and only the shape of the schedule is code of this run.
"""

import json
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final, TypeGuard

from forgather_ckpt.errors import LoadMismatch
from forgather_ckpt.names import printable
from forgather_ckpt.redaction import is_redacted, redact


class Verdict(StrEnum):
    """What comes of a change."""

    SAME = "same"
    """There is none."""
    FINE = "fine"
    """It counts from here on, and does not change what is learned."""
    RISKY = "risky"
    """It counts from here on, and the run is another one than it would have been; or the load refuses it."""
    IGNORED = "ignored"
    """It does nothing: the checkpoint's value goes on to count, or another argument decides."""


class _NotRecorded:
    def __repr__(self) -> str:
        return "(not recorded)"


NOT_RECORDED: Final = _NotRecorded()
"""In place of a value that one side does not have."""


@dataclass(frozen=True)
class Change:
    """One argument, before and now, as plain JSON."""

    name: str
    before: Any
    after: Any
    verdict: Verdict
    why: str = ""

    @property
    def is_changed(self) -> bool:
        return self.verdict is not Verdict.SAME


@dataclass(frozen=True)
class _Resume:
    """What a rule may look at: all arguments of both sides, not only its own."""

    before: Mapping[str, Any]
    now: Mapping[str, Any]
    saved_world_size: int
    world_size: int
    step: int | None

    @property
    def is_constant(self) -> bool:
        return all(args.get("lr_scheduler_type") == "constant" for args in (self.before, self.now))

    @property
    def has_max_steps(self) -> bool:
        steps = self.now.get("max_steps")
        return _is_count(steps) and steps > 0

    def samples_per_step(self, *, saved: bool) -> int | None:
        args = self.before if saved else self.now
        size, times = args.get("per_device_train_batch_size"), args.get("gradient_accumulation_steps", 1)
        if not _is_count(size) or not _is_count(times):
            return None
        return size * times * (self.saved_world_size if saved else self.world_size)


_Judgement = tuple[Verdict, str]
_Rule = _Judgement | Callable[[_Resume], _Judgement]


def _length(run: _Resume) -> _Judgement:
    after = run.now.get("max_steps")
    if run.step is not None and _is_count(after) and 0 < after <= run.step:
        return Verdict.RISKY, f"the checkpoint is at step {run.step}: the run ends at once"
    if run.is_constant:
        return Verdict.FINE, "the rate is constant, so only the end moves"
    return Verdict.RISKY, "the schedule is stretched to the new length: the learning rate jumps after the first step"


def _epochs(run: _Resume) -> _Judgement:
    return (Verdict.IGNORED, "max_steps decides when the run ends") if run.has_max_steps else _length(run)


def _warmup(run: _Resume) -> _Judgement:
    step = run.step
    ends = (run.before.get("warmup_steps"), run.now.get("warmup_steps"))
    if run.is_constant and step is not None and all(_is_count(end) and end <= step for end in ends):
        return Verdict.IGNORED, "the warm-up is over, and the rate constant"
    return Verdict.RISKY, "the schedule counts from the run's first step: the learning rate jumps after the next one"


def _seed(run: _Resume) -> _Judgement:
    if run.saved_world_size == run.world_size:
        return Verdict.IGNORED, "order of the data and random generators are the checkpoint's"
    return (
        Verdict.FINE,
        "on another number of ranks, new random generators begin from it; the data keeps the checkpoint's order",
    )


def _device(run: _Resume) -> _Judgement:
    kinds = {str(args.get("device")).partition(":")[0] for args in (run.before, run.now)}
    if len(kinds) == 1:
        return Verdict.FINE, "the state moves there"
    return (
        Verdict.RISKY,
        "the state moves there; a device of another kind rounds otherwise (None: the accelerator, if any)",
    )


_PER_STEP = "the data position counts samples, and none is repeated or left out; see `samples per step`"
_SAVING: _Judgement = (Verdict.FINE, "it is about saving, not about training")
_EVALUATING: _Judgement = (Verdict.FINE, "evaluation does not touch the training")
_KEEPING: _Judgement = (Verdict.FINE, "which checkpoints are kept is decided anew after each save")
_STOPPING: _Judgement = (Verdict.FINE, "it is about stopping, not about training")
_CHECKING: _Judgement = (Verdict.FINE, "checks do not touch what they compare")

RULES: Mapping[str, _Rule] = {
    "output_dir": (Verdict.FINE, "new checkpoints go there; those from before stay where they are"),
    "seed": _seed,
    "max_steps": _length,
    "num_train_epochs": _epochs,
    "per_device_train_batch_size": (Verdict.FINE, _PER_STEP),
    "gradient_accumulation_steps": (Verdict.FINE, _PER_STEP),
    "learning_rate": (
        Verdict.IGNORED,
        "optimizer and schedule go on with the checkpoint's; for another rate, take the model alone (warm_start)",
    ),
    "weight_decay": (Verdict.IGNORED, "the optimizer goes on with the checkpoint's"),
    "max_grad_norm": (Verdict.RISKY, "gradients are clipped to another norm from here on"),
    "lr_scheduler_type": (Verdict.RISKY, "the learning rate jumps to the new schedule's after the next step"),
    "warmup_steps": _warmup,
    "logging_steps": (Verdict.FINE, "it is about the log alone"),
    "save_strategy": _SAVING,
    "save_steps": _SAVING,
    "save_seconds": _SAVING,
    "on_storage_error": _SAVING,
    "save_total_limit": _KEEPING,
    "preserve_best_model": _KEEPING,
    "preserve_n_best": _KEEPING,
    "best_model_metric": _KEEPING,
    "best_model_greater_is_better": _KEEPING,
    "keep_epoch_checkpoints": _KEEPING,
    "keep_emergency_checkpoints": _KEEPING,
    "eval_on_save": _EVALUATING,
    "eval_strategy": _EVALUATING,
    "eval_steps": _EVALUATING,
    "max_eval_batches": (Verdict.FINE, "metrics are over other samples from here on; training is not touched"),
    "per_device_eval_batch_size": _EVALUATING,
    "validate_replication_steps": _CHECKING,
    "validate_replication_level": _CHECKING,
    "on_replica_mismatch": (Verdict.FINE, "it says what happens when copies differ, and changes none"),
    "control_steps": _STOPPING,
    "grace_seconds": _STOPPING,
    "stop_signals": _STOPPING,
    "max_load_attempts": (Verdict.FINE, "it is about loading, not about training"),
    "checkpoint_timeout_seconds": _SAVING,
    "fp16": (Verdict.RISKY, "refused by the load: the loss scaler is in the checkpoint or in the job, not in both"),
    "bf16": (Verdict.RISKY, "the forward pass rounds otherwise from here on"),
    "dataloader_num_workers": (Verdict.FINE, "it changes who reads, not what is read"),
    "dispatch_batches": (Verdict.FINE, "it changes who reads, not which rank gets which samples"),
    "device": _device,
}
"""By argument, what a change of it does."""

NOT_COMPARED = ("resume_from_checkpoint", "strict_args")
"""Arguments about this one resume, which have no before."""


def compare_arguments(
    saved: Mapping[str, Any],
    now: Mapping[str, Any],
    *,
    saved_world_size: int,
    world_size: int,
    step: int | None = None,
) -> list[Change]:
    """All arguments of either side with a verdict each, then the world size, and the samples that a step takes.

    `saved` is what the manifest has as `training_args`, `now` what a trainer gives as such (`TrainingArguments.to_json`),
    `step` that of the checkpoint. Values from which a secret was taken out are not compared, nor are those that are about
    one resume alone (`NOT_COMPARED`). An argument that only `now` has, with a rule that calls every change of it fine, is
    fine too: the checkpoint is from before it existed.
    """
    run = _Resume(redact(saved), redact(now), saved_world_size, world_size, step)
    changes = []
    for name in dict.fromkeys((*run.before, *run.now)):
        before, after = run.before.get(name, NOT_RECORDED), run.now.get(name, NOT_RECORDED)
        if name not in NOT_COMPARED and not is_redacted(before) and not is_redacted(after):
            verdict, why = (Verdict.SAME, "") if _is_same(before, after) else _judge(name, run)
            changes.append(Change(name, before, after, verdict, why))
    return [*changes, _world_size(run), *_samples_per_step(run)]


def _judge(name: str, run: _Resume) -> _Judgement:
    rule = RULES.get(name, (Verdict.RISKY, "not known: no argument of these trainers"))
    if not isinstance(rule, tuple) and (name not in run.before or name not in run.now):
        return Verdict.RISKY, "not known on one side"
    return rule if isinstance(rule, tuple) else rule(run)


def _world_size(run: _Resume) -> Change:
    is_same = run.saved_world_size == run.world_size
    return Change(
        "world size",
        run.saved_world_size,
        run.world_size,
        Verdict.SAME if is_same else Verdict.FINE,
        "" if is_same else "the data goes on with the next sample; random generators begin anew on every rank",
    )


def _samples_per_step(run: _Resume) -> list[Change]:
    """What the optimizer sees in a step, in all; empty where the arguments do not say."""
    before, after = run.samples_per_step(saved=True), run.samples_per_step(saved=False)
    if before is None or after is None:
        return []
    if before == after:
        return [Change("samples per step", before, after, Verdict.SAME)]
    why = "a step averages over another number of samples, where each rank reads its own; the learning rate was for the old"
    if not run.has_max_steps and not run.is_constant:
        why += ", and the schedule is stretched to the new number of steps"
    return [Change("samples per step", before, after, Verdict.RISKY, why)]


def refuse_risky(changes: Sequence[Change]) -> None:
    """`LoadMismatch` that lists the risky ones, if there are any."""
    risky = [change for change in changes if change.verdict is Verdict.RISKY]
    if risky:
        raise LoadMismatch(
            "the arguments are not those of the checkpoint, and strict_args refuses changes that are risky; take the old "
            f"values, or resume without strict_args:\n{text(risky)}"
        )


def told(changes: Sequence[Change]) -> str:
    """The table for a run's log: what changed, but for what is fine. Empty where there is nothing to tell."""
    return text([change for change in changes if change.verdict in (Verdict.RISKY, Verdict.IGNORED)])


def text(changes: Sequence[Change], *, with_same: bool = False, width: int = 100) -> str:
    """A table, `width` columns wide at most, unless names and values alone take more; empty where nothing changed."""
    shown = [change for change in changes if with_same or change.is_changed]
    rows = [
        (
            printable(change.name),
            _shown(change.before),
            "→" if change.is_changed else "=",
            _shown(change.after),
            change.verdict.value,
        )
        for change in shown
    ]
    if not rows:
        return ""
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    indent = sum(widths) + 2 * len(widths)
    lines = []
    for change, row in zip(shown, rows, strict=True):
        cells = "  ".join(cell.ljust(size) for cell, size in zip(row, widths, strict=True))
        if width - indent >= 30:
            first, *rest = textwrap.wrap(change.why, width - indent) or [""]
            lines += [f"{cells}  {first}".rstrip(), *(" " * indent + line for line in rest)]
        else:
            lines += [
                cells.rstrip(),
                *textwrap.wrap(change.why, width, initial_indent="    ", subsequent_indent="    "),
            ]
    return "\n".join(lines)


_LONGEST_VALUE = 32


def _shown(value: Any) -> str:
    match value:
        case str():
            shown = printable(value)
        case float():
            shown = f"{value:.6g}"
        case _NotRecorded():
            shown = repr(value)
        case _:
            shown = printable(json.dumps(value))
    return shown if len(shown) <= _LONGEST_VALUE else f"{shown[: _LONGEST_VALUE - 1]}…"


def _is_same(before: Any, after: Any) -> bool:
    """Equal as JSON; a truth value is no number."""
    return isinstance(before, bool) == isinstance(after, bool) and bool(before == after)


def _is_count(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)
