"""`RNGState`: after a restore, every generator gives the numbers that it would have given."""

import random

import numpy as np
import pytest
import torch

from forgather_ckpt import CheckpointCoordinator, RNGState, SharingPattern, StateComponent
from forgather_ckpt.errors import LoadMismatch


def draw() -> list[object]:
    return [
        random.random(), random.gauss(0, 1), np.random.rand(3).tolist(), np.random.randn(), torch.rand(3).tolist(),
        torch.randn(1).item(), torch.randperm(5).tolist(),
    ]  # fmt: skip


def disturb() -> None:
    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)
    draw()


@pytest.mark.parametrize("num_drawn", [0, 1, 2, 3])
def test_all_generators_continue_where_they_were(num_drawn):
    for _ in range(num_drawn):
        draw()  # an odd number of gauss() leaves half a pair in the generators
    state = RNGState().state_dict()
    expected = [draw(), draw()]
    disturb()
    RNGState().load_state_dict(state)
    assert [draw(), draw()] == expected


def test_they_continue_through_a_checkpoint(tmp_path):
    components = [StateComponent("rng", RNGState(), SharingPattern.PER_RANK, on_resize="drop")]
    with CheckpointCoordinator(components, tmp_path) as coordinator:
        random.gauss(0, 1)
        np.random.randn()
        coordinator.save_checkpoint(step=1)
        expected = [draw(), draw()]
        disturb()
        assert coordinator.load_checkpoint().loaded == ("rng",)
        assert [draw(), draw()] == expected


def test_what_was_taken_does_not_change_with_the_generators():
    state = RNGState().state_dict()
    kept = RNGState().state_dict()
    draw()
    assert state["python"] == kept["python"]
    assert torch.equal(state["torch"], kept["torch"])
    assert np.array_equal(state["numpy"]["state"]["key"], kept["numpy"]["state"]["key"])


class Devices:
    """Generators of pretended CUDA devices."""

    def __init__(self, monkeypatch, count: int) -> None:
        self.states = [torch.tensor([number], dtype=torch.uint8) for number in range(count)]
        self.current = 0
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(self.states))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(self.states))
        monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: [state.clone() for state in self.states])
        monkeypatch.setattr(torch.cuda, "set_rng_state_all", lambda states: setattr(self, "states", list(states)))
        monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state: self.states.__setitem__(self.current, state))
        monkeypatch.setattr(torch.cuda, "current_device", lambda: self.current)


def test_the_generators_of_all_devices_are_kept_in_order(monkeypatch):
    devices = Devices(monkeypatch, 12)
    state = RNGState().state_dict()
    expected = list(devices.states)
    devices.states = devices.states[::-1]
    RNGState().load_state_dict(state)
    assert [one.tolist() for one in devices.states] == [one.tolist() for one in expected]


@pytest.mark.parametrize(
    ("num_saved", "saved_current", "num_visible", "current"), [(8, 5, 1, 0), (1, 0, 8, 5), (2, 1, 4, 3)]
)
def test_among_another_number_of_devices_the_one_in_use_goes_on(
    monkeypatch, caplog, num_saved, saved_current, num_visible, current
):
    devices = Devices(monkeypatch, num_saved)
    devices.states = [state + 100 for state in devices.states]
    devices.current = saved_current
    state = RNGState().state_dict()
    expected = [draw(), draw()]
    devices = Devices(monkeypatch, num_visible)
    devices.current = current
    untouched = [one.tolist() for one in devices.states]
    disturb()
    RNGState().load_state_dict(state)
    assert [draw(), draw()] == expected
    assert [one.tolist() for one in devices.states] == [
        [100 + saved_current] if number == current else one for number, one in enumerate(untouched)
    ]
    assert [record.getMessage() for record in caplog.records] == [
        f"generators of {num_saved} CUDA devices were saved, {num_visible} are visible: the device in use now goes on with "
        "that of the one that was, the others go on from where they are"
    ]


def test_another_number_of_devices_is_an_error_where_the_one_in_use_was_not_saved(monkeypatch):
    Devices(monkeypatch, 2)
    state = RNGState().state_dict()
    del state["cuda_device"]
    Devices(monkeypatch, 3)
    disturb()
    before = torch.get_rng_state()
    with pytest.raises(LoadMismatch, match="generators of 2 CUDA devices were saved, 3 are visible"):
        RNGState().load_state_dict(state)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_state_of_devices_loads_where_there_are_none_and_the_other_way_round(monkeypatch):
    without = RNGState().state_dict()
    Devices(monkeypatch, 2)
    with_devices = RNGState().state_dict()
    RNGState().load_state_dict(without)
    Devices(monkeypatch, 0)
    RNGState().load_state_dict(with_devices)
    assert torch.equal(torch.get_rng_state(), with_devices["torch"])
