"""AccelTrainer: accelerate underneath, and a run that died and was resumed is the run that was not disturbed."""

import math
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache, partial
from itertools import pairwise
from typing import Any

import accelerate
import pytest
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import (
    DataLoaderConfiguration,
    DDPCommunicationHookType,
    DistributedDataParallelKwargs,
    DistributedType,
    ParallelismConfig,
)
from torch import nn
from torch.amp import GradScaler
from torch.utils.data import DataLoader

from forgather_ckpt import trainers
from forgather_ckpt.data.position import GlobalPosition
from forgather_ckpt.data.sampler import epoch_order
from forgather_ckpt.errors import CheckpointError
from forgather_ckpt.manifest import CheckpointManifest
from forgather_ckpt.trainers import DDPTrainer, Trainer
from forgather_ckpt.trainers.accel import AccelTrainer
from tests.ranks import Outcome, errors, run_ranks, values
from tests.test_resume import (
    Kind,
    Life,
    Stop,
    assert_continues,
    at_step,
    fail,
    in_order_of_reading,
    kill,
    kill_in_state_dict,
    live,
    run,
    stop,
)
from tests.test_trainers import Normalised, Points, make_args, make_model, same_parameters, saves
from tests.torchrun import torchrun

ONE_THREAD = {"OMP_NUM_THREADS": "1"}  # as torchrun sets it; accelerate asks for it, with a warning

Accelerator = partial(accelerate.Accelerator, cpu=True)


class HalfPrecisionOnCPU(accelerate.Accelerator):
    """accelerate scales losses on GPUs only; torch's scaler, and all that accelerate does with one, work on a CPU too."""

    def __init__(self) -> None:
        super().__init__(cpu=True, mixed_precision="fp16")
        self.native_amp = True
        self.scaler = GradScaler("cpu")


class HalfTrainer(AccelTrainer):
    """An AccelTrainer that trains in fp16 on a CPU."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, accelerator=HalfPrecisionOnCPU(), **options)


def start(kind: Kind, case: Callable[[int, int], Any], **options: Any) -> list[Outcome]:
    return run(kind, case, env=ONE_THREAD, **options)


def start_alone(case: Callable[[], Any]) -> Any:
    """What the case returns in a process that no launcher started."""

    def as_started_by_python(rank: int, world_size: int) -> Any:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
            del os.environ[name]
        return case()

    [value] = values(run_ranks(1, as_started_by_python, backend=None, env=ONE_THREAD))
    return value


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Kind], list[Life]]:
    """What every rank comes to in a run of this kind that nothing disturbs."""

    @cache
    def of(kind: Kind) -> list[Life]:
        directory = tmp_path_factory.mktemp("undisturbed")
        return values(start(kind, lambda rank, world_size: live(kind, directory)))

    return of


# ---- resume


WORKERS, EACH_BATCH = ("dataloader_num_workers", 2), ("gradient_accumulation_steps", 1)
BF16, FP16 = ("bf16", True), ("fp16", True)
DISPATCH = ("dispatch_batches", True)

KINDS = [
    Kind(AccelTrainer, 1),
    Kind(AccelTrainer, 1, (BF16, EACH_BATCH, WORKERS)),
    Kind(HalfTrainer, 1, (FP16,)),
    Kind(AccelTrainer, 2, (WORKERS,)),
    Kind(AccelTrainer, 2, (DISPATCH,)),
    Kind(AccelTrainer, 2, (BF16, EACH_BATCH)),
    Kind(HalfTrainer, 2, (FP16, WORKERS)),
    Kind(AccelTrainer, 4, (EACH_BATCH,)),
    Kind(AccelTrainer, 4, (BF16, WORKERS)),
    Kind(HalfTrainer, 4, (FP16, EACH_BATCH)),
]
GPU_KINDS = [Kind(AccelTrainer, 1, (("device", "cuda"), *settings)) for settings in ((), (BF16,), (FP16,))]


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    "kind", [*KINDS, *(pytest.param(kind, marks=pytest.mark.gpu) for kind in GPU_KINDS)], ids=lambda kind: kind.name
)
def test_an_exception_in_a_step_ends_all_ranks_and_the_run_goes_on_exactly(tmp_path, undisturbed, kind):
    def first_life(rank: int, world_size: int) -> None:
        live(kind, tmp_path, hooks=(at_step(6, fail),) if rank == world_size - 1 else ())

    outcomes = start(kind, first_life)
    assert all(outcome.error is not None for outcome in outcomes)
    resumed = values(start(kind, lambda rank, world_size: live(kind, tmp_path)))
    assert_continues(resumed, undisturbed(kind), from_step=4)


@pytest.mark.multiprocess
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_a_killed_rank_ends_all_and_the_run_goes_on_exactly(tmp_path, undisturbed, kind):
    def first_life(rank: int, world_size: int) -> None:
        live(kind, tmp_path, hooks=(at_step(9, kill),) if rank == 0 else ())

    outcomes = start(kind, first_life, expect_dead=[0])
    assert [outcome.is_dead or outcome.error is not None for outcome in outcomes] == [True] * kind.world_size
    resumed = values(start(kind, lambda rank, world_size: live(kind, tmp_path)))
    assert_continues(resumed, undisturbed(kind), from_step=8)


@pytest.mark.multiprocess
def test_a_rank_killed_in_mid_save_leaves_the_checkpoint_before(tmp_path, undisturbed):
    kind = Kind(AccelTrainer, 2, (WORKERS,))

    def first_life(rank: int, world_size: int) -> None:
        live(kind, tmp_path, hooks=(kill_in_state_dict,) if rank == 1 else ())

    told = start(kind, first_life, expect_dead=[1])[0].error
    assert told is not None and CheckpointError.__name__ in told.mro
    resumed = values(start(kind, lambda rank, world_size: live(kind, tmp_path)))
    assert_continues(resumed, undisturbed(kind), from_step=4)


@pytest.mark.multiprocess
def test_on_two_nodes_a_run_goes_on_as_on_one(tmp_path, undisturbed):
    kind = Kind(AccelTrainer, 4, (EACH_BATCH,))

    def first_life(rank: int, world_size: int) -> None:
        with pytest.raises(Stop):
            live(kind, tmp_path, hooks=(at_step(5, stop),))

    values(start(kind, first_life, nodes=[2, 2]))
    assert CheckpointManifest.load(tmp_path / "checkpoint-4").topology.nodes == ((0, 1), (2, 3))
    resumed = values(start(kind, lambda rank, world_size: live(kind, tmp_path), nodes=[1, 3]))
    assert_continues(resumed, undisturbed(kind), from_step=4)


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("world_size", "settings"),
    [(1, ()), (2, ()), (4, ()), (1, (BF16,)), (2, (FP16,)), (2, (DISPATCH,))],
    ids=str,
)
@pytest.mark.parametrize("accel_first", [True, False])
def test_other_trainers_go_on_from_its_checkpoints_to_the_same_bits_and_it_from_theirs(
    tmp_path, undisturbed, accel_first, world_size, settings
):
    accel = Kind(HalfTrainer if FP16 in settings else AccelTrainer, world_size, settings)
    other = Kind(Trainer if world_size == 1 else DDPTrainer, world_size, settings)
    before, after = (accel, other) if accel_first else (other, accel)

    def first_life(rank: int, world_size: int) -> None:
        with pytest.raises(Stop):
            live(before, tmp_path, hooks=(at_step(4, stop),), save_steps=3)

    values(start(before, first_life))
    resumed = values(start(after, lambda rank, world_size: live(after, tmp_path)))
    assert_continues(resumed, undisturbed(before), from_step=3)


@pytest.mark.multiprocess
@pytest.mark.parametrize("settings", [(WORKERS,), (DISPATCH,)], ids=str)
def test_other_world_sizes_neither_repeat_nor_leave_out_a_sample(tmp_path, settings):
    def lives_at(world_size: int, step: int) -> list[Life]:
        kind = Kind(AccelTrainer, world_size, settings)
        return values(start(kind, lambda rank, world_size: live(kind, tmp_path, max_steps=step)))

    read = []
    for step, world_size in enumerate([2, 4, 1], start=1):
        lives = lives_at(world_size, step)
        assert all(life.first_step == step for life in lives)
        read += in_order_of_reading([life.batches for life in lives])
    assert len(read) == (2 + 4 + 1) * 2 * 3
    assert read == epoch_order(GlobalPosition(53, seed=42)).tolist()[: len(read)]


@pytest.mark.multiprocess
def test_b39_the_place_in_the_data_is_saved_for_each_rank_and_taken_up(tmp_path):
    kind = Kind(AccelTrainer, 2, (WORKERS, EACH_BATCH))

    def batches_until(step: int) -> list[list[list[int]]]:
        lives = values(start(kind, lambda rank, world_size: live(kind, tmp_path, max_steps=step)))
        return [life.batches for life in lives]

    first = batches_until(3)
    saved = CheckpointManifest.load(tmp_path / "checkpoint-3").components["dataset"]
    assert saved.pattern.value == "per_rank"
    assert len(saved.entries) == 2 and all(entry.num_items > 0 for entry in saved.entries.values())
    second = batches_until(8)
    assert [len(batches) for batches in second] == [5, 5]
    order = epoch_order(GlobalPosition(53, seed=42)).tolist()
    assert in_order_of_reading(first) + in_order_of_reading(second) == order[: 8 * 6]


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("kind", "data_pattern"),
    [
        (Kind(AccelTrainer, 2), "per_rank"),
        (Kind(AccelTrainer, 2, (DISPATCH,)), "global"),
        (Kind(HalfTrainer, 2, (FP16,)), "per_rank"),
    ],
    ids=str,
)
def test_the_manifest_says_how_each_part_is_shared(tmp_path, kind, data_pattern):
    values(start(kind, lambda rank, world_size: live(kind, tmp_path, max_steps=1).first_step))
    manifest = CheckpointManifest.load(tmp_path / "checkpoint-1")
    shared = {key: (saved.pattern.value, saved.validation.level.value) for key, saved in manifest.components.items()}
    scaler = {"scaler": ("replicated", "quick")} if kind.trainer is HalfTrainer else {}
    expected = scaler | {
        "model": ("replicated", "tensor"),
        "optimizer": ("replicated", "quick"),
        "scheduler": ("replicated", "quick"),
        "trainer": ("replicated", "quick"),
        "dataset": (data_pattern, "none"),
        "rng": ("per_rank", "none"),
    }
    assert {key: shared.get(key) for key in expected} == expected


# ---- one step


Reached = tuple[list[tuple[int, float]], dict[str, torch.Tensor]]
"""The losses of a training, and the model that it came to."""

SAVING = {"save_strategy": "steps", "save_steps": 4}


def trained(trainer: Trainer) -> Reached:
    trainer.train()
    return trainer.history, dict(trainer.model.state_dict())


def assert_same(one: Reached, other: Reached) -> None:
    assert one[0] == other[0]
    assert one[1].keys() == other[1].keys()
    assert all(torch.equal(tensor, other[1][name]) for name, tensor in one[1].items())


@pytest.mark.multiprocess
@pytest.mark.parametrize("precision", [{}, {"bf16": True}], ids=str)
def test_a_process_that_no_launcher_started_trains_as_trainer_does(tmp_path, precision):
    # 8 batches an epoch: the third step of each has two of its three micro-batches
    args = make_args(tmp_path, max_steps=7, gradient_accumulation_steps=3, dispatch_batches=True, **precision)

    def case() -> tuple[Reached, bool]:
        return trained(AccelTrainer(make_model(), args, Points())), torch.distributed.is_initialized()

    reached, has_group = start_alone(case)
    assert not has_group
    assert_same(reached, trained(Trainer(make_model(), args, Points())))


@pytest.mark.multiprocess
@pytest.mark.parametrize("world_size", [1, 2])
def test_the_schedule_makes_one_step_an_optimizer_step_at_any_world_size(tmp_path, world_size):
    def case(rank: int, world_size: int) -> list[float]:
        rates = []
        args = make_args(tmp_path, max_steps=4, warmup_steps=2, gradient_accumulation_steps=2)
        hook = lambda trainer: rates.append(trainer.optimizer.param_groups[0]["lr"])  # noqa: E731
        AccelTrainer(make_model(), args, Points(), on_step_end=[hook]).train()
        return rates

    for rates in values(run_ranks(world_size, case, backend=None, env=ONE_THREAD)):
        assert rates == pytest.approx([0.05, 0.1, 0.05, 0.0])


@pytest.mark.multiprocess
def test_gradients_are_exchanged_once_a_step(tmp_path):
    def case(rank: int, world_size: int) -> int:
        exchanges = []

        def counted(state: None, bucket: torch.distributed.GradBucket) -> torch.futures.Future[torch.Tensor]:
            exchanges.append(bucket.index())
            work = torch.distributed.all_reduce(bucket.buffer(), async_op=True)
            return work.get_future().then(lambda done: done.value()[0])

        trainer = AccelTrainer(make_model(), make_args(tmp_path, gradient_accumulation_steps=2), Points())
        trainer.ddp.register_comm_hook(None, counted)
        return trainer.train().steps - len(exchanges)

    assert values(run_ranks(2, case, backend=None, env=ONE_THREAD)) == [0, 0]


@pytest.mark.multiprocess
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
def test_after_an_overflow_neither_weights_nor_schedule_move(tmp_path, fused, max_grad_norm):
    def case(rank: int, world_size: int) -> tuple[bool, int, float]:
        def infinite_once(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
            loss: torch.Tensor = model(**batch)
            return loss * math.inf if trainer.progress.step == 0 and rank == 0 else loss

        model = make_model()
        trainer = HalfTrainer(
            model,
            make_args(tmp_path, fp16=True, max_steps=1, warmup_steps=2, max_grad_norm=max_grad_norm),
            Points(),
            optimizer=torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused),
            compute_loss=infinite_once,
        )
        trainer.train()
        moved = not same_parameters(trainer.model, make_model(), rtol=0, atol=0)
        return moved, trainer.lr_scheduler.last_epoch, trainer.scaler.get_scale()

    assert values(run_ranks(2, case, backend=None, env=ONE_THREAD)) == [(False, 0, 2.0**15)] * 2


@pytest.mark.multiprocess
def test_gradients_are_clipped_to_the_norm(tmp_path):
    def case() -> list[float]:
        model = make_model()
        places = [nn.utils.parameters_to_vector(model.parameters())]
        hook = lambda trainer: places.append(nn.utils.parameters_to_vector(model.parameters()))  # noqa: E731
        args = make_args(tmp_path, fp16=True, max_grad_norm=0.01, max_steps=9, lr_scheduler_type="constant")
        sgd = torch.optim.SGD(model.parameters(), lr=1.0)
        HalfTrainer(model, args, Points(), optimizer=sgd, on_step_end=[hook]).train()
        return [(after - before).norm().item() for before, after in pairwise(places)]

    moves = start_alone(case)
    assert moves[0] == 0.0, "the scale that a scaler begins with is too large for these gradients"
    assert moves[-3:] == pytest.approx([0.01] * 3, rel=1e-3)


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("options", "settings", "as_ddp"),
    [
        ({"mixed_precision": "bf16"}, {}, {"bf16": True}),
        ({"mixed_precision": "bf16"}, {"bf16": True}, {"bf16": True}),
        ({"gradient_accumulation_steps": 2}, {"gradient_accumulation_steps": 2}, {"gradient_accumulation_steps": 2}),
        ({"dynamo_backend": "eager"}, {}, {}),
        ({"kwargs_handlers": [DistributedDataParallelKwargs(static_graph=True)]}, {}, {}),
        ({"kwargs_handlers": [DistributedDataParallelKwargs(find_unused_parameters=True)]}, {}, {}),
    ],
    ids=str,
)
def test_a_given_accelerator_is_used_and_left_as_it_was(tmp_path, options, settings, as_ddp):
    def case(rank: int, world_size: int) -> Reached:
        torch.manual_seed(0)
        accelerator = Accelerator(**options)
        args = make_args(tmp_path / "accel", **SAVING, **settings)
        trainer = AccelTrainer(Normalised(), args, Points(), accelerator=accelerator)
        assert trainer.accelerator is accelerator
        reached = trained(trainer)
        assert accelerator.gradient_accumulation_steps == options.get("gradient_accumulation_steps", 1)
        return reached

    def as_ddp_trainer(rank: int, world_size: int) -> Reached:
        torch.manual_seed(0)
        return trained(DDPTrainer(Normalised(), make_args(tmp_path / "ddp", **SAVING, **as_ddp), Points()))

    expected = values(run_ranks(2, as_ddp_trainer))
    for reached, one in zip(values(run_ranks(2, case, backend=None, env=ONE_THREAD)), expected, strict=True):
        assert_same(reached, one)
    assert saves(tmp_path / "accel") == [(4, "periodic")]


@pytest.mark.multiprocess
def test_the_names_of_a_compiled_model_are_its_own(tmp_path):
    def case(rank: int, world_size: int) -> tuple[list[str], list[tuple[int, float]]]:
        args = make_args(tmp_path, bf16=True)
        trainer = AccelTrainer(torch.compile(make_model(), backend="eager"), args, Points())
        trainer.train()
        model, optimizer = (c.stateful.state_dict() for c in trainer.get_state_components()[:2])
        assert {name.rpartition(".")[0].partition(".")[2] for name in optimizer} == set(model)
        return list(model), trainer.history

    def plain(rank: int, world_size: int) -> list[tuple[int, float]]:
        trainer = AccelTrainer(make_model(), make_args(tmp_path, bf16=True), Points())
        trainer.train()
        return trainer.history

    histories = values(run_ranks(2, plain, backend=None, env=ONE_THREAD))
    names = ["linear.weight", "linear.bias"]
    assert values(run_ranks(2, case, backend=None, env=ONE_THREAD)) == [(names, history) for history in histories]


class WithUnused(nn.Module):
    """A model that has a layer which it does not use."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = Normalised(), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = self.used(x, y)
        return loss


@pytest.mark.multiprocess
@pytest.mark.parametrize("setting", ["static_graph", "find_unused_parameters"])
def test_a_model_may_leave_a_layer_unused_where_the_accelerator_allows_it(tmp_path, setting):
    def case(rank: int, world_size: int) -> int:
        accelerator = Accelerator(kwargs_handlers=[DistributedDataParallelKwargs(**{setting: True})])
        args = make_args(tmp_path, resume_from_checkpoint="auto", **SAVING)
        return AccelTrainer(WithUnused(), args, Points(), accelerator=accelerator).train().steps

    for _ in range(2):
        assert values(run_ranks(2, case, backend=None, env=ONE_THREAD)) == [4, 4]


JOB = """
import sys
from forgather_ckpt.trainers import AccelTrainer
from tests.test_trainers import Points, make_args, make_model

trainer = AccelTrainer(make_model(), make_args(sys.argv[1], save_strategy="epoch", max_steps=3), Points())
result = trainer.train()
if trainer.rank == 0:
    print(f"{trainer.world_size} ranks at step {result.steps}", flush=True)
"""


@pytest.mark.multiprocess
def test_it_runs_under_torchrun_on_two_nodes(tmp_path):
    script, output_dir = tmp_path / "job.py", tmp_path / "run"
    script.write_text(JOB)
    result = torchrun([script, output_dir], nproc=1, nodes=2)
    assert result.returncode == 0, result.output
    assert "2 ranks at step 3" in result.output
    assert CheckpointManifest.load(output_dir / "checkpoint-3").topology.nodes == ((0,), (1,))


# ---- wrong use


def make_trainer(**given: Any) -> AccelTrainer:
    """A trainer of the given parts, the others made here; those of the arguments by their names."""
    parts = {
        name: given.pop(name)
        for name in ("model", "dataset", "accelerator", "optimizer", "lr_scheduler")
        if name in given
    }
    model, dataset = parts.pop("model", None) or make_model(), parts.pop("dataset", None) or Points()
    return AccelTrainer(model, make_args("runs", **given), dataset, **parts)


def with_prepared_optimizer() -> AccelTrainer:
    model, accelerator = make_model(), Accelerator()
    optimizer = accelerator.prepare(torch.optim.SGD(model.parameters()))
    return make_trainer(model=model, optimizer=optimizer, accelerator=accelerator)


def with_prepared_scheduler() -> AccelTrainer:
    model, accelerator = make_model(), Accelerator()
    optimizer = torch.optim.SGD(model.parameters())
    scheduler = accelerator.prepare_scheduler(torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5))
    return make_trainer(model=model, optimizer=optimizer, lr_scheduler=scheduler, accelerator=accelerator)


def with_prepared_model() -> AccelTrainer:
    accelerator = Accelerator()
    return make_trainer(model=accelerator.prepare(make_model()), accelerator=accelerator)


def with_lbfgs() -> AccelTrainer:
    model = make_model()
    return make_trainer(model=model, optimizer=torch.optim.LBFGS(model.parameters()))


def as_if(**state: Any) -> AccelTrainer:
    """With an Accelerator as there may be one where there is other hardware."""
    accelerator = Accelerator()
    AcceleratorState().__dict__.update(state)
    return make_trainer(accelerator=accelerator)


def with_hook(hook: DDPCommunicationHookType) -> AccelTrainer:
    return make_trainer(accelerator=Accelerator(kwargs_handlers=[DistributedDataParallelKwargs(comm_hook=hook)]))


def with_loaders(**options: Any) -> AccelTrainer:
    return make_trainer(accelerator=Accelerator(dataloader_config=DataLoaderConfiguration(**options)))


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("case", "problem"),
    [
        (
            lambda: make_trainer(fp16=True),
            "on cpu, accelerate trains in full precision where fp16 is asked for: write bf16=True",
        ),
        (lambda: make_trainer(accelerator=Accelerator(mixed_precision="fp16")), "on cpu, accelerate trains in full"),
        (
            lambda: make_trainer(bf16=True, accelerator=Accelerator()),
            "bf16=True, but the Accelerator has mixed_precision='no'",
        ),
        (
            lambda: make_trainer(fp16=True, accelerator=Accelerator(mixed_precision="bf16")),
            "has mixed_precision='bf16': say",
        ),
        (
            lambda: make_trainer(accelerator=Accelerator(gradient_accumulation_steps=4)),
            "the Accelerator has gradient_accumulation_steps=4, the arguments have 1: say it in the arguments alone",
        ),
        (lambda: with_loaders(dispatch_batches=True), r"write TrainingArguments\(dispatch_batches=True\)"),
        (lambda: with_loaders(split_batches=True), "per_device_train_batch_size= for the share of one process"),
        (lambda: make_trainer(device="meta"), "device='meta', but the Accelerator has 'cpu': leave device= out"),
        (lambda: make_trainer(dataset=DataLoader(Points())), "train_dataset= is a DataLoader: give its dataset"),
        (with_prepared_optimizer, "optimizer= is prepared already: give the one inside, optimizer.optimizer"),
        (with_prepared_scheduler, "would make one step for each process: give the one inside, lr_scheduler.scheduler"),
        (with_prepared_model, "in DistributedDataParallel already.*give the module inside, model.module"),
        (with_lbfgs, "needs a closure"),
        (
            lambda: with_hook(DDPCommunicationHookType.POWER_SGD),
            "comm_hook=power_sgd carries errors.*use the hooks fp16",
        ),
        (lambda: with_hook(DDPCommunicationHookType.BATCHED_POWER_SGD), "comm_hook=batched_power_sgd carries errors"),
        (lambda: as_if(_mixed_precision="fp8"), 'fp8 keeps scales that are not saved.*mixed_precision="bf16"'),
        (
            lambda: as_if(distributed_type=DistributedType.FSDP),
            "this Accelerator is for FSDP: make it without a plugin",
        ),
        (lambda: as_if(distributed_type=DistributedType.DEEPSPEED), "this Accelerator is for DEEPSPEED"),
        (
            lambda: make_trainer(accelerator=Accelerator(parallelism_config=ParallelismConfig(dp_replicate_size=1))),
            "make the Accelerator without parallelism_config=",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_use_is_refused_with_what_to_do(case, problem):
    def refused(rank: int, world_size: int) -> None:
        with pytest.raises((TypeError, ValueError), match=problem):
            case()

    values(run_ranks(1, refused, backend=None, env=ONE_THREAD))


@pytest.mark.multiprocess
@pytest.mark.parametrize("backend", ["gloo", None])
def test_processes_that_accelerate_does_not_know_of_each_other_are_refused(backend):
    """Without a GPU and without cpu=True, it has each of them train for itself."""

    def lone(rank: int, world_size: int) -> AccelTrainer:
        return make_trainer(accelerator=accelerate.Accelerator())

    for error in errors(run_ranks(2, lone, backend=backend, env=ONE_THREAD)):
        assert error.type_name == "RuntimeError"
        assert "this is one of 2 processes, and accelerate found 1: start them with torchrun" in error.message


# ---- an extra


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("import forgather_ckpt.trainers; print('accelerate' in sys.modules)", "False"),
        (
            "from forgather_ckpt.trainers import AccelTrainer; print(AccelTrainer.__module__)",
            "forgather_ckpt.trainers.accel",
        ),
        ("sys.modules['accelerate'] = None; from forgather_ckpt.trainers import *; print(Trainer.__name__)", "Trainer"),
        (
            "sys.modules['accelerate'] = None\n"
            "try: from forgather_ckpt.trainers import AccelTrainer\n"
            "except ImportError as err: print(err)",
            "pip install forgather-ckpt[accelerate]",
        ),
    ],
    ids=[
        "it is imported when it is used",
        "it is found",
        "all other names need no accelerate",
        "it says what to install",
    ],
)
def test_accelerate_is_needed_by_accel_trainer_alone(code, expected):
    done = subprocess.run([sys.executable, "-c", f"import sys; {code}"], capture_output=True, text=True, timeout=100)
    assert expected in done.stdout, done.stderr


def test_an_unknown_trainer_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'AccelTrainers'"):
        _ = trainers.AccelTrainers
    assert "AccelTrainer" in dir(trainers)
