"""Jobs that are interrupted: by signals of every kind at every moment, by ranks that die or are late, by loads that kill
them, and by requests. Whatever happens, the same command comes to the bits of a run that nothing disturbed.

Ranks are forked where the launcher does not matter; the others are preemption_job.py under torchrun.
"""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from forgather_ckpt import annotations, catalog, paths
from forgather_ckpt.callbacks import TrainerCallback
from forgather_ckpt.deleter import Deleter
from forgather_ckpt.demo.damage import damage
from forgather_ckpt.trainers import DDPTrainer
from forgather_ckpt.trainers.progress import Progress
from tests.preemption_job import Slow
from tests.ranks import Outcome, errors, run_ranks
from tests.runs import AskAt, Lines, Noise, bits, kept, same_on_all, trainer_of
from tests.torchrun import ROOT, TorchrunJob, started

DEADLINE_SECONDS = 90
JOB = ROOT / "tests" / "preemption_job.py"
LAUNCH_OPTIONS = ("--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1",)

pytestmark = [
    pytest.mark.multiprocess,
    pytest.mark.timeout(DEADLINE_SECONDS + 30),
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),
]

NUM_RANKS, NUM_STEPS = 2, 12
TERM, INT, USR1 = signal.SIGTERM, signal.SIGINT, signal.SIGUSR1

Act = Callable[[], Any]


class At(TrainerCallback):
    """Does something at an event of a step."""

    def __init__(self, event: str, step: int, act: Act) -> None:
        def at(args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == step:
                act()

        setattr(self, event, at)


class InSave(TrainerCallback):
    """Does something while the state is taken for the n-th save, on each life anew."""

    def __init__(self, number: int, act: Act) -> None:
        self.number, self.act = number, act

    def state_dict(self) -> dict[str, Any]:
        self.number -= 1
        if self.number == 0:
            self.act()
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class InLoad(TrainerCallback):
    """Does something while the checkpoint of a step is loaded."""

    def __init__(self, step: int, act: Act) -> None:
        self.step, self.act = step, act
        self.last = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.last = state.global_step

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.last}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.last = state["step"]
        if self.last == self.step:
            self.act()


def send(*numbers: int) -> Act:
    def act() -> None:
        for number in numbers:
            os.kill(os.getpid(), number)

    return act


def die() -> None:
    os._exit(9)


def send_in_first_sync(number: int) -> Act:
    """From the moment at which a file of the next save is made durable."""

    def act() -> None:
        real = os.fsync

        def fsync(descriptor: Any) -> None:
            os.fsync = real
            os.kill(os.getpid(), number)
            real(descriptor)

        os.fsync = fsync

    return act


def life(run: Path, *, timeout: float = 60, expect_dead: Sequence[int] = (), **given: Any) -> list[Outcome]:
    """One life of a job: what each rank came to, (steps, exit code, step that it resumed from).

    What is callable is called with the rank.
    """

    def case(rank: int, world_size: int) -> Any:
        made = {name: value(rank) if callable(value) else value for name, value in given.items()}
        result = trainer_of(DDPTrainer, run, **({"max_steps": NUM_STEPS} | made)).train()
        resumed_from = result.resumed_from and int(result.resumed_from.name.rpartition("-")[2])
        return result.steps, result.exit_code, resumed_from

    return run_ranks(NUM_RANKS, case, timeout=timeout, expect_dead=expect_dead)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The bits of a run that nothing disturbed."""
    run = tmp_path_factory.mktemp("undisturbed")
    assert same_on_all(life(run)) == (NUM_STEPS, 0, None)
    return bits(run)


def assert_goes_on_to(undisturbed: Any, run: Path, *, from_step: int | None, **given: Any) -> None:
    assert same_on_all(life(run, **given)) == (NUM_STEPS, 0, from_step)
    assert bits(run) == undisturbed


def train_to(step: int, run: Path, *callbacks: TrainerCallback) -> None:
    """Train to a step, as if the run were to go on from there at once."""
    ends = life(run, callbacks=lambda _: [AskAt({step: "should_training_stop"}), InLoad(-1, send()), *callbacks])
    assert same_on_all(ends) == (step, 0, None)


# ---- which signals, to whom


ONCE_IN_THREE = {"control_steps": 3, "logging_steps": 100, "save_steps": 100}
"""The ranks look at each other's wishes after steps 3, 6, 9 only."""


@pytest.mark.parametrize(
    ("signals", "ends", "why"),
    [
        pytest.param({(0, 5): [TERM]}, 6, "SIGTERM received (rank 0)", id="to the first"),
        pytest.param({(1, 6): [INT]}, 6, "SIGINT received (rank 1)", id="to the last"),
        pytest.param({(0, 5): [USR1], (1, 5): [USR1]}, 6, "SIGUSR1 received", id="to both"),
        pytest.param({(1, 4): [TERM], (0, 6): [TERM]}, 6, "SIGTERM received", id="to both, two steps apart"),
        pytest.param(
            {(0, 6): [TERM], (1, 7): [TERM]}, 6, "SIGTERM received (rank 0)", id="to the other when it is over"
        ),
        pytest.param({(0, 4): [TERM, TERM], (0, 5): [TERM]}, 6, "SIGTERM received (rank 0)", id="three times"),
        pytest.param({(0, 5): [INT, INT], (1, 5): [INT, INT]}, 6, "SIGINT received", id="Ctrl-C, two copies to each"),
        pytest.param(
            {(0, 5): [USR1], (1, 4): [TERM]}, 6, "SIGUSR1 received (rank 0); SIGTERM received (rank 1)", id="two kinds"
        ),
    ],
)
def test_after_any_signals_all_ranks_save_one_step_and_the_same_command_comes_to_the_same_bits(
    tmp_path, undisturbed, signals, ends, why
):
    def callbacks(rank: int) -> list[At]:
        return [At("on_step_end", step, send(*sent)) for (to, step), sent in signals.items() if to == rank]

    number = next(iter(signals.values()))[0]
    assert same_on_all(life(tmp_path, callbacks=callbacks, **ONCE_IN_THREE)) == (ends, 128 + number, None)
    assert kept(tmp_path) == [(ends, "emergency")]
    newest = catalog.scan(tmp_path).checkpoints[0]
    assert annotations.load(newest.path, newest.manifest.digest).notes == (why,)
    assert_goes_on_to(undisturbed, tmp_path, from_step=ends)


# ---- when


@pytest.mark.parametrize(
    ("callback", "given", "ends", "saved"),
    [
        pytest.param(lambda: At("on_train_begin", 0, send(TERM)), {}, 0, [], id="before the first step"),
        pytest.param(lambda: At("on_step_begin", 0, send(TERM)), {}, 1, [(1, "emergency")], id="in the first step"),
        pytest.param(
            lambda: InSave(1, send(TERM)), {}, 5, [(4, "periodic"), (5, "emergency")], id="while a save takes the state"
        ),
        pytest.param(
            lambda: At("on_step_end", 4, send_in_first_sync(TERM)),
            {},
            5,
            [(4, "periodic"), (5, "emergency")],
            id="while a save makes its files durable",
        ),
        pytest.param(
            lambda: At("on_save", 4, send(TERM)),
            {"control_steps": 4},
            8,
            [(4, "periodic"), (8, "emergency")],
            id="after a save, and the next look is at the next one",
        ),
        pytest.param(
            lambda: At("on_evaluate", 6, send(TERM)),
            {"eval_steps": 6},
            6,
            [(4, "periodic"), (6, "emergency")],
            id="in an evaluation",
        ),
        pytest.param(
            lambda: At("on_evaluate", 4, send(TERM)),
            {"eval_on_save": True},
            4,
            [(4, "emergency")],
            id="in the evaluation before a save",
        ),
        pytest.param(
            lambda: At("on_evaluate", 12, send(TERM)),
            {"eval_on_save": True, "save_steps": 5},
            12,
            [(5, "periodic"), (10, "periodic"), (12, "emergency")],
            id="in the evaluation before the last save",
        ),
        pytest.param(
            lambda: At("on_epoch_end", 8, send(TERM)),
            {"save_strategy": "epoch", "eval_strategy": "epoch"},
            8,
            [(8, "epoch")],
            id="at the end of an epoch",
        ),
        pytest.param(
            lambda: At("on_step_end", 12, send(TERM)),
            {},
            12,
            [(4, "periodic"), (8, "periodic"), (12, "emergency")],
            id="in the last step",
        ),
    ],
)
@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_at_any_moment_ends_the_training_in_good_order(
    tmp_path, undisturbed, callback, given, ends, saved, rank
):
    given = {"eval_strategy": "no", "eval_dataset": Noise(8, seed=1), **given}
    given |= {"eval_strategy": "steps"} if "eval_steps" in given else {}
    disturbs = life(tmp_path, callbacks=lambda own: [callback()] if own == rank else [InSave(0, send())], **given)
    assert same_on_all(disturbs) == (ends, 143, None)
    assert kept(tmp_path) == saved
    assert_goes_on_to(undisturbed, tmp_path, from_step=ends or None)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_while_the_last_checkpoint_is_saved_comes_too_late_to_matter(tmp_path, undisturbed, rank):
    callbacks = {"callbacks": lambda own: [InSave(3, send(TERM) if own == rank else send())]}
    assert same_on_all(life(tmp_path, save_steps=5, **callbacks)) == (NUM_STEPS, 0, None)
    assert kept(tmp_path) == [(5, "periodic"), (10, "periodic"), (12, "final")]
    assert bits(tmp_path) == undisturbed


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_after_that_ends_no_rank_before_the_run_directory_is_given_back(tmp_path, undisturbed, rank):
    """Such as torchrun's, which ends the others as soon as one rank has left with the code of a signal."""

    def case(own: int, world_size: int) -> Any:
        close = Deleter.close

        def late(deleter: Deleter, seconds: float) -> None:
            if own == rank:
                send(TERM)()
            close(deleter, seconds)

        Deleter.close = late  # type: ignore[method-assign]
        result = trainer_of(DDPTrainer, tmp_path).train()
        return result.exit_code, signal.getsignal(TERM) == signal.SIG_DFL

    assert same_on_all(run_ranks(NUM_RANKS, case)) == (0, True)
    assert bits(tmp_path) == undisturbed


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_during_the_load_ends_the_job_before_a_step_and_is_no_failed_load(tmp_path, undisturbed, rank):
    """Each time it is told to end while it loads; after three such times the checkpoint is still the one to take."""
    train_to(4, tmp_path)
    for _ in range(3):
        stopped = life(tmp_path, callbacks=lambda own: [InLoad(4, send(TERM) if own == rank else send())])
        assert same_on_all(stopped) == (4, 143, 4)
    assert [step for step, _ in kept(tmp_path)] == [4]
    assert_goes_on_to(undisturbed, tmp_path, from_step=4)


def test_a_finished_run_may_be_started_as_often_as_one_likes(tmp_path, undisturbed):
    """It loads its last checkpoint and does no step; that is no failed load either."""
    life(tmp_path)
    for _ in range(4):
        assert_goes_on_to(undisturbed, tmp_path, from_step=NUM_STEPS)


# ---- a person who insists, ranks that die or are late


PATIENT = {"control_steps": 100, "checkpoint_timeout_seconds": 600}
"""Who waited for the deadline of a silent rank would be late for that of the test."""


def insist() -> None:
    send(INT)()
    time.sleep(2.1)
    send(INT)()


@pytest.mark.parametrize(
    "moment", [lambda: At("on_step_end", 8, insist), lambda: InSave(2, insist)], ids=["step", "save"]
)
@pytest.mark.parametrize("rank", [0, 1])
def test_a_second_ctrl_c_interrupts_its_rank_at_once_and_the_others_say_which(tmp_path, undisturbed, rank, moment):
    callbacks = {"callbacks": lambda own: [moment() if own == rank else InSave(0, send())]}
    outcomes = life(tmp_path, **callbacks, **PATIENT)
    interrupted, other = outcomes[rank], outcomes[1 - rank]
    assert interrupted.error is not None and interrupted.error.type_name == "KeyboardInterrupt"
    assert other.error is not None and f"rank {rank}" in other.error.message
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-4"]
    assert_goes_on_to(undisturbed, tmp_path, from_step=4)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_killed_while_the_others_wait_for_it_is_named_by_them_at_once(tmp_path, undisturbed, rank):
    outcomes = life(
        tmp_path,
        expect_dead=[rank],
        callbacks=lambda own: [At("on_step_end", 8, send(signal.SIGKILL))] if own == rank else [],
        **PATIENT,
    )
    [error] = errors(outcomes)
    assert error.type_name == "RankTimeout"
    assert f"rank {rank} (pid " in error.message and "died" in error.message
    assert_goes_on_to(undisturbed, tmp_path, from_step=4)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_late_costs_time_and_beyond_the_deadline_it_is_named(tmp_path, undisturbed, rank):
    def late(seconds: float) -> dict[str, Any]:
        return {"callbacks": lambda own: [At("on_step_end", 6, lambda: time.sleep(seconds))] if own == rank else []}

    assert_goes_on_to(undisturbed, tmp_path / "patient", from_step=None, **late(3.0))
    for error in errors(life(tmp_path / "not", checkpoint_timeout_seconds=1, **late(4.5))):
        assert error.type_name == "RankTimeout"
        assert f"rank {rank}" in error.message and "step 6 failed" in error.message
    assert_goes_on_to(undisturbed, tmp_path / "not", from_step=4)


# ---- loads that kill the job


@pytest.mark.parametrize("victims", [(0,), (1,), (0, 1)])
def test_a_checkpoint_on_which_the_job_dies_three_times_is_passed_over_the_fourth_time(tmp_path, undisturbed, victims):
    """Whichever rank it kills; the others end with an error that tells of it."""

    def dies(rank: int) -> list[TrainerCallback]:
        return [InLoad(8, die if rank in victims else send())]

    train_to(8, tmp_path)
    for _ in range(3):
        for outcome in life(tmp_path, callbacks=dies, expect_dead=victims):
            assert outcome.is_dead or (outcome.error is not None and outcome.error.type_name == "RankTimeout")
    ends = life(tmp_path, callbacks=lambda rank: [*dies(rank), AskAt({10: "should_training_stop"})])
    assert same_on_all(ends) == (10, 0, 4)
    assert [step for step, _ in kept(tmp_path)] == [4, 8, 10], "step 8 has been saved again"
    assert_goes_on_to(undisturbed, tmp_path, from_step=10, callbacks=dies)


def test_an_error_in_the_load_is_no_crash(tmp_path, undisturbed):
    """However often: when its cause is mended, the newest checkpoint is still the one to take."""

    def case(rank: int, world_size: int) -> None:
        def fail(self: Progress, state: Any) -> None:
            raise LookupError("broken on purpose")

        Progress.load_state_dict = fail  # type: ignore[method-assign]
        trainer_of(DDPTrainer, tmp_path).train()

    train_to(8, tmp_path)
    for _ in range(3):
        assert all("broken on purpose" in error.message for error in errors(run_ranks(NUM_RANKS, case)))
    assert_goes_on_to(undisturbed, tmp_path, from_step=8)


def test_an_error_in_the_first_step_after_the_load_is_no_crash_either(tmp_path, undisturbed):
    def fail(trainer: Any) -> None:
        raise LookupError("broken on purpose")

    train_to(8, tmp_path)
    for rank in (0, 1, 0):
        outcomes = life(tmp_path, on_step_end=lambda own, rank=rank: [fail] if own == rank else [])
        assert errors(outcomes)[rank].type_name == "LookupError"
    assert_goes_on_to(undisturbed, tmp_path, from_step=8)


# ---- checkpoints that are damaged


def flip_a_byte(checkpoint: Path) -> None:
    damage(checkpoint, "model")


def cut_the_manifest(checkpoint: Path) -> None:
    manifest = checkpoint / paths.MANIFEST
    manifest.write_bytes(manifest.read_bytes()[:-100])


def tear(checkpoint: Path) -> None:
    """As a copy that was interrupted leaves it."""
    next(checkpoint.glob("*.safetensors")).unlink()


DAMAGES = [flip_a_byte, cut_the_manifest, tear]


@pytest.mark.parametrize("harm", DAMAGES)
def test_unattended_a_damaged_checkpoint_is_skipped_with_a_warning(tmp_path, undisturbed, harm):
    train_to(8, tmp_path)
    harm(tmp_path / "checkpoint-8")

    def case(rank: int, world_size: int) -> Any:
        with Lines() as told:
            result = trainer_of(DDPTrainer, tmp_path).train()
        return str(result.resumed_from), [line for line in told.lines if "checkpoint-8 " in line]

    first, second = run_ranks(NUM_RANKS, case)
    assert same_on_all([first])[0] == same_on_all([second])[0] == str(tmp_path / "checkpoint-4")
    assert any("is passed over" in line or "is not a committed checkpoint" in line for line in first.value[1])
    assert bits(tmp_path) == undisturbed


def test_unattended_it_starts_fresh_where_there_is_none(tmp_path, undisturbed):
    (tmp_path / ".tmp-checkpoint-4-0123456789abcdef").mkdir()
    assert_goes_on_to(undisturbed, tmp_path, from_step=None)


@pytest.mark.parametrize("harm", DAMAGES)
def test_unattended_it_does_not_start_fresh_where_all_are_damaged(tmp_path, harm):
    train_to(8, tmp_path)
    for step in (4, 8):
        harm(tmp_path / f"checkpoint-{step}")
    before = sorted(tmp_path.rglob("*"))
    for error in errors(life(tmp_path)):
        assert error.type_name in ("CheckpointDamaged", "FormatError")
        assert "checkpoint-" in error.message
    assert [path for path in before if not path.exists()] == []


# ---- under torchrun


def fgckpt(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """The command, in a process of its own."""
    command = [sys.executable, "-m", "forgather_ckpt", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=DEADLINE_SECONDS)


class Job:
    """preemption_job.py on two ranks, in a directory, as often as it is started."""

    def __init__(self, directory: Path, **settings: Any) -> None:
        self.directory = directory
        self.run = directory / "run"
        self.settings = {"max_steps": NUM_STEPS, "step_seconds": 0.05, **settings}

    def started(
        self, *options: str, resume: str = "--auto-resume", **given: Any
    ) -> AbstractContextManager[TorchrunJob]:
        """`options` are torchrun's."""
        for account in self.directory.glob("*.json"):
            account.unlink()
        script = [JOB, self.directory, json.dumps(self.settings), *filter(None, [resume])]
        return started(script, NUM_RANKS, options=options, timeout=DEADLINE_SECONDS, **given)

    def account(self, rank: int) -> dict[str, Any]:
        """What a rank told of itself; empty before it has begun to train."""
        path = self.directory / f"{rank}.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def has_done(self, step: int) -> bool:
        return all(self.account(rank).get("step", -1) >= step for rank in range(NUM_RANKS))

    @property
    def exit_codes(self) -> list[int | None]:
        return [self.account(rank).get("exit_code") for rank in range(NUM_RANKS)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sent", "number", "settings"),
    [
        pytest.param(lambda job, torchrun: torchrun.send_signal(TERM), TERM, {}, id="SIGTERM to torchrun"),
        pytest.param(
            lambda job, torchrun: (torchrun.send_signal(USR1), time.sleep(0.1), torchrun.send_signal(USR1)),
            USR1,
            {"save_seconds": 0.5},
            id="SIGUSR1 to torchrun, twice, the second while they save",
        ),
        pytest.param(lambda job, torchrun: os.kill(job.account(1)["pid"], INT), INT, {}, id="SIGINT to rank 1"),
    ],
)
def test_a_job_of_torchrun_with_data_workers_ends_in_good_order_and_goes_on(
    tmp_path, undisturbed, sent, number, settings
):
    """torchrun passes a signal on to the process group of each rank, data workers included."""
    job = Job(tmp_path, dataloader_num_workers=2, **{"step_seconds": 0.3, **settings})
    with job.started(*LAUNCH_OPTIONS) as torchrun:
        torchrun.wait_until(lambda: job.has_done(2))
        assert len(torchrun.pids) >= 1 + NUM_RANKS + NUM_RANKS * 2
        sent(job, torchrun.agents[0])
        ended = torchrun.wait()
        assert torchrun.pids == [], "neither ranks nor workers are left"
    # torchrun raises from its handler: a second signal may find it in C++, and abort it, when the ranks have ended
    assert ended.returncode in ((1, -signal.SIGABRT) if number == USR1 else (1,)), ended.output
    assert job.exit_codes == [128 + number] * 2, ended.output
    [*_, (ends, kind)] = kept(job.run)
    assert kind == "emergency"
    assert [job.account(rank)["step"] for rank in range(NUM_RANKS)] == [ends] * 2
    if number == TERM:
        job.settings["step_seconds"] = 0
        with job.started(*LAUNCH_OPTIONS) as torchrun:
            assert torchrun.wait().returncode == 0
        assert job.account(0)["resumed_from"] == ends
        assert bits(job.run) == undisturbed
    else:
        assert_goes_on_to(undisturbed, job.run, from_step=ends)


@pytest.mark.slow
def test_torchrun_that_restarts_a_job_again_and_again_gets_past_a_deadly_checkpoint(tmp_path, undisturbed):
    job = Job(tmp_path, step_seconds=0, dies_at=8, max_load_attempts=2)
    train_to(8, job.run, Slow(0, 0, None))
    with job.started("--max-restarts=2") as torchrun:
        ended = torchrun.wait()
    assert ended.returncode == 0, ended.output
    assert job.account(0)["resumed_from"] == 4
    assert "checkpoint-8 is passed over: it is to be avoided" in ended.output
    assert bits(job.run) == undisturbed


@pytest.mark.slow
def test_a_running_job_saves_and_stops_when_it_is_asked_from_the_command_line(tmp_path):
    job = Job(tmp_path, step_seconds=0.02, max_steps=100_000, save_steps=100_000, logging_steps=100_000)
    with job.started() as torchrun:
        torchrun.wait_until(lambda: job.has_done(1))
        saved = fgckpt("save", job.run, "--wait", "60", "--json")
        assert saved.returncode == 0, saved.stderr
        place = json.loads(saved.stdout)["checkpoint"]
        assert kept(job.run) == [(place["step"], "periodic")]
        torchrun.wait_until(lambda: job.has_done(place["step"] + 1))

        refused = fgckpt("prune", "-d", job.run, "--keep-last", "1", "--yes")
        assert refused.returncode == 4 and "a job is training in" in refused.stderr

        stopped = fgckpt("stop", job.run, "--wait", "60", "--reason", "a test")
        assert stopped.returncode == 0, stopped.stderr
        ended = torchrun.wait()
    assert ended.returncode == 0, ended.output
    assert job.exit_codes == [0, 0]
    [_, (ends, kind)] = kept(job.run)
    assert kind == "final" and f"resume → step {ends}" in stopped.stdout
    assert "a test" in ended.output


@pytest.mark.slow
def test_without_a_terminal_torchrun_says_once_what_to_write(tmp_path):
    job = Job(tmp_path)
    train_to(4, job.run)
    with job.started(resume="") as torchrun:
        ended = torchrun.wait()
    assert ended.returncode == 1
    assert kept(job.run) == [(4, "periodic")]
    assert ended.output.count("say --auto-resume to go on, or --fresh to start over") == 1, ended.output
    assert len({job.account(rank)["error"] for rank in range(NUM_RANKS)}) == 1


# ---- the question


@contextmanager
def terminal() -> Iterator[Terminal]:
    ours, theirs = pty.openpty()
    try:
        yield Terminal(ours, theirs)
    finally:
        os.close(ours)
        os.close(theirs)


@dataclass
class Terminal:
    """A terminal, and the person before it."""

    ours: int
    theirs: int
    seen: str = ""

    def look(self) -> str:
        """All that has been on it so far."""
        while select.select([self.ours], [], [], 0)[0]:
            self.seen += os.read(self.ours, 1 << 16).decode()
        return self.seen

    def type(self, line: str) -> None:
        os.write(self.ours, line.encode() + b"\n")

    def answer(self, *lines: str) -> None:
        """Type a line each time that there is a question, until all are typed."""
        deadline = time.monotonic() + DEADLINE_SECONDS
        for number, line in enumerate(lines, start=1):
            while self.look().count("Resume? [Y/n/list]") < number:
                assert time.monotonic() < deadline, self.seen
                time.sleep(0.02)
            self.type(line)

    def become_stdio(self) -> None:
        """Of this process, a forked rank."""
        os.dup2(self.theirs, 0)
        sys.stdin = os.fdopen(0, closefd=False)
        sys.stderr = os.fdopen(os.dup(self.theirs), "w", buffering=1)


@pytest.mark.slow
def test_at_a_terminal_torchruns_first_rank_asks_and_the_others_follow(tmp_path, undisturbed):
    job = Job(tmp_path)
    train_to(8, job.run)
    with terminal() as person, job.started(resume="", terminal=person.theirs) as torchrun:
        torchrun.wait_until(lambda: "Resume? [Y/n/list]" in person.look())
        person.type("y")
        ended = torchrun.wait()
        assert ended.returncode == 0, ended.output + person.look()
        assert person.seen.count("Resume?") == 1
    assert [job.account(rank)["resumed_from"] for rank in range(NUM_RANKS)] == [8, 8]
    assert bits(job.run) == undisturbed


@pytest.mark.parametrize(
    ("lines", "from_step", "shown"),
    [
        (["Y"], 8, "Found 2 checkpoints in"),
        (["n"], None, "the newest is step 8"),
        (["list", "4"], 4, "step 4"),
        (["what?", "l", "5", ""], 8, "'what?' is no answer"),
    ],
)
def test_what_is_answered_at_the_terminal_is_done_by_all_ranks(tmp_path, undisturbed, lines, from_step, shown):
    train_to(8, tmp_path)
    with terminal() as person:
        thread = threading.Thread(target=person.answer, args=lines)
        thread.start()
        ends = life(tmp_path, resume_from_checkpoint=lambda rank: person.become_stdio())  # and returns None
        thread.join(DEADLINE_SECONDS)
        assert shown in person.look()
    assert same_on_all(ends) == (NUM_STEPS, 0, from_step)
    assert bits(tmp_path) == undisturbed


def test_ctrl_c_at_the_question_ends_all_ranks(tmp_path):
    train_to(8, tmp_path)
    with terminal() as person:

        def begin(rank: int) -> None:
            person.become_stdio()
            if rank == 0:
                threading.Timer(1.0, send(INT)).start()

        first, second = life(tmp_path, resume_from_checkpoint=begin)
    assert first.error is not None and first.error.type_name == "KeyboardInterrupt"
    assert second.error is not None and "interrupted on rank 0" in second.error.message
