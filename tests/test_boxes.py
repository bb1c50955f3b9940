"""Which elements of a sharded tensor lie where, against a slow reference and against torch itself."""

import itertools
import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, distribute_tensor
from torch.distributed.tensor import Shard as TorchShard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard

from forgather_ckpt import sharded
from forgather_ckpt.boxes import (
    Layout,
    Shard,
    check_tiling,
    inside,
    is_grid,
    local_boxes,
    local_shape,
    overlap,
    rectangles,
    volume,
    whole_box,
)
from forgather_ckpt.errors import StructureError
from tests.ranks import run_ranks, values

# ---- against a slow reference: index arrays, cut as torch.chunk cuts


def chunks(indexes: np.ndarray, count: int, dim: int) -> list[np.ndarray]:
    length = indexes.shape[dim]
    size = -(-length // count)
    cuts = [min(length, size * i) for i in range(count + 1)]
    return [np.take(indexes, range(start, stop), axis=dim) for start, stop in itertools.pairwise(cuts)]


def reference(layout: Layout, shape: tuple[int, ...], place: tuple[int, ...]) -> np.ndarray:
    """The places in C order of the elements at `place`, in the shape of the local part; only for plain cuts."""
    held = np.arange(math.prod(shape)).reshape(shape)
    for size, one, at in zip(layout.mesh, layout.placements, place, strict=True):
        if one is not None:
            pieces = chunks(held, one.split_factor, one.dim)
            held = np.concatenate([chunks(piece, size, one.dim)[at] for piece in pieces], axis=one.dim)
    return held


def from_boxes(layout: Layout, shape: tuple[int, ...], place: tuple[int, ...]) -> np.ndarray:
    whole = np.arange(math.prod(shape)).reshape(shape)
    found = np.full(local_shape(layout, shape, place), -1)
    for box, where in local_boxes(layout, shape, place):
        found[tuple(slice(*bounds) for bounds in where)] = whole[tuple(slice(*bounds) for bounds in box)]
    return found


@st.composite
def layouts(draw: st.DrawFn, *, strided: bool) -> tuple[Layout, tuple[int, ...]]:
    shape = tuple(draw(st.lists(st.integers(0, 13), min_size=1, max_size=3)))
    mesh = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=3)))
    dims = st.integers(0, len(shape) - 1)
    cut = st.tuples(dims, st.integers(1, 4) if strided else st.just(1)).map(lambda one: Shard(*one))
    return Layout(mesh, tuple(draw(st.lists(st.none() | cut, min_size=len(mesh), max_size=len(mesh))))), shape


@given(layouts(strided=False))
def test_boxes_are_those_of_the_definition(case):
    layout, shape = case
    for place in layout.coordinates():
        assert np.array_equal(from_boxes(layout, shape, place), reference(layout, shape, place))


@given(layouts(strided=True))
def test_the_parts_of_all_places_hold_each_element_once(case):
    layout, shape = case
    check_tiling(layout, shape)
    parts = {layout.part(place): local_boxes(layout, shape, place) for place in layout.coordinates()}
    count = np.zeros(shape, int)
    for boxes in parts.values():
        for box, where in boxes:
            assert volume(box) == volume(where) > 0
            count[tuple(slice(*bounds) for bounds in box)] += 1
    assert (count == 1).all()
    if math.prod(shape):
        assert is_grid([box for boxes in parts.values() for box, _ in boxes], shape)


@given(layouts(strided=True))
def test_replicas_hold_the_same(case):
    layout, shape = case
    held = {}
    for place in layout.coordinates():
        boxes = local_boxes(layout, shape, place)
        assert held.setdefault(layout.part(place), boxes) == boxes


@pytest.mark.parametrize(("size", "length"), [(2, 9), (4, 9), (4, 10), (3, 2)])
def test_a_lone_strided_cut_is_taken_literally(size, length):
    layout = Layout((size,), (Shard(0, 2),))
    for place in layout.coordinates():
        assert np.array_equal(from_boxes(layout, (length,), place), reference(layout, (length,), place))


def test_fsdp_over_tensor_parallelism_cuts_the_parts_of_the_later_axis():
    layout = Layout((4, 2), (Shard(0, 2), Shard(0)))
    rows = {place: [box[0] for box, _ in local_boxes(layout, (9, 1), place)] for place in layout.coordinates()}
    # as `fully_shard` over `parallelize_module` does: taken literally, the ninth row would be at (3, 0)
    assert rows[3, 0] == []
    assert rows[3, 1] == [(8, 9)]


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 4)), max_size=3), st.data())
def test_a_range_in_c_order_is_a_few_boxes_that_follow_one_another(bounds, data):
    box = tuple((low, low + length) for low, length in bounds)
    start = data.draw(st.integers(0, volume(box)))
    stop = data.draw(st.integers(start, volume(box)))
    shape = tuple(high for _, high in box)
    places = np.arange(math.prod(shape)).reshape(shape)
    expected = places[inside(box, whole_box(shape))].reshape(-1)[start:stop]
    found = [places[inside(one, whole_box(shape))].reshape(-1) for one in rectangles(box, start, stop)]
    assert np.array_equal(np.concatenate([np.empty(0, int), *found]), expected)
    assert len(found) <= max(1, 2 * len(box) - 1)


def test_what_boxes_have_in_common():
    assert overlap(((0, 4), (2, 6)), ((3, 9), (0, 3))) == ((3, 4), (2, 3))
    assert overlap(((0, 4),), ((4, 9),)) is None
    assert overlap((), ()) == ()


@pytest.mark.parametrize(
    ("boxes", "shape", "expected"),
    [
        ([((0, 2), (0, 3)), ((2, 4), (0, 3))], (4, 3), True),
        ([((0, 2), (0, 3)), ((3, 4), (0, 3))], (4, 3), False),  # a gap
        ([((0, 3), (0, 3)), ((2, 4), (0, 3))], (4, 3), False),  # an overlap
        ([((0, 2), (0, 3)), ((0, 2), (0, 3))], (4, 3), False),  # one twice, one missing
        ([((0, 2), (0, 3)), ((2, 4), (0, 2))], (4, 3), False),  # a corner is missing
        ([((0, 2), (0, 1)), ((0, 2), (1, 3)), ((2, 4), (0, 1))], (4, 3), False),  # a cell is missing
        ([((0, 4), (0, 3))], (4, 3), True),
        ([], (4, 3), False),
        ([()], (), True),
    ],
)
def test_boxes_that_are_not_a_grid_are_told(boxes, shape, expected):
    assert is_grid(boxes, shape) is expected


def test_placements_that_do_not_fit_the_shape_are_refused():
    with pytest.raises(StructureError, match=r"cuts dimension 1 of a tensor of shape \[3\]"):
        local_boxes(Layout((2,), (Shard(1),)), (3,), (0,))


# ---- against torch: full_tensor() of real DTensors

MESHES = [(8,), (2, 4), (4, 2), (2, 2, 2)]


def random_cases(seed: int, count: int) -> list[tuple[tuple[int, ...], tuple[object, ...], tuple[int, ...]]]:
    """Meshes, placements and shapes: uneven, with fewer rows than ranks, cut several times in one dimension."""
    draw = random.Random(seed)
    cases = []
    for _ in range(count):
        mesh = draw.choice(MESHES)
        shape = tuple(draw.choice([1, 2, 3, 5, 7, 8, 9, 13, 16]) for _ in range(draw.choice([1, 2, 2, 3])))
        placements = tuple(Replicate() if draw.random() < 0.3 else TorchShard(draw.randrange(len(shape))) for _ in mesh)
        cases.append((mesh, placements, shape))
    return cases


def assert_parts_are_those_of(tensor: DTensor, whole: torch.Tensor) -> int:
    """The parts are views of this rank's memory that hold the elements in their boxes, all that it has."""
    if not sharded.is_sharded(tensor):
        assert torch.equal(sharded.local_part(tensor), whole)
        return whole.numel()
    parts = sharded.parts(tensor)
    for box, part in parts:
        assert torch.equal(part, whole[tuple(slice(*bounds) for bounds in box)]), (tensor.placements, box)
    assert sum(part.numel() for _, part in parts) == tensor.to_local().numel()
    return sum(part.numel() for _, part in parts)


def test_parts_of_random_dtensors_are_what_torch_says():
    def case(rank: int, world_size: int) -> int:
        meshes = {shape: init_device_mesh("cpu", shape) for shape in MESHES}
        for mesh, placements, shape in random_cases(0, 60):
            whole = torch.arange(math.prod(shape), dtype=torch.float32).reshape(shape)
            tensor = distribute_tensor(whole, meshes[mesh], placements, src_data_rank=None)
            assert torch.equal(tensor.full_tensor(), whole)
            assert_parts_are_those_of(tensor, whole)
        return len(meshes)

    values(run_ranks(8, case, timeout=100))


def test_parts_of_strided_dtensors_are_what_torch_says():
    def case(rank: int, world_size: int) -> None:
        one, two = init_device_mesh("cpu", (4,)), init_device_mesh("cpu", (2, 2))
        for mesh, placements, shape in [
            (one, [_StridedShard(0, split_factor=2)], (16, 3)),
            (one, [_StridedShard(1, split_factor=3)], (2, 24)),
            (two, [_StridedShard(0, split_factor=2), TorchShard(0)], (16, 3)),
            (two, [_StridedShard(1, split_factor=2), TorchShard(1)], (3, 8)),
            (two, [Replicate(), _StridedShard(0, split_factor=2)], (8,)),
        ]:
            whole = torch.arange(math.prod(shape), dtype=torch.float32).reshape(shape)
            tensor = distribute_tensor(whole, mesh, placements, src_data_rank=None)
            assert torch.equal(tensor.full_tensor(), whole)
            assert_parts_are_those_of(tensor, whole)

    values(run_ranks(4, case, timeout=60))


@pytest.mark.parametrize("axes", [{"dp": 4, "tp": 2}, {"rep": 2, "dp": 2, "tp": 2}, {"dp": 8}, {"rep": 2, "dp": 4}])
@pytest.mark.parametrize("features", [13, 8, 3])
def test_parts_of_real_models_are_what_torch_says(axes, features):
    def case(rank: int, world_size: int) -> list[int]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, features), nn.Linear(features, 6))
        expected = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        mesh = init_device_mesh("cpu", tuple(axes.values()), mesh_dim_names=tuple(axes))
        if "tp" in axes:
            plan = {"0": ColwiseParallel(use_local_output=False), "1": RowwiseParallel()}
            parallelize_module(model, mesh["tp"], plan)
        names = tuple(name for name in axes if name != "tp")
        for part in (*model, model):
            fully_shard(part, mesh=mesh[names] if len(names) > 1 else mesh["dp"])
        counts = []
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter.full_tensor(), expected[name]), name
            counts.append(assert_parts_are_those_of(parameter.detach(), expected[name]))
        return counts

    values(run_ranks(8, case, timeout=60))


def test_sums_of_which_ranks_have_parts_are_refused():
    def case(rank: int, world_size: int) -> str:
        mesh = init_device_mesh("cpu", (2,))
        tensor = DTensor.from_local(torch.ones(3), mesh, [Partial()], run_check=False)
        with pytest.raises(StructureError) as caught:
            sharded.parts(tensor)
        return caught.value.message

    assert all("Partial" in message and "redistribute it first" in message for message in values(run_ranks(2, case)))


@pytest.mark.parametrize(("ranks", "axis"), [([3, 1, 0, 2], 0), ([[2, 0], [1, 3]], 1), ([[2, 3], [0, 1]], 0)])
def test_a_mesh_whose_ranks_do_not_ascend_where_it_cuts_is_refused(ranks: list, axis: int):
    """Process groups sort their ranks, so `fully_shard` gives rank 0 the first part of all, wherever it is on the mesh."""

    def case(rank: int, world_size: int) -> str:
        mesh = DeviceMesh("cpu", torch.tensor(ranks))
        placements = [TorchShard(0) if number == axis else Replicate() for number in range(mesh.ndim)]
        with pytest.raises(StructureError) as caught:
            sharded.parts(distribute_tensor(torch.arange(8.0), mesh, placements))
        return caught.value.message

    wanted = f"its ranks do not ascend along axis {axis}, which cuts the tensor"
    assert all(wanted in message for message in values(run_ranks(4, case)))


def test_a_mesh_whose_ranks_do_not_ascend_where_it_copies_is_read_as_torch_reads_it():
    whole = torch.arange(8.0)

    def case(rank: int, world_size: int) -> None:
        mesh = DeviceMesh("cpu", torch.tensor([[2, 3], [0, 1]]))
        tensor = distribute_tensor(whole.clone(), mesh, [Replicate(), TorchShard(0)])
        assert torch.equal(tensor.full_tensor(), whole)
        assert_parts_are_those_of(tensor, whole)

    values(run_ranks(4, case))


def test_a_local_part_of_another_shape_than_the_placements_say_is_refused():
    def case(rank: int, world_size: int) -> str:
        mesh = init_device_mesh("cpu", (2,))
        tensor = DTensor.from_local(
            torch.ones(3), mesh, [TorchShard(0)], run_check=False, shape=torch.Size([4]), stride=(1,)
        )
        with pytest.raises(StructureError) as caught:
            sharded.parts(tensor)
        return caught.value.message

    assert (
        values(run_ranks(2, case))
        == ["its local part has the shape [3], and its placements (dim 0 cut over 2) give this rank [2]"] * 2
    )
