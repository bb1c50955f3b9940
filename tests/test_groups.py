"""Groups of ranks and names that are unique over the job: bare process groups, meshes, pipeline stages, tied weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from forgather_ckpt import CheckpointCoordinator, CheckpointManifest, NamedOptimizer, SharingPattern, StateComponent
from forgather_ckpt.errors import DeclarationError
from tests.components import Box, is_same, refusal, sample, the_same
from tests.ranks import run_ranks, values

REPLICATED, PER_GROUP, PER_RANK, GLOBAL = (
    SharingPattern.REPLICATED,
    SharingPattern.PER_GROUP,
    SharingPattern.PER_RANK,
    SharingPattern.GLOBAL,
)


# ---- groups


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((PER_GROUP,), "process_group_name"),
        ((REPLICATED, "dp"), "process_group_name"),
        ((PER_RANK, "dp"), "process_group_name"),
    ],
)
def test_a_group_name_belongs_to_per_group_and_only_there(arguments: tuple[Any, ...], message: str):
    with pytest.raises(DeclarationError, match=message):
        StateComponent("model", Box({}), *arguments)


@pytest.mark.multiprocess
def test_uneven_bare_groups_of_which_rank_0_is_no_member(tmp_path: Path):
    def case(rank: int, world_size: int) -> list[Any]:
        members = [[1, 2], [3]]
        made = [dist.new_group(ranks) for ranks in members]
        number = {1: 0, 2: 0, 3: 1}.get(rank)
        box = Box({} if number is None else sample(f"group {number}"))
        holder = None if number is None else box
        groups = {"dp": None if number is None else made[number]}

        def coordinator(stateful: Box | None, *, required: bool = True) -> CheckpointCoordinator:
            components = [
                StateComponent("part", stateful, PER_GROUP, "dp", required=required),
                StateComponent("progress", Box({"step": 1}), GLOBAL),
            ]
            return CheckpointCoordinator(components, tmp_path, process_groups=groups, timeout_seconds=30)

        with coordinator(holder) as saving:
            saving.save_checkpoint(1)
        box.items = {}
        coordinator(holder).load_checkpoint()
        results: list[Any] = [box.items == {} if number is None else is_same(box.items, sample(f"group {number}"))]
        with coordinator(box) as wrong:  # rank 0 holds something
            results += [refusal(lambda: wrong.save_checkpoint(2)), refusal(wrong.load_checkpoint)]
        with coordinator(None if rank in (0, 2) else box) as wrong:  # a member holds nothing
            results.append(refusal(lambda: wrong.save_checkpoint(2)))
        with coordinator(None if rank in (0, 2) else box, required=False) as lenient:
            lenient.save_checkpoint(2)
        with coordinator(None if rank in (0, 3) else box) as partly:  # a whole group holds nothing
            partly.save_checkpoint(3)
            partly.load_checkpoint()
        with coordinator(holder) as other:
            results.append(refusal(other.load_checkpoint))
        return results

    exact, stray, stray_load, empty_member, not_stored = the_same(values(run_ranks(4, case)))
    assert exact is True
    assert stray[0] == "StructureError"
    assert "component 'part': ranks 0 hold state but are in no group 'dp'; declare stateful=None there" in stray[1]
    assert stray_load[0] == "LoadMismatch"
    assert "component 'part': rank 0 is in no group 'dp', but holds state" in stray_load[1]
    assert empty_member[0] == "StructureError"
    assert (
        "component 'part' (PER_GROUP): stateful is None on rank 2, but not on rank 1 of the same set"
        in empty_member[1]
    )
    assert not_stored[0] == "LoadMismatch"
    assert "failed on rank 3: component 'part'" in not_stored[1]
    first, second, third = (CheckpointManifest.load(tmp_path / f"checkpoint-{step}") for step in (1, 2, 3))
    entries = first.components["part"].entries
    assert {name: (entry.ranks, entry.writers) for name, entry in entries.items()} == {
        "dp=0": ((1, 2), (1, 2)),
        "dp=1": ((3,), (3,)),
    }
    assert first.topology.groups["dp"].sets == ((1, 2), (3,))
    assert "stateful is None" in second.omitted["part"]
    assert list(third.components["part"].entries) == ["dp=0"]


def save_on_mesh(shape: dict[str, int], run: Path) -> None:
    """A component that is alike along `dp`, saved on a mesh over all ranks."""

    def case(rank: int, world_size: int) -> None:
        mesh = init_device_mesh("cpu", tuple(shape.values()), mesh_dim_names=tuple(shape))
        box = Box(sample(place_of(mesh)))
        components = [StateComponent("part", box, PER_GROUP, "dp")]
        with CheckpointCoordinator(components, run, process_groups=mesh, timeout_seconds=30) as coordinator:
            coordinator.save_checkpoint(1)

    size = 1
    for length in shape.values():
        size *= length
    values(run_ranks(size, case))


def place_of(mesh: Any) -> str:
    """Where this rank lies on the axes other than dp that tell anything apart."""
    names = [name for name in mesh.mesh_dim_names if name != "dp" and mesh[name].size() > 1]
    return ", ".join(f"{name} {mesh.get_local_rank(name)}" for name in sorted(names))


MESHES = [
    ({"dp": 2, "pp": 2}, {"dp": 2, "pp": 2}, True),
    ({"dp": 2, "pp": 2}, {"pp": 2, "dp": 2}, True),  # other ranks, the same places
    ({"dp": 2, "pp": 2}, {"dp": 1, "pp": 2}, True),
    ({"dp": 1, "pp": 2}, {"dp": 2, "pp": 2}, True),
    ({"dp": 2, "pp": 2, "tp": 1}, {"dp": 2, "pp": 2}, True),  # an axis of size 1 tells nothing apart
    ({"dp": 2, "pp": 2, "tp": 2}, {"tp": 2, "pp": 2, "dp": 1}, True),
    ({"dp": 2, "pp": 2}, {"dp": 1, "pp": 4}, False),
    ({"dp": 2, "pp": 2}, {"dp": 2, "tp": 2}, False),
    ({"dp": 4}, {"dp": 2, "pp": 2}, False),
]


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("saved", "now", "is_found"),
    MESHES,
    ids=["-to-".join("x".join(f"{n}{s}" for n, s in shape.items()) for shape in row[:2]) for row in MESHES],
)
def test_a_group_on_a_mesh_is_found_again_by_its_place_on_the_other_axes(
    saved: dict[str, int], now: dict[str, int], is_found: bool, tmp_path: Path
):
    save_on_mesh(saved, tmp_path)

    def case(rank: int, world_size: int) -> Any:
        mesh = init_device_mesh("cpu", tuple(now.values()), mesh_dim_names=tuple(now))
        box = Box({})
        components = [StateComponent("part", box, PER_GROUP, "dp")]
        coordinator = CheckpointCoordinator(components, tmp_path, process_groups={"mesh": mesh}, timeout_seconds=30)
        if not is_found:
            return refusal(coordinator.load_checkpoint)
        coordinator.load_checkpoint()
        return is_same(box.items, sample(place_of(mesh)))

    size = 1
    for length in now.values():
        size *= length
    result = the_same(values(run_ranks(size, case)))
    if is_found:
        assert result is True
    else:
        assert result[0] == "LoadMismatch"
        assert "no saved group is" in result[1]


@pytest.mark.multiprocess
def test_a_mesh_and_bare_groups_together(tmp_path: Path):
    def case(rank: int, world_size: int) -> list[bool]:
        mesh = init_device_mesh("cpu", (2, 2, 2), mesh_dim_names=("dp", "pp", "tp"))
        outer, inner = dist.new_group([0, 7]), dist.new_group([1, 2, 3, 4, 5, 6])
        boxes = {
            "dp": Box(sample(place_of(mesh))),
            "tp": Box(sample(f"tp {rank // 2}")),
            "ring": Box(sample(f"ring {rank in (0, 7)}")),
        }
        components = [StateComponent(name, box, PER_GROUP, name) for name, box in boxes.items()]
        expected = {name: dict(box.items) for name, box in boxes.items()}
        groups = {"cube": mesh, "ring": outer if rank in (0, 7) else inner}
        with CheckpointCoordinator(components, tmp_path, process_groups=groups, timeout_seconds=30) as coordinator:
            coordinator.save_checkpoint(1)
            for box in boxes.values():
                box.items = {}
            coordinator.load_checkpoint()
        return [is_same(box.items, expected[name]) for name, box in boxes.items()]

    assert values(run_ranks(8, case)) == [[True] * 3] * 8
    manifest = CheckpointManifest.load(tmp_path / "checkpoint-1")
    entries = {
        key: {name: entry.ranks for name, entry in record.entries.items()}
        for key, record in manifest.components.items()
    }
    assert entries["ring"] == {"ring=0": (0, 7), "ring=1": (1, 2, 3, 4, 5, 6)}
    assert entries["dp"] == {
        "pp=0/2,tp=0/2": (0, 4),
        "pp=0/2,tp=1/2": (1, 5),
        "pp=1/2,tp=0/2": (2, 6),
        "pp=1/2,tp=1/2": (3, 7),
    }
    assert entries["tp"]["dp=1/2,pp=0/2"] == (4, 5)


# ---- global names in several sets


NUM_LAYERS = 4


def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    layers = {f"layers.{number}.weight": torch.randn(3, 2, generator=generator) for number in range(NUM_LAYERS)}
    return layers | {"embedding": torch.randn(8, generator=generator)}


def stage_names(rank: int, world_size: int) -> list[str]:
    """A pipeline's layers on this rank; the embedding is tied: the first and the last stage have it."""
    per_rank = NUM_LAYERS // world_size
    layers = [f"layers.{number}.weight" for number in range(rank * per_rank, (rank + 1) * per_rank)]
    return layers + (["embedding"] if rank in (0, world_size - 1) else [])


@pytest.mark.multiprocess
def test_pipeline_stages_are_read_by_any_number_of_stages_and_by_replicas(tmp_path: Path):
    def save(step: int) -> Any:
        def case(rank: int, world_size: int) -> None:
            state = weights()
            box = Box({name: state[name] + step for name in stage_names(rank, world_size)} | {"rate": 0.1})
            components = [StateComponent("model", box, PER_RANK, names="global")]
            with CheckpointCoordinator(components, tmp_path, timeout_seconds=30) as coordinator:
                coordinator.save_checkpoint(step)

        return case

    def load(rank: int, world_size: int) -> list[bool]:
        results = []
        for step in steps:
            state = {name: tensor + step for name, tensor in weights().items()}
            own = stage_names(rank, world_size)
            box = Box({name: torch.zeros_like(state[name]) for name in own} | {"rate": 0.0})
            components = [StateComponent("model", box, PER_RANK, names="global")]
            CheckpointCoordinator(components, tmp_path, timeout_seconds=30).load_checkpoint(step)
            results.append(sorted(box.items) == sorted([*own, "rate"]))
            results.append(all(torch.equal(box.items[name], state[name]) for name in own) and box.items["rate"] == 0.1)
            box.items = {}
            components = [StateComponent("model", box, REPLICATED)]
            CheckpointCoordinator(components, tmp_path, timeout_seconds=30).load_checkpoint(step)
            results.append(is_same({name: box.items[name] for name in sorted(state)}, dict(sorted(state.items()))))
        return results

    steps = [4, 2, 1]
    for world_size in steps:
        values(run_ranks(world_size, save(world_size)))
    for world_size in steps:
        assert values(run_ranks(world_size, load)) == [[True] * 9] * world_size

    for step in steps:
        record = CheckpointManifest.load(tmp_path / f"checkpoint-{step}").components["model"]
        [entry] = record.entries.values()
        assert entry.num_items == NUM_LAYERS + 2  # the tied weight and the rate are stored once
        assert entry.num_bytes == sum(tensor.numel() * 4 for tensor in weights().values())
        assert (record.names, entry.ranks) == ("global", tuple(range(step)))


@pytest.mark.multiprocess
def test_what_replicas_have_written_is_read_by_pipeline_stages(tmp_path: Path):
    def case(rank: int, world_size: int) -> bool:
        with CheckpointCoordinator([StateComponent("model", Box(weights()), REPLICATED)], tmp_path) as coordinator:
            coordinator.save_checkpoint(1)
        state, own = weights(), stage_names(rank, world_size)
        box = Box({name: torch.zeros_like(state[name]) for name in own})
        CheckpointCoordinator([StateComponent("model", box, PER_RANK, names="global")], tmp_path).load_checkpoint()
        return sorted(box.items) == sorted(own) and all(torch.equal(box.items[name], state[name]) for name in own)

    assert values(run_ranks(4, case)) == [True] * 4


@pytest.mark.multiprocess
def test_a_global_name_means_one_item_on_all_ranks_that_have_it(tmp_path: Path):
    own: list[tuple[str, dict[int, dict[str, Any]], str, str]] = [
        (
            "bytes",
            {0: {"embedding": torch.zeros(2)}, 3: {"embedding": torch.ones(2)}},
            "ReplicaMismatch",
            "'model' differs between rank 0 and rank 3 at 'embedding' (first at [0], max |Δ| 1); expected identical state in "
            "all holders (0, 3)",
        ),
        (
            "values",
            {1: {"rate": 0.1}, 2: {"rate": 0.2}, 3: {"rate": 0.2}},
            "ReplicaMismatch",
            "'model' differs between ranks [2-3] and rank 1 at 'rate'",
        ),
        (
            "shapes",
            {1: {"embedding": torch.zeros(2)}, 3: {"embedding": torch.zeros(3)}},
            "StructureError",
            "'embedding' is a tensor float32 [2] on rank 1 and a tensor float32 [3] on rank 3; with names='global' one "
            "name means one item",
        ),
        (
            "dtypes",
            {0: {"embedding": torch.zeros(2)}, 1: {"embedding": torch.zeros(2, dtype=torch.float64)}},
            "StructureError",
            "'embedding' is a tensor float32 [2] on rank 0 and a tensor float64 [2] on rank 1",
        ),
        (
            "kinds",
            {0: {"embedding": 1}, 2: {"embedding": torch.zeros(2)}},
            "StructureError",
            "'embedding' is a value on rank 0 and a tensor float32 [2] on rank 2",
        ),
    ]

    def case(rank: int, world_size: int) -> list[Any]:
        box = Box({})
        results: list[Any] = []
        component = StateComponent("model", box, PER_RANK, names="global")
        with CheckpointCoordinator([component], tmp_path, timeout_seconds=30) as coordinator:
            for _, items, _, _ in own:
                box.items = {f"layers.{rank}": torch.zeros(2), **items.get(rank, {})}
                results.append(refusal(lambda: coordinator.save_checkpoint(1)))
            unchecked = StateComponent("model", box, PER_RANK, names="global", validation_level="none")
            box.items = {f"layers.{rank}": torch.zeros(2), "embedding": torch.full((2,), rank)}
        with CheckpointCoordinator([unchecked], tmp_path, timeout_seconds=30) as coordinator:
            coordinator.save_checkpoint(2)  # said otherwise: the lowest rank's is stored
            coordinator.load_checkpoint()
        return [*results, box.items["embedding"].tolist()]

    *results, embedding = the_same(values(run_ranks(4, case)))
    for (kind, message), (what, _, expected_kind, text) in zip(results, own, strict=True):
        assert kind == expected_kind, what
        assert text in message
    assert embedding == [0, 0]


@pytest.mark.multiprocess
def test_names_of_groups_may_be_global_too(tmp_path: Path):
    """DP × PP: each stage's replicas share out its bytes; one process reads all stages."""

    def save(rank: int, world_size: int) -> None:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "pp"))
        stage = mesh.get_local_rank("pp")
        box = Box({name: weights()[name] for name in stage_names(stage, 2)})
        components = [StateComponent("model", box, PER_GROUP, "dp", names="global")]
        with CheckpointCoordinator(components, tmp_path, process_groups=mesh, timeout_seconds=30) as coordinator:
            coordinator.save_checkpoint(1)

    def load(rank: int, world_size: int) -> bool:
        box = Box({})
        CheckpointCoordinator([StateComponent("model", box, REPLICATED)], tmp_path).load_checkpoint()
        state = weights()
        return {name: tensor.tolist() for name, tensor in box.items.items()} == {
            name: tensor.tolist() for name, tensor in state.items()
        }

    values(run_ranks(4, save))
    record = CheckpointManifest.load(tmp_path / "checkpoint-1").components["model"]
    assert record.entries["all"].writers == (0, 1, 2, 3)
    assert record.entries["all"].num_items == len(weights())
    assert values(run_ranks(1, load)) == [True]


class Stage(nn.Module):
    """Some layers of a model, under the names that they have in the whole."""

    def __init__(self, numbers: range) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({str(number): nn.Linear(3, 3) for number in numbers})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers.values():
            x = layer(x).tanh()
        return x


@pytest.mark.multiprocess
def test_modules_and_their_optimizers_move_from_four_stages_to_two_and_to_one(tmp_path: Path):
    def build(rank: int, world_size: int) -> tuple[Stage, NamedOptimizer, list[StateComponent]]:
        per_rank = NUM_LAYERS // world_size
        stage = Stage(range(rank * per_rank, (rank + 1) * per_rank))
        optimizer = NamedOptimizer(torch.optim.AdamW(stage.parameters()), [stage])
        components = [
            StateComponent("model", stage, PER_RANK, names="global"),
            StateComponent("optimizer", optimizer, PER_RANK, names="global"),
        ]
        return stage, optimizer, components

    def save(rank: int, world_size: int) -> dict[str, Any]:
        torch.manual_seed(rank)
        stage, optimizer, components = build(rank, world_size)
        stage(torch.ones(2, 3)).sum().backward()
        optimizer.optimizer.step()
        with CheckpointCoordinator(components, tmp_path, timeout_seconds=30) as coordinator:
            coordinator.save_checkpoint(1)
        return {**plain(stage.state_dict()), **plain(optimizer.state_dict())}

    def load(rank: int, world_size: int) -> dict[str, Any]:
        torch.manual_seed(100)
        stage, optimizer, components = build(rank, world_size)
        CheckpointCoordinator(components, tmp_path, timeout_seconds=30).load_checkpoint()
        return {**plain(stage.state_dict()), **plain(optimizer.state_dict())}

    def plain(state: dict[str, Any]) -> dict[str, Any]:
        return {name: item.tolist() if isinstance(item, torch.Tensor) else item for name, item in state.items()}

    def load_other(rank: int, world_size: int) -> Any:
        components = [StateComponent("model", Stage(range(3, 5)), PER_RANK, names="global")]
        return refusal(lambda: CheckpointCoordinator(components, tmp_path).load_checkpoint(components=["model"]))

    saved = {name: item for part in values(run_ranks(4, save)) for name, item in part.items()}
    for world_size in (4, 2, 1):
        parts = values(run_ranks(world_size, load))
        assert {name: item for part in parts for name, item in part.items()} == saved
    kind, message = the_same(values(run_ranks(2, load_other)))
    assert kind == "LoadMismatch"
    assert "'layers.4.bias', 'layers.4.weight' in the job's module but not in the checkpoint" in message


@pytest.mark.multiprocess
def test_a_head_that_is_tied_to_the_embedding_on_the_last_stage(tmp_path: Path):
    """There the same memory has two names; on the first stage the embedding has one."""

    def save(rank: int, world_size: int) -> None:
        embedding = torch.arange(4.0)
        items = {"layer": torch.zeros(1)} if rank == 1 else {"embedding": embedding}
        if rank == 2:
            items["head"] = embedding
        components = [StateComponent("model", Box(items), PER_RANK, names="global")]
        with CheckpointCoordinator(components, tmp_path, timeout_seconds=30) as coordinator:
            coordinator.save_checkpoint(1)

    def load(rank: int, world_size: int) -> dict[str, Any]:
        embedding = torch.zeros(4)
        items = [{"embedding": embedding, "layer": torch.ones(1)}, {"head": embedding}][rank]
        box = Box(items)
        components = [StateComponent("model", box, PER_RANK, names="global")]
        CheckpointCoordinator(components, tmp_path, timeout_seconds=30).load_checkpoint()
        return {name: tensor.tolist() for name, tensor in box.items.items()}

    values(run_ranks(3, save))
    assert CheckpointManifest.load(tmp_path / "checkpoint-1").components["model"].num_bytes == 20
    first, last = values(run_ranks(2, load))
    assert first == {"embedding": [0.0, 1.0, 2.0, 3.0], "layer": [0.0]}
    assert last["head"] == [0.0, 1.0, 2.0, 3.0]
