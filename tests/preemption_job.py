"""Started by torchrun in test_preemption.py and by scripts/preemption_campaign.py: a small job that takes its time.

    preemption_job.py DIRECTORY SETTINGS

SETTINGS are JSON: arguments of the training, and for tests `step_seconds` (how long a step takes), `save_seconds` (how
long the state is taken for a save) and `dies_at` (the step of the checkpoint on which each rank dies while it loads it).
Resuming is asked for as with `add_resume_arguments`: "--auto-resume", "--fresh", or nothing.

The run is DIRECTORY/run. Each rank keeps DIRECTORY/<rank>.json: its process, the steps that it has done, and in the end
its exit code.
"""

import argparse
import json
import logging
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from forgather_ckpt import CheckpointError
from forgather_ckpt.callbacks import TrainerCallback
from forgather_ckpt.resume_arguments import add_resume_arguments, resume_choice
from forgather_ckpt.trainers import DDPTrainer
from tests.runs import Noise, trainer_of


class Account(TrainerCallback):
    """Tells where this rank is."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.facts: dict[str, Any] = {"pid": os.getpid()}

    def tell(self, **facts: Any) -> None:
        self.facts |= facts
        aside = self.path.with_suffix(f".{os.getpid()}")
        aside.write_text(json.dumps(self.facts))
        aside.rename(self.path)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.tell(resumed_from=state.global_step, step=state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.tell(step=state.global_step)


class Slow(TrainerCallback):
    """Makes steps and saves take their time, and loads of one checkpoint deadly."""

    def __init__(self, step_seconds: float, save_seconds: float, dies_at: int | None) -> None:
        self.step_seconds, self.save_seconds, self.dies_at = step_seconds, save_seconds, dies_at
        self.step = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.step = state.global_step
        time.sleep(self.step_seconds)

    def state_dict(self) -> dict[str, Any]:
        time.sleep(self.save_seconds)
        return {"step": self.step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.step = state["step"]
        if self.step == self.dies_at:
            os._exit(9)


def main() -> int | str:
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    parser.add_argument("settings", type=json.loads)
    add_resume_arguments(parser)
    options = parser.parse_args()
    logging.basicConfig(format="%(message)s", stream=sys.stdout, level=logging.WARNING)
    settings = options.settings
    slow = Slow(settings.pop("step_seconds", 0.0), settings.pop("save_seconds", 0.0), settings.pop("dies_at", None))
    account = Account(options.directory / f"{os.environ['RANK']}.json")
    trainer = trainer_of(
        DDPTrainer,
        options.directory / "run",
        resume_from_checkpoint=resume_choice(options),
        callbacks=[account, slow],
        eval_dataset=Noise(8, seed=1),
        **settings,
    )
    try:
        result = trainer.train()
    except CheckpointError as err:
        account.tell(error=f"{type(err).__name__}: {err}")
        return 1 if trainer.rank else f"{type(err).__name__}: {err}"  # all ranks have the same one
    account.tell(exit_code=result.exit_code, step=result.steps)
    dist.destroy_process_group()
    return result.exit_code


if __name__ == "__main__":
    sys.exit(main())
