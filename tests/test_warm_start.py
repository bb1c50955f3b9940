"""A warm start takes what is asked for of a checkpoint, tells what became of every item, and changes nothing else."""

from __future__ import annotations

import copy
import os
from pathlib import Path

import pytest
import torch
from torch import nn

from forgather_ckpt import (
    CheckpointCoordinator,
    CheckpointManifest,
    NamedOptimizer,
    RNGState,
    SharingPattern,
    StateComponent,
    WarmStartReport,
)
from forgather_ckpt.errors import (
    CheckpointDamaged,
    CheckpointError,
    CheckpointNotFound,
    DeclarationError,
    LoadMismatch,
    TornState,
)
from forgather_ckpt.matching import Rules, match, renamed
from tests.components import Box, refusal, the_same
from tests.layouts import whole
from tests.meshes import LAYOUTS, parallel, plain, stepped
from tests.ranks import run_ranks, values
from tests.states import assert_same, tensor_of

pytestmark = pytest.mark.multiprocess

GLOBAL, PER_RANK, REPLICATED = SharingPattern.GLOBAL, SharingPattern.PER_RANK, SharingPattern.REPLICATED


# ---- names


@pytest.mark.parametrize(
    ("rename", "expected"),
    [
        (None, {"a.w": "a.w", "a.b.w": "a.b.w", "c": "c"}),
        ({"a.": "x."}, {"a.w": "x.w", "a.b.w": "x.b.w", "c": "c"}),
        ({"a.": "x.", "a.b.": "y."}, {"a.w": "x.w", "a.b.w": "y.w", "c": "c"}),
        ({"": "net."}, {"a.w": "net.a.w", "a.b.w": "net.a.b.w", "c": "net.c"}),
        ({"a.": ""}, {"a.w": "w", "a.b.w": "b.w", "c": "c"}),
        (str.upper, {"a.w": "A.W", "a.b.w": "A.B.W", "c": "C"}),
    ],
)
def test_names_are_changed_by_prefixes_or_by_a_function(rename, expected):
    assert renamed(expected, rename) == expected


def test_two_items_never_get_one_name():
    with pytest.raises(LoadMismatch, match=r"rename= calls both 'a\.w' and 'b\.w' of the checkpoint 'a\.w'"):
        renamed(["a.w", "b.w"], {"b.": "a."})
    with pytest.raises(DeclarationError, match="rename= makes None of 'a'; return a name"):
        renamed(["a"], lambda name: None)


TIES = [["a"], ["embedding", "head"], ["z"]]


@pytest.mark.parametrize(
    ("stored", "rules", "sources", "doubles", "kept", "ignored"),
    [
        (["a", "embedding", "head", "z"], {}, {"a": "a", "embedding": "embedding", "z": "z"}, [("embedding", "head")], [], []),
        (["a", "head", "z", "q"], {}, {"a": "a", "embedding": "head", "z": "z"}, [], [], ["q"]),
        (["a", "head"], {"include": ("h*",)}, {"embedding": "head"}, [], ["a", "z"], ["a"]),
        (["a", "embedding", "head"], {"exclude": ("[ze]*",)}, {"a": "a", "embedding": "head"}, [], ["z"], ["embedding"]),
        (["a"], {"missing": "keep"}, {"a": "a"}, [], ["embedding", "head", "z"], []),
    ],
)  # fmt: skip
def test_each_item_of_the_job_is_matched_with_one_of_the_checkpoint(stored, rules, sources, doubles, kept, ignored):
    found = match(TIES, stored, Rules(**rules))
    assert (found.sources, found.doubles, found.kept, found.ignored) == (sources, doubles, kept, ignored)


# ---- one process


class Net(nn.Module):
    """A part that a base model has too, under another name, and one that is new."""

    def __init__(self, dtype: torch.dtype = torch.float32, *, seed: int = 5) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.encoder = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).to(dtype)
        self.head = nn.Linear(3, 2)


def base(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(3)
    return nn.ModuleDict({"backbone": nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)), "pooler": nn.Linear(3, 3)}).to(
        dtype
    )


def saved(run: Path, model: object, step: int = 9, **others: object) -> Path:
    """A checkpoint of one process."""
    components = [StateComponent(key, one, GLOBAL) for key, one in {"model": model, **others}.items()]
    with CheckpointCoordinator(components, run) as coordinator:
        return coordinator.save_checkpoint(step)


def start(run: Path, source: object, model: object, components=("model",), others=(), **rules) -> WarmStartReport:
    with CheckpointCoordinator([StateComponent("model", model, GLOBAL), *others], run) as coordinator:
        return coordinator.warm_start(source, components, **rules)


def state_of(module) -> dict:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


RENAME = {"backbone.": "encoder."}


def test_a_new_head_on_a_base_model(tmp_path):
    old, net = base(), Net()
    path = saved(tmp_path / "base", old)
    before = state_of(net)
    report = start(tmp_path / "new", path, net, rename=RENAME, missing="keep")
    taken = {
        name.replace("backbone", "encoder"): value for name, value in old.state_dict().items() if "backbone" in name
    }
    assert_same(dict(net.state_dict()), {**before, **taken})
    model = report.components["model"]
    assert (report.path, report.step) == (path, 9)
    assert model.loaded == sorted(taken)
    assert dict(model.renamed) == {name: name.replace("encoder", "backbone") for name in taken}
    assert (dict(model.cast), model.kept, model.ignored) == (
        {},
        ["head.bias", "head.weight"],
        ["pooler.bias", "pooler.weight"],
    )
    assert report.text().splitlines()[1].startswith("model: 7 loaded; 7 renamed: 'backbone.0.bias to encoder.0.bias', ")


@pytest.mark.parametrize("rename", [RENAME, lambda name: name.replace("backbone", "encoder")])
@pytest.mark.parametrize("include", ["encoder.0.*", ["encoder.0.weight", "encoder.0.bias"]])
def test_only_what_is_included_is_loaded(tmp_path, include, rename):
    old, net = base(), Net()
    path = saved(tmp_path / "base", old)
    before = state_of(net)
    report = start(tmp_path / "new", path, net, include=include, rename=rename)
    changed = {f"encoder.0.{name}": old["backbone"][0].state_dict()[name] for name in ("weight", "bias")}
    assert_same(dict(net.state_dict()), {**before, **changed})
    assert report.components["model"].loaded == sorted(changed)


def test_what_is_excluded_stays_as_it_is(tmp_path):
    old, net = plain(1), plain(2)
    path = saved(tmp_path / "base", old)
    before = state_of(net)
    report = start(tmp_path / "new", path, net, exclude="2.*")
    assert_same(
        dict(net.state_dict()),
        {name: before[name] if name.startswith("2.") else value for name, value in old.state_dict().items()},
    )
    assert report.components["model"].kept == sorted(name for name in before if name.startswith("2."))
    assert report.components["model"].ignored == report.components["model"].kept


def test_it_is_no_resume(tmp_path):
    """Only what is named is touched, and the next checkpoint has no parent."""
    model, net = plain(1), plain(2)
    path = saved(tmp_path / "base", model, optimizer=NamedOptimizer(stepped(model), [model]), rng=RNGState())
    named = NamedOptimizer(stepped(net), [net])
    before = copy.deepcopy(named.state_dict())
    components = [
        StateComponent("model", net, GLOBAL),
        StateComponent("optimizer", named, GLOBAL),
        StateComponent("rng", RNGState(), PER_RANK),
    ]
    with CheckpointCoordinator(components, tmp_path / "new") as coordinator:
        generator = torch.get_rng_state()
        coordinator.warm_start(path)
        assert torch.equal(torch.get_rng_state(), generator)
        assert_same(named.state_dict(), before)
        assert_same(dict(net.state_dict()), dict(model.state_dict()))
        assert CheckpointManifest.load(coordinator.save_checkpoint(1)).parent is None


def test_an_optimizer_that_is_named_starts_warm_too(tmp_path):
    """One that has made no step yet, under other names."""
    model = nn.ModuleDict({"old": plain(1)})
    source = NamedOptimizer(stepped(model), [model])
    path = saved(tmp_path / "base", model, optimizer=source)
    net = nn.ModuleDict({"new": plain(2)})
    named = NamedOptimizer(torch.optim.AdamW(net.parameters(), lr=7.0), [net])
    report = start(
        tmp_path / "new", path, net, ["model", "optimizer"], [StateComponent("optimizer", named, GLOBAL)],
        rename=lambda name: name.replace("old.", "new."),
    )  # fmt: skip
    assert_same(
        named.state_dict(), {name.replace("old.", "new."): value for name, value in source.state_dict().items()}
    )
    assert set(report.components) == {"model", "optimizer"}
    assert "state.new.0.weight.exp_avg" in report.components["optimizer"].loaded
    assert not report.components["optimizer"].kept


def test_a_new_layer_in_a_group_of_other_hyperparameters_is_refused_before_anything_is_touched(tmp_path):
    model = nn.ModuleDict({"body": nn.Linear(4, 4)})
    source = torch.optim.AdamW(model.parameters())
    model["body"](torch.ones(2, 4)).sum().backward()
    source.step()
    path = saved(tmp_path / "base", model, optimizer=NamedOptimizer(source, [model]))
    net = nn.ModuleDict({"body": nn.Linear(4, 4), "head": nn.Linear(4, 2)})
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.5)
    components = [
        StateComponent("model", net, GLOBAL),
        StateComponent("optimizer", NamedOptimizer(optimizer, [net]), GLOBAL),
    ]
    before = state_of(net)
    with CheckpointCoordinator(components, tmp_path / "new") as coordinator:
        for rules in ({"missing": "keep"}, {"exclude": ["head.*", "groups.head.*"]}):
            with pytest.raises(LoadMismatch) as caught:
                coordinator.warm_start(path, ["model", "optimizer"], **rules)
            assert (
                "component 'optimizer': lr of 'head.weight' is 0.5 and of 'body.weight' 0.001" in caught.value.message
            )
            assert "leave all hyperparameters out of a warm start with exclude='groups.*'" in caught.value.message
            assert_same(state_of(net), before)
        coordinator.save_checkpoint(1)  # not torn
        coordinator.warm_start(path, ["model", "optimizer"], exclude=["head.*", "groups.*"])
    assert torch.equal(net["body"].weight, model["body"].weight)
    assert torch.equal(optimizer.state[net["body"].weight]["exp_avg"], source.state[model["body"].weight]["exp_avg"])
    assert optimizer.param_groups[0]["lr"] == 0.5


@pytest.mark.parametrize("has_state", [False, True])
def test_the_moments_of_a_head_of_another_size_are_refused_unless_they_are_left_out(tmp_path, has_state):
    def make(size: int) -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(size)
        model = nn.ModuleDict({"body": nn.Linear(4, 4), "head": nn.Linear(4, size)})
        return model, torch.optim.AdamW(model.parameters(), lr=0.01 * size)

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        model["head"](model["body"](torch.ones(2, 4))).sum().backward()
        optimizer.step()

    model, optimizer = make(3)
    step(model, optimizer)
    path = saved(tmp_path / "base", model, optimizer=NamedOptimizer(optimizer, [model]))
    net, started = make(5)
    if has_state:
        step(net, started)
    named = NamedOptimizer(started, [net])
    others = [StateComponent("optimizer", named, GLOBAL)]
    before = copy.deepcopy(named.state_dict())
    differ = r"component 'optimizer': 'state\.head\.\S+' .*\[3.* in the checkpoint.*\[5.* in the job;.*exclude="
    with pytest.raises(LoadMismatch, match=differ):
        start(tmp_path / "new", path, net, ["model", "optimizer"], others, exclude="head.*")
    assert_same(named.state_dict(), before)
    report = start(tmp_path / "new", path, net, ["model", "optimizer"], others, exclude=["head.*", "state.head.*"])
    assert any(name.startswith("state.body.") for name in report.components["optimizer"].loaded)
    assert not any(name.startswith("state.head.") for name in report.components["optimizer"].loaded)
    assert torch.equal(started.state[net["body"].weight]["exp_avg"], optimizer.state[model["body"].weight]["exp_avg"])
    step(net, started)


def test_values_are_taken_over_in_their_types(tmp_path):
    stored = {
        "w": torch.arange(3),
        "rate": 1 / 7,
        "limits": (None, float("nan")),
        "nested": {"n": 2, "x": torch.ones(2)},
    }
    path = saved(tmp_path / "base", Box(stored))
    own = {"w": torch.zeros(3, dtype=torch.int64), "rate": 0, "own": "kept"}
    box = Box({**own, "nested": {"n": 5, "x": torch.zeros(2)}, "limits": 1})
    start(tmp_path / "new", path, box, missing="keep", exclude="nested/n")
    expected = {
        "w": torch.arange(3),
        "rate": 1 / 7,
        "own": "kept",
        "nested": {"n": 5, "x": torch.ones(2)},
        "limits": stored["limits"],
    }
    assert_same(box.items, expected)


# ---- another dtype

FLOATS = ["float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"]


@pytest.mark.parametrize("live", FLOATS)
@pytest.mark.parametrize("stored", FLOATS)
def test_a_tensor_is_converted_when_that_is_asked_for(tmp_path, stored, live):
    source = torch.randn(7, 5, generator=torch.Generator().manual_seed(1)).to(getattr(torch, stored))
    path = saved(tmp_path / "base", Box({"w": source}))
    target = torch.zeros(5, 7).t().to(getattr(torch, live))
    box = Box({"w": target})
    report = start(tmp_path / "new", path, box, cast=True)
    assert_same(box.items["w"], source.to(getattr(torch, live)))
    assert box.items["w"].data_ptr() == target.data_ptr()
    assert dict(report.components["model"].cast) == ({} if stored == live else {"w": (stored, live)})


def test_never_silently(tmp_path):
    path = saved(tmp_path / "base", base(torch.bfloat16))
    net = Net()
    before = state_of(net)
    with pytest.raises(LoadMismatch) as caught:
        start(tmp_path / "new", path, net, rename=RENAME, missing="keep")
    differ = "component 'model': 'encoder.0.bias' is bfloat16 in the checkpoint and float32 in the job"
    assert f"{differ}; have it converted with cast=True" in caught.value.message
    assert_same(dict(net.state_dict()), before)
    report = start(tmp_path / "new", path, net, rename=RENAME, missing="keep", cast=True)
    assert "6 cast: 'encoder.0.bias (bfloat16 to float32)', " in report.text()
    assert_same(net.encoder[0].weight.detach(), base(torch.bfloat16)["backbone"][0].weight.detach().float())


@pytest.mark.parametrize(
    ("stored", "live"),
    [
        ("int64", "float32"),
        ("float32", "int64"),
        ("int64", "int32"),
        ("bool", "uint8"),
        ("complex64", "float32"),
        ("float32", "float4_e2m1fn_x2"),
    ],
)
def test_what_no_conversion_keeps_the_meaning_of_is_refused(tmp_path, stored, live):
    path = saved(tmp_path / "base", Box({"w": tensor_of(stored)}))
    target = tensor_of(live, seed=1)
    with pytest.raises(LoadMismatch, match=f"'w' is {stored} in the checkpoint and {live} in the job, and cannot be"):
        start(tmp_path / "new", path, Box({"w": target}), cast=True)
    assert_same(target, tensor_of(live, seed=1))


# ---- what does not fit

STORED = {"w": torch.ones(3), "b": torch.ones(2), "n": 1}


@pytest.mark.parametrize(
    ("state", "rules", "message"),
    [
        ({"w": torch.zeros(3), "x": 1, "y": 2}, {}, "component 'model': the checkpoint has no 'x', 'y'; where it has other names"),
        ({"w": torch.zeros(4)}, {}, "'w' has the shape [3] in the checkpoint and [4] in the job; leave it as it is with exclude="),
        ({"n": torch.zeros(3)}, {}, "'n' is a value in the checkpoint and a tensor in the job"),
        ({"w": 5}, {}, "'w' is a tensor in the checkpoint and a value in the job"),
        ({"x": 5}, {"missing": "keep"}, "of step 9 has nothing under a name that is asked for; it has 'b', 'n', 'w'"),
        ({"w": torch.zeros(3)}, {"rename": {"wight": "w"}}, "rename='wight' (of the names in the checkpoint) matches nothing"),
        ({"w": torch.zeros(3)}, {"exclude": "q*"}, "exclude='q*' (of the names in the job) matches nothing"),
        ({"w": torch.zeros(3)}, {"include": ["w", "u"]}, "include='u' (of the names in the job) matches nothing"),
        ({"w": torch.zeros(3)}, {"rename": {"b": "w"}}, "rename= calls both 'b' and 'w' of the checkpoint 'w'"),
        ({"w": torch.zeros(3)}, {"components": ["modle"]}, "components=['modle'] are not declared by the job; declared: ['mod"),
        ({"w": torch.zeros(3)}, {"components": ["other"]}, "the checkpoint of step 9 has no component 'other'; it has ['model']"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_said_and_changes_nothing(tmp_path, state, rules, message):
    path = saved(tmp_path / "base", Box(STORED))
    box = Box(copy.deepcopy(state))
    other = StateComponent("other", Box({"o": 1}), GLOBAL)
    with pytest.raises(LoadMismatch) as caught:
        start(tmp_path / "new", path, box, others=[other], **rules)
    assert message in caught.value.message
    assert_same(box.items, state)


@pytest.mark.parametrize(
    "wrong",
    [
        {"path": 3}, {"path": ""}, {"components": []}, {"components": [3]}, {"components": None},
        {"include": []}, {"include": [""]}, {"exclude": 3},
        {"rename": {"a": 1}}, {"rename": ["a"]}, {"missing": "ignore"}, {"cast": "bfloat16"},
    ],
)  # fmt: skip
def test_arguments_that_mean_nothing_are_refused(tmp_path, wrong):
    with (
        CheckpointCoordinator([StateComponent("model", Box({}), GLOBAL)], tmp_path) as coordinator,
        pytest.raises(DeclarationError, match=f"{next(iter(wrong))} is .*; use "),
    ):
        coordinator.warm_start(**{"path": tmp_path, **wrong})


def test_the_checkpoint_is_named_as_for_reading(tmp_path):
    box = Box({"n": 0})
    for step in (1, 2):
        saved(tmp_path / "base", Box({"n": step}), step)
    for source, step in ((tmp_path / "base", 2), (f"{tmp_path}/base@latest~1", 1), (f"{tmp_path}/base@2", 2)):
        assert start(tmp_path / "new", source, box).step == step
        assert box.items == {"n": step}
    with pytest.raises(CheckpointNotFound):
        start(tmp_path / "new", f"{tmp_path}/base@3", box)


# ---- tied tensors


class Tied(nn.Module):
    def __init__(self, *, tied: bool, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        if tied:
            self.head.weight = self.embedding.weight


@pytest.mark.parametrize("is_live_tied", [True, False])
def test_a_tied_tensor_of_the_checkpoint_fills_both(tmp_path, is_live_tied):
    old, net = Tied(tied=True, seed=1), Tied(tied=is_live_tied, seed=2)
    start(tmp_path / "new", saved(tmp_path / "base", old), net)
    assert_same(dict(net.state_dict()), dict(old.state_dict()))
    assert (net.head.weight is net.embedding.weight) is is_live_tied


def test_two_tensors_of_the_checkpoint_do_not_fill_one(tmp_path):
    net = Tied(tied=True, seed=2)
    old = Tied(tied=False, seed=1)
    before, path = state_of(net), saved(tmp_path / "base", old)
    with pytest.raises(LoadMismatch, match="are one tensor in the job and two different ones in the checkpoint"):
        start(tmp_path / "new", path, net)
    assert_same(dict(net.state_dict()), before)
    report = start(tmp_path / "new", path, net, exclude="embedding.*")
    assert report.components["model"].loaded == ["embedding.weight", "head.weight"]
    assert_same(net.embedding.weight.detach(), old.head.weight.detach())


# ---- torn


def test_a_damaged_checkpoint_leaves_what_it_touched_torn_until_it_is_whole(tmp_path):
    run = tmp_path / "base"
    good, bad = saved(run, plain(1), 1), saved(run, plain(3), 2)
    with (bad / "small-00000.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([byte ^ 1]))
    net = plain(2)
    with CheckpointCoordinator([StateComponent("model", net, GLOBAL)], tmp_path / "new") as coordinator:
        with pytest.raises(CheckpointDamaged, match="The live state of model is now torn"):
            coordinator.warm_start(bad)
        with pytest.raises(TornState):
            coordinator.save_checkpoint(1)
        coordinator.warm_start(good, exclude="2.*")
        with pytest.raises(TornState):
            coordinator.save_checkpoint(1)
        coordinator.warm_start(good)
        coordinator.save_checkpoint(1)
    assert_same(dict(net.state_dict()), dict(plain(1).state_dict()))


# ---- many ranks


@pytest.fixture(scope="module")
def by_layout(tmp_path_factory) -> dict[str, Path]:
    """By layout, a run with a checkpoint of `plain(1)`."""
    runs = {layout: tmp_path_factory.mktemp("base") for layout in LAYOUTS}
    for layout, world_size in LAYOUTS.items():

        def case(rank: int, world_size: int, layout: str = layout) -> None:
            component = StateComponent("model", parallel(layout, world_size, seed=1), REPLICATED)
            with CheckpointCoordinator([component], runs[layout], timeout_seconds=30) as coordinator:
                coordinator.save_checkpoint(4)

        values(run_ranks(world_size, case))
    return runs


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_starts_from_any_other(tmp_path, by_layout, layout):
    """In half precision, under other names, with a new part."""

    def case(rank: int, world_size: int) -> list[tuple[dict, dict, WarmStartReport]]:
        results = []
        for source in by_layout.values():
            model = nn.ModuleDict({"body": parallel(layout, world_size, seed=2).bfloat16(), "head": nn.Linear(6, 2)})
            before = whole(model.state_dict())
            component = StateComponent("model", model, REPLICATED)
            with CheckpointCoordinator([component], tmp_path, timeout_seconds=30) as coordinator:
                report = coordinator.warm_start(source, rename={"": "body."}, missing="keep", cast=True)
            results.append((before, whole(model.state_dict()), report))
        return results

    expected = {f"body.{name}": tensor for name, tensor in plain(1).state_dict().items()}
    for results in values(run_ranks(LAYOUTS[layout], case)):
        for before, found, report in results:
            head = {name: tensor for name, tensor in before.items() if name.startswith("head")}
            halves = {name: one.bfloat16() if one.is_floating_point() else one for name, one in expected.items()}
            assert_same(found, {**halves, **head})
            model = report.components["model"]
            assert (model.loaded, model.kept) == (sorted(expected), sorted(head))
            assert set(model.cast) == {name for name, tensor in expected.items() if tensor.is_floating_point()}


def test_stages_take_their_parts_and_tell_the_same(tmp_path, by_layout):
    """The last layer of the checkpoint belongs to no stage: nobody takes it. Rank 2 holds nothing."""

    def case(rank: int, world_size: int) -> tuple[dict, WarmStartReport]:
        box = Box({f"{rank}.{name}": tensor for name, tensor in plain(2)[rank].state_dict().items()})
        component = StateComponent("model", box if rank < 2 else None, PER_RANK, names="global")
        with CheckpointCoordinator([component], tmp_path / "new", timeout_seconds=30) as coordinator:
            return box.items, coordinator.warm_start(by_layout["fsdp"], include=["0.*", "1.*"])

    found, reports = zip(*values(run_ranks(3, case)), strict=True)
    expected = plain(1).state_dict()
    names = sorted(name for name in expected if name[0] in "01")
    report = the_same(reports).components["model"]
    assert (report.loaded, report.kept) == (names, [])
    assert report.ignored == sorted(name for name in expected if name.startswith("2."))
    for rank in range(2):
        assert_same(found[rank], {name: one for name, one in expected.items() if name.startswith(f"{rank}.")})
    assert_same(found[2], {f"2.{name}": tensor for name, tensor in plain(2)[2].state_dict().items()})


def test_what_fails_on_one_rank_fails_on_all_and_changes_nothing(tmp_path, by_layout):
    """In turn: another shape on rank 1; another request on rank 1; a wrong argument; a rename that fails on rank 0."""

    def refuse(name: str) -> str:
        raise ZeroDivisionError(name)

    def case(rank: int, world_size: int) -> tuple[list, bool]:
        net = Box({f"{number}.{rank}": torch.zeros(9) for number in range(2)})
        net.items["0.bias"] = torch.zeros(9 + rank)
        component = StateComponent("model", net, PER_RANK, names="global")
        before = copy.deepcopy(net.items)
        told = []
        with CheckpointCoordinator([component], tmp_path / "new", timeout_seconds=30) as coordinator:
            for rules in (
                {"missing": "keep"},
                {"missing": "keep", "include": f"{rank}.*"},
                {"missing": "keep", "cast": "yes" if rank else False},
                {"missing": "keep", "rename": str if rank else refuse},
            ):
                told.append(refusal(lambda rules=rules: coordinator.warm_start(by_layout["tp"], **rules)))
            still = all(torch.equal(one, before[name]) for name, one in net.items.items())
        return told, still

    outcomes = values(run_ranks(2, case))
    assert all(still for _, still in outcomes)
    shape, request, argument, function = the_same([told for told, _ in outcomes])
    assert shape == ("LoadMismatch", shape[1])
    assert "'0.bias' has the shape [9] in the checkpoint and [10] in the job" in shape[1]
    assert request[0] == argument[0] == "DeclarationError"
    assert "the ranks ask for different things" in request[1]
    assert "cast is 'yes'; use True or False" in argument[1]
    assert function[0] == "RankFailed"
    assert "component 'model': rename= raised ZeroDivisionError for '0.bias': 0.bias" in function[1]


def test_ranks_that_rename_otherwise_do_not_make_two_models_of_one(tmp_path):
    """Of an item that rank 1 does not find, and of one that it takes from elsewhere."""
    path = saved(tmp_path / "base", Box({"a": torch.ones(2), "b": torch.full((2,), 2.0), "y": torch.ones(1)}))

    def case(rank: int, world_size: int) -> tuple[list, bool]:
        replica = Box({"x": torch.zeros(2), "y": torch.zeros(1)})
        component = StateComponent("model", replica, REPLICATED)
        told = []
        with CheckpointCoordinator([component], tmp_path / "new", timeout_seconds=30) as coordinator:
            for sources in ("ac", "ab"):  # the checkpoint has no "c"
                rename = {sources[rank]: "x"}
                told.append(
                    refusal(
                        lambda new=rename: coordinator.warm_start(
                            path, ["model"], rename=lambda name: new.get(name, name), missing="keep"
                        )
                    )
                )
        return told, not replica.items["x"].any() and not replica.items["y"].any()

    outcomes = values(run_ranks(2, case))
    assert all(still for _, still in outcomes)
    kept, elsewhere = the_same([told for told, _ in outcomes])
    assert kept[0] == elsewhere[0] == "LoadMismatch"
    assert "component 'model': 'x' would be loaded on rank 0 and left as it is on rank 1, and it is one item" in kept[1]
    assert "component 'model': 'x' would be loaded from 'a' on rank 0 and loaded from 'b' on rank 1" in elsewhere[1]


def test_state_of_single_ranks_starts_only_the_layout_that_it_was_saved_in(tmp_path):
    def saving(rank: int, world_size: int) -> None:
        component = StateComponent("model", Box({"n": rank}), PER_RANK)
        with CheckpointCoordinator([component], tmp_path / "base", timeout_seconds=30) as coordinator:
            coordinator.save_checkpoint(1)

    def starting(rank: int, world_size: int) -> object:
        box = Box({"n": 7})
        with CheckpointCoordinator(
            [StateComponent("model", box, PER_RANK)], tmp_path / "new", timeout_seconds=30
        ) as coordinator:
            try:
                coordinator.warm_start(tmp_path / "base")
            except CheckpointError as err:
                return err.message
        return box.items["n"]

    values(run_ranks(2, saving))
    assert values(run_ranks(2, starting)) == [0, 1]
    message = the_same(values(run_ranks(3, starting)))
    assert "it was saved by 2 ranks, now there are 3; only state with global names starts another layout" in message


@pytest.mark.gpu
def test_a_model_on_a_device_starts_in_another_precision(tmp_path):
    path = saved(tmp_path / "base", plain(1))

    def case(rank: int, world_size: int) -> None:
        net = plain(2).to("cuda", torch.bfloat16)
        pointers = [tensor.data_ptr() for tensor in net.state_dict().values()]
        report = start(tmp_path / "new", path, net, cast=True)
        assert [tensor.data_ptr() for tensor in net.state_dict().values()] == pointers
        for name, tensor in plain(1).state_dict().items():
            found = net.state_dict()[name].cpu()
            assert_same(found, tensor.bfloat16() if tensor.is_floating_point() else tensor)
        assert len(report.components["model"].cast) == 8

    values(run_ranks(1, case, backend=None, timeout=120))
