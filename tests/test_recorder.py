"""`DigestRecorder`: what it records of a trainer and of a loop of one's own, and what happens when it cannot."""

from __future__ import annotations

import errno
import logging
import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

from forgather_ckpt import (
    DigestRecorder,
    NamedOptimizer,
    SharingPattern,
    StateComponent,
    device_digest,
    digest_log,
    files,
    hashtree,
)
from forgather_ckpt import digests as digests_module
from forgather_ckpt.digest_log import DigestLog, Frame
from forgather_ckpt.errors import DeclarationError, FormatError, NoSpace, StorageError, StructureError
from forgather_ckpt.memory import flat_bytes, host_view
from forgather_ckpt.structure import TensorItem
from forgather_ckpt.trainers import DDPTrainer, Trainer
from forgather_ckpt.values import dumps
from tests.components import Box
from tests.ranks import run_ranks, values
from tests.test_trainers import Points, Stop, make_args, make_model, stop_at

LOG = digest_log.file_name(0)


def frames(path: Path) -> list[Frame]:
    with DigestLog(path) as log:
        assert log.num_torn_bytes == 0
        return list(log.frames())


def items(frame: Frame) -> dict[tuple[str, str], bytes]:
    return {
        column[:2]: frame.digests[16 * number : 16 * number + 16] for number, column in enumerate(frame.header.columns)
    }


def recorded(states: dict[str, Any], path: Path, **options: Any) -> Frame:
    """What is recorded of some states."""
    with DigestRecorder(path, **options) as recorder:
        recorder.record(1, states)
    return frames(path / LOG)[-1]


# ---- what is recorded


def test_every_item_has_its_digest(tmp_path: Path) -> None:
    large = torch.arange(1_100_000, dtype=torch.int32)  # two blocks
    weight = torch.randn(3, 4)
    state = {
        "weight": weight,
        "transposed": weight.t(),
        "empty": torch.zeros(0, 7),
        "half": torch.ones(3, dtype=torch.bfloat16),
        "large": large,
        "lr": 0.1,
        "nested": {"betas": (0.9, 0.99), "list": [torch.ones(2), 5]},
    }
    frame = recorded({"box": state}, tmp_path)
    found = items(frame)
    expected = {
        name: hashtree.buffer_digest(host_view(flat_bytes(tensor)))
        for name, tensor in [*list(state.items())[:5], ("nested/list/~l0", torch.ones(2))]  # type: ignore[list-item]
    }
    expected |= {
        name: hashtree.digest(dumps(value))
        for name, value in [("lr", 0.1), ("nested/betas", (0.9, 0.99)), ("nested/list/~l1", 5)]
    }
    assert {name: digest for (_, name), digest in found.items()} == expected
    assert [column.name for column in frame.header.columns] == [
        "weight", "transposed", "empty", "half", "large", "lr", "nested/betas", "nested/list/~l0", "nested/list/~l1",
    ]  # fmt: skip
    kinds = {column.name: (column.dtype, column.shape) for column in frame.header.columns}
    assert kinds["transposed"] == ("float32", (4, 3))
    assert kinds["half"] == ("bfloat16", (3,))
    assert kinds["lr"] == (None, None)
    assert {column.algorithm for column in frame.header.columns} == {"xxh3_128"}


def test_tied_tensors_are_recorded_under_all_names_and_hashed_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    real = digests_module.block_digests

    def counted(tensors: Iterable[TensorItem]) -> Any:
        tensors = list(tensors)
        asked.append(len(tensors))
        return real(tensors)

    monkeypatch.setattr(digests_module, "block_digests", counted)
    tied, other = torch.randn(4), torch.randn(4)
    states = {"model": {"embed": tied, "other": other, "head": tied}}
    whole = items(recorded(states, tmp_path / "whole"))
    assert list(whole) == [("model", "embed"), ("model", "other"), ("model", "head")]
    assert whole["model", "embed"] == whole["model", "head"] != whole["model", "other"]
    assert asked == [2]
    for chosen in ({"include": ["h*"]}, {"exclude": ["embed", "other"]}):
        some = items(recorded(states, tmp_path / str(chosen), **chosen))
        assert some == {("model", "head"): whole["model", "head"]}


def test_components_may_share_item_names(tmp_path: Path) -> None:
    found = items(recorded({"a": {"weight": torch.zeros(2)}, "b": {"weight": torch.ones(2)}}, tmp_path))
    assert len(found) == 2
    assert found["a", "weight"] != found["b", "weight"]


def test_modules_optimizers_and_components_are_taken_as_they_are(tmp_path: Path) -> None:
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters())
    by_name = recorded({"model": model, "optimizer": NamedOptimizer(optimizer, [model])}, tmp_path / "names")
    components = [
        StateComponent("model", model, SharingPattern.REPLICATED, validation_exclude=["*.bias"]),
        StateComponent("optimizer", NamedOptimizer(optimizer, [model]), SharingPattern.GLOBAL),
        StateComponent("nothing", None, SharingPattern.PER_RANK),
    ]
    with DigestRecorder(tmp_path / "components") as recorder:
        recorder.record(1, components)
    [declared] = frames(tmp_path / "components" / LOG)
    assert items(declared) == items(by_name)
    assert [tuple(part) for part in declared.header.parts] == [
        ("model", "replicated", ("*.bias",)),
        ("optimizer", "global", ()),
        ("nothing", "per_rank", ()),
    ]
    assert {part.pattern for part in by_name.header.parts} == {None}
    assert ("raw", "param_groups/~l0/lr") in items(recorded({"raw": optimizer}, tmp_path / "raw"))


def test_what_is_recorded_can_be_chosen(tmp_path: Path) -> None:
    states = {
        "model": {"layer.weight": torch.ones(2), "layer.bias": torch.ones(2), "deep": {"weight": torch.ones(1)}},
        "other": {"x": 1},
    }
    chosen = recorded(states, tmp_path / "a", components=["model"], include=["*weight"], exclude=["layer.*"])
    assert list(items(chosen)) == [("model", "deep/weight")]
    assert (chosen.header.include, chosen.header.exclude) == (("*weight",), ("layer.*",))
    with pytest.raises(DeclarationError, match="there is no component 'modle' to record; known: model, other"):
        recorded(states, tmp_path / "b", components=["modle"])
    with pytest.raises(DeclarationError, match=r"no item is recorded: none has a name like \['model\.\*'\]"):
        recorded(states, tmp_path / "c", include=["model.*"])
    assert not (tmp_path / "c").exists()


def test_state_that_appears_and_goes_changes_the_columns(tmp_path: Path) -> None:
    with DigestRecorder(tmp_path) as recorder:
        for step, names in enumerate(["a", "ab", "ab", "b", "ba"]):
            recorder.record(step, {"box": {name: torch.full((1,), float(step)) for name in names}})
    found = frames(tmp_path / LOG)
    assert [[column.name for column in frame.header.columns] for frame in found] == [
        ["a"], ["a", "b"], ["a", "b"], ["b"], ["b", "a"],
    ]  # fmt: skip
    assert [frame.header_number for frame in found] == [0, 1, 1, 2, 3]


def test_only_multiples_of_the_interval_are_recorded_and_asked_for(tmp_path: Path) -> None:
    class Counted(Box):
        asked = 0

        def state_dict(self) -> dict[str, Any]:
            self.asked += 1
            return super().state_dict()

    box = Counted({"x": torch.ones(1)})
    with DigestRecorder(tmp_path, every_n_steps=3) as recorder:
        for step in range(10):
            recorder.record(step, {"box": box})
    assert [frame.step for frame in frames(tmp_path / LOG)] == [0, 3, 6, 9]
    assert box.asked == 4


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"every_n_steps": 0}, "every_n_steps must be a whole number of at least 1, not 0"),
        ({"every_n_steps": True}, "every_n_steps must be"),
        ({"every_n_steps": 0.5}, "every_n_steps must be"),
        ({"components": "model"}, "components must be a list of strings, not 'model'"),
        ({"include": "*.weight"}, "include must be a list of strings"),
        ({"exclude": [""]}, "exclude must be a list of strings"),
    ],
)
def test_wrong_settings_are_refused(options: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        DigestRecorder(**options)


def test_a_loop_of_ones_own_says_where(tmp_path: Path) -> None:
    with pytest.raises(DeclarationError, match="say where to record"):
        DigestRecorder().record(1, {"x": {"y": 1}})


@pytest.mark.parametrize(
    ("step", "components", "problem"),
    [
        (-1, {"x": {"y": 1}}, "step is -1; use a number of steps"),
        (2**63, {"x": {"y": 1}}, "step is 9223372036854775808; use"),
        (1, {7: {"y": 1}}, "a component to record is called 7; the name must be a non-empty string"),
        (1, {"x": torch.ones(2)}, "component 'x' is a Tensor; give what has a state_dict"),
        (1, nn.Linear(1, 1), 'cannot record a Linear; give a list of StateComponent, or names .*: {"model": model}'),
        (1, [nn.Linear(1, 1)], "cannot record a Linear; give"),
        (
            1,
            [StateComponent("x", Box({}), SharingPattern.REPLICATED)] * 2,
            "of 2 components to record some have one key",
        ),
    ],
)
def test_what_a_log_cannot_hold_is_refused_and_harms_none(
    tmp_path: Path, step: int, components: Any, problem: str
) -> None:
    with DigestRecorder(tmp_path) as recorder:
        recorder.record(0, {"x": {"y": 1}})
        with pytest.raises(DeclarationError, match=problem):
            recorder.record(step, components)
        recorder.record(1, {"x": {"y": 1}})
    assert [frame.step for frame in frames(tmp_path / LOG)] == [0, 1]


# ---- in a trainer


@pytest.mark.parametrize("place", ["callbacks", "on_step_end"])
def test_a_trainer_is_recorded_as_it_declares_its_state(tmp_path: Path, place: str) -> None:
    trainer = Trainer(make_model(), make_args(tmp_path), Points(), **{place: [DigestRecorder()]})
    trainer.train()
    found = frames(tmp_path / "digests" / LOG)
    assert [frame.step for frame in found] == [1, 2, 3, 4]
    last = items(found[-1])
    assert {component for component, _ in last} == {"model", "optimizer", "scheduler", "trainer", "dataset", "rng"}
    weight = trainer.model.state_dict()["linear.weight"]
    assert last["model", "linear.weight"] == hashtree.buffer_digest(host_view(flat_bytes(weight)))
    assert last["trainer", "step"] == hashtree.digest(b"4")


def test_recording_changes_nothing(tmp_path: Path) -> None:
    losses = []
    for hooks in ([], [DigestRecorder()]):
        trainer = Trainer(make_model(), make_args(tmp_path / str(len(hooks))), Points(), on_step_end=hooks)
        trainer.train()
        losses.append((trainer.history, trainer.model.state_dict()["linear.weight"].tolist()))
    assert losses[0] == losses[1]


def test_optimizer_state_that_appears_after_the_first_step_is_recorded_from_there(tmp_path: Path) -> None:
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    states = {"model": model, "optimizer": NamedOptimizer(optimizer, [model])}
    with DigestRecorder(tmp_path) as recorder:
        recorder.record(0, states)
        for step in (1, 2):
            model(**{"x": torch.ones(2, 4), "y": torch.ones(2)}).backward()
            optimizer.step()
            optimizer.zero_grad()
            recorder.record(step, states)
    before, first, second = map(items, frames(tmp_path / LOG))
    appeared = {("optimizer", f"state.linear.{name}.momentum_buffer") for name in ("weight", "bias")}
    assert first.keys() - before.keys() == appeared
    assert all(first[key] != second[key] for key in appeared)
    assert first["model", "linear.weight"] != before["model", "linear.weight"]
    assert first["optimizer", "groups.linear.weight.lr"] == before["optimizer", "groups.linear.weight.lr"]


def test_a_job_that_resumes_goes_on_in_the_same_log_with_the_same_digests(tmp_path: Path) -> None:
    def train(output_dir: Path, *hooks: Any, **settings: Any) -> None:
        args = make_args(output_dir, max_steps=6, save_strategy="steps", save_steps=2, **settings)
        Trainer(make_model(), args, Points(), on_step_end=[DigestRecorder(), *hooks]).train()

    train(tmp_path / "undisturbed")
    with pytest.raises(Stop):
        train(tmp_path / "killed", stop_at(5))
    train(tmp_path / "killed", resume_from_checkpoint="auto")
    undisturbed = {frame.step: items(frame) for frame in frames(tmp_path / "undisturbed" / "digests" / LOG)}
    killed = frames(tmp_path / "killed" / "digests" / LOG)
    assert [frame.step for frame in killed] == [1, 2, 3, 4, 5, 5, 6]
    for frame in killed:
        assert items(frame) == undisturbed[frame.step], frame.step


@pytest.mark.multiprocess
def test_each_rank_has_its_own_log_and_says_nothing_to_the_others(tmp_path: Path) -> None:
    def case(rank: int, world_size: int) -> tuple[int, int]:
        if rank == 0:  # alone: nobody answers
            with DigestRecorder(tmp_path / "own") as recorder:
                recorder.record(7, {"box": {"rank": rank}})
        torch.distributed.barrier()
        DDPTrainer(make_model(), make_args(tmp_path), Points(), on_step_end=[DigestRecorder()]).train()
        header = frames(tmp_path / "digests" / digest_log.file_name(rank))[-1].header
        return header.rank, header.world_size

    assert values(run_ranks(2, case)) == [(0, 2), (1, 2)]
    assert [path.name for path in (tmp_path / "own").iterdir()] == [LOG]
    logs = [frames(tmp_path / "digests" / digest_log.file_name(rank)) for rank in (0, 1)]
    for one, other in zip(*logs, strict=True):
        ours, theirs = items(one), items(other)
        differ = {key[0] for key in ours if ours[key] != theirs[key]}
        assert differ <= {"rng", "dataset"}
        assert "rng" in differ


# ---- when it cannot


def failing(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def fail(descriptor: int, data: memoryview | bytes, offset: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files, "write_at", fail)


def test_a_full_disk_ends_the_recording_once_and_loudly_not_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fill(trainer: Trainer) -> None:
        if trainer.progress.step == 2:
            failing(monkeypatch, errno.ENOSPC)

    recorder = DigestRecorder()
    trainer = Trainer(make_model(), make_args(tmp_path), Points(), on_step_end=[fill, recorder])
    assert trainer.train().steps == 4
    monkeypatch.undo()
    assert [frame.step for frame in frames(tmp_path / "digests" / LOG)] == [1]
    [told] = [record for record in caplog.records if record.name == "forgather_ckpt.recorder"]
    assert told.levelno == logging.ERROR
    assert "rank 0 records no digests from step 2 on, training goes on: recording the digests of step 2" in told.message
    assert isinstance(recorder.failure, NoSpace)


def test_strict_recording_ends_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(make_model(), make_args(tmp_path), Points(), on_step_end=[DigestRecorder(strict=True)])
    failing(monkeypatch, errno.EIO)
    for step in (1, 2):  # each time: who catches it has not switched it off
        with pytest.raises(StorageError, match=f"recording the digests of step {step} failed"):
            trainer.train()


def test_a_directory_that_goes_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    recorder = DigestRecorder(tmp_path / "digests")
    recorder.record(1, {"box": {"x": 1}})
    shutil.rmtree(tmp_path / "digests")
    recorder.record(2, {"box": {"x": 1}})
    assert "was deleted while it was being recorded to" in caplog.text
    assert not (tmp_path / "digests").exists()


def test_a_damaged_log_is_left_alone_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / LOG).write_bytes(b"something else")
    with DigestRecorder(tmp_path) as recorder:
        recorder.record(1, {"box": {"x": 1}})
    assert isinstance(recorder.failure, FormatError)
    assert "move it away, or record into another directory" in caplog.text
    assert (tmp_path / LOG).read_bytes() == b"something else"


@pytest.mark.multiprocess
def test_a_rank_that_has_stopped_recording_does_not_hang_the_others(tmp_path: Path) -> None:
    """`state_dict()` may be a collective, which needs all ranks."""

    class Gathered(Box):
        def state_dict(self) -> dict[str, Any]:
            total = torch.ones(1)
            torch.distributed.all_reduce(total)
            return {"total": total}

    def case(rank: int, world_size: int) -> bool:
        if rank == 1:
            (tmp_path / digest_log.file_name(1)).mkdir()
        with DigestRecorder(tmp_path) as recorder:
            for step in range(3):
                recorder.record(step, {"box": Gathered({})})
            return recorder.failure is None

    assert values(run_ranks(2, case)) == [True, False]
    assert [frame.step for frame in frames(tmp_path / LOG)] == [0, 1, 2]


def test_state_that_cannot_be_recorded_is_an_error_with_its_place(tmp_path: Path) -> None:
    states: Sequence[tuple[Any, str]] = [({"hook": print}, "hook: "), (5, "expected a dict")]
    for state, problem in states:
        stateful = Box({})
        stateful.state_dict = lambda state=state: state  # type: ignore[method-assign, misc]
        with DigestRecorder(tmp_path) as recorder, pytest.raises(StructureError, match=problem) as caught:
            recorder.record(1, {"box": stateful})
        assert caught.value.component == "box"


# ---- on GPUs


@pytest.mark.gpu
@pytest.mark.multiprocess
def test_tensors_on_a_gpu_are_digested_there_in_one_launch(tmp_path: Path) -> None:
    """In a process of its own: this one shall not use CUDA (tests/ranks.py)."""

    def case(rank: int, world_size: int) -> list[int]:
        model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).cuda()
        optimizer = torch.optim.AdamW(model.parameters())
        model(torch.ones(2, 64, device="cuda")).sum().backward()
        optimizer.step()
        states = {"model": model, "optimizer": NamedOptimizer(optimizer, [model])}
        with (
            mock.patch.object(device_digest, "begin", wraps=device_digest.begin) as taken,
            DigestRecorder(tmp_path) as recorder,
        ):
            recorder.record(1, states)
            model[0].weight.data[3, 5] += 1
            recorder.record(2, states)
        return [len(call.args[0]) for call in taken.call_args_list]

    assert values(run_ranks(1, case, backend=None)) == [[12, 12]]
    first, second = frames(tmp_path / LOG)
    assert [key for key, digest in items(first).items() if items(second)[key] != digest] == [("model", "0.weight")]
    algorithms = {column.name: column.algorithm for column in first.header.columns}
    assert algorithms["0.weight"] == algorithms["state.1.bias.exp_avg"] == "multilinear61x2"
    assert algorithms["state.1.bias.step"] == algorithms["groups.1.bias.lr"] == "xxh3_128"
