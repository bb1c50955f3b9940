#!/usr/bin/env python
"""Random signals against real jobs: each job is then resumed to its end, and compared with one that nothing disturbed.

    scripts/preemption_campaign.py --rounds 40 --seed 1

A round starts tests/preemption_job.py under torchrun, on two ranks with data workers, periodic saves and evaluations. At
a random moment, sometimes before the job has begun to train, it sends SIGTERM, SIGINT or SIGUSR1: to a rank, to both at
once or with a pause, to the process group of each, or to torchrun; perhaps twice. Then it asks

- that the job ends by itself, and leaves no process behind;
- that the ranks which had begun to train end alike: at one step, with one exit code, and with that step saved;
- that the run, resumed as by the same command, comes to the same bits.

The seed says which signals, the speed of the machine says what they hit. A table of the rounds goes to stdout; the exit
code is 1 if anything was not as it should be. A round takes about ten seconds.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from forgather_ckpt.trainers import DDPTrainer  # noqa: E402
from tests.ranks import run_ranks, values  # noqa: E402
from tests.runs import Noise, bits, kept, trainer_of  # noqa: E402
from tests.torchrun import TorchrunJob, started  # noqa: E402

NUM_RANKS, NUM_STEPS, DEADLINE_SECONDS = 2, 16, 180
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
TARGETS = ("rank 0", "rank 1", "both", "both, apart", "their groups", "torchrun")
EARLY_TARGETS = ("torchrun", "all processes")
SETTINGS = {"max_steps": NUM_STEPS, "save_steps": 4, "eval_steps": 3, "max_eval_batches": 1}
SLOW = {"step_seconds": 0.15, "save_seconds": 0.15, "dataloader_num_workers": 2, "control_steps": None}
OPTIONS = ("--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1",)


@dataclass(frozen=True)
class Disturbance:
    """Which signal, to whom, and when."""

    number: signal.Signals
    target: str
    num_times: int
    after_step: int | None
    """None: before or while the job begins."""
    delay_seconds: float
    pause_seconds: float
    """Between the ranks, and between the two times."""

    @classmethod
    def drawn(cls, draw: random.Random) -> "Disturbance":
        is_early = draw.random() < 0.15
        return cls(
            number=draw.choice(SIGNALS),
            target=draw.choice(EARLY_TARGETS if is_early else TARGETS),
            num_times=draw.choice((1, 1, 2)),
            after_step=None if is_early else draw.randrange(NUM_STEPS),
            delay_seconds=draw.uniform(0, 6 if is_early else 0.4),
            pause_seconds=draw.uniform(0, 1.2),
        )

    @property
    def moment(self) -> str:
        since = "start" if self.after_step is None else f"step {self.after_step}"
        return f"{since} + {self.delay_seconds:.2f} s"

    def send(self, job: TorchrunJob, pids: Callable[[], Mapping[int, int]]) -> None:
        for time_number in range(self.num_times):
            if time_number:
                time.sleep(self.pause_seconds)
            match self.target:
                case "torchrun":
                    job.agents[0].send_signal(self.number)
                case "all processes":
                    for pid in job.pids:
                        self._kill(pid)
                case "both, apart":
                    for number, pid in enumerate(pids().values()):
                        time.sleep(self.pause_seconds if number else 0)
                        self._kill(pid)
                case "both" | "their groups":
                    for pid in pids().values():
                        self._kill(-pid if self.target == "their groups" else pid)
                case rank:
                    if (pid := pids().get(int(rank.split()[1]))) is not None:
                        self._kill(pid)

    def _kill(self, pid: int) -> None:
        with suppress(ProcessLookupError):
            (os.kill if pid > 0 else os.killpg)(abs(pid), self.number)


@dataclass
class Round:
    """What a disturbance came to."""

    disturbance: Disturbance
    ended: str = ""
    seconds: float = 0.0
    resumed_from: int | None = None
    problems: tuple[str, ...] = ()

    def row(self, number: int) -> str:
        it = self.disturbance
        cells = [
            str(number),
            it.number.name + (" ×2" if it.num_times > 1 else ""),
            it.target,
            it.moment,
            self.ended,
            "fresh" if self.resumed_from is None else f"step {self.resumed_from}",
            "same bits" if not self.problems else "; ".join(self.problems),
        ]
        return f"| {' | '.join(cells)} |"


HEAD = "| | signal | to | at | the job ended | went on from | |\n|---|---|---|---|---|---|---|"


def train(run: Path) -> int | None:
    """Train to the end on forked ranks; the step that was resumed from."""

    def case(rank: int, world_size: int) -> Any:
        trainer = trainer_of(DDPTrainer, run, eval_dataset=Noise(8, seed=1), **SETTINGS)
        result = trainer.train()
        return result.steps, result.resumed_from and int(result.resumed_from.name.rpartition("-")[2])

    (steps, resumed_from), *others = values(run_ranks(NUM_RANKS, case, timeout=DEADLINE_SECONDS))
    assert [(steps, resumed_from)] * len(others) == others and steps == NUM_STEPS
    return resumed_from  # type: ignore[no-any-return]


def play(disturbance: Disturbance, directory: Path, undisturbed: tuple[Any, ...]) -> Round:
    result, problems = Round(disturbance), []

    def accounts() -> dict[int, dict[str, Any]]:
        found = {rank: directory / f"{rank}.json" for rank in range(NUM_RANKS)}
        return {rank: json.loads(path.read_text()) for rank, path in found.items() if path.exists()}

    def is_time() -> bool:
        if disturbance.after_step is None:
            return True
        steps = [account.get("step", -1) for account in accounts().values()]
        return len(steps) == NUM_RANKS and min(steps) >= disturbance.after_step

    script = [ROOT / "tests" / "preemption_job.py", directory, json.dumps(SETTINGS | SLOW), "--auto-resume"]
    with started(script, NUM_RANKS, options=OPTIONS, timeout=DEADLINE_SECONDS) as job:
        job.wait_until(is_time)
        time.sleep(disturbance.delay_seconds)
        sent = time.monotonic()
        disturbance.send(job, lambda: {rank: account["pid"] for rank, account in accounts().items()})
        output = job.wait().output
        result.seconds = time.monotonic() - sent
        if job.pids:
            problems.append(f"{len(job.pids)} processes were left")

    run = directory / "run"
    told = accounts()
    codes = {account.get("exit_code") for account in told.values()}
    steps = {account["step"] for account in told.values()}
    saved = kept(run) if run.is_dir() else []
    if len(told) == NUM_RANKS:
        result.ended = f"step {max(steps)}, code {', '.join(map(str, codes))}, {result.seconds:.1f} s"
        if len(codes) != 1 or not codes <= {0, 128 + disturbance.number}:
            problems.append(f"exit codes {[account.get('exit_code') for account in told.values()]}")
        elif len(steps) != 1 or max(steps) != max((step for step, _ in saved), default=0):
            problems.append(f"ended at steps {sorted(steps)}, saved {saved}")
    else:
        result.ended = f"before it trained, {result.seconds:.1f} s"
    result.resumed_from = train(run)
    if bits(run) != undisturbed:
        problems.append("OTHER BITS")
    result.problems = tuple(problems)
    if problems:
        print(output, file=sys.stderr)
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=40, metavar="N", help="how many jobs (%(default)s)")
    parser.add_argument(
        "--minutes", type=float, default=60, metavar="N", help="begin no round after this (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the signals (%(default)s)")
    options = parser.parse_args()
    draw = random.Random(options.seed)
    rounds: list[Round] = []
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as base:
        train(Path(base, "undisturbed"))
        undisturbed = bits(Path(base, "undisturbed"))
        print(HEAD, flush=True)
        while len(rounds) < options.rounds and time.monotonic() - began < options.minutes * 60:
            directory = Path(base, f"round-{len(rounds)}")
            directory.mkdir()
            rounds.append(play(Disturbance.drawn(draw), directory, undisturbed))
            print(rounds[-1].row(len(rounds)), flush=True)
    failed = [one for one in rounds if one.problems]
    longest = max((one.seconds for one in rounds), default=0.0)
    print(f"{len(rounds)} rounds, {len(failed)} with problems; from a signal to the end at most {longest:.1f} s")
    return 1 if failed or not rounds else 0


if __name__ == "__main__":
    sys.exit(main())
