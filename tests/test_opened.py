"""A checkpoint is read by one process without a job: whole tensors, mapped where they lie in one piece."""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from forgather_ckpt import (
    CheckpointCoordinator,
    NamedOptimizer,
    SharingPattern,
    StateComponent,
    catalog,
    hashtree,
    load_component,
    open_checkpoint,
)
from forgather_ckpt.component import Available
from forgather_ckpt.dtypes import ITEM_BYTES
from forgather_ckpt.errors import (
    CheckpointDamaged,
    CheckpointNotFound,
    DeclarationError,
    LoadMismatch,
    StorageError,
)
from forgather_ckpt.plan import MIN_PIECE_BYTES
from tests.components import Box
from tests.layouts import whole
from tests.meshes import LAYOUTS, parallel, plain, stepped
from tests.ranks import run_ranks, values
from tests.states import assert_same, tensor_bytes, tensor_of
from tests.system_calls import num_open_files

pytestmark = pytest.mark.multiprocess

WORLD_SIZES = [1, 2, 4]
LARGE_BYTES = 2 * MIN_PIECE_BYTES + (1 << 20)


def model_state() -> dict:
    """Tensors of every dtype, one that several ranks write in pieces, tied ones, and values of several types."""
    tied = tensor_of("float32", (6, 4), seed=7)
    return {
        "large": torch.arange(LARGE_BYTES // 4, dtype=torch.int32).view(-1, 64),
        "every": {dtype: tensor_of(dtype, seed=number) for number, dtype in enumerate(ITEM_BYTES)},
        "embedding": tied,
        "head": tied,
        "count": torch.tensor(3),
        "empty": torch.zeros(0, 3),
        "turned": tensor_of("float32", (4, 6)).t(),
        "rate": 1 / 7,
        "limits": (float("inf"), None, True),
        "history": [{"x": torch.arange(2)}, {"x": torch.arange(3)}],
        7: "an int key",
    }


def rank_state(rank: int) -> dict:
    return {"generator": tensor_of("uint8", (40,), seed=rank), "rank": rank}


def stage_state(rank: int) -> dict:
    return {f"layers.{rank}.weight": tensor_of("bfloat16", (5, 3), seed=rank), "shared": torch.arange(4)}


def save(run: Path, world_size: int) -> None:
    def case(rank: int, world_size: int) -> None:
        components = [
            StateComponent("model", Box(model_state()), SharingPattern.REPLICATED),
            StateComponent("stages", Box(stage_state(rank)), SharingPattern.PER_RANK, names="global"),
            StateComponent("rng", Box(rank_state(rank)), SharingPattern.PER_RANK),
        ]
        with CheckpointCoordinator(components, run, timeout_seconds=30) as coordinator:
            coordinator.save_checkpoint(5)

    values(run_ranks(world_size, case))


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[int, Path]:
    """By world size, a run with one checkpoint."""
    found = {world_size: tmp_path_factory.mktemp(f"by-{world_size}") for world_size in WORLD_SIZES}
    for world_size, run in found.items():
        save(run, world_size)
    return found


@pytest.fixture
def path(runs, tmp_path) -> Path:
    """A copy of a checkpoint that one rank wrote, in which everything lies whole."""
    return shutil.copytree(runs[1] / "checkpoint-5", tmp_path / "checkpoint-5")


def file_digests(checkpoint: Path) -> dict[str, str]:
    return {file.name: hashtree.digest(file.read_bytes()).hex() for file in checkpoint.iterdir()}


def flip_a_bit_of(checkpoint: Path, item: str) -> str:
    """Damage the last byte of a tensor of the model; the name of its file."""
    manifest = catalog.read_checkpoint(checkpoint).manifest
    for name in manifest.indexes:
        for entry in catalog.read_index(checkpoint, manifest, name).entries:
            for row in entry.tensors:
                if (entry.component, row.name) == ("model", item):
                    with (checkpoint / row.file).open("r+b") as file:
                        file.seek(row.offset + row.num_bytes - 1)
                        byte = file.read(1)[0]
                        file.seek(-1, os.SEEK_CUR)
                        file.write(bytes([byte ^ 1]))
                    return row.file
    raise AssertionError(f"{item} is not stored")


# ---- whole states


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_a_component_comes_back_as_it_was_however_many_ranks_wrote_it(runs, world_size, verify):
    assert not dist.is_initialized()
    state = load_component(runs[world_size], "model", verify=verify)
    assert_same(state, model_state())
    assert state["head"] is state["embedding"]


def test_the_large_tensor_was_written_in_pieces(runs):
    """Or the tests of merging would not test it."""
    for world_size, num_pieces in ((1, 1), (2, 2)):
        checkpoint = catalog.read_checkpoint(runs[world_size] / "checkpoint-5")
        indexes = [
            catalog.read_index(checkpoint.path, checkpoint.manifest, name) for name in checkpoint.manifest.indexes
        ]
        rows = [row for index in indexes for entry in index.entries for row in entry.tensors if row.name == "large"]
        assert len(rows) == num_pieces


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_job_wide_names_of_all_stages_are_one_state(runs, world_size):
    expected = {name: tensor for rank in range(world_size) for name, tensor in stage_state(rank).items()}
    state = load_component(runs[world_size], "stages")
    assert_same(dict(sorted(state.items())), dict(sorted(expected.items())))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sharded_tensors_come_back_whole(tmp_path, layout):
    world_size = LAYOUTS[layout]

    def case(rank: int, world_size: int) -> tuple[dict, dict]:
        model = parallel(layout, world_size)
        named = NamedOptimizer(stepped(model), [model])
        components = [
            StateComponent("model", model, SharingPattern.REPLICATED),
            StateComponent("optimizer", named, SharingPattern.REPLICATED),
        ]
        with CheckpointCoordinator(components, tmp_path, timeout_seconds=30) as coordinator:
            coordinator.save_checkpoint(1)
        return whole(model.state_dict()), whole(named.state_dict())

    model, optimizer = values(run_ranks(world_size, case))[0]
    checkpoint = open_checkpoint(tmp_path)
    assert_same(checkpoint.load("model"), model)
    assert_same(checkpoint.load("optimizer"), optimizer)
    for name, expected in model.items():
        if expected.dim() == 2:
            part = checkpoint.tensor("model", name, box=((1, 5), (2, 4)))
            assert_same(part, expected[1:5, 2:4].contiguous())
    fresh = plain(seed=1)
    fresh.load_state_dict(checkpoint.load("model"))
    assert_same(dict(fresh.state_dict()), model)


def test_items_are_chosen_by_pattern(runs):
    checkpoint = open_checkpoint(runs[2])
    expected = model_state()
    assert_same(checkpoint.load("model", "every/float*"), {
        "every": {dtype: tensor for dtype, tensor in expected["every"].items() if dtype.startswith("float")}
    })  # fmt: skip
    assert_same(checkpoint.load("model", ["head", "rate"]), {key: expected[key] for key in ("head", "rate")})
    assert_same(load_component(runs[2], "model", "~i7"), {7: "an int key"})


def test_names_say_dtype_and_shape_in_the_order_of_the_state(runs):
    names = open_checkpoint(runs[4]).names("model")
    assert list(names)[:2] == ["large", "every/bool"]
    assert names["large"] == Available("int32", (LARGE_BYTES // 256, 64))
    assert names["head"] == names["embedding"] == Available("float32", (6, 4))
    assert names["rate"] == Available(None, None)
    assert list(names)[-1] == "~i7"


# ---- one tensor


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_one_tensor_and_parts_of_it(runs, world_size, verify):
    checkpoint = open_checkpoint(runs[world_size], verify=verify)
    large = model_state()["large"]
    assert_same(checkpoint.tensor("model", "large"), large)
    rows = len(large)
    middle = rows // 2
    boxes = [
        [(0, rows), (0, 64)],
        [(3, 9), (10, 20)],
        [(rows - 1, rows), (0, 64)],
        [(middle - 5, middle + 5), (63, 64)],
        [(4, 4), (0, 64)],
    ]
    for box in boxes:
        part = checkpoint.tensor("model", "large", box)
        assert_same(part.contiguous(), large[tuple(slice(*bounds) for bounds in box)].contiguous())
    assert checkpoint.tensor("model", "count", ()).item() == 3
    assert checkpoint.tensor("model", "empty").shape == (0, 3)


def test_a_box_reads_only_the_blocks_in_which_it_lies(path):
    """The last block of the tensor is damaged; its first rows are whole."""
    flip_a_bit_of(path, "large")
    checkpoint = open_checkpoint(path)
    assert_same(checkpoint.tensor("model", "large", ((0, 100), (0, 64))), model_state()["large"][:100])
    with pytest.raises(CheckpointDamaged):
        checkpoint.tensor("model", "large", ((LARGE_BYTES // 256 - 1, LARGE_BYTES // 256), (0, 64)))


@pytest.mark.parametrize(
    "box",
    [
        ((0, 1),), ((0, 1), (0, 65)), ((-1, 1), (0, 1)), ((2, 1), (0, 1)), "ab", ((0,), (1,)), 3, ((None, 1), (0, 1)),
        ((0.5, 1), (0, 1)),
    ],
)  # fmt: skip
def test_a_box_outside_the_tensor_is_refused(runs, box):
    with pytest.raises(DeclarationError, match=r"box is .*; use \(start, stop\) for each dimension of \[135168, 64\]"):
        open_checkpoint(runs[1]).tensor("model", "large", box)


# ---- mapping


def test_a_tensor_that_lies_whole_in_a_file_is_mapped_and_has_a_storage_of_its_own(path):
    tensor = open_checkpoint(path).tensor("model", "large")
    assert is_mapped(tensor, path)
    assert tensor.untyped_storage().nbytes() == LARGE_BYTES
    assert tensor.storage_offset() == 0


def test_a_tensor_in_pieces_is_put_together_in_memory(runs):
    assert not is_mapped(open_checkpoint(runs[2]).tensor("model", "large"), runs[2])


@pytest.mark.parametrize("dtype", ITEM_BYTES)
def test_a_tensor_of_any_dtype_is_mapped(path, dtype):
    tensor = open_checkpoint(path).tensor("model", f"every/{dtype}")
    assert is_mapped(tensor, path)
    assert_same(tensor, model_state()["every"][dtype])


def test_what_is_written_to_a_tensor_never_reaches_the_file(path):
    before = file_digests(path)
    checkpoint = open_checkpoint(path)
    state = checkpoint.load("model")
    assert is_mapped(state["large"], path)
    state["large"].fill_(-1)
    state["embedding"].zero_()
    assert file_digests(path) == before
    assert_same(load_component(path, "model"), model_state())


def test_a_mapped_tensor_outlives_its_checkpoint(path):
    tensor = open_checkpoint(path, verify=False).tensor("model", "large")
    shutil.rmtree(path)
    assert_same(tensor, model_state()["large"])
    tensor[0] = 5
    assert tensor[0].eq(5).all()


def test_without_verify_a_mapped_tensor_takes_no_memory_until_it_is_used(path):
    """A process of its own, so that nothing else changes its resident memory."""
    code = (
        "import os, sys, torch; from forgather_ckpt import open_checkpoint\n"
        "page = os.sysconf('SC_PAGE_SIZE')\n"
        "def resident(): return int(open('/proc/self/statm').read().split()[1]) * page\n"
        "checkpoint = open_checkpoint(sys.argv[1], verify=False)\n"
        "checkpoint.tensor('model', 'count')\n"
        "before = resident(); tensor = checkpoint.tensor('model', 'large'); mapped = resident(); tensor.sum()\n"
        "print(mapped - before, resident() - before)"
    )
    root = Path(__file__).parents[1]
    command = [sys.executable, "-c", code, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, check=True, timeout=100)
    mapped, used = map(int, done.stdout.split())
    assert mapped < LARGE_BYTES // 8
    assert used > LARGE_BYTES // 2


@pytest.mark.parametrize("verify", [True, False])
def test_another_process_is_given_an_open_checkpoint(path, verify):
    """A data loader's workers are, where they are spawned."""
    opened = open_checkpoint(path, verify=verify)
    before = opened.tensor("model", "large").clone()
    copy = pickle.loads(pickle.dumps(opened))
    assert (copy.step, copy.names("model")) == (opened.step, opened.names("model"))
    assert_same(copy.load("model"), opened.load("model"))
    assert torch.equal(copy.tensor("model", "large"), before)


def test_mappings_and_descriptors_are_given_back(path):
    before = num_open_files()
    for _ in range(3):
        load_component(path, "model")
    assert num_open_files() == before
    assert str(path) not in Path("/proc/self/maps").read_text()


def is_mapped(tensor: torch.Tensor, directory: Path) -> bool:
    """Whether the memory of a tensor is that of a file in this directory, privately."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        bounds, permissions, *rest = line.split(maxsplit=5)
        start, stop = (int(bound, 16) for bound in bounds.split("-"))
        if start <= tensor.data_ptr() < stop:
            return rest[-1].startswith(str(directory)) and permissions.endswith("p")
    return False


# ---- damage


def test_a_damaged_byte_names_tensor_and_file(path):
    file = flip_a_bit_of(path, "every/bfloat16")
    checkpoint = open_checkpoint(path)
    with pytest.raises(CheckpointDamaged) as caught:
        checkpoint.tensor("model", "every/bfloat16")
    assert "tensor 'every/bfloat16', block 1 of 1" in caught.value.message
    assert f"checkpoint-5/{file}) does not have the digest that was recorded" in caught.value.message
    with pytest.raises(CheckpointDamaged):
        checkpoint.load("model")
    assert_same(checkpoint.tensor("model", "every/float16"), model_state()["every"]["float16"])
    found = open_checkpoint(path, verify=False).tensor("model", "every/bfloat16")
    assert tensor_bytes(found) != tensor_bytes(model_state()["every"]["bfloat16"])


def test_a_damaged_piece_is_found(runs, tmp_path):
    path = shutil.copytree(runs[2] / "checkpoint-5", tmp_path / "copy")
    flip_a_bit_of(path, "large")
    with pytest.raises(CheckpointDamaged, match="tensor 'large', block"):
        load_component(path, "model")


@pytest.mark.parametrize("verify", [True, False])
def test_a_file_that_becomes_short_or_vanishes_is_an_error_not_a_crash(path, verify):
    checkpoint = open_checkpoint(path, verify=verify)
    file = path / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointDamaged, match="ends before it"):
        checkpoint.tensor("model", "large")
    file.unlink()
    with pytest.raises(StorageError):
        checkpoint.tensor("model", "large")


# ---- what is meant


def test_the_state_of_one_rank_is_named(runs):
    checkpoint = open_checkpoint(runs[4])
    for rank in range(4):
        assert_same(checkpoint.load("rng", entry=f"rank={rank}"), rank_state(rank))
    assert_same(checkpoint.tensor("rng", "generator", entry="rank=2"), rank_state(2)["generator"])
    for entry, problem in (
        (None, "each set of ranks has a state of its own"),
        ("rank=4", "there is no entry 'rank=4'"),
    ):
        with pytest.raises(LoadMismatch) as caught:
            checkpoint.load("rng", entry=entry)
        assert f"{problem}; choose with entry= one of 'rank=0', 'rank=1', 'rank=2', 'rank=3'" in caught.value.message
    assert_same(load_component(runs[1], "rng"), rank_state(0))


def test_a_component_of_which_no_rank_held_anything_is_empty(tmp_path):
    with CheckpointCoordinator([StateComponent("cache", None, SharingPattern.PER_NODE)], tmp_path) as coordinator:
        path = coordinator.save_checkpoint(1)
    for call in (open_checkpoint(path).load, open_checkpoint(path).names):
        with pytest.raises(
            LoadMismatch, match="'cache' of the checkpoint of step 1 is empty: no rank held anything of it"
        ):
            call("cache")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda found: found.load("modle"), "step 5 has no component 'modle'; it has ['model', 'rng', 'stages']"),
        (lambda found: found.tensor("model", "larg"), "'larg' is not there; it has '"),
        (lambda found: found.tensor("model", "rate"), "'rate' is a value, not a tensor; use load()"),
        (lambda found: found.load("model", "evry/*"), "no item matches 'evry/*'; it has '"),
        (lambda found: found.load("model", "history/~l1/*"), "matches some items of a list, but not all"),
    ],
)
def test_what_is_not_there_is_said_with_what_is(runs, call, message):
    with pytest.raises(LoadMismatch) as caught:
        call(open_checkpoint(runs[1]))
    assert message in caught.value.message


@pytest.mark.parametrize(
    "wrong",
    [{"path": None}, {"path": ""}, {"device": "gpu"}, {"device": "meta"}, {"names": []}, {"names": 3}, {"names": [""]}],
)
def test_arguments_that_mean_nothing_are_refused(runs, wrong):
    with pytest.raises(DeclarationError, match=f"{next(iter(wrong))} is .*; use "):
        load_component(**{"path": runs[1], "component": "model", **wrong})


def test_a_checkpoint_is_named_by_its_path_or_in_its_run(tmp_path):
    run = tmp_path / "run"
    box = Box({"step": 0})
    with CheckpointCoordinator([StateComponent("model", box, SharingPattern.GLOBAL)], run) as coordinator:
        for step in (10, 20, 30):
            box.items["step"] = step
            coordinator.save_checkpoint(step)
    for name, step in (
        (run, 30), (str(run), 30), (f"{run}@latest", 30), (f"{run}@latest~1", 20), (f"{run}@10", 10), (f"{run}@step:20", 20),
        (run / "checkpoint-10", 10), (str(run / "checkpoint-20"), 20),
    ):  # fmt: skip
        checkpoint = open_checkpoint(name)
        assert (checkpoint.step, checkpoint.load("model")) == (step, {"step": step})
    odd = run.rename(tmp_path / "run@home")
    assert open_checkpoint(odd).step == 30
    assert open_checkpoint(f"{odd}@10").step == 10
    for name, message in (
        (f"{odd}@40", "there is no committed checkpoint '40'; committed steps: 30, 20, 10 (in "),
        (f"{odd}@newest", "'newest' selects no checkpoint of "),
        (tmp_path / "nothing", "there is no checkpoint and no run directory "),
        (f"{tmp_path}/nothing@latest", "there is no checkpoint and no run directory "),
        (tmp_path, "committed steps: none (in "),
    ):
        with pytest.raises(CheckpointNotFound) as caught:
            open_checkpoint(name)
        assert message in caught.value.message


def test_opening_writes_nothing(path):
    before = {file: file.stat().st_mtime_ns for file in [path, *path.iterdir()]}
    load_component(path, "model")
    assert {file: file.stat().st_mtime_ns for file in [path, *path.iterdir()]} == before


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
def test_tensors_come_to_a_device(runs):
    def case(rank: int, world_size: int) -> None:
        for run in runs.values():
            checkpoint = open_checkpoint(run, device="cuda:0")
            state = checkpoint.load("model")
            assert state["large"].device == torch.device("cuda", 0)
            assert state["head"] is state["embedding"]
            on_host = {key: one.cpu() if isinstance(one, torch.Tensor) else one for key, one in state.items()}
            for key in ("large", "embedding", "count", "empty", "turned", "rate", 7):
                assert_same(on_host[key], model_state()[key])
            for dtype, tensor in model_state()["every"].items():
                assert tensor_bytes(state["every"][dtype].view(torch.uint8).cpu()) == tensor_bytes(tensor)
            part = checkpoint.tensor("model", "large", [(3, 9), (10, 20)])
            assert_same(part.cpu(), model_state()["large"][3:9, 10:20].contiguous())

    values(run_ranks(1, case, backend=None, timeout=120))
