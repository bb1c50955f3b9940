"""A checkpoint can be read without this package: by `json` and `safetensors`, in forty lines."""

import base64
import inspect
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from safetensors import safe_open

from forgather_ckpt import CheckpointCoordinator, SharingPattern, StateComponent, container, dtypes, index
from forgather_ckpt.structure import capture
from tests.components import Box
from tests.ranks import run_ranks, values
from tests.states import assert_same, tensor_of

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")

MIB = 1 << 20


def read_checkpoint(directory: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """For each component and entry its items by name, from the files alone."""
    manifest = json.loads((directory / "checkpoint_manifest.json").read_text())
    entries: dict[tuple[str, str], dict[str, Any]] = {
        (key, entry): {} for key, component in manifest["components"].items() for entry in component["entries"]
    }
    pieces: dict[tuple[str, str, str], list[tuple[int, bytes]]] = {}
    aliases = []
    for name in manifest["indexes"]:
        for part in json.loads((directory / name).read_text())["entries"]:
            place = (part["component"], part["entry"])
            tensors = part["tensors"]
            for row, item in enumerate(tensors["name"]):
                key = tensors["key"].get(str(row), item)
                with safe_open(directory / tensors["file"][row], "pt") as file:
                    piece = file.get_tensor(key)
                data = piece.reshape(-1).view(torch.uint8).numpy().tobytes() if piece.numel() else b""
                start = tensors["range"].get(str(row), [0])[0]
                pieces.setdefault((*place, item), []).append((start, data))
                dtype, shape = getattr(torch, tensors["dtype"][row]), tensors["shape"][row]
                whole = b"".join(data for _, data in sorted(pieces[(*place, item)]))
                if len(whole) == math.prod(shape) * dtype.itemsize:
                    flat = (
                        torch.frombuffer(bytearray(whole), dtype=torch.uint8) if whole else torch.empty(0, dtype=dtype)
                    )
                    entries[place][item] = flat.view(dtype).reshape(shape)
            for item, value in zip(part["values"]["name"], part["values"]["value"], strict=True):
                entries[place][item] = value_of(value)
            aliases += [
                (place, *names) for names in zip(part["aliases"]["name"], part["aliases"]["target"], strict=True)
            ]
    for place, item, target in aliases:
        entries[place][item] = entries[place][target]
    return entries


def value_of(data: Any) -> Any:
    """The value that typed JSON stands for, of the tags that occur in these tests."""
    if isinstance(data, list):
        return [value_of(item) for item in data]
    if not isinstance(data, dict):
        return data
    tag = next(iter(data), "")
    if len(data) > 1 or not tag.startswith("$"):
        return {key: value_of(item) for key, item in data.items()}
    content = data[tag]
    return {
        "$tuple": lambda: tuple(value_of(content)),
        "$set": lambda: set(value_of(content)),
        "$dict": lambda: {value_of(key): value_of(item) for key, item in content},
        "$bytes": lambda: base64.b64decode(content),
        "$float": lambda: float(content),
        "$int": lambda: int(content, 16),
        "$dtype": lambda: getattr(torch, content),
    }[tag]()


def items_of(state: dict) -> dict[str, Any]:
    """What should be read of a state."""
    taken = capture(state)
    items = {name: item.tensor for name, item in taken.tensors.items()}
    items |= {name: item.value for name, item in taken.values.items()}
    return items | {name: taken.tensors[item.target].tensor for name, item in taken.aliases.items()}


def assert_reads(directory: Path, expected: dict[tuple[str, str], dict]) -> None:
    found = read_checkpoint(directory)
    assert found.keys() == expected.keys()
    for place, state in expected.items():
        items = items_of(state)
        assert found[place].keys() == items.keys()
        for name, item in items.items():
            assert_same(found[place][name], item, f"{place} {name!r}")


def test_the_reader_is_short():
    lines = inspect.getsource(read_checkpoint).splitlines()
    assert len(lines) <= 40


TIED = tensor_of("float32", (40, 8))
STATES: dict[str, dict] = {
    "model": {
        "large": torch.arange(3 * MIB, dtype=torch.int32).reshape(3, -1),
        "embedding": TIED,
        "turned": tensor_of("float64", (6, 5)).t(),
        "empty": torch.zeros(0, 3),
        "head": TIED,
        **{f"{dtype}/{shape}": tensor_of(dtype, shape) for dtype in dtypes.ITEM_BYTES for shape in [(3, 4), ()]},
    },
    "optimizer": {
        "state": {number: {"exp_avg": torch.full((number + 1,), float(number)), "step": number} for number in range(5)},
        "groups": [{"lr": 0.1, "betas": (0.9, 0.95), "params": [0, 1]}, {"lr": float("inf"), "foreach": None}],
    },
    "progress": {
        "embedding": torch.ones(2), "__metadata__": torch.ones(3), "large#0:5": torch.ones(1), "": torch.zeros(1),
        "nothing": {}, "huge": 2**100, "raw": b"\0\1", "ids": {3, 1}, "by id": {1: "a", None: [1.5]}, "kind": torch.bfloat16,
    },
}  # fmt: skip


@pytest.mark.parametrize("max_items", [100_000, 7])
def test_a_checkpoint_of_one_process(tmp_path, monkeypatch, max_items):
    monkeypatch.setattr(container, "MAX_ITEMS", max_items)
    monkeypatch.setattr(index, "MAX_ITEMS", max_items)
    components = [StateComponent(key, Box(state), SharingPattern.GLOBAL) for key, state in STATES.items()]
    with CheckpointCoordinator(components, tmp_path) as coordinator:
        path = coordinator.save_checkpoint(1)
    assert_reads(path, {(key, "all"): state for key, state in STATES.items()})
    num_files = len(list(path.glob("*.safetensors")))
    assert num_files == 2 if max_items > 100 else num_files > 5


def tree_digest(path: Path) -> str:
    """The digest of a file as the format describes it, from its bytes alone."""
    data = path.read_bytes()
    if path.suffix == ".json":
        return xxhash.xxh3_128_hexdigest(data)
    header = data[: 8 + int.from_bytes(data[:8], "little")]
    digests = [xxhash.xxh3_128_hexdigest(header)]
    for key, tensor in json.loads(header[8:]).items():
        if key != "__metadata__":
            piece = data[len(header) :][slice(*tensor["data_offsets"])]
            blocks = [xxhash.xxh3_128_hexdigest(piece[at : at + 4 * MIB]) for at in range(0, len(piece) or 1, 4 * MIB)]
            digests.append(blocks[0] if len(blocks) == 1 else xxhash.xxh3_128_hexdigest(bytes.fromhex("".join(blocks))))
    return xxhash.xxh3_128_hexdigest(bytes.fromhex("".join(digests)))


def test_b22_what_the_manifest_says_was_measured(tmp_path):
    failing = Box({})
    failing.fail_save = RuntimeError("not now")
    components = [StateComponent(key, Box(state), SharingPattern.GLOBAL) for key, state in STATES.items()]
    components.append(StateComponent("callbacks", failing, SharingPattern.PER_RANK, required=False))
    with CheckpointCoordinator(components, tmp_path) as coordinator:
        path = coordinator.save_checkpoint(1)
    manifest = json.loads((path / "checkpoint_manifest.json").read_text())
    assert {file.name for file in path.iterdir()} == {*manifest["files"], "checkpoint_manifest.json"}
    for name, record in manifest["files"].items():
        assert (record["size"], record["digest"]) == ((path / name).stat().st_size, tree_digest(path / name))
        assert record["writer"] == 0
    assert manifest["components"].keys() == STATES.keys(), "what failed is not among what is there"
    assert "RuntimeError: not now" in manifest["omitted"]["callbacks"]
    for key, state in STATES.items():
        taken = capture(state)
        [entry] = manifest["components"][key]["entries"].values()
        assert (entry["items"], entry["bytes"], entry["ranks"], entry["writers"]) == (
            taken.num_items,
            sum(held.num_bytes for held in taken.held().values()),
            [0],
            [0],
        )


def test_one_writer_s_model_is_a_file_that_any_tool_opens(tmp_path):
    state = {"layers.0.weight": tensor_of("float32", (600, 600)), "layers.0.bias": tensor_of("bfloat16", (600,))}
    with CheckpointCoordinator([StateComponent("model", Box(state), SharingPattern.GLOBAL)], tmp_path) as coordinator:
        path = coordinator.save_checkpoint(1)
    with safe_open(path / "model.safetensors", "pt") as file:
        assert_same({name: file.get_tensor(name) for name in state}, state)


def own(rank: int) -> dict:
    return {"seed": torch.arange(4) + rank, "rank": rank, "nested": {"list": [torch.full((rank,), rank)]}}


@pytest.mark.multiprocess
def test_a_checkpoint_of_two_ranks_with_a_tensor_in_pieces(tmp_path):
    def case(rank: int, world_size: int) -> str:
        model = {**STATES["model"], "large": torch.arange(20 * MIB, dtype=torch.int32).reshape(4, -1)}
        components = [
            StateComponent("model", Box(model), SharingPattern.REPLICATED),
            StateComponent("optimizer", Box(STATES["optimizer"]), SharingPattern.REPLICATED),
            StateComponent("rng", Box(own(rank)), SharingPattern.PER_RANK),
        ]
        with CheckpointCoordinator(components, tmp_path) as coordinator:
            return str(coordinator.save_checkpoint(1))

    [path, _] = values(run_ranks(2, case))
    large = torch.arange(20 * MIB, dtype=torch.int32).reshape(4, -1)
    assert_reads(
        Path(path),
        {
            ("model", "all"): {**STATES["model"], "large": large},
            ("optimizer", "all"): STATES["optimizer"],
            ("rng", "rank=0"): own(0),
            ("rng", "rank=1"): own(1),
        },
    )
    pieces = []
    for file in sorted(Path(path).glob("model-*.safetensors")):
        with safe_open(file, "pt") as opened:
            pieces.append([key for key in opened.keys() if key.startswith("large#")])  # noqa: SIM118  it is no dict
    assert len(pieces) == 2
    assert all(pieces), "both ranks wrote a part of it"
    assert not (Path(path) / "model.safetensors.index.json").exists(), "the usual index knows no pieces"


@pytest.mark.multiprocess
def test_whole_weights_of_two_ranks_are_found_by_the_usual_index(tmp_path):
    model = {f"layers.{number}": torch.full((MIB,), float(number)) for number in range(6)} | {"bias": torch.ones(3)}

    def case(rank: int, world_size: int) -> str:
        components = [StateComponent("model", Box(model), SharingPattern.REPLICATED)]
        with CheckpointCoordinator(components, tmp_path) as coordinator:
            return str(coordinator.save_checkpoint(1))

    path = Path(values(run_ranks(2, case))[0])
    weight_map = json.loads((path / "model.safetensors.index.json").read_text())["weight_map"]
    assert weight_map.keys() == model.keys()
    assert set(weight_map.values()) == {"model-00000-of-00002.safetensors", "model-00001-of-00002.safetensors"}
    for name, file in weight_map.items():
        with safe_open(path / file, "pt") as opened:
            assert_same(opened.get_tensor(name), model[name], name)
