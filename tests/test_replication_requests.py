"""Checks that were asked for in odd ways: what is not compared is said, ranks that fall behind catch up."""

from __future__ import annotations

import os
import signal
import socket
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from forgather_ckpt import CheckpointCoordinator, CheckpointManifest, SharingPattern, StateComponent
from tests.components import Box, refusal, the_same
from tests.ranks import run_ranks, values

pytestmark = pytest.mark.multiprocess

REPLICATED, PER_RANK = SharingPattern.REPLICATED, SharingPattern.PER_RANK


@pytest.mark.parametrize("how", ["structure", "failure"])
def test_an_optional_component_that_cannot_be_compared_is_an_error_and_not_a_pass(how: str, tmp_path: Path):
    def case(rank: int, world_size: int) -> Any:
        ema = Box({"weight": torch.ones(3 + (rank if how == "structure" else 0))})
        ema.fail_save = ValueError("not now") if how == "failure" and rank == 1 else None
        components = [
            StateComponent("model", Box({"weight": torch.ones(3)}), REPLICATED),
            StateComponent("ema", ema, REPLICATED, required=False),
        ]
        with CheckpointCoordinator(components, tmp_path, timeout_seconds=30) as coordinator:
            told = [refusal(coordinator.validate_replication)]
            told.append(refusal(lambda: coordinator.validate_replication("full", ["ema"])))
            return told, list(coordinator.validate_replication("full", ["model"]))

    refused, compared = the_same(values(run_ranks(3, case)))
    kind, text = ("StructureError", "'weight'") if how == "structure" else ("RankFailed", "ValueError: not now")
    for refusal_kind, message in refused:
        assert refusal_kind == kind
        assert "component 'ema'" in message and text in message
    assert compared == ["model"]


@pytest.mark.parametrize("world_size", [1, 2])
def test_what_has_one_copy_only_is_reported_as_not_compared(world_size: int, tmp_path: Path):
    def case(rank: int, world_size: int) -> dict[str, str]:
        components = [
            StateComponent("model", Box({"weight": torch.ones(3)}), REPLICATED),
            StateComponent("rng", Box({"seed": rank}), PER_RANK),
        ]
        with CheckpointCoordinator(components, tmp_path, timeout_seconds=30) as coordinator:
            reports = coordinator.validate_replication("full")
            assert all(report.is_equal for report in reports.values())
            return {key: report.text().partition(" (")[0] for key, report in reports.items()}

    told = the_same(values(run_ranks(world_size, case)))
    model = "model: equal at level full" if world_size == 2 else "model: not compared"
    assert told == {"model": model, "rng": "rng: not compared"}


def test_excluding_everything_is_not_called_equal(tmp_path: Path):
    def case(rank: int, world_size: int) -> str:
        component = StateComponent("model", Box({"a": rank, "b": 1}), REPLICATED, validation_exclude=["*"])
        with CheckpointCoordinator([component], tmp_path, timeout_seconds=30) as coordinator:
            coordinator.save_checkpoint(1)
            return coordinator.validate_replication()["model"].text()

    assert the_same(values(run_ranks(2, case))) == "model: not compared"
    record = CheckpointManifest.load(tmp_path / "checkpoint-1").components["model"]
    assert (record.validation.result, record.validation.num_items) == ("not compared", 0)
    assert record.excluded == {"all": ("a", "b")}


def test_what_becomes_of_a_mismatch_must_be_asked_for_alike(tmp_path: Path):
    def case(rank: int, world_size: int) -> Any:
        component = StateComponent("model", Box({"weight": torch.full((3,), float(rank))}), REPLICATED)
        refused = refusal(
            lambda: CheckpointCoordinator([component], tmp_path, on_mismatch="warn" if rank == 2 else "error")
        )
        with CheckpointCoordinator([component], tmp_path, on_mismatch="warn", timeout_seconds=30) as coordinator:
            return refused, coordinator.save_checkpoint(1).name

    (kind, message), saved = the_same(values(run_ranks(3, case)))
    assert (kind, saved) == ("DeclarationError", "checkpoint-1")
    assert "on_mismatch is 'error' on rank 0 and 'warn' on rank 2" in message


@pytest.mark.parametrize("skipper", [0, 1])
def test_a_rank_that_skipped_a_check_is_in_step_again_at_the_next(skipper: int, tmp_path: Path):
    """Whether it takes part in the one that the others gave up or in the next cannot matter: they are the same."""

    def case(rank: int, world_size: int) -> list[str]:
        component = StateComponent("model", Box({"weight": torch.ones(3)}), REPLICATED)
        results = []
        with CheckpointCoordinator([component], tmp_path, timeout_seconds=2) as coordinator:
            if rank != skipper:
                results.append(refusal(coordinator.validate_replication)[0])
            dist.barrier()
            if rank == skipper:
                time.sleep(0.5)  # the others begin the next one
                results.append("skipped")
            results += [str(coordinator.validate_replication()["model"].is_equal) for _ in range(3)]
        return results

    for rank, result in enumerate(values(run_ranks(3, case))):
        assert result == ["skipped" if rank == skipper else "RankTimeout", "True", "True", "True"]


def test_if_the_process_that_hosts_the_store_dies_the_others_get_a_typed_error(tmp_path: Path):
    def case(rank: int, world_size: int, port: int) -> Any:
        store = dist.TCPStore("127.0.0.1", port, world_size, is_master=rank == 0)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
        component = StateComponent("model", Box({"weight": torch.ones(3)}), REPLICATED)
        coordinator = CheckpointCoordinator([component], tmp_path, timeout_seconds=20)

        def check_twice() -> None:
            coordinator.validate_replication()
            if rank == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            coordinator.validate_replication()

        return refusal(check_twice)

    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    outcomes = run_ranks(3, lambda rank, size: case(rank, size, port), backend=None, expect_dead=[0])
    for outcome in outcomes[1:]:
        assert outcome.value is not None, (outcome.error, outcome.exitcode, outcome.output)
        kind, message = outcome.value
        assert kind == "RankTimeout"
        assert "the job's store does not answer" in message or "rank 0 (pid" in message
