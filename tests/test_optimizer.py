"""`NamedOptimizer`: an optimizer continues exactly, from its state under the names of its parameters."""

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from forgather_ckpt import CheckpointCoordinator, NamedOptimizer, SharingPattern, StateComponent
from forgather_ckpt.component import Available, Target
from forgather_ckpt.errors import CheckpointError, DeclarationError, LoadMismatch, StructureError
from forgather_ckpt.optimizer import unwrapped_parameters
from tests.ranks import run_ranks, values
from tests.states import assert_same


def net(seed=0, dtype=torch.float32) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1)).to(dtype)


def train(model, optimizer, num_steps, *, seed=0) -> list[float]:
    """Losses of a few steps on data that only `seed` decides."""
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for _ in range(num_steps):
        data = torch.randn(4, 3, generator=generator).to(next(model.parameters()).dtype)

        def closure(data=data):
            optimizer.zero_grad()
            loss = (model(data) - data.sum(1, keepdim=True)).square().mean()
            loss.backward()
            return loss

        losses.append(optimizer.step(closure).item())
    return losses


def components(model, optimizer, *, parts=None):
    return [
        StateComponent("model", model, SharingPattern.REPLICATED),
        StateComponent("optimizer", NamedOptimizer(optimizer, parts or [model]), SharingPattern.REPLICATED),
    ]


def save(run, model, optimizer, step=1):
    with CheckpointCoordinator(components(model, optimizer), run) as coordinator:
        coordinator.save_checkpoint(step)


def load(run, model, optimizer, which=None):
    with CheckpointCoordinator(components(model, optimizer), run) as coordinator:
        return coordinator.load_checkpoint(which)


def flat(optimizer) -> dict:
    """Everything that an optimizer holds, by the place of its parameter."""
    places = {
        parameter: place for place, parameter in enumerate(p for g in optimizer.param_groups for p in g["params"])
    }
    state = {places[parameter]: copy.deepcopy(value) for parameter, value in optimizer.state.items() if value}
    groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    return {"state": dict(sorted(state.items())), "groups": groups}


OPTIMIZERS = {
    "sgd": lambda ps: torch.optim.SGD(ps, lr=0.05),
    "sgd with momentum": lambda ps: torch.optim.SGD(ps, lr=0.05, momentum=0.9, nesterov=True),
    "adam": lambda ps: torch.optim.Adam(ps, lr=0.01),
    "adamw amsgrad": lambda ps: torch.optim.AdamW(ps, lr=0.01, amsgrad=True, betas=(0.8, 0.95)),
    "adamw foreach": lambda ps: torch.optim.AdamW(ps, lr=0.01, foreach=True),
    "adamw fused": lambda ps: torch.optim.AdamW(ps, lr=0.01, fused=True),
    "adam with tensor lr": lambda ps: torch.optim.Adam(ps, lr=torch.tensor(0.01), foreach=False),
    "adafactor": lambda ps: torch.optim.Adafactor(ps, lr=0.05),
    "rmsprop": lambda ps: torch.optim.RMSprop(ps, lr=0.01, momentum=0.5, centered=True),
    "adagrad": lambda ps: torch.optim.Adagrad(ps, lr=0.05),
    "adadelta": lambda ps: torch.optim.Adadelta(ps, lr=0.5),
    "nadam": lambda ps: torch.optim.NAdam(ps, lr=0.01),
    "radam": lambda ps: torch.optim.RAdam(ps, lr=0.01),
    "asgd": lambda ps: torch.optim.ASGD(ps, lr=0.05),
    "rprop": lambda ps: torch.optim.Rprop(ps, lr=0.01),
    "lbfgs": lambda ps: torch.optim.LBFGS(ps, lr=0.1, max_iter=3, line_search_fn="strong_wolfe"),
}


@pytest.mark.parametrize("fresh", [True, False], ids=["into a fresh one", "in place"])
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_training_continues_exactly(tmp_path, make, fresh):
    model = net()
    optimizer = make(model.parameters())
    train(model, optimizer, 3)
    save(tmp_path, model, optimizer)
    expected_state = flat(optimizer)
    expected = train(model, optimizer, 3, seed=1)
    other = net(seed=1)
    restored = make(other.parameters())
    if not fresh:
        train(other, restored, 2, seed=2)
    load(tmp_path, other, restored)
    assert_same(flat(restored), expected_state)
    assert train(other, restored, 3, seed=1) == expected
    assert_same(dict(other.state_dict()), dict(model.state_dict()))


def test_items_have_the_names_of_parameters():
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
    train(model, optimizer, 1)
    state = NamedOptimizer(optimizer, [model]).state_dict()
    assert state["groups.0.weight.lr"] == state["groups.2.bias.lr"] == 0.5
    assert state["state.2.weight.exp_avg"] is optimizer.state[model[2].weight]["exp_avg"]
    assert {name for name in state if name.startswith("state.")} == {
        f"state.{name}.{key}" for name in ("0.weight", "0.bias", "2.weight", "2.bias") for key in ("step", "exp_avg", "exp_avg_sq")
    }  # fmt: skip


# ---- dtypes


def mixed() -> tuple[nn.Module, torch.optim.Optimizer]:
    """A bfloat16 model with float32 moments, as many trainers keep them."""
    model = net(dtype=torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        optimizer.state[parameter] = {
            "step": torch.tensor(3.0),
            "exp_avg": torch.randn(parameter.shape, generator=generator),
            "exp_avg_sq": torch.rand(parameter.shape, generator=generator),
        }
    return model, optimizer


def test_moments_keep_their_dtype(tmp_path):
    model, optimizer = mixed()
    save(tmp_path, model, optimizer)
    other = net(seed=1, dtype=torch.bfloat16)
    restored = torch.optim.AdamW(other.parameters(), lr=0.5)
    load(tmp_path, other, restored)
    assert_same(flat(restored), flat(optimizer))
    assert {value.dtype for state in restored.state.values() for value in state.values()} == {torch.float32}


def test_a_bare_optimizer_that_casts_its_moments_is_an_error(tmp_path):
    _model, optimizer = mixed()
    with CheckpointCoordinator(
        [StateComponent("optimizer", optimizer, SharingPattern.GLOBAL)], tmp_path
    ) as coordinator:
        coordinator.save_checkpoint(1)
    restored = torch.optim.AdamW(net(dtype=torch.bfloat16).parameters(), lr=0.5)
    with CheckpointCoordinator([StateComponent("optimizer", restored, SharingPattern.GLOBAL)], tmp_path) as coordinator:
        with pytest.raises(LoadMismatch) as caught:
            coordinator.load_checkpoint()
        assert "was saved as float32" in caught.value.message
        assert "load_state_dict() made bfloat16" in caught.value.message
        assert "wrap optimizers in NamedOptimizer, which keeps dtypes" in caught.value.message


def test_a_bare_optimizer_works_where_nothing_is_cast(tmp_path):
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    train(model, optimizer, 2)
    with CheckpointCoordinator(
        [StateComponent("optimizer", optimizer, SharingPattern.GLOBAL)], tmp_path
    ) as coordinator:
        coordinator.save_checkpoint(1)
    restored = torch.optim.AdamW(net(seed=1).parameters(), lr=0.5)
    with CheckpointCoordinator([StateComponent("optimizer", restored, SharingPattern.GLOBAL)], tmp_path) as coordinator:
        coordinator.load_checkpoint()
    assert_same(flat(restored), flat(optimizer))


# ---- states that are there and not there


def test_an_optimizer_without_state_loads_and_clears_what_another_has(tmp_path):
    model = net()
    save(tmp_path, model, torch.optim.AdamW(model.parameters(), lr=0.25))
    other = net(seed=1)
    used = torch.optim.AdamW(other.parameters(), lr=0.5)
    train(other, used, 2)
    load(tmp_path, other, used)
    assert not any(used.state.values())
    assert used.param_groups[0]["lr"] == 0.25


def test_parameters_without_gradients_have_no_state(tmp_path):
    model = net()
    model[0].weight.requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    train(model, optimizer, 2)
    save(tmp_path, model, optimizer)
    other = net(seed=1)
    restored = torch.optim.AdamW(other.parameters(), lr=0.5)
    train(other, restored, 1)
    load(tmp_path, other, restored)
    assert_same(flat(restored), flat(optimizer))
    assert model[0].weight not in optimizer.state


def test_items_of_a_state_may_be_none(tmp_path):
    """As `momentum_buffer` of an SGD that has not needed one yet, in some versions of torch."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for parameter in model.parameters():
        optimizer.state[parameter] = {"momentum_buffer": None}
    save(tmp_path, model, optimizer)
    restored = torch.optim.SGD(model.parameters(), lr=0.2)
    for live in (restored, optimizer):
        load(tmp_path, model, live)
        assert [dict(state) for state in live.state.values()] == [{"momentum_buffer": None}] * 4


def test_no_step_is_run_to_make_state(tmp_path, monkeypatch):
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    train(model, optimizer, 2)
    save(tmp_path, model, optimizer)
    restored = torch.optim.AdamW(model.parameters(), lr=0.01)
    monkeypatch.setattr(restored, "step", None)
    load(tmp_path, model, restored)
    assert_same(flat(restored), flat(optimizer))


def test_state_is_filled_in_place_where_it_is_there(tmp_path):
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=torch.tensor(0.01), foreach=False, capturable=False)
    train(model, optimizer, 2)
    save(tmp_path, model, optimizer)
    memory = {id(parameter): state["exp_avg"].data_ptr() for parameter, state in optimizer.state.items()}
    rate = optimizer.param_groups[0]["lr"]
    expected = flat(optimizer)
    train(model, optimizer, 2)
    rate.fill_(0.5)
    load(tmp_path, model, optimizer)
    assert_same(flat(optimizer), expected)
    assert {id(parameter): state["exp_avg"].data_ptr() for parameter, state in optimizer.state.items()} == memory
    assert optimizer.param_groups[0]["lr"] is rate


# ---- groups


def grouped(model, *, decay=(0.1, 0.0)) -> torch.optim.Optimizer:
    weights = [parameter for name, parameter in model.named_parameters() if name.endswith("weight")]
    biases = [parameter for name, parameter in model.named_parameters() if name.endswith("bias")]
    return torch.optim.AdamW(
        [{"params": weights, "weight_decay": decay[0]}, {"params": biases, "weight_decay": decay[1], "lr": 0.5}],
        lr=0.01,
    )


def test_each_parameter_keeps_its_hyperparameters(tmp_path):
    model = net()
    optimizer = grouped(model)
    train(model, optimizer, 2)
    save(tmp_path, model, optimizer)
    other = net(seed=1)
    restored = grouped(other, decay=(0.7, 0.8))
    load(tmp_path, other, restored)
    assert_same(flat(restored), flat(optimizer))


def test_groups_in_another_order_or_cut_are_the_same_state(tmp_path):
    model = net()
    optimizer = grouped(model)
    train(model, optimizer, 2)
    save(tmp_path, model, optimizer)
    other = net(seed=1)
    parameters = dict(other.named_parameters())
    restored = torch.optim.AdamW(
        [{"params": [parameters[name]]} for name in ("2.bias", "0.weight", "0.bias", "2.weight")], lr=0.3
    )
    load(tmp_path, other, restored)
    assert [group["weight_decay"] for group in restored.param_groups] == [0.0, 0.1, 0.0, 0.1]
    assert [group["lr"] for group in restored.param_groups] == [0.5, 0.01, 0.5, 0.01]
    assert train(other, restored, 2, seed=1) == train(model, optimizer, 2, seed=1)


def test_parameters_that_are_grouped_against_their_hyperparameters_are_an_error(tmp_path):
    model = net()
    save(tmp_path, model, grouped(model))
    together = torch.optim.AdamW(model.parameters(), lr=0.3)
    with CheckpointCoordinator(components(model, together), tmp_path) as coordinator:
        with pytest.raises(LoadMismatch) as caught:
            coordinator.load_checkpoint()
        coordinator.save_checkpoint(2)  # nothing was touched
    assert "of '0.bias' is " in caught.value.message
    assert "and of '0.weight' " in caught.value.message
    assert "both are in one parameter group now; group the parameters as they were saved" in caught.value.message


def test_a_parameter_that_the_checkpoint_does_not_know_is_an_error(tmp_path):
    model = net()
    with CheckpointCoordinator(components(model, torch.optim.AdamW(model.parameters()))[1:], tmp_path) as coordinator:
        coordinator.save_checkpoint(1)
    larger = nn.Sequential(*net(), nn.Linear(1, 1))
    optimizer = torch.optim.AdamW(larger.parameters())
    with (
        CheckpointCoordinator(components(larger, optimizer)[1:], tmp_path) as coordinator,
        pytest.raises(LoadMismatch, match=r"the checkpoint has no optimizer state for the parameter '3\.weight'"),
    ):
        coordinator.load_checkpoint()


def test_state_of_parameters_that_the_job_does_not_have_is_left(tmp_path):
    """As one of several pipeline stages that reads the file of all."""
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    train(model, optimizer, 2)
    save(tmp_path, model, optimizer)
    stage = nn.Sequential(*net(seed=1)[:2])
    restored = torch.optim.AdamW(stage.parameters(), lr=0.5)
    with CheckpointCoordinator(components(stage, restored)[1:], tmp_path) as coordinator:
        assert coordinator.load_checkpoint(strict=False).loaded == ("optimizer",)
    assert_same(flat(restored)["state"], {place: flat(optimizer)["state"][place] for place in (0, 1)})
    assert restored.param_groups[0]["lr"] == 0.01


def test_a_later_hyperparameter_keeps_its_default(tmp_path):
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for group in optimizer.param_groups:
        del group["foreach"]
    save(tmp_path, model, optimizer)
    restored = torch.optim.AdamW(model.parameters(), lr=0.5, foreach=False)
    load(tmp_path, model, restored)
    assert (restored.param_groups[0]["foreach"], restored.param_groups[0]["lr"]) == (False, 0.01)


@pytest.mark.parametrize("is_warm", [False, True])
def test_another_kind_of_optimizer_is_refused_and_nothing_is_changed(tmp_path, is_warm):
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.3)
    train(model, optimizer, 1)
    save(tmp_path / "saved", model, optimizer)
    other = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    torch.optim.lr_scheduler.CosineAnnealingLR(other, 9)
    before = flat(other)
    with CheckpointCoordinator(components(model, other), tmp_path / "loaded") as coordinator:
        with pytest.raises(LoadMismatch) as caught:
            if is_warm:
                coordinator.warm_start(tmp_path / "saved", ["optimizer"], missing="keep")
            else:
                coordinator.load_checkpoint(tmp_path / "saved" / "checkpoint-1")
        assert "component 'optimizer': the checkpoint's optimizer has 'amsgrad', 'betas'" in caught.value.message
        assert "this SGD has 'dampening', 'momentum', 'nesterov' instead" in caught.value.message
        assert_same(flat(other), before)
        coordinator.save_checkpoint(2)  # not torn


def test_a_new_hyperparameter_and_a_schedule_that_is_gone_are_no_other_optimizer(tmp_path):
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=9)
    for group in optimizer.param_groups:
        del group["foreach"]
    save(tmp_path, model, optimizer)
    load(tmp_path, model, torch.optim.AdamW(model.parameters()))


# ---- shapes


def resized(size: int) -> nn.Module:
    return nn.Sequential(nn.Linear(3, size), nn.Tanh(), nn.Linear(size, 1))


ELEMENTWISE = [name for name in OPTIMIZERS if name not in ("sgd", "adafactor", "lbfgs")]


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_a_moment_of_another_shape_is_refused_and_nothing_is_changed(tmp_path, name):
    model = resized(5)
    optimizer = OPTIMIZERS[name](model.parameters())
    train(model, optimizer, 1)
    save(tmp_path, model, optimizer)
    for has_state in (False, True):
        other = resized(7)
        restored = OPTIMIZERS[name](other.parameters())
        if has_state:
            train(other, restored, 1)
        before = flat(restored)
        with (
            CheckpointCoordinator(components(other, restored), tmp_path) as coordinator,
            pytest.raises(LoadMismatch, match=r"'state\.\S+' .*\[5.* in the checkpoint.*\[7.* in the job"),
        ):
            coordinator.load_checkpoint(components=["optimizer"])
        assert_same(flat(restored), before)


def test_state_that_is_of_another_shape_by_nature_is_loaded(tmp_path):
    """As what an optimizer of one's own keeps, whatever it is called."""

    class LowRank(torch.optim.SGD):
        """As GaLore, whose moments are smaller than their parameters."""

    model = net()
    optimizer = LowRank(model.parameters(), lr=0.1)
    for parameter in model.parameters():
        optimizer.state[parameter] = {"exp_avg": torch.ones(2, *parameter.shape[1:]), "scales": torch.ones(4)}
    save(tmp_path, model, optimizer)
    restored = LowRank(model.parameters(), lr=0.2)
    load(tmp_path, model, restored)
    assert_same(flat(restored), flat(optimizer))


# ---- names


def test_wrappers_do_not_change_names(tmp_path):
    class Wrapper(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, x):
            return self.module(x)

    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    train(model, optimizer, 2)
    save(tmp_path, model, optimizer)
    other = net(seed=1)
    restored = torch.optim.AdamW(other.parameters(), lr=0.5)
    named = NamedOptimizer(restored, [Wrapper(other)])
    component = StateComponent("optimizer", named, SharingPattern.REPLICATED)
    with CheckpointCoordinator([component], tmp_path) as coordinator:
        coordinator.load_checkpoint(strict=False)
    assert_same(flat(restored), flat(optimizer))


def test_names_are_those_without_compile_and_a_submodule_may_be_called_module():
    model = nn.ModuleDict({"module": nn.Linear(2, 2), "weight": nn.Linear(1, 1)})
    model["compiled"] = nn.ModuleDict({"_orig_mod": nn.Linear(3, 3)})  # as torch.compile names it
    assert sorted(name for name, _ in unwrapped_parameters(model)) == [
        "compiled.bias", "compiled.weight", "module.bias", "module.weight", "weight.bias", "weight.weight",
    ]  # fmt: skip


def test_names_are_those_of_the_state_dict_with_activation_checkpointing():
    model = nn.Sequential(checkpoint_wrapper(nn.Linear(2, 2)), nn.Sequential(checkpoint_wrapper(nn.Linear(2, 1))))
    assert [name for name, _ in unwrapped_parameters(model)] == list(model.state_dict())
    assert [name for name, _ in unwrapped_parameters(checkpoint_wrapper(nn.Linear(2, 2)))] == ["weight", "bias"]


class Counting(torch.optim.SGD):
    """Keeps state under a key that is no parameter, and more in an overridden state_dict."""

    extra: dict[str, int]

    def state_dict(self):
        return {**super().state_dict(), **self.extra}


@pytest.mark.parametrize(("key", "extra", "stray"), [("global", {}, "global"), (None, {"calls": 5}, "calls")])
def test_state_that_belongs_to_no_parameter_is_refused_by_name(key, extra, stray):
    model = nn.Linear(2, 2)
    optimizer = Counting(model.parameters(), lr=0.1)
    optimizer.extra = extra
    if key:
        optimizer.state[key]["calls"] = 1
    with pytest.raises(StructureError, match=f"belongs to no parameter of its groups: .*'{stray}'"):
        NamedOptimizer(optimizer, [model]).state_dict()


@pytest.mark.parametrize("name", ["a/b", "~", "~i0", "x y", "α", "exp_avg", "lr"])
def test_names_of_modules_may_be_anything(tmp_path, name):
    def make(seed):
        torch.manual_seed(seed)
        model = nn.ModuleDict({name: nn.Linear(3, 1)})
        model.forward = lambda x: model[name](x)
        return model

    model, other = make(0), make(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    train(model, optimizer, 2)
    save(tmp_path, model, optimizer)
    restored = torch.optim.AdamW(other.parameters(), lr=0.5)
    load(tmp_path, other, restored)
    assert_same(flat(restored), flat(optimizer))


def test_a_name_that_is_the_beginning_of_another_is_told_apart(tmp_path):
    def make(seed):
        torch.manual_seed(seed)
        model = nn.Module()
        model.a = nn.Parameter(torch.randn(3, 1))
        inner = nn.Module()
        inner.lr = nn.Parameter(torch.randn(1))
        model.add_module("a_", inner)
        model.forward = lambda x: x @ model.a + inner.lr
        return model

    model, other = make(0), make(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    train(model, optimizer, 2)
    save(tmp_path, model, optimizer)
    restored = torch.optim.AdamW(other.parameters(), lr=0.5)
    load(tmp_path, other, restored)
    assert_same(flat(restored), flat(optimizer))


def test_tied_parameters_have_one_state(tmp_path):
    def make(seed):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
        model[1].weight = model[0].weight
        return model

    model, other = make(0), make(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    train(model, optimizer, 2)
    save(tmp_path, model, optimizer)
    restored = torch.optim.AdamW(other.parameters(), lr=0.5)
    load(tmp_path, other, restored)
    assert_same(flat(restored), flat(optimizer))
    assert len(restored.state) == 1


def test_parts_with_equal_names_are_refused():
    one, other = net(), net(1)
    with pytest.raises(
        DeclarationError, match=r"two parameters are called '0\.weight'; name the model's parts differently"
    ):
        NamedOptimizer(torch.optim.SGD([*one.parameters(), *other.parameters()]), [one, other])
    NamedOptimizer(torch.optim.SGD(one.parameters()), [one, one])


def test_a_parameter_of_no_part_is_refused(tmp_path):
    one, other = net(), net(1)
    optimizer = torch.optim.SGD([*one.parameters(), *other.parameters()])
    component = StateComponent("optimizer", NamedOptimizer(optimizer, [one]), SharingPattern.REPLICATED)
    with (
        CheckpointCoordinator([component], tmp_path) as coordinator,
        pytest.raises(
            CheckpointError,
            match=r"shape \[5, 3\] that is in none of the model_parts; pass all .*, and make it after fully_shard\(\)",
        ),
    ):
        coordinator.save_checkpoint(1)


@pytest.mark.parametrize("of_job", [{}, {"capturable": True}, {"fused": True}], ids=str)
@pytest.mark.parametrize(
    ("stored", "device"), [({}, "cpu"), ({"capturable": True}, "meta"), ({"fused": True}, "meta")], ids=str
)
def test_a_step_counter_goes_where_the_flags_that_are_loaded_want_it(of_job, stored, device):
    source = net()
    optimizer = torch.optim.AdamW(source.parameters())
    train(source, optimizer, 1)
    for group in optimizer.param_groups:
        group.update(stored)
    model = net().to("meta")
    restored = torch.optim.AdamW(model.parameters())
    for group in restored.param_groups:
        group.update(of_job)
    NamedOptimizer(restored, [model]).load_state_dict(NamedOptimizer(optimizer, [source]).state_dict())
    for state in restored.state.values():
        assert {name: value.device.type for name, value in state.items()} == {
            "step": device, "exp_avg": "meta", "exp_avg_sq": "meta",
        }  # fmt: skip


FLAGS: list[dict[str, bool]] = [{}, {"fused": True}, {"capturable": True}, {"foreach": True}]


@pytest.mark.gpu
@pytest.mark.multiprocess
@pytest.mark.parametrize("stored", FLAGS, ids=str)
def test_an_optimizer_on_a_device_goes_on_as_it_was_saved_whatever_the_job_says(tmp_path, stored):
    def case(rank: int, world_size: int) -> None:
        torch.manual_seed(0)

        def made(flags: dict[str, bool]) -> tuple[nn.Module, torch.optim.Optimizer]:
            model = nn.Linear(3, 5, device="cuda")
            return model, torch.optim.AdamW(model.parameters(), lr=0.01, **flags)

        def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
            model(torch.ones(2, 3, device="cuda")).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()

        model, optimizer = made(stored)
        step(model, optimizer)
        save(tmp_path, model, optimizer)
        step(model, optimizer)
        for of_job, has_state in itertools.product(FLAGS, (False, True)):
            other, restored = made(of_job)
            if has_state:
                step(other, restored)
            load(tmp_path, other, restored)
            step(other, restored)
            assert_same(flat(restored), flat(optimizer))
            assert_same(dict(other.state_dict()), dict(model.state_dict()))

    values(run_ranks(1, case, backend=None, timeout=120))


def test_state_goes_to_the_device_of_its_parameter():
    model = net().to("meta")
    named = NamedOptimizer(torch.optim.AdamW(model.parameters()), [model])
    available = {
        "state.0.weight.exp_avg": Available("float32", (5, 3)),
        "state.0.weight.step": Available("float32", ()),
        "groups.0.weight.lr": Available("float32", ()),
        "groups.0.bias.lr": Available(None, None),
        "state.7.weight.exp_avg": Available("float32", (1,)),
        "something else": Available(None, None),
        "~i0/exp_avg": Available("float32", (1,)),
    }
    assert named.load_targets(available) == {
        "state.0.weight.exp_avg": Target(torch.device("meta")),
        "state.0.weight.step": Target("cpu"),
        "groups.0.weight.lr": Target("cpu"),
        "groups.0.bias.lr": Target("cpu"),
        "state.7.weight.exp_avg": None,
        "something else": None,
        "~i0/exp_avg": None,
    }


def test_the_moments_of_a_parameter_that_is_frozen_now_are_left_and_told(tmp_path, caplog):
    def run(*, is_frozen: bool) -> NamedOptimizer:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        model[0].requires_grad_(not is_frozen)
        optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad])
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
        named = NamedOptimizer(optimizer, [model])
        with CheckpointCoordinator([StateComponent("optimizer", named, SharingPattern.GLOBAL)], tmp_path) as coordinator:
            if is_frozen:
                coordinator.load_checkpoint()
            else:
                optimizer.step()
                coordinator.save_checkpoint(1)
        return named

    saved, loaded = run(is_frozen=False).state_dict(), run(is_frozen=True).state_dict()
    assert loaded.keys() == {name for name in saved if ".1." in name}
    assert torch.equal(loaded["state.1.weight.exp_avg"], saved["state.1.weight.exp_avg"])
    assert "'groups.0.bias.amsgrad'" in caplog.text
    assert "in the checkpoint, which the job does not want; they are left there" in caplog.text
