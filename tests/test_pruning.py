"""Removing what no policy keeps: after the commit, the oldest first, and whatever fails, never the wrong one."""

import dataclasses
import logging
import math
import os
import shutil
import time
from pathlib import Path

import pytest

from forgather_ckpt import catalog, commit, files, paths, pruning
from forgather_ckpt.annotations import Annotations, annotate
from forgather_ckpt.policies import AnyOf, Best, Latest, Policy
from forgather_ckpt.retention import Protected, best_checkpoints_summary
from tests.checkpoints import fill, tree
from tests.system_calls import watched

BEST = Best(2, "eval_loss")


def save(run: Path, step: int, loss: float | None = None, **said: object) -> Path:
    """A committed checkpoint whose manifest says this."""
    draft = commit.begin(run, step)
    metrics = {} if loss is None else {"eval_loss": loss}
    manifest = dataclasses.replace(fill(draft, b"content"), metrics=metrics, **said)  # type: ignore[arg-type]
    path, _ = commit.publish(draft, manifest)
    return path


def prune(run: Path, policy: Policy, protected: Protected = Protected()) -> pruning.Pruned:  # noqa: B008
    return pruning.prune(run, policy, protected)


def steps(run: Path) -> list[int]:
    return sorted(checkpoint.manifest.step for checkpoint in catalog.scan(run).checkpoints)


def pin(noted: Annotations) -> Annotations:
    return dataclasses.replace(noted, is_pinned=True)


# ---- what stays


def test_the_best_and_the_latest_stay_at_every_save_of_a_run(tmp_path):
    """As in document 001, where a best checkpoint was deleted by the save after it."""
    losses = [3.0, 2.0, 2.5, 4.0, 5.0, 1.0, 6.0]
    seen = []
    for step, loss in enumerate(losses, start=1):
        save(tmp_path, step, loss)
        prune(tmp_path, Latest(1) | BEST)
        seen.append(steps(tmp_path))
    assert seen == [[1], [1, 2], [2, 3], [2, 3, 4], [2, 3, 5], [2, 6], [2, 6, 7]]
    assert best_checkpoints_summary(BEST, pruning.survey(catalog.scan(tmp_path))) == (
        f"Best checkpoints (N=2):\n  {tmp_path}/checkpoint-6: eval_loss=1\n  {tmp_path}/checkpoint-2: eval_loss=2"
    )


def test_what_was_pruned_is_told_with_the_reasons(tmp_path):
    one, two = save(tmp_path, 1), save(tmp_path, 2)
    pruned = prune(tmp_path, Latest(1))
    assert [str(verdict) for verdict in pruned.verdicts] == [
        "keep checkpoint-2: newest; latest 1 of 1",
        "remove checkpoint-1: latest 2, 1 kept",
    ]
    assert (list(pruned.removed), dict(pruned.failed)) == ([one], {})
    assert two.exists()


def test_document_001_each_removal_is_logged_once(tmp_path, caplog):
    for step in (1, 2, 3):
        save(tmp_path, step, 1.0)
    with caplog.at_level(logging.INFO):
        prune(tmp_path, Latest(1))
    assert caplog.messages == [
        f"removed {tmp_path}/checkpoint-1: latest 3, 1 kept",
        f"removed {tmp_path}/checkpoint-2: latest 2, 1 kept",
    ]


def test_the_one_resumed_from_is_known_by_what_it_is(tmp_path):
    first = save(tmp_path, 1)
    resumed_from = catalog.read_checkpoint(first).manifest.digest
    save(tmp_path, 2)
    save(tmp_path, 3)
    prune(tmp_path, Latest(1), Protected(resumed_from))
    assert steps(tmp_path) == [1, 3]


def test_kinds_and_times_come_from_the_manifest(tmp_path, monkeypatch):
    monkeypatch.setenv("TZ", "Asia/Kathmandu")
    time.tzset()
    created = ["2024-01-02T03:04:05+00:00", "2024-01-02T04:04:05+01:00", "2024-01-02T03:04:05", "1e9", "some day"]
    for step, text in enumerate(created):
        save(tmp_path, step, kind="emergency" if step == 1 else "periodic", created=text)
    found = sorted(pruning.survey(catalog.scan(tmp_path)), key=lambda one: one.step)
    monkeypatch.undo()
    time.tzset()
    assert [one.saved_at_seconds for one in found] == [1704164645.0, 1704164645.0, 1704164645.0, None, None]
    assert [one.kind for one in found] == ["periodic", "emergency", "periodic", "periodic", "periodic"]


def test_pinned_and_quarantined_ones_stay(tmp_path):
    for step in range(1, 6):
        save(tmp_path, step)
    annotate(tmp_path / "checkpoint-2", pin)
    annotate(tmp_path / "checkpoint-5", lambda noted: dataclasses.replace(noted, quarantined="flipped byte"))
    prune(tmp_path, AnyOf(()))
    assert steps(tmp_path) == [2, 4, 5]


def test_a_later_evaluation_counts_before_the_one_at_the_save(tmp_path):
    for step, loss in enumerate([1.0, 2.0, 3.0, 9.0], start=1):
        save(tmp_path, step, loss)
    annotate(tmp_path / "checkpoint-3", lambda noted: dataclasses.replace(noted, metrics={"eval_loss": 0.5}))
    annotate(tmp_path / "checkpoint-1", lambda noted: dataclasses.replace(noted, metrics={"eval_loss": math.nan}))
    prune(tmp_path, BEST)
    assert steps(tmp_path) == [2, 3, 4]


def test_one_whose_annotations_are_damaged_stays_because_it_may_be_pinned(tmp_path):
    for step in (1, 2):
        save(tmp_path, step)
    annotate(tmp_path / "checkpoint-1", pin)
    os.truncate(tmp_path / "checkpoint-1" / paths.ANNOTATIONS, 10)
    pruned = prune(tmp_path, Latest(1))
    assert steps(tmp_path) == [1, 2]
    assert "what was noted of it cannot be read, it may be pinned: " in str(pruned.verdicts[1])


@pytest.mark.parametrize("touched", [1, 2, 3])
def test_b23_times_of_files_decide_nothing(tmp_path, touched):
    for step in (1, 2, 3):
        save(tmp_path, step)
    os.utime(tmp_path / f"checkpoint-{touched}", (2**33, 2**33))
    prune(tmp_path, Latest(2))
    assert steps(tmp_path) == [2, 3]


def test_b26_what_a_person_put_there_is_never_removed(tmp_path):
    for step in (1, 2, 3, 4):
        save(tmp_path, step)
    for name in ("checkpoint-backup-mine", "checkpoint-7", "notes"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"mine")
    (tmp_path / "checkpoint-1").rename(tmp_path / "checkpoint-1-good")
    shutil.copytree(tmp_path / "checkpoint-2", tmp_path / "checkpoint-200")
    shutil.move(tmp_path / "checkpoint-3", tmp_path.parent / f"{tmp_path.name}-moved")
    (tmp_path / "checkpoint-3").symlink_to(tmp_path.parent / f"{tmp_path.name}-moved")
    before = tree(tmp_path)
    pruned = prune(tmp_path, Latest(1))
    assert [path.name for path in pruned.removed] == ["checkpoint-2"]
    assert tree(tmp_path) == {name: data for name, data in before.items() if not f"{name}/".startswith("checkpoint-2/")}
    assert (tmp_path / "checkpoint-3" / paths.MANIFEST).exists()
    assert {verdict.reasons[-1] for verdict in pruned.verdicts[1:]} == {
        "a link: it lies elsewhere",
        "checkpoint-200 is not a name that a save gives",
        "checkpoint-1-good is not a name that a save gives",
        "latest 3, 1 kept",
    }


def test_b26_one_that_is_half_removed_is_no_checkpoint_and_goes_the_next_time(tmp_path, monkeypatch, caplog):
    for step in (1, 2):
        save(tmp_path, step)

    def fail_half_way(path: Path) -> None:
        (path / "model.safetensors").unlink()
        raise PermissionError(1, "not permitted", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", fail_half_way)
        pruned = prune(tmp_path, Latest(1))
    assert (steps(tmp_path), [path.name for path in pruned.removed]) == ([2], ["checkpoint-1"])
    assert " could not be deleted: " in caplog.text
    [trash] = catalog.scan(tmp_path).unfinished
    assert trash.name.startswith(paths.TRASH_PREFIX)
    prune(tmp_path, Latest(1))
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]


def test_what_a_save_of_the_same_step_left_may_go(tmp_path):
    for step in (1, 2):
        save(tmp_path, step)
    (tmp_path / "checkpoint-1").rename(tmp_path / paths.replaced(1, "ab"))
    prune(tmp_path, Latest(1))
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]


def test_a_draft_is_not_touched(tmp_path):
    save(tmp_path, 1)
    draft = commit.begin(tmp_path, 2)
    prune(tmp_path, Latest(1))
    assert draft.directory.is_dir()


def test_b27_the_run_may_move_and_be_named_in_any_way(tmp_path, monkeypatch):
    run = tmp_path / "run"
    for step, loss in enumerate([1.0, 2.0, 3.0], start=1):
        save(run, step, loss)
        prune(run, Latest(1) | Best(1, "eval_loss"))
    run.rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    save(Path("moved"), 4, 4.0)
    prune(Path("moved"), Latest(1) | Best(1, "eval_loss"))
    save(tmp_path / "moved", 5, 5.0)
    prune(tmp_path / "moved" / ".." / "moved", Latest(1) | Best(1, "eval_loss"))
    assert steps(tmp_path / "moved") == [1, 5]


def test_b57_a_step_that_is_saved_again_is_there_once(tmp_path):
    for loss in (1.0, 1.5, 1.2):
        save(tmp_path, 1, loss)
        save(tmp_path, 2, 2.0)
        prune(tmp_path, Latest(1) | BEST)
    assert steps(tmp_path) == [1, 2]
    found = pruning.survey(catalog.scan(tmp_path))
    assert [(one.step, value) for one, value in BEST.ranked(found)] == [(1, 1.2), (2, 2.0)]


def test_b60_a_checkpoint_without_the_metric_is_said_to_be_no_candidate(tmp_path, caplog):
    save(tmp_path, 1, 2.0)
    prune(tmp_path, Latest(3) | BEST)
    assert not caplog.messages
    save(tmp_path, 2)
    prune(tmp_path, Latest(3) | BEST)
    assert caplog.messages == [
        "checkpoint-2 cannot be among the best: it has no metric 'eval_loss'; evaluate before each save "
        "(eval_on_save=True, with an eval_dataset)"
    ]


# ---- how it goes


def test_what_stays_is_durable_before_anything_goes_and_the_oldest_goes_first(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step)
    with watched(tmp_path) as calls:
        prune(tmp_path, Latest(1))
    order = [call for call in calls.seen if call[0] in ("fsync", "rename")]
    renames = [call for call in order if call[0] == "rename"]
    assert [Path(call[1]).name for call in renames] == ["checkpoint-1", "checkpoint-2"]
    assert all(Path(call[2]).name.startswith(paths.TRASH_PREFIX) for call in renames)
    synced = ("fsync", str(tmp_path))
    assert order == [synced, renames[0], synced, renames[1], synced]
    deletions = [number for number, call in enumerate(calls.seen) if call[0] in ("unlink", "rmdir")]
    assert calls.seen[: deletions[0]].count(synced) == 2, "the name is gone for good before the first file is deleted"


def test_where_nothing_goes_nothing_is_written(tmp_path):
    save(tmp_path, 1)
    with watched(tmp_path) as calls:
        prune(tmp_path, Latest(1))
    assert calls.seen == []


def test_whatever_call_fails_nothing_is_raised_and_the_right_ones_are_there(tmp_path, caplog):
    policy = Latest(1) | Best(1, "eval_loss")
    for fail_at in range(200):
        run = tmp_path / str(fail_at)
        for step, loss in enumerate([3.0, 1.0, 2.0, 4.0], start=1):
            save(run, step, loss)
        caplog.clear()
        found: list[list[int]] = []
        with watched(run) as calls:
            calls.fail_at = fail_at
            calls.after = lambda run=run, found=found: found.append(steps(run))
            pruned = prune(run, policy)
        assert all({2, 4} <= set(there) for there in found)
        assert {2, 4} <= set(steps(run))
        if pruned.verdicts:
            assert {path.name for path in pruned.removed} | {path.name for path in pruned.failed} == {
                "checkpoint-1", "checkpoint-3",
            }  # fmt: skip
            assert all(not path.exists() for path in pruned.removed)
            assert all(path.exists() for path in pruned.failed)
        if len(calls.seen) <= fail_at:
            assert not caplog.messages
            break
        assert caplog.messages, f"call {fail_at}, {calls.seen[fail_at]}, failed in silence"
        prune(run, policy)
        assert [path.name for path in sorted(run.iterdir())] == ["checkpoint-2", "checkpoint-4"]
    else:
        pytest.fail("more calls than there can be")


def test_one_that_changed_since_it_was_looked_at_stays_for_now(tmp_path, monkeypatch):
    for step in (1, 2, 3, 4):
        save(tmp_path, step)
    meanwhile = {
        1: lambda: annotate(tmp_path / "checkpoint-3", pin),
        2: lambda: save(tmp_path, 2),
    }
    set_aside = files.set_aside

    def set_aside_before_others(path: Path, nonce: str) -> Path:
        trash = set_aside(path, nonce)
        meanwhile[paths.step_in(path.name) or 0]()
        return trash

    with monkeypatch.context() as patch:
        patch.setattr(files, "set_aside", set_aside_before_others)
        first = prune(tmp_path, Latest(1))
    assert [path.name for path in first.removed] == ["checkpoint-1", "checkpoint-2"]
    assert {path.name: why for path, why in first.failed.items()} == {
        "checkpoint-3": "it changed since it was looked at"
    }
    assert steps(tmp_path) == [2, 3, 4]
    second = prune(tmp_path, Latest(1))
    assert (steps(tmp_path), [path.name for path in second.removed]) == ([2, 3], ["checkpoint-4"])


class _Broken(Policy):
    def judge(self, found):
        raise ZeroDivisionError("a mistake in somebody's policy")


def test_a_policy_that_fails_removes_nothing_and_ends_nothing(tmp_path, caplog):
    for step in (1, 2):
        save(tmp_path, step)
    assert prune(tmp_path, Latest(1) | _Broken()) == pruning.Pruned()
    assert steps(tmp_path) == [1, 2]
    assert caplog.messages == [f"no checkpoint was removed from {tmp_path}: a mistake in somebody's policy"]


def test_a_run_directory_that_is_not_there_ends_nothing(tmp_path):
    assert prune(tmp_path / "nothing", Latest(1)) == pruning.Pruned([], [], {})
