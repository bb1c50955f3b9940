"""Replicas of the parts of DTensors are compared among the ranks that hold them, and named by their boxes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from forgather_ckpt import CheckpointCoordinator, CheckpointManifest, NamedOptimizer, SharingPattern, StateComponent
from forgather_ckpt.names import shown
from forgather_ckpt.sharded import is_sharded, local_part, parts
from tests.components import Box, Trainer, listing, refusal, the_same
from tests.ranks import run_ranks, values
from tests.test_replication_check import flip

pytestmark = pytest.mark.multiprocess

REPLICATED, PER_GROUP, PER_RANK = SharingPattern.REPLICATED, SharingPattern.PER_GROUP, SharingPattern.PER_RANK
LEVELS = ("quick", "tensor", "full")


def sharded_model(axes: dict[str, int]) -> tuple[nn.Module, NamedOptimizer]:
    """A trained model under FSDP2 over all axes but `tp`, of which the first replicates if there are two. Seven rows over
    four ranks leave one a shorter part; one row leaves all but one nothing."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 7), nn.Linear(7, 6), nn.LayerNorm(1, 6))
    model.register_buffer("plain", torch.arange(5.0))
    model.register_parameter("one", nn.Parameter(torch.ones(1, 3)))
    mesh = init_device_mesh("cpu", tuple(axes.values()), mesh_dim_names=tuple(axes))
    if "tp" in axes:
        plan = {"0": ColwiseParallel(use_local_output=False), "1": RowwiseParallel()}
        parallelize_module(model, mesh["tp"], plan)
    names = tuple(name for name in axes if name != "tp")
    fully_shard(model, mesh=mesh[names] if len(names) > 1 else mesh[names[0]])
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(2):
        for number, parameter in enumerate(model.parameters()):
            parameter.grad = torch.full_like(parameter, 0.1 + number)
        optimizer.step()
    return model, NamedOptimizer(optimizer, [model])


def components(model: nn.Module, optimizer: NamedOptimizer, level: str | None = None) -> list[StateComponent]:
    return [
        StateComponent("model", model, REPLICATED, validation_level=level),  # type: ignore[arg-type]
        StateComponent("optimizer", optimizer, REPLICATED, validation_level=level),  # type: ignore[arg-type]
    ]


def holders_of(rank: int, axes: dict[str, int], cuts: Sequence[str]) -> tuple[int, ...]:
    """The ranks that are where `rank` is on the axes that cut."""

    def place(number: int) -> dict[str, int]:
        found = {}
        for name, size in reversed(axes.items()):
            number, found[name] = divmod(number, size)
        return found

    own = place(rank)
    world_size = torch.tensor(list(axes.values())).prod().item()
    return tuple(other for other in range(int(world_size)) if all(place(other)[name] == own[name] for name in cuts))


def verdict(holders: tuple[int, ...], victim: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Majority and minority, where one of the holders differs: in a tie the lowest rank is right."""
    others = tuple(rank for rank in holders if rank != victim)
    if len(holders) == 2 and victim == min(holders):
        return (victim,), others
    return others, (victim,)


LEAVES = [
    ("model", "0.weight", ("shard", "tp")),
    ("model", "1.weight", ("shard", "tp")),
    ("model", "1.bias", ("shard",)),
    ("optimizer", "state.0.weight.exp_avg", ("shard", "tp")),
    ("optimizer", "state.0.weight.exp_avg_sq", ("shard", "tp")),
]
"""Component, item, and the axes that cut it: on the others it is replicated."""


@pytest.mark.parametrize(
    "axes", [{"rep": 2, "shard": 2}, {"rep": 3, "shard": 1}, {"rep": 4, "shard": 2}, {"rep": 2, "shard": 2, "tp": 2}]
)
def test_one_flipped_bit_in_a_part_on_any_rank_is_named_at_every_level(axes: dict[str, int], tmp_path: Path):
    def case(rank: int, world_size: int) -> list[Any]:
        model, optimizer = sharded_model(axes)
        told = []
        with CheckpointCoordinator(components(model, optimizer), tmp_path, timeout_seconds=60) as coordinator:
            told.append({key: one.is_equal for key, one in coordinator.validate_replication("full").items()})
            for key, name, _ in LEAVES:
                tensor = (model if key == "model" else optimizer).state_dict()[name]
                for victim in range(world_size):
                    own = [part for _, part in parts(tensor)] if tensor.numel() else []
                    for level in LEVELS:
                        if rank == victim and own:
                            flip(local_part(tensor), -1, 0)
                        reports = coordinator.validate_replication(level, [key])
                        if rank == victim and own:
                            flip(local_part(tensor), -1, 0)
                        [report] = reports.values()
                        told.append(
                            [
                                (one.holders, one.majority, one.minority, [item.to_json() for item in one.items])
                                for one in report.differences
                            ]
                        )
            state = model.state_dict()
            boxes = {name: [box for box, _ in parts(one)] for name, one in state.items() if is_sharded(one)}
        return [told, boxes]

    world_size = 1
    for size in axes.values():
        world_size *= size
    results = values(run_ranks(world_size, case, timeout=110))
    [equal, *told] = the_same([told for told, _ in results])
    boxes = [boxes for _, boxes in results]
    assert equal == {"model": True, "optimizer": True}
    cases = [(leaf, victim, level) for leaf in LEAVES for victim in range(world_size) for level in LEVELS]
    num_found = 0
    for ((_, name, cuts), victim, level), differences in zip(cases, told, strict=True):
        parameter = name.removeprefix("state.").removesuffix(".exp_avg").removesuffix(".exp_avg_sq")
        own = boxes[victim].get(parameter)
        if own == []:
            assert differences == [], "a rank whose part is empty has nothing that could differ"
            continue
        holders = holders_of(victim, axes, [axis for axis in cuts if axis in axes and axes[axis] > 1])
        majority, minority = verdict(holders, victim)
        [(found_holders, found_majority, found_minority, [item])] = differences
        assert (found_holders, found_majority, found_minority) == (holders, majority, minority), (name, victim, level)
        assert item["name"] == name
        if own is not None:
            assert item["box"] == [list(bounds) for bounds in own[-1]]
            last = [stop - 1 for _, stop in own[-1]]
            assert all(one["elements"]["first_index"] == last for one in item["minorities"])
        assert [one["elements"]["different"] for one in item["minorities"]] == [1]
        num_found += 1
    assert num_found >= len(LEVELS) * world_size


@pytest.mark.parametrize("level", LEVELS)
def test_parts_that_differ_are_told_by_a_save_and_nothing_is_stored(level: str, tmp_path: Path):
    axes = {"rep": 2, "shard": 2}

    def case(rank: int, world_size: int) -> list[Any]:
        model, optimizer = sharded_model(axes)
        with CheckpointCoordinator(components(model, optimizer, level), tmp_path, timeout_seconds=60) as coordinator:
            weight = model.state_dict()["0.weight"]
            if rank == 3:
                flip(local_part(weight), 0, 3)
            told = refusal(lambda: coordinator.save_checkpoint(1))
            found = listing(tmp_path)
            if rank == 3:
                flip(local_part(weight), 0, 3)
            coordinator.save_checkpoint(2)
            return [told, found, parts(weight)[0].box]

    results = values(run_ranks(4, case, timeout=60))
    (kind, message), _ = the_same([result[:2] for result in results])
    assert kind == "ReplicaMismatch"
    box = results[3][2]
    assert repr(shown("0.weight", box)) in message
    assert "differs between rank 1 and rank 3" in message
    assert f"first at {[start for start, _ in box]}" in message
    assert not (tmp_path / "checkpoint-1").exists()
    record = CheckpointManifest.load(tmp_path / "checkpoint-2").components["model"]
    assert (record.validation.level.value, record.validation.result) == (level, "equal")


def test_with_warn_each_part_comes_from_its_majority(tmp_path: Path):
    def case(rank: int, world_size: int) -> torch.Tensor:
        mesh = init_device_mesh("cpu", (3, 2), mesh_dim_names=("rep", "shard"))
        own = distribute_tensor(torch.arange(8.0), mesh, [Replicate(), Shard(0)], src_data_rank=None)
        if rank == 1:
            flip(local_part(own), 0, 7)
        declared = [StateComponent("model", Box({"w": own}), REPLICATED)]
        with CheckpointCoordinator(declared, tmp_path, timeout_seconds=60, on_mismatch="warn") as coordinator:
            coordinator.save_checkpoint(1)
            coordinator.load_checkpoint()
        return own.full_tensor()

    for whole in values(run_ranks(6, case, timeout=60)):
        assert torch.equal(whole, torch.arange(8.0))
    record = CheckpointManifest.load(tmp_path / "checkpoint-1").components["model"]
    assert (record.validation.result, record.trusted) == ("differed", {"all": (0, 2, 3, 4, 5)})


def test_parts_that_data_parallel_replicas_hold_on_meshes_of_their_own_are_compared(tmp_path: Path):
    """DP × TP without FSDP: each replica has its own tensor-parallel mesh, and no mesh joins them."""

    def case(rank: int, world_size: int) -> Any:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        cut = distribute_tensor(torch.arange(12.0).view(3, 4), mesh["tp"], [Shard(1)], src_data_rank=None)
        whole = distribute_tensor(torch.ones(3), mesh["tp"], [Replicate()], src_data_rank=None)
        trainer = Trainer(
            [
                StateComponent(
                    "model", Box({"w": cut, "norm": whole}), PER_GROUP, process_group_name="dp", names="global"
                )
            ],
            mesh,
        )
        with CheckpointCoordinator(trainer, tmp_path, timeout_seconds=60) as coordinator:
            coordinator.save_checkpoint(1)
            if rank == 2:
                flip(local_part(cut), 4, 0)
            if rank == 1:
                flip(local_part(whole), 0, 0)
            [report] = coordinator.validate_replication("full").values()
        return [
            (one.holders, one.minority, [(item.name, item.box) for item in one.items]) for one in report.differences
        ]

    found = the_same(values(run_ranks(4, case, timeout=60)))
    assert found == [
        ((0, 1, 2, 3), (1,), [("norm", None)]),
        ((0, 2), (2,), [("w", ((0, 3), (0, 2)))]),
    ]
    [entry] = CheckpointManifest.load(tmp_path / "checkpoint-1").components["model"].entries.values()
    assert (entry.num_items, entry.num_bytes) == (2, 12 * 4 + 3 * 4)


def test_a_local_part_whose_elements_share_memory_is_refused_before_anything_is_touched(tmp_path: Path):
    def case(rank: int, world_size: int) -> Any:
        mesh = init_device_mesh("cpu", (2,))
        own = DTensor.from_local(torch.ones(1).expand(3), mesh, [Shard(0)], run_check=False)
        other = torch.zeros(2)
        declared = [StateComponent("model", Box({"other": other, "w": own}), REPLICATED)]
        with CheckpointCoordinator(declared, tmp_path, timeout_seconds=60) as coordinator:
            coordinator.save_checkpoint(1)
            other += 1
            return refusal(coordinator.load_checkpoint), other.tolist()

    (kind, message), other = the_same(values(run_ranks(2, case, timeout=60)))
    assert (kind, other) == ("LoadMismatch", [1.0, 1.0])
    assert "the local part of 'w' has elements that share memory" in message
    assert "torn" not in message


def test_replicas_of_a_part_share_out_the_writing_of_it(tmp_path: Path):
    num_elements = (128 << 20) // 4

    def case(rank: int, world_size: int) -> bool:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("rep", "shard"))
        own = DTensor.from_local(
            torch.arange(num_elements // 2, dtype=torch.float32) + rank % 2,
            mesh,
            [Replicate(), Shard(0)],
            run_check=False,
        )
        expected = local_part(own).clone()
        with CheckpointCoordinator([StateComponent("model", Box({"w": own}), REPLICATED)], tmp_path) as coordinator:
            coordinator.save_checkpoint(1)
            local_part(own).zero_()
            coordinator.load_checkpoint()
        return torch.equal(local_part(own), expected)

    assert all(values(run_ranks(4, case, timeout=100)))
    manifest = CheckpointManifest.load(tmp_path / "checkpoint-1")
    sizes = [record.size for name, record in sorted(manifest.files.items()) if name.startswith("model-")]
    assert len(sizes) == 4
    assert max(sizes) < 33 << 20


@pytest.mark.parametrize("level", ["none", "quick"])
def test_parts_of_which_no_copy_is_the_majoritys_come_from_the_same_replica(level: str, tmp_path: Path):
    """Copies that differ are never mixed without need, whatever order the mesh's ranks are in: with NONE nobody knows
    whether they do, and with two of them neither is the majority."""

    def case(rank: int, world_size: int) -> torch.Tensor:
        mesh = DeviceMesh("cpu", torch.tensor([[0, 3], [1, 2]]), mesh_dim_names=("rep", "shard"))
        replica = mesh.get_coordinate()[0]
        own = DTensor.from_local(torch.full((2,), float(replica)), mesh, [Replicate(), Shard(0)], run_check=False)
        declared = [StateComponent("model", Box({"w": own}), REPLICATED, validation_level=level)]  # type: ignore[arg-type]
        with CheckpointCoordinator(declared, tmp_path, timeout_seconds=60, on_mismatch="warn") as coordinator:
            coordinator.save_checkpoint(1)
            coordinator.load_checkpoint()
        return own.full_tensor()

    for found in values(run_ranks(4, case, timeout=60)):
        assert torch.equal(found, torch.zeros(4))
