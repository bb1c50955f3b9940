"""`fgckpt diff` and `fgckpt bisect` over real checkpoints: of 1, 2 and 4 ranks, damaged, of another algorithm."""

from __future__ import annotations

import errno
import itertools
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from forgather_ckpt import (
    CheckpointCoordinator,
    SharingPattern,
    StateComponent,
    catalog,
    commit,
    files,
    hashtree,
    paths,
)
from forgather_ckpt.cli import main
from forgather_ckpt.cli.differences import old_and_new
from forgather_ckpt.manifest import CheckpointManifest, ComponentRecord, EntryRecord, FileRecord
from forgather_ckpt.topology import Topology
from tests.checkpoints import assign, write
from tests.components import Box, sample
from tests.ranks import run_ranks, values
from tests.test_cli import Fgckpt, env, fgckpt, on_a_terminal

__all__ = ["fgckpt"]

NUM_LARGE = 11_000_000
"""Elements of a tensor that several writers share: 44 MB."""


def save(run: Path, states: Mapping[str, Any], *steps: int, pattern: SharingPattern = SharingPattern.GLOBAL) -> Path:
    """Save states of components at these steps, by one process."""
    components = [StateComponent(key, Box(state), pattern) for key, state in states.items()]
    with CheckpointCoordinator(components, run) as coordinator:
        return [coordinator.save_checkpoint(step) for step in steps][-1]


def state(**changes: Any) -> dict[str, Any]:
    model = {"weight": torch.arange(12.0).reshape(3, 4), "bias": torch.zeros(3), "scale": 0.5}
    return {"model": {**model, **changes}, "progress": {"step": 5}}


# ---- however it was written


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same state saved by jobs of 1, 2 and 4 ranks, and once with another last element of the large tensor."""
    root = tmp_path_factory.mktemp("jobs")

    def case(rank: int, world_size: int) -> None:
        for name in (f"of-{world_size}", *(["other"] if world_size == 4 else [])):
            large = torch.arange(NUM_LARGE, dtype=torch.int32)
            large[-1] += name == "other"
            model = Box({**sample("everybody"), "large": large})
            components = [
                StateComponent("model", model, SharingPattern.REPLICATED),
                StateComponent("rng", Box({"seed": f"rank {rank}"}), SharingPattern.PER_RANK, on_resize="drop"),
            ]
            with CheckpointCoordinator(components, root / name, timeout_seconds=60) as coordinator:
                coordinator.save_checkpoint(1)

    for world_size in (1, 2, 4):
        values(run_ranks(world_size, case))
    return root


@pytest.mark.multiprocess
def test_the_same_state_is_equal_whoever_wrote_it(fgckpt: Fgckpt, jobs: Path) -> None:
    for one, other in (("of-1", "of-2"), ("of-2", "of-4"), ("of-4", "of-1")):
        result = fgckpt("diff", jobs / one, jobs / other, "-c", "model", "--json")
        assert (result.code, result.data["equal"], result.data["differences"]) == (0, True, [])
        assert result.data["components"]["model"]["equal"] == 16
    index = catalog.read_index(*_checkpoint(jobs / "of-4"), "index-00000.json")
    assert any(row.range is not None for entry in index.entries for row in entry.tensors)


@pytest.mark.multiprocess
def test_pieces_are_compared_by_their_blocks_too(fgckpt: Fgckpt, jobs: Path, tmp_path: Path) -> None:
    """As if no writer had held the tensor whole: without the digests over it, and of the entry."""
    for name in ("of-2", "of-4", "other"):
        shutil.copytree(jobs / name, tmp_path / name)
        forget_whole_digests(tmp_path / name / "checkpoint-1")
    equal = fgckpt("diff", tmp_path / "of-2", tmp_path / "of-4", "-c", "model")
    assert (equal.code, equal.err) == (0, "")
    different = fgckpt("diff", tmp_path / "of-2", tmp_path / "other", "-c", "model", "--json")
    assert different.code == 1
    assert [(one["name"], one["change"]) for one in different.data["differences"]] == [("large", "bytes")]


def forget_whole_digests(checkpoint: Path) -> None:
    data = json.loads((checkpoint / paths.MANIFEST).read_bytes())
    for name in data["indexes"]:
        index = json.loads((checkpoint / name).read_bytes())
        for entry in index["entries"]:
            entry["tensors"]["logical"] = {}
        content = json.dumps(index).encode()
        (checkpoint / name).write_bytes(content)
        data["files"][name].update(size=len(content), digest=hashtree.digest(content).hex())
    for component in data["components"].values():
        for number, entry in enumerate(component["entries"].values()):
            entry["digest"] = hashtree.digest(f"{checkpoint} {number}".encode()).hex()
    rewrite_manifest(checkpoint, data)


def rewrite_manifest(checkpoint: Path, data: dict[str, Any]) -> None:
    """Write a manifest with its own digest."""
    data["digest"] = "0" * 32
    blank = json.dumps(data).encode()
    (checkpoint / paths.MANIFEST).write_bytes(blank.replace(b"0" * 32, hashtree.digest(blank).hex().encode(), 1))


def _checkpoint(run: Path) -> tuple[Path, CheckpointManifest]:
    found = catalog.read_checkpoint(run / "checkpoint-1")
    return found.path, found.manifest


@pytest.mark.multiprocess
def test_ranks_that_only_one_job_has(fgckpt: Fgckpt, jobs: Path) -> None:
    result = fgckpt("diff", jobs / "of-2", jobs / "of-4")
    assert result.code == 1
    assert re.search(
        r"A  .*of-2/checkpoint-1  step 1  saved by 2 ranks\nB  .*of-4/checkpoint-1 .* by 4 ranks\n", result.out
    )
    assert re.search(r"^rng +4 +2 +- +- +2$", result.out, re.MULTILINE)
    assert "rng: only in B: rank=2, rank=3 (2 items)\n" in result.out
    assert result.out.endswith("differ: 2 of 20 items of 2 components, in rng\n")
    data = fgckpt("diff", jobs / "of-4", jobs / "of-2", "--json").data
    assert data["components"]["rng"]["entries_only_in_a"] == {"rank=2": 1, "rank=3": 1}


@pytest.mark.multiprocess
def test_pieces_are_measured_across_layouts(fgckpt: Fgckpt, jobs: Path) -> None:
    result = fgckpt("diff", jobs / "of-1", jobs / "other", "-c", "model", "--tensors", "--json")
    [difference] = result.data["differences"]
    assert difference["elements"]["different"] == 1
    assert difference["elements"]["elements"] == NUM_LARGE
    assert difference["elements"]["first_index"] == [NUM_LARGE - 1]
    assert difference["elements"]["max_abs"] == 1.0
    assert difference["norms"]["difference"] == 1.0
    norm = float(torch.arange(NUM_LARGE, dtype=torch.float64).norm())
    assert difference["norms"]["a"] == pytest.approx(norm, rel=1e-9)


# ---- what differs


def test_every_kind_of_difference_is_told(fgckpt: Fgckpt, tmp_path: Path) -> None:
    before = {
        "weight": torch.arange(12.0).reshape(3, 4),
        "turned": torch.zeros(2, 3),
        "cast": torch.zeros(2),
        "was_tensor": torch.zeros(2),
        "rate": 0.1,
        "flag": 1,
        "text": "x" * 60 + "old",
        "gone": torch.zeros(5),
        "same": torch.ones(7),
    }
    after: dict[str, Any] = dict(before)
    after.update(
        weight=torch.arange(12.0).reshape(3, 4) + torch.eye(3, 4),
        turned=torch.zeros(3, 2),
        cast=torch.zeros(2).bfloat16(),
        was_tensor=[0, 0],
        rate=0.1 + 2e-17,
        flag=True,
        text="x" * 60 + "new",
    )
    del after["gone"]
    after["new"] = None
    a = save(tmp_path / "a", {"model": before, "only_a": {"v": 1}}, 1)
    b = save(tmp_path / "b", {"model": after}, 1)
    result = fgckpt("diff", a, b)
    assert (result.code, result.err) == (1, "")
    told = dict(re.findall(r"^model +(\w+) +(\S.*)$", result.out, re.MULTILINE))
    assert told == {
        "weight": "bytes of float32 [3, 4]",
        "turned": "float32 [2, 3] → float32 [3, 2]",
        "cast": "float32 [2] → bfloat16 [2]",
        "was_tensor": "float32 [2] → value [0, 0]",
        "rate": "0.1 → 0.10000000000000002",
        "flag": "1 → true",
        "text": '…xxxxxxxxold" → …xxxxxxxxnew"',
        "gone": "only in A: float32 [5]",
        "new": "only in B: value null",
    } | {"10": told["10"]}
    assert "only_a: only A has this component\n" in result.out
    assert re.search(r"^model +10 +1 +7 +1 +1$", result.out, re.MULTILINE)
    assert result.out.endswith("differ: 10 of 11 items of 2 components, in model, only_a\n")
    data = fgckpt("diff", a, b, "--json").data
    assert (data["schema"], data["equal"]) == ("fgckpt.diff/1", False)
    assert [one["change"] for one in data["differences"]] == [
        *("bytes", "structure", "structure", "kind", "value", "value", "value", "only_in_a", "only_in_b")
    ]
    assert data["differences"][4]["a"] == {"value": 0.1}
    assert data["differences"][1]["b"] == {"dtype": "float32", "shape": [3, 2]}
    assert data["differences"][8]["a"] is None


def test_equal_checkpoints_are_equal(fgckpt: Fgckpt, tmp_path: Path) -> None:
    save(tmp_path / "a", state(), 1, 2)
    save(tmp_path / "b", state(), 7)
    result = fgckpt("diff", tmp_path / "a@1", tmp_path / "b")
    assert (result.code, result.err) == (0, "")
    assert result.out.endswith("equal: 4 items of 2 components\n")


def test_a_tie_on_one_side_is_no_difference_and_is_told(fgckpt: Fgckpt, tmp_path: Path) -> None:
    weight = torch.ones(3)
    save(tmp_path / "a", {"model": {"weight": weight, "head": weight}}, 1)
    save(tmp_path / "b", {"model": {"weight": weight, "head": weight.clone()}}, 1)
    result = fgckpt("diff", tmp_path / "a", tmp_path / "b")
    assert result.code == 0
    assert "model: 1 item, equal now, shared in memory with others in A than in B" in result.out


def test_only_the_first_items_are_listed_unless_all_are_asked_for(fgckpt: Fgckpt, tmp_path: Path) -> None:
    for name in ("a", "b"):
        layers = {f"layers.{number}.{kind}": f"{name}{number}" for number in range(25) for kind in ("w", "b")}
        save(tmp_path / name, {"model": {"first": name, **layers}}, 1)
    result = fgckpt("diff", tmp_path / "a", tmp_path / "b")
    assert "… and 31 more items (--all lists them)" in result.out
    assert "layers.9.b" not in result.out
    assert re.search(r"^model +first +1\nmodel +layers\.\*\.w +25\nmodel +layers\.\*\.b +25$", result.out, re.MULTILINE)
    listed = fgckpt("diff", tmp_path / "a", tmp_path / "b", "--all").out
    assert "layers.24.b" in listed
    assert "more items" not in listed
    assert len(fgckpt("diff", tmp_path / "a", tmp_path / "b", "--json").data["differences"]) == 51


def test_names_and_values_cannot_move_the_cursor(fgckpt: Fgckpt, tmp_path: Path) -> None:
    save(tmp_path / "a", {"model": {"na\x1b[31mme": "old\x1b[2J"}}, 1)
    save(tmp_path / "b", {"model": {"na\x1b[31mme": "new\x1b[2J"}}, 1)
    result = fgckpt("diff", tmp_path / "a", tmp_path / "b")
    assert "na\\x1b[31mme" in result.out
    assert "\x1b" not in result.out


@pytest.mark.parametrize(
    ("old", "new", "shown"),
    [
        ("1", "2", ("1", "2")),
        ("a" * 40, "a" * 39 + "b", ("…" + "a" * 9, "…" + "a" * 8 + "b")),
        ("a" * 40, "b" * 40, ("a" * 31 + "…", "b" * 31 + "…")),
        ("a" * 45, "a" * 10, ("…" + "a" * 30 + "…", "…" + "a" * 8)),
        ("a" * 10**7 + "b", "a" * 10**7 + "c", ("…aaaaaaaab", "…aaaaaaaac")),
    ],
)
def test_values_are_shortened_to_where_they_differ(old: str, new: str, shown: tuple[str, str]) -> None:
    assert old_and_new(old, new) == shown


# ---- which checkpoints


def test_all_ways_to_name_a_checkpoint(fgckpt: Fgckpt, tmp_path: Path) -> None:
    run = tmp_path / "run"
    save(run, state(), 1)
    save(run, state(scale=0.75), 2)
    save(tmp_path / "odd@name", state(), 1)
    different: Sequence[tuple[Any, ...]] = [
        ("1", "2", "-d", run),
        ("step:1", "latest", "-d", run),
        ("latest~1", "latest", "-d", run),
        (run / "checkpoint-1", run / "checkpoint-2"),
        ("checkpoint-1", "2", "-d", run),
        (f"{run}@1", f"{run}@latest"),
        (f"{run}@checkpoint-1", run / "checkpoint-2"),
        (tmp_path / "odd@name", f"{run}@2"),
    ]
    for arguments in different:
        result = fgckpt("diff", *arguments, "--json")
        assert (result.code, result.data["a"]["step"], result.data["b"]["step"]) == (1, 1, 2), arguments
    assert fgckpt("diff", tmp_path / "odd@name", run / "checkpoint-1").code == 0


def test_two_runs_are_compared_at_the_newest_step_that_both_have(fgckpt: Fgckpt, tmp_path: Path) -> None:
    save(tmp_path / "a", state(), 1, 2, 4)
    save(tmp_path / "b", state(), 2, 3)
    result = fgckpt("diff", tmp_path / "a", tmp_path / "b", "--json")
    assert (result.code, result.data["a"]["step"], result.data["b"]["step"]) == (0, 2, 2)
    assert result.err == (
        "fgckpt: step 2 is the newest that both have; A goes on to 4\n"
        "fgckpt: step 2 is the newest that both have; B goes on to 3\n"
    )


def test_what_is_not_there(fgckpt: Fgckpt, tmp_path: Path) -> None:
    save(tmp_path / "a", state(), 1, 2)
    save(tmp_path / "b", state(), 3)
    (tmp_path / "empty").mkdir()
    for command in ("diff", "bisect"):
        result = fgckpt(command, tmp_path / "a", tmp_path / "b")
        assert (result.code, result.out) == (3, "")
        assert f"no step is committed in both runs; the newest in {tmp_path}/a: 1, 2; in {tmp_path}/b: 3." in result.err
    assert fgckpt("diff", tmp_path / "a", tmp_path / "nowhere").code == 3
    assert fgckpt("diff", tmp_path / "a@9", tmp_path / "b").code == 3
    assert fgckpt("diff", tmp_path / "a@1", tmp_path / "empty").code == 3
    assert fgckpt("bisect", tmp_path / "a", tmp_path / "nowhere").code == 3
    assert fgckpt("bisect", tmp_path / "a", tmp_path / "a" / "checkpoint-1").code == 3
    for command in ("diff", "bisect"):
        result = fgckpt(command, tmp_path / "a", tmp_path / "a", "-c", "modle")
        assert result.code == 2
        assert "there is no component 'modle'; known: model, progress" in result.err


# ---- trouble is no difference


def test_damage_is_not_taken_for_a_difference(fgckpt: Fgckpt, tmp_path: Path) -> None:
    a, b = (save(tmp_path / name, state(scale=scale), 1) for name, scale in (("a", 1), ("b", 2)))
    index = b / "index-00000.json"
    good = index.read_bytes()
    index.write_bytes(good.replace(b"scale", b"scalf"))
    result = fgckpt("diff", a, b)
    assert (result.code, result.out) == (2, "")
    assert "index-00000.json does not have the digest that the manifest gives" in result.err
    index.write_bytes(good[:-1])
    result = fgckpt("diff", a, b)
    assert result.code == 2
    assert "the manifest expects" in result.err
    (b / paths.MANIFEST).unlink()
    result = fgckpt("diff", a, b)
    assert result.code == 3
    assert "is not a checkpoint: it has no checkpoint_manifest.json" in result.err


def test_no_byte_of_a_tensor_is_read_unless_asked_for(fgckpt: Fgckpt, tmp_path: Path) -> None:
    a = save(tmp_path / "a", state(), 1)
    b = save(tmp_path / "b", state(weight=torch.ones(3, 4)), 1)
    for checkpoint in (a, b):
        for file in checkpoint.glob("*.safetensors"):
            file.write_bytes(bytes(file.stat().st_size))
    result = fgckpt("diff", a, b, "--json")
    assert [one["name"] for one in result.data["differences"]] == ["weight"]
    result = fgckpt("diff", a, b, "--tensors")
    assert (result.code, result.out) == (2, "")
    assert "component 'model': tensor 'weight', block 1 of 1" in result.err
    assert "does not have the digest that was recorded" in result.err


def test_a_file_system_that_fails_is_no_difference(
    fgckpt: Fgckpt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = (save(tmp_path / name, state(scale=scale), 1) for name, scale in (("a", 1), ("b", 2)))

    def fail(path: Path) -> int:
        raise OSError(errno.EIO, "Input/output error", str(path))

    monkeypatch.setattr(files, "open_to_read", fail)
    result = fgckpt("diff", a, b)
    assert (result.code, result.out) == (5, "")
    assert "reading the checkpoint failed" in result.err


def of_algorithm(checkpoint: Path, algorithm: str) -> None:
    data = json.loads((checkpoint / paths.MANIFEST).read_bytes())
    rewrite_manifest(checkpoint, {**data, "algorithm": algorithm})


def test_digests_of_different_algorithms_are_not_compared(fgckpt: Fgckpt, tmp_path: Path) -> None:
    a, b = (save(tmp_path / name, state(), 1) for name in ("a", "b"))
    of_algorithm(b, "blake3")
    for arguments in (
        ("diff", a, b),
        ("diff", tmp_path / "a", tmp_path / "b"),
        ("bisect", tmp_path / "a", tmp_path / "b"),
    ):
        result = fgckpt(*arguments)
        assert (result.code, result.out) == (2, "")
        assert "A has digests of 'xxh3_128' and B of 'blake3'. Digests of different algorithms are never" in result.err
    of_algorithm(a, "blake3")
    result = fgckpt("diff", a, b)
    assert result.code == 2
    assert "'blake3'; this version reads xxh3_128" in result.err


def publish(run: Path, contents: Mapping[int, torch.Tensor], cut_at: int | None) -> Path:
    """Checkpoints of one tensor, at each step; by two writers who divide it at an element where no block begins."""
    for step, tensor in contents.items():
        draft = commit.begin(run, step)
        num_bytes = tensor.nbytes
        cuts = [0, num_bytes] if cut_at is None else [0, 4 * cut_at, num_bytes]
        records: dict[str, FileRecord] = {}
        indexes: dict[str, Any] = {}
        for writer, bounds in enumerate(itertools.pairwise(cuts)):
            assignment = assign("model", {"weight": tensor}, num_writers=len(cuts) - 1, parts={"weight": bounds})
            written = write(draft.directory, assignment, writer=writer)
            indexes.update(written.indexes)
            records |= {name: FileRecord(size, digest, writer) for name, (size, digest) in written.files.items()}
        digest = hashtree.digest(f"{run} {step}".encode()).hex()
        component = ComponentRecord(
            pattern=SharingPattern.REPLICATED,
            names="global",
            required=True,
            group=None,
            entries={"all": EntryRecord((0,), None, (0,), 1, num_bytes, digest)},
            digest=digest,
        )
        manifest = CheckpointManifest(
            step, draft.sequence, "periodic", "", Topology.single(), {"model": component}, records, indexes
        )
        commit.publish(draft, manifest)
    return run


def test_what_cannot_be_told_without_reading(fgckpt: Fgckpt, tmp_path: Path) -> None:
    before, after = torch.arange(100.0), torch.arange(100.0)
    after[[7, 60]] += torch.tensor([0.5, -2.0])
    a = publish(tmp_path / "a", {1: before, 2: before, 3: before}, None)
    b = publish(tmp_path / "b", {1: before, 2: after, 3: after}, 33)
    c = publish(tmp_path / "c", {1: before, 2: before, 3: before}, 20)
    for command in ("diff", "bisect"):
        result = fgckpt(command, a, b)
        assert result.code == 2
        assert "1 tensor cannot be told to be equal or not without reading" in result.err
        assert "add --logical" in result.err
        assert fgckpt(command, a, b, "--logical").code == 1
    shown = fgckpt("diff", f"{a}@1", f"{b}@1")
    assert re.search(r"^model +1 +- +- +- +- +1$", shown.out, re.MULTILINE)
    assert "not known: 1 of 1 item of 1 component" in shown.out
    assert fgckpt("diff", f"{a}@1", f"{b}@1", "--json").data["equal"] is None
    for option in ("--tensors", "--logical"):
        assert fgckpt("diff", f"{a}@1", f"{b}@1", option).out.endswith("equal: 1 item of 1 component\n")
    assert fgckpt("diff", a, c, "--tensors").code == 0
    result = fgckpt("diff", c, b, "--tensors", "--json")
    [difference] = result.data["differences"]
    assert (result.code, difference["change"], difference["elements"]["first_index"]) == (1, "bytes", [7])
    parted = fgckpt("bisect", a, b, "--tensors", "--json").data
    assert (parted["last_equal"], parted["first_different"]) == (1, 2)
    assert parted["at"]["differences"][0]["elements"]["max_abs"] == 2.0
    assert fgckpt("bisect", a, c, "--tensors").code == 0


# ---- --tensors


def test_how_far_apart(fgckpt: Fgckpt, tmp_path: Path) -> None:
    weight = torch.tensor([[3.0, 0.0], [4.0, 0.0]])
    other = torch.tensor([[3.0, 0.0], [4.0, 0.5]])
    nan = torch.tensor([1.0, float("nan"), float("inf")])
    a = save(tmp_path / "a", {"model": {"weight": weight, "mask": torch.tensor([True, False]), "same": nan}}, 1)
    b = save(tmp_path / "b", {"model": {"weight": other, "mask": torch.tensor([True, True]), "same": nan}}, 1)
    result = fgckpt("diff", a, b, "--tensors")
    assert result.code == 1
    assert re.search(r"^model +weight +1 +4 +\[1, 1\] +0\.5 +0\.1$", result.out, re.MULTILINE)
    assert re.search(r"^model +mask +1 +2 +\[1\] +1 +1$", result.out, re.MULTILINE)
    assert "no NaN and no Inf in them, in A or in B\n" in result.out
    c = save(
        tmp_path / "c",
        {"model": {"weight": weight, "mask": torch.tensor([True, False]), "same": nan[:2].repeat(2)[:3]}},
        1,
    )
    result = fgckpt("diff", a, c, "--tensors")
    assert "NAN A, B  INF A, B" in result.out
    assert re.search(r"^model +same +1 +3 +\[2\] +inf +0 +1, 1 +1, 0$", result.out, re.MULTILINE)


def test_the_farthest_tensor_is_named_though_it_is_not_listed(fgckpt: Fgckpt, tmp_path: Path) -> None:
    for name, apart in (("a", 0.0), ("b", 1e-3)):
        tensors = {f"t{number}": torch.ones(4) + apart * (100 if number == 23 else 1) for number in range(25)}
        save(tmp_path / name, {"model": tensors}, 1)
    result = fgckpt("diff", tmp_path / "a", tmp_path / "b", "--tensors")
    assert "… and 5 more tensors (--all lists them)\nmodel: farthest apart is t23, ‖Δ‖/‖A‖ 0.1\n" in result.out
    assert "farthest apart" not in fgckpt("diff", tmp_path / "a", tmp_path / "b", "--tensors", "--all").out


def test_infinite_ratios_are_json_too(fgckpt: Fgckpt, tmp_path: Path) -> None:
    save(tmp_path / "a", {"model": {"w": torch.zeros(2)}}, 1)
    save(tmp_path / "b", {"model": {"w": torch.ones(2)}}, 1)
    result = fgckpt("diff", tmp_path / "a", tmp_path / "b", "--tensors", "--json")
    [difference] = result.data["differences"]
    assert difference["norms"] == {"a": 0.0, "difference": pytest.approx(2**0.5), "relative": "inf"}


def test_progress_and_boxes_on_a_terminal(tmp_path: Path) -> None:
    save(tmp_path / "a", state(), 1)
    save(tmp_path / "b", state(), 1)
    shown = on_a_terminal(["diff", str(tmp_path / "a"), str(tmp_path / "b")], {"TERM": "xterm", "COLUMNS": "100"})
    assert "╭" in shown
    assert "equal" in shown


@pytest.mark.parametrize("command", ["diff", "bisect"])
def test_torch_is_not_imported(command: str, tmp_path: Path) -> None:
    save(tmp_path / "a", state(), 1)
    save(tmp_path / "b", state(scale=2), 1)
    code = (
        "import sys; from forgather_ckpt.cli import main; "
        f"code = main([{command!r}, {str(tmp_path / 'a')!r}, {str(tmp_path / 'b')!r}]); "
        "assert not {'torch', 'numpy', 'rich'} & set(sys.modules); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env(), check=False)
    assert (done.returncode, done.stderr) == (1, "")
    assert "0.5 → 2" in done.stdout


def test_tensors_cannot_be_read_without_torch(fgckpt: Fgckpt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "a", state(), 1)
    save(tmp_path / "b", state(weight=torch.ones(3, 4)), 1)
    monkeypatch.delitem(sys.modules, "forgather_ckpt.deltas", raising=False)
    monkeypatch.delattr("forgather_ckpt.deltas", raising=False)
    monkeypatch.setitem(sys.modules, "torch", None)
    result = fgckpt("diff", tmp_path / "a", tmp_path / "b", "--tensors")
    assert result.code == 2
    assert "reading tensors needs torch and numpy, which cannot be imported here" in result.err


# ---- bisect


Runs = Callable[..., tuple[Path, Path]]


@pytest.fixture
def runs(tmp_path: Path) -> Runs:
    """Two runs with these steps, and at which of them B's model is another one."""

    def make(a: Sequence[int], b: Sequence[int], different: Sequence[int]) -> tuple[Path, Path]:
        for name, steps in (("a", a), ("b", b)):
            for step in steps:
                weight = torch.ones(4) * (2 if name == "b" and step in different else 1)
                optimizer = {"state.w.exp_avg": weight, "state.w.exp_avg_sq": torch.ones(4)}
                late = {"w": torch.ones(2) + (name == "b" and step in different and step - 1 in different)}
                save(tmp_path / name, {"model": late, "optimizer": optimizer, "clock": {"name": name}}, step)
        return tmp_path / "a", tmp_path / "b"

    return make


def test_bisect_finds_the_first_step_and_what_came_first(fgckpt: Fgckpt, runs: Runs) -> None:
    a, b = runs(range(1, 11), range(0, 12), range(7, 12))
    result = fgckpt("bisect", a, b, "-c", "model", "-c", "optimizer")
    assert (result.code, result.err) == (1, "")
    lines = result.out.splitlines()
    assert lines[0] == "10 common steps (1 to 10), 4 compared; 0 only in A, 2 only in B"
    assert lines[1] == "equal up to step 6, different at step 7"
    assert "optimizer  state.w.exp_avg  bytes of float32 [4]" in lines
    assert lines[-1] == "differ: 1 of 3 items of 2 components, in optimizer"
    data = fgckpt("bisect", a, b, "-c", "model", "-c", "optimizer", "--json", "--tensors").data
    assert (data["schema"], data["last_equal"], data["first_different"]) == ("fgckpt.bisect/1", 6, 7)
    assert (data["only_in_a"], data["only_in_b"], data["common_steps"]) == ([], [0, 11], list(range(1, 11)))
    assert len(data["compared"]) == 4
    assert [one["name"] for one in data["at"]["differences"]] == ["state.w.exp_avg"]
    assert data["at"]["differences"][0]["norms"]["relative"] == 1.0


def test_bisect_of_runs_that_are_equal(fgckpt: Fgckpt, runs: Runs) -> None:
    a, b = runs([1, 2, 3], [1, 2, 3], [])
    result = fgckpt("bisect", a, b, "-c", "model")
    assert result.code == 0
    assert "3 common steps (1 to 3), 1 compared; 0 only in A, 0 only in B\n" in result.out
    assert "equal at step 3, the last common one, so they have not parted before" in result.out
    result = fgckpt("bisect", a, b, "-c", "model", "--all")
    assert (result.code, result.out.splitlines()[1]) == (0, "equal at 3 common steps")
    assert fgckpt("bisect", a, b, "-c", "model", "--json").data["at"] is None


def test_bisect_of_runs_that_always_differ(fgckpt: Fgckpt, runs: Runs) -> None:
    a, b = runs([1, 2], [1, 2], [])
    result = fgckpt("bisect", a, b)
    assert result.code == 1
    assert "they differ from the first common step, 1: they parted at it or before\n" in result.out
    assert re.search(r'^clock +name +"a" → "b"$', result.out, re.MULTILINE)


def test_only_all_steps_tell_that_runs_meet_again(fgckpt: Fgckpt, runs: Runs) -> None:
    a, b = runs(range(1, 9), range(1, 9), [3, 4])
    assert fgckpt("bisect", a, b, "-c", "optimizer").code == 0
    result = fgckpt("bisect", a, b, "-c", "optimizer", "--all")
    assert result.code == 1
    assert "8 common steps (1 to 8), 8 compared" in result.out
    assert "equal up to step 2, different at step 3\nequal again at 4 later steps: 5, 6, 7, 8\n" in result.out


def test_bisect_leaves_out_what_is_not_committed_and_says_so(fgckpt: Fgckpt, runs: Runs) -> None:
    a, b = runs([1, 2, 3], [1, 2, 3], [2, 3])
    (b / "checkpoint-2" / "index-00000.json").unlink()
    result = fgckpt("bisect", a, b, "-c", "optimizer")
    assert result.code == 1
    assert "2 common steps (1 to 3), 2 compared; 1 only in A, 0 only in B\n" in result.out
    assert "checkpoint-2 is not committed: index-00000.json is missing" in result.err
    assert "it is left out" in result.err


def test_bisect_tells_how_to_list_everything(fgckpt: Fgckpt, tmp_path: Path) -> None:
    for name in ("a", "b"):
        save(tmp_path / name, {"model": {f"v{number}": name for number in range(30)}}, 1)
    result = fgckpt("bisect", tmp_path / "a", tmp_path / "b", "-c", "model")
    [command] = re.findall(r"\((fgckpt diff .*) lists them\)", result.out)
    assert command.endswith(" -c model --all")
    assert "v29" in fgckpt(*command.split()[1:]).out


def test_the_steps_are_those_of_manifests_not_of_names(fgckpt: Fgckpt, runs: Runs) -> None:
    a, b = runs([1, 2], [1, 2], [2])
    (b / "checkpoint-2").rename(b / "moved")
    assert fgckpt("bisect", a, b, "-c", "optimizer", "--json").data["first_different"] == 2


def test_help_names_the_exit_codes(fgckpt: Fgckpt) -> None:
    shown = " ".join(fgckpt("diff", "--help").out.split())
    assert "Exit code 0 if all is equal, 1 if something differs, 2 if that cannot be told" in shown
    assert main(["bisect"]) == 2


def test_a_newest_checkpoint_that_cannot_be_read_is_not_passed_over_for_an_equal_one(
    fgckpt: Fgckpt, tmp_path: Path
) -> None:
    runs = [save(tmp_path / name, state(), 5, 10).parent for name in ("a", "b")]
    assert [fgckpt("diff", *runs).code, fgckpt("bisect", *runs).code] == [0, 0]
    manifest = runs[1] / "checkpoint-10" / "checkpoint_manifest.json"
    whole = manifest.read_bytes()
    manifest.write_bytes(whole[:100])
    for command in (("diff", *runs), ("diff", *runs, "--json"), ("bisect", *runs), ("bisect", *runs, "--all")):
        result = fgckpt(*command)
        assert result.code == 2, command
        assert "checkpoint-10 cannot be read, so 5 may not be the newest step that both have" in result.err
    assert fgckpt("diff", f"{runs[0]}@5", f"{runs[1]}@5").code == 0
    manifest.write_bytes(whole)
    (runs[0] / "checkpoint-5" / "checkpoint_manifest.json").write_bytes(b"")
    assert [fgckpt("diff", *runs).code, fgckpt("bisect", *runs).code] == [0, 0]  # what is damaged is older


def test_a_run_that_is_not_there_is_named(fgckpt: Fgckpt, tmp_path: Path) -> None:
    result = fgckpt("diff", f"{tmp_path / 'a'}@20", f"{tmp_path / 'b'}@20")
    assert (result.code, result.out) == (3, "")
    assert result.err == f"fgckpt: '{tmp_path}/a@20' selects no checkpoint: there is no run directory {tmp_path}/a\n"
