"""The programs, pictures and tables of the documentation are true: programs run, and what they show is what is said.

In docs/custom_trainer.md a fence `python ranks=4` begins a program that four ranks run, `ranks=4,2` one that four ranks
run and then two in the same directory; a plain `python` fence goes on with the program before it. `file=` is a module
that programs of any section import, `first` stands for the lines that all of them begin with, and `raises=` ends a
program with an error, of which the console fence below shows a part.

In docs/running.md all programs and commands are run in the order of the page, in one directory. A console fence shows all
that the one before it prints, and with `of=2` some of what the last program of that section does; `…` stands for anything.
"""

import ast
import contextlib
import dataclasses
import io
import logging
import re
import shlex
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Placement, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from forgather_ckpt import CheckpointCoordinator, CheckpointManager, ReplicaMismatch, callbacks, catalog, retention
from forgather_ckpt.callbacks import TrainerCallback, TrainerControl
from forgather_ckpt.changes import Verdict, compare_arguments
from forgather_ckpt.cli import fgckpt, main
from forgather_ckpt.component import StateComponent
from forgather_ckpt.data.position import GlobalPosition
from forgather_ckpt.data.sampler import epoch_order
from forgather_ckpt.entries import Resize, entry_for
from forgather_ckpt.errors import CheckpointDamaged, CheckpointNotFound, DeclarationError, LoadMismatch
from forgather_ckpt.manifest import CheckpointManifest
from forgather_ckpt.patterns import SharingPattern
from forgather_ckpt.policies import Stored
from forgather_ckpt.prompt import Question
from forgather_ckpt.topology import Group, Topology
from forgather_ckpt.trainers import Trainer, TrainingArguments
from tests.components import Box, refusal, the_same
from tests.layouts import local
from tests.ranks import run_ranks, values
from tests.runs import Lines, Net, Noise, trainer_of
from tests.test_entries import stored
from tests.test_resume import digests, in_order_of_reading

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "custom_trainer.md"
RUNNING = ROOT / "docs" / "running.md"
README = ROOT / "README.md"

PER_GROUP, PER_RANK = SharingPattern.PER_GROUP, SharingPattern.PER_RANK


# ---- the page


@dataclass(frozen=True)
class Block:
    """A fence: where it is, what it is, and what is in it."""

    section: str
    line: int
    """Of its first line of text, from 0."""
    language: str
    options: Mapping[str, str]
    text: str

    @property
    def end(self) -> int:
        """The line of the closing fence."""
        return self.line + len(self.text.splitlines())


def blocks_of(page: Path) -> Iterator[Block]:
    section, lines = "", page.read_text().splitlines()
    numbers = iter(range(len(lines)))
    for number in numbers:
        if lines[number].startswith("## "):
            section = lines[number].removeprefix("## ")
        elif lines[number].startswith("```"):
            language, *options = lines[number].removeprefix("```").split() or [""]
            end = next(at for at in numbers if lines[at] == "```")
            named = dict(option.partition("=")[::2] for option in options)
            yield Block(section, number + 1, language, named, "\n".join(lines[number + 1 : end]))


@dataclass
class Program:
    """Blocks that are run one after the other, by one number of ranks after the other."""

    section: str
    ranks: list[int]
    blocks: list[Block] = field(default_factory=list)
    shown: list[list[str]] = field(default_factory=list)
    """For each block, what is in the text fence right before it and in the console fence after it."""


def programs() -> list[Program]:
    found: list[Program] = []
    before: Block | None = None
    for block in blocks_of(PAGE):
        if block.language == "console":
            found[-1].shown[-1][1] = block.text
        elif block.language == "python" and not {"file", "first"} & block.options.keys():
            if "ranks" in block.options:
                found.append(Program(block.section, [int(number) for number in block.options["ranks"].split(",")]))
            found[-1].blocks.append(block)
            is_pictured = before is not None and before.language == "text" and before.end + 2 == block.line
            found[-1].shown.append([before.text if is_pictured else "", ""])
        before = block
    return found


def code(block: Block, page: Path = PAGE) -> Any:
    """Compiled so that a traceback names the line on the page."""
    return compile("\n" * block.line + block.text, str(page), "exec")


@dataclass(frozen=True)
class Ran:
    """What a block came to on one rank."""

    state: dict[str, str] | None
    """Digests of the state of `model`, of a DTensor that of this rank's part."""
    error: str | None
    read: list[int] | None
    """What the block has in `read`."""


def run(program: Program, directory: Path, alter: Callable[[str], str] = lambda text: text) -> list[list[Ran]]:
    """Run a program in a directory; for each rank of the last run what each block came to. `alter`: the text of modules."""
    (first,) = (block for block in blocks_of(PAGE) if "first" in block.options)
    files = [block for block in blocks_of(PAGE) if "file" in block.options]
    for block in files:
        (directory / block.options["file"]).write_text(alter(f"{first.text}\n{block.text}\n"))

    def case(rank: int, world_size: int) -> list[Ran]:
        sys.path.insert(0, str(directory))
        namespace: dict[str, Any] = {}
        exec(code(first), namespace)
        ran = []
        for block in program.blocks:
            error = None
            try:
                exec(code(block), namespace)
            except Exception as err:
                if type(err).__name__ != block.options.get("raises"):
                    raise
                error = str(err)
            model = namespace.get("model")
            state = None if model is None else digests(local(model.state_dict()))
            ran.append(Ran(state, error, namespace.get("read")))
        return ran

    for number in program.ranks:
        results = values(run_ranks(number, case, backend=None if number == 1 else "gloo", timeout=100))
    return results


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, where programs have their runs."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


SECTIONS = sorted({program.section for program in programs()})


@pytest.mark.multiprocess
@pytest.mark.parametrize("section", SECTIONS)
def test_the_programs_of_a_section_run_and_come_to_what_is_shown(section: str, directory: Path):
    for program in programs():
        if program.section != section:
            continue
        ranks = run(program, directory)
        for number, (block, (picture, console)) in enumerate(zip(program.blocks, program.shown, strict=True)):
            ran = [rank[number] for rank in ranks]
            if picture:
                assert alike([one.state for one in ran]) == drawn(picture), picture
            if "raises" in block.options:
                assert console
                assert {one.error for one in ran} == {ran[0].error}, "not the same error on all ranks"
                assert ran[0].error is not None and console in ran[0].error


def alike(states: Sequence[Any]) -> list[list[int]]:
    """The ranks in groups of identical state."""
    groups: dict[str, list[int]] = defaultdict(list)
    for rank, state in enumerate(states):
        assert state
        groups[repr(state)].append(rank)
    return list(groups.values())


def drawn(picture: str) -> list[list[int]]:
    """The groups that a picture names."""
    [said] = re.findall(r"identical state: (.*)", picture)
    return [[int(rank) for rank in group.split(",")] for group in re.findall(r"\((.*?)\)", said)]


def test_every_python_block_belongs_to_a_program_or_is_imported_by_one():
    on_page = [block for block in blocks_of(PAGE) if block.language == "python"]
    run_or_imported = [block for program in programs() for block in program.blocks]
    run_or_imported += [block for block in on_page if {"file", "first"} & block.options.keys()]
    assert sorted(run_or_imported, key=lambda block: block.line) == on_page
    imports = [block.text for block in run_or_imported]
    for block in on_page:
        if "file" in block.options:
            module = block.options["file"].removesuffix(".py")
            assert any(f"from {module} import" in text for text in imports), "a module that no program imports"


# ---- section 3: what is said of the checkpoints, and the picture without a program


@pytest.mark.multiprocess
def test_halves_stages_and_experts_are_whole_items_of_their_checkpoints(directory: Path):
    for program in programs():
        if program.section.startswith("3."):
            run(program, directory)
    linear = 8 * 8 + 8
    num_elements = {
        "ddp": linear,
        "stages": 4 * linear,
        "halves": 8 * 16 + 16 + 16 * 8 + 8 + 8 + 8,
        "hsdp": 8 * 16 + 16 + 16 * 8 + 8,
        "experts": 8 * 4 + 4 + 4 * linear,
    }
    assert {path.name for path in (directory / "runs").iterdir()} - {"wrong"} == num_elements.keys()
    for name, number in num_elements.items():
        part = CheckpointManifest.load(directory / "runs" / name / "checkpoint-1").components["model"]
        assert (part.num_bytes, list(part.entries), part.validation.result) == (4 * number, ["all"], "equal"), name


@pytest.mark.multiprocess
def test_on_three_axes_the_ranks_along_dp_hold_identical_state(directory: Path):
    def case(rank: int, world_size: int) -> dict[str, str]:
        mesh = init_device_mesh("cpu", (2, 2, 2), mesh_dim_names=("dp", "pp", "tp"))
        torch.manual_seed(mesh.get_local_rank("pp"))
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        parallelize_module(model, mesh["tp"], {"*": ColwiseParallel()})
        model = nn.ModuleDict({f"{mesh.get_local_rank('pp')}": model})
        component = StateComponent("model", model, PER_GROUP, process_group_name="dp", names="global")
        with CheckpointCoordinator([component], "runs", process_groups=mesh, timeout_seconds=30) as checkpoints:
            checkpoints.save_checkpoint(1)
        return digests(local(model.state_dict()))

    pictures = {block.text for block in blocks_of(PAGE) if block.language == "text"}
    [picture] = pictures - {picture for program in programs() for picture, _ in program.shown}
    states = values(run_ranks(8, case))
    assert alike(states) == drawn(picture)
    manifest = CheckpointManifest.load(directory / "runs/checkpoint-1")
    assert [list(ranks) for ranks in manifest.topology.groups["dp"].sets] == drawn(picture)


# ---- section 3: the mistake that nothing can tell


@pytest.mark.multiprocess
@pytest.mark.parametrize("level", ["quick", "none"])
def test_stages_of_equal_names_declared_as_copies_are_found_unless_nothing_is_compared(level: str, directory: Path):
    def case(rank: int, world_size: int) -> Any:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "pp"))
        stage = Box({"0.weight": torch.full((2,), float(mesh.get_local_rank("pp")))})
        component = StateComponent(
            "model", stage, SharingPattern.PER_GROUP, process_group_name="pp", validation_level=level
        )
        with CheckpointCoordinator([component], "runs", process_groups=mesh, timeout_seconds=30) as checkpoints:
            if level != "none":
                with pytest.raises(ReplicaMismatch, match=r"differs between rank 0 and rank 1 at '0\.weight'"):
                    checkpoints.save_checkpoint(1)
                return None
            checkpoints.save_checkpoint(1)
            checkpoints.load_checkpoint()
        return stage.items["0.weight"].tolist()

    expected = None if level != "none" else [0.0, 0.0]
    assert values(run_ranks(4, case)) == [expected] * 4


# ---- section 5: what is refused


class Pair(torch.Tensor):
    """A tensor whose elements lie in two others, as those of quantized weights do."""

    def __new__(cls, one: torch.Tensor, two: torch.Tensor) -> "Pair":
        pair = torch.Tensor._make_wrapper_subclass(cls, one.shape, dtype=one.dtype)
        pair.one, pair.two = one, two
        return pair

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["one", "two"], None

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        one, two = (
            function(*[getattr(each, name) if isinstance(each, cls) else each for each in args], **(kwargs or {}))
            for name in ("one", "two")
        )
        return cls(one, two)


REFUSED: dict[str, tuple[Callable[[DeviceMesh], StateComponent], str]] = {
    "`Partial`": (
        lambda mesh: StateComponent("part", Box({"x": cut(torch.ones(2), mesh, Partial())}), SharingPattern.REPLICATED),
        "x: a DTensor with the placement Partial(sum) cannot be checkpointed: no rank has its elements; redistribute it first",
    ),
    "a mesh whose ranks do not ascend along an axis that cuts, such as `[1, 0]`": (
        lambda mesh: StateComponent(
            "part", Box({"x": cut(torch.ones(2), DeviceMesh("cpu", [1, 0]), Shard(0))}), SharingPattern.REPLICATED
        ),
        "x: a DTensor cannot be checkpointed on the mesh [1, 0]: its ranks do not ascend along axis 0, which cuts the tensor, "
        "and torch cuts in the order of ranks; make the mesh with ascending ranks there",
    ),
    "a local part that is a tensor subclass made of several tensors (quantized weights)": (
        lambda mesh: StateComponent(
            "part", Box({"x": cut(Pair(torch.ones(2), torch.ones(2)), mesh, Shard(0))}), SharingPattern.REPLICATED
        ),
        "x: its local part is a Pair, whose elements do not lie in one plain tensor; return its parts as plain tensors or "
        "DTensors of their own",
    ),
    "`PER_GROUP` or `PER_RANK` with local names, and a mesh that reaches outside of the set": (
        lambda mesh: StateComponent("part", Box({"x": cut(torch.ones(2), mesh, Shard(0))}), PER_RANK),
        "tensors are cut over the ranks 0-1, of which rank(s) 1 are outside the set 'rank=0', whose state is stored by itself; "
        "declare names='global'",
    ),
}


def cut(tensor: torch.Tensor, mesh: DeviceMesh, placement: Placement) -> DTensor:
    return DTensor.from_local(tensor, mesh, [placement], run_check=False)


@pytest.mark.multiprocess
def test_the_table_says_which_dtensors_are_refused(directory: Path):
    def case(rank: int, world_size: int) -> list[tuple[str, str]]:
        mesh = init_device_mesh("cpu", (2,))
        refusals = []
        for make, _ in REFUSED.values():
            with CheckpointCoordinator([make(mesh)], "runs", timeout_seconds=30) as checkpoints:
                refusals.append(refusal(lambda: checkpoints.save_checkpoint(1)))
        return refusals

    refusals = the_same(values(run_ranks(2, case)))
    assert [row[0] for row in table_of(PAGE, "")[1:] if row[1].startswith("refused")] == list(REFUSED)
    for (_, message), (_, expected) in zip(refusals, REFUSED.values(), strict=True):
        assert expected in message


# ---- section 6: the table


def topology(dp: int, pp: int, nodes: int, *, is_mesh: bool = True) -> Topology:
    """A job of `dp` × `pp` ranks, pp the inner axis, on nodes of equal size."""
    world_size = dp * pp
    sets = tuple(tuple(range(stage, world_size, pp)) for stage in range(pp))
    places = tuple((("pp", stage, pp),) for stage in range(pp)) if is_mesh else None
    size = world_size // nodes
    of_nodes = tuple(tuple(range(node * size, (node + 1) * size)) for node in range(nodes))
    return Topology(0, world_size, of_nodes, groups={"dp": Group(sets, places)})


SAVED = (4, 2, 2)
COLUMNS = {
    "half the ranks: `dp` 2 × `pp` 2, two nodes": (2, 2, 2),
    "other stages: `dp` 2 × `pp` 4, two nodes": (2, 4, 2),
    "the same mesh on one node": (4, 2, 1),
}
ROWS: dict[str, list[StateComponent]] = {
    "GLOBAL, REPLICATED": [
        StateComponent("part", Box({}), pattern) for pattern in (SharingPattern.GLOBAL, SharingPattern.REPLICATED)
    ],
    'any pattern with `names="global"`': [
        StateComponent("part", Box({}), PER_GROUP, "dp", names="global"),
        *(
            StateComponent("part", Box({}), pattern, names="global")
            for pattern in SharingPattern
            if pattern is not PER_GROUP
        ),
    ],
    "PER_GROUP `dp` of a mesh": [StateComponent("part", Box({}), PER_GROUP, "dp")],
    "PER_GROUP `dp`, bare groups": [StateComponent("part", Box({}), PER_GROUP, "dp")],
    "PER_NODE": [StateComponent("part", Box({}), SharingPattern.PER_NODE)],
    "PER_RANK": [StateComponent("part", Box({}), PER_RANK)],
}


def table_of(page: Path, first_cell: str) -> list[list[str]]:
    """The rows of the table whose head begins with this cell, the head first."""
    rows = [line.strip("|").split("|") for line in page.read_text().splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in row] for row in rows]
    start = next(number for number, row in enumerate(cells) if row[0] == first_cell)
    width = len(cells[start])
    others = [n for n in range(start + 2, len(cells)) if len(cells[n]) != width]
    heads = [n - 1 for n in range(start + 2, len(cells)) if set(cells[n][0]) == {"-"}]
    return [cells[start], *cells[start + 2 : min([*others, *heads], default=None)]]


def test_the_table_says_what_is_found_again():
    head, *rows = table_of(PAGE, "declared")
    assert head[1:] == list(COLUMNS)
    assert [row[0] for row in rows] == list(ROWS)
    for label, *cells in rows:
        is_mesh = "bare" not in label
        for column, cell in zip(COLUMNS.values(), cells, strict=True):
            assert {outcome(one, column, is_mesh=is_mesh) for one in ROWS[label]} == {cell}, (label, column)


def outcome(component: StateComponent, now: tuple[int, int, int], *, is_mesh: bool) -> str:
    """What happens on the ranks that hold something, the same on all of them."""
    old, new = topology(*SAVED, is_mesh=is_mesh), topology(*now, is_mesh=is_mesh)
    record = stored(component, old)
    found = [entry_for(component, record, old, replace(new, rank=rank)) for rank in range(new.world_size)]
    return "on_resize" if any(isinstance(one, Resize) for one in found) else "as it is"


# ---- section 7: the run that reads in two ways


@pytest.mark.multiprocess
def test_a_run_that_changes_who_reads_leaves_no_sample_out_and_reads_none_twice(directory: Path):
    [program] = [one for one in programs() if one.section.startswith("7.")]
    ranks = [ran.read or [] for (ran,) in run(program, directory)]
    of_lives = [[rank[life : life + 2] for life in range(0, 8, 2)] for rank in ranks]
    assert in_order_of_reading(of_lives) == epoch_order(GlobalPosition(40)).tolist()[:16]


# ---- section 9: the comparison


def compared(directory: Path, alter: Callable[[str], str] = lambda text: text) -> int:
    """The exit code of the comparison on the page, where `alter` makes the trainer's source from that on the page."""
    [program] = [one for one in programs() if one.section.startswith("9.")]
    [command] = [block.text for block in blocks_of(PAGE) if block.language == "bash"]
    run(program, directory, alter)
    name, *arguments = command.partition("#")[0].split()
    assert name == "fgckpt"
    return main(arguments)


@pytest.mark.multiprocess
def test_the_trainer_of_the_page_resumes_to_the_same_bits(directory: Path):
    assert compared(directory) == 0
    whole = CheckpointManifest.load(directory / "runs/whole/checkpoint-8")
    assert set(whole.components) == {"model", "optimizer", "schedule", "steps", "dataset", "rng"}


LEFT_OUT = [
    'StateComponent("rng"',
    'StateComponent("schedule"',
    'StateComponent("dataset"',
    "lay_out_buckets(self.ddp)",
]


@pytest.mark.multiprocess
@pytest.mark.parametrize("part", LEFT_OUT)
def test_the_comparison_fails_where_a_part_is_left_out(part: str, directory: Path):
    def without(text: str) -> str:
        [line] = [line for line in text.splitlines() if part in line]
        return text.replace(line + "\n", "")

    assert compared(directory, without) == 1


@pytest.mark.multiprocess
def test_generators_that_are_declared_as_copies_fail_the_first_save(directory: Path):
    def copied(text: str) -> str:
        altered = text.replace('RNGState(), PER_RANK, on_resize="drop"', "RNGState(), REPLICATED")
        assert altered != text
        return altered

    with pytest.raises(AssertionError, match="ReplicaMismatch: 'rng' differs between rank 0 and ranks"):
        compared(directory, copied)


# ---- the README


@pytest.mark.multiprocess
def test_the_loop_of_the_readme_runs_and_goes_on_from_where_it_was(directory: Path):
    [loop] = [block.text for block in blocks_of(README) if block.section == "In your own loop"]

    def case(rank: int, world_size: int) -> tuple[int, int]:
        torch.manual_seed(0)
        model = nn.Linear(3, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        steps = []

        def train_step() -> None:
            model(torch.ones(3)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            steps.append(1)

        namespace: dict[str, Any] = {"model": model, "optimizer": optimizer, "train_step": train_step}
        shorter = loop.replace("10_000", "1_000")
        assert shorter != loop
        exec(shorter, namespace)
        return namespace["step"], len(steps)

    assert values(run_ranks(2, case)) == [(1000, 1000)] * 2
    (directory / "runs/mine/checkpoint-1000" / "checkpoint_manifest.json").write_text("")
    assert values(run_ranks(2, case)) == [(1000, 500)] * 2


def test_the_run_of_the_readme_that_keeps_and_watches_ends_with_its_best(directory: Path):
    [block] = [block for block in blocks_of(README) if block.section == "While it runs"]
    names = ("DualTimeScaleDivergenceDetector", "EarlyStopping", "JsonlLogger", "ProgressBar")
    namespace: dict[str, Any] = {
        "sys": sys,
        "TrainingArguments": TrainingArguments,
        "DDPTrainer": Trainer,  # one process will do
        "model": Net(),
        "train_dataset": Noise(),
        "held_out": Noise(8, seed=1),
        **{name: getattr(callbacks, name) for name in names},
    }
    shorter = block.text.replace("max_steps=10_000", "max_steps=10").replace("save_steps=500", "save_steps=2")
    assert shorter.count("max_steps=10,") == shorter.count("save_steps=2,") == 1
    with pytest.raises(SystemExit, match="0"):
        exec(shorter, namespace)
    assert namespace["result"].steps == 10
    found = catalog.scan(directory / "runs/mine").checkpoints
    assert [one.manifest.step for one in found][:3] == [10, 8, 6] and len(found) <= 5
    assert all("eval_loss" in one.manifest.metrics for one in found)


# ---- what the pages refer to


@pytest.mark.parametrize("page", [PAGE, RUNNING], ids=lambda page: page.name)
def test_tests_pages_and_sections_that_are_named_exist(page: Path):
    text = page.read_text()
    for name in set(re.findall(r"`(tests/\w+\.py)`", text)):
        assert (ROOT / name).exists(), name
    for name in set(re.findall(r"\]\(([^#)]+)", text)):
        assert (page.parent / name).exists(), name
    headings = {
        re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in re.findall(r"^## (.*)$", text, re.M)
    }
    assert set(re.findall(r"\]\(#(.*?)\)", text)) == headings
    for section in map(int, re.findall(r"section (\d+)", text)):
        assert any(heading.startswith(f"{section}-") for heading in headings)


# ---- the run manager: its programs


def printed(block: Block, num_ranks: int, directory: Path) -> str:
    """What rank 0 prints."""

    def case(rank: int, world_size: int) -> str:
        sys.path.insert(0, str(directory))
        logging.getLogger().handlers.clear()  # those of the tests, or `basicConfig` would do nothing
        sys.orig_argv = [sys.executable, "train.py"]  # under xdist, tests run in what looks like an interactive session
        with contextlib.redirect_stdout(io.StringIO()) as said:
            try:
                exec(code(block, RUNNING), {})
            except SystemExit as err:
                assert not err.code, err.code
        return said.getvalue()

    return str(values(run_ranks(num_ranks, case, backend=None if num_ranks == 1 else "gloo", timeout=100))[0])


def pattern_of(shown: str) -> str:
    """Of all that may stand where a page shows this."""
    return re.escape(shown).replace("…", "(?s:.*?)")


@pytest.mark.multiprocess
def test_the_programs_and_commands_of_the_run_manager_come_to_what_is_shown(
    directory: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("COLUMNS", "100")
    said: dict[str, str] = {}
    last = ""
    for block in blocks_of(RUNNING):
        match block.language:
            case "python" if "file" in block.options:
                (directory / block.options["file"]).write_text(block.text)
            case "python":
                for number in block.options["ranks"].split(","):
                    last = said[block.section[0]] = printed(block, int(number), directory)
            case "bash":
                name, *arguments = shlex.split(block.text, comments=True)
                assert (name, main(arguments)) == ("fgckpt", 0)
                out, err = capsys.readouterr()
                last = err + out
            case "console" if "of" in block.options:
                assert re.search(pattern_of(block.text), said[block.options["of"]]), said[block.options["of"]]
            case "console":
                assert re.fullmatch(pattern_of(block.text) + "\n?", last), last
            case other:
                raise AssertionError(f"a fence of {other!r}")
    steps = {path.name: CheckpointManifest.load(path).step for path in (directory / "runs/own").glob("checkpoint-*")}
    assert {150, 200} <= set(steps.values()) and len(steps) <= 3


# ---- the run manager: its tables


def told_in(cell: str) -> list[str]:
    """What stands in backticks."""
    return re.findall(r"`([^`]+)`", cell)


OF_THE_TRAINING = {
    *(
        "output_dir",
        "seed",
        "max_steps",
        "num_train_epochs",
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
    ),
    *("learning_rate", "weight_decay", "max_grad_norm", "lr_scheduler_type", "warmup_steps", "fp16", "bf16", "device"),
    *("logging_steps", "dataloader_num_workers", "dispatch_batches"),
}
OF_THE_CHECK = {"validate_replication_steps", "validate_replication_level", "on_replica_mismatch"}


def test_all_arguments_of_the_run_manager_are_told_with_their_defaults():
    defaults = {one.name: one.default for one in dataclasses.fields(TrainingArguments)}
    told = {
        name: ast.literal_eval(default)
        for names, values_, _ in table_of(RUNNING, "argument")[1:]
        for name, default in zip(told_in(names), told_in(values_), strict=True)
    }
    assert told == {name: default for name, default in defaults.items() if name not in OF_THE_TRAINING | OF_THE_CHECK}
    for name in retention._REPLACED:
        assert f"`{name}`" in RUNNING.read_text()


def test_all_events_and_flags_are_told():
    events = [name for row in table_of(RUNNING, "event")[1:] for name in told_in(row[0])]
    assert sorted(events) == sorted(name for name in vars(TrainerCallback) if name.startswith("on_"))
    flags = {one.name for one in dataclasses.fields(TrainerControl)} - {"reasons"}
    assert set(re.findall(r"`(?:control\.)?(should_\w+)`", RUNNING.read_text())) == flags


STEPS = {"the newest good one": 3000, "the best": 1000, "the second best": 2000, "that one": 1000, "a fresh start": 0}


def test_the_table_says_what_each_value_resumes_from(directory: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sys.stdin", io.StringIO())  # no terminal

    def manager(run: str) -> CheckpointManager:
        return CheckpointManager([StateComponent("part", Box({}), SharingPattern.GLOBAL)], run)

    with manager("runs/a") as saving:
        for step in (1000, 2000, 3000, 4000):
            saving.save(step, metrics={"eval_loss": float(step)})
    damaged = Path("runs/a/checkpoint-4000/checkpoint_manifest.json")
    damaged.write_bytes(damaged.read_bytes()[:-1])
    for values_, *cells in table_of(RUNNING, "`resume_from_checkpoint`")[1:]:
        which = [ast.literal_eval(value) for value in told_in(values_)]
        for run, cell in zip(("runs/a", "runs/none"), cells, strict=True):
            results = cell.split(", ") if cell.count(",") == len(which) - 1 and len(which) > 1 else [cell] * len(which)
            for value, result in zip(which, results, strict=True):
                with manager(run) as resuming:
                    if result in STEPS:
                        assert resuming.resume(value) == STEPS[result], (run, value)
                    elif result == "an error":
                        with pytest.raises(CheckpointNotFound):
                            resuming.resume(value)
                    else:
                        assert result == "asks at the terminal; without one, an error"
                        with pytest.raises(DeclarationError, match="--auto-resume to go on, or --fresh to start over"):
                            resuming.resume(value)


@pytest.mark.parametrize("value", ["auto", None])
def test_where_all_checkpoints_are_damaged_there_is_no_fresh_start(value: Any, directory: Path):
    trainer_of(Trainer, "runs/a", max_steps=1).train()
    (directory / "runs/a/checkpoint-1/checkpoint_manifest.json").write_text("")
    with pytest.raises(CheckpointDamaged, match=r"none of the 1 checkpoints in .* is whole"):
        trainer_of(Trainer, "runs/a", resume_from_checkpoint=value).train()


def test_the_question_is_the_one_that_is_asked():
    newest = Stored(Path("c"), 15_000, 3, "", saved_at_seconds=0.0, metrics={"eval_loss": 2.8312})
    question = Question("runs/a", [newest] * 3, None, 2 * 3600.0)
    assert f"`{question.text}`" in RUNNING.read_text()


OTHERS = {"max_steps": 200, "warmup_steps": 5, "seed": 7, "num_train_epochs": 5}


def test_the_table_says_what_comes_of_a_change():
    def verdict(name: str, **settings: Any) -> Verdict:
        before = TrainingArguments("runs/a", **({"max_steps": 100} if name != "num_train_epochs" else {}), **settings)
        saved = before.to_json()
        [found] = [
            change
            for change in compare_arguments(
                saved, {**saved, name: OTHERS.get(name, "other")}, saved_world_size=2, world_size=2, step=50
            )
            if change.name == name
        ]
        return found.verdict

    for word, _, names in table_of(RUNNING, "verdict")[1:]:
        assert {name: verdict(name) for name in told_in(names)} == dict.fromkeys(told_in(names), Verdict(word))
        if word == "risky":
            for name in ("max_steps", "num_train_epochs", "warmup_steps"):
                assert verdict(name, lr_scheduler_type="constant") in (Verdict.FINE, Verdict.IGNORED)


def test_changes_are_told_at_a_resume_and_risky_ones_refused_where_that_is_asked_for(directory: Path):
    trainer_of(Trainer, "runs/a", max_steps=4).train()
    trainer = trainer_of(Trainer, "runs/a", max_steps=8, learning_rate=0.02, strict_args=True)
    before = digests(trainer.model.state_dict())
    with pytest.raises(LoadMismatch, match=r"strict_args refuses changes that are risky.*\nmax_steps"):
        trainer.train()
    assert digests(trainer.model.state_dict()) == before
    with Lines(logging.WARNING) as told:
        trainer_of(Trainer, "runs/a", max_steps=8, learning_rate=0.02).train()
    [line] = [
        line for line in told.lines if line.startswith("arguments that are not those of the checkpoint of step 4:")
    ]
    assert re.findall(r"^(\w+) .* (risky|ignored) ", line, re.M) == [
        ("max_steps", "risky"),
        ("learning_rate", "ignored"),
    ]


# ---- the commands


def commands_on(page: Path) -> Iterator[list[str]]:
    in_lines = re.findall(r"`(fgckpt [^`\n]*)`", page.read_text())
    in_blocks = [line for block in blocks_of(page) if block.language == "bash" for line in block.text.splitlines()]
    for command in [*in_lines, *(line for line in in_blocks if line.startswith("fgckpt "))]:
        yield shlex.split(command, comments=True)[1:]


@pytest.mark.parametrize("page", [README, *sorted(PAGE.parent.glob("*.md"))], ids=lambda page: page.name)
def test_commands_and_options_that_are_named_exist(page: Path):
    for words in commands_on(page):
        command: click.Command = fgckpt
        while isinstance(command, click.Group) and words and not words[0].startswith("-"):
            command = command.commands[words.pop(0)]
        known = {option for parameter in [*command.params, *fgckpt.params] for option in parameter.opts} | {"--help"}
        if not command.context_settings.get("ignore_unknown_options"):
            assert {word.partition("=")[0] for word in words if word.startswith("-")} <= known, words
