"""From a fresh directory to a checkpoint: in the one order that is safe, whatever fails on the way."""

import dataclasses
import errno
import os

import pytest
import torch

from forgather_ckpt import (
    CheckpointCoordinator,
    SharingPattern,
    StateComponent,
    annotations,
    catalog,
    commit,
    files,
    paths,
    pruning,
)
from forgather_ckpt.errors import FormatError, NoSpace, StorageError
from forgather_ckpt.policies import Latest
from forgather_ckpt.retention import Protected
from tests.checkpoints import commit_one, contents, fill, tree
from tests.components import Box
from tests.system_calls import watched


def refuse_exchange(one, other):
    return False


EXCHANGES = pytest.mark.parametrize(
    "exchange", [files.exchange, refuse_exchange], ids=["exchange", "file system without exchange"]
)


def test_a_checkpoint_is_what_was_published(tmp_path):
    draft = commit.begin(tmp_path / "run", 1000)
    manifest = fill(draft, b"content")
    assert contents(tmp_path / "run") == []
    path, digest = commit.publish(draft, manifest)
    assert path == tmp_path / "run" / "checkpoint-1000"
    assert tree(tmp_path / "run").keys() == {
        path.name,
        f"{path.name}/{paths.MANIFEST}",
        f"{path.name}/model.safetensors",
    }
    assert catalog.read_checkpoint(path).manifest.digest == digest


def test_a_manifest_that_could_not_be_read_back_is_refused_before_anything_is_published(tmp_path):
    draft = commit.begin(tmp_path, 5)
    unreadable = dataclasses.replace(fill(draft, b"content"), step=2**63)
    before = tree(tmp_path)
    with pytest.raises(FormatError, match="field 'step'"):
        commit.publish(draft, unreadable)
    assert tree(tmp_path) == before


def test_every_draft_has_a_directory_of_its_own(tmp_path):
    drafts = [commit.begin(tmp_path, 5) for _ in range(5)]
    assert len({draft.directory for draft in drafts}) == 5
    assert all(paths.is_temporary(draft.directory.name) for draft in drafts)


# ---- the order of the steps


def test_the_manifest_is_durable_before_the_name_and_the_name_before_the_end(tmp_path):
    draft = commit.begin(tmp_path, 1)
    manifest = fill(draft, b"content")
    with watched(tmp_path) as calls:
        commit.publish(draft, manifest)
    temporary, final = str(draft.directory), str(draft.final)
    steps = [call for call in calls.seen if call[0] in ("fsync", "rename", "exchange")]
    assert steps == [
        ("fsync", f"{temporary}/{paths.MANIFEST}"),
        ("fsync", temporary),
        ("rename", temporary, final),
        ("fsync", str(tmp_path)),
    ]


def test_an_old_checkpoint_is_deleted_only_after_the_new_one_is_durable(tmp_path):
    commit_one(tmp_path, 1, b"old")
    draft = commit.begin(tmp_path, 1)
    manifest = fill(draft, b"new")
    with watched(tmp_path) as calls:
        commit.publish(draft, manifest)
    names = [call[0] for call in calls.seen]
    assert names.index("exchange") < names.index("unlink")
    assert ("fsync", str(tmp_path)) in calls.seen[names.index("exchange") : names.index("unlink")]


def test_without_exchange_every_rename_is_durable_before_the_next(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "exchange", refuse_exchange)
    commit_one(tmp_path, 1, b"old")
    draft = commit.begin(tmp_path, 1)
    manifest = fill(draft, b"new")
    with watched(tmp_path) as calls:
        commit.publish(draft, manifest)
    run, final, old = str(tmp_path), str(draft.final), str(tmp_path / paths.replaced(1, draft.nonce))
    trash = str(tmp_path / paths.trash(paths.replaced(1, draft.nonce), draft.nonce))
    steps = [call for call in calls.seen if call[0] in ("fsync", "rename")]
    assert steps[2:] == [
        ("rename", final, old),
        ("fsync", run),
        ("rename", str(draft.directory), final),
        ("fsync", run),
        ("rename", old, trash),
        ("fsync", run),
    ]
    assert names_after(calls.seen, ("fsync", run), "unlink")


def names_after(seen, call, name) -> bool:
    """Whether `name` is called, and only after the last `call`."""
    last = max(number for number, one in enumerate(seen) if one == call)
    return name in [one[0] for one in seen[last:]] and name not in [one[0] for one in seen[:last]]


def test_all_data_of_a_save_is_durable_before_its_manifest_exists(tmp_path):
    state = {"large": torch.zeros(3 << 20), "small": torch.zeros(3), "value": 1}
    components = [StateComponent(key, Box(state), SharingPattern.GLOBAL) for key in ("model", "other")]
    with CheckpointCoordinator(components, tmp_path) as coordinator, watched(tmp_path) as calls:
        path = coordinator.save_checkpoint(step=1)
    temporary = next(call[1] for call in calls.seen if call[0] == "mkdir")
    manifest = next(
        number for number, call in enumerate(calls.seen) if call[:2] == ("open", f"{temporary}/{paths.MANIFEST}")
    )
    synced = {call[1] for call in calls.seen[:manifest] if call[0] == "fsync"}
    assert {f"{temporary}/{file.name}" for file in path.iterdir() if file.name != paths.MANIFEST} <= synced
    for file in synced:
        last_write = max(number for number, call in enumerate(calls.seen) if call[:2] == ("pwrite", file))
        assert calls.seen.index(("fsync", file)) > last_write
    assert [call for call in calls.seen[manifest:] if call[0] in ("fsync", "rename")] == [
        ("fsync", f"{temporary}/{paths.MANIFEST}"),
        ("fsync", temporary),
        ("rename", temporary, str(path)),
        ("fsync", str(tmp_path)),
    ]


# ---- replacing


@EXCHANGES
def test_b28_a_replaced_checkpoint_leaves_nothing_behind(tmp_path, monkeypatch, exchange):
    monkeypatch.setattr(files, "exchange", exchange)
    (commit_one(tmp_path, 5, b"old") / "stale-00007.safetensors").touch()
    commit_one(tmp_path, 5, b"new")
    assert contents(tmp_path) == [b"new"]
    assert tree(tmp_path).keys() == {
        "checkpoint-5", f"checkpoint-5/{paths.MANIFEST}", "checkpoint-5/model.safetensors",
    }  # fmt: skip


@EXCHANGES
@pytest.mark.parametrize("noted", ["pinned", "quarantined", "unreadable"])
def test_what_is_pinned_or_quarantined_stays_beside_the_new_one_of_its_step(tmp_path, monkeypatch, exchange, noted):
    monkeypatch.setattr(files, "exchange", exchange)
    old = commit_one(tmp_path, 5, b"old")
    sequence = catalog.read_checkpoint(old).manifest.sequence
    if noted == "unreadable":
        (old / paths.ANNOTATIONS).write_bytes(b"{")
    else:
        annotations.annotate(
            old,
            lambda one: dataclasses.replace(
                one, is_pinned=noted == "pinned", quarantined="odd" if noted != "pinned" else None
            ),
        )
    commit_one(tmp_path, 5, b"new")
    commit_one(tmp_path, 5, b"newer")
    kept = tmp_path / f"checkpoint-5.kept-{sequence}"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-5", kept.name]
    assert contents(tmp_path) == [b"newer", b"old"]
    assert commit_one(tmp_path, 6, b"next")
    pruned = pruning.prune(tmp_path, Latest(1), Protected())
    assert [path.name for path in pruned.removed] == ["checkpoint-5"]
    assert (kept / paths.ANNOTATIONS).exists()


@EXCHANGES
def test_at_every_instant_one_of_the_two_is_found(tmp_path, monkeypatch, exchange):
    monkeypatch.setattr(files, "exchange", exchange)
    commit_one(tmp_path, 5, b"old")
    found = []
    with watched(tmp_path) as calls:
        calls.after = lambda: found.append(contents(tmp_path))
        commit_one(tmp_path, 5, b"new")
    assert len(found) == len(calls.seen) > 10
    assert all(one in ([b"old"], [b"new"], [b"new", b"old"]) for one in found)
    assert (found[0], found[-1]) == ([b"old"], [b"new"])
    assert found == sorted(found, key=lambda one: b"new" in one), "once the new one is there it stays"


def attempt(run, content) -> bool:
    """What a save does; False if it fails."""
    try:
        draft = commit.begin(run, 5)
    except StorageError:
        return False
    try:
        try:
            manifest = fill(draft, content)
        except OSError:
            raise StorageError("a data file") from None
        commit.publish(draft, manifest)
    except StorageError:
        commit.abandon(draft)
        return False
    return True


@EXCHANGES
@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC], ids=["EIO", "ENOSPC"])
def test_whatever_call_fails_one_of_the_two_is_found_and_the_next_save_works(tmp_path, monkeypatch, exchange, number):
    monkeypatch.setattr(files, "exchange", exchange)
    outcomes = []
    for fail_at in range(1000):
        run = tmp_path / str(fail_at)
        commit_one(run, 5, b"old")
        with watched(run) as calls:
            calls.fail_at, calls.errno = fail_at, number
            calls.after = lambda run=run: outcomes.append(contents(run))
            is_saved = attempt(run, b"new")
        assert all(outcomes), f"after call {fail_at}, {calls.seen[fail_at]}, neither was found for a while"
        assert contents(run)[0] == b"new" if is_saved else contents(run)
        assert attempt(run, b"newest")
        assert contents(run)[0] == b"newest"
        commit.sweep(run)
        assert not catalog.scan(run).unfinished
        if len(calls.seen) <= fail_at:
            assert is_saved
            break
    else:
        pytest.fail("more calls than there can be")


def test_an_exchange_that_may_not_be_durable_deletes_neither(tmp_path):
    """After the exchange the old checkpoint has the draft's name; when the sync fails, it may still be the only one."""
    commit_one(tmp_path, 5, b"old")
    draft = commit.begin(tmp_path, 5)
    manifest = fill(draft, b"new")
    with watched(tmp_path) as calls:
        calls.after = lambda: setattr(
            calls, "fail_at", len(calls.seen) if calls.seen[-1][0] == "exchange" else calls.fail_at
        )
        with pytest.raises(StorageError, match="committing the checkpoint failed"):
            commit.publish(draft, manifest)
    commit.abandon(draft)
    assert contents(tmp_path) == [b"new"]
    assert (draft.directory / "model.safetensors").read_bytes() == b"old"


def test_errors_are_typed_and_say_what_was_being_done(tmp_path):
    draft = commit.begin(tmp_path, 1)
    manifest = fill(draft, b"content")
    with watched(tmp_path) as calls:
        calls.fail_at, calls.errno = 0, errno.ENOSPC
        with pytest.raises(NoSpace, match=r"committing the checkpoint failed at .*manifest\.json: No space left"):
            commit.publish(draft, manifest)


def test_b29_an_abandoned_save_leaves_nothing(tmp_path):
    draft = commit.begin(tmp_path, 5)
    fill(draft, b"content")
    commit.abandon(draft)
    assert tree(tmp_path) == {}
    commit.abandon(draft)


def test_a_draft_that_cannot_be_removed_is_no_further_error(tmp_path):
    draft = commit.begin(tmp_path, 5)
    with watched(tmp_path) as calls:
        calls.fail_at = 0
        commit.abandon(draft)
    assert catalog.scan(tmp_path).unfinished == (draft.directory,)


# ---- what is not ours


def test_b26_what_is_not_ours_is_neither_replaced_nor_swept(tmp_path):
    mine = tmp_path / "checkpoint-backup-mine"
    bare = tmp_path / "checkpoint-5"
    for directory in (mine, bare, tmp_path / "checkpoint-6.replaced-ab", tmp_path / "tmp-checkpoint-5"):
        directory.mkdir()
        (directory / "model.safetensors").write_bytes(b"mine")
    (tmp_path / "notes.txt").write_text("mine")
    before = tree(tmp_path)
    with pytest.raises(
        StorageError, match=r"checkpoint-5 exists and is not a checkpoint of ours .*; move it away"
    ) as caught:
        commit.begin(tmp_path, 5)
    assert caught.value.path == str(bare)
    commit.sweep(tmp_path)
    assert tree(tmp_path) == before
    commit_one(tmp_path, 6)
    commit_one(tmp_path, 6)
    assert tree(tmp_path).items() >= before.items()


@pytest.mark.parametrize("target", ["elsewhere", "nothing"])
def test_a_link_in_the_place_of_a_checkpoint_is_not_followed(tmp_path, target):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "file").write_bytes(b"precious")
    run = tmp_path / "run"
    run.mkdir()
    (run / "checkpoint-5").symlink_to(tmp_path / target)
    with pytest.raises(StorageError, match="is not a checkpoint of ours"):
        commit.begin(run, 5)
    assert tree(tmp_path / "elsewhere") == {"file": b"precious"}


@EXCHANGES
def test_a_link_to_a_checkpoint_is_replaced_and_the_checkpoint_stays(tmp_path, monkeypatch, exchange):
    monkeypatch.setattr(files, "exchange", exchange)
    elsewhere = commit_one(tmp_path / "elsewhere", 5, b"precious")
    run = tmp_path / "run"
    run.mkdir()
    (run / "checkpoint-5").symlink_to(elsewhere)
    commit_one(run, 5, b"new")
    assert contents(run) == [b"new"]
    assert contents(tmp_path / "elsewhere") == [b"precious"]


def test_leftovers_of_dead_jobs_are_swept(tmp_path):
    good = commit_one(tmp_path, 1)
    draft = commit.begin(tmp_path, 2)
    fill(draft, b"half")
    (tmp_path / paths.trash("checkpoint-0", "ab")).mkdir()
    commit.sweep(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [good.name]


def test_a_link_among_the_leftovers_is_not_followed(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "file").write_bytes(b"precious")
    run = tmp_path / "run"
    run.mkdir()
    (run / ".tmp-checkpoint-1-ab").symlink_to(tmp_path / "elsewhere")
    (run / ".tmp-checkpoint-2-ab").mkdir()
    (run / ".tmp-checkpoint-2-ab" / "link").symlink_to(tmp_path / "elsewhere")
    commit.sweep(run)
    assert tree(tmp_path / "elsewhere") == {"file": b"precious"}
    assert not (run / ".tmp-checkpoint-2-ab").exists()


def test_a_run_directory_is_made_with_its_parents(tmp_path):
    draft = commit.begin(tmp_path / "a" / "b", 1)
    assert draft.directory.is_dir()
    assert draft.sequence == 1


def test_where_no_directory_can_be_made_it_says_so(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=r"making a directory for the checkpoint failed at .*file"):
        commit.begin(tmp_path / "file" / "run", 1)
    with pytest.raises(StorageError, match=r"making a directory for the checkpoint failed at .*file"):
        commit.begin(tmp_path / "file", 1)


@pytest.mark.parametrize("mask", [0o007, 0o022, 0o077], ids=oct)
def test_the_umask_decides_who_may_read_a_checkpoint(tmp_path, mask):
    before = os.umask(mask)
    try:
        components = [StateComponent("model", Box({"w": torch.zeros(3)}), SharingPattern.GLOBAL)]
        with CheckpointCoordinator(components, tmp_path / "run") as coordinator:
            path = coordinator.save_checkpoint(step=1)
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o777 & ~mask
    assert {file.stat().st_mode & 0o777 for file in path.iterdir()} == {0o666 & ~mask}
