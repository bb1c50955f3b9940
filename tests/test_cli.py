"""`fgckpt`: what it prints where, its exit codes, and that it never waits for torch."""

from __future__ import annotations

import dataclasses
import datetime
import errno
import json
import os
import pty
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from forgather_ckpt import catalog, files, paths
from forgather_ckpt import manifest as manifest_module
from forgather_ckpt.annotations import Annotations, annotate
from forgather_ckpt.catalog import Catalog, Checkpoint, Rejected
from forgather_ckpt.cli import main, selection, table, text, verification
from forgather_ckpt.cli.listing import Standing, listing, shown_metric, standings_of
from forgather_ckpt.cli.table import Column, Table
from forgather_ckpt.component import StateComponent
from forgather_ckpt.coordinator import CheckpointCoordinator
from forgather_ckpt.errors import FormatError
from forgather_ckpt.manifest import CheckpointManifest, Validation
from forgather_ckpt.patterns import SharingPattern, ValidationLevel
from forgather_ckpt.policies import Best, Stored
from forgather_ckpt.resume import Candidate
from forgather_ckpt.topology import Topology
from tests.components import Box
from tests.test_layers import LIGHT, module_names

ROOT = Path(__file__).parents[1]
CREATED = "2026-11-21T14:30:00+00:00"


class Result(NamedTuple):
    """How one call of the command ended."""

    code: int
    out: str
    err: str

    @property
    def data(self) -> Any:
        return json.loads(self.out)


Fgckpt = Callable[..., Result]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One real checkpoint, the pattern for all others."""
    weight = torch.zeros(3, 4)
    components = [
        StateComponent("model", Box({"weight": weight, "tied": weight, "half": weight.half()}), SharingPattern.GLOBAL),
        StateComponent("progress", Box({"step": 5, "note\x1b[31m": "red"}), SharingPattern.GLOBAL),
    ]
    arguments = {"learning_rate": 0.001, "hub_token": "secret"}
    with CheckpointCoordinator(components, tmp_path_factory.mktemp("saved"), training_args=arguments) as coordinator:
        return coordinator.save_checkpoint(5)


Make = Callable[..., Path]


@pytest.fixture
def make(saved: Path, tmp_path: Path) -> Make:
    """Make a checkpoint in the run directory `tmp_path`: hard links to the real one, and a manifest of its own."""
    original = CheckpointManifest.load(saved)

    def make(step: int, **changes: Any) -> Path:
        path = tmp_path / paths.checkpoint(step)
        shutil.copytree(saved, path, copy_function=os.link)
        manifest = dataclasses.replace(original, **{"step": step, "sequence": step, "created": CREATED, **changes})
        (path / paths.MANIFEST).unlink()
        (path / paths.MANIFEST).write_bytes(manifest.to_bytes())
        return path

    return make


@pytest.fixture
def fgckpt(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Fgckpt:
    monkeypatch.delenv("FGCKPT_DIR", raising=False)

    def call(*arguments: str | Path) -> Result:
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return call


def damage(file: Path) -> None:
    """Flip the last byte, in a copy of its own."""
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.unlink()
    file.write_bytes(data)


def tensor_file(checkpoint: Path) -> Path:
    [file] = checkpoint.glob("*.safetensors")
    return file


# ---- ls


def test_ls_lists_the_newest_first(fgckpt: Fgckpt, make: Make, tmp_path: Path) -> None:
    make(10, epoch=0.5, metrics={"loss": 3.25})
    make(20, epoch=1.0, metrics={"loss": 3.0, "eval_loss": 3.123456789}, kind="epoch")
    make(15, sequence=30)
    truncated = make(12)
    (truncated / "index-00000.json").unlink()
    (tmp_path / ".tmp-checkpoint-25-abc").mkdir()
    (tmp_path / ".trash-checkpoint-1-abc").mkdir()
    (tmp_path / "logs").mkdir()
    result = fgckpt("ls", tmp_path)
    lines = result.out.splitlines()
    assert [line.split()[:2] for line in lines[:-1]] == [
        ["STEP", "EPOCH"],
        ["15", "-"],
        ["20", "1"],
        ["10", "0.5"],
        ["12", "-"],
    ]
    assert lines[0].split() == ["STEP", "EPOCH", "AGE", "ROLES", "eval_loss", "SIZE", "FILES", "STATE"]
    assert lines[1].split()[3:5] == ["latest", "-"]
    assert lines[2].split()[3:6] == ["best,", "epoch", "3.12346"]
    assert lines[3].split()[3:5] == ["periodic", "-"]
    assert "rejected: index-00000.json is missing; the manifest expects " in lines[4]
    assert lines[-1].startswith("3 checkpoints  ")
    assert "resume → step 15  1 unfinished save ignored (.tmp-checkpoint-25-abc)  1 unfinished removal" in lines[-1]
    assert (result.code, result.err) == (0, "")


def test_epochs_have_4_digits(fgckpt: Fgckpt, make: Make, tmp_path: Path) -> None:
    make(1, epoch=0.011235955)
    assert fgckpt("ls", tmp_path).out.splitlines()[1].split()[1] == "0.01124"
    assert fgckpt("show", "-d", tmp_path).out.startswith("checkpoint-1  step 1  epoch 0.01124  ")
    assert [text.epoch(epoch) for epoch in (2, 1.0, 12.3456, 12345.6, None)] == ["2", "1", "12.35", "12346", "null"]


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_ls_of_a_checkpoint_says_what_shows_it(fgckpt: Fgckpt, make: Make, options: list[str]) -> None:
    path = make(4)
    result = fgckpt("ls", *options, path)
    assert (result.code, result.out) == (3, "")
    assert f"is a checkpoint, not a run directory; see `fgckpt show {path}`, or `fgckpt ls {path.parent}`" in result.err


def test_ls_of_an_empty_run_says_so(fgckpt: Fgckpt, tmp_path: Path) -> None:
    result = fgckpt("ls", tmp_path)
    assert result.code == 0
    assert result.out.startswith("0 checkpoints  0 B  free ")
    assert result.out.endswith("nothing to resume from\n")


def test_ls_takes_the_directory_from_the_environment_and_from_where_it_is(
    fgckpt: Fgckpt, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(10)
    monkeypatch.chdir(tmp_path)
    assert fgckpt("ls").out.splitlines()[1].split()[0] == "10"
    monkeypatch.chdir("/")
    monkeypatch.setenv("FGCKPT_DIR", str(tmp_path))
    assert fgckpt("ls").out.splitlines()[1].split()[0] == "10"
    assert fgckpt("show").code == 0
    assert fgckpt("verify").code == 0


def test_ls_json(fgckpt: Fgckpt, make: Make, tmp_path: Path) -> None:
    path = make(10, metrics={"loss": 3.25}, epoch=0.5)
    rejected = make(12)
    tensor_file(rejected).unlink()
    (tmp_path / ".tmp-checkpoint-25-abc").mkdir()
    data = fgckpt("ls", "--json", tmp_path).data
    manifest = CheckpointManifest.load(path)
    assert data.pop("free_bytes") > 0
    [found] = data.pop("rejected")
    assert found["path"] == str(rejected)
    assert "is missing" in found["reason"]
    assert data == {
        "schema": "fgckpt.ls/1",
        "run": str(tmp_path),
        "checkpoints": [
            {
                "path": str(path),
                "step": 10,
                "sequence": 10,
                "epoch": 0.5,
                "kind": "periodic",
                "created": CREATED,
                "world_size": 1,
                "roles": ["latest"],
                "metrics": {"loss": 3.25},
                "pinned": False,
                "quarantined": None,
                "notes": [],
                "bytes": manifest.num_bytes,
                "files": 2,
                "digest": manifest.digest,
            }
        ],
        "unfinished": [str(tmp_path / ".tmp-checkpoint-25-abc")],
        "resume": {"step": 10, "path": str(path)},
    }


def test_a_checkpoint_of_a_newer_version_stands_in_the_way_of_a_resume(
    fgckpt: Fgckpt, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(10)
    with monkeypatch.context() as patch:
        patch.setattr(manifest_module, "VERSION", "2.0")
        make(20)
    result = fgckpt("ls", tmp_path)
    assert "rejected: the manifest has format version '2.0'" in result.out
    assert "resume refused: checkpoint-20 is of a newer format" in result.out
    assert fgckpt("ls", "--json", tmp_path).data["resume"] is None
    result = fgckpt("verify", "--all", "-d", tmp_path)
    assert result.code == 1
    assert result.out.endswith("→ resume latest would refuse: checkpoint-20 is of a newer format\n")


def test_the_listing_is_pure(saved: Path) -> None:
    manifest = dataclasses.replace(CheckpointManifest.load(saved), created=CREATED, step=7)
    now = datetime.datetime.fromisoformat("2026-11-21T14:34:00+00:00")
    found = Catalog(
        (
            Checkpoint(Path("run/checkpoint-7"), manifest),
            Checkpoint(Path("run/checkpoint-6.replaced-ab"), dataclasses.replace(manifest, step=6, created="soon")),
        ),
        (Rejected(Path("run/mine"), FormatError("bad\nbyte")),),
        (),
    )
    standings = [
        Standing(("latest", "emergency"), {"f1": {"a": 1}}, Annotations(notes=("at home", "SIGUSR1 received"))),
        Standing((), {}, Annotations(quarantined="a flipped\nbyte")),
    ]
    size = text.size(manifest.num_bytes)
    assert [list(row) for row in listing(found, standings, "f1", now).rows] == [
        ["7", "-", "4m", "latest, emergency SIGUSR1", '{"a": 1}', size, "2", "ok"],
        ["6", "-", "?", "periodic", "-", size, "2", "ok, as checkpoint-6.replaced-ab, quarantined: a flipped\\nbyte"],
        ["mine", "-", "-", "-", "-", "-", "-", "rejected: bad\\nbyte"],
    ]


def test_roles_are_derived_from_what_is_there_and_what_was_noted() -> None:
    def stored(sequence: int, loss: float | None, **said: Any) -> Stored:
        metrics = {} if loss is None else {"eval_loss": loss}
        return Stored(Path(f"checkpoint-{sequence}"), sequence, sequence, f"{sequence}", metrics=metrics, **said)

    found = [
        stored(9, 0.1, is_quarantined=True),
        stored(8, None, kind="final"),
        stored(7, 5.0, is_pinned=True),
        stored(6, 1.0, kind="emergency"),
        stored(5, 2.0, kind="epoch", is_pinned=True),
        stored(4, 3.0),
        stored(3, 4.0),
    ]
    noted = [Annotations()] * len(found)

    def roles(best: Best | None) -> list[str]:
        return [", ".join(one.roles) for one in standings_of(found, noted, best)]

    assert roles(Best(1, "eval_loss")) == [
        "quarantined",
        "latest, final",
        "pinned",
        "best, emergency",
        "best~1, epoch, pinned",
        "best~2",
        "",
    ]
    assert roles(Best(5, "eval_loss"))[2] == "best~4, pinned"
    assert roles(None) == ["quarantined", "latest, final", "pinned", "emergency", "epoch, pinned", "", ""]
    assert standings_of([], [], None) == []


@pytest.mark.parametrize(
    ("metrics", "shown"),
    [
        ([], None),
        ([{}, {}], None),
        ([{}, {"b": 1, "a": 2}], "b"),
        ([{"b": 1}, {"loss": 2}], "loss"),
        ([{"eval_loss": 1}, {"eval_f1": 2}], "eval_f1"),
    ],
)
def test_the_metric_that_has_a_column(metrics: list[Mapping[str, Any]], shown: str | None) -> None:
    assert shown_metric(metrics, Best(1, "eval_f1")) == shown
    assert shown_metric(metrics, None) == ("eval_loss" if shown == "eval_f1" else shown)


def test_ls_shows_the_metric_that_ranks_and_what_was_noted_later(fgckpt: Fgckpt, make: Make, tmp_path: Path) -> None:
    arguments = {"best_model_metric": "f1"}
    first = make(10, metrics={"eval_f1": 0.5, "eval_loss": 1.0}, training_args=arguments)
    second = make(20, metrics={"eval_f1": 0.25, "eval_loss": 0.5}, training_args=arguments, kind="emergency")
    annotate(first, lambda noted: dataclasses.replace(noted, metrics={"eval_f1": 0.125}, is_pinned=True))
    annotate(second, lambda noted: dataclasses.replace(noted, quarantined="it diverged", notes=("SIGTERM received",)))
    lines = [line.split() for line in fgckpt("ls", tmp_path).out.splitlines()]
    assert lines[0][4] == "eval_f1"
    assert lines[1][3:8] == ["emergency", "SIGTERM,", "quarantined", "0.25", lines[1][7]]
    assert lines[1][-4:] == ["ok,", "quarantined:", "it", "diverged"]
    assert lines[2][3:7] == ["latest,", "best,", "pinned", "0.125"]
    newest, other = fgckpt("ls", "--json", tmp_path).data["checkpoints"]
    assert (newest["roles"], newest["quarantined"], newest["notes"]) == (
        ["emergency", "quarantined"],
        "it diverged",
        ["SIGTERM received"],
    )
    assert (other["roles"], other["pinned"]) == (["latest", "best", "pinned"], True)
    assert other["metrics"] == {"eval_f1": 0.125, "eval_loss": 1.0}


@pytest.mark.parametrize("arguments", [{"best_model_metric": 5}, {"best_model_metric": "quality"}])
def test_ls_of_a_run_whose_arguments_rank_nothing_names_no_best(
    arguments: Mapping[str, Any], fgckpt: Fgckpt, make: Make, tmp_path: Path
) -> None:
    make(10, metrics={"eval_loss": 1.0}, training_args=arguments)
    result = fgckpt("ls", tmp_path)
    assert (result.code, result.err) == (0, "")
    assert result.out.splitlines()[1].split()[3:5] == ["latest", "1"]
    assert fgckpt("show", "best", "-d", tmp_path).code == 3


def test_200_checkpoints_are_listed_without_torch_numpy_or_rich(make: Make, tmp_path: Path) -> None:
    for step in range(1, 201):
        make(step)
    light = [name for module in LIGHT for name in module_names(module) if not name.endswith("__main__")]
    done = python(
        f"""
        import sys, importlib
        from forgather_ckpt.cli import main
        code = main(["ls", {str(tmp_path)!r}])
        heavy = {{"torch", "numpy", "rich", "tqdm", "safetensors"}}
        assert not heavy & set(sys.modules), heavy & set(sys.modules)
        for name in {light!r}:
            importlib.import_module(name)
        assert not heavy & set(sys.modules), heavy & set(sys.modules)
        sys.exit(code)
        """
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) == 202
    assert done.stdout.splitlines()[-1].startswith("200 checkpoints")


def test_verify_and_show_need_no_torch_either(make: Make, tmp_path: Path) -> None:
    make(1)
    done = python(
        f"""
        import sys
        from forgather_ckpt.cli import main
        assert main(["verify", "-d", {str(tmp_path)!r}]) == 0
        assert main(["show", "--tensors", "--args", "-d", {str(tmp_path)!r}]) == 0
        assert not {{"torch", "numpy"}} & set(sys.modules)
        """
    )
    assert (done.returncode, done.stderr) == (0, "")


# ---- show


def test_show_tells_what_a_checkpoint_is_made_of(fgckpt: Fgckpt, make: Make, tmp_path: Path) -> None:
    make(10, epoch=1.5, metrics={"loss": 3.25}, parent={"step": 5, "sequence": 1, "digest": "0" * 32})
    result = fgckpt("show", "-d", tmp_path)
    assert result.code == 0
    lines = result.out.splitlines()
    assert lines[0].startswith("checkpoint-10  step 10  epoch 1.5  periodic  saved 2026-11-21 14:30:00 UTC (")
    assert lines[0].endswith(" by 1 rank on 1 node")
    assert lines[1].startswith("sequence 10  after step 5  run ")
    assert lines[2].split() == ["COMPONENT", "PATTERN", "WRITERS", "ITEMS", "SIZE", "CHECK"]
    assert lines[3].split() == ["model", "GLOBAL", "0", "3", "72", "B", "not", "compared"]
    assert lines[5].startswith("2 files  ")
    assert lines[6] == "metrics: loss 3.25"


def test_show_tells_the_result_of_the_replication_check(
    fgckpt: Fgckpt, make: Make, tmp_path: Path, saved: Path
) -> None:
    manifest = CheckpointManifest.load(saved)
    components = dict(manifest.components)
    model = dataclasses.replace(
        components["model"], pattern=SharingPattern.PER_GROUP, group="dp", names="local", required=True
    )
    compared = [Validation(ValidationLevel.TENSOR, "equal", num_items=n, seconds=n / 1000) for n in (2, 1)]
    differed = Validation(ValidationLevel.QUICK, "differed", num_items=3, seconds=1.25)
    stages = [
        dataclasses.replace(
            model.entries["all"], ranks=ranks, num_items=num_items, validation=validation, excluded=excluded
        )
        for ranks, num_items, validation, excluded in (
            ((0, 1), 4, compared[0], ("mean", "var")),
            ((2, 3), 2, compared[1], ("mean",)),
        )
    ]
    sharded = dataclasses.replace(stages[1], num_items=1, validation=compared[0], excluded=())
    partly = dataclasses.replace(stages[1], num_items=5)
    nothing = dataclasses.replace(stages[1], validation=Validation(ValidationLevel.QUICK, "not compared"))
    nobody = dataclasses.replace(stages[1], validation=Validation(ValidationLevel.QUICK, "differed", 2), trusted=(), excluded=())
    progress = components["progress"]
    entry = dataclasses.replace(progress.entries["all"], validation=differed, trusted=(0,))
    apart = dataclasses.replace(stages[0], validation=differed, trusted=(1,), excluded=())
    entries = [(key, name) for key in ("model", "other") for name in ("pp=0/2", "pp=1/2")]
    entries += [(key, "all") for key in ("progress", "sharded", "partly", "nothing", "nobody")]
    make(
        10,
        topology=Topology(rank=0, world_size=4, nodes=((0, 1, 2, 3),), node_source="test"),
        indexes=dict.fromkeys(manifest.indexes, entries),
        components={
            "model": dataclasses.replace(model, entries=dict(zip(("pp=0/2", "pp=1/2"), stages, strict=True))),
            "progress": dataclasses.replace(progress, entries={"all": entry}),
            "other": dataclasses.replace(model, entries={"pp=0/2": apart, "pp=1/2": stages[1]}),
            "sharded": dataclasses.replace(model, entries={"all": sharded}),
            "partly": dataclasses.replace(model, entries={"all": partly}),
            "nothing": dataclasses.replace(model, entries={"all": nothing}),
            "nobody": dataclasses.replace(model, entries={"all": nobody}),
        },
        omitted={"sampler": "has no\nstate"},
    )
    out = fgckpt("show", "-d", tmp_path).out
    assert "PER_GROUP (dp)" in out
    assert "TENSOR: 3 items equal on all holders, 3 not compared" in out
    assert "QUICK: DIFFERED, saved from rank 0" in out
    assert "TENSOR: DIFFERED, saved pp=0/2 from rank 1, 1 not compared" in out
    lines = [re.split("  +", line) for line in fgckpt("show", "--entries", "-d", tmp_path).out.splitlines()]
    found = [(*line[:3], *line[-2:]) for line in lines if line[1:2] and line[1] in ("pp=0/2", "pp=1/2", "all")]
    second = ("pp=1/2", "2-3", "TENSOR: 1 item equal on all holders, 1 not compared", "1.0 ms")
    assert found == [
        ("model", "pp=0/2", "0-1", "TENSOR: 2 items equal on all holders, 2 not compared", "2.0 ms"),
        ("model", *second),
        ("progress", "all", "0", "QUICK: DIFFERED, saved from rank 0", "1,250.0 ms"),
        ("other", "pp=0/2", "0-1", "QUICK: DIFFERED, saved from rank 1", "1,250.0 ms"),
        ("other", *second),
        ("sharded", "all", "2-3", "TENSOR: 2 parts equal on all holders", "2.0 ms"),
        ("partly", "all", "2-3", "TENSOR: 1 of 5 items equal on all holders, 1 not compared", "1.0 ms"),
        ("nothing", "all", "2-3", "72 B", "QUICK: not compared, 1 left out"),
        ("nobody", "all", "2-3", "QUICK: DIFFERED, saved by the majority of each item", "0.0 ms"),
    ]
    assert "left out: sampler: has no\\nstate" in out


def test_show_lists_items_files_and_arguments(fgckpt: Fgckpt, make: Make, tmp_path: Path) -> None:
    path = make(10)
    out = fgckpt("show", "--tensors", "--files", "--args", "-d", tmp_path).out
    lines = [line.split() for line in out.splitlines()]
    file = tensor_file(path).name
    assert ["model", "all", "weight", "float32", "[3,", "4]", "48", "B", file] in lines
    assert ["model", "all", "tied", "=", "weight"] in lines
    assert ["progress", "all", "note\\x1b[31m", "value", "red"] in lines
    assert [line[0] for line in lines if line and line[0].startswith(("small", "index"))] == [file, "index-00000.json"]
    assert ["learning_rate", "=", "0.001"] in lines
    assert ["hub_token", "=", "(redacted)"] in lines


def test_show_json_is_the_manifest_and_the_items(fgckpt: Fgckpt, make: Make, tmp_path: Path) -> None:
    path = make(10)
    data = fgckpt("show", "--json", "-d", tmp_path).data
    noted = {"pinned": False, "quarantined": None, "notes": []}
    manifest = json.loads((path / paths.MANIFEST).read_bytes())
    assert data == {"schema": "fgckpt.show/1", "path": str(path), "manifest": manifest, **noted}
    items = fgckpt("show", "--json", "--tensors", "-d", tmp_path).data["items"]
    assert [item["name"] for item in items] == ["weight", "tied", "half", "step", "note\x1b[31m"]
    assert items[0] == {
        "component": "model",
        "entry": "all",
        "name": "weight",
        "order": 1,
        "dtype": "float32",
        "shape": [3, 4],
        "bytes": 48,
        "files": [tensor_file(path).name],
        "pieces": 1,
    }
    assert items[1]["same_as"] == "weight"
    assert items[3]["value"] == 5


# ---- verify


def test_verify_of_good_checkpoints(fgckpt: Fgckpt, make: Make, tmp_path: Path) -> None:
    make(10)
    make(20)
    result = fgckpt("verify", "--all", "-d", tmp_path)
    assert (result.code, result.err) == (0, "")
    assert [line.split()[:4] for line in result.out.splitlines()] == [
        ["ok", "checkpoint-20", "2", "files"],
        ["ok", "checkpoint-10", "2", "files"],
    ]
    assert fgckpt("verify", "-d", tmp_path).out.split()[:2] == ["ok", "checkpoint-20"]


def test_verify_names_what_is_damaged_and_what_a_resume_would_use(fgckpt: Fgckpt, make: Make, tmp_path: Path) -> None:
    make(10)
    newest = make(20)
    file = tensor_file(newest)
    damage(file)
    result = fgckpt("verify", "--all", "-d", tmp_path)
    assert result.code == 1
    first, problem, good, advice, remedy = result.out.splitlines()
    assert first.split()[:2] == ["DAMAGED", "checkpoint-20"]
    assert problem.strip().startswith(f"{file.name}: component 'model': 'half': block 1 of 1 (bytes ")
    assert good.split()[:2] == ["ok", "checkpoint-10"]
    assert advice == "→ resume latest would use step 10"
    assert remedy == f"→ to set aside what is damaged: fgckpt verify 20 --quarantine -d {tmp_path}"
    assert "→ resume latest would use step 10 (not checked here)\n" in fgckpt("verify", "20", "-d", tmp_path).out

    data = fgckpt("verify", "--json", "20", "10", "-d", tmp_path)
    assert data.code == 1
    bad, good_too = data.data["checkpoints"]
    assert data.data["schema"] == "fgckpt.verify/1"
    assert (bad["path"], bad["step"], bad["good"], bad["files"]) == (str(newest), 20, False, 2)
    [told] = bad["problems"]
    assert (told["file"], told["component"], told["item"]) == (file.name, "model", "half")
    assert (good_too["step"], good_too["good"], good_too["problems"]) == (10, True, [])


def test_verify_checks_rejected_ones_and_warns_of_those_that_it_does_not_check(
    fgckpt: Fgckpt, make: Make, tmp_path: Path
) -> None:
    make(10)
    tensor_file(make(20)).unlink()
    by_default = fgckpt("verify", "-d", tmp_path)
    assert by_default.code == 0
    assert "checkpoint-20 is not committed" in by_default.err
    for arguments in (["--all"], ["20"], ["step:20"], [str(tmp_path / "checkpoint-20")]):
        result = fgckpt("verify", *arguments, "-d", tmp_path)
        assert result.code == 1
        assert result.err == ""
        assert "DAMAGED  checkpoint-20" in result.out
        assert "is missing" in result.out
        assert "→ resume latest would use step 10" in result.out


def test_verify_sets_aside_what_is_damaged(fgckpt: Fgckpt, make: Make, tmp_path: Path) -> None:
    for step in (10, 20, 30):
        make(step)
    damage(tensor_file(tmp_path / "checkpoint-10"))
    damage(tensor_file(tmp_path / "checkpoint-30"))
    tensor_file(make(40)).unlink()
    result = fgckpt("verify", "--all", "--quarantine", "-d", tmp_path)
    assert (result.code, result.err) == (1, "")
    assert result.out.splitlines()[-3:] == [
        "quarantined checkpoint-30",
        "quarantined checkpoint-10",
        "→ resume latest would use step 20",
    ]
    states = {
        one["step"]: (one["roles"], one["quarantined"]) for one in fgckpt("ls", tmp_path, "--json").data["checkpoints"]
    }
    assert states[20] == (["latest"], None)
    assert fgckpt("ls", tmp_path).out.splitlines()[-1].endswith("resume → step 20")
    assert fgckpt("ls", tmp_path, "--json").data["resume"]["step"] == 20
    assert "\nquarantined: small" in fgckpt("show", "30", "-d", tmp_path).out
    assert "block 1 of 1" in fgckpt("show", "30", "--json", "-d", tmp_path).data["quarantined"]
    assert all(states[step][0] == ["quarantined"] for step in (10, 30))
    assert "'half': block 1 of 1" in states[30][1]
    assert fgckpt("show", "-d", tmp_path).out.startswith("checkpoint-20  ")
    assert fgckpt("show", "30", "-d", tmp_path).out.startswith("checkpoint-30  ")

    assert fgckpt("unquarantine", "30", "10", "-d", tmp_path).code == 0
    assert fgckpt("show", "-d", tmp_path).out.startswith("checkpoint-30  ")
    assert fgckpt("verify", "--all", "-d", tmp_path).out.splitlines()[-1] == (
        f"→ to set aside what is damaged: fgckpt verify 30 10 --quarantine -d {tmp_path}"
    )


def test_verify_does_not_blame_a_checkpoint_for_what_lay_in_its_place(
    fgckpt: Fgckpt, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job saves the step again, or removes the checkpoint, while its bytes are being read."""
    make(10)
    damage(tensor_file(make(20)))
    damage(tensor_file(make(30)))
    offline = verification.offline.verify

    def verify(directory: Path) -> Any:
        result = offline(directory)
        if not result.is_good:
            shutil.rmtree(directory)
            if directory.name == "checkpoint-20":
                make(20, run_id="another")
        return result

    monkeypatch.setattr(verification.offline, "verify", verify)
    result = fgckpt("verify", "--all", "--quarantine", "-d", tmp_path)
    assert result.code == 0
    assert [line.split()[:2] for line in result.out.splitlines()] == [["ok", "checkpoint-20"], ["ok", "checkpoint-10"]]
    assert "checkpoint-30 is gone: it was removed meanwhile" in result.err
    assert not (tmp_path / "checkpoint-20" / paths.ANNOTATIONS).exists()


def test_verify_without_anything_good_left(fgckpt: Fgckpt, make: Make, tmp_path: Path) -> None:
    path = make(10)
    damage(path / paths.MANIFEST)
    result = fgckpt("verify", "--all", "-d", tmp_path)
    assert result.code == 1
    assert f"{paths.MANIFEST}: " in result.out
    assert result.out.splitlines()[-1] == f"→ resume latest in {tmp_path} would find nothing good"


def test_verify_tells_of_untidy_files(fgckpt: Fgckpt, make: Make, tmp_path: Path) -> None:
    (make(10) / "notes.txt").touch()
    result = fgckpt("verify", "-d", tmp_path)
    assert result.code == 0
    assert "not part of it: notes.txt" in result.out


def test_a_resume_takes_the_newest_that_is_not_known_to_be_damaged() -> None:
    candidates = [Candidate(Path(f"/run/checkpoint-{step}"), step, step) for step in (1, 2, 3)]

    def chosen(damaged: set[str]) -> int | None:
        found = verification.next_resume(candidates, {Path(f"/run/checkpoint-{step}") for step in damaged})
        return None if found is None else found.step

    assert chosen(set()) == 3
    assert chosen({"3"}) == 2
    assert chosen({"2"}) == 3
    assert chosen({"1", "2", "3"}) is None


# ---- selectors


def test_selectors(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(10, metrics={"eval_loss": 1.0}, kind="epoch", epoch=1.0)
    make(20, metrics={"eval_loss": 2.0}, kind="emergency")
    make(30, metrics={"eval_loss": 3.0})
    (make(40) / "index-00000.json").unlink()
    monkeypatch.chdir(tmp_path)
    for selector, step in {
        "latest": 30,
        "latest~1": 20,
        "latest~0": 30,
        "20": 20,
        "step:10": 10,
        "best": 10,
        "best~1": 20,
        "emergency": 20,
        "epoch:1": 10,
        "40": 40,
        "checkpoint-10": 10,
        str(tmp_path / "checkpoint-20"): 20,
    }.items():
        assert selection.find(tmp_path, selector).resolve() == tmp_path / f"checkpoint-{step}", selector


@pytest.mark.parametrize(
    "arguments",
    [
        ["ls", "nowhere"],
        ["show", "-d", "nowhere"],
        ["show", "7"],
        ["show", "latest~1"],
        ["show", "latest~" + "9" * 40],
        ["show", "best"],
        ["show", "best~1"],
        ["show", "emergency"],
        ["show", "epoch:1"],
        ["pin", "10", "best"],
        ["prune", "-d", "nowhere"],
        ["prune", "--yes", "-d", "nowhere"],
        ["save", "nowhere"],
        ["stop", "nowhere"],
        ["show", "."],
        ["verify", "step:7"],
        ["verify", "nowhere/checkpoint-1"],
        ["verify", "--all", "-d", "empty"],
        ["verify", "-d", "empty"],
    ],
)
def test_what_is_not_there_is_exit_code_3(
    arguments: list[str], fgckpt: Fgckpt, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(10)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    result = fgckpt(*arguments)
    assert (result.code, result.out) == (3, "")
    assert result.err.startswith("fgckpt: ")
    assert result.err.count("\n") == 1


# ---- exit codes and help


@pytest.mark.parametrize(
    "arguments", [["frobnicate"], ["ls", "--nonsense"], ["verify", "--all", "10"], ["ls", __file__]]
)
def test_wrong_usage_is_exit_code_2(arguments: list[str], fgckpt: Fgckpt) -> None:
    result = fgckpt(*arguments)
    assert (result.code, result.out) == (2, "")
    assert "Usage: fgckpt" in result.err


def test_show_of_a_rejected_checkpoint_is_exit_code_1(fgckpt: Fgckpt, make: Make, tmp_path: Path) -> None:
    path = make(10)
    (path / "index-00000.json").unlink()
    result = fgckpt("show", "10", "-d", tmp_path)
    assert (result.code, result.out) == (1, "")
    assert "index-00000.json is missing" in result.err
    assert str(path) in result.err


def test_a_failing_file_system_is_exit_code_5(
    fgckpt: Fgckpt, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(10)

    def fail(*_: Any) -> Any:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(files, "read_at", fail)
        result = fgckpt("show", "--tensors", "--json", "-d", tmp_path)
    assert (result.code, result.out) == (5, "")
    assert "Input/output error" in result.err
    monkeypatch.setattr(catalog, "scan", fail)
    result = fgckpt("ls", tmp_path)
    assert (result.code, result.out) == (5, "")
    assert "Input/output error" in result.err


def test_an_interrupt_is_exit_code_130(
    fgckpt: Fgckpt, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(10)

    def interrupt(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(verification.offline, "verify", interrupt)
    result = fgckpt("verify", "-d", tmp_path)
    assert (result.code, result.out) == (130, "")
    assert "interrupted" in result.err


@pytest.mark.parametrize(
    "arguments",
    [["-h"], ["--help"], ["ls", "-h"], ["show", "-h"], ["verify", "-h"]]
    + [[name, "-h"] for name in ("prune", "pin", "unpin", "quarantine", "unquarantine", "save", "stop")],
)
def test_help_opens_with_an_example(arguments: list[str], fgckpt: Fgckpt) -> None:
    result = fgckpt(*arguments)
    assert result.code == 0
    lines = [line.strip() for line in result.out.splitlines()]
    assert lines[0].startswith("Usage: fgckpt")
    assert lines[2].startswith("Example:")


def test_help_tells_the_exit_codes_and_selectors(fgckpt: Fgckpt) -> None:
    out = fgckpt("--help").out
    for line in (
        "0    fine",
        "1    the check found",
        "2    wrong usage",
        "3    no such",
        "5    the file",
        "130  inter",
    ):
        assert f"\n    {line}" in out
    for selector in ("latest~1", "best~1", "emergency", "epoch:3", "step:15000"):
        assert selector in out


@pytest.mark.parametrize("module", ["forgather_ckpt", "forgather_ckpt.cli"])
def test_the_modules_are_the_command(module: str, make: Make, tmp_path: Path) -> None:
    make(10)
    done = subprocess.run(
        [sys.executable, "-m", module, "ls", str(tmp_path)], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "resume → step 10" in done.stdout
    done = subprocess.run(
        [sys.executable, "-m", module, "show", "11"], capture_output=True, cwd=tmp_path, check=False, env=env()
    )
    assert done.returncode == 3


def test_a_terminal_without_arrows_gets_escapes_and_no_exception(make: Make, tmp_path: Path) -> None:
    make(10)
    done = subprocess.run(
        [sys.executable, "-m", "forgather_ckpt", "ls", str(tmp_path)],
        capture_output=True,
        env=env(PYTHONIOENCODING="latin-1"),
        check=False,
    )
    assert done.returncode == 0
    assert rb"resume \u2192 step 10" in done.stdout


# ---- on a terminal


@pytest.mark.parametrize(
    ("settings", "has_boxes"),
    [({}, True), ({"NO_COLOR": "1"}, False), ({"NO_COLOR": ""}, True), ({"TERM": "dumb"}, False)],
)
def test_boxes_are_for_terminals_that_want_them(
    settings: Mapping[str, str], has_boxes: bool, make: Make, tmp_path: Path
) -> None:
    make(10, metrics={"[red]loss": 1})
    shown = on_a_terminal(["ls", str(tmp_path)], {"TERM": "xterm", "COLUMNS": "120", **settings})
    assert ("╭" in shown) is has_boxes
    assert "[red]loss" in shown
    assert "resume → step 10" in shown


def test_verify_shows_its_progress_on_a_terminal(make: Make, tmp_path: Path) -> None:
    make(10)
    shown = on_a_terminal(["verify", "-d", str(tmp_path)], {"TERM": "dumb"})
    assert "checkpoint-10  100 % of" in shown
    assert "ok       checkpoint-10" in shown


def env(**settings: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "TERM", "FGCKPT_DIR")}
    return {**kept, "PYTHONPATH": str(ROOT), "PYTHONUTF8": "0", "LC_ALL": "C.UTF-8", **settings}


def python(code: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(code)]
    return subprocess.run(command, capture_output=True, text=True, env=env(), check=False)


def on_a_terminal(arguments: list[str], settings: Mapping[str, str]) -> str:
    """All that a terminal gets of a call of the command."""
    master, slave = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-m", "forgather_ckpt", *arguments], stdout=slave, stderr=slave, env=env(**settings)
    ) as process:
        os.close(slave)
        shown = b"".join(read_all(master))
    os.close(master)
    assert process.returncode == 0
    return shown.decode()


def read_all(descriptor: int) -> Iterator[bytes]:
    while True:
        try:
            data = os.read(descriptor, 65536)
        except OSError:  # EIO: the other end is closed
            return
        if not data:
            return
        yield data


# ---- words


@pytest.mark.parametrize(
    ("num_bytes", "shown"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (999_949, "999.9 kB"),
        (999_950, "1.0 MB"),
        (456_700_000, "456.7 MB"),
        (5_940_000_000, "5.9 GB"),
        (10**19, "10000.0 PB"),
    ],
)
def test_sizes(num_bytes: int, shown: str) -> None:
    assert text.size(num_bytes) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (-5, "0s"),
        (0, "0s"),
        (59.9, "59s"),
        (60, "1m"),
        (3599, "59m"),
        (3600, "1h"),
        (47.9 * 3600, "47h"),
        (49 * 3600, "2d"),
    ],
)
def test_ages(seconds: float, shown: str) -> None:
    assert text.age(seconds) == shown


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        ("plain ü", "plain ü"),
        ("a\x1b[2Jb", "a\\x1b[2Jb"),
        ("a\nb", "a\\nb"),
        ("\ud800", "\\ud800"),
        ("\u202e", "\\u202e"),
    ],
)
def test_text_of_a_checkpoint_cannot_move_the_cursor(raw: str, shown: str) -> None:
    assert text.printable(raw) == shown


def test_plain_tables_are_aligned() -> None:
    rows = [["a", "1"], ["long", "100"]]
    assert Table([Column("NAME"), Column("N", "right")], rows).plain() == "NAME    N\na       1\nlong  100"
    assert Table([Column("NAME"), Column("X")], [["a", ""]]).plain() == "NAME  X\na"
    assert table.Table([Column("NAME")], []).plain() == "NAME"
