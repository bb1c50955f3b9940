"""Loading gives one verified state or a typed error: what is damaged, missing or of another shape is never mixed in."""

import shutil
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from forgather_ckpt import CheckpointCoordinator, SharingPattern, StateComponent, Target, paths
from forgather_ckpt.errors import (
    CheckpointDamaged,
    CheckpointError,
    CheckpointNotFound,
    DeclarationError,
    FormatError,
    LoadMismatch,
    StorageError,
    TornState,
)
from forgather_ckpt.hashtree import BLOCK_BYTES
from tests.components import Box
from tests.ranks import errors, run_ranks, values
from tests.states import assert_same, tensor_bytes, tensor_of
from tests.system_calls import watched

GLOBAL, PER_RANK, REPLICATED = SharingPattern.GLOBAL, SharingPattern.PER_RANK, SharingPattern.REPLICATED


def job(run, *, pattern=GLOBAL, required=(), **states) -> tuple[CheckpointCoordinator, dict[str, Box]]:
    """A job with a component for every state, and the boxes in which they lie."""
    boxes = {key: state if hasattr(state, "state_dict") else Box(state) for key, state in states.items()}
    components = [
        StateComponent(key, box, pattern, required=not required or key in required) for key, box in boxes.items()
    ]
    return CheckpointCoordinator(components, run), boxes


class Choosing(Box):
    """One that has nothing yet, and says where it wants what there is."""

    def __init__(self, targets: Callable[[Mapping[str, Any]], dict[str, Target]]) -> None:
        super().__init__({})
        self.load_targets = targets


def states(label: int) -> dict[str, dict]:
    """The states of three components; everything in them depends on the label."""
    return {
        "model": {"w": tensor_of("float32", (3 << 20,), seed=label), "b": tensor_of("bfloat16", (7, 3), seed=label)},
        "optimizer": {"m": {number: tensor_of("float32", (5,), seed=label + number) for number in range(3)}, "lr": label / 7},
        "progress": {"step": label, "history": [label, {"x": (label,)}]},
    }  # fmt: skip


def save(run, step, *, pattern=GLOBAL, **contents):
    coordinator, _ = job(run, pattern=pattern, **contents)
    with coordinator:
        return coordinator.save_checkpoint(step)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A run with checkpoints of steps 1 and 2."""
    run = tmp_path_factory.mktemp("original")
    for step in (1, 2):
        save(run, step, **states(step))
    return run


@pytest.fixture
def run(original, tmp_path):
    return shutil.copytree(original, tmp_path / "run")


def items(boxes) -> dict:
    return {key: box.items for key, box in boxes.items()}


def damage(path, position) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 4]))


FILES = ["model.safetensors", "small-00000.safetensors", "index-00000.json", paths.MANIFEST]
PLACES = {"start": 0.0, "early": 0.01, "middle": 0.5, "late": 0.99, "end": 1.0}


def data_positions(path) -> list[int]:
    """Where a flipped bit is tried: anywhere, and in a tensor file in its data."""
    data = path.read_bytes()
    first = 8 + int.from_bytes(data[:8], "little") if path.suffix == ".safetensors" else 0
    return [first + int(share * (len(data) - first - 1)) for share in PLACES.values()]


# ---- damage


def test_there_are_no_files_but_those_that_are_damaged_below(original):
    assert sorted(path.name for path in (original / "checkpoint-2").iterdir()) == sorted(FILES)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("place", range(len(PLACES)), ids=PLACES)
def test_b21_a_flipped_bit_in_any_file_is_found_and_reaches_no_live_tensor(run, name, place):
    path = run / "checkpoint-2" / name
    position = data_positions(path)[place]
    damage(path, position)
    live, old, new = states(9), states(9), states(2)
    coordinator, _ = job(run, **live)
    with coordinator, pytest.raises(CheckpointError) as caught:
        coordinator.load_checkpoint(2)
    assert isinstance(caught.value, CheckpointDamaged | FormatError | CheckpointNotFound)
    for item in ("w", "b"):
        found, *allowed = (tensor_bytes(one["model"][item]) for one in (live, old, new))
        for start in range(0, len(found), BLOCK_BYTES):
            block = slice(start, start + BLOCK_BYTES)
            assert found[block] in [content[block] for content in allowed], f"{item}, from byte {start}"
    assert live["progress"] == states(9)["progress"]


@pytest.mark.parametrize("name", FILES)
def test_staged_a_damaged_checkpoint_touches_nothing(run, name):
    path = run / "checkpoint-2" / name
    damage(path, data_positions(path)[2])
    coordinator, boxes = job(run, **states(9))
    with coordinator:
        with pytest.raises(CheckpointError):
            coordinator.load_checkpoint(2, staged=True)
        assert_same(items(boxes), states(9))
        coordinator.save_checkpoint(3)


@pytest.mark.parametrize("staged", [False, True])
@pytest.mark.parametrize("name", FILES)
def test_the_newest_good_checkpoint_is_taken(run, name, staged):
    path = run / "checkpoint-2" / name
    damage(path, data_positions(path)[3])
    coordinator, boxes = job(run, **states(9))
    with coordinator:
        report = coordinator.load_checkpoint(staged=staged)
        assert (report.step, report.path) == (1, run / "checkpoint-1")
        if name != paths.MANIFEST:
            [(passed_over, reason)] = report.fell_back_from
            assert passed_over == run / "checkpoint-2"
            assert "digest" in reason
        assert_same(items(boxes), states(1))
        coordinator.save_checkpoint(3)


@pytest.mark.parametrize("name", FILES)
def test_b19_b20_a_missing_or_short_file_means_the_one_before(run, name):
    path = run / "checkpoint-2" / name
    data = path.read_bytes()
    coordinator, boxes = job(run, **states(9))
    with coordinator:
        for left in (None, b"", data[: len(data) // 2], data[:-1], data + b"x"):
            path.unlink()
            if left is not None:
                path.write_bytes(left)
            assert coordinator.load_checkpoint().step == 1
            assert_same(items(boxes), states(1))
            path.write_bytes(data)
        assert coordinator.load_checkpoint().step == 2
        assert_same(items(boxes), states(2))


def test_files_of_another_checkpoint_are_not_believed(run):
    """Whole files, with digests that are right for their own bytes."""
    for name in ("model.safetensors", "index-00000.json"):
        shutil.copy(run / "checkpoint-1" / name, run / "checkpoint-2" / name)
        coordinator, _ = job(run, **states(9))
        with coordinator, pytest.raises(CheckpointError):
            coordinator.load_checkpoint(2)


# ---- torn


def damaged_run(run):
    damage(
        run / "checkpoint-2" / "small-00000.safetensors",
        data_positions(run / "checkpoint-2" / "small-00000.safetensors")[2],
    )


def test_a_torn_state_is_not_saved_until_a_load_succeeds(run):
    damaged_run(run)
    coordinator, boxes = job(run, **states(9))
    with coordinator:
        with pytest.raises(CheckpointDamaged) as caught:
            coordinator.load_checkpoint(2)
        assert "The live state of model, optimizer, progress is now torn between two states" in caught.value.message
        for _ in range(2):
            with pytest.raises(TornState, match="the state of model, optimizer, progress is torn; load a checkpoint"):
                coordinator.save_checkpoint(3)
        with pytest.raises(LoadMismatch):
            coordinator.load_checkpoint(components=["nothing"])
        with pytest.raises(TornState):
            coordinator.save_checkpoint(3)
        coordinator.load_checkpoint(1)
        coordinator.save_checkpoint(3)
    assert_same(items(boxes), states(1))


def test_a_part_that_was_loaded_again_is_whole_again(run):
    damaged_run(run)
    coordinator, _ = job(run, **states(9))
    with coordinator:
        with pytest.raises(CheckpointDamaged):
            coordinator.load_checkpoint(2)
        coordinator.load_checkpoint(1, components=["model", "optimizer"])
        with pytest.raises(TornState, match="the state of progress is torn"):
            coordinator.save_checkpoint(3)
        coordinator.load_checkpoint(1, components=["progress"])
        coordinator.save_checkpoint(3)


def test_a_failure_in_prepare_is_not_torn(run):
    damage(run / "checkpoint-2" / "index-00000.json", 100)
    coordinator, boxes = job(run, **states(9))
    with coordinator:
        with pytest.raises(CheckpointDamaged) as caught:
            coordinator.load_checkpoint(2)
        assert "torn" not in caught.value.message
        assert_same(items(boxes), states(9))
        coordinator.save_checkpoint(3)


def test_a_fallback_that_does_not_fit_leaves_the_state_torn(tmp_path):
    """The older checkpoint is of another shape: its error must not hide that the newer one was half loaded."""
    save(tmp_path, 1, model={"w": torch.zeros(2), "x": torch.zeros(3)})
    path = save(tmp_path, 2, model={"w": torch.ones(2), "x": torch.ones(4)})
    damage(path / "small-00000.safetensors", path.joinpath("small-00000.safetensors").stat().st_size - 1)
    coordinator, _ = job(tmp_path, model={"w": torch.zeros(2), "x": torch.zeros(4)})
    with coordinator:
        with pytest.raises(LoadMismatch, match="'x' is float32 \\[3\\] in the checkpoint") as caught:
            coordinator.load_checkpoint()
        assert "The live state of model is now torn" in caught.value.message
        with pytest.raises(TornState):
            coordinator.save_checkpoint(3)


@pytest.mark.parametrize("error", [RuntimeError("it does not fit"), KeyError("w"), ZeroDivisionError()])
def test_b37_a_component_that_refuses_its_state_leaves_no_doubt(run, error):
    coordinator, boxes = job(run, **states(9))
    boxes["optimizer"].fail_load = error
    with coordinator:
        with pytest.raises(LoadMismatch) as caught:
            coordinator.load_checkpoint()
        assert f"component 'optimizer': load_state_dict() raised {type(error).__name__}" in caught.value.message
        assert "is now torn" in caught.value.message
        assert caught.value.component == "optimizer"
        with pytest.raises(TornState):
            coordinator.save_checkpoint(3)
        boxes["optimizer"].fail_load = None
        coordinator.load_checkpoint()
        coordinator.save_checkpoint(3)
    assert_same(items(boxes), states(2))


def test_b37_an_optional_component_that_refuses_its_state_is_no_exception(run):
    coordinator, boxes = job(run, required=("model",), **states(9))
    boxes["progress"].fail_load = RuntimeError("half-way")
    with coordinator:
        with pytest.raises(
            LoadMismatch, match="component 'progress': load_state_dict\\(\\) raised RuntimeError: half-way"
        ):
            coordinator.load_checkpoint()
        with pytest.raises(TornState):
            coordinator.save_checkpoint(3)


# ---- what the job and the checkpoint have


def test_the_report_says_what_was_loaded_from_where(run):
    coordinator, _ = job(run, **states(9))
    with coordinator:
        report = coordinator.load_checkpoint("latest~1")
    assert (report.path, report.step, report.sequence, report.epoch) == (run / "checkpoint-1", 1, 1, None)
    assert (report.loaded, dict(report.skipped), report.fell_back_from) == (("model", "optimizer", "progress"), {}, ())


@pytest.mark.parametrize(
    ("which", "step"),
    [
        (None, 2), ("latest", 2), ("latest~1", 1), (1, 1), ("1", 1), ("step:2", 2),
        (lambda run: run / "checkpoint-1", 1), (lambda run: str(run / "checkpoint-1"), 1),
    ],
)  # fmt: skip
def test_a_checkpoint_is_chosen_by_age_step_or_path(run, which, step):
    coordinator, boxes = job(run, **states(9))
    with coordinator:
        assert coordinator.load_checkpoint(which(run) if callable(which) else which).step == step
    assert_same(items(boxes), states(step))


def test_what_is_not_there_is_not_found(run, tmp_path):
    coordinator, _ = job(run, **states(9))
    with coordinator:
        for which in (5, "latest~7", tmp_path / "nothing", str(tmp_path / "nothing")):
            with pytest.raises(CheckpointNotFound):
                coordinator.load_checkpoint(which)
    coordinator, _ = job(tmp_path / "empty", **states(9))
    with coordinator, pytest.raises(CheckpointNotFound, match="committed steps: none"):
        coordinator.load_checkpoint()


def test_loading_writes_nothing(run):
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    coordinator, _ = job(run, **states(9))
    with coordinator, watched(run) as calls:
        coordinator.load_checkpoint()
    assert {call[0] for call in calls.seen} <= {"open"}
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_only_the_named_components_are_loaded(run):
    coordinator, boxes = job(run, **states(9))
    with coordinator:
        report = coordinator.load_checkpoint(components=["progress", "model"])
    assert report.loaded == ("model", "progress")
    assert_same(items(boxes), {**states(2), "optimizer": states(9)["optimizer"]})


def test_unknown_components_are_an_error(run):
    coordinator, _ = job(run, **states(9))
    with (
        coordinator,
        pytest.raises(LoadMismatch, match=r"components=\['sched'\] are not declared by the job; declared: "),
    ):
        coordinator.load_checkpoint(components=["model", "sched"])


MODEL, EXTRA = {"w": torch.ones(2)}, {"e": 1}
REQUIRED = "component 'extra' is required and the checkpoint of step 1 does not have it; it has ['model']. Declare it"
MISSING = "component 'extra' is not in the checkpoint of step 1; load with strict=False to start it fresh"
UNKNOWN = "the checkpoint of step 1 has the component 'extra', which the job does not declare; declare it, or load with"


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    ("saved", "wanted", "required", "components", "strictly", "otherwise"),
    [
        (["model"], ["model"], [], None, {}, {}),
        # the job has more than the checkpoint
        (["model"], ["model", "extra"], [], None, REQUIRED, REQUIRED),
        (["model"], ["model", "extra"], ["model"], None, MISSING, {"extra": "not in the checkpoint"}),
        (["model"], ["model", "extra"], [], ["model"], {}, {}),
        (["model"], ["model", "extra"], [], ["model", "extra"], REQUIRED, REQUIRED),
        (["model"], ["model", "extra"], ["model"], ["model", "extra"], MISSING, {"extra": "not in the checkpoint"}),
        # the checkpoint has more than the job
        (["model", "extra"], ["model"], [], None, UNKNOWN, {"extra": "not declared by the job"}),
        (["model", "extra"], ["model"], [], ["model"], {}, {}),
    ],
)
def test_what_one_has_and_the_other_has_not(tmp_path, saved, wanted, required, components, strictly, otherwise, strict):
    contents = {"model": MODEL, "extra": EXTRA}
    save(tmp_path, 1, **{key: contents[key] for key in saved})
    coordinator, boxes = job(tmp_path, required=required or wanted, **{key: {} for key in wanted})
    expected = strictly if strict else otherwise
    with coordinator:
        if isinstance(expected, str):
            with pytest.raises(LoadMismatch) as caught:
                coordinator.load_checkpoint(components=components, strict=strict)
            assert expected in caught.value.message
            assert caught.value.component == "extra"
            assert items(boxes) == {key: {} for key in wanted}
            coordinator.save_checkpoint(2)
        else:
            report = coordinator.load_checkpoint(components=components, strict=strict)
            assert dict(report.skipped) == expected
            assert_same(boxes["model"].items, MODEL)
            assert set(report.loaded) == set(saved) & set(components or wanted)


def test_a_component_that_could_not_be_saved_is_told_at_the_load(tmp_path):
    coordinator, boxes = job(tmp_path, required=("model",), model=MODEL, extra=EXTRA)
    boxes["extra"].fail_save = RuntimeError("not now")
    with coordinator:
        coordinator.save_checkpoint(1)
        boxes["extra"].fail_save = None
        report = coordinator.load_checkpoint()
    assert report.loaded == ("model",)
    assert "left out when it was saved: " in report.skipped["extra"]
    assert "RuntimeError: not now" in report.skipped["extra"]


# ---- the same name, another thing


@pytest.mark.parametrize(
    ("then", "now"),
    [(GLOBAL, PER_RANK), (PER_RANK, GLOBAL), (REPLICATED, PER_RANK), (PER_RANK, SharingPattern.PER_NODE)],
)
@pytest.mark.parametrize("strict", [True, False])
def test_b34_a_changed_pattern_is_an_error(tmp_path, then, now, strict):
    coordinator, _ = job(tmp_path, pattern=then, data={"position": 5})
    with coordinator:
        coordinator.save_checkpoint(1)
    coordinator, boxes = job(tmp_path, pattern=now, data={"position": 0})
    with coordinator, pytest.raises(LoadMismatch) as caught:
        coordinator.load_checkpoint(strict=strict)
    assert f"'data' was saved as {then.name} with" in caught.value.message
    assert f"is declared {now.name} with" in caught.value.message
    assert boxes["data"].items == {"position": 0}


@pytest.mark.parametrize(("then", "now"), [(GLOBAL, REPLICATED), (REPLICATED, GLOBAL)])
def test_patterns_with_global_names_may_follow_each_other(tmp_path, then, now):
    coordinator, _ = job(tmp_path, pattern=then, data={"position": torch.ones(5)})
    with coordinator:
        coordinator.save_checkpoint(1)
    coordinator, boxes = job(tmp_path, pattern=now, data={})
    with coordinator:
        coordinator.load_checkpoint()
    assert_same(boxes["data"].items, {"position": torch.ones(5)})


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (
            lambda model: model.add_module("more", nn.Linear(1, 1)),
            "'more.bias', 'more.weight' in the job's module but not in",
        ),
        (
            lambda model: model.add_module("1", nn.ModuleDict({"_orig_mod": model[1]})),  # as torch.compile names it
            "build the model as it was saved, and compile modules in place, by module.compile(), which leaves their names",
        ),
        (lambda model: model.pop(1), "'1.bias', '1.weight' in the checkpoint but not in the job's module"),
        (
            lambda model: model.__setitem__(0, nn.Linear(3, 5)),
            "'0.weight' is float32 [4, 3] in the checkpoint and float32 [5, 3]",
        ),
        (lambda model: model[0].half(), "'0.weight' is float32 [4, 3] in the checkpoint and float16 [4, 3] in the job"),
    ],
)
def test_another_model_is_refused_before_a_weight_is_touched(tmp_path, change, problem):
    save(tmp_path, 1, model=nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)))
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    change(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    coordinator, _ = job(tmp_path, model=model)
    with coordinator:
        with pytest.raises(LoadMismatch) as caught:
            coordinator.load_checkpoint()
        assert problem in caught.value.message
        coordinator.save_checkpoint(2)
    assert_same(dict(model.state_dict()), before)


def test_a_stateful_that_changes_dtypes_is_found_out(tmp_path):
    class Caster(Box):
        def load_state_dict(self, state_dict):
            self.items = {name: tensor.bfloat16() for name, tensor in state_dict.items()}

    save(tmp_path, 1, model={"w": torch.ones(3)})
    coordinator, _ = job(tmp_path, model=Caster({}))
    with coordinator, pytest.raises(LoadMismatch) as caught:
        coordinator.load_checkpoint()
    assert "'w' was saved as float32 [3], but load_state_dict() made bfloat16 [3] of it" in caught.value.message
    assert "is now torn" in caught.value.message


# ---- keys and requests


@pytest.mark.parametrize("key", ["../../evil", "/evil", "*", "..", "a\0b", "x" * 300, "größe", "index", "small-00000"])
def test_b31_any_key_is_saved_and_loaded_inside_its_checkpoint(tmp_path, key):
    run = tmp_path / "deep" / "run"
    state = {"w": tensor_of("float32", (1 << 19,)), "v": 1}
    other = {"small": torch.ones(1)}
    save(run, 1, **{key: state, "small": other})
    assert {path.name for path in tmp_path.rglob("*") if path.is_dir()} == {"deep", "run", "checkpoint-1"}
    assert {path.parent.name for path in tmp_path.rglob("*") if path.is_file()} == {"checkpoint-1", "run"}
    coordinator, boxes = job(run, **{key: {}, "small": {}})
    with coordinator:
        coordinator.load_checkpoint()
    assert_same(items(boxes), {key: state, "small": other})


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"step": -1}, "step is -1; use a number of steps, from 0"),
        ({"step": 1.0}, "step is 1.0"),
        ({"step": True}, "step is True"),
        ({"step": "5"}, "step is '5'"),
        ({"step": 1, "kind": "best"}, "kind is 'best'; use one of periodic, epoch, emergency, final"),
    ],
)
def test_a_save_that_means_nothing_is_refused(tmp_path, arguments, problem):
    coordinator, _ = job(tmp_path / "run", model=MODEL)
    with coordinator, pytest.raises(DeclarationError) as caught:
        coordinator.save_checkpoint(**arguments)
    assert problem in caught.value.message
    assert not (tmp_path / "run").exists()


def test_b28_saving_the_same_step_again_replaces_all_of_it(tmp_path):
    save(tmp_path, 1, model={"w": tensor_of("float32", (1 << 20,))}, extra=EXTRA)
    path = save(tmp_path, 1, model={"w": torch.ones(2)})
    assert sorted(file.name for file in path.iterdir()) == [
        paths.MANIFEST,
        "index-00000.json",
        "small-00000.safetensors",
    ]
    coordinator, boxes = job(tmp_path, model={})
    with coordinator:
        assert coordinator.load_checkpoint().sequence == 2
    assert_same(boxes["model"].items, {"w": torch.ones(2)})


def test_b29_a_failed_save_leaves_nothing_and_the_next_one_works(tmp_path):
    coordinator, boxes = job(tmp_path, model=MODEL)
    with coordinator:
        coordinator.save_checkpoint(1)
        boxes["model"].items = {"w": torch.zeros(2)}
        for fail_at in range(4, 12):
            with watched(tmp_path) as calls:
                calls.fail_at = fail_at
                with pytest.raises(StorageError):
                    coordinator.save_checkpoint(2)
            assert sorted(path.name for path in tmp_path.iterdir()) == [".lease", "checkpoint-1"]
        coordinator.save_checkpoint(2)
        coordinator.load_checkpoint(1)
    assert_same(boxes["model"].items, MODEL)


class Pair(nn.Module):
    """An embedding and a head, tied or not."""

    def __init__(self, *, tied: bool, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embedding, self.head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
        if tied:
            self.head.weight = self.embedding.weight


def test_two_different_tensors_are_never_loaded_into_one(tmp_path):
    saved, _ = job(tmp_path, m=Pair(tied=False, seed=0))
    saved.save_checkpoint(1)
    tied = Pair(tied=True, seed=1)
    before = tied.head.weight.clone()
    loading, _ = job(tmp_path, m=tied)
    with pytest.raises(
        LoadMismatch, match=r"'embedding.weight' .* and 'head.weight' .* are one tensor in the job and two"
    ):
        loading.load_checkpoint()
    assert torch.equal(tied.head.weight, before)


def test_two_components_that_share_a_tensor_are_not_loaded_with_two(tmp_path):
    saved, _ = job(tmp_path, a={"w": torch.zeros(2)}, b={"w": torch.ones(2)})
    saved.save_checkpoint(1)
    shared = torch.full((2,), 7.0)
    loading, _ = job(tmp_path, a={"w": shared}, b={"w": shared})
    with pytest.raises(LoadMismatch, match=r"'w' of component 'a' and 'w' of component 'b' are one tensor"):
        loading.load_checkpoint()
    assert shared.tolist() == [7.0, 7.0]


def test_equal_tensors_may_be_loaded_into_one(tmp_path):
    untied = Pair(tied=False, seed=0)
    untied.head.weight.data.copy_(untied.embedding.weight)
    job(tmp_path, m=untied)[0].save_checkpoint(1)
    tied = Pair(tied=True, seed=1)
    job(tmp_path, m=tied)[0].load_checkpoint()
    assert torch.equal(tied.head.weight, untied.head.weight)


@pytest.mark.parametrize(
    ("rule", "problem"),
    [
        (lambda saved, old, new: 1 / 0, "on_resize\\(\\) raised ZeroDivisionError"),
        (lambda saved, old, new: None, "on_resize\\(\\) returned a NoneType; return the new state, a dict"),
    ],
)
def test_a_rule_that_fails_tears_nothing(tmp_path, rule, problem):
    job(tmp_path, pattern=PER_RANK, a={"w": torch.zeros(2)})[0].save_checkpoint(1)
    box = Box({"w": torch.ones(2)})
    loading = CheckpointCoordinator([StateComponent("a", box, GLOBAL, on_resize=rule)], tmp_path)
    with pytest.raises(LoadMismatch, match=problem):
        loading.load_checkpoint()
    loading.save_checkpoint(2)  # not torn


def test_a_function_takes_over_what_was_saved_under_another_pattern(tmp_path):
    job(tmp_path, pattern=PER_RANK, a={"position": 5})[0].save_checkpoint(1)
    box = Box({})
    loading = CheckpointCoordinator(
        [StateComponent("a", box, GLOBAL, on_resize=lambda saved, old, new: {**saved[0], "of": len(saved)})], tmp_path
    )
    loading.load_checkpoint()
    assert box.items == {"position": 5, "of": 1}


def test_a_word_or_a_number_selects_a_checkpoint_whatever_lies_in_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "work" / "latest").mkdir(parents=True)
    (tmp_path / "work" / "1").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    run, _ = job(tmp_path / "run", a={"w": 1})
    run.save_checkpoint(1)
    assert run.load_checkpoint("latest").step == run.load_checkpoint("1").step == 1


def test_a_step_whose_checkpoint_is_not_whole_says_why(tmp_path):
    run, _ = job(tmp_path, a={"w": 1})
    run.save_checkpoint(1)
    run.save_checkpoint(2)
    (tmp_path / "checkpoint-2" / paths.index(0, 0)).unlink()
    with pytest.raises(CheckpointDamaged, match=r"checkpoint-2 is not whole: index-00000\.json is missing"):
        run.load_checkpoint(2)


def test_an_optional_component_whose_live_state_cannot_be_taken_is_left_out_of_a_load(tmp_path):
    box = Box({"w": 1})
    components = [StateComponent("a", box, GLOBAL, required=False), StateComponent("b", Box({"w": 2}), GLOBAL)]
    run = CheckpointCoordinator(components, tmp_path)
    run.save_checkpoint(1)
    box.items = {"w": object()}
    report = run.load_checkpoint()
    assert report.loaded == ("b",)
    assert "object objects cannot be checkpointed" in report.skipped["a"]


def test_a_checkpoint_that_lost_its_manifest_is_not_taken_for_none(tmp_path):
    run, _ = job(tmp_path, a={"w": 1})
    run.save_checkpoint(1)
    (tmp_path / "checkpoint-1" / paths.MANIFEST).unlink()
    (tmp_path / "checkpoint-2").mkdir()  # somebody else's
    with pytest.raises(
        CheckpointDamaged, match=r"none of the 1 checkpoints .* no checkpoint_manifest\.json, but our indexes"
    ):
        run.load_checkpoint()


# ---- state that does not exist yet

TARGETS = {
    "rows": [Shard(0), Replicate()],
    "columns": [Replicate(), Shard(1)],
    "columns, from the end": [Replicate(), Shard(-1)],
    "both": [Shard(-2), Shard(-1)],
    "all on one dimension": [Shard(1), Shard(1)],
    "nothing": [Replicate(), Replicate()],
}


@pytest.mark.parametrize("placements", TARGETS.values(), ids=TARGETS)
def test_what_does_not_exist_yet_is_made_where_its_stateful_says_on_a_mesh(placements, tmp_path):
    whole = tensor_of("float32", (5, 6), seed=1)
    save(tmp_path, 1, model={"w": whole, "other": torch.ones(2)}, pattern=REPLICATED)

    def case(rank: int, world_size: int) -> Any:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        box = Choosing(lambda available: {"w": Target(mesh=mesh, placements=placements)})
        with CheckpointCoordinator([StateComponent("model", box, REPLICATED)], tmp_path) as coordinator:
            coordinator.load_checkpoint()
        made = box.items["w"]
        expected = distribute_tensor(whole, mesh, placements)
        assert made.placements == expected.placements
        assert tensor_bytes(made.to_local().clone()) == tensor_bytes(expected.to_local().clone())
        return made.full_tensor(), type(box.items["other"])

    for made, other in values(run_ranks(4, case)):
        assert tensor_bytes(made) == tensor_bytes(whole)
        assert other is torch.Tensor


@pytest.mark.parametrize("dim", [-3, 2])
def test_a_target_that_cuts_a_dimension_that_is_not_there_is_an_error(dim, tmp_path):
    save(tmp_path, 1, model={"w": torch.zeros(4, 4)}, pattern=REPLICATED)

    def case(rank: int, world_size: int) -> None:
        mesh = init_device_mesh("cpu", (2,))
        box = Choosing(lambda available: {"w": Target(mesh=mesh, placements=[Shard(dim)])})
        with CheckpointCoordinator([StateComponent("model", box, REPLICATED)], tmp_path) as coordinator:
            coordinator.load_checkpoint()

    for told in errors(run_ranks(2, case)):
        assert told.type_name == "LoadMismatch"
        assert "'w', float32 [4, 4], cannot be made where it is to go" in told.message
