"""What the replication check finds, on which ranks, what it says of it, and what it sends, on real ranks.

One set of ranks goes through many states. A level is asked of `validate_replication`, or declared and asked by a save.
"""

from __future__ import annotations

import json
import struct
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from forgather_ckpt import (
    CheckpointCoordinator,
    CheckpointManifest,
    NamedOptimizer,
    SharingPattern,
    StateComponent,
    digests,
    mismatch,
)
from forgather_ckpt.comm import Comm
from forgather_ckpt.differences import ItemDifference
from forgather_ckpt.digests import Blocks
from forgather_ckpt.errors import ReplicaMismatch
from tests.components import Box, Trainer, is_same, listing, refusal, the_same
from tests.ranks import run_ranks, values
from tests.states import float_of, tensor_of

pytestmark = pytest.mark.multiprocess

REPLICATED, PER_GROUP, PER_RANK = SharingPattern.REPLICATED, SharingPattern.PER_GROUP, SharingPattern.PER_RANK
GLOBAL = SharingPattern.GLOBAL
LEVELS = ("quick", "tensor", "full")
BLOCK_BYTES = 4 << 20


def raw(tensor: torch.Tensor) -> torch.Tensor:
    """The memory of a contiguous tensor of any type and shape as 1-D uint8."""
    start = tensor.storage_offset() * tensor.element_size()
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage(), start, (tensor.nbytes,))


def flip(tensor: torch.Tensor, byte: int, bit: int) -> None:
    raw(tensor)[byte] ^= 0 if tensor.dtype is torch.bool and bit else 1 << bit


def verdicts(reports: Any) -> dict[str, Any]:
    """By component: majority, minority and differing names of each set of ranks that is not alike."""
    return {
        key: [(one.majority, one.minority, [item.name for item in one.items]) for one in report.differences]
        for key, report in reports.items()
    }


def between(majority: list[int] | tuple[int, ...], minority: list[int] | tuple[int, ...]) -> str:
    """How an error names the two sides, where neither has a gap that a dash would hide."""

    def side(ranks: Any) -> str:
        runs: list[list[int]] = []
        for rank in ranks:
            if runs and runs[-1][-1] == rank - 1:
                runs[-1].append(rank)
            else:
                runs.append([rank])
        text = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
        return f"rank {text}" if len(ranks) == 1 else f"ranks [{text}]"

    return f"differs between {side(majority)} and {side(minority)}"


# ---- one bit of every kind of leaf


class Model(nn.Module):
    """A leaf of every kind that models have."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.linear = nn.Linear(6, 5)
        self.norm = nn.LayerNorm(5)
        self.batch_norm = nn.BatchNorm1d(5)
        self.bf16 = nn.Linear(5, 3).to(torch.bfloat16)
        self.register_buffer("fp16", tensor_of("float16", (3, 5)))
        self.register_buffer("e4m3fn", tensor_of("float8_e4m3fn", (9,)))
        self.register_buffer("e5m2", tensor_of("float8_e5m2", (9,)))
        self.register_buffer("spectrum", tensor_of("complex64", (2, 3)))
        self.register_buffer("mask", tensor_of("bool", (7,)))
        self.register_buffer("odd", tensor_of("uint8", (4099,)))
        self.register_buffer("lines", tensor_of("float32", (4, 3)).t())


def model_and_optimizer() -> tuple[Model, NamedOptimizer]:
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = Model()
    inner = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(2):
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        inner.step()
    return model, NamedOptimizer(inner, [model])


LEAVES = [
    *(("model", f"{name}.weight", -1) for name in ("embedding", "linear", "norm", "batch_norm", "bf16")),
    *(("model", f"batch_norm.{name}", 0) for name in ("running_mean", "running_var", "num_batches_tracked")),
    *(("model", name, 2) for name in ("fp16", "e4m3fn", "e5m2", "spectrum", "mask")),
    *(("model", "odd", byte) for byte in (0, -1)),
    ("model", "lines", 17),
    *(("optimizer", f"state.linear.weight.{name}", 5) for name in ("exp_avg", "exp_avg_sq", "step")),
    ("optimizer", "state.bf16.bias.exp_avg", 0),
    ("optimizer", "groups.linear.weight.lr", None),
    ("optimizer", "groups.bf16.bias.betas", None),
]
"""Component, item and the byte in which a bit is flipped; None: a value, whose float gets its last bit flipped."""


class Flipped:
    """A stateful, one leaf of whose state has another bit while `target` is set."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.target: tuple[str, int | None, int] | None = None

    def state_dict(self) -> dict[str, Any]:
        state = dict(self.inner.state_dict())
        if self.target is not None:
            name, byte, bit = self.target
            if byte is None:
                state[name] = self._other_value(state[name])
            else:
                copy = state[name].detach().contiguous().clone()  # in another layout, where it was not contiguous
                flip(copy, byte % copy.nbytes, bit)
                state[name] = copy
        return state

    @staticmethod
    def _other_value(value: Any) -> Any:
        if isinstance(value, tuple):
            return (*value[:-1], Flipped._other_value(value[-1]))
        [bits] = struct.unpack(">Q", struct.pack(">d", value))
        return float_of(bits ^ 1)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.inner.load_state_dict(state)


@pytest.mark.parametrize("world_size", [2, 3, 4, 8])
def test_one_flipped_bit_in_any_kind_of_leaf_on_any_rank_is_named_at_every_level(world_size: int, tmp_path: Path):
    """With 2 ranks the whole table; with more, every leaf, level and rank, but not all of them together."""
    table = [
        (leaf, level, rank, (3 * number + turn) % 8)
        for number, leaf in enumerate(LEAVES)
        for turn, level in enumerate(LEVELS)
        for rank in (range(world_size) if world_size == 2 else [(number + turn) % world_size])
    ]
    assert {leaf for leaf, *_ in table} == set(LEAVES)
    assert {(level, rank) for _, level, rank, _ in table} == {
        (one, rank) for one in LEVELS for rank in range(world_size)
    }

    def case(rank: int, world_size: int) -> list[Any]:
        parts = dict(zip(("model", "optimizer"), map(Flipped, model_and_optimizer()), strict=True))
        trainer = Trainer([])
        results: list[Any] = []
        with CheckpointCoordinator(trainer, tmp_path, timeout_seconds=600) as coordinator:
            for number, ((key, name, byte), level, culprit, bit) in enumerate(table):
                trainer.components = [
                    StateComponent(key, part, REPLICATED, validation_level=level) for key, part in parts.items()
                ]
                is_mask = name == "mask"
                parts[key].target = (name, byte, 0 if is_mask else bit) if rank == culprit else None
                error = refusal(lambda: coordinator.save_checkpoint(1))
                left = [left for left in listing(tmp_path) if not left.startswith("replication-report")]
                parts[key].target = None
                after = coordinator.save_checkpoint(0).name if number % (12 * world_size) == 0 else None
                results.append((error, left in ([], ["checkpoint-0"]), after))
            results.append(verdicts(coordinator.validate_replication("full")))
            coordinator.save_checkpoint(2)
        return results

    *results, equal = the_same(values(run_ranks(world_size, case, timeout=110)))
    assert equal == {"model": [], "optimizer": []}
    assert [name for name in listing(tmp_path) if name.startswith("checkpoint-")] == ["checkpoint-0", "checkpoint-2"]
    for ((key, name, byte), level, culprit, _), ((kind, message), is_clean, after) in zip(table, results, strict=True):
        minority = [1] if world_size == 2 else [culprit]  # in a tie, rank 0's counts
        majority = [rank for rank in range(world_size) if rank not in minority]
        where = (name, level, culprit)
        assert (kind, is_clean, after) == ("ReplicaMismatch", True, after and "checkpoint-0"), where
        assert message.startswith(f"{key!r} {between(majority, minority)} at {name!r}"), (where, message)
        assert "; expected identical state in all holders" in message
        assert "more item" not in message, (where, message)
        assert (byte is None) == (" against " in message), (where, message)


# ---- values and tensors that are nearly alike


def bits_of(*patterns: int) -> torch.Tensor:
    return torch.tensor(patterns, dtype=torch.int64).to(torch.int32).view(torch.float32)


BASE = torch.arange(24, dtype=torch.float32).reshape(4, 6)
NAN, OTHER_NAN = float_of(0x7FF8_0000_0000_0000), float_of(0x7FF8_DEAD_BEEF_0001)


def changed(tensor: torch.Tensor, *changes: tuple[int, int]) -> torch.Tensor:
    copy = tensor.clone()
    for place, value in changes:
        copy.view(-1)[place] = value
    return copy


ODD = tensor_of("uint8", (4099,))
WORDS = torch.arange(1, 5001, dtype=torch.int32)

DIFFERENT: dict[str, tuple[Any, Any]] = {
    "int and float": (1, 1.0),
    "bool and int": (True, 1),
    "zeros": (0.0, -0.0),
    "complex zeros": (0j, complex(0.0, -0.0)),
    "NaNs": (NAN, OTHER_NAN),
    "None and False": (None, False),
    "tuple and list": ((1, 2), [1, 2]),
    "nested tuple and list": ([1, (2, 3)], [1, [2, 3]]),
    "text and bytes": ("a", b"a"),
    "array types": (np.arange(3, dtype=np.int64), np.arange(3, dtype=np.int32)),
    "array far away": (np.zeros(5000), np.r_[np.zeros(4999), 1e-300]),
    "numpy and python": (np.float64(0.5), 0.5),
    "sets": ({1, 2}, frozenset({1, 2})),
    "large ints": (2**80, 2**80 + 1),
    "float's last bit": (0.1, float_of(0x3FB999999999999B)),
    "tensor zeros": (torch.zeros(3), changed(torch.zeros(3), (1, -0.0))),
    "tensor NaNs": (bits_of(0x7FC00000), bits_of(0x7FC00001)),
    "scalar tensor": (torch.tensor(3), torch.tensor(4)),
    "swapped": (WORDS, changed(WORDS, (10, 21), (20, 11))),
    "swapped far": (WORDS, changed(WORDS, (0, 1025), (1024, 1))),
    "swapped rows": (WORDS, torch.cat([WORDS[1024:2048], WORDS[:1024], WORDS[2048:]])),
    "cancel in a sum": (WORDS, changed(WORDS, (10, 11 + 7), (4000, 4001 - 7))),
    "cancel in an XOR": (WORDS, changed(WORDS, (10, 11 ^ 64), (4000, 4001 ^ 64))),
    "last odd byte": (ODD, changed(ODD, (4098, int(ODD[4098]) ^ 1))),
    "all bytes": (ODD, 255 - ODD),
    "beyond 10": (BASE, changed(BASE, (11, 12))),
    "complex": (torch.tensor([1 + 2j]), torch.tensor([2 + 1j])),
    "conjugate": (torch.tensor([1 + 2j]), torch.tensor([1 + 2j]).conj()),
}
"""What one rank has, beside what the others have: same structure, other bits."""

SAME: dict[str, tuple[Any, Any]] = {
    "NaNs": (OTHER_NAN, OTHER_NAN),
    "tensor NaNs": (bits_of(0x7FC00001), bits_of(0x7FC00001)),
    "transposed": (BASE, BASE.t().contiguous().t()),
    "sliced": (BASE[:, ::2].contiguous(), BASE[:, ::2]),
    "offset": (BASE.view(-1)[1:].clone(), BASE.view(-1)[1:]),
    "expanded": (BASE[:, :1].expand(4, 6), BASE[:, :1].repeat(1, 6)),
    "flipped": (BASE.flip(1), torch.tensor(BASE.numpy()[:, ::-1].copy())),
    "conjugate": (torch.tensor([[1 - 2j]]), torch.tensor([[1 + 2j]]).mH),
    "strange stride": (torch.zeros(1), torch.zeros(4)[::4]),
    "channels last": (
        torch.arange(120.0).reshape(2, 3, 4, 5),
        torch.arange(120.0).reshape(2, 3, 4, 5).to(memory_format=torch.channels_last),
    ),
    "empty": (torch.empty(0, 3), torch.empty(3, 0).t()),
    "set order": ({0, 8, 16}, {16, 8, 0}),
    "dict order": ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
    "array layout": (np.arange(6).reshape(2, 3), np.asfortranarray(np.arange(6).reshape(2, 3))),
}


def alone(value: Any) -> Any:
    """The same in memory of its own: it shall not be tied to another item."""
    return value.clone() if isinstance(value, torch.Tensor) else value


OTHER_STRUCTURE: dict[str, tuple[Any, Any, str]] = {
    "keys": ({"x": {1: 0}}, {"x": {"1": 0}}, "'x/1' is absent on rank 0 and a value on rank 2"),
    "bool key": ({"x": {1: 0}}, {"x": {True: 0}}, "is a value on rank 0 and absent on rank 2"),
    "containers": (
        {"x": [torch.zeros(1)]},
        {"x": (torch.zeros(1),)},
        "'x/~l0' is a tensor float32 [1] on rank 0 and absent on rank 2",
    ),
    "dtype": ({"x": torch.zeros(2)}, {"x": torch.zeros(2, dtype=torch.int32)}, "tensor float32 [2] on rank 0"),
    "tied": (
        dict.fromkeys("ab", torch.ones(3)),
        {"a": torch.ones(3), "b": torch.ones(3)},
        "'b' is the same tensor as 'a' on rank 0 and a tensor float32 [3] on rank 2",
    ),
}


def looks_alike(item: ItemDifference) -> bool:
    return item.kind == "value" and item.value == item.minorities[0].value


def test_nearly_equal_is_told_from_equal_at_every_level(tmp_path: Path):
    """Each level finds what the ones before it find: all of them find all that there is."""

    def case(rank: int, world_size: int) -> list[Any]:
        results: list[Any] = []
        box = Box({})
        with CheckpointCoordinator(
            [StateComponent("x", box, REPLICATED)], tmp_path, timeout_seconds=600
        ) as coordinator:
            for level in LEVELS:
                box.items = {name: pair[rank == 2] for name, pair in SAME.items()}
                results.append(verdicts(coordinator.validate_replication(level)))
                box.items |= {f"~ {name}": alone(pair[rank == 2]) for name, pair in DIFFERENT.items()}
                found = coordinator.validate_replication(level)
                results.append(verdicts(found))
                results.append([item.name for item in found["x"].differences[0].items if looks_alike(item)])
                for name, pair in DIFFERENT.items():
                    box.items = {name: pair[rank == 2]}
                    results.append(verdicts(coordinator.validate_replication(level)))
            for one, other, _ in OTHER_STRUCTURE.values():
                box.items = one if rank < 2 else other
                results.append(refusal(coordinator.validate_replication))
        return results

    told = iter(the_same(values(run_ranks(3, case, timeout=100))))
    for _ in LEVELS:
        assert next(told) == {"x": []}
        assert next(told) == {"x": [((0, 1), (2,), sorted(f"~0 {name}" for name in DIFFERENT))]}
        assert next(told) == []
        for name in DIFFERENT:
            assert next(told) == {"x": [((0, 1), (2,), [name])]}, name
    for name, (_, _, text) in OTHER_STRUCTURE.items():
        kind, message = next(told)
        assert kind == "StructureError", name
        assert text in message, message
    assert next(told, None) is None


def test_tied_tensors_are_compared_once_and_named_by_their_first_name(tmp_path: Path):
    def case(rank: int, world_size: int) -> Any:
        tied = torch.full((4,), float(rank))
        component = StateComponent("model", Box({"embedding": tied, "head": tied}), REPLICATED)
        with CheckpointCoordinator([component], tmp_path, timeout_seconds=600) as coordinator:
            return verdicts(coordinator.validate_replication("full"))

    assert the_same(values(run_ranks(2, case))) == {"model": [((0,), (1,), ["embedding"])]}


def test_a_copy_anywhere_in_memory_can_be_compared_byte_by_byte(tmp_path: Path):
    """A view whose storage begins between two words, and itself where one does."""

    def case(rank: int, world_size: int) -> Any:
        memory = np.zeros(1_000_024, dtype=np.uint8)
        first = (4 - memory.ctypes.data) % 8
        whole = torch.from_numpy(memory[first : first + 1_000_000].view(np.float32))
        whole.copy_(torch.arange(250_000.0))
        weight = whole[1:] if rank else whole[1:].clone()
        assert rank == 0 or (weight.data_ptr() % 8, weight.storage_offset()) == (0, 1)
        box = Box({"weight": weight})
        with CheckpointCoordinator(
            [StateComponent("x", box, REPLICATED)], tmp_path, timeout_seconds=600
        ) as coordinator:
            before = verdicts(coordinator.validate_replication("full"))
            with mock.patch.object(digests, "begin", same_digests):
                whole[200_000] += rank
                return before, verdicts(coordinator.validate_replication("full"))

    before, after = the_same(values(run_ranks(2, case)))
    assert (before, after) == ({"x": []}, {"x": [((0,), (1,), ["weight"])]})


# ---- several states


def states_of(rank: int, **ranks_of_items: dict[str, list[int]] | list[int]) -> dict[str, Any]:
    """Items that are 1 on some ranks and 0 on the others, and one that is equal."""
    items: dict[str, Any] = {name: torch.tensor([0.0, float(rank in ranks)]) for name, ranks in ranks_of_items.items()}
    return items | {"same": torch.ones(3)}


def classes(report: Any) -> dict[str, Any]:
    [difference] = report.differences
    return {item.name: (item.majority, *(copy.ranks for copy in item.minorities)) for item in difference.items} | {
        "": (difference.majority, difference.minority)
    }


CASES_OF_4: list[tuple[str, Callable[[int], dict[str, Any]], dict[str, Any]]] = [
    ("two against two", lambda r: states_of(r, a=[1, 2]), {"a": ((0, 3), (1, 2)), "": ((0, 3), (1, 2))}),
    ("two against two, 0 with 3", lambda r: states_of(r, a=[0, 3]), {"a": ((0, 3), (1, 2)), "": ((0, 3), (1, 2))}),
    (
        "all different",
        lambda r: {"a": torch.tensor(r), "b": r},
        {"a": ((0,), (1,), (2,), (3,)), "b": ((0,), (1,), (2,), (3,)), "": ((0,), (1, 2, 3))},
    ),
    (
        "1 in A and 2 in B",
        lambda r: states_of(r, a=[1], b=[2]),
        {"a": ((0, 2, 3), (1,)), "b": ((0, 1, 3), (2,)), "": ((0, 3), (1, 2))},
    ),
    (
        "each but 0 in one of its own",
        lambda r: states_of(r, a=[1], b=[2], c=[3]),
        {"a": ((0, 2, 3), (1,)), "b": ((0, 1, 3), (2,)), "c": ((0, 1, 2), (3,)), "": ((0,), (1, 2, 3))},
    ),
    (
        "0 in A, 3 in A otherwise",
        lambda r: {"a": torch.tensor({0: 5, 3: 7}.get(r, 1))},
        {"a": ((1, 2), (0,), (3,)), "": ((1, 2), (0, 3))},
    ),
    (
        "the majority is not rank 0's",
        lambda r: states_of(r, a=[1, 2, 3]),
        {"a": ((1, 2, 3), (0,)), "": ((1, 2, 3), (0,))},
    ),
]
CASES_OF_3: list[tuple[str, Callable[[int], dict[str, Any]], dict[str, Any]]] = [
    ("three values", lambda r: {"lr": 0.1 * r}, {"lr": ((0,), (1,), (2,)), "": ((0,), (1, 2))}),
    (
        "1 in A and 2 in B",
        lambda r: states_of(r, a=[1], b=[2]),
        {"a": ((0, 2), (1,)), "b": ((0, 1), (2,)), "": ((0,), (1, 2))},
    ),
]


@pytest.mark.parametrize(("world_size", "cases"), [(3, CASES_OF_3), (4, CASES_OF_4)])
def test_the_majority_is_found_for_each_item(world_size: int, cases: Any, tmp_path: Path):
    def case(rank: int, world_size: int) -> list[Any]:
        box = Box({})
        results = []
        with CheckpointCoordinator(
            [StateComponent("x", box, REPLICATED)], tmp_path, timeout_seconds=600
        ) as coordinator:
            for _, state, _ in cases:
                box.items = state(rank)
                results.append([classes(coordinator.validate_replication(level)["x"]) for level in LEVELS])
        return results

    for found, (name, _, expected) in zip(the_same(values(run_ranks(world_size, case))), cases, strict=True):
        assert found == [expected] * len(LEVELS), name


def test_of_many_states_the_first_ones_are_looked_into_and_all_are_named(tmp_path: Path):
    def case(rank: int, world_size: int) -> Any:
        box = Box({"a": torch.tensor(rank), "b": torch.tensor(rank // 3), "c": torch.tensor(rank % 3)})
        with (
            mock.patch.object(mismatch, "MAX_STATES", 2),
            CheckpointCoordinator([StateComponent("x", box, REPLICATED)], tmp_path, timeout_seconds=600) as coordinator,
        ):
            report = coordinator.validate_replication("full")["x"]
            return classes(report), refusal(lambda: coordinator.save_checkpoint(1))

    found, (kind, message) = the_same(values(run_ranks(4, case)))
    assert found == {"a": ((0,), (1,)), "c": ((0,), (1,)), "": ((0,), (1, 2, 3))}
    assert kind == "ReplicaMismatch"
    assert "'x' differs between rank 0 and ranks [1-3] at 'a'" in message


def test_of_many_items_the_first_ones_are_named_and_measured_and_all_are_counted(tmp_path: Path):
    def case(rank: int, world_size: int) -> Any:
        box = Box({f"{number:02}": torch.tensor([0.0, rank == 1]) for number in range(9)} | {"value": rank})
        with (
            mock.patch.multiple(mismatch, MAX_ITEMS=5, MAX_MEASURED=3),
            CheckpointCoordinator([StateComponent("x", box, REPLICATED)], tmp_path, timeout_seconds=600) as coordinator,
        ):
            report = coordinator.validate_replication()["x"]
            [difference] = report.differences
            measured = [copy.elements is not None for item in difference.items for copy in item.minorities]
            names = [item.name for item in difference.items]
            message = refusal(lambda: coordinator.save_checkpoint(1))[1]
            return names, measured, difference.num_items, difference.num_not_measured, report.text(), message

    names, measured, num_items, num_not_measured, text, message = the_same(values(run_ranks(2, case)))
    assert names == [f"{number:02}" for number in range(5)]
    assert measured == [True] * 3 + [False] * 2
    assert (num_items, num_not_measured) == (10, 2)
    assert "and 5 more items" in text
    assert "2 tensors not compared element by element" in text
    assert "'04' and 5 more items;" in message


# ---- the report


def large_state() -> dict[str, torch.Tensor]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "ComplexHalf support is experimental")
        return {
            "large": torch.arange(3_500_000, dtype=torch.float32).reshape(1000, 3500),
            "turned": torch.arange(2_400_000, dtype=torch.float32).reshape(1200, 2000).t(),
            "half": torch.linspace(-3, 3, 999).bfloat16(),
            "count": torch.arange(10, dtype=torch.int64),
        }


CHANGES: dict[str, dict[int, list[tuple[tuple[int, ...], float]]]] = {
    "large": {
        1: [((0, 17), 5.5), ((999, 3499), float("nan")), ((400, 3), -1e6)],
        2: [((700, 0), float("inf")), ((999, 3498), 0.0)],
    },
    "turned": {1: [((3, 4), 1.0), ((1999, 1199), 2.0), ((1000, 7), 3.0)]},
    "half": {2: [((500,), 7.0)]},
    "count": {2: [((9,), 2**40), ((3,), -5)]},
}
"""Name -> rank -> places with other values: in the first, a middle and the last block of 4 MiB."""


def expected_figures(reference: torch.Tensor, own: torch.Tensor) -> dict[str, Any]:
    """The same figures by numpy, the obvious way."""
    bits, kind = {4: (np.uint32, np.int64), 2: (np.uint16, np.int64), 8: (np.uint64, object)}[own.element_size()]
    old, new = (raw(one.contiguous()).numpy().view(bits).reshape(own.shape) for one in (reference, own))
    places = np.argwhere(old != new)
    numbers = [one.to(torch.float64).numpy() for one in (reference, own)]
    is_finite_pair = (old != new) & ~np.isnan(numbers[0]) & ~np.isnan(numbers[1])
    is_float = own.is_floating_point()

    def ordered(pattern: Any) -> Any:
        sign = 1 << (8 * own.element_size() - 1)
        signed = pattern.astype(kind)
        return np.where(signed >= sign, sign - 1 - signed, signed)

    ulp = np.abs(ordered(new)[is_finite_pair] - ordered(old)[is_finite_pair])
    return {
        "elements": own.numel(),
        "different": len(places),
        "first_index": places[0].tolist(),
        "max_abs": float(np.abs(numbers[1] - numbers[0])[is_finite_pair].max()),
        "max_ulp": int(ulp.max()) if is_float else None,
        "nan": int(np.isnan(numbers[1]).sum()),
        "inf": int(np.isinf(numbers[1]).sum()),
        "reference_nan": int(np.isnan(numbers[0]).sum()),
        "reference_inf": int(np.isinf(numbers[0]).sum()),
    }


def state_on(rank: int) -> dict[str, torch.Tensor]:
    state = large_state()
    for name, by_rank in CHANGES.items():
        for place, value in by_rank.get(rank, ()):
            state[name][place] = value
    return state


@pytest.mark.parametrize("level", LEVELS)
def test_the_report_has_the_figures_of_every_item_and_is_left_as_json(level: str, tmp_path: Path):
    def case(rank: int, world_size: int) -> Any:
        component = StateComponent("model", Box(state_on(rank) | {"lr": 0.5 if rank == 2 else 0.25}), REPLICATED)
        with CheckpointCoordinator([component], tmp_path, timeout_seconds=600) as coordinator:
            found = coordinator.validate_replication(level, step=7)["model"]
            refusal(lambda: coordinator.save_checkpoint(8))
            return found

    report, *others = values(run_ranks(4, case))
    assert [replace(one, seconds=report.seconds) for one in others] == [report] * 3
    told = json.loads((tmp_path / "replication-report-7.json").read_text())
    assert {key: told[key] for key in ("format", "version", "step", "on_mismatch")} == {
        "format": "forgather_ckpt.replication",
        "version": "1.0",
        "step": 7,
        "on_mismatch": "error",
    }
    assert told["components"]["model"] == report.to_json()
    assert (report.level, report.num_items, report.excluded) == (level, 5, ())
    [difference] = told["components"]["model"]["differences"]
    assert (difference["holders"], difference["majority"], difference["minority"]) == ([0, 1, 2, 3], [0, 3], [1, 2])
    items = {item["name"]: item for item in difference["items"]}
    assert list(items) == sorted([*CHANGES, "lr"])
    for name, by_rank in CHANGES.items():
        assert items[name]["kind"] == "tensor"
        assert items[name]["dtype"] == str(state_on(0)[name].dtype).removeprefix("torch.")
        assert [copy["ranks"] for copy in items[name]["minorities"]] == [[rank] for rank in by_rank]
        for copy in items[name]["minorities"]:
            [rank] = copy["ranks"]
            expected = expected_figures(state_on(0)[name], state_on(rank)[name])
            if expected["max_abs"] == float("inf"):
                expected["max_abs"] = "inf"
            assert copy["elements"] == expected, (name, rank)
    assert (items["lr"]["value"], items["lr"]["majority"]) == ("0.25", [0, 1, 3])
    assert [(copy["ranks"], copy["value"], copy["elements"]) for copy in items["lr"]["minorities"]] == [
        ([2], "0.5", None)
    ]
    text = report.text()
    assert "model: DIFFERS at level" in text
    assert "all: ranks 0, 3 against 1-2" in text
    assert "rank 1: 3 of 3500000 elements, first at [0, 17]" in text
    assert "rank 1: 3 of 2400000 elements, first at [3, 4]" in text
    assert json.loads((tmp_path / "replication-report-8.json").read_text())["step"] == 8


# ---- what digests cannot tell


def same_digests(items: Any, on_progress: Any = None, *, on_host: bool = False) -> Callable[[], Blocks]:
    """Of all bytes alike: a hash that has failed."""
    found = {item.name: (bytes(16),) * max(1, -(-item.num_bytes // BLOCK_BYTES)) for item in items}
    return lambda: found


def test_full_compares_the_bytes_and_needs_no_digest(tmp_path: Path):
    def case(rank: int, world_size: int) -> Any:
        large = torch.zeros(30 << 20, dtype=torch.uint8)  # of 8 blocks, and beside others in a chunk
        small = torch.zeros(3)
        state = {
            "a": small,
            "large": large,
            "odd": torch.zeros(777, dtype=torch.uint8),
            "turned": torch.zeros(9, 7).t(),
        }
        box = Box(state)
        results = []
        with (
            mock.patch.object(digests, "begin", same_digests),
            CheckpointCoordinator([StateComponent("x", box, REPLICATED)], tmp_path, timeout_seconds=600) as coordinator,
        ):
            results.append(verdicts(coordinator.validate_replication("full")))
            for name, place in (("large", -1), ("large", 5 << 20), ("odd", 776), ("a", 11), ("turned", 100)):
                bytes_of = raw(state[name].t() if name == "turned" else state[name])
                bytes_of[place] ^= rank == 1
                results.append([verdicts(coordinator.validate_replication(level)) for level in LEVELS])
                [difference] = coordinator.validate_replication("full")["x"].differences
                [[copy]] = [item.minorities for item in difference.items]
                results.append((copy.elements.num_elements, copy.elements.num_different, copy.elements.first_index))
                bytes_of[place] ^= rank == 1
            box.items["a"] = torch.full((3,), float(rank))
            results.append(classes(coordinator.validate_replication("full")["x"]))
        return results

    equal, *told, classes_ = the_same(values(run_ranks(3, case, timeout=100)))
    assert equal == {"x": []}
    expected = [
        ("large", (30 << 20, 1, ((30 << 20) - 1,))),
        ("large", (30 << 20, 1, (5 << 20,))),
        ("odd", (777, 1, (776,))),
        ("a", (3, 1, (2,))),
        ("turned", (63, 1, (25 % 7, 25 // 7))),
    ]
    for (quick, tensor, full), figures, (name, elements) in zip(told[::2], told[1::2], expected, strict=True):
        assert (quick, tensor) == ({"x": []}, {"x": []})  # the patch works: what digests cannot tell is not found there
        assert full == {"x": [((0, 2), (1,), [name])]}
        assert figures == elements
    assert classes_ == {"a": ((0,), (1,), (2,)), "": ((0,), (1, 2))}


# ---- exclusions, warnings, optional components


class Normed(nn.Module):
    def __init__(self, rank: int) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.norm = nn.BatchNorm1d(3)
        with torch.no_grad():
            self.linear.weight.fill_(0.5)
            self.linear.bias.fill_(0.25)
        self.norm.running_mean.fill_(float(rank))
        self.norm.running_var.fill_(1.0 + rank)


def test_what_is_excluded_may_differ_and_comes_from_the_lowest_of_the_majority(tmp_path: Path):
    exclude = ["*running_*", "matches.nothing"]

    def case(rank: int, world_size: int) -> list[Any]:
        model = Normed(rank)
        component = StateComponent("model", model, REPLICATED, validation_exclude=exclude)
        results: list[Any] = []
        with CheckpointCoordinator([component], tmp_path, on_mismatch="warn", timeout_seconds=600) as coordinator:
            report = coordinator.validate_replication("full")["model"]
            results.append((report.is_equal, report.num_items, report.excluded))
            coordinator.save_checkpoint(1)
            with torch.no_grad():
                model.linear.bias[1] += rank == 0  # rank 0 is the minority of three
            results.append(verdicts(coordinator.validate_replication("tensor")))
            coordinator.save_checkpoint(2)
            loaded = []
            for step in (1, 2):
                coordinator.load_checkpoint(step)
                loaded.append((model.norm.running_mean.tolist(), model.linear.bias.tolist()))
        return [*results, *loaded]

    outcomes = run_ranks(3, case)
    report, told, first, second = the_same(values(outcomes))
    assert report == (True, 5, ("norm.running_mean", "norm.running_var"))
    assert told == {"model": [((1, 2), (0,), ["linear.bias"])]}
    assert first == ([0.0] * 3, [0.25] * 3)
    assert second == ([1.0] * 3, [0.25] * 3)
    records = [CheckpointManifest.load(tmp_path / f"checkpoint-{step}").components["model"] for step in (1, 2)]
    excluded = {"all": ("norm.running_mean", "norm.running_var")}
    for record, result, trusted in zip(records, ("equal", "differed"), ({}, {"all": (1, 2)}), strict=True):
        assert (record.validation.result, record.trusted, record.excluded) == (result, trusted, excluded)
        assert record.validation.num_items == 5
    for outcome in outcomes:
        assert (
            "saving all the same, from the majority alone: 'model' differs between ranks [1-2] and rank 0"
            in outcome.output
        )
        assert "component 'model' was saved although its copies differed" in outcome.output


def test_with_warn_the_majoritys_bytes_are_stored_also_where_every_item_has_another_minority(tmp_path: Path):
    """The state of ranks that have the reference in all items, not a mixture of majorities."""

    def case(rank: int, world_size: int) -> Any:
        box = Box(states_of(rank, a=[1], b=[2]) | {"big": torch.full((3 << 20,), float(rank == 1)), "lr": rank == 2})
        component = StateComponent("x", box, REPLICATED, validation_level="full")
        with CheckpointCoordinator([component], tmp_path, on_mismatch="warn", timeout_seconds=600) as coordinator:
            coordinator.save_checkpoint(3)
            coordinator.load_checkpoint()
            report = json.loads((tmp_path / "replication-report-3.json").read_text())
            return (
                is_same(box.items, states_of(0, a=[1], b=[2]) | {"big": torch.zeros(3 << 20), "lr": False}),
                report["on_mismatch"],
            )

    assert the_same(values(run_ranks(4, case))) == (True, "warn")
    record = CheckpointManifest.load(tmp_path / "checkpoint-3").components["x"]
    assert record.trusted == {"all": (0, 3)}
    assert set(record.entries["all"].writers) <= {0, 3}


def test_a_tied_tensor_is_left_out_only_under_all_of_its_names(tmp_path: Path):
    """One of its names is compared, so its bytes are."""

    def case(rank: int, world_size: int) -> Any:
        tied = torch.full((4,), float(rank))
        box = Box({"embedding": tied, "head": tied, "same": 1})
        results = []
        for exclude in (["emb*"], ["head"], ["emb*", "head"]):
            component = StateComponent("model", box, REPLICATED, validation_exclude=exclude)
            with CheckpointCoordinator([component], tmp_path, timeout_seconds=600) as coordinator:
                report = coordinator.validate_replication()
                results.append((verdicts(report)["model"], report["model"].excluded))
        return results

    one, other, both = the_same(values(run_ranks(2, case)))
    assert one == ([((0,), (1,), ["embedding"])], ())
    assert other == ([((0,), (1,), ["embedding"])], ("head",))
    assert both == ([], ("embedding", "head"))


def test_an_optional_component_whose_copies_differ_is_left_out_and_the_rest_is_compared(tmp_path: Path):
    def case(rank: int, world_size: int) -> Any:
        extra, model = Box({"weight": torch.tensor(rank)}), Box({"weight": torch.ones(3)})
        components = [
            StateComponent("extra", extra, REPLICATED, required=False, validation_level="full"),
            StateComponent("model", model, REPLICATED, validation_level="full"),
        ]
        with CheckpointCoordinator(components, tmp_path, timeout_seconds=600) as coordinator:
            first = coordinator.save_checkpoint(1).name
            model.items["weight"] = torch.full((3,), float(rank == 1))
            error = refusal(lambda: coordinator.save_checkpoint(2))
            return first, error

    first, (kind, message) = the_same(values(run_ranks(3, case)))
    assert first == "checkpoint-1"
    manifest = CheckpointManifest.load(tmp_path / first)
    assert (list(manifest.components), list(manifest.omitted)) == (["model"], ["extra"])
    assert manifest.components["model"].validation.result == "equal"
    assert kind == "ReplicaMismatch"
    assert message.startswith("'model' differs")
    assert "extra" not in message  # which alone would have been left out


# ---- what is sent


class Posts:
    """What this rank posts, by the name of the phase."""

    def __init__(self) -> None:
        self.sizes: Counter[str] = Counter()
        self.messages: dict[str, list[dict[str, Any]]] = {}
        agree, post = Comm.agree, Comm._post
        phases: list[str] = []

        def counted_agree(comm: Comm, phase: str, *args: Any) -> Any:
            phases.append(phase)
            return agree(comm, phase, *args)

        def counted_post(comm: Comm, key: str, message: dict[str, Any]) -> None:
            if key.endswith(f"/{comm.rank}"):
                self.sizes[phases[-1]] += len(json.dumps(message))
                self.messages.setdefault(phases[-1], []).append(message)
            post(comm, key, message)

        Comm.agree, Comm._post = counted_agree, counted_post  # type: ignore[method-assign]

    def take(self) -> tuple[dict[str, int], dict[str, list[dict[str, Any]]]]:
        taken = dict(self.sizes), dict(self.messages)
        self.sizes.clear()
        self.messages.clear()
        return taken


def test_equal_copies_cost_one_root_a_rank_and_component(tmp_path: Path):
    num_items = 10_000

    def case(rank: int, world_size: int) -> Any:
        data = torch.arange(num_items * 2).view(num_items, 2)
        box = Box({f"layers.{number}.weight": data[number] for number in range(num_items)})
        posts = Posts()
        sizes = []
        components = [StateComponent(key, box, REPLICATED) for key in ("model", "other")]
        with CheckpointCoordinator(components, tmp_path, timeout_seconds=600) as coordinator:
            for level in LEVELS:
                posts.take()
                coordinator.validate_replication(level)
                sizes.append(posts.take()[0])
            data[5000] += rank in (1, 2)
            data[7000] += rank == 2
            posts.take()
            report = coordinator.validate_replication("tensor", ["model"])
            return sizes, verdicts(report), posts.take()

    results = values(run_ranks(4, case, timeout=110))
    for sizes, _, _ in results:
        for taken, level in zip(sizes, LEVELS, strict=True):
            phases = {"comparing the copies"} | (
                {"choosing how to compare bytes", "comparing all bytes"} if level == "full" else set()
            )
            assert {
                phase for phase in taken if phase not in ("comparing declarations", "comparing structures")
            } == phases
            assert sum(taken[phase] for phase in phases) < 2 * 200
    assert results[0][1] == {
        "model": [((0, 3), (1, 2), ["layers.5000.weight", "layers.7000.weight"])],
    }
    sent = [messages for *_, (_, messages) in results]
    spoke = [messages["finding the items that differ"][0]["ok"] != {} for messages in sent]
    assert spoke == [True, True, True, False]  # one rank for each state: 3 has what 0 has
    described = [messages["describing the items that differ"][0]["ok"] for messages in sent]
    assert [len(one.get("0", ())) for one in described] == [2, 2, 2, 0]


# ---- groups, shared names, what is asked for


def test_groups_are_compared_each_in_itself(tmp_path: Path):
    """Two groups of 4 and four of 2, bare and on a mesh, at every level."""

    def case(rank: int, world_size: int) -> list[Any]:
        fours = [dist.new_group([0, 1, 2, 3]), dist.new_group([4, 5, 6, 7])][rank // 4]
        mesh = init_device_mesh("cpu", (4, 2), mesh_dim_names=("pp", "dp"))
        boxes = {"four": Box({}), "pair": Box({})}
        components = [
            StateComponent("four", boxes["four"], PER_GROUP, "fours"),
            StateComponent("pair", boxes["pair"], PER_GROUP, "dp"),
        ]
        results: list[Any] = []
        groups = {"fours": fours, "mesh": mesh}
        with CheckpointCoordinator(components, tmp_path, process_groups=groups, timeout_seconds=600) as coordinator:
            for level in LEVELS:
                boxes["four"].items = {"w": torch.full((3,), float(rank // 4 * 10))}
                boxes["pair"].items = {"w": torch.full((3,), float(rank // 2 * 10))}
                results.append(verdicts(coordinator.validate_replication(level)))
                boxes["four"].items["w"][1] += rank in (2, 4)
                boxes["pair"].items["w"][2] += rank in (0, 7)
                results.append(verdicts(coordinator.validate_replication(level)))
            report = coordinator.validate_replication()
            results.append([one.entry for one in report["pair"].differences])
            results.append(refusal(lambda: coordinator.save_checkpoint(1))[1])
        return results

    *told, entries, message = the_same(values(run_ranks(8, case, timeout=100)))
    assert told[::2] == [{"four": [], "pair": []}] * 3
    assert (
        told[1::2]
        == [
            {
                "four": [((0, 1, 3), (2,), ["w"]), ((5, 6, 7), (4,), ["w"])],
                "pair": [((0,), (1,), ["w"]), ((6,), (7,), ["w"])],
            }
        ]
        * 3
    )
    assert entries == ["pp=0/4", "pp=3/4"]
    assert "'four' differs between ranks [0-1, 3] and rank 2 at 'w'" in message
    assert "expected identical state in fours (0-3)" in message
    assert "'pair' differs between rank 6 and rank 7 at 'w'" in message


@pytest.mark.parametrize("level", ["quick", "tensor", "full"])
def test_the_manifest_tells_of_each_entry_what_was_compared(level: str, tmp_path: Path):
    """Two pairs of replicas, of which one is equal, with one item in one and three in the other."""

    def case(rank: int, world_size: int) -> None:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))
        stage = rank // 2
        state = {f"w{number}": torch.full((3,), float(stage)) for number in range(1 + 2 * stage)}
        if rank == 3:
            state["w2"][1] += 1
        declared = [
            StateComponent("stage", Box(state), PER_GROUP, "dp", validation_level=level, validation_exclude=["w1"]),
            StateComponent(
                "shared",
                Box({f"{name}.{stage}": tensor for name, tensor in state.items()}),
                PER_GROUP,
                "dp",
                names="global",
                validation_level="quick",
                validation_exclude=["w2.*"],
            ),
            StateComponent("alone", Box({"rank": rank}), PER_RANK),
            StateComponent("unchecked", Box({"w": rank}), REPLICATED, validation_level="none"),
        ]
        groups = {"mesh": mesh}
        with CheckpointCoordinator(declared, tmp_path, process_groups=groups, on_mismatch="warn") as coordinator:
            coordinator.save_checkpoint(1)

    values(run_ranks(4, case))
    manifest = CheckpointManifest.load(tmp_path / "checkpoint-1")
    told = {
        key: {
            name: (one.validation.level, one.validation.result, one.validation.num_items, one.trusted, one.excluded)
            for name, one in record.entries.items()
        }
        for key, record in manifest.components.items()
    }
    nothing = ("none", "not compared", 0, (), ())
    assert told == {
        "stage": {
            "pp=0/2": (level, "equal", 1, (), ()),
            "pp=1/2": (level, "differed", 2, (2,), ("w1",)),
        },
        "alone": {f"rank={rank}": nothing for rank in range(4)},
        "shared": {"all": ("quick", "equal", 3, (), ("w2.1",))},
        "unchecked": {"all": nothing},
    }
    for record in manifest.components.values():
        for one in record.entries.values():
            assert (one.validation.seconds > 0) == (one.validation.num_items > 0)
    stage = json.loads((tmp_path / "checkpoint-1/checkpoint_manifest.json").read_text())["components"]["stage"]
    both = stage["validation"]
    assert (both["level"], both["result"], both["items"]) == (level, "differed", 3)
    assert both["seconds"] == max(entry["validation"]["seconds"] for entry in stage["entries"].values())


def test_where_each_rank_is_in_some_minority_none_is_trusted_and_a_load_says_so(tmp_path: Path):
    """Item a of all is another on rank 0, b of two on rank 1, c of two on rank 2."""

    def case(rank: int, world_size: int) -> Any:
        held = {"a": (0, 1, 2), "b": (0, 1), "c": (1, 2)}
        state = {
            name: torch.full((3,), float(rank == odd)) for odd, (name, on) in enumerate(held.items()) if rank in on
        }
        box = Box(state | {f"own.{rank}": torch.ones(1)})
        component = StateComponent("x", box, PER_RANK, names="global", validation_level="quick")
        with CheckpointCoordinator([component], tmp_path, on_mismatch="warn", timeout_seconds=600) as coordinator:
            coordinator.save_checkpoint(1)
            coordinator.load_checkpoint()
        return {name: tensor.sum().item() for name, tensor in box.items.items() if "own" not in name}

    outcomes = run_ranks(3, case)
    assert values(outcomes) == [{"a": 0.0, "b": 0.0}, {"a": 0.0, "b": 0.0, "c": 0.0}, {"a": 0.0, "c": 0.0}]
    record = CheckpointManifest.load(tmp_path / "checkpoint-1").components["x"]
    assert (record.validation.result, record.trusted) == ("differed", {"all": ()})
    assert "all ranks but {'all': 'none'} get the majority's state" in outcomes[0].output


def test_a_rank_that_is_in_no_minority_is_trusted_also_where_it_holds_nothing_that_was_compared(tmp_path: Path):
    def case(rank: int, world_size: int) -> None:
        state = {"a": torch.full((3,), float(rank == 1))} if rank < 3 else {}
        box = Box(state | {f"own.{rank}": torch.ones(1)})
        component = StateComponent("x", box, PER_RANK, names="global", validation_level="quick")
        with CheckpointCoordinator([component], tmp_path, on_mismatch="warn", timeout_seconds=600) as coordinator:
            coordinator.save_checkpoint(1)

    values(run_ranks(4, case))
    record = CheckpointManifest.load(tmp_path / "checkpoint-1").components["x"]
    assert (record.validation.result, record.trusted) == ("differed", {"all": (0, 2, 3)})


@pytest.mark.parametrize("declared", [None, "none", "tensor", "full"])
def test_names_that_two_stages_share_are_compared(declared: str | None, tmp_path: Path):
    """A tied embedding on the first and the last stage: at QUICK unless the component says otherwise."""

    def case(rank: int, world_size: int) -> Any:
        stage = {f"layers.{rank}.weight": torch.full((3,), float(rank))}
        if rank in (0, 3):
            stage["embedding"] = torch.full((5,), float(rank))
        stages = StateComponent("stages", Box(stage), PER_RANK, names="global", validation_level=declared)
        with CheckpointCoordinator([stages], tmp_path, timeout_seconds=600) as coordinator:
            if declared == "none":
                saved = coordinator.save_checkpoint(1).name
            else:
                saved = refusal(lambda: coordinator.save_checkpoint(1))[1]
            report = coordinator.validate_replication()["stages"]
            full = coordinator.validate_replication("full")["stages"]
            return saved, report.level.value, report.num_items, classes(report), full.level.value, classes(full)

    saved, level, num_items, found, full, found_again = the_same(values(run_ranks(4, case)))
    assert found == found_again == {"embedding": ((0,), (3,)), "": ((0,), (3,))}
    assert (level, full, num_items) == (declared if declared in ("tensor", "full") else "quick", "full", 1)
    if declared == "none":
        assert saved == "checkpoint-1"
        assert CheckpointManifest.load(tmp_path / saved).components["stages"].validation.level == "none"
    else:
        assert "'stages' differs between rank 0 and rank 3 at 'embedding'" in saved
        assert "expected identical state in all holders (0, 3)" in saved


def test_what_is_asked_for_is_compared_and_nothing_else(tmp_path: Path):
    def case(rank: int, world_size: int) -> Any:
        calls: list[str] = []

        class Called(Box):
            def state_dict(self) -> dict[Any, Any]:
                calls.append(self.items["name"])
                return super().state_dict()

        def part(
            key: str, pattern: SharingPattern = REPLICATED, level: str | None = None, **items: Any
        ) -> StateComponent:
            return StateComponent(key, Called({"name": key} | items), pattern, validation_level=level)

        components = [
            part("model", level="tensor"),
            part("free", level="none", lr=rank),
            part("progress", GLOBAL, step=rank),
            part("rng", PER_RANK, seed=rank),
        ]
        results: list[Any] = []
        with CheckpointCoordinator(components, tmp_path, timeout_seconds=600) as coordinator:

            def ask(*args: Any, **options: Any) -> None:
                calls.clear()
                reports = coordinator.validate_replication(*args, **options)
                told = {key: (report.level.value, report.is_equal) for key, report in reports.items()}
                results.append((told, list(calls)))

            ask()
            ask("full")
            ask(components=["model"])
            ask(components=[])
            ask(None, ("rng", "progress"))
            ask(components=dict.fromkeys(["model", "free"] if rank else ["free", "model"]).keys())
            results.append(coordinator.save_checkpoint(1).name)
        return results

    everything, full, model, nothing, others, any_order, saved = the_same(values(run_ranks(3, case)))
    keys = ["model", "free", "progress", "rng"]
    alone = {"progress": ("none", True), "rng": ("none", True)}  # not compared: there is one copy
    assert everything == ({"model": ("tensor", True), "free": ("quick", False)} | alone, keys)
    assert full == ({"model": ("full", True), "free": ("full", False)} | alone, keys)
    assert model == ({"model": ("tensor", True)}, ["model"])
    assert nothing == ({}, [])
    assert others == (alone, ["progress", "rng"])
    assert any_order == ({"model": ("tensor", True), "free": ("quick", False)}, ["model", "free"])
    assert saved == "checkpoint-1"  # NONE is not compared by a save


BAD_REQUESTS: list[tuple[dict[str, Any], str]] = [
    ({"level": "fast"}, "level is 'fast'; use 'quick', 'tensor' or 'full', or None"),
    ({"level": "none"}, "level is 'none'; use 'quick', 'tensor' or 'full', or None"),
    ({"level": 3}, "level is 3"),
    ({"components": "model"}, "components is 'model'; use a list of keys"),
    ({"components": [1]}, "components is [1]; use a list of keys"),
    ({"components": ["models"]}, "no component 'models' is declared; there are 'model'"),
    ({"step": -1}, "step is -1; use a number of steps"),
    ({"step": True}, "step is True; use a number of steps"),
    ({"step": 2**63}, "step is 9223372036854775808; use a number of steps"),
]


def test_a_bad_request_of_all_ranks_or_of_one_is_the_same_error_on_all(tmp_path: Path):
    def case(rank: int, world_size: int) -> Any:
        component = StateComponent("model", Box({"x": 1}), REPLICATED)
        results: list[Any] = []
        with CheckpointCoordinator([component], tmp_path, timeout_seconds=600) as coordinator:
            for options, _ in BAD_REQUESTS:
                results.append(refusal(lambda options=options: coordinator.validate_replication(**options)))
                for culprit in range(world_size):
                    asked = options if rank == culprit else {}
                    results.append(refusal(lambda asked=asked: coordinator.validate_replication(**asked)))
            for asked in ({"level": LEVELS[rank]}, {"components": [["model"], None, []][rank]}, {"step": rank}):
                results.append(refusal(lambda asked=asked: coordinator.validate_replication(**asked)))
            results.append(coordinator.validate_replication("full")["model"].is_equal)
        return results

    *told, level, components, step, is_equal = the_same(values(run_ranks(3, case)))
    for number, (options, text) in enumerate(BAD_REQUESTS):
        everybody, *ones = told[4 * number : 4 * number + 4]
        assert everybody[0] == "DeclarationError"
        assert text in everybody[1]
        for culprit, (kind, message) in enumerate(ones):
            assert kind == "DeclarationError"
            if options.get("components") == ["models"]:
                assert "the ranks ask for different things" in message
            else:
                assert f"on rank {culprit}: {text}" in message
    for kind, message in (level, components, step):
        assert kind == "DeclarationError"
        assert "the ranks ask for different things" in message
    assert is_equal


def test_the_error_of_a_report_names_what_the_report_does(tmp_path: Path):
    """`raise mismatch_error(reports.values())`, as the documentation says."""
    from forgather_ckpt.differences import mismatch_error

    def case(rank: int, world_size: int) -> Any:
        component = StateComponent("model", Box({"lr": rank == 2}), REPLICATED)
        with CheckpointCoordinator([component], tmp_path, timeout_seconds=600) as coordinator:
            error = mismatch_error(coordinator.validate_replication().values())
            try:
                coordinator.save_checkpoint(1)
            except ReplicaMismatch as err:
                return str(error) == str(err), (error.rank, error.component), (err.rank, err.component)

    assert the_same(values(run_ranks(3, case))) == (True, (2, "model"), (2, "model"))
