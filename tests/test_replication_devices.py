"""The check where tensors have device digests: a CPU tensor stands for one on a GPU, and torch's operators for the kernel.

On real GPUs: tests/test_gpu.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from forgather_ckpt import (
    CheckpointCoordinator,
    CheckpointManifest,
    SharingPattern,
    StateComponent,
    device_digest,
    digests,
    writing,
)
from forgather_ckpt.structure import TensorItem
from tests.components import Box, is_same, refusal, the_same
from tests.ranks import run_ranks, values

pytestmark = pytest.mark.multiprocess

BLOCK = 4 << 20


@contextmanager
def on_device(*names: str) -> Iterator[Any]:
    """As if the tensors of these names lay on a GPU of this rank; yields the calls for device digests."""

    def is_on_host(item: TensorItem) -> bool:
        return item.name not in names

    taken = mock.patch.object(device_digest, "begin", wraps=device_digest.begin)
    with mock.patch.object(digests, "is_on_host", is_on_host), taken as calls:
        yield calls


def state() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    return {
        "large": torch.randn((3 * BLOCK // 4 + 17,), generator=generator),
        "turned": torch.randn((37, 53), generator=generator, dtype=torch.float64).t(),
        "half": torch.randn((1001,), generator=generator).to(torch.bfloat16),
        "step": torch.tensor(7.0),
        "lr": 0.1,
    }


DEVICE_NAMES = ("large", "turned", "half")


@pytest.mark.parametrize("level", ["quick", "tensor", "full"])
def test_copies_are_compared_by_their_device_digests(level: str, tmp_path: Path) -> None:
    def case(rank: int, world_size: int) -> list[Any]:
        box = Box(state())
        component = StateComponent("model", box, SharingPattern.REPLICATED, validation_level=level)
        results: list[Any] = []
        with (
            on_device(*DEVICE_NAMES) as calls,
            CheckpointCoordinator([component], tmp_path, timeout_seconds=60) as coordinator,
        ):
            results.append(coordinator.validate_replication()["model"].is_equal)
            assert [len(call.args[0]) for call in calls.call_args_list] == [3]
            for name, element in (("large", 2 * BLOCK // 4 + 5), ("turned", 3), ("half", 1000), ("step", 0)):
                tensor = box.items[name]
                flat = tensor.t().flatten() if name == "turned" else tensor.view(-1)
                before = flat[element].clone()
                if rank == 1:
                    flat[element] += 1
                [difference] = coordinator.validate_replication()["model"].differences
                [item] = difference.items
                [copy] = item.minorities
                results.append((item.name, copy.ranks, copy.elements.num_different, copy.elements.num_elements))
                flat[element] = before
            results.append(coordinator.save_checkpoint(1).name)
            box.items = {name: torch.zeros_like(one) for name, one in state().items() if name != "lr"} | {"lr": 0.0}
            coordinator.load_checkpoint()
        return [*results, is_same(box.items, state())]

    equal, *found, saved, is_loaded = the_same(values(run_ranks(3, case)))
    sizes = {name: tensor.numel() for name, tensor in state().items() if name != "lr"}
    assert found == [(name, (1,), 1, sizes[name]) for name in ("large", "turned", "half", "step")]
    assert (equal, saved, is_loaded) == (True, "checkpoint-1", True)
    assert CheckpointManifest.load(tmp_path / saved).components["model"].validation.result == "equal"


def test_where_tensors_lie_differently_on_some_ranks_all_take_host_digests(tmp_path: Path) -> None:
    def case(rank: int, world_size: int) -> tuple[Any, ...]:
        box = Box(state())
        component = StateComponent("model", box, SharingPattern.REPLICATED)
        with (
            on_device(*(DEVICE_NAMES if rank < 2 else DEVICE_NAMES[:1])),
            CheckpointCoordinator([component], tmp_path, timeout_seconds=60) as coordinator,
        ):
            levels = ("quick", "tensor", "full")
            equal = [coordinator.validate_replication(level)["model"].is_equal for level in levels]
            box.items["half"][5] += rank == 0
            reports = [coordinator.validate_replication(level)["model"] for level in levels]
            named = {(item.name, item.minority) for one in reports for item in one.differences[0].items}
            box.items["half"].copy_(state()["half"])
            return equal, named, coordinator.save_checkpoint(1).name

    assert the_same(values(run_ranks(3, case))) == ([True] * 3, {("half", (0,))}, "checkpoint-1")


@pytest.mark.parametrize("culprit", [0, 1])
def test_a_tensor_on_a_device_that_changes_while_it_is_saved_fails_the_save(culprit: int, tmp_path: Path) -> None:
    def case(rank: int, world_size: int) -> tuple[Any, ...]:
        box = Box({"one": torch.zeros(3), "other": torch.zeros(3)})
        write = writing.write

        def write_and_change(*args: Any, **options: Any) -> Any:
            written = write(*args, **options)
            for tensor in box.items.values():
                tensor[0] += 1.0
            return written

        component = StateComponent("model", box, SharingPattern.REPLICATED)
        with (
            on_device("one", "other"),
            CheckpointCoordinator([component], tmp_path, timeout_seconds=60) as coordinator,
        ):
            with mock.patch.object(writing, "write", write_and_change if rank == culprit else write):
                error = refusal(lambda: coordinator.save_checkpoint(1))
            dist.barrier()
            for tensor in box.items.values():
                tensor[0] = 2.0
            return error, coordinator.save_checkpoint(1).name

    (kind, message), saved = the_same(values(run_ranks(2, case)))
    assert (kind, saved) == ("CheckpointError", "checkpoint-1")
    assert f"on rank {culprit}: component 'model'" in message or f"rank {culprit}" in message
    assert "changed while it was being saved" in message
