"""Train a small GPT on the sources of Python's standard library; copy this file to begin your own."""

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import Subset

from forgather_ckpt.callbacks import DualTimeScaleDivergenceDetector
from forgather_ckpt.demo import losses
from forgather_ckpt.demo.gpt import GPT
from forgather_ckpt.demo.kill import KillInSave
from forgather_ckpt.demo.text import StandardLibrary
from forgather_ckpt.errors import CheckpointError
from forgather_ckpt.resume_arguments import add_resume_arguments, resume_choice
from forgather_ckpt.trainers import DDPTrainer, Trainer, TrainingArguments
from forgather_ckpt.trainers.schedule import is_multiple

EXAMPLE = """\
  torchrun --standalone --nproc-per-node 2 -m forgather_ckpt.demo --auto-resume --output-dir runs/demo

trains on two processes, on GPUs where there are any. Stop it at any time and start it again: it goes on from its
newest good checkpoint. Without torchrun (python -m forgather_ckpt.demo) it trains in one process.
"""


def main(argv: Sequence[str] | None = None) -> int | str:
    options = parse(argv)
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    # rank 0 speaks for all: where it resumed from, what it passed over, the loss, what it saved
    logging.basicConfig(format="%(message)s", stream=sys.stdout, level=logging.ERROR if rank else logging.WARNING)
    logging.getLogger("forgather_ckpt").setLevel(logging.ERROR if rank else logging.INFO)
    be_deterministic()
    if options.backend is not None:
        dist.init_process_group(options.backend)

    torch.manual_seed(options.seed)
    model = GPT(context=options.context, width=options.width, num_heads=options.heads, num_layers=options.layers)
    text = StandardLibrary(options.context)
    to_learn, to_judge = held_out(text) if options.eval_steps else (text, None)
    dataset = to_learn if rank == 0 or not options.dispatch_batches else None
    hooks: list[Callable[[Trainer], None]] = [log_losses(Path(options.output_dir))] if rank == 0 else []
    if options.kill_in_save is not None and rank == min(1, world_size - 1):
        hooks.append(KillInSave(options.kill_in_save))
    if options.spoil_at is not None:
        hooks.append(spoil(options.spoil_at))
    callbacks = [DualTimeScaleDivergenceDetector(threshold="10%", short_alpha=0.5)] if options.eval_steps else []

    kind = DDPTrainer if "RANK" in os.environ else Trainer
    trainer = kind(
        model, training_arguments(options), dataset, eval_dataset=to_judge, callbacks=callbacks, on_step_end=hooks
    )
    if rank == 0:
        print(describe(trainer), flush=True)
    try:
        result = trainer.train()
    except CheckpointError as err:
        # the same error on every rank, so one tells it
        return 1 if rank else f"{type(err).__name__}: {err}"
    if rank == 0:
        print(f"done: step {result.steps}, loss {result.loss:.4f}")
    if dist.is_initialized():
        dist.destroy_process_group()
    return result.exit_code


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m forgather_ckpt.demo",
        usage="%(prog)s [options]\n\n" + EXAMPLE,
    )
    add = parser.add_argument
    add("--output-dir", default="runs/demo", metavar="DIR", help="the run: its checkpoints, losses.txt (%(default)s)")
    add("--max-steps", type=int, default=60, metavar="N", help="steps of the whole run, resumed or not (%(default)s)")
    add("--save-steps", type=int, default=20, metavar="N", help="save at its multiples, and at the end (%(default)s)")
    add("--logging-steps", type=int, default=5, metavar="N", help="print the mean loss every N steps (%(default)s)")
    add("--per-device-train-batch-size", type=int, default=8, metavar="N", help="windows of a process (%(default)s)")
    add("--learning-rate", type=float, default=2e-3, metavar="X", help="at its highest, after warmup (%(default)s)")
    add_resume_arguments(parser)
    add(
        "--eval-steps",
        type=int,
        default=0,
        metavar="N",
        help="every N steps, judge the model on text that it is not taught, and end the training if that gets lastingly "
        "worse; 0: teach all of the text (%(default)s)",
    )
    add("--preserve-n-best", type=int, default=0, metavar="N", help="keep the N best beside the newest (%(default)s)")
    add("--save-total-limit", type=int, default=10, metavar="N", help="keep the N newest (%(default)s)")
    add("--dispatch-batches", action="store_true", help="rank 0 reads the text for all ranks")
    add("--bf16", action="store_true", help="forward passes in bfloat16")
    add("--device", metavar="NAME", help="cpu, cuda or cuda:0 (each process its own GPU where there are any)")
    add("--backend", choices=("nccl", "gloo"), help="gloo lets processes share one GPU (nccl for GPUs, else gloo)")
    add("--seed", type=int, default=42, metavar="N", help="of weights, order of the text, dropout (%(default)s)")
    add("--timeout", type=float, default=120, metavar="SECONDS", help="for a silent rank in a save (%(default)s)")
    add("--context", type=int, default=128, metavar="N", help="bytes that the model sees (%(default)s)")
    add("--width", type=int, default=192, metavar="N", help="of the model (%(default)s)")
    add("--heads", type=int, default=6, metavar="N", help="of its attention (%(default)s)")
    add("--layers", type=int, default=3, metavar="N", help="of the model (%(default)s)")
    add(
        "--kill-in-save",
        type=int,
        metavar="STEP",
        help="for demonstrations only: rank 1 (or the only one) kills itself by SIGKILL in the middle of writing the "
        "checkpoint of this step, if the run began at step 1; started again, it survives",
    )
    add(
        "--spoil-at",
        type=int,
        metavar="STEP",
        help="for demonstrations only: after this step the learning rate is a hundred times as high",
    )
    options = parser.parse_args(argv)
    if options.width % options.heads:
        parser.error(f"--width {options.width} is not a multiple of --heads {options.heads}")
    if options.backend is not None and "RANK" not in os.environ:
        parser.error("--backend is for several processes: start it with torchrun")
    if (step := options.kill_in_save) is not None and not is_multiple(step, options.save_steps):
        parser.error(f"--kill-in-save {step}: nothing is saved at that step, only every {options.save_steps}")
    if options.preserve_n_best and not options.eval_steps:
        parser.error("--preserve-n-best needs --eval-steps: without evaluations there is no best")
    try:
        training_arguments(options)
    except ValueError as err:
        parser.error(str(err))
    return options


def training_arguments(options: argparse.Namespace) -> TrainingArguments:
    return TrainingArguments(
        output_dir=options.output_dir,
        seed=options.seed,
        max_steps=options.max_steps,
        per_device_train_batch_size=options.per_device_train_batch_size,
        learning_rate=options.learning_rate,
        weight_decay=0.1,
        lr_scheduler_type="cosine",
        warmup_steps=10,
        logging_steps=options.logging_steps,
        save_steps=options.save_steps,
        save_total_limit=options.save_total_limit,
        eval_strategy="steps" if options.eval_steps else "no",
        eval_steps=max(1, options.eval_steps),
        max_eval_batches=10,
        eval_on_save=options.preserve_n_best > 0,
        preserve_best_model=options.preserve_n_best > 0,
        preserve_n_best=max(1, options.preserve_n_best),
        resume_from_checkpoint=resume_choice(options),
        strict_args=options.strict_args,
        bf16=options.bf16,
        dispatch_batches=options.dispatch_batches,
        device=options.device,
        checkpoint_timeout_seconds=options.timeout,
    )


def be_deterministic() -> None:
    """Equal inputs give equal bits, on GPUs too; without it a resumed run is right, but not the same to the bit."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
    torch.use_deterministic_algorithms(True)


def log_losses(run: Path) -> Callable[[Trainer], None]:
    """A hook that writes the loss of every step. It waits for the device at each: fit for a demonstration."""
    is_first = True

    def hook(trainer: Trainer) -> None:
        nonlocal is_first
        if is_first:
            losses.cut(run, before=trainer.progress.step)
            is_first = False
        losses.append(run, trainer.progress.step, trainer.progress.last_loss.item())

    return hook


def spoil(step: int) -> Callable[[Trainer], None]:
    """A hook that makes the learning rate a hundred times as high."""

    def hook(trainer: Trainer) -> None:
        schedule = trainer.lr_scheduler
        if trainer.progress.step == step:
            schedule.base_lrs = [100 * rate for rate in schedule.base_lrs]

    return hook


def held_out(text: StandardLibrary) -> tuple[Subset[Any], Subset[Any]]:
    """What is taught, and the twentieth at the end by which the model is judged."""
    size = len(text) - len(text) // 20
    return Subset(text, range(size)), Subset(text, range(size, len(text)))  # type: ignore[arg-type]


def describe(trainer: Trainer) -> str:
    num_parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    return (
        f"{num_parameters:,} parameters, {trainer.loader.position.num_samples:,} windows of text, "
        f"{trainer.world_size} x {trainer.device.type}, {trainer.total_steps} steps"
    )


if __name__ == "__main__":
    sys.exit(main())
