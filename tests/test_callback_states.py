"""What callbacks keep is saved and comes back where it belongs; what cannot, harms neither the others nor the training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from forgather_ckpt import CheckpointCoordinator, LoadReport, SharingPattern, StateComponent
from forgather_ckpt.errors import LoadMismatch
from forgather_ckpt.trainers.callbacks import PART, CallbackStates, part_of, taken_over
from forgather_ckpt.trainers.trainer import Trainer
from tests.layouts import Layout, Net
from tests.ranks import Outcome, run_ranks, values

DDP = Layout("ddp", {"dp": 2})
PIPELINE = Layout("pipeline", {"pp": 2}, {"schedule": "1f1b"})
INTERLEAVED = Layout("pipeline", {"pp": 2}, {"schedule": "interleaved_1f1b"})


class Count:
    num_steps = 0

    def __call__(self, trainer: Trainer) -> None:
        self.num_steps += 1

    def state_dict(self) -> dict[str, Any]:
        return {"num_steps": self.num_steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.num_steps = state_dict["num_steps"]


class Average:
    """Of what a rank has of the model's weights; begins with the first step."""

    def __init__(self) -> None:
        self.weights: dict[str, torch.Tensor] = {}

    def __call__(self, trainer: Trainer) -> None:
        for name, parameter in trainer.model.named_parameters():
            self.weights.setdefault(name, parameter.detach().clone()).lerp_(parameter.detach(), 0.1)

    def state_dict(self) -> dict[str, Any]:
        return dict(self.weights)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.weights = dict(state_dict)


class Holds:
    """Tensors as they are."""

    def __init__(self, **tensors: torch.Tensor) -> None:
        self.tensors = tensors

    def state_dict(self) -> dict[str, Any]:
        return dict(self.tensors)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.tensors = dict(state_dict)


class Rounds(Holds):
    """Keeps what it is given in its own dtype."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.tensors = {name: tensor.to(self.tensors[name].dtype) for name, tensor in state_dict.items()}


class Refuses(Holds):
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        raise ValueError("not mine")


def coordinator(
    directory: Path, callbacks: Sequence[Any], model: nn.Module, on_resize: Any = taken_over
) -> CheckpointCoordinator:
    states = CallbackStates(callbacks, model.state_dict)
    components = [
        StateComponent("model", model, SharingPattern.PER_RANK),
        StateComponent("callbacks", states, SharingPattern.PER_RANK, on_resize=on_resize),
    ]
    return CheckpointCoordinator(components, directory)


def save(directory: Path, *callbacks: Any, model: nn.Module | None = None) -> None:
    with coordinator(directory, callbacks, model or nn.Linear(2, 2)) as checkpoints:
        checkpoints.save_checkpoint(1)


def load(directory: Path, *callbacks: Any, model: nn.Module | None = None) -> LoadReport:
    with coordinator(directory, callbacks, model or nn.Linear(2, 2)) as checkpoints:
        return checkpoints.load_checkpoint()


# ---- tensors are read into new memory


def test_a_tensor_that_has_grown_or_changed_its_type_comes_back_as_it_was(tmp_path):
    save(tmp_path, Holds(losses=torch.tensor([1.0, 2.0]), mean=torch.tensor(3.0, dtype=torch.float64)))
    before = Holds(losses=torch.zeros(0), mean=torch.zeros(()))
    was = before.tensors
    load(tmp_path, before)
    assert before.tensors["losses"].tolist() == [1.0, 2.0]
    assert (before.tensors["mean"].item(), before.tensors["mean"].dtype) == (3.0, torch.float64)
    assert was["mean"].item() == 0.0


def test_a_callback_may_refer_to_the_weights_until_it_has_its_own_copy(tmp_path):
    model = nn.Linear(2, 2)
    best = Holds(best=model.weight.detach().clone() + 1, tied=model.bias.detach(), number=torch.ones(1))
    save(tmp_path, best, model=model)
    model_now = nn.Linear(2, 2)
    best_now = Holds(best=model_now.weight.detach(), tied=model_now.bias.detach(), number=torch.zeros(1))
    load(tmp_path, best_now, model=model_now)
    assert torch.equal(model_now.weight, model.weight)
    for name, tensor in best.tensors.items():
        assert torch.equal(best_now.tensors[name], tensor), name


@pytest.mark.parametrize("kind", [Rounds, Refuses])
def test_a_callback_that_does_not_take_its_tensors_harms_nothing_and_is_saved_again(tmp_path, kind, caplog):
    stored = torch.tensor([1.0, 2.0], dtype=torch.float64)
    save(tmp_path, kind(x=stored), Count())
    callback, count, model = kind(x=torch.zeros(3)), Count(), nn.Linear(2, 2)
    with coordinator(tmp_path, [callback, count], model) as checkpoints:
        checkpoints.load_checkpoint()
        assert ("did not take its state: ValueError: not mine" in caplog.text) == (kind is Refuses)
        checkpoints.save_checkpoint(2)
    again = Holds()
    again.name = kind.__name__
    load(tmp_path, again, Count())
    assert torch.equal(again.tensors["x"], callback.tensors["x"])


# ---- DTensors


def test_tensors_that_are_cut_over_the_ranks_are_told_of_and_left_out(tmp_path):
    layout = Layout("fsdp", {"shard": 2})

    def life(max_steps: int) -> int:
        count = Count()
        layout.trainer(Net(), tmp_path, max_steps=max_steps, save_steps=2, on_step_end=[Average(), count]).train()
        return count.num_steps

    first = layout.outcomes(lambda: life(2))
    assert values(first) == [2, 2]
    for outcome in first:
        assert "the state of callback 'Average' is not saved: StructureError: 'Average/" in outcome.output
        assert "declare such state as a component of its own" in outcome.output
    second = layout.outcomes(lambda: life(4))
    assert values(second) == [4, 4]
    assert all("'Average' is not in the checkpoint, and starts fresh" in outcome.output for outcome in second)


def test_a_dtensor_that_one_rank_has_alone_is_saved_and_comes_back_as_one(tmp_path):
    def case(rank: int, world_size: int) -> None:
        mesh = init_device_mesh("cpu", (1,))
        for place, placement in enumerate((Shard(0), Replicate())):
            directory = tmp_path / f"{place}"
            whole = torch.arange(6.0).view(3, 2)
            save(directory, Holds(x=distribute_tensor(whole, mesh, [placement])))
            callback = Holds(x=distribute_tensor(torch.zeros(3, 2), mesh, [placement]))
            load(directory, callback)
            assert isinstance(callback.tensors["x"], DTensor)
            assert torch.equal(callback.tensors["x"].full_tensor(), whole)

    values(run_ranks(1, case))


# ---- another part of the model


def trained(layout: Layout, directory: Path, max_steps: int) -> list[Outcome]:
    """On each rank what its callbacks have before the last step: how many steps they saw, and the names they average."""

    def life() -> tuple[int, list[str], bool]:
        torch.manual_seed(0)
        average, count = Average(), Count()
        trainer = layout.trainer(Net(), directory, max_steps=max_steps, save_steps=2, on_step_end=[average, count])
        trainer.train()
        return (
            count.num_steps,
            sorted(average.weights),
            average.weights.keys() <= dict(trainer.model.named_parameters()).keys(),
        )

    return layout.outcomes(life)


@pytest.mark.parametrize("new", [INTERLEAVED, DDP], ids=str)
def test_tensors_of_another_part_of_the_model_are_not_taken_and_what_is_no_tensor_is(tmp_path, new):
    values(trained(PIPELINE, tmp_path, 2))
    outcomes = trained(new, tmp_path, 3)
    for num_steps, names, are_own in values(outcomes):
        assert (num_steps, are_own) == (3, True)
        assert names
    for outcome in outcomes:
        assert (
            "callback 'Average' starts fresh: it keeps tensors, which were saved on a rank with another part"
            in outcome.output
        )
        assert "declare such state as a component of its own" in outcome.output


def test_an_average_of_the_whole_model_goes_on_on_another_number_of_ranks(tmp_path):
    def life(layout: Layout, max_steps: int) -> list[float]:
        torch.manual_seed(0)
        average = Average()
        hooks = [average]
        layout.trainer(Net(), tmp_path, max_steps=max_steps, save_steps=2, on_step_end=hooks).train()
        return average.weights["gain"].tolist()

    saved = DDP.run(lambda: life(DDP, 2))
    more = Layout("ddp", {"dp": 4})
    assert more.run(lambda: life(more, 2)) == [saved[0]] * 4


def states_of(model: nn.Module, *callbacks: Any) -> dict[str, Any]:
    return CallbackStates(callbacks, model.state_dict).state_dict()


SAME, OTHER = nn.Linear(2, 2), nn.Linear(2, 3)


@pytest.mark.parametrize(
    ("saved", "now", "is_taken"),
    [
        (SAME, nn.Linear(2, 2), True),
        (SAME, OTHER, False),
        (SAME, nn.Linear(2, 2).to(torch.bfloat16), False),
        (SAME, nn.Sequential(nn.Linear(2, 2)), False),
        (None, OTHER, True),  # saved before the part was
        (SAME, None, True),
    ],
)
@pytest.mark.parametrize("is_resized", [False, True])
def test_tensors_are_taken_where_the_part_is_the_same(saved, now, is_taken, is_resized, caplog):
    callbacks = [Holds(x=torch.ones(2)), Count()]
    state = CallbackStates(callbacks, saved and saved.state_dict).state_dict()
    if is_resized:
        state = taken_over([{}, state, state], None, None)
    holds, count = Holds(), Count()
    count.num_steps = -1
    CallbackStates([holds, count], now and now.state_dict).load_state_dict(state)
    assert (bool(holds.tensors), count.num_steps) == (is_taken, 0)
    assert ("callback 'Holds' starts fresh: it keeps tensors" in caplog.text) == (not is_taken)


def test_of_each_callback_the_part_is_that_of_the_rank_whose_state_is_taken():
    first, second = Holds(x=torch.ones(2)), Holds(x=torch.ones(3))
    first.name, second.name = "first", "second"
    one, other = states_of(SAME, first), states_of(OTHER, first, second)
    taken = taken_over([one, other], None, None)
    assert taken.keys() == {"first", "second", PART}
    assert taken[PART] == {part_of(SAME.state_dict()): ["first"], part_of(OTHER.state_dict()): ["second"]}


def test_unlike_states_of_one_callback_are_refused_on_another_number_of_ranks():
    one, other = states_of(SAME, Holds(x=torch.ones(2))), states_of(SAME, Holds(y=torch.ones(2)))
    with pytest.raises(LoadMismatch, match="callback 'Holds' kept other items on some ranks than on others"):
        taken_over([one, other], None, None)


def test_parts_of_a_cut_tensor_are_other_parts_of_the_model():
    def case(rank: int, world_size: int) -> str:
        mesh = init_device_mesh("cpu", (2,))
        return part_of({"x": distribute_tensor(torch.zeros(4, 2), mesh, [Shard(0)])})

    one, other = values(run_ranks(2, case))
    assert len({one, other, part_of({"x": torch.zeros(4, 2)}), part_of({"x": torch.zeros(2, 2)})}) == 4


def test_a_callback_cannot_have_the_name_of_the_mark():
    callback = Count()
    callback.name = PART
    with pytest.raises(ValueError, match=f"a callback is called {PART!r}"):
        CallbackStates([callback])
