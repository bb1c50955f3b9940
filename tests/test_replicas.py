"""Copies that must be equal: their bytes are dealt out over the holders, and they are compared before they are stored."""

from __future__ import annotations

import shutil
import threading
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from forgather_ckpt import CheckpointCoordinator, CheckpointManifest, SharingPattern, StateComponent, writing
from tests.components import Box, Refusal, is_same, listing, refusal, sample, the_same
from tests.ranks import run_ranks, values
from tests.torchrun import torchrun

pytestmark = pytest.mark.multiprocess

REPLICATED, PER_GROUP = SharingPattern.REPLICATED, SharingPattern.PER_GROUP
MIB = 1 << 20


def halves(rank: int) -> dict[str, Any]:
    """Groups (0, 1) and (2, 3)."""
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    return {"half": groups[rank // 2]}


# ---- who writes


def many(label: int) -> dict[str, torch.Tensor]:
    return {f"layer {number}": torch.full((1 << 18,), float(label + number)) for number in range(64)}


def big(label: int) -> dict[str, torch.Tensor]:
    return {"embedding": torch.arange(16 << 20, dtype=torch.int32) + label}


@pytest.mark.parametrize("state", [many, big])
def test_64_mib_are_dealt_out_over_the_holders_if_they_were_compared(state: Any, tmp_path: Path):
    def case(rank: int, world_size: int) -> list[bool]:
        boxes = {
            "compared": Box(state(0)),
            "not compared": Box(state(rank)),
            "in groups": Box(state(rank // 2)),
        }
        components = [
            StateComponent("compared", boxes["compared"], REPLICATED),
            StateComponent("not compared", boxes["not compared"], REPLICATED, validation_level="none"),
            StateComponent("in groups", boxes["in groups"], PER_GROUP, "half"),
        ]
        with CheckpointCoordinator(
            components, tmp_path, process_groups=halves(rank), timeout_seconds=60
        ) as coordinator:
            coordinator.save_checkpoint(1)
            for box in boxes.values():
                box.items = {name: torch.zeros_like(tensor) for name, tensor in box.items.items()}
            coordinator.load_checkpoint()
        return [is_same(box.items, state(label)) for box, label in zip(boxes.values(), (0, 0, rank // 2), strict=True)]

    assert values(run_ranks(4, case)) == [[True] * 3] * 4
    manifest = CheckpointManifest.load(tmp_path / "checkpoint-1")
    shutil.rmtree(tmp_path / "checkpoint-1")

    def written(key: str) -> Counter[int]:
        by_rank: Counter[int] = Counter()
        for name, record in manifest.files.items():
            if name.startswith(key.replace(" ", "_")):
                by_rank[record.writer] += record.size
        return by_rank

    assert manifest.components["compared"].writers == (0, 1, 2, 3)
    assert [round(size / MIB) for _, size in sorted(written("compared").items())] == [16] * 4
    assert manifest.components["not compared"].writers == (0,)
    assert {rank: round(size / MIB) for rank, size in written("not compared").items()} == {0: 64}
    assert [round(size / MIB) for _, size in sorted(written("in groups").items())] == [32] * 4
    groups = manifest.components["in groups"].entries
    assert [(entry.ranks, entry.writers) for entry in groups.values()] == [((0, 1), (0, 1)), ((2, 3), (2, 3))]


# ---- copies that differ


def flip(tensor: torch.Tensor) -> None:
    """Change the lowest bit of the last element, where it lies."""
    bits = tensor.view(torch.int32)
    bits[-1] ^= 1


@pytest.mark.parametrize("level", ["quick", "tensor", "full"])
def test_one_flipped_bit_on_one_rank_is_named_on_all_and_nothing_is_stored(level: str, tmp_path: Path):
    def case(rank: int, world_size: int) -> list[Any]:
        state = {"bias": torch.ones(3), "deep": [{"weight": torch.arange(2_000_000.0)}], "step": 7}
        model = StateComponent("model", Box(state), REPLICATED, validation_level=level)
        other = StateComponent("other", Box({"weight": torch.ones(2)}), REPLICATED)
        results = []
        with CheckpointCoordinator([other, model], tmp_path, timeout_seconds=30) as coordinator:
            for culprit in range(world_size):
                if rank == culprit:
                    flip(state["deep"][0]["weight"])
                error = refusal(lambda: coordinator.save_checkpoint(1))
                dist.barrier()
                reports = coordinator.validate_replication()
                told = [(report.is_equal, report.differences) for report in reports.values()]
                results.append((error, listing(tmp_path), list(reports), told))
                dist.barrier()
                if rank == culprit:
                    flip(state["deep"][0]["weight"])
            results.append(coordinator.save_checkpoint(1).name)
        return results

    *results, after = the_same(values(run_ranks(3, case)))
    assert after == "checkpoint-1"
    manifest = CheckpointManifest.load(tmp_path / after)
    assert (manifest.components["model"].validation.result, manifest.components["model"].validation.level) == (
        "equal",
        level,
    )
    rest = {0: ("[1-2]", (1, 2)), 1: ("[0, 2]", (0, 2)), 2: ("[0-1]", (0, 1))}
    for culprit, ((kind, message), left, keys, told) in enumerate(results):
        shown, majority = rest[culprit]
        assert kind == "ReplicaMismatch"
        assert f"'model' differs between ranks {shown} and rank {culprit} at 'deep/~l0/weight'" in message
        assert "expected identical state in all holders (0-2)" in message
        assert [name for name in left if name.startswith(("checkpoint-", "."))] == []
        assert keys == ["other", "model"]
        (is_equal, _), (is_model_equal, [difference]) = told
        assert (is_equal, is_model_equal) == (True, False)
        assert (difference.majority, difference.minority) == (majority, (culprit,))
        [item] = difference.items
        assert (item.name, item.majority, item.minority) == ("deep/~l0/weight", majority, (culprit,))
        [copy] = item.minorities
        assert (copy.elements.num_different, copy.elements.first_index, copy.elements.max_ulp) == (1, (1_999_999,), 1)


def test_in_a_tie_the_lowest_rank_has_the_reference(tmp_path: Path):
    def case(rank: int, world_size: int) -> list[Refusal]:
        results = []
        for world in (2, 4):  # as groups of 2, and as all
            items = {"weight": torch.tensor([float(rank % 2 if world == 2 else rank // 2)])}
            pattern, group = (PER_GROUP, "half") if world == 2 else (REPLICATED, None)
            component = StateComponent("model", Box(items), pattern, group)
            with CheckpointCoordinator([component], tmp_path, process_groups=halves(rank)) as coordinator:
                results.append(refusal(lambda: coordinator.save_checkpoint(1)))
        return results

    groups, everybody = the_same(values(run_ranks(4, case)))
    far = "(first at [0], max |Δ| 1)"
    assert (
        f"'model' differs between rank 0 and rank 1 at 'weight' {far}; expected identical state in half (0-1)"
        in groups[1]
    )
    assert (
        f"'model' differs between rank 2 and rank 3 at 'weight' {far}; expected identical state in half (2-3)"
        in groups[1]
    )
    assert "'model' differs between ranks [0-1] and ranks [2-3] at 'weight'" in everybody[1]


def test_with_warn_the_majority_alone_is_stored_and_named(tmp_path: Path):
    """Never pieces of both: that would be a model that no rank ever had."""

    def case(rank: int, world_size: int) -> list[Any]:
        box = Box({})
        component = StateComponent("model", box, REPLICATED)
        results: list[Any] = []
        with CheckpointCoordinator([component], tmp_path, on_mismatch="warn", timeout_seconds=30) as coordinator:
            for culprit in range(world_size):
                box.items = many(1 if rank == culprit else 0) | {"lr": 0.1 if rank == culprit else 0.2}
                coordinator.save_checkpoint(culprit)
                coordinator.load_checkpoint()
                results.append(is_same(box.items, many(0) | {"lr": 0.2}))
            box.items = many(rank)  # all differ: the lowest rank's counts
            coordinator.save_checkpoint(world_size)
            coordinator.load_checkpoint()
            results.append(is_same(box.items, many(0)))
        return results

    outcomes = run_ranks(3, case)
    assert values(outcomes) == [[True] * 4] * 3
    trusted = [(1, 2), (0, 2), (0, 1), (0,)]
    for step, ranks in enumerate(trusted):
        manifest = CheckpointManifest.load(tmp_path / f"checkpoint-{step}")
        record = manifest.components["model"]
        assert record.validation.result == "differed"
        assert record.trusted == {"all": ranks}
        assert record.entries["all"].writers == ranks
        writers = {
            file.writer for name, file in manifest.files.items() if name.startswith("model") and "index" not in name
        }
        assert writers == set(ranks)
    shutil.rmtree(tmp_path)
    for outcome in outcomes:
        assert "saving all the same, from the majority alone: 'model' differs between ranks [1-2]" in outcome.output
        assert "component 'model' was saved although its copies differed" in outcome.output


def test_an_optional_component_whose_copies_differ_is_left_out_on_all_ranks(tmp_path: Path):
    def case(rank: int, world_size: int) -> list[Any]:
        extra = Box({"weight": torch.tensor([1.0, 0.5 if rank == 1 else 2.0])})
        model = Box(sample("model"))
        components = [
            StateComponent("extra", extra, REPLICATED, required=False),
            StateComponent("model", model, REPLICATED),
        ]
        with CheckpointCoordinator(components, tmp_path, timeout_seconds=30) as coordinator:
            coordinator.save_checkpoint(1)
            model.items = sample("other")
            report = coordinator.load_checkpoint()
        return [
            report.loaded,
            dict(report.skipped),
            is_same(model.items, sample("model")),
            extra.items["weight"].tolist(),
        ]

    results = values(run_ranks(3, case))
    *told, _ = zip(*results, strict=True)
    loaded, skipped, exact = (the_same(column) for column in told)
    assert (loaded, exact) == (("model",), True)
    assert "'extra' differs between ranks [0, 2] and rank 1 at 'weight'" in skipped["extra"]
    assert [result[3] for result in results] == [[1.0, 2.0], [1.0, 0.5], [1.0, 2.0]]
    manifest = CheckpointManifest.load(tmp_path / "checkpoint-1")
    assert list(manifest.components) == ["model"]
    assert "'extra' differs" in manifest.omitted["extra"]


DIFFERENCES: list[tuple[str, dict[str, Any], str, str]] = [
    ("lr", {"lr": 0.2}, "ReplicaMismatch", "differs between ranks [0, 2-3] and rank 1 at 'lr'"),
    ("type", {"lr": 1}, "ReplicaMismatch", "differs between ranks [0, 2-3] and rank 1 at 'lr'"),
    ("signed zero", {"zero": torch.tensor([-0.0])}, "ReplicaMismatch", "at 'zero'"),
    (
        "dtype",
        {"weight": torch.zeros(2, 3, dtype=torch.bfloat16)},
        "StructureError",
        "'weight' is a tensor float32 [2, 3] on rank 0 and a tensor bfloat16 [2, 3] on rank 1",
    ),
    (
        "shape",
        {"weight": torch.zeros(3, 2)},
        "StructureError",
        "'weight' is a tensor float32 [2, 3] on rank 0 and a tensor float32 [3, 2] on rank 1",
    ),
    ("key", {"more": 1}, "StructureError", "'more' is absent on rank 0 and a value on rank 1"),
    (
        "kind",
        {"lr": torch.tensor(0.1)},
        "StructureError",
        "'lr' is a value on rank 0 and a tensor float32 [] on rank 1",
    ),
]


@pytest.mark.parametrize("pattern", [REPLICATED, PER_GROUP])
def test_what_differs_is_named_with_the_ranks(pattern: SharingPattern, tmp_path: Path):
    def case(rank: int, world_size: int) -> list[Refusal]:
        everybody = dist.new_group(list(range(world_size)))
        box = Box({})
        component = StateComponent("optimizer", box, pattern, "everybody" if pattern is PER_GROUP else None)
        results = []
        with CheckpointCoordinator([component], tmp_path, process_groups={"everybody": everybody}) as coordinator:
            for _, change, _, _ in DIFFERENCES:
                box.items = {"weight": torch.zeros(2, 3), "lr": 0.1, "zero": torch.tensor([0.0])}
                box.items |= change if rank == 1 else {}
                results.append(refusal(lambda: coordinator.save_checkpoint(1)))
        return results

    results = the_same(values(run_ranks(4, case)))
    for (kind, message), (what, _, expected_kind, text) in zip(results, DIFFERENCES, strict=True):
        assert kind == expected_kind, what
        assert "'optimizer'" in message
        assert text in message
    assert listing(tmp_path) == ["replication-report-1.json"]


def test_equal_content_in_another_memory_layout_or_order_of_tensors_is_equal(tmp_path: Path):
    def case(rank: int, world_size: int) -> tuple[str, bool]:
        values_ = torch.arange(6.0).reshape(2, 3)
        tensor = values_.t().contiguous().t() if rank == 1 else values_.clone()
        nan = torch.tensor([float("nan")])
        items = {"weight": tensor, "nan": nan, "value": float("nan")}
        box = Box(items if rank == 0 else dict(reversed(items.items())))
        with CheckpointCoordinator([StateComponent("model", box, REPLICATED)], tmp_path) as coordinator:
            path = coordinator.save_checkpoint(1)
            tensor.zero_()
            coordinator.load_checkpoint()
        return path.name, torch.equal(box.items["weight"], values_)

    assert the_same(values(run_ranks(2, case))) == ("checkpoint-1", True)


# ---- state that is taken by a collective, or changes under our hands


@pytest.mark.parametrize("required", [True, False])
def test_a_state_dict_that_is_a_collective_works_whatever_fails_before_it(required: bool, tmp_path: Path):
    class Sharded(Box):
        def state_dict(self) -> dict[str, Any]:
            total = torch.ones(())
            dist.all_reduce(total)
            return {"total": total}

    def case(rank: int, world_size: int) -> list[Any]:
        first = Box({"x": 1})
        components = [
            StateComponent("first", first, REPLICATED, required=required),
            StateComponent("sharded", Sharded({}), REPLICATED),
        ]
        results: list[Any] = []
        with CheckpointCoordinator(components, tmp_path, timeout_seconds=600) as coordinator:
            for culprit in range(world_size):
                first.fail_save = RuntimeError("no") if rank == culprit else None
                if required:
                    results.append(refusal(lambda: coordinator.save_checkpoint(1)))
                else:
                    results.append(coordinator.save_checkpoint(1).name)
            first.fail_save = None
            results.append(coordinator.save_checkpoint(2).name)
        return results

    *failed, after = the_same(values(run_ranks(3, case)))
    assert after == "checkpoint-2"
    if required:
        for culprit, (_, message) in enumerate(failed):
            assert f"on rank {culprit}: component 'first': state_dict() raised RuntimeError: no" in message
    else:
        assert failed == ["checkpoint-1"] * 3
        omitted = CheckpointManifest.load(tmp_path / "checkpoint-1").omitted
        assert "on ranks 2: component 'first': state_dict() raised RuntimeError: no" in omitted["first"]


@pytest.mark.parametrize("culprit", [0, 1])
def test_a_tensor_that_changes_between_check_and_writing_fails_the_save_on_all_ranks(culprit: int, tmp_path: Path):
    def case(rank: int, world_size: int) -> tuple[Refusal, list[str], str]:
        state = {"one": torch.zeros(3), "other": torch.zeros(3)}  # one for each rank to write
        write = writing.write

        def change_and_write(*args: Any, **options: Any) -> Any:
            for tensor in state.values():
                tensor[0] = 1.0
            return write(*args, **options)

        component = StateComponent("model", Box(state), REPLICATED)
        with CheckpointCoordinator([component], tmp_path, timeout_seconds=30) as coordinator:
            with mock.patch.object(writing, "write", change_and_write if rank == culprit else write):
                error = refusal(lambda: coordinator.save_checkpoint(1))
            dist.barrier()
            left = listing(tmp_path)
            dist.barrier()
            for tensor in state.values():
                tensor[0] = 2.0
            return error, left, coordinator.save_checkpoint(1).name

    (kind, message), left, after = the_same(values(run_ranks(2, case)))
    assert f"on rank {culprit}: " in message
    assert "changed while it was being saved; nothing may modify the state until the call returns" in message
    assert (kind, left, after) == ("CheckpointError", [], "checkpoint-1")


def test_a_thread_that_keeps_changing_compared_state_never_gets_a_mix_stored(tmp_path: Path):
    """Each save either fails alike on all ranks, or stores a state in which all elements are of one moment."""

    def case(rank: int, world_size: int) -> tuple[list[Any], set[bool]]:
        tensor = torch.zeros(4 << 20)  # 16 MiB, of which all elements are equal between two updates
        box = Box({"weight": tensor})
        is_over = threading.Event()

        def train() -> None:
            while not is_over.is_set():
                tensor.add_(1.0)

        results: list[Any] = []
        moments = set()
        with CheckpointCoordinator(
            [StateComponent("model", box, REPLICATED)], tmp_path, timeout_seconds=30
        ) as coordinator:
            thread = threading.Thread(target=train)
            thread.start()
            for step in range(4):
                try:
                    results.append(coordinator.save_checkpoint(step).name)
                except Exception as err:
                    results.append((type(err).__name__, str(err)))
            is_over.set()
            thread.join()
            for result in results:
                if isinstance(result, str):
                    coordinator.load_checkpoint(int(result.rpartition("-")[2]))
                    moments.add(bool((tensor == tensor[0]).all()))
        return results, moments

    results, moments = the_same(values(run_ranks(2, case)))
    assert len(results) == 4
    assert moments <= {True}
    assert all(isinstance(result, str) or result[0] in ("ReplicaMismatch", "CheckpointError") for result in results)


JOB = """
import sys
import torch
import torch.distributed as dist
from forgather_ckpt import CheckpointCoordinator, SharingPattern, StateComponent
from tests.components import Box

dist.init_process_group("gloo")
box = Box({"weight": torch.full((1 << 20,), float(dist.get_rank() == 1))})
with CheckpointCoordinator([StateComponent("model", box, SharingPattern.REPLICATED)], sys.argv[1]) as coordinator:
    [report] = coordinator.validate_replication("full").values()
print(f"rank {dist.get_rank()}: {report.differences[0].minority}", flush=True)
dist.destroy_process_group()
"""


def test_a_job_that_has_compared_all_bytes_ends_as_it_should(tmp_path: Path):
    """Threads of a process group that outlive the interpreter would end the process by a signal."""
    script = tmp_path / "job.py"
    script.write_text(JOB)
    result = torchrun([script, tmp_path / "run"], nproc=3)
    assert result.returncode == 0, result.output
    assert sorted(line for line in result.output.splitlines() if line.startswith("rank ")) == [
        f"rank {rank}: (1,)" for rank in range(3)
    ]
