"""`fgckpt prune`, `pin`, `unpin`: what goes and what stays; `save` and `stop`: what a running job is asked, and its answer."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from forgather_ckpt import annotations, catalog, commit, files, lease, paths, requests
from forgather_ckpt.cli import asking
from forgather_ckpt.lease import Lease
from tests.checkpoints import DATA_FILE, commit_one, fill, tree
from tests.test_cli import Fgckpt, env, fgckpt

__all__ = ["fgckpt"]

LOSSES = [3.0, 1.0, 2.0, 5.0, 4.0]
KINDS = {2: "epoch", 3: "emergency", 4: "epoch"}


def save(run: Path, step: int, loss: float | None = None, **said: Any) -> Path:
    """A committed checkpoint whose manifest says this."""
    draft = commit.begin(run, step)
    metrics = {} if loss is None else {"eval_loss": loss}
    path, _ = commit.publish(draft, dataclasses.replace(fill(draft, b"content"), **{"metrics": metrics, **said}))
    return path


def steps(run: Path) -> list[int]:
    return sorted(checkpoint.manifest.step for checkpoint in catalog.scan(run).checkpoints)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Five checkpoints: the second is the best, the fifth the newest."""
    for step, loss in enumerate(LOSSES, start=1):
        created = f"2024-01-0{step}T12:00:00+00:00"
        save(tmp_path, step, loss, kind=KINDS.get(step, "periodic"), created=created)
    return tmp_path


# ---- prune: what stays


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ("--keep-last 1", [5]),
        ("--keep-last 3", [2, 4, 5]),
        ("--keep-last 10", [1, 2, 4, 5]),
        ("--keep-best 1", [2, 5]),
        ("--keep-best 2", [2, 3, 5]),
        ("--keep-best 1 --mode max", [4, 5]),
        ("--keep-best 1 --metric eval_loss", [2, 5]),
        ("--keep-last 1 --keep-best 1", [2, 5]),
        ("--keep-epochs", [2, 4, 5]),
        ("--keep-epochs all", [2, 4, 5]),
        ("--keep-epochs 1", [4, 5]),
        ("--keep-emergency 1", [3, 5]),
        ("--keep-every-steps 2", [2, 4, 5]),
        ("--keep-every-seconds 172800", [1, 2, 4, 5]),
        ("--keep-last 1 --keep-epochs 1 --keep-emergency 5", [3, 4, 5]),
    ],
)
def test_what_any_option_keeps_stays(fgckpt: Fgckpt, run: Path, options: str, kept: list[int]) -> None:
    before = tree(run)
    dry = fgckpt("prune", "--json", "-d", run, *options.split())
    assert tree(run) == before, "without --yes nothing is touched"
    assert (dry.code, dry.err) == (0, "")
    told = [one["step"] for one in dry.data["checkpoints"] if one["keep"]]
    assert sorted(told) == kept
    done = fgckpt("prune", "--json", "--yes", "-d", run, *options.split())
    assert done.code == 0
    assert steps(run) == kept
    assert {one["step"] for one in done.data["checkpoints"] if one["removed"]} == {1, 2, 3, 4, 5} - set(kept)
    assert dry.data["remove_bytes"] == done.data["remove_bytes"] == 7 * (5 - len(kept))
    assert dry.data["keep_bytes"] == 7 * len(kept)
    again = fgckpt("prune", "--yes", "-d", run, *options.split())
    assert again.out.splitlines()[-1].startswith("nothing to remove: ")


def test_what_would_go_is_told_with_sizes_and_reasons(fgckpt: Fgckpt, run: Path) -> None:
    (save(run, 6) / DATA_FILE).unlink()
    out = fgckpt("prune", "-d", run, "--keep-last", "1", "--keep-best", "1").out.splitlines()
    assert [line.split()[:4] for line in out[:7]] == [
        ["VERDICT", "CHECKPOINT", "SIZE", "WHY"],
        ["KEEP", "checkpoint-5", "7", "B"],
        ["REMOVE", "checkpoint-4", "7", "B"],
        ["REMOVE", "checkpoint-3", "7", "B"],
        ["KEEP", "checkpoint-2", "7", "B"],
        ["REMOVE", "checkpoint-1", "7", "B"],
        ["SKIP", "checkpoint-6", "-", "no"],
    ]
    assert "newest; latest 1 of 1" in out[1]
    assert "latest 2, 1 kept; best 5, 1 kept (eval_loss 5, lowest is best)" in out[2]
    assert "model.safetensors is missing" in out[6]
    assert out[7:] == [
        "policy: Latest(n=1) | Best(n=1, metric='eval_loss', mode='min')",
        "keep 2 checkpoints (14 B), remove 3 checkpoints (21 B): nothing removed yet, add --yes",
    ]
    out = fgckpt("prune", "-d", run, "--keep-last", "1", "--keep-best", "1", "--yes").out.splitlines()
    assert out[-1] == "kept 2 checkpoints (14 B), removed 3 checkpoints (21 B)"
    assert (run / "checkpoint-6").is_dir(), "what is damaged is left to a person"


def test_json_names_everything(fgckpt: Fgckpt, run: Path) -> None:
    (save(run, 6) / DATA_FILE).unlink()
    data = fgckpt("prune", "--json", "-d", run, "--keep-last", "4").data
    assert {key: value for key, value in data.items() if key not in ("checkpoints", "skipped")} == {
        "schema": "fgckpt.prune/1",
        "run": str(run),
        "policy": ["Latest(n=4)"],
        "dry_run": True,
        "keep_bytes": 28,
        "remove_bytes": 7,
    }
    assert data["checkpoints"][2] == {
        "path": str(run / "checkpoint-3"),
        "step": 3,
        "sequence": 3,
        "bytes": 7,
        "keep": False,
        "reasons": ["no policy keeps it"],
        "removed": False,
        "error": None,
    }
    [skipped] = data["skipped"]
    assert skipped["path"] == str(run / "checkpoint-6")


@pytest.mark.parametrize(
    ("arguments", "kept", "policy"),
    [
        ({"save_total_limit": 2}, [3, 4, 6], ["Latest(n=2)", "Emergency(n=10)"]),
        ({"save_total_limit": None}, [1, 2, 3, 4, 6], ["Latest(n=None)", "Emergency(n=10)"]),
        (
            {"save_total_limit": 1, "preserve_best_model": True, "preserve_n_best": 2, "keep_emergency_checkpoints": 0},
            [2, 3, 6],
            ["Latest(n=1)", "Best(n=2, metric='eval_loss', mode='min')"],
        ),
        (
            {"save_total_limit": 1, "keep_epoch_checkpoints": True, "keep_emergency_checkpoints": 0},
            [2, 4, 6],
            ["Latest(n=1)", "Epochs(n=None)"],
        ),
    ],
)
def test_without_options_it_is_the_policy_of_the_training(
    fgckpt: Fgckpt, run: Path, arguments: dict[str, Any], kept: list[int], policy: list[str]
) -> None:
    files.delete(run / "checkpoint-5")
    save(run, 6, 9.0, training_args={"learning_rate": 0.1, **arguments})
    result = fgckpt("prune", "--yes", "--json", "-d", run)
    assert (result.code, result.data["policy"]) == (0, policy)
    assert steps(run) == kept


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({}, "do not tell what to keep (no save_total_limit); say what to keep, such as --keep-last 3"),
        ({"learning_rate": 1.0}, "do not tell what to keep"),
        ({"save_total_limit": 0}, "give no policy: save_total_limit is 0; use None"),
        ({"save_total_limit": "many"}, "give no policy: save_total_limit is 'many'"),
        ({"preserve_best_model": True, "best_model_metric": "quality"}, "does not tell which way is better"),
    ],
)
def test_without_options_and_policy_it_is_wrong_usage(
    fgckpt: Fgckpt, run: Path, arguments: dict[str, Any], told: str
) -> None:
    save(run, 6, training_args=arguments)
    before = tree(run)
    result = fgckpt("prune", "--yes", "-d", run)
    assert (result.code, result.out) == (2, "")
    assert told in " ".join(result.err.split())
    assert tree(run).keys() - {paths.LEASE} == before.keys()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ("--metric loss", "give --keep-best N too"),
        ("--keep-last 3 --mode min", "give --keep-best N too"),
        ("--keep-best 2 --metric quality", "Here: --metric NAME --mode min, or --mode max"),
        ("--keep-best 2 --mode best", "is not one of 'min', 'max'"),
        ("--keep-last 0", "0 is not in the range x>=1"),
        ("--keep-best -1", "not in the range"),
        ("--keep-epochs some", "'some' is neither a count from 1 nor 'all'"),
        ("--keep-epochs 0", "'0' is neither a count from 1 nor 'all'"),
        ("--keep-every-seconds 0", "0.0 is not in the range x>0"),
        ("--keep-every-seconds nan", "use a number of seconds"),
        ("runs/gpt2", "unexpected extra argument"),
    ],
)
def test_options_that_mean_nothing_are_wrong_usage(fgckpt: Fgckpt, run: Path, options: str, told: str) -> None:
    result = fgckpt("prune", "-d", run, *options.split())
    assert (result.code, result.out) == (2, "")
    assert told in " ".join(result.err.split())


@pytest.mark.parametrize("metric", [["--metric", "eval_f1", "--mode", "max"], []])
def test_the_best_are_not_let_go_because_none_can_be_ranked(fgckpt: Fgckpt, tmp_path: Path, metric: list[str]) -> None:
    save(tmp_path, 1, metrics={"loss": 1.0})
    save(tmp_path, 2, metrics={"accuracy": 1.0})
    result = fgckpt("prune", "--yes", "-d", tmp_path, "--keep-last", "1", "--keep-best", "1", *metric)
    assert (result.code, result.out) == (4, "")
    name = metric[1] if metric else "eval_loss"
    assert (
        f"no checkpoint has a finite '{name}', so --keep-best would keep none; metrics that they have: accuracy, loss"
        in (result.err)
    )
    assert steps(tmp_path) == [1, 2]


def test_pinned_and_quarantined_ones_stay_and_later_metrics_count(fgckpt: Fgckpt, run: Path) -> None:
    annotations.annotate(run / "checkpoint-1", lambda noted: dataclasses.replace(noted, is_pinned=True))
    annotations.annotate(run / "checkpoint-2", lambda noted: dataclasses.replace(noted, quarantined="flipped byte"))
    annotations.annotate(run / "checkpoint-4", lambda noted: dataclasses.replace(noted, metrics={"eval_loss": 0.5}))
    fgckpt("prune", "--yes", "-d", run, "--keep-best", "1")
    assert steps(run) == [1, 2, 4, 5]


def test_an_empty_run_has_nothing_to_remove(fgckpt: Fgckpt, tmp_path: Path) -> None:
    for options in ([], ["--yes"], ["--keep-best", "3", "--yes"]):
        result = fgckpt("prune", "-d", tmp_path, *options)
        assert (result.code, result.out) == (0, "nothing to remove: 0 checkpoints (0 B), all kept\n")


def test_a_checkpoint_is_no_run_directory(fgckpt: Fgckpt, run: Path) -> None:
    result = fgckpt("prune", "--yes", "--keep-last", "1", "-d", run / "checkpoint-1")
    assert result.code == 3
    assert "is a checkpoint, not a run directory" in result.err


# ---- prune: beside a job, and when it fails


def test_while_a_job_trains_nothing_is_removed(fgckpt: Fgckpt, run: Path) -> None:
    held = Lease(run)
    result = fgckpt("prune", "--yes", "-d", run, "--keep-last", "1")
    assert (result.code, result.out) == (4, "")
    assert f"a job is training in {run}: it removes checkpoints by its own policy" in result.err
    dry = fgckpt("prune", "-d", run, "--keep-last", "1")
    assert dry.code == 0
    assert dry.err == f"fgckpt: a job is training in {run}; while it does, --yes is refused\n"
    assert steps(run) == [1, 2, 3, 4, 5]
    held.release()


def test_no_job_may_start_while_something_is_removed(
    fgckpt: Fgckpt, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "PATIENCE_SECONDS", 0.0)
    seen = []
    delete = files.delete

    def look_and_delete(path: Path) -> None:
        seen.append(requests.is_live(run))
        delete(path)

    with monkeypatch.context() as patch:
        patch.setattr(files, "delete", look_and_delete)
        fgckpt("prune", "--yes", "-d", run, "--keep-last", "1")
    assert seen == [True] * 4
    assert not requests.is_live(run)
    Lease(run).release()


def test_what_could_not_be_removed_is_told_and_is_exit_code_5(
    fgckpt: Fgckpt, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_aside = files.set_aside

    def fail_once(path: Path, nonce: str) -> Path:
        if path.name == "checkpoint-2":
            raise PermissionError(1, "Operation not permitted", str(path))
        return set_aside(path, nonce)

    monkeypatch.setattr(files, "set_aside", fail_once)
    result = fgckpt("prune", "--yes", "-d", run, "--keep-last", "1")
    assert result.code == 5
    assert "latest 3, 1 kept; NOT REMOVED: [Errno 1] Operation not permitted" in result.out
    assert result.out.splitlines()[-1].endswith("removed 3 checkpoints (21 B); 1 could not be removed")
    assert steps(run) == [2, 5]
    assert not requests.is_live(run)


def test_where_nothing_can_be_removed_at_all_it_is_an_error(
    fgckpt: Fgckpt, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: Path) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(files, "sync_directory", fail)
    result = fgckpt("prune", "--yes", "-d", run, "--keep-last", "1")
    assert (result.code, result.out) == (5, "")
    assert "nothing was removed" in result.err
    assert steps(run) == [1, 2, 3, 4, 5]


# ---- pin


def noted(checkpoint: Path) -> annotations.Annotations:
    return annotations.load(checkpoint, catalog.read_checkpoint(checkpoint).manifest.digest)


def test_a_pin_keeps_a_checkpoint_until_it_is_taken_away(fgckpt: Fgckpt, run: Path) -> None:
    result = fgckpt("pin", "best", "3", "checkpoint-2", "-d", run, "--note", "for the paper")
    assert (result.code, result.err) == (0, "")
    assert result.out == f"pinned {run}/checkpoint-2\npinned {run}/checkpoint-3\n"
    assert noted(run / "checkpoint-2") == annotations.Annotations(is_pinned=True, notes=("for the paper",))
    assert fgckpt("ls", run).out.count("pinned") == 2
    fgckpt("prune", "--yes", "-d", run, "--keep-last", "1")
    assert steps(run) == [2, 3, 5]
    assert fgckpt("unpin", "2", "-d", run).out == f"unpinned {run}/checkpoint-2\n"
    assert noted(run / "checkpoint-2") == annotations.Annotations(notes=("for the paper",))
    fgckpt("prune", "--yes", "-d", run, "--keep-last", "1")
    assert steps(run) == [3, 5]


def test_pins_leave_what_else_was_noted_and_may_be_set_while_a_job_trains(fgckpt: Fgckpt, run: Path) -> None:
    annotations.annotate(
        run / "checkpoint-5", lambda noted: dataclasses.replace(noted, metrics={"f1": 1}, notes=("a",))
    )
    held = Lease(run)
    data = fgckpt("pin", "latest", "-d", run, "--note", "b", "--json").data
    held.release()
    path = str(run / "checkpoint-5")
    found = {"path": path, "step": 5, "pinned": True, "quarantined": None, "notes": ["a", "b"]}
    assert data == {"schema": "fgckpt.pin/1", "checkpoints": [found]}
    assert noted(run / "checkpoint-5") == annotations.Annotations(True, None, ("a", "b"), {"f1": 1})
    assert fgckpt("unpin", "latest", "-d", run, "--json").data["schema"] == "fgckpt.unpin/1"


def test_a_quarantined_checkpoint_is_found_by_its_step_alone_until_that_is_taken_back(
    fgckpt: Fgckpt, run: Path
) -> None:
    annotations.annotate(run / "checkpoint-5", lambda noted: dataclasses.replace(noted, is_pinned=True, notes=("a",)))
    before = [fgckpt("show", selector, "-d", run, "--json").data["path"] for selector in ("latest", "best")]
    assert before == [str(run / f"checkpoint-{step}") for step in (5, 2)]
    result = fgckpt("quarantine", "5", "best", "-d", run, "--why", "the loss\nwent up")
    assert (result.code, result.err) == (0, "")
    assert result.out == f"quarantined {run}/checkpoint-5\nquarantined {run}/checkpoint-2\n"
    assert noted(run / "checkpoint-5") == annotations.Annotations(True, "the loss\nwent up", ("a",))
    for selector, step in (("latest", 4), ("latest~1", 3), ("best", 3), ("5", 5), ("step:2", 2)):
        assert fgckpt("show", selector, "-d", run, "--json").data["path"] == str(run / f"checkpoint-{step}")
    fgckpt("prune", "--yes", "-d", run, "--keep-last", "1")
    assert steps(run) == [2, 4, 5]
    data = fgckpt("unquarantine", "5", "-d", run, "--json").data
    assert (data["schema"], data["checkpoints"][0]["quarantined"]) == ("fgckpt.unquarantine/1", None)
    assert noted(run / "checkpoint-5") == annotations.Annotations(True, None, ("a",))
    assert fgckpt("show", "-d", run, "--json").data["path"] == str(run / "checkpoint-5")


def test_a_quarantine_needs_a_reason(fgckpt: Fgckpt, run: Path) -> None:
    assert fgckpt("quarantine", "5", "-d", run).code == 2
    assert noted(run / "checkpoint-5") == annotations.Annotations()


def test_where_all_are_quarantined_a_step_must_be_named(fgckpt: Fgckpt, run: Path) -> None:
    found = [str(step) for step in steps(run)]
    fgckpt("quarantine", *found, "-d", run, "--why", "a bad disk")
    result = fgckpt("show", "-d", run)
    assert result.code == 3
    assert f"all checkpoints of {run} are quarantined, checkpoint-5: a bad disk; name a step" in result.err
    assert "or take it back: fgckpt unquarantine 5" in result.err
    assert fgckpt("ls", run).out.splitlines()[-1].endswith("resume refused: all checkpoints are quarantined")
    assert fgckpt("ls", run, "--json").data["resume"] is None


def test_only_what_is_quarantined_is_taken_back(fgckpt: Fgckpt, run: Path) -> None:
    fgckpt("quarantine", "5", "4", "-d", run, "--why", "a bad disk")
    for selector in ("latest", "best", "3"):
        result = fgckpt("unquarantine", selector, "-d", run)
        assert (result.code, result.out) == (3, "")
        assert f"{selector!r} names no quarantined checkpoint" in result.err
        assert "quarantined: checkpoint-5, checkpoint-4" in result.err
    # as a job does that saves the step again
    (run / "checkpoint-5").rename(run / "checkpoint-5.kept-5")
    shutil.copytree(run / "checkpoint-3", run / "checkpoint-5")
    assert "checkpoint-5.kept-5" in fgckpt("unquarantine", "5", "-d", run).out
    assert noted(run / "checkpoint-5.kept-5").quarantined is None
    assert fgckpt("unquarantine", run / "checkpoint-4", "-d", run).code == 0
    assert fgckpt("ls", run).out.count("quarantined") == 0



@pytest.mark.parametrize(
    ("selectors", "code", "told"),
    [
        (["5", "7"], 3, "there is no committed checkpoint '7'"),
        (["best", "emergency~4"], 3, "emergency checkpoints: 3"),
        (["5", "1"], 1, "model.safetensors is missing"),
        ([], 2, "Missing argument 'SELECTOR...'"),
    ],
)
def test_where_one_is_not_there_none_is_pinned(
    fgckpt: Fgckpt, run: Path, selectors: list[str], code: int, told: str
) -> None:
    (run / "checkpoint-1" / DATA_FILE).unlink()
    result = fgckpt("pin", *selectors, "-d", run)
    assert (result.code, result.out) == (code, "")
    assert told in result.err
    assert list(run.glob(f"*/{paths.ANNOTATIONS}")) == []


# ---- asking a job

JOB = """
import sys, time
from pathlib import Path
from forgather_ckpt.lease import Lease
from forgather_ckpt.requests import discard_stale, take
from tests.checkpoints import commit_one
run, answers = Path(sys.argv[1]), sys.argv[2]
held = Lease(run)
discard_stale(run)
print("training", flush=True)
step = 100
while answers != "deaf":
    for request in take(run):
        print(request.kind, request.reason, flush=True)
        if answers == "busy":
            break
        if request.kind != "abort":
            commit_one(run, step)
            step += 1
        if request.kind != "save" or answers == "ends":
            sys.exit()
    time.sleep(0.01)
sys.stdin.read()
"""


@contextmanager
def job(run: Path, answers: str = "all") -> Iterator[subprocess.Popen[str]]:
    """A process that holds the run directory and follows what is asked: all, or nothing ("busy"), or not even looks
    ("deaf"), or ends with a first save ("ends")."""
    command = [sys.executable, "-c", JOB, str(run), answers]
    with subprocess.Popen(command, env=env(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "training\n"
        try:
            yield process
        finally:
            process.kill()


def heard(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


@pytest.fixture(autouse=True)
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "POLL_SECONDS", 0.01)


def test_a_job_is_asked_for_a_checkpoint(fgckpt: Fgckpt, tmp_path: Path) -> None:
    with job(tmp_path) as process:
        result = fgckpt("save", tmp_path, "--reason", "before the update")
        assert (result.code, result.err) == (0, "")
        assert result.out == f"{tmp_path}: asked for a checkpoint; the job saves after this step\n"
        assert heard(process) == "save before the update\n"
        data = fgckpt("save", tmp_path, "--json").data
        assert (data["schema"], data["run"], data["taken"], data["checkpoint"]) == (
            "fgckpt.save/1", str(tmp_path), True, None,
        )  # fmt: skip
        assert (data["request"]["kind"], data["request"]["reason"]) == ("save", None)
        assert heard(process) == "save None\n"


def test_a_checkpoint_is_waited_for(fgckpt: Fgckpt, tmp_path: Path) -> None:
    commit_one(tmp_path, 500)
    with job(tmp_path):
        result = fgckpt("save", tmp_path, "--wait", "60")
        assert (result.code, result.out, result.err) == (0, f"saved {tmp_path}/checkpoint-100\n", "")
        data = fgckpt("save", tmp_path, "--wait", "60", "--json").data
        path = str(tmp_path / "checkpoint-101")
        assert (data["taken"], data["checkpoint"]) == (True, {"step": 101, "sequence": 3, "path": path})


def test_what_was_being_saved_when_it_was_asked_is_not_the_answer(
    fgckpt: Fgckpt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = Lease(tmp_path)
    polls = []

    def work(_: float) -> None:
        polls.append(len(polls))
        match len(polls):
            case 1:
                commit_one(tmp_path, 1)  # begun before
            case 3:
                [request] = requests.take(tmp_path)
                assert request.kind == "save"
            case 5:
                commit_one(tmp_path, 2)

    monkeypatch.setattr(asking.time, "sleep", work)
    result = fgckpt("save", tmp_path, "--wait", "60")
    held.release()
    assert (result.code, result.out) == (0, f"saved {tmp_path}/checkpoint-2\n")


@pytest.mark.parametrize(("options", "kind", "saved"), [([], "stop", True), (["--now"], "abort", False)])
def test_a_job_is_asked_to_end(fgckpt: Fgckpt, tmp_path: Path, options: list[str], kind: str, saved: bool) -> None:
    with job(tmp_path) as process:
        result = fgckpt("stop", tmp_path, *options)
        how = "with" if saved else "without"
        assert (result.code, result.err) == (0, "")
        assert result.out == f"{tmp_path}: asked to end; the job ends after this step, {how} a checkpoint\n"
        assert heard(process) == f"{kind} None\n"
        assert process.wait() == 0
    assert steps(tmp_path) == ([100] if saved else [])


def test_the_end_of_a_job_is_waited_for(fgckpt: Fgckpt, tmp_path: Path) -> None:
    with job(tmp_path):
        result = fgckpt("stop", tmp_path, "--wait", "60")
        assert (result.code, result.err) == (0, "")
        assert result.out == f"{tmp_path}: the job has ended; resume → step 100\n"
        assert not requests.is_live(tmp_path)
    with job(tmp_path / "other"):
        data = fgckpt("stop", tmp_path / "other", "--now", "--wait", "60", "--json").data
        assert data.pop("request")["kind"] == "abort"
        assert data == {
            "schema": "fgckpt.stop/1", "run": str(tmp_path / "other"), "taken": True, "ended": True, "resume": None,
        }  # fmt: skip


@pytest.mark.parametrize("command", ["save", "stop"])
@pytest.mark.parametrize("options", [[], ["--wait", "5"], ["--no-wait"]])
def test_where_no_job_trains_nothing_is_asked(fgckpt: Fgckpt, run: Path, command: str, options: list[str]) -> None:
    with job(run) as process:
        process.kill()
        process.wait()
    before = tree(run)
    result = fgckpt(command, run, *options)
    assert (result.code, result.out, result.err) == (4, "", f"fgckpt: no job is training in {run}\n")
    assert tree(run) == before


@pytest.mark.parametrize("command", ["save", "stop"])
def test_a_job_that_does_not_look_is_told_of_in_bounded_time(
    fgckpt: Fgckpt, tmp_path: Path, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asking, "TAKEN_SECONDS", 0.05)
    with job(tmp_path, "deaf"):
        for options in ([], ["--wait", "0.05"]):
            result = fgckpt(command, tmp_path, *options)
            assert (result.code, result.out) == (4, "")
            assert f"the job in {tmp_path} has not taken the request in time" in result.err
            assert [one.kind for one in requests.take(tmp_path)] == [command], "it stays asked"
        result = fgckpt(command, tmp_path, "--no-wait")
        assert (result.code, result.err) == (0, "")
        assert result.out in (f"{tmp_path}: asked for a checkpoint\n", f"{tmp_path}: asked to end\n")
        assert fgckpt(command, tmp_path, "--no-wait", "--json").data["taken"] is False
        assert [one.kind for one in requests.take(tmp_path)] == [command]


@pytest.mark.parametrize("command", ["save", "stop"])
def test_a_job_that_ends_before_it_looks_leaves_nothing_asked(
    fgckpt: Fgckpt, tmp_path: Path, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = Lease(tmp_path)
    monkeypatch.setattr(asking.time, "sleep", lambda _: held.release())
    result = fgckpt(command, tmp_path)
    assert (result.code, result.out) == (4, "")
    assert result.err == f"fgckpt: the job in {tmp_path} ended before it took the request\n"
    assert requests.take(tmp_path) == []


@pytest.mark.parametrize(
    ("command", "told"),
    [
        ("save", "took the request, but saved nothing within 0.3 s"),
        ("stop", "took the request, but is there after 0.3 s"),
    ],
)
def test_a_job_that_takes_it_and_does_nothing_is_exit_code_1(
    fgckpt: Fgckpt, tmp_path: Path, command: str, told: str
) -> None:
    held = Lease(tmp_path)
    done = threading.Event()

    def take_all() -> None:
        while not done.wait(0.01):
            requests.take(tmp_path)

    taker = threading.Thread(target=take_all)
    taker.start()
    results = [fgckpt(command, tmp_path, "--wait", "0.3", *options) for options in ([], ["--json"])]
    done.set()
    taker.join()
    held.release()
    assert [result.code for result in results] == [1, 1]
    assert all(told in result.err for result in results)
    assert results[0].out == ""
    assert results[1].data["taken"] is True


def test_a_job_that_ends_with_the_checkpoint_has_saved_it(fgckpt: Fgckpt, tmp_path: Path) -> None:
    with job(tmp_path, "ends"):
        result = fgckpt("save", tmp_path, "--wait", "60")
    assert (result.code, result.out) == (0, f"saved {tmp_path}/checkpoint-100\n")


def test_a_job_that_ends_without_the_checkpoint_is_told_of(
    fgckpt: Fgckpt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = Lease(tmp_path)
    steps_of_job: list[Callable[[], object]] = [lambda: requests.take(tmp_path), held.release]
    monkeypatch.setattr(asking.time, "sleep", lambda _: steps_of_job.pop(0)())
    result = fgckpt("save", tmp_path, "--wait", "60")
    assert (result.code, result.out) == (1, "")
    assert "took the request, but saved nothing before it ended" in result.err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["save", "--wait", "5", "--no-wait"], "give --wait SECONDS or --no-wait, not both"),
        (["stop", "--wait", "-1"], "not in the range x>=0"),
        (["save", "--now"], "No such option"),
        (["save", "--reason", "x" * 2001], "the reason has 2001 characters; use at most 2000"),
    ],
)
def test_wrong_usage_asks_nothing(fgckpt: Fgckpt, tmp_path: Path, arguments: list[str], told: str) -> None:
    held = Lease(tmp_path)
    result = fgckpt(*arguments, tmp_path)
    assert (result.code, result.out) == (2, "")
    assert told in result.err
    assert requests.take(tmp_path) == []
    held.release()
