"""The digests of whole tensors that nobody held, from what each part adds to them."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from forgather_ckpt import (
    CheckpointCoordinator,
    SharingPattern,
    StateComponent,
    catalog,
    comparison,
    device_digest,
    logical,
    multilinear,
)
from forgather_ckpt.boxes import Layout, local_boxes, whole_box
from forgather_ckpt.boxes import Shard as Cut
from forgather_ckpt.comparison import Change, Side
from forgather_ckpt.hashtree import BLOCK_BYTES
from forgather_ckpt.index import Lanes
from forgather_ckpt.structure import TensorItem
from tests.components import Box
from tests.ranks import run_ranks, values
from tests.states import tensor_of
from tests.test_replication_devices import on_device

NAME = "w"


def added(parts: list[Lanes], num_blocks: int) -> list[bytes]:
    sums: list[list[bytes]] = [[] for _ in range(num_blocks)]
    for first, digests in parts:
        for number in range(len(digests) // 16):
            sums[first + number].append(digests[16 * number : 16 * number + 16])
    return [multilinear.total(one) for one in sums]


def of_parts(whole: torch.Tensor, layout: Layout) -> list[bytes]:
    """The block digests of the whole from those of all parts, each taken by itself."""
    shape, found = tuple(whole.shape), []
    parts = {layout.part(place): local_boxes(layout, shape, place) for place in layout.coordinates()}
    for boxes in parts.values():
        for box, _ in boxes:
            part = whole[tuple(slice(*bounds) for bounds in box)].clone()
            with on_device(NAME):
                found += logical.lanes([TensorItem(NAME, 1, part, box, shape)], {}).values()
    return added(found, max(1, -(-whole.nbytes // BLOCK_BYTES)))


@given(st.data())
def test_the_parts_of_small_tensors_add_up(data):
    shape = tuple(data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=3)))
    mesh = tuple(data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=2)))
    cut = st.none() | st.tuples(st.integers(0, len(shape) - 1), st.integers(1, 3)).map(lambda one: Cut(*one))
    layout = Layout(mesh, tuple(data.draw(st.lists(cut, min_size=len(mesh), max_size=len(mesh)))))
    dtype = data.draw(
        st.sampled_from(["float32", "bfloat16", "uint8", "float64", "complex128", "float8_e4m3fn", "bool"])
    )
    whole = tensor_of(dtype, shape)
    assert of_parts(whole, layout) == list(device_digest.block_digests([whole])[0])


@pytest.mark.parametrize(
    ("shape", "dtype", "layout"),
    [
        ((3 * BLOCK_BYTES // 4 + 17,), torch.float32, Layout((3,), (Cut(0),))),
        ((1025, 2051), torch.float32, Layout((2,), (Cut(1),))),
        ((1025, 2051), torch.float32, Layout((4,), (Cut(0, 2),))),
        ((64, 1100, 33), torch.bfloat16, Layout((2, 2), (Cut(1), Cut(2)))),
        ((9, (65 << 20) // 9), torch.uint8, Layout((2,), (Cut(1),))),  # more than is copied at once
    ],
)
def test_the_parts_of_large_tensors_add_up(shape, dtype, layout):
    generator = torch.Generator().manual_seed(0)
    whole = torch.randint(0, 256, (math.prod(shape) * dtype.itemsize,), generator=generator, dtype=torch.uint8)
    whole = whole.view(dtype).view(shape)
    assert of_parts(whole, layout) == list(device_digest.block_digests([whole])[0])


def test_what_the_check_has_taken_of_a_whole_tensor_is_not_taken_again():
    item = TensorItem(NAME, 1, torch.ones(3))
    with on_device(NAME):
        assert logical.lanes([item], {NAME: (b"a" * 16, b"b" * 16)}) == {NAME: Lanes(0, b"a" * 16 + b"b" * 16)}
    assert logical.lanes([item], {}) == {}, "on the host there are none"


# ---- in checkpoints


def stored(path: Path) -> comparison.StoredTensor:
    manifest = catalog.read_checkpoint(path).manifest
    parts = [entry for name in manifest.indexes for entry in catalog.read_index(path, manifest, name).entries]
    content = comparison.items(parts)[NAME].content
    assert isinstance(content, comparison.StoredTensor)
    return content


def save(
    run: Path, step: int, mesh: tuple[int, ...], placements: list[Placement], *, change: int | None = None
) -> None:
    shape = (1030, 1027)

    def case(rank: int, world_size: int) -> None:
        whole = torch.arange(math.prod(shape), dtype=torch.float32).view(shape)
        if change is not None:
            whole.view(-1)[change] += 1
        own = distribute_tensor(whole, init_device_mesh("cpu", mesh), placements, src_data_rank=None)
        declared = [StateComponent("model", Box({NAME: own}), SharingPattern.REPLICATED)]
        with on_device(NAME), CheckpointCoordinator(declared, run, timeout_seconds=60) as coordinator:
            coordinator.save_checkpoint(step)

    values(run_ranks(math.prod(mesh), case, timeout=60))


LAYOUTS: list[tuple[tuple[int, ...], list[Placement]]] = [
    ((1,), [Replicate()]),
    ((3,), [Shard(0)]),
    ((2,), [Shard(1)]),
    ((2, 2), [Replicate(), Shard(1)]),
    ((2, 2), [Shard(0), Shard(1)]),
    ((4,), [Replicate()]),
]


@pytest.mark.multiprocess
def test_a_cut_tensor_that_lay_on_devices_has_the_digest_of_the_whole(tmp_path):
    for step, (mesh, placements) in enumerate(LAYOUTS, start=1):
        save(tmp_path, step, mesh, placements)
    save(tmp_path, 10, (2,), [Shard(1)], change=1027 * 1029 + 3)
    found = {
        step: comparison.device_digests(stored(tmp_path / f"checkpoint-{step}")) for step in [1, 2, 3, 4, 5, 6, 10]
    }
    assert found[1] is not None
    assert all(found[step] == found[1] for step in range(2, 7))
    assert found[10] is not None
    assert [one == other for one, other in zip(found[1], found[10], strict=True)] == [True, False]


@pytest.mark.multiprocess
def test_diff_compares_layouts_by_those_digests_without_reading(tmp_path):
    for step, (mesh, placements) in enumerate(LAYOUTS[1:3], start=1):
        save(tmp_path, step, mesh, placements)
    save(tmp_path, 3, (2,), [Shard(1)], change=5)

    def changes(one: int, other: int) -> list[Change]:
        sides = []
        for step in (one, other):
            checkpoint = catalog.read_checkpoint(tmp_path / f"checkpoint-{step}")
            path, manifest = checkpoint.path, checkpoint.manifest
            sides.append(
                Side(manifest, lambda name, path=path, manifest=manifest: catalog.read_index(path, manifest, name))
            )
        return [difference.change for difference in comparison.compare(*sides).differences]

    assert changes(1, 2) == []
    assert changes(1, 3) == [Change.BYTES]


@pytest.mark.multiprocess
def test_without_devices_nothing_of_the_kind_is_stored(tmp_path):
    def case(rank: int, world_size: int) -> None:
        own = distribute_tensor(torch.ones(4), init_device_mesh("cpu", (2,)), [Shard(0)], src_data_rank=None)
        assert isinstance(own, DTensor)
        with CheckpointCoordinator([StateComponent("m", Box({NAME: own}), SharingPattern.REPLICATED)], tmp_path) as one:
            one.save_checkpoint(1)

    values(run_ranks(2, case, timeout=60))
    tensor = stored(tmp_path / "checkpoint-1")
    assert comparison.device_digests(tensor) is None
    assert whole_box(tensor.shape) == ((0, 4),)
