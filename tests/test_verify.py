"""The offline check finds every damage of every file, and says what it hits. Defends invariants 1, 5 and 8."""

from __future__ import annotations

import dataclasses
import errno
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from forgather_ckpt import catalog, container, files, hashtree, index, paths
from forgather_ckpt.component import StateComponent
from forgather_ckpt.coordinator import CheckpointCoordinator
from forgather_ckpt.errors import FormatError
from forgather_ckpt.hashtree import BLOCK_BYTES
from forgather_ckpt.index import AliasRow, Index, IndexEntry, TensorRow, ValueRow
from forgather_ckpt.manifest import CheckpointManifest, FileRecord
from forgather_ckpt.patterns import SharingPattern
from forgather_ckpt.verify import Problem, verify
from tests.components import Box
from tests.ranks import run_ranks, values

GLOBAL, REPLICATED = SharingPattern.GLOBAL, SharingPattern.REPLICATED


def small_components(*, first: float = 0.0) -> list[StateComponent]:
    weight = torch.arange(first, first + 12.0).reshape(3, 4)
    model = {
        "weight": weight,
        "tied": weight,
        "bias": torch.ones(5, dtype=torch.bfloat16),
        "empty": torch.empty(0),
        "turn": torch.ones(2, dtype=torch.complex64),
        "steps": 7,
    }
    progress = {"step": 3, "losses": [0.5, float("nan")], "name": "a/b~c"}
    return [StateComponent("model", Box(model), GLOBAL), StateComponent("progress", Box(progress), GLOBAL)]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of one process: one tensor file, one index."""
    with CheckpointCoordinator(small_components(), tmp_path_factory.mktemp("small")) as coordinator:
        return coordinator.save_checkpoint(5, metrics={"loss": 0.5})


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of two ranks: two tensor files, two indexes, and the ecosystem's index of both."""
    run = tmp_path_factory.mktemp("shared")

    def save(rank: int, world_size: int) -> str:
        model = Box({name: torch.full((8,), float(number)) for number, name in enumerate("abcd")})
        with CheckpointCoordinator([StateComponent("model", model, REPLICATED)], run) as coordinator:
            return str(coordinator.save_checkpoint(5))

    return Path(values(run_ranks(2, save))[0])


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a tensor of three blocks in a file of its own."""
    model = Box({"first": torch.zeros(3), "wide": torch.zeros(2 * BLOCK_BYTES + 100, dtype=torch.uint8)})
    with CheckpointCoordinator([StateComponent("model", model, GLOBAL)], tmp_path_factory.mktemp("large")) as one:
        return one.save_checkpoint(5)


@pytest.fixture
def copy(tmp_path: Path) -> Callable[[Path], Path]:
    return lambda original: Path(shutil.copytree(original, tmp_path / original.name))


def problems(path: Path) -> tuple[Problem, ...]:
    return verify(path).problems


def test_a_good_checkpoint_has_no_problems(small: Path, shared: Path, large: Path) -> None:
    for path, num_files in ((small, 2), (shared, 5), (large, 2)):
        found = verify(path)
        assert found.problems == ()
        assert found.is_good
        assert found.untidy == ()
        assert found.step == 5
        assert found.num_files == num_files
        assert found.num_bytes == sum(file.stat().st_size for file in path.iterdir() if file.name != paths.MANIFEST)


def positions(file: Path) -> Iterator[int]:
    """Every byte of a file; of the padding of a tensor file's header every 64th."""
    data = file.read_bytes()
    padding = range(0)
    if file.suffix == ".safetensors":
        padding = range(len(data[: container.ALIGNMENT].rstrip()) + 2, container.ALIGNMENT - 2)
    return (position for position in range(len(data)) if position not in padding or position % 64 == 0)


@pytest.mark.parametrize(("which", "every"), [("small", 1), ("shared", 11)])
def test_a_flipped_byte_is_found_wherever_it_is(
    which: str, every: int, copy: Callable[[Path], Path], request: pytest.FixtureRequest
) -> None:
    path = copy(request.getfixturevalue(which))
    for file in sorted(path.iterdir()):
        data = file.read_bytes()
        with file.open("r+b", buffering=0) as stream:
            for position in islice(positions(file), 0, None, every):
                # one bit, another one each time
                os.pwrite(stream.fileno(), bytes([data[position] ^ 1 << position % 8]), position)
                found = problems(path)
                os.pwrite(stream.fileno(), data[position : position + 1], position)
                assert found and found[0].file == file.name, f"byte {position} of {file.name}"
    assert problems(path) == ()


def test_damage_of_a_tensor_names_component_item_block_and_bytes(large: Path, copy: Callable[[Path], Path]) -> None:
    path = copy(large)
    [row] = [row for row in rows_of(path) if row.name == "wide"]
    [other] = [row for row in rows_of(path) if row.name == "first"]
    for row_damaged, position, block, start, stop in [
        (other, 0, "1 of 1", other.offset, other.offset + 12),
        (row, 0, "1 of 3", row.offset, row.offset + BLOCK_BYTES),
        (row, BLOCK_BYTES - 1, "1 of 3", row.offset, row.offset + BLOCK_BYTES),
        (row, BLOCK_BYTES, "2 of 3", row.offset + BLOCK_BYTES, row.offset + 2 * BLOCK_BYTES),
        (row, row.num_bytes - 1, "3 of 3", row.offset + 2 * BLOCK_BYTES, row.offset + row.num_bytes),
    ]:
        flip(path / row.file, row_damaged.offset + position)
        [found] = problems(path)
        assert (found.file, found.component, found.item) == (row.file, "model", row_damaged.name)
        assert found.detail.startswith(f"block {block} (bytes {start}-{stop})")
        flip(path / row.file, row_damaged.offset + position)

    flip(path / row.file, row.offset)
    flip(path / row.file, row.offset + 2 * BLOCK_BYTES)
    [found] = problems(path)
    assert found.detail.startswith(f"2 of 3 blocks (1, 3; the first is bytes {row.offset}-")


def test_a_damaged_header_is_told_apart_from_damaged_tensors(small: Path, copy: Callable[[Path], Path]) -> None:
    path = copy(small)
    row = rows_of(path)[0]
    flip(path / row.file, 20)
    flip(path / row.file, row.offset)
    header, tensor = problems(path)
    assert (header.item, tensor.item) == (None, row.name)
    assert header.detail.startswith("its header (bytes 0-4096) does not have the digest")


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


def empty(file: Path) -> None:
    os.truncate(file, 0)


def extend(file: Path) -> None:
    os.truncate(file, file.stat().st_size + 1)


def link(file: Path) -> None:
    file.symlink_to(file.rename(file.parent.parent / file.name))


def replace_by_directory(file: Path) -> None:
    file.unlink()
    file.mkdir()


@pytest.mark.parametrize("damage", [truncate, empty, extend, Path.unlink, link, replace_by_directory])
def test_a_file_of_another_size_or_kind_is_found(damage: Callable[[Path], Any], shared: Path, tmp_path: Path) -> None:
    for name in sorted(file.name for file in shared.iterdir()):
        path = Path(shutil.copytree(shared, tmp_path / name / shared.name))
        damage(path / name)
        found = verify(path)
        assert found.problems and found.problems[0].file == name
        with pytest.raises((FormatError, catalog.CheckpointNotFound)):  # the one rule of "committed" agrees
            catalog.read_checkpoint(path)


def test_swapped_files_are_found(shared: Path, copy: Callable[[Path], Path]) -> None:
    path = copy(shared)
    one, other = path / "small-00000.safetensors", path / "small-00001.safetensors"
    assert one.stat().st_size == other.stat().st_size
    one.rename(path / "aside")
    other.rename(one)
    (path / "aside").rename(other)
    assert {problem.file for problem in problems(path)} == {one.name, other.name}


def test_a_file_of_another_checkpoint_is_found(small: Path, copy: Callable[[Path], Path], tmp_path: Path) -> None:
    path = copy(small)
    with CheckpointCoordinator(small_components(first=1.0), tmp_path / "other") as coordinator:
        other = coordinator.save_checkpoint(5)
    for file in path.glob("*.safetensors"):
        shutil.copy(other / file.name, file)
    [found] = problems(path)
    assert found.item == "weight"


def test_files_that_are_no_part_of_it_are_untidy_but_no_problem(small: Path, copy: Callable[[Path], Path]) -> None:
    path = copy(small)
    (path / "notes.txt").write_text("mine")
    (path / paths.ANNOTATIONS).write_text("not even JSON")
    found = verify(path)
    assert found.is_good
    assert found.untidy == ("notes.txt",)


@pytest.mark.parametrize("make", [lambda path: None, Path.mkdir, Path.touch])
def test_what_is_no_checkpoint_is_a_problem_and_no_exception(make: Callable[[Path], Any], tmp_path: Path) -> None:
    make(tmp_path / "checkpoint-1")
    found = verify(tmp_path / "checkpoint-1")
    assert found.step is None
    assert [problem.file for problem in found.problems] == [paths.MANIFEST]


def test_what_only_a_damaged_index_describes_cannot_be_checked(shared: Path, copy: Callable[[Path], Path]) -> None:
    path = copy(shared)
    flip(path / "index-00001.json", 100)
    first, second = problems(path)
    assert (first.file, first.component) == ("index-00001.json", "model")
    assert second.file == "small-00001.safetensors"
    assert "index-00001.json cannot be read" in second.detail


def test_a_damaged_part_of_an_index_does_not_put_the_blame_on_the_tensors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index, "MAX_ITEMS", 3)
    with CheckpointCoordinator(small_components(), tmp_path) as coordinator:
        path = coordinator.save_checkpoint(5)
    parts = sorted(CheckpointManifest.load(path).indexes)
    assert len(parts) == 3
    assert problems(path) == ()
    for name in parts:
        flip(path / name, 50)
        first, *others = problems(path)
        assert first.file == name
        assert all(f"{name} cannot be read" in other.detail for other in others)
        flip(path / name, 50)


def test_a_file_system_error_is_a_problem_of_its_file(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = rows_of(small)[0].file
    inode = (small / name).stat().st_ino
    read_at = files.read_at

    def fail(descriptor: int, buffer: memoryview, offset: int) -> int:
        if os.fstat(descriptor).st_ino == inode and offset >= container.ALIGNMENT:
            raise OSError(errno.EIO, "Input/output error")
        return read_at(descriptor, buffer, offset)

    monkeypatch.setattr(files, "read_at", fail)
    [found] = problems(small)
    assert (found.file, found.component) == (name, "model")
    assert "Input/output error" in found.detail


def test_progress_ends_at_all_bytes(shared: Path) -> None:
    told: list[tuple[int, int]] = []
    found = verify(shared, on_progress=lambda num_done, num_total: told.append((num_done, num_total)))
    assert told == sorted(told)
    assert told[-1] == (found.num_bytes, found.num_bytes)


# ---- what a faulty writer could have written: all digests are right, the content is not


Rewrite = Callable[[IndexEntry], IndexEntry]


def rewritten(path: Path, change: Rewrite) -> Path:
    """Change the model's entry of the index, and make all digests right again."""
    manifest = CheckpointManifest.load(path)
    [name] = manifest.indexes
    content = catalog.read_index(path, manifest, name)
    entries = [change(entry) if entry.component == "model" else entry for entry in content.entries]
    return resealed(path, name, Index(content.writer, entries).to_bytes())


def resealed(path: Path, name: str, data: bytes) -> Path:
    """Replace a file and the manifest's record of it."""
    manifest = CheckpointManifest.load(path)
    (path / name).write_bytes(data)
    record = FileRecord(len(data), hashtree.digest(data).hex(), manifest.files[name].writer)
    changed = dataclasses.replace(manifest, files={**manifest.files, name: record})
    (path / paths.MANIFEST).write_bytes(changed.to_bytes())
    return path


def change_row(item: str, **changes: Any) -> Rewrite:
    def change(entry: IndexEntry) -> IndexEntry:
        tensors = [row._replace(**changes) if row.name == item else row for row in entry.tensors]
        return dataclasses.replace(entry, tensors=tensors)

    return change


def add(**columns: Sequence[Any]) -> Rewrite:
    def change(entry: IndexEntry) -> IndexEntry:
        return dataclasses.replace(
            entry, **{column: [*getattr(entry, column), *rows] for column, rows in columns.items()}
        )

    return change


def leave_out(name: str) -> Rewrite:
    def change(entry: IndexEntry) -> IndexEntry:
        return dataclasses.replace(entry, tensors=[row for row in entry.tensors if row.name != name])

    return change


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (leave_out("bias"), "entry 'all' has 5 items of 64 bytes in the indexes; the manifest expects 6 of 74"),
        (leave_out("bias"), "bytes 4160-4170 cannot be checked, they belong to no item or to several"),
        (change_row("bias", name="bias2"), "its header and the index disagree about 'bias2'"),
        (change_row("bias", dtype="float16"), "its header and the index disagree about 'bias'"),
        (change_row("bias", shape=(1, 5)), "its header and the index disagree about 'bias'"),
        (change_row("bias", shape=(6,), range=(0, 5)), "the stored pieces do not make up the whole tensor"),
        (add(aliases=[AliasRow("again", 9, "nothing")]), "stands for 'nothing', which is not stored"),
        (add(values=[ValueRow("weight", 9, 1, hashtree.digest(b"1"))]), "is stored twice"),
        (add(values=[ValueRow("new", 9, 1, hashtree.digest(b"2"))]), "the value does not have the digest"),
        (lambda entry: dataclasses.replace(entry, entry="other"), "the manifest says [('model', 'all')"),
    ],
)
def test_an_inventory_that_does_not_add_up_is_found(
    change: Rewrite, expected: str, small: Path, copy: Callable[[Path], Path]
) -> None:
    found = problems(rewritten(copy(small), change))
    assert expected in "\n".join(problem.detail for problem in found)
    assert all(problem.component in ("model", None) for problem in found)


def test_a_header_that_disagrees_with_the_index_is_found(small: Path, copy: Callable[[Path], Path]) -> None:
    path = copy(small)
    file = path / rows_of(path)[0].file
    data = file.read_bytes().replace(b'"weight":', b'"weighs":')
    file.write_bytes(data)
    manifest = CheckpointManifest.load(path)
    rows = sorted(rows_of(path), key=lambda row: (row.offset, row.num_bytes))
    digest = hashtree.file_digest(hashtree.digest(data[: container.ALIGNMENT]), [row.digest for row in rows])
    record = dataclasses.replace(manifest.files[file.name], digest=digest.hex())
    changed = dataclasses.replace(manifest, files={**manifest.files, file.name: record})
    (path / paths.MANIFEST).write_bytes(changed.to_bytes())
    [found] = problems(path)
    assert found.detail == "its header and the index disagree about 'weight'"


def test_nothing_escapes_from_a_check_of_nonsense(small: Path, copy: Callable[[Path], Path]) -> None:
    path = copy(small)
    for name in (paths.MANIFEST, "index-00000.json"):
        data = (path / name).read_bytes()
        for nonsense in (
            b"",
            b"[]",
            b"{}",
            b"\xff",
            b"[" * 100_000,
            b'{"format":1}',
            data + b"x",
            data[: len(data) // 2],
        ):
            (path / name).write_bytes(nonsense)
            assert problems(path)[0].file == name
        (path / name).write_bytes(data)
    for nonsense in (b"[]", b'{"format":"forgather_ckpt.index"}', b"[" * 100_000):  # with the right digest
        assert problems(resealed(path, "index-00000.json", nonsense))[0].file == "index-00000.json"


def rows_of(path: Path) -> list[TensorRow]:
    manifest = CheckpointManifest.load(path)
    indexes = [catalog.read_index(path, manifest, name) for name in manifest.indexes]
    return [row for content in indexes for entry in content.entries for row in entry.tensors]


def flip(file: Path, position: int) -> None:
    with file.open("r+b") as stream:
        stream.seek(position)
        [byte] = stream.read(1)
        stream.seek(position)
        stream.write(bytes([byte ^ 4]))
