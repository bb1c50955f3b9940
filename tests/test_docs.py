"""The programs, pictures and tables of the documentation are true: programs run, and what they show is what is said.

In docs/custom_trainer.md a fence `python ranks=4` begins a program that four ranks run, `ranks=4,2` one that four ranks
run and then two in the same directory; a plain `python` fence goes on with the program before it. `file=` is a module
that programs of any section import, `first` stands for the lines that all of them begin with, and `raises=` ends a
program with an error, of which the console fence below shows a part.
"""

import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Placement, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from forgather_ckpt import CheckpointCoordinator, ReplicaMismatch
from forgather_ckpt.cli import main
from forgather_ckpt.component import StateComponent
from forgather_ckpt.data.position import GlobalPosition
from forgather_ckpt.data.sampler import epoch_order
from forgather_ckpt.entries import Resize, entry_for
from forgather_ckpt.manifest import CheckpointManifest
from forgather_ckpt.patterns import SharingPattern
from forgather_ckpt.topology import Group, Topology
from tests.components import Box, refusal, the_same
from tests.layouts import local
from tests.ranks import run_ranks, values
from tests.test_entries import stored
from tests.test_resume import digests, in_order_of_reading

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "custom_trainer.md"
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


def code(block: Block) -> Any:
    """Compiled so that a traceback names the line on the page."""
    return compile("\n" * block.line + block.text, str(PAGE), "exec")


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
    end = next((n for n in range(start + 2, len(cells)) if set(cells[n][0]) <= {"-"} or len(cells[n]) != width), None)
    return [cells[start], *cells[start + 2 : end]]


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


# ---- what the page refers to


def test_tests_and_sections_that_are_named_exist():
    text = PAGE.read_text()
    for name in set(re.findall(r"`(tests/\w+\.py)`", text)):
        assert (ROOT / name).exists(), name
    headings = {
        re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in re.findall(r"^## (.*)$", text, re.M)
    }
    assert set(re.findall(r"\]\(#(.*?)\)", text)) == headings
    for section in map(int, re.findall(r"section (\d+)", text)):
        assert any(heading.startswith(f"{section}-") for heading in headings)
