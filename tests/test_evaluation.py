"""Evaluation during training: what it finds, that training does not notice it, and who fails together where it cannot be."""

import functools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from forgather_ckpt import catalog, trainers
from forgather_ckpt.data import SeededItems
from forgather_ckpt.errors import RankFailed
from forgather_ckpt.trainers import DDPTrainer, FSDPTrainer, Trainer
from forgather_ckpt.trainers.evaluation import EvaluationBatches
from tests.layouts import Layout, Net, local, states
from tests.ranks import errors, run_ranks, values
from tests.runs import Diary, Noise, same_on_all, trainer_of
from tests.test_pipeline import Sentences, seeded
from tests.test_resume import digests

pytestmark = pytest.mark.multiprocess

ONE = Layout("one")
LAYOUTS = [
    ONE,
    Layout("ddp", {"dp": 2}),
    Layout("ddp", {"dp": 3}, {"per_device_train_batch_size": 2}),
    Layout("fsdp", {"shard": 2}),
    Layout("fsdp", {"replicate": 2, "shard": 2}),
    Layout("hybrid", {"dp": 2, "tp": 2}),
    Layout("hybrid", {"dp": 2, "pp": 2}),
    Layout("pipeline", {"pp": 2}, {"schedule": "1f1b"}),
    Layout("pipeline", {"pp": 2}, {"schedule": "gpipe"}),
    Layout("pipeline", {"pp": 2}, {"schedule": "interleaved_1f1b"}),
    Layout("pipeline", {"pp": 2}, {"schedule": "interleaved_zero_bubble"}),
    Layout("pipeline", {"pp": 2}, {"schedule": "zbv"}),
]


class Fixed:
    """Some of `Sentences`, without noise."""

    def __init__(self, num_samples: int) -> None:
        self.num_samples = num_samples

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> dict[str, Any]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(index)
            return Sentences()[index]


def trained(layout: Layout, directory: Path, *, every: int | None) -> Any:
    """A run: its losses, the state that it comes to, and what evaluations found."""
    diary = Diary()
    options = {} if every is None else {"eval_dataset": functools.partial(Fixed, 37), "eval_steps": every}
    trainer = layout.trainer(seeded(Net), directory, save_strategy="no", max_steps=5, callbacks=[diary], **options)
    trainer.train()
    reached = digests(local(states(trainer)))
    assert reached.pop("/trainer/evaluated_step") == repr(-1 if every is None else 5)
    return [(step, loss.hex()) for step, loss in trainer.history], reached, diary.metrics


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"{layout}-{layout.settings.get('schedule', '')}")
def test_training_is_the_same_to_the_bit_with_and_without_evaluations(tmp_path, layout):
    without = layout.run(lambda: trained(layout, tmp_path, every=None))
    evaluated = layout.run(lambda: trained(layout, tmp_path, every=1))
    assert [rank[:2] for rank in evaluated] == [rank[:2] for rank in without]
    metrics = evaluated[0][2]
    assert [step for step, _ in metrics] == [1, 2, 3, 4, 5]
    assert all(rank[2] == metrics for rank in evaluated), "all ranks are told the same"


def loss_of(model: nn.Module, dataset: Any, num_samples: int) -> float:
    """The mean loss over the first samples, one by one."""
    model.eval()
    with torch.no_grad():
        items = [torch.utils.data.default_collate([dataset[index]]) for index in range(num_samples)]
        return float(torch.stack([model(item) for item in items]).mean())


@pytest.mark.parametrize("num_samples", [1, 2, 5, 37])
@pytest.mark.parametrize("layout", LAYOUTS[:6], ids=str)
def test_the_loss_is_the_mean_over_all_samples_however_they_are_dealt_out(tmp_path, layout, num_samples):
    expected = loss_of(seeded(Net), Fixed(num_samples), num_samples)

    def case() -> dict[str, float]:
        return layout.trainer(seeded(Net), tmp_path, eval_dataset=Fixed(num_samples)).evaluate()

    for metrics in layout.run(case):
        assert metrics == {"eval_loss": pytest.approx(expected, rel=1e-5)}


@pytest.mark.parametrize("layout", LAYOUTS[6:], ids=lambda layout: f"{layout}-{layout.settings.get('schedule', '')}")
def test_a_pipeline_evaluates_the_whole_steps_that_there_are(tmp_path, layout):
    size = 32  # a step of all data-parallel ranks takes so many samples
    expected = loss_of(seeded(Net), Fixed(64), 2 * size)

    def case() -> dict[str, float]:
        return layout.trainer(seeded(Net), tmp_path, eval_dataset=Fixed(2 * size + 5)).evaluate()

    for metrics in layout.run(case):
        assert metrics == {"eval_loss": pytest.approx(expected, rel=1e-5)}


def test_other_sizes_are_refused_where_stages_exchange_tensors_of_one_size(tmp_path):
    layout = Layout("pipeline", {"pp": 2})

    def case() -> Any:
        return layout.trainer(seeded(Net), tmp_path, eval_dataset=Fixed(64), per_device_eval_batch_size=1).evaluate()

    for error in errors(layout.outcomes(case)):
        assert "per_device_eval_batch_size must be that of training, or None" in error.message


@pytest.mark.parametrize("layout", [Layout("pipeline", {"pp": 2}), Layout("hybrid", {"dp": 1, "pp": 2})], ids=str)
@pytest.mark.parametrize("random", ["training", "evaluation"])
@pytest.mark.parametrize("first", ["training", "evaluation"])
def test_stages_that_read_other_samples_are_refused_whatever_came_before(tmp_path, layout, random, first):
    """Data that draws random numbers is another on each stage, of which the first reads inputs and the last targets."""
    data = {name: Sentences() if name == random else SeededItems(Sentences()) for name in ("training", "evaluation")}

    def case() -> None:
        trainer = layout.trainer(
            seeded(Net), tmp_path, data["training"], eval_dataset=data["evaluation"], eval_steps=2, max_steps=2
        )
        if first == "evaluation":
            trainer.evaluate()
        trainer.train()

    for error in errors(layout.outcomes(case)):
        assert "read another batch than rank 0" in error.message


def test_at_most_so_many_batches_of_each_rank_are_read(tmp_path):
    read: list[int] = []

    class Counted(Noise):
        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            read.append(index)
            return super().__getitem__(index)

    trainer_of(Trainer, tmp_path, eval_dataset=Counted(100), max_eval_batches=3).evaluate()
    assert read == list(range(12))
    read.clear()
    trainer_of(Trainer, tmp_path, eval_dataset=Counted(10), max_eval_batches=None).evaluate()
    assert read == list(range(10))


def test_the_dataset_is_made_at_the_first_evaluation_and_once(tmp_path):
    made: list[int] = []

    def make() -> Noise:
        made.append(trainer.progress.step)
        return Noise(8)

    trainer = trainer_of(Trainer, tmp_path, max_steps=9, eval_steps=3, eval_dataset=make)
    trainer.train()
    assert made == [3]


@pytest.mark.parametrize(
    ("dataset", "problem"),
    [
        ([], "the evaluation dataset has 0 samples"),
        (DataLoader(Noise(8)), "give a dataset with __len__ and __getitem__"),
    ],
    ids=["empty", "loader"],
)
def test_data_that_nothing_can_be_evaluated_on_is_refused_before_the_first_step(tmp_path, dataset, problem):
    trainer = trainer_of(Trainer, tmp_path, eval_steps=3, eval_dataset=dataset)
    with pytest.raises(RankFailed, match=problem):
        trainer.train()
    assert trainer.progress.step == 0
    assert trainer_of(Trainer, tmp_path, eval_strategy="no", eval_dataset=dataset).train().steps > 0  # it is not needed


def test_without_a_dataset_nothing_is_evaluated(tmp_path):
    diary = Diary()
    trainer_of(Trainer, tmp_path, eval_steps=1, eval_on_save=True, callbacks=[diary]).train()
    assert not diary.of("on_evaluate")


@pytest.mark.parametrize("kind", [DDPTrainer, FSDPTrainer])
def test_where_one_rank_has_no_data_to_evaluate_on_all_ranks_are_told(tmp_path, kind):
    def case(rank: int, world_size: int) -> Any:
        def make() -> Noise:
            if rank == 1:
                raise FileNotFoundError("data/val.jsonl")
            return Noise(8)

        trainer_of(kind, tmp_path, eval_steps=2, eval_dataset=make).train()

    first, second = (error.message for error in errors(run_ranks(2, case)))
    assert first == second == "loading the evaluation data failed on rank 1: FileNotFoundError: data/val.jsonl"


def test_metrics_of_ones_own_are_averaged_over_samples_and_named(tmp_path):
    def means(model: nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, Any]:
        return {"first": batch["x"][:, 0].mean(), "eval_size": float(len(batch["x"]))}

    def case(rank: int, world_size: int) -> Any:
        return trainer_of(DDPTrainer, tmp_path, eval_dataset=Noise(5), compute_metrics=means).evaluate()

    dataset = Noise(5)
    first = sum(float(dataset[index]["x"][0]) for index in range(5)) / 5
    found = same_on_all(run_ranks(2, case))
    assert found == {"eval_first": pytest.approx(first), "eval_size": pytest.approx((2 * 2 + 3 * 3) / 5)}


@pytest.mark.parametrize(
    ("found", "problem"),
    [
        (None, "an evaluation step gave None, a NoneType; return the means over the batch by name"),
        (0.5, "an evaluation step gave 0.5, a float; return the means over the batch by name"),
        ({"loss": None}, "the metric 'loss' of a batch is None, a NoneType; give its mean over the batch, one number"),
        ({"loss": "0.5"}, "the metric 'loss' of a batch is '0.5', a str; give its mean over the batch, one number"),
        ({"loss": torch.ones(2)}, "the metric 'loss' of a batch is tensor([1., 1.]), a Tensor; give its mean"),
        ({"loss": 1j}, "the metric 'loss' of a batch is 1j, a complex; give its mean over the batch, one number"),
        ({1: 0.5}, "a metric is called 1, a int; give it a name that is a string"),
        ({"loss": 1.0, "eval_loss": 2.0}, "two metrics of a batch are called 'eval_loss'"),
    ],
    ids=repr,
)
def test_metrics_that_are_no_means_are_refused(tmp_path, found, problem):
    trainer = trainer_of(Trainer, tmp_path, eval_dataset=Noise(8), compute_metrics=lambda model, batch: found)
    with pytest.raises((TypeError, ValueError), match=re.escape(problem)):
        trainer.evaluate()


def test_a_metric_of_some_batches_is_refused_rather_than_averaged_over_all(tmp_path):
    names = iter([["loss", "f1"], ["loss"]])
    trainer = trainer_of(
        Trainer,
        tmp_path,
        eval_dataset=Noise(8),
        compute_metrics=lambda model, batch: dict.fromkeys(next(names), 1.0),
    )
    with pytest.raises(ValueError, match="some batches have the metric eval_f1 and some have not"):
        trainer.evaluate()


@pytest.mark.parametrize(
    "metrics", [[{"acc": 1.0}, {"f1": 0.0}], [{"acc": 1.0}, {"acc": 1.0, "f1": 0.0}]], ids=["other", "more"]
)
def test_metrics_with_other_names_on_another_rank_are_refused_on_all_rather_than_added(tmp_path, metrics):
    def case(rank: int, world_size: int) -> Any:
        trainer_of(
            DDPTrainer, tmp_path, eval_dataset=Noise(8), compute_metrics=lambda model, batch: metrics[rank]
        ).evaluate()

    for error in errors(run_ranks(2, case)):
        assert "and another rank has others; give the same ones on all ranks" in error.message


def test_what_an_evaluation_of_ones_own_finds_is_noted_in_the_checkpoint(tmp_path):
    class Judge(Trainer):
        def evaluate(self) -> dict[str, float]:
            return {"eval_loss": 0.5}

    trainer_of(Judge, tmp_path, max_steps=4, eval_dataset=Noise(8), eval_on_save=True).train()
    assert catalog.scan(tmp_path).checkpoints[0].manifest.metrics["eval_loss"] == 0.5


def test_datasets_of_other_lengths_are_refused_on_all_ranks(tmp_path):
    def case(rank: int, world_size: int) -> Any:
        trainer_of(DDPTrainer, tmp_path, eval_steps=2, eval_dataset=Noise(8 + rank)).train()

    for error in errors(run_ranks(2, case)):
        assert error.message == "len(eval_dataset) is 8 on rank 0 and 9 on rank 1; it must be the same on all ranks"


def test_modules_that_were_frozen_in_evaluation_mode_stay_so(tmp_path):
    def freeze(trainer: Trainer) -> None:
        trainer.model.layers[1].eval()

    trainer = trainer_of(Trainer, tmp_path, max_steps=4, eval_steps=1, eval_dataset=Noise(8), on_step_end=[freeze])
    trainer.train()
    modes = {name: module.training for name, module in trainer.model.named_modules()}
    assert modes == {name: name != "layers.1" for name in modes}


@pytest.mark.parametrize("kind", ["Trainer", "DDPTrainer", "AccelTrainer"])
def test_batch_statistics_and_dropout_of_training_are_not_touched(tmp_path, kind):
    def case(rank: int, world_size: int) -> Any:
        found = []
        for steps in (100, 1):
            trainer = trainer_of(
                getattr(trainers, kind),
                tmp_path,
                save_strategy="no",
                eval_steps=steps,
                eval_dataset=Noise(9),
                device="cpu",
            )
            trainer.train()
            found.append({name: value.tolist() for name, value in trainer.model.state_dict().items()})
        return found

    for without, evaluated in values(run_ranks(1 if kind == "Trainer" else 2, case)):
        assert evaluated == without


def test_what_an_evaluation_draws_is_the_same_each_time(tmp_path):
    def noisy(model: nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, Any]:
        return {"noise": torch.rand(())}

    trainer = trainer_of(Trainer, tmp_path, eval_dataset=Noise(8), compute_metrics=noisy)
    assert trainer.evaluate() == trainer.evaluate()


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("num_samples", [1, 3, 4, 7, 16, 23])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_each_sample_counts_once(num_samples: int, world_size: int, batch_size: int):
    counts = [0] * num_samples

    def collate(items: list[int]) -> list[int]:
        return items

    lengths = set()
    for rank in range(world_size):
        batches = EvaluationBatches(
            range(num_samples), batch_size, rank=rank, world_size=world_size, max_batches=None, collate_fn=collate
        )
        found = list(batches)
        lengths.add(len(found))
        for items, weight in found:
            assert weight in (0, len(items))
            for item in items[:weight]:
                counts[item] += 1
    assert counts == [1] * num_samples
    assert len(lengths) == 1, "every rank has as many batches, or collectives would not meet"
