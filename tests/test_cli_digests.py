"""`fgckpt digests`: at which step, on which rank and in which item two recordings part, and when there is no telling."""

from __future__ import annotations

import json
import shutil
import tracemalloc
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from forgather_ckpt import DigestRecorder, digest_log, divergence, hashtree
from forgather_ckpt.digest_log import Column, DigestLog, Part
from forgather_ckpt.digest_writer import LogWriter
from forgather_ckpt.trainers import DDPTrainer, Trainer
from tests.ranks import run_ranks, values
from tests.test_cli import Fgckpt, fgckpt
from tests.test_trainers import Points, make_args, make_model

__all__ = ["fgckpt"]

Items = Mapping[str, Any]
"""`component:name` -> what is digested: a tensor's content as a str (its dtype is float32), or an int for a value."""


Shapes = Mapping[str, tuple[int, ...]]
"""Of tensors of which a log has parts, `component:w[0:4,0:3]`."""


def column(name: str, content: Any, algorithm: str = "xxh3_128", shapes: Shapes | None = None) -> Column:
    component, _, item = name.partition(":")
    if isinstance(content, int):
        return Column(component, item, None, None, "xxh3_128")
    return Column(component, item, "float32", (shapes or {}).get(item.partition("[")[0], (len(content),)), algorithm)


def write(
    path: Path,
    steps: Mapping[int, Items] | Sequence[tuple[int, Items]],
    *,
    rank: int = 0,
    algorithm: str = "xxh3_128",
    patterns: Mapping[str, str] | None = None,
    varies: Sequence[str] = (),
    shapes: Shapes | None = None,
    **options: Any,
) -> Path:
    """Append to a log in the directory `path`."""
    patterns = patterns or {}
    log = path / digest_log.file_name(rank)
    writer = LogWriter(log, rank=rank, world_size=2, **options)
    for step, items in steps.items() if isinstance(steps, Mapping) else steps:
        keys = dict.fromkeys(name.partition(":")[0] for name in items)
        parts = [Part(key, patterns.get(key), tuple(varies)) for key in keys]
        columns = [column(name, content, algorithm, shapes) for name, content in items.items()]
        writer.write(step, parts, columns, b"".join(hashtree.digest(repr(one).encode()) for one in items.values()))
    writer.close()
    return log


def names(pair: Mapping[str, Any]) -> list[str]:
    return [f"{one['component']}:{one['name']} {one['change']}" for one in pair["differences"]]


# ---- of real runs


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs of two ranks; in b, one bit of one weight of rank 1 is flipped at step 3."""
    root = tmp_path_factory.mktemp("runs")

    def flip(trainer: Trainer) -> None:
        if trainer.rank == 1 and trainer.progress.step == 3:
            trainer.model.linear.weight.data.view(torch.int32)[0, 2] ^= 1 << 20

    def case(rank: int, world_size: int) -> None:
        for name, hooks in (("a", [DigestRecorder()]), ("b", [flip, DigestRecorder()])):
            args = make_args(root / name, max_steps=6)
            DDPTrainer(make_model(), args, Points(), on_step_end=hooks).train()

    values(run_ranks(2, case))
    return root


@pytest.mark.multiprocess
def test_a_flipped_bit_is_found_with_its_step_rank_and_tensor(fgckpt: Fgckpt, runs: Path) -> None:
    result = fgckpt("digests", "diff", runs / "a", runs / "b", "--json")
    assert result.code == 1
    zero, one = result.data["ranks"]
    assert (one["a"]["rank"], one["last_equal"], one["first_different"]) == (1, 2, 3)
    assert names(one) == ["model:linear.weight bytes"]
    # the other rank hears of it with the next gradients
    assert (zero["a"]["rank"], zero["last_equal"], zero["first_different"]) == (0, 3, 4)
    assert "model:linear.weight bytes" in names(zero)
    assert (one["common_steps"], one["compared"]) == (6, 3)

    told = fgckpt("digests", "diff", runs / "a", runs / "b")
    assert told.code == 1
    assert told.out.splitlines()[-3:] == [
        "RANK  STEP  COMPONENT  ITEM           DIFFERENCE",
        "   1     3  model      linear.weight  bytes of float32 [1, 4]",
        f"equal up to step 2; they part at step 3 on rank 1, in 1 of {one['items']} items",
    ]


@pytest.mark.multiprocess
def test_two_ranks_of_one_run_are_compared_in_what_they_share(fgckpt: Fgckpt, runs: Path) -> None:
    ways = [
        (f"{runs}/b@0", f"{runs}/b@1"),
        (runs / "b" / "digests" / digest_log.file_name(0), runs / "b" / "digests" / digest_log.file_name(1)),
    ]
    for ours, theirs in ways:
        result = fgckpt("digests", "diff", ours, theirs, "--json")
        assert result.code == 1
        [pair] = result.data["ranks"]
        assert (pair["a"]["rank"], pair["b"]["rank"]) == (0, 1)
        assert (pair["last_equal"], names(pair)) == (2, ["model:linear.weight bytes"])
        assert pair["left_out"]["own"] == ["dataset", "rng"]
    equal = fgckpt("digests", "diff", f"{runs}/a@0", f"{runs}/a@1")
    assert equal.code == 0
    assert "left out, as each rank has its own: dataset, rng (-c compares them)" in equal.out
    own = fgckpt("digests", "diff", f"{runs}/a@0", f"{runs}/a@1", "-c", "rng")
    assert own.code == 1
    assert "they part at step 1, the first common one, in " in own.out


@pytest.mark.multiprocess
def test_a_run_is_equal_to_itself(fgckpt: Fgckpt, runs: Path) -> None:
    result = fgckpt("digests", "diff", runs / "b", runs / "b" / "digests")
    assert (result.code, result.err) == (0, "")
    assert result.out.splitlines()[-1].startswith("equal: 12 recorded steps of 2 ranks, ")
    one = fgckpt("digests", "diff", f"{runs}/b@1", runs / "b", "--json")
    assert (one.code, [pair["a"]["rank"] for pair in one.data["ranks"]]) == (0, [1])


@pytest.mark.multiprocess
def test_show_tells_steps_items_and_algorithms(fgckpt: Fgckpt, runs: Path) -> None:
    result = fgckpt("digests", "show", runs / "a")
    assert result.code == 0
    lines = result.out.splitlines()
    assert lines[0].split() == ["RANK", "STEPS", "FROM", "TO", "ITEMS", "SIZE", "STATE"]
    assert [line.split()[:4] + line.split()[-1:] for line in lines[1:3]] == [
        ["0", "6", "1", "6", "whole"],
        ["1", "6", "1", "6", "whole"],
    ]
    assert "model      replicated        2       0  xxh3_128" in lines
    listed = fgckpt("digests", "show", f"{runs}/a@1", "--items")
    assert "model      linear.weight                                float32 [1, 4]  xxh3_128" in listed.out
    [data] = fgckpt("digests", "show", f"{runs}/a@1", "--items", "--json").data["ranks"]
    assert (data["rank"], data["world_size"], data["steps"], data["damage"]) == (1, 2, 6, None)
    assert data["items"][0] == {
        "component": "model",
        "name": "linear.weight",
        "dtype": "float32",
        "shape": [1, 4],
        "algorithm": "xxh3_128",
    }


# ---- where they part


A: Items = {"model:x": "aa", "model:y": "bb", "optimizer:m": "cc", "optimizer:lr": 1}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"model:y": "BB", "optimizer:lr": 2}, ["model:y bytes", "optimizer:lr value"]),
        ({"model:x": "aaa"}, ["model:x structure"]),
        ({"model:x": 5}, ["model:x structure"]),
        ({"model:x": None, "optimizer:lr": 2}, ["model:x only_in_a", "optimizer:lr value"]),
        ({"model:z": "zz", "model:x": "AA"}, ["model:x bytes", "model:z only_in_b"]),
    ],
)
def test_differences_come_in_the_order_of_the_state(
    fgckpt: Fgckpt, tmp_path: Path, change: Items, expected: list[str]
) -> None:
    changed = {name: content for name, content in {**A, **change}.items() if content is not None}
    one = write(tmp_path / "a", {1: A, 2: A, 3: A})
    other = write(tmp_path / "b", {1: A, 2: sorted_by_component(changed), 3: A, 4: A})
    result = fgckpt("digests", "diff", one, other, "--json")
    assert (result.code, result.data["equal"]) == (1, False)
    [pair] = result.data["ranks"]
    assert (pair["last_equal"], pair["first_different"], pair["compared"]) == (1, 2, 2)
    assert (pair["common_steps"], pair["steps_only_in_a"], pair["steps_only_in_b"]) == (3, 0, 1)
    assert pair["items"] == len({**A, **change})
    assert names(pair) == expected
    backwards = fgckpt("digests", "diff", other, one, "--json").data["ranks"][0]
    swapped = {"only_in_a": "only_in_b", "only_in_b": "only_in_a"}
    assert sorted(names(backwards)) == sorted(
        f"{name} {swapped.get(kind, kind)}" for name, kind in map(str.split, expected)
    )


def test_all_steps_are_summed_up_on_request(fgckpt: Fgckpt, tmp_path: Path) -> None:
    other = {**A, "optimizer:m": "CC", "optimizer:lr": 7}
    one = write(tmp_path / "a", dict.fromkeys(range(1, 7), A))
    two = write(tmp_path / "b", {1: A, 2: other, 3: A, 4: {**A, "model:y": "-", "model:x": "--"}, 5: A, 6: A})
    told = fgckpt("digests", "diff", one, two, "--all")
    assert told.code == 1
    lines = [line.split() for line in told.out.splitlines()]
    start = lines.index(["RANK", "STEP", "DIFFER", "FIRST", "IS", "OF", "FIRST", "ITEM"])
    assert lines[start + 1 : start + 3] == [["0", "2", "2", "optimizer", "m"], ["0", "4", "2", "model", "x"]]
    assert "rank 0: equal again at 3 later steps" in told.out
    [pair] = fgckpt("digests", "diff", one, two, "--all", "--json").data["ranks"]
    assert [(step["step"], step["items"]) for step in pair["different_steps"]] == [(2, 2), (4, 2)]
    assert (pair["compared"], pair["equal_again"]) == (6, 3)
    assert names(pair) == ["optimizer:m bytes", "optimizer:lr value"]


def test_many_differences_are_counted_and_the_first_are_listed(fgckpt: Fgckpt, tmp_path: Path) -> None:
    items = {f"model:layer.{number}": "x" for number in range(50)}
    one = write(tmp_path / "a", {1: items})
    two = write(tmp_path / "b", {1: dict.fromkeys(items, "y")})
    told = fgckpt("digests", "diff", one, two)
    assert "layer.19 " in told.out
    assert "layer.20 " not in told.out
    assert "… and 30 more items (fgckpt digests diff" in told.out
    assert told.out.splitlines()[-1] == "they part at step 1, the first common one, in 50 of 50 items"
    assert len(names(fgckpt("digests", "diff", one, two, "--json").data["ranks"][0])) == 50


def test_columns_in_another_order_or_of_another_choice_are_matched_by_name(fgckpt: Fgckpt, tmp_path: Path) -> None:
    backwards = dict(reversed(A.items()))
    extra = {"first:a": 1, "model:x": "aa", "model:extra": "e", "optimizer:lr": 1, "model:y": "bb", "optimizer:m": "cc"}
    one = write(tmp_path / "a", {1: A, 2: A})
    turned = write(tmp_path / "b", {1: backwards, 2: {**backwards, "optimizer:m": "!!"}})
    [pair] = fgckpt("digests", "diff", one, turned, "--json").data["ranks"]
    assert (pair["last_equal"], names(pair)) == (1, ["optimizer:m bytes"])

    # more was recorded, by other patterns: that is no difference of the runs, but it is told
    more = write(tmp_path / "c", {1: sorted_by_component(extra), 2: sorted_by_component(extra)}, include=("*", "extra"))
    equal = fgckpt("digests", "diff", one, more)
    assert equal.code == 0
    assert "recorded in B only, not compared: first: a, model: extra" in equal.out
    [pair] = fgckpt("digests", "diff", more, one, "--json").data["ranks"]
    assert pair["left_out"]["only_in_a"] == [
        {"component": "first", "name": "a"},
        {"component": "model", "name": "extra"},
    ]


_NAMES = [f"{component}:{name}" for component in "mo" for name in "abcd"]
_STATES = st.permutations(_NAMES).flatmap(
    lambda names: st.lists(st.sampled_from(["x", "y", "xx", 1, 2]), min_size=1, max_size=len(names)).map(
        lambda contents: sorted_by_component(dict(zip(names, contents, strict=False)))
    )
)


@given(_STATES, _STATES)
def test_what_differs_is_what_differs_by_name(tmp_path_factory: pytest.TempPathFactory, a: Items, b: Items) -> None:
    """Whatever the order and the place of the columns."""
    root = tmp_path_factory.mktemp("states")
    with DigestLog(write(root / "a", {1: a})) as one, DigestLog(write(root / "b", {1: b})) as two:
        found = divergence.find(one, two)
    shared = {name[0] for name in a} & {name[0] for name in b}  # a component that only one has is no difference
    expected = [name for name in a if name[0] in shared and a[name] != b.get(name)]
    expected += [name for name in b if name[0] in shared and name not in a]
    assert [f"{one.column.component}:{one.column.name}" for one in found.differences] == expected
    assert found.first_different == (1 if expected else None)
    assert found.num_items == len({name for name in {**a, **b} if name[0] in shared})


def sorted_by_component(items: Items) -> Items:
    return dict(sorted(items.items(), key=lambda item: item[0].partition(":")[0]))


def test_components_and_items_can_be_left_out(fgckpt: Fgckpt, tmp_path: Path) -> None:
    one = write(tmp_path / "a", {1: A})
    two = write(tmp_path / "b", {1: {**A, "optimizer:lr": 2}})
    assert fgckpt("digests", "diff", one, two).code == 1
    assert fgckpt("digests", "diff", one, two, "-c", "model").code == 0
    assert fgckpt("digests", "diff", one, two, "--exclude", "l*").code == 0
    assert fgckpt("digests", "diff", one, two, "-c", "optimizer").code == 1
    unknown = fgckpt("digests", "diff", one, two, "-c", "modle")
    assert unknown.code == 2
    assert "there is no component 'modle'; recorded: model, optimizer" in unknown.err
    nothing = fgckpt("digests", "diff", one, two, "--exclude", "*")
    assert (nothing.code, nothing.out) == (2, "")
    assert "no item is left to compare" in nothing.err


def test_between_ranks_what_is_declared_to_differ_is_left_out(fgckpt: Fgckpt, tmp_path: Path) -> None:
    patterns = {"model": "replicated", "optimizer": "per_group"}
    other = {**A, "model:y": "differs", "optimizer:m": "differs"}
    one = write(tmp_path, {1: A}, rank=0, patterns=patterns, varies=["y"])
    two = write(tmp_path, {1: other}, rank=1, patterns=patterns, varies=["y"])
    equal = fgckpt("digests", "diff", one, two)
    assert equal.code == 0
    assert "left out, as each rank has its own: optimizer (-c compares them)" in equal.out
    assert "left out, as declared to differ between ranks: model: y" in equal.out
    assert fgckpt("digests", "diff", one, two, "-c", "model").code == 1
    # of one rank in two runs all is compared
    run = write(tmp_path / "run", {1: other}, rank=0, patterns=patterns, varies=["y"])
    [pair] = fgckpt("digests", "diff", one, run, "--json").data["ranks"]
    assert names(pair) == ["model:y structure", "optimizer:m structure"]


def test_of_a_step_recorded_again_the_last_counts_and_show_tells_whether_it_was_the_same(
    fgckpt: Fgckpt, tmp_path: Path
) -> None:
    steps = {step: {**A, "model:x": f"x{step}"} for step in range(1, 6)}
    one = write(tmp_path / "a", steps)
    two = write(tmp_path / "b", {**steps, 4: {**A, "model:x": "xx"}, 5: {**A, "model:x": "yy"}})
    assert fgckpt("digests", "diff", one, two).code == 1
    write(tmp_path / "b", {4: steps[4], 5: steps[5]})
    assert fgckpt("digests", "diff", one, two).code == 0
    told = fgckpt("digests", "show", two)
    assert told.code == 0
    assert (
        "2 steps recorded more than once, with other digests from step 4 on: 1 item there, the first is model: x"
        in told.out
    )
    write(tmp_path / "a", {5: steps[5]})
    assert "1 step recorded more than once, each time with the same digests" in fgckpt("digests", "show", one).out
    [data] = fgckpt("digests", "show", two, "--json").data["ranks"]
    assert (data["steps"], data["recordings"]) == (5, 7)
    assert data["recorded_again"] == {"steps": 2, "first_different": 4, "not_comparable": 0}


# ---- no telling


def test_digests_of_other_algorithms_are_refused_with_the_reason(fgckpt: Fgckpt, tmp_path: Path) -> None:
    one = write(tmp_path / "a", {1: A}, algorithm="multilinear61x2")
    two = write(tmp_path / "b", {1: A})
    refused = fgckpt("digests", "diff", one, two)
    assert (refused.code, refused.out) == (2, "")
    assert refused.err == (
        "fgckpt: step 1: model: 'x' was recorded with multilinear61x2 in A and xxh3_128 in B. Digests of different "
        "algorithms are never compared: they differ for equal bytes too. Record both with the tensors on the same kind of "
        "device, or leave such items out: --exclude x\n"
    )
    assert fgckpt("digests", "diff", one, two, "--exclude", "[xym]").code == 0
    assert fgckpt("digests", "diff", one, two, "--json").out == ""


def test_steps_recorded_again_with_another_algorithm_or_cut_are_no_damage(fgckpt: Fgckpt, tmp_path: Path) -> None:
    """As by a job that was stopped on GPUs, or on more ranks, and resumed elsewhere."""
    write(tmp_path, {1: A, 2: A, 3: A}, algorithm="multilinear61x2")
    write(tmp_path, {2: A, 3: A})
    write(tmp_path, {3: {"model:x[0:1]": "a", **{name: item for name, item in A.items() if name != "model:x"}}})
    told = fgckpt("digests", "show", tmp_path)
    assert told.code == 0
    assert "2 steps recorded more than once, 2 steps with digests that cannot be compared, of another algor" in told.out
    [data] = fgckpt("digests", "show", tmp_path, "--json").data["ranks"]
    assert data["recorded_again"] == {"steps": 2, "first_different": None, "not_comparable": 2}


def test_parts_that_one_rank_alone_has_are_its_own_and_of_other_cuts_there_is_no_telling(
    fgckpt: Fgckpt, tmp_path: Path
) -> None:
    """As under FSDP, where each rank has its rows; `bias` is empty on rank 1, and `norm` whole on both."""
    patterns = {"model": "replicated"}
    first = {"model:w[0:2,0:3]": "aa", "model:bias[0:1]": "b", "model:norm": "n", "model:var[0:2,0:3]": "0"}
    second = {"model:w[2:4,0:3]": "bb", "model:norm": "n", "model:var[2:4,0:3]": "1"}
    shapes = {"w": (4, 3), "var": (4, 3), "bias": (1,)}
    write(tmp_path / "a", {1: first}, rank=0, patterns=patterns, varies=["v?r"], shapes=shapes)
    write(tmp_path / "a", {1: second}, rank=1, patterns=patterns, varies=["v?r"], shapes=shapes)
    equal = fgckpt("digests", "diff", f"{tmp_path / 'a'}@0", f"{tmp_path / 'a'}@1")
    assert (equal.code, equal.err) == (0, "")
    assert "recorded in A only, not compared: model: w[0:2,0:3], model: bias[0:1]\n" in equal.out
    assert "recorded in B only, not compared: model: w[2:4,0:3]\n" in equal.out
    assert "to differ between ranks: model: var[0:2,0:3], model: var[2:4,0:3]\n" in equal.out
    assert "equal: 1 recorded step, 1 item at each" in equal.out
    write(tmp_path / "a", {1: {**second, "model:norm": "m"}}, rank=1, patterns=patterns, shapes=shapes)
    pairs = fgckpt("digests", "diff", f"{tmp_path / 'a'}@0", f"{tmp_path / 'a'}@1", "--json").data["ranks"]
    assert names(pairs[0]) == ["model:norm bytes"]

    # the same rank in runs that are cut otherwise
    write(tmp_path / "b", {1: {**first, "model:w[0:2,0:3]": "!"}}, rank=0, patterns=patterns, shapes=shapes)
    one, two = f"{tmp_path / 'a'}@0", f"{tmp_path / 'b'}@0"
    assert names(fgckpt("digests", "diff", one, two, "--json").data["ranks"][0]) == ["model:w[0:2,0:3] bytes"]
    assert fgckpt("digests", "diff", one, two, "--exclude", "w").code == 0
    other = {("model:w[0:1,0:3]" if name == "model:w[0:2,0:3]" else name): item for name, item in first.items()}
    write(tmp_path / "b", {1: other}, rank=0, patterns=patterns, shapes=shapes)
    refused = fgckpt("digests", "diff", one, two)
    assert (refused.code, refused.out) == (2, "")
    assert refused.err.startswith(
        "fgckpt: step 1: model: 'w' is cut otherwise in A than in B: only one of them has 'w[0:2,0:3]'. Digests of unlike "
    )
    assert refused.err.endswith("or leave such items out: --exclude w\n")
    assert fgckpt("digests", "diff", one, two, "--exclude", "w").code == 0
    # a part that is not there at all on one side is a difference, as any item is
    del first["model:bias[0:1]"]
    write(tmp_path / "b", {1: first}, rank=0, patterns=patterns, shapes=shapes)
    assert names(fgckpt("digests", "diff", one, two, "--json").data["ranks"][0]) == ["model:bias[0:1] only_in_a"]


def test_an_algorithm_that_changes_on_the_way_is_refused_where_it_matters(fgckpt: Fgckpt, tmp_path: Path) -> None:
    one = write(tmp_path / "a", {1: A, 2: A, 3: A})
    same = write(tmp_path / "b", {1: A, 2: A})
    write(tmp_path / "b", {3: A}, algorithm="multilinear61x2")
    assert "step 3: model: 'x' was recorded with" in fgckpt("digests", "diff", one, same).err
    parted = write(tmp_path / "c", {1: A, 2: {**A, "model:x": "!!"}})
    write(tmp_path / "c", {3: A}, algorithm="multilinear61x2")
    assert fgckpt("digests", "diff", one, parted).code == 1
    assert fgckpt("digests", "diff", one, parted, "--all").code == 2


def test_a_log_that_was_cut_off_is_compared_as_far_as_it_goes_and_that_is_said(fgckpt: Fgckpt, tmp_path: Path) -> None:
    one = write(tmp_path / "a", {1: A, 2: A, 3: A})
    two = tmp_path / "cut.fgdl"
    two.write_bytes(one.read_bytes()[:-5])
    result = fgckpt("digests", "diff", one, two)
    assert result.code == 0
    assert result.err == f"fgckpt: B: {two} is cut off after step 2: 107 bytes of an unfinished record follow\n"
    shown = fgckpt("digests", "show", two)
    assert (shown.code, "cut off after step 2: 107 bytes" in shown.out) == (0, True)
    two.write_bytes(b"")
    assert fgckpt("digests", "diff", one, two).code == 2
    empty = fgckpt("digests", "show", two)
    assert (empty.code, empty.out.splitlines()[-1].split()[-1]) == (0, "empty")


def test_damage_is_no_difference(fgckpt: Fgckpt, tmp_path: Path) -> None:
    one = write(tmp_path / "a", {1: A, 2: A, 3: A})
    two = tmp_path / "b" / digest_log.file_name(1)
    two.parent.mkdir()
    data = bytearray(one.read_bytes())
    data[-12] ^= 1
    two.write_bytes(data)
    refused = fgckpt("digests", "diff", one, two)
    assert (refused.code, refused.out) == (2, "")
    assert f"step 3 does not have the check that was recorded ({two})" in refused.err
    shutil.copy(one, two.with_name(digest_log.file_name(0)))
    shown = fgckpt("digests", "show", two.parent)
    assert shown.code == 1
    lines = shown.out.splitlines()
    assert [line.split()[0] + line.split()[-1] for line in lines[1:3]] == ["0whole", "1DAMAGED"]
    assert lines[3].startswith("digests-rank00001.fgdl: the log of digests is damaged at byte ")
    [_, bad] = fgckpt("digests", "show", two.parent, "--json").data["ranks"]
    assert bad["damage"].endswith("step 3 does not have the check that was recorded")


def test_what_is_not_there_is_told(fgckpt: Fgckpt, tmp_path: Path) -> None:
    one = write(tmp_path / "a", {1: A, 2: A})
    other = write(tmp_path / "b", {3: A}, rank=1)
    (tmp_path / "none").mkdir()
    cases = [
        ((tmp_path / "missing", one), 3, "there is no log of digests"),
        (
            (tmp_path / "none", one),
            3,
            "holds no logs of digests, such as digests-rank00000.fgdl; a DigestRecorder makes",
        ),
        ((f"{tmp_path}/a@4", one), 3, "has no log of rank 4; it has those of rank 0"),
        ((tmp_path / "a", tmp_path / "b"), 3, "no rank has a log in both"),
        ((one, other), 3, "a/digests-rank00000.fgdl has 2 steps (1 to 2), "),
    ]
    for arguments, code, message in cases:
        result = fgckpt("digests", "diff", *arguments)
        assert (result.code, result.out) == (code, "")
        assert message in result.err


def test_ranks_that_only_one_side_has_are_told(fgckpt: Fgckpt, tmp_path: Path) -> None:
    for rank in range(3):
        write(tmp_path / "a", {1: A}, rank=rank)
    write(tmp_path / "b", {1: A}, rank=1)
    result = fgckpt("digests", "diff", tmp_path / "a", tmp_path / "b")
    assert result.code == 0
    assert "only in A, not compared: ranks 0, 2" in result.out


def test_names_cannot_move_the_cursor(fgckpt: Fgckpt, tmp_path: Path) -> None:
    one = write(tmp_path / "a", {1: {"model\x1b[31m:red\x1b[31m": "a"}})
    two = write(tmp_path / "b", {1: {"model\x1b[31m:red\x1b[31m": "b"}})
    for result in (
        fgckpt("digests", "diff", one, two),
        fgckpt("digests", "diff", one, two, "--all"),
        fgckpt("digests", "show", one, "--items"),
    ):
        assert "red\\x1b[31m" in result.out
        assert "\x1b" not in result.out


# ---- size


def test_comparing_takes_the_memory_of_two_frames_not_of_the_logs(tmp_path: Path) -> None:
    columns = [Column("model", f"layers.{number}", "float32", (4,), "xxh3_128") for number in range(5000)]
    for name in "ab":
        writer = LogWriter(tmp_path / name, rank=0, world_size=1)
        for step in range(200):
            data = bytearray(hashtree.digest(str(step).encode()) * len(columns))
            data[16 * step] ^= name == "b"
            writer.write(step, [Part("model", None)], columns, bytes(data))
        writer.close()
    tracemalloc.start()
    try:
        with DigestLog(tmp_path / "a") as a, DigestLog(tmp_path / "b") as b:
            found = divergence.find(a, b, every=True)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert [(step.num_different, step.first.name) for step in found.different] == [
        (1, f"layers.{step}") for step in range(200)
    ]
    assert (tmp_path / "a").stat().st_size > 16_000_000
    assert peak < 12_000_000  # of which most is the two headers


def test_programs_get_one_json_object(fgckpt: Fgckpt, tmp_path: Path) -> None:
    one = write(tmp_path / "a", {1: A})
    for command, schema in ((("diff", one, one), "fgckpt.digests.diff/1"), (("show", one), "fgckpt.digests.show/1")):
        result = fgckpt("digests", *command, "--json")
        assert (result.code, result.err, json.loads(result.out)["schema"]) == (0, "", schema)
