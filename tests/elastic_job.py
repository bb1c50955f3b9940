"""Started by torchrun's agents in test_elastic.py: a job that is cut over all ranks, resumes by itself, and tells what
it read.

    elastic_job.py DIRECTORY PLAN

PLAN is JSON, by the step at which a life begins: {"0": {"world_size": 4, "stops": [5, 2]}, "4": {"world_size": 3}}.
Ranks of a life with another number of ranks wait to be ended, so that the test, and not the speed of the machine, says
how many take part. `stops`: after this step, this rank goes no further; the others find out by themselves.

Each process writes DIRECTORY/read/<its pid>, a line of JSON first about itself and then for each step that it did.
What has just been loaded is saved again, in DIRECTORY/loaded.
"""

import json
import logging
import os
import secrets
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from forgather_ckpt import CheckpointCoordinator
from forgather_ckpt.data import SeededItems
from forgather_ckpt.trainers import FSDPTrainer, Trainer, TrainingArguments
from tests.test_resume import Net, Points

NUM_STEPS, SAVE_STEPS, BATCH_SIZE = 12, 4, 3


class ManyPoints(Points):
    def __len__(self) -> int:
        return 500


class Job(FSDPTrainer):
    """Saves at once, elsewhere, what it has resumed with."""

    def after_load(self) -> None:
        with CheckpointCoordinator(self, Path(self.args.output_dir).parent / "loaded", timeout_seconds=30) as other:
            other.save_checkpoint(self.progress.step)


class Account:
    """What this process is and did, line by line in a file of its own."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(exist_ok=True)
        self._file = (directory / str(os.getpid())).open("w", buffering=1)

    def add(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line) + "\n")


def newest_step(run: Path) -> int:
    return max((int(path.name.split("-")[1]) for path in run.glob("checkpoint-*")), default=0)


def wait_for_the_end() -> None:
    while True:
        signal.pause()


def main(directory: Path, plan: dict[str, Any]) -> None:
    logging.basicConfig(format="%(message)s", stream=sys.stdout, level=logging.WARNING)
    logging.getLogger("forgather_ckpt").setLevel(logging.INFO)
    first_step = newest_step(directory / "run")
    life = plan[str(first_step)]
    if int(os.environ["WORLD_SIZE"]) != life["world_size"]:
        wait_for_the_end()

    dist.init_process_group("gloo")
    name = [secrets.token_hex(8)]
    dist.broadcast_object_list(name)
    account = Account(directory / "read")
    account.add(
        {
            "life": name[0],
            "rank": dist.get_rank(),
            "world_size": dist.get_world_size(),
            "agent": os.getppid(),
        }
    )
    samples: list[int] = []

    def loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        samples.extend(batch["id"].tolist())
        return nn.functional.mse_loss(model(batch["x"]).squeeze(-1), batch["y"])

    def tell(trainer: Trainer) -> None:
        account.add({"step": trainer.progress.step, "samples": samples})
        samples.clear()
        if [trainer.progress.step, trainer.rank] == life.get("stops"):
            wait_for_the_end()

    args = TrainingArguments(
        directory / "run",
        max_steps=NUM_STEPS,
        per_device_train_batch_size=BATCH_SIZE,
        learning_rate=0.01,
        save_steps=SAVE_STEPS,
        resume_from_checkpoint="auto",
        checkpoint_timeout_seconds=30,
    )
    # Another model in each life: what a run resumes with must come from the checkpoint.
    torch.manual_seed(first_step)
    dataset = SeededItems(ManyPoints())
    Job(Net(), args, dataset, shard=["first", "last"], compute_loss=loss, on_step_end=[tell]).train()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
