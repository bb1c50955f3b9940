"""A namespace that ranks share: what one of them has, every layout can read, and nothing is left behind silently."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from forgather_ckpt import CheckpointCoordinator, NamedOptimizer, SharingPattern, StateComponent
from tests.components import Box, refusal, the_same
from tests.ranks import run_ranks, values

pytestmark = pytest.mark.multiprocess

PER_RANK, GLOBAL = SharingPattern.PER_RANK, SharingPattern.GLOBAL


def save(run: Path, *states: dict[str, Any] | None) -> None:
    """One rank for each state, which all are of one namespace."""

    def case(rank: int, world_size: int) -> None:
        state = states[rank]
        stateful = None if state is None else Box(state)
        with CheckpointCoordinator([StateComponent("model", stateful, PER_RANK, names="global")], run) as coordinator:
            coordinator.save_checkpoint(1)

    values(run_ranks(len(states), case, timeout=60))


def load(run: Path, *states: dict[str, Any] | None, strict: bool = True) -> list[Any]:
    """What each rank has after a load into these states, or the error."""

    def case(rank: int, world_size: int) -> Any:
        state = states[rank]
        box = None if state is None else Box(state)
        with CheckpointCoordinator([StateComponent("model", box, PER_RANK, names="global")], run) as coordinator:
            try:
                coordinator.load_checkpoint(strict=strict)
            except Exception:
                return refusal(lambda: coordinator.load_checkpoint(strict=strict))
        return None if box is None else {name: value.tolist() for name, value in box.state_dict().items()}

    return values(run_ranks(len(states), case, timeout=60))


def tensors(**numbers: float) -> dict[str, torch.Tensor]:
    return {name: torch.tensor([number]) for name, number in numbers.items()}


def test_each_rank_takes_what_it_has(tmp_path):
    save(tmp_path, tensors(a=1, b=2), tensors(c=3), tensors(b=2, d=4))
    assert load(tmp_path, tensors(a=0, c=0), tensors(d=0, b=0)) == [{"a": [1], "c": [3]}, {"d": [4], "b": [2]}]
    assert load(tmp_path, tensors(a=0, b=0, c=0, d=0), None) == [{"a": [1], "b": [2], "c": [3], "d": [4]}, None]


def test_what_no_rank_takes_is_an_error_that_names_it_and_leaves_all_as_it_was(tmp_path):
    save(tmp_path, tensors(a=1, b=2), tensors(c=3, d=4))
    kind, message = the_same(load(tmp_path, tensors(a=0), None, tensors(d=0)))
    assert kind == "LoadMismatch"
    assert "'b', 'c' in the checkpoint but on no rank of the job" in message
    assert "load with strict=False to leave them" in message


def test_what_no_rank_takes_may_be_left(tmp_path):
    save(tmp_path, tensors(a=1, b=2), tensors(c=3, d=4))
    assert load(tmp_path, tensors(a=0), tensors(d=0), strict=False) == [{"a": [1]}, {"d": [4]}]


def test_an_optimizer_that_lacks_parameters_of_the_checkpoint_is_told(tmp_path):
    def stage(*names: str) -> NamedOptimizer:
        model = nn.ModuleDict({name: nn.Linear(2, 2) for name in names})
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        return NamedOptimizer(optimizer, [model])

    def run(*stages: tuple[str, ...], does_save: bool) -> Any:
        def case(rank: int, world_size: int) -> Any:
            declared = [StateComponent("optimizer", stage(*stages[rank]), PER_RANK, names="global")]
            with CheckpointCoordinator(declared, tmp_path) as coordinator:
                return coordinator.save_checkpoint(1) if does_save else refusal(coordinator.load_checkpoint)

        return values(run_ranks(len(stages), case, timeout=60))

    run(("a", "b"), ("c",), does_save=True)
    _, message = the_same(run(("a",), ("c",), does_save=False))
    assert "'groups.b.bias." in message
    assert "on no rank of the job" in message


def test_a_tensor_that_is_a_second_name_elsewhere_is_saved_and_loaded_in_any_layout(tmp_path, caplog):
    """GPT's first stage has the embedding under both of its names, its last one only the head."""
    weight = torch.arange(3.0)
    other = weight.clone()
    save(tmp_path, {"wte": weight, "head": weight}, {"head": other, "ln": torch.ones(1)})

    def tied(rank: int, world_size: int) -> Any:
        one = torch.zeros(3)
        box = Box({"wte": one, "head": one, "ln": torch.zeros(1)})
        with CheckpointCoordinator([StateComponent("model", box, GLOBAL)], tmp_path) as coordinator:
            coordinator.load_checkpoint()
        state = box.state_dict()
        return state["wte"].data_ptr() == state["head"].data_ptr(), one.tolist(), state["ln"].tolist()

    with caplog.at_level(logging.ERROR):
        [(is_tied, *found)] = values(run_ranks(1, tied, timeout=60))
    assert (is_tied, found) == (True, [[0.0, 1.0, 2.0], [1.0]])
    split = load(tmp_path, {"wte": torch.zeros(3)}, {"head": torch.zeros(3)}, {"ln": torch.zeros(1)})
    assert split == [{"wte": [0, 1, 2]}, {"head": [0, 1, 2]}, {"ln": [1]}]


def test_a_second_name_whose_tensor_differs_from_the_one_elsewhere_is_told(tmp_path):
    weight = torch.arange(3.0)

    def case(rank: int, world_size: int) -> Any:
        states = [{"wte": weight, "head": weight}, {"head": weight + 1}]
        declared = [StateComponent("model", Box(states[rank]), PER_RANK, names="global")]
        with CheckpointCoordinator(declared, tmp_path) as coordinator:
            return refusal(lambda: coordinator.save_checkpoint(1))

    kind, message = the_same(values(run_ranks(2, case, timeout=60)))
    assert kind == "ReplicaMismatch"
    assert "'head' (first at [0], max |Δ| 1)" in message
