"""Which checkpoint to load, and which is the newest: by sequence, whatever the names and the clock say."""

import dataclasses
import math
import os
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forgather_ckpt import catalog, choice, commit, paths
from forgather_ckpt import manifest as manifest_module
from forgather_ckpt.annotations import annotate
from forgather_ckpt.errors import CheckpointDamaged, CheckpointNotFound, CheckpointQuarantined, UnsupportedVersion
from forgather_ckpt.resume import Candidate, choose, is_by_rank, is_selector, newest_first
from tests.checkpoints import DATA_FILE, fill


def candidate(step: int, sequence: int, name: str | None = None) -> Candidate:
    return Candidate(Path("run") / (name or f"checkpoint-{step}"), step, sequence)


FIRST, SECOND, THIRD = candidate(1000, 1), candidate(3000, 2), candidate(2000, 3)
FOUND = [SECOND, THIRD, FIRST]


@pytest.mark.parametrize(
    ("which", "chosen"),
    [
        (None, [THIRD, SECOND, FIRST]),
        ("latest", [THIRD, SECOND, FIRST]),
        ("latest~0", [THIRD]),
        ("latest~1", [SECOND]),
        ("latest~2", [FIRST]),
        (1000, [FIRST]),
        ("1000", [FIRST]),
        ("step:3000", [SECOND]),
    ],
)
def test_choices(which, chosen):
    assert choose(FOUND, which) == chosen


@pytest.mark.parametrize("which", ["latest~3", 5, "step:5", "0100"])
def test_what_is_not_there_is_said_with_what_is(which):
    with pytest.raises(CheckpointNotFound, match=r"committed steps: 2000, 3000, 1000"):
        choose(FOUND, which)


@pytest.mark.parametrize(
    "which",
    [
        "newest",
        "",
        "step:",
        "step:x",
        "latest~",
        "latest~-1",
        -5,
        1.5,
        True,
        "checkpoint-1000",
        "best~",
        "epoch:",
        "epoch:latest",
        "epoch:1.5",
        "best:1",
        "emergency~x",
        "Best",
        "best ",
        "٣",
        "9" * 19,
    ],
)
def test_what_selects_nothing_is_refused_with_what_would(which):
    with pytest.raises(CheckpointNotFound, match=r"use 'latest', 'latest~1', .*'epoch:3', a step, or a path"):
        choose(FOUND, which)


@pytest.mark.parametrize("which", [None, "latest", 0])
def test_an_empty_run_has_nothing_to_choose(which):
    with pytest.raises(CheckpointNotFound, match="committed steps: none"):
        choose([], which)


def test_b23_the_newest_has_the_highest_sequence_not_the_highest_step_or_name():
    assert newest_first([candidate(9, 1), candidate(10, 3), candidate(2, 2)]) == [
        candidate(10, 3),
        candidate(2, 2),
        candidate(9, 1),
    ]


def test_of_two_copies_the_one_with_the_plain_name_comes_first():
    plain, copied, replaced = candidate(5, 1), candidate(5, 1, "a copy"), candidate(5, 1, "checkpoint-5.replaced-ab")
    assert newest_first([copied, replaced, plain]) == [plain, copied, replaced]
    assert choose([copied, replaced, plain], 5) == [plain]


def test_of_two_checkpoints_of_one_step_the_newer_is_taken():
    assert choose([candidate(5, 1, "old"), candidate(5, 2, "new")], 5) == [candidate(5, 2, "new")]


def test_what_is_a_selector_is_no_path():
    for which in (
        "latest",
        "latest~1",
        "best",
        "best~12",
        "emergency",
        "emergency~1",
        "epoch:3",
        "15000",
        "step:15000",
    ):
        assert is_selector(which), which
    for which in ("auto", "runs/a", "best/", "./best", "epoch", "checkpoint-5", "9" * 19, ""):
        assert not is_selector(which), which
    ranked = {which for which in ("best", "best~1", "latest", "latest~1", "emergency", "epoch:1", "5", None, 5, Path("best"))
              if is_by_rank(which)}  # fmt: skip
    assert ranked == {"best", "best~1"}


# ---- by kind, epoch and metric


def stage(sequence: int, kind: str = "periodic", epoch: float | None = None) -> Candidate:
    return Candidate(Path(f"run/checkpoint-{sequence}0"), 10 * sequence, sequence, kind, epoch)


STAGES = [
    stage(1, epoch=0.5),
    stage(2, "epoch", 1.0),
    stage(3, "emergency", 1.25),
    stage(4, "epoch", 0.1 + 0.2 + 1.7),
    stage(5, "emergency", 2.0),
    stage(6, "final", 3.0),
    stage(7, epoch=None),
]


@pytest.mark.parametrize(
    ("which", "step"),
    [
        ("emergency", 50),
        ("emergency~0", 50),
        ("emergency~1", 30),
        ("epoch:1", 20),
        ("epoch:2", 40),  # that of the end of the epoch, though a signal's is newer
        ("epoch:3", 60),
        ("best", 20),
        ("best~1", 10),
    ],
)
def test_choices_by_kind_epoch_and_metric(which, step):
    ranked = [STAGES[1], STAGES[0]]
    assert [one.step for one in choose(STAGES, which, ranked=ranked)] == [step]


@pytest.mark.parametrize(
    ("which", "told"),
    [
        ("emergency~2", "emergency checkpoints: 50, 30"),
        ("epoch:0", "epochs at whose end one was saved: 3, 2, 1"),
        ("epoch:4", "epochs at whose end one was saved: 3, 2, 1"),
        ("best~1", "ranked, the best first: 20"),
    ],
)
def test_what_is_not_there_is_said_with_what_is_of_that_sort(which, told):
    with pytest.raises(CheckpointNotFound) as caught:
        choose(STAGES, which, ranked=[STAGES[1]])
    assert caught.value.message == f"there is no committed checkpoint {which!r}; {told}"


@given(st.permutations(STAGES), st.sampled_from(["latest~2", "emergency", "emergency~1", "epoch:1", "epoch:2", "30"]))
def test_the_order_of_the_catalog_does_not_matter_for_any_selector(found, which):
    assert choose(found, which) == choose(STAGES, which)


@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from(["periodic", "epoch"])), max_size=6), st.integers(0, 3))
def test_an_epoch_is_the_newest_of_those_saved_because_of_it_else_the_newest_there(saved, epoch):
    found = [stage(number, kind, float(of)) for number, (of, kind) in enumerate(saved, start=1)]
    there = [one for one in found if one.epoch == epoch and epoch > 0]
    if not there:
        with pytest.raises(CheckpointNotFound):
            choose(found, f"epoch:{epoch}")
        return
    expected = [one for one in there if one.kind == "epoch"] or there
    assert choose(found, f"epoch:{epoch}") == [max(expected, key=lambda one: one.sequence)]


# ---- in a run directory


def save(run: Path, step: int, loss: float | None = None, **said: object) -> Path:
    draft = commit.begin(run, step)
    metrics = {} if loss is None else {"eval_loss": loss}
    manifest = dataclasses.replace(fill(draft, b"content"), **{"metrics": metrics, **said})  # type: ignore[arg-type]
    path, _ = commit.publish(draft, manifest)
    return path


def steps(run: Path, which: object, **options: object) -> list[int]:
    return [one.manifest.step for one in choice.candidates(run, which, **options)]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "in_order"),
    [
        ({}, [2, 3, 1]),
        ({"best_model_metric": "loss"}, [2, 3, 1]),
        ({"best_model_metric": None, "best_model_greater_is_better": None}, [2, 3, 1]),
        ({"best_model_metric": "eval_loss", "best_model_greater_is_better": True}, [1, 3, 2]),
        ({"best_model_metric": "f1"}, [3, 2, 1]),
        ({"best_model_metric": "quality", "best_model_greater_is_better": False}, [3, 1]),
        ({"preserve_best_model": False, "save_total_limit": 3, "learning_rate": 1.0}, [2, 3, 1]),
    ],
)
def test_the_best_is_what_the_arguments_of_the_newest_say(tmp_path, arguments, in_order):
    save(tmp_path, 1, metrics={"eval_loss": 3.0, "eval_f1": 0.1, "eval_quality": 2.0}, training_args={"nothing": 1})
    save(tmp_path, 2, metrics={"eval_loss": 1.0, "eval_f1": 0.2})
    save(tmp_path, 3, metrics={"eval_loss": 2.0, "eval_f1": 0.3, "eval_quality": 1.0}, training_args=arguments)
    for place, step in enumerate(in_order):
        assert steps(tmp_path, f"best~{place}") == [step]
    assert steps(tmp_path, "best") == in_order[:1]
    assert choice.named(f"{tmp_path}@best").manifest.step == in_order[0]
    with pytest.raises(CheckpointNotFound, match="ranked, the best first: "):
        steps(tmp_path, f"best~{len(in_order)}")


def test_what_cannot_be_ranked_is_never_the_best(tmp_path):
    for step, loss in enumerate([math.nan, 2.0, -math.inf, 1.0], start=1):
        path = save(tmp_path, step)
        annotate(path, lambda noted, loss=loss: dataclasses.replace(noted, metrics={"eval_loss": loss}))
    annotate(path, lambda noted: dataclasses.replace(noted, quarantined="it diverged"))
    assert steps(tmp_path, "best") == [2]


def set_aside(path: Path, why: str = "it diverged") -> None:
    annotate(path, lambda noted: dataclasses.replace(noted, quarantined=why))


def test_what_is_quarantined_is_taken_by_its_step_or_path_alone(tmp_path, caplog):
    first, _, _, fourth = (save(tmp_path, step, float(step)) for step in (1, 2, 3, 4))
    for path in (first, fourth):
        set_aside(path)
    assert steps(tmp_path, None) == steps(tmp_path, "latest") == [3, 2]
    assert steps(tmp_path, "latest~1") == [2]
    assert steps(tmp_path, "best") == [2]
    assert caplog.text.count(f"{fourth} is passed over: quarantined: it diverged") == 4
    assert str(first) not in caplog.text  # an older one would not have been taken
    assert steps(tmp_path, 4) == steps(tmp_path, "step:4") == steps(tmp_path, fourth) == [4]
    assert caplog.text.count(f"{fourth} is taken as it was named, though quarantined: it diverged") == 3
    assert choice.named(tmp_path).manifest.step == 3
    assert choice.named(f"{tmp_path}@4").manifest.step == 4
    with pytest.raises(CheckpointNotFound, match="committed steps: 3, 2"):
        steps(tmp_path, "latest~2")


def test_where_all_are_quarantined_none_is_taken_and_no_run_starts_afresh(tmp_path):
    for step in (1, 2):
        set_aside(save(tmp_path, step), f"reason {step}")
    for which in (None, "latest", "latest~1", "best"):
        with pytest.raises(CheckpointQuarantined, match="are quarantined, checkpoint-2: reason 2; name a step"):
            steps(tmp_path, which)
    assert steps(tmp_path, 1) == [1]


def test_a_copy_of_a_quarantined_checkpoint_is_none_to_take(tmp_path):
    save(tmp_path, 1, 1.0)
    second = save(tmp_path, 2, 0.5)
    shutil.copytree(second, tmp_path / "backup")
    set_aside(second)
    assert steps(tmp_path, None) == steps(tmp_path, "latest") == steps(tmp_path, "best") == [1]


def test_a_quarantine_that_cannot_be_read_is_none(tmp_path, caplog):
    path = save(tmp_path, 1)
    set_aside(path)
    (path / paths.ANNOTATIONS).write_text("{")
    assert steps(tmp_path, None) == [1]
    assert "ignored" in caplog.text


def test_a_later_evaluation_counts_before_the_one_at_the_save(tmp_path):
    first = save(tmp_path, 1, 3.0)
    save(tmp_path, 2, 2.0)
    assert steps(tmp_path, "best") == [2]
    annotate(first, lambda noted: dataclasses.replace(noted, metrics={"eval_loss": 1.0}))
    assert steps(tmp_path, "best") == [1]


def test_a_damaged_one_is_not_the_best_and_no_other_is_tried_after_the_best(tmp_path):
    for step, loss in ((1, 1.0), (2, 2.0), (3, 3.0)):
        save(tmp_path, step, loss)
    (tmp_path / "checkpoint-1" / DATA_FILE).unlink()
    assert steps(tmp_path, "best") == [2]


def test_where_nothing_is_the_best_it_is_said_why_and_what_to_do(tmp_path):
    save(tmp_path, 1, metrics={"loss": 1.0})
    save(tmp_path, 2, metrics={"eval_f1": 1.0})
    with pytest.raises(CheckpointNotFound) as caught:
        steps(tmp_path, "best")
    assert caught.value.message == (
        "there is no best checkpoint: none has a finite 'eval_loss'; metrics that they have: eval_f1, loss. Evaluate "
        "before saving (eval_on_save=True), set best_model_metric to what is there, or name another one: 'latest' or a step"
    )
    save(tmp_path, 3, 1.0, training_args={"best_model_metric": "quality"})
    with pytest.raises(
        CheckpointNotFound, match=r"'best' means nothing in this run: .*best_model_greater_is_better=True"
    ):
        steps(tmp_path, "best")
    for run in (tmp_path / "empty", tmp_path / "nothing"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(CheckpointNotFound, match="there is no committed checkpoint 'best'"):
            steps(run, "best")


@pytest.mark.parametrize(("which", "step"), [("emergency", 2), ("epoch:1", 1), ("epoch:2", 3), (2, 2), ("latest~1", 2)])
def test_kinds_and_epochs_come_from_the_manifest(tmp_path, which, step):
    save(tmp_path, 1, kind="epoch", epoch=1.0)
    save(tmp_path, 2, kind="emergency", epoch=1.5)
    save(tmp_path, 3, kind="final", epoch=2.0)
    assert steps(tmp_path, which) == [step]
    assert choice.named(f"{tmp_path}@{which}").manifest.step == step


def test_a_selector_never_means_a_directory_of_that_name(tmp_path, monkeypatch):
    save(tmp_path, 1, 1.0)
    save(tmp_path / "elsewhere", 2, 1.0).rename(tmp_path / "best")
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run"
    save(run, 3, 1.0)
    assert steps(run, "best") == [3]
    assert steps(run, "./best") == [2]
    assert steps(run, Path("best")) == [2]


def test_a_step_that_is_there_and_not_whole_is_damaged_rather_than_absent(tmp_path):
    save(tmp_path, 1, 1.0)
    os.truncate(save(tmp_path, 2, 1.0) / DATA_FILE, 1)
    for which in (2, "2", "step:2"):
        with pytest.raises(CheckpointDamaged, match="checkpoint-2 is not whole"):
            steps(tmp_path, which)
    with pytest.raises(CheckpointNotFound, match="there is no committed checkpoint 'epoch:2'"):
        steps(tmp_path, "epoch:2")


@pytest.mark.parametrize("which", [None, "latest", "best", "emergency", "epoch:1"])
def test_one_of_a_newer_format_stands_in_the_way_of_every_choice(tmp_path, which, monkeypatch):
    save(tmp_path, 1, 1.0, kind="emergency", epoch=1.0)
    draft = commit.begin(tmp_path, 2)
    with monkeypatch.context() as patch:
        patch.setattr(manifest_module, "VERSION", "2.0")
        data = fill(draft, b"content").to_bytes()
    (draft.directory / paths.MANIFEST).write_bytes(data)
    draft.directory.rename(draft.final)
    with pytest.raises(UnsupportedVersion):
        steps(tmp_path, which)


# ---- those to avoid


def digest(run: Path, step: int) -> str:
    return catalog.read_checkpoint(run / paths.checkpoint(step)).manifest.digest


@pytest.mark.parametrize("which", [None, "latest"])
def test_those_to_avoid_are_passed_over_where_the_choice_is_ours(tmp_path, which, caplog):
    for step in (1, 2, 3):
        save(tmp_path, step)
    avoid = [digest(tmp_path, 3), digest(tmp_path, 1), "0" * 32]
    assert steps(tmp_path, which, avoid=avoid) == [2]
    assert caplog.messages == [f"{tmp_path}/checkpoint-{step} is passed over: it is to be avoided" for step in (3, 1)]
    assert steps(tmp_path, which, avoid=frozenset()) == [3, 2, 1]


def test_where_all_are_to_be_avoided_none_is_taken(tmp_path):
    save(tmp_path, 1)
    save(tmp_path, 2)
    with pytest.raises(CheckpointNotFound, match=r"all checkpoints of .* are to be avoided \(of steps 2, 1\)"):
        steps(tmp_path, None, avoid=[digest(tmp_path, 1), digest(tmp_path, 2)])


@pytest.mark.parametrize("which", [1, "1", "step:1", "latest~0", "best", "epoch:1"])
def test_one_that_is_named_is_taken_though_it_is_to_be_avoided(tmp_path, which, caplog):
    path = save(tmp_path, 1, 1.0, epoch=1.0)
    assert steps(tmp_path, which, avoid=[digest(tmp_path, 1)]) == [1]
    assert steps(tmp_path, path, avoid=[digest(tmp_path, 1)]) == [1]
    assert not caplog.messages


# ---- the order


candidates = st.lists(
    st.builds(candidate, st.integers(0, 5), st.integers(1, 5), st.none() | st.text(max_size=3)),
    max_size=6,
    unique_by=lambda one: one.path,
)


@given(candidates, st.randoms())
def test_the_order_of_the_catalog_does_not_matter(found, random):
    ordered = newest_first(found)
    assert newest_first(random.sample(found, len(found))) == ordered
    assert [one.sequence for one in ordered] == sorted((one.sequence for one in found), reverse=True)
