"""Arguments that mean nothing: refused on all ranks alike, with the value and what to write instead."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from forgather_ckpt import CheckpointCoordinator, SharingPattern, StateComponent
from tests.components import Box, Refusal, Trainer, refusal, the_same
from tests.ranks import run_ranks, values


def own(rank: int = 0) -> StateComponent:
    return StateComponent("own", Box({"rank": rank}), SharingPattern.PER_RANK)


def wrong_arguments() -> list[tuple[dict[str, Any], str]]:
    """Arguments of the constructor, and the error."""
    return [
        ({"process_groups": dist.group.WORLD}, "process_groups is a ProcessGroup; pass {name: group}"),
        ({"process_groups": [0, 1]}, "process_groups is a list; pass {name: group}"),
        (
            {"process_groups": {"dp": [0, 1]}},
            "process_groups['dp'] is [0, 1]; use a ProcessGroup, a DeviceMesh, or None",
        ),
        ({"process_groups": {"dp": -1}}, "process_groups['dp'] is -1; use a ProcessGroup"),
        ({"process_groups": {0: None}}, "process_groups has the name 0; use non-empty strings"),
        ({"timeout_seconds": "60"}, "timeout_seconds is '60'; use a positive number of seconds"),
        ({"timeout_seconds": None}, "timeout_seconds is None; use a positive number"),
        ({"timeout_seconds": 0}, "timeout_seconds is 0; use a positive number"),
        ({"timeout_seconds": -1.5}, "timeout_seconds is -1.5; use a positive number"),
        ({"timeout_seconds": math.nan}, "timeout_seconds is nan; use a positive number"),
        ({"timeout_seconds": math.inf}, "timeout_seconds is inf; use a positive number"),
        ({"source": "model"}, "the source is 'model'; give an object that has get_state_components(), or a list"),
        ({"source": {"model": own()}}, "dict has no get_state_components(); give an object that has, or a list"),
        ({"output_dir": ""}, "output_dir is ''; use the path of a run directory"),
        ({"output_dir": None}, "output_dir is None; use the path of a run directory"),
        ({"output_dir": 5}, "output_dir is 5; use the path of a run directory"),
        ({"training_args": [1]}, "training_args is a list; use a dict, or None"),
    ]


@pytest.mark.multiprocess
def test_wrong_arguments_of_one_rank_are_refused_on_all(tmp_path: Path):
    def case(rank: int, world_size: int) -> list[Refusal]:
        good: dict[str, Any] = {"source": [], "output_dir": tmp_path / "run", "timeout_seconds": 60}
        return [
            refusal(lambda given=given: CheckpointCoordinator(**(good | (given if rank == 1 else {}))))
            for given, _ in wrong_arguments()
        ]

    results = the_same(values(run_ranks(2, case)))
    for (kind, message), (_, text) in zip(results, wrong_arguments(), strict=True):
        assert (kind, message.startswith(f"connecting failed on rank 1: {text}")) == ("DeclarationError", True), message


@pytest.mark.multiprocess
def test_only_none_and_torchs_sentinel_mean_not_a_member(tmp_path: Path):
    def case(rank: int, world_size: int) -> Any:
        made = dist.new_group([1])  # NON_GROUP_MEMBER on rank 0
        groups = {"one": made, "none": None}
        coordinator = CheckpointCoordinator([], tmp_path, process_groups=groups, timeout_seconds=60)
        return {name: group.sets for name, group in coordinator.topology.groups.items()}

    assert the_same(values(run_ranks(2, case))) == {"none": (), "one": ((1,),)}


@pytest.mark.multiprocess
def test_a_file_and_a_checkpoint_are_no_run_directories(tmp_path: Path):
    def case(rank: int, world_size: int) -> list[Refusal]:
        with CheckpointCoordinator([own(rank)], tmp_path / "run", timeout_seconds=60) as coordinator:
            path = coordinator.save_checkpoint(1)
        wrong = [path, path / "checkpoint_manifest.json"]
        return [refusal(lambda one=one: CheckpointCoordinator([], one, timeout_seconds=60)) for one in wrong]

    checkpoint, file = the_same(values(run_ranks(2, case)))
    path = tmp_path / "run" / "checkpoint-1"
    assert (checkpoint[0], file[0]) == ("DeclarationError", "DeclarationError")
    assert (
        f"output_dir '{path}' is a checkpoint; give the run directory that contains it, '{path.parent}'"
        in checkpoint[1]
    )
    assert f"output_dir '{path / 'checkpoint_manifest.json'}' is a file; give a directory" in file[1]


WRONG_SAVES: list[tuple[dict[str, Any], str]] = [
    ({"step": 2**63}, "step is 9223372036854775808; use a number of steps, below 2**63"),
    ({"epoch": "1"}, "epoch is '1'; use a finite number, or None"),
    ({"epoch": True}, "epoch is True; use a finite number"),
    ({"epoch": math.nan}, "epoch is nan; use a finite number"),
    ({"epoch": math.inf}, "epoch is inf; use a finite number"),
    ({"epoch": 10**400}, "epoch is 1000"),
    ({"epoch": [1]}, "epoch is [1]; use a finite number"),
    ({"metrics": [("loss", 1)]}, "metrics is [('loss', 1)]; use a dict of names and values, or None"),
    ({"metrics": 0.5}, "metrics is 0.5; use a dict"),
]

WRONG_COMPONENTS: list[tuple[Any, str]] = [
    ("own", "components is 'own'; use a list of keys, such as ['model'], or None for all"),
    (5, "components is 5; use a list of keys"),
    ([5], "components is [5]; use a list of keys"),
    ({"own": 1}, "components is {'own': 1}; use a list of keys"),
]


@pytest.mark.multiprocess
@pytest.mark.parametrize("culprit", [0, 1])
def test_wrong_arguments_of_a_save_and_a_load_are_refused_on_all_ranks(culprit: int, tmp_path: Path):
    def case(rank: int, world_size: int) -> list[Refusal]:
        with CheckpointCoordinator([own(rank)], tmp_path, timeout_seconds=60) as coordinator:
            coordinator.save_checkpoint(1, epoch=0.5, metrics={"loss": 1})
            results = []
            for given, _ in WRONG_SAVES:
                dist.barrier()  # a rank 0 that refuses by itself waits for nobody
                arguments = {"step": 2} | (given if rank == culprit else {})
                results.append(refusal(lambda arguments=arguments: coordinator.save_checkpoint(**arguments)))
            for wrong, _ in WRONG_COMPONENTS:
                dist.barrier()
                keys = wrong if rank == culprit else ["own"]
                results.append(refusal(lambda keys=keys: coordinator.load_checkpoint(components=keys)))
            dist.barrier()
            coordinator.load_checkpoint(components=["own"])
            coordinator.save_checkpoint(2)
        return results

    results = the_same(values(run_ranks(2, case)))
    expected = [message for _, message in (*WRONG_SAVES, *WRONG_COMPONENTS)]
    for (kind, message), text in zip(results, expected, strict=True):
        assert kind == "DeclarationError"
        assert message.startswith(f"comparing declarations failed on rank {culprit}: {text}")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (["model"], "the list holds a str; give a list of StateComponent"),
        (Trainer(["model"]), "get_state_components() returned a str; return a list of StateComponent"),  # type: ignore[list-item]
    ],
)
def test_a_source_that_holds_something_else_is_refused(source: Any, message: str, tmp_path: Path):
    with CheckpointCoordinator(source, tmp_path) as coordinator:
        kind, said = refusal(lambda: coordinator.save_checkpoint(1))
    assert kind == "DeclarationError"
    assert message in said
