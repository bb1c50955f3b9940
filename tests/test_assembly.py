"""Saved and loaded, a state is the same: of every dtype, layout and nesting, in place where that is possible."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from forgather_ckpt import CheckpointCoordinator, SharingPattern, StateComponent, Target, dtypes, hashtree, memory
from forgather_ckpt.assembly import assemble, gather
from forgather_ckpt.component import Available
from forgather_ckpt.errors import CheckpointError, FormatError, LoadMismatch, StructureError
from forgather_ckpt.hashtree import BLOCK_BYTES
from forgather_ckpt.index import AliasRow, IndexEntry, TensorRow, ValueRow
from forgather_ckpt.structure import capture
from tests.components import Box, listing
from tests.states import assert_same, state_dicts, tensor_bytes, tensor_of

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")

MIB = 1 << 20


def coordinator(run, stateful, *, pattern=SharingPattern.GLOBAL) -> CheckpointCoordinator:
    return CheckpointCoordinator([StateComponent("c", stateful, pattern)], run)


def through(run, saved, live=None):
    """What `load_state_dict` is given by a job that holds `live`, after a job that held `saved` has saved it."""
    with coordinator(run, Box(saved)) as saving:
        saving.save_checkpoint(step=1)
    box = Box(live or {})
    with coordinator(run, box) as loading:
        loading.load_checkpoint()
    return box.items


IMAGES = tensor_of("float32", (2, 3, 4, 5))
COMPLEX = tensor_of("complex64", (3, 4))
BASE = tensor_of("float64", (6, 8))

STATES = {
    "every dtype": {f"{dtype} {shape}": tensor_of(dtype, shape) for dtype in dtypes.ITEM_BYTES for shape in [(3, 5), (), (0, 4)]},
    "layouts": {
        "turned": BASE.t(),
        "strided": BASE[::2, 1::3],
        "channels last": IMAGES.to(memory_format=torch.channels_last),
        "expanded": BASE[:, :1].expand(6, 8),
        "overlapping": BASE.reshape(-1).as_strided((5, 4), (1, 1)),
        "overlaps with another": BASE[1:],
        "conj": COMPLEX.conj(),
        "neg": COMPLEX.conj().imag,
        "parameter": nn.Parameter(torch.ones(3)),
        "computed": nn.Parameter(torch.ones(3)) * 2,
    },
    "many": {f"layers.{number}.weight": torch.full((number % 7,), number) for number in range(300)},
    "nesting": {
        "a": {"b": {}, "c": [], "d": (), "e": [{}], "f": ({"g": torch.zeros(1)}, [torch.ones(1), None])},
        0: {1: torch.zeros(2), -5: {2.5: "x", None: b"y", (1, "z"): {True: torch.ones(1)}}},
        "": {"": {"": torch.zeros(1)}},
        "../../evil": {"~": torch.ones(2), "/": 1, "\n": 2, "\ud800": torch.zeros(1)},
        "x" * 10_000: torch.ones(1),
        "__metadata__": torch.ones(1),
    },
    "values alone": {"step": 5, "lr": 0.1, "name": "x", "schedule": [1, 2.5, (3,)], "nan": float("nan")},
    "nothing": {},
}  # fmt: skip


def several_blocks():
    """Made by each test: what a module holds is copied, page table by page table, into every rank that is forked."""
    return {
        "large": torch.arange(3 * MIB, dtype=torch.int32),
        "exact": torch.arange(2 * MIB, dtype=torch.int32),
        "empty": torch.zeros(0),
        "one more byte": torch.arange(BLOCK_BYTES + 1).to(torch.uint8),
        "turned": torch.arange(3 * MIB, dtype=torch.int32).reshape(-1, 6).t(),
    }


@pytest.mark.parametrize("name", [*STATES, "several blocks"])
def test_a_state_comes_back_into_nothing(tmp_path, name):
    state = STATES[name] if name in STATES else several_blocks()
    assert_same(through(tmp_path, state), state)


def like(value):
    """The same structure and layouts with other content."""
    if isinstance(value, torch.Tensor):
        other = value.detach().clone(memory_format=torch.preserve_format)
        if other.numel():
            memory.flat_bytes(other).fill_(0)
        return other
    if isinstance(value, dict):
        return {key: like(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(like(item) for item in value)
    return value


def tensors_of(value, at=""):
    if isinstance(value, torch.Tensor):
        yield at, value
    elif isinstance(value, dict | list | tuple):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from tensors_of(item, f"{at}/{key!r}")


@pytest.mark.parametrize("name", [*STATES, "several blocks"])
def test_a_state_comes_back_in_place(tmp_path, name):
    state = STATES[name] if name in STATES else several_blocks()
    live = like(state)
    layouts = {at: (tensor.data_ptr(), tensor.stride()) for at, tensor in tensors_of(live)}
    found = through(tmp_path, state, live)
    assert_same(found, state)
    assert_same(live, state)
    assert {at: (tensor.data_ptr(), tensor.stride()) for at, tensor in tensors_of(found)} == layouts


@settings(max_examples=25)
@given(state_dicts)
def test_any_state_comes_back(tmp_path_factory, state):
    run = tmp_path_factory.mktemp("run")
    try:
        capture(state)
    except StructureError:
        return
    assert_same(through(run, state), state)


@pytest.mark.parametrize(
    "live",
    [
        torch.zeros(1, 4).expand(3, 4),
        torch.zeros(6).as_strided((3, 4), (1, 1)),
        torch.zeros(3, 4, dtype=torch.complex64).conj().imag,
    ],
    ids=["expanded", "overlapping", "neg"],
)
def test_what_has_no_memory_of_its_own_is_not_filled(tmp_path, live):
    before = tensor_bytes(live)
    state = {"x": tensor_of("float32", (3, 4))}
    found = through(tmp_path, state, {"x": live})
    assert_same(found, state)
    assert found["x"].is_contiguous()
    assert tensor_bytes(live) == before


def test_dense_layouts_are_filled_as_they_are(tmp_path):
    saved = tensor_of("float32", (4, 6))
    for number, live in enumerate(
        [torch.zeros(6, 4).t(), torch.zeros(8, 12)[::2, ::2], torch.zeros(30)[6:].reshape(4, 6)]
    ):
        found = through(tmp_path / str(number), {"x": saved}, {"x": live})
        assert found["x"].data_ptr() == live.data_ptr()
        assert tensor_bytes(live) == tensor_bytes(saved)


# ---- modules


class Tied(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(50, 8)
        self.conv = nn.Conv2d(3, 4, 2).to(memory_format=torch.channels_last)
        self.norm = nn.BatchNorm1d(8)
        self.head = nn.Linear(8, 50, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("mask", torch.rand(5) > 0.5)
        self.gain = nn.Parameter(torch.randn(7).bfloat16())


def test_b40_tied_and_channels_last_weights_are_stored_once_and_tied_again(tmp_path):
    model, other = Tied(0), Tied(1)
    with coordinator(tmp_path, model) as saving:
        path = saving.save_checkpoint(step=1)
    stored = sum(
        tensor.nbytes for tensor in {id(value): value for value in model.state_dict(keep_vars=True).values()}.values()
    )
    [tensors] = path.glob("*.safetensors")
    assert stored <= tensors.stat().st_size < stored + 8192 < stored + model.embedding.weight.nbytes + 8192
    with coordinator(tmp_path, other) as loading:
        loading.load_checkpoint()
    assert_same(dict(other.state_dict()), dict(model.state_dict()))
    assert other.head.weight is other.embedding.weight
    assert other.conv.weight.is_contiguous(memory_format=torch.channels_last)
    found = through(tmp_path / "again", model.state_dict())
    assert found["head.weight"] is found["embedding.weight"]


def test_weights_tied_in_the_checkpoint_alone_are_loaded_into_both(tmp_path):
    untied = Tied(1)
    untied.head.weight = nn.Parameter(torch.zeros(50, 8))
    model = Tied(0)
    with coordinator(tmp_path, model) as saving:
        saving.save_checkpoint(step=1)
    with coordinator(tmp_path, untied) as loading:
        loading.load_checkpoint()
    assert_same(dict(untied.state_dict()), dict(model.state_dict()))
    assert untied.head.weight is not untied.embedding.weight


def test_parameters_stay_the_objects_that_they_are(tmp_path):
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    with coordinator(tmp_path, model) as both:
        both.save_checkpoint(step=1)
        expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        before = [(id(parameter), parameter.data_ptr()) for parameter in model.parameters()]
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        both.load_checkpoint()
    assert [(id(parameter), parameter.data_ptr()) for parameter in model.parameters()] == before
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert_same(dict(model.state_dict()), expected)


def test_b41_a_parameter_that_was_added_later_is_saved(tmp_path):
    model = nn.Sequential(nn.Linear(2, 2))
    with coordinator(tmp_path, model) as saving:
        saving.save_checkpoint(step=1)
        model.add_module("later", nn.Linear(2, 3))
        saving.save_checkpoint(step=2)
        found = Box({})
    with coordinator(tmp_path, found) as loading:
        loading.load_checkpoint(2)
    assert_same(found.items, dict(model.state_dict()))
    with coordinator(tmp_path, model) as loading, pytest.raises(LoadMismatch) as caught:
        loading.load_checkpoint(1)
    assert "'later.bias', 'later.weight' in the job's module but not in the checkpoint" in caught.value.message


# ---- refused before anything is on disk


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (
            lambda: {"callbacks": {"early_stop": {"fn": print}}},
            "callbacks/early_stop/fn: builtin_function_or_method objects",
        ),
        (lambda: {"ok": 1, "deep": [{"m": torch.zeros(1, device="meta")}]}, "deep/~l0/m: a meta tensor has no data"),
        (lambda: {"s": torch.eye(2).to_sparse()}, "s: tensors of layout torch.sparse_coo"),
        (lambda: {"q": torch.quantize_per_tensor(torch.zeros(2), 0.1, 0, torch.quint8)}, "q: quantized tensors"),
        (lambda: {"n": torch.nested.nested_tensor([torch.zeros(1)])}, "n: nested tensors cannot be"),
        (lambda: [1, 2], "state_dict() returned a list; expected a dict"),
    ],
    ids=["function", "meta", "sparse", "quantized", "nested", "no dict"],
)
def test_b36_what_would_not_come_back_leaves_nothing_on_disk(tmp_path, make, problem):
    box = Box({})
    box.state_dict = make
    with coordinator(tmp_path / "run", box) as saving:
        with pytest.raises(StructureError, match="comparing structures failed on rank 0") as caught:
            saving.save_checkpoint(step=1)
        assert f"component 'c': {problem}" in caught.value.message
        assert caught.value.component == "c"
        assert listing(tmp_path / "run") == []
        box.state_dict = lambda: {"fine": 1}
        saving.save_checkpoint(step=1)


# ---- where tensors go


class Chooser(Box):
    """Wants its items where `targets` say, and remembers what it was offered."""

    def __init__(self, items, targets) -> None:
        super().__init__(items)
        self.targets = targets

    def load_targets(self, available):
        self.available = available
        return self.targets


def test_a_stateful_chooses_where_its_tensors_go(tmp_path):
    saved = {
        "a": torch.ones(2),
        "b": torch.ones(3),
        "c": torch.ones(4),
        "d": {"e": torch.ones(5).char()},
        "v": 5,
        "w": 6,
    }
    with coordinator(tmp_path, Box(saved)) as saving:
        saving.save_checkpoint(step=1)
    live = {"a": torch.zeros(2), "b": torch.zeros(3), "c": torch.zeros(7)}
    chooser = Chooser(live, {"b": None, "c": Target("cpu"), "d/e": Target(), "w": None})
    with coordinator(tmp_path, chooser) as loading:
        loading.load_checkpoint()
    assert chooser.available == {
        "a": Available("float32", (2,)), "b": Available("float32", (3,)), "c": Available("float32", (4,)),
        "d/e": Available("int8", (5,)), "v": Available(None, None), "w": Available(None, None),
    }  # fmt: skip
    assert_same(chooser.items, {"a": saved["a"], "c": saved["c"], "d": saved["d"], "v": 5})
    assert chooser.items["a"].data_ptr() == live["a"].data_ptr()
    assert chooser.items["c"].data_ptr() != live["c"].data_ptr()


def test_what_is_not_wanted_is_not_read(tmp_path):
    with coordinator(tmp_path, Box({"a": torch.ones(2), "b": torch.ones(3)})) as saving:
        path = saving.save_checkpoint(step=1)
    [file] = path.glob("*.safetensors")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1  # in `b`
    file.write_bytes(data)
    chooser = Chooser({}, {"b": None})
    with coordinator(tmp_path, chooser) as loading:
        loading.load_checkpoint(1)
    assert_same(chooser.items, {"a": torch.ones(2)})


@pytest.mark.parametrize(
    ("targets", "shown"),
    [
        (lambda: {}["a"], "component 'c': load_targets() raised KeyError: 'a'"),
        (lambda: None, "component 'c': load_targets() returned None; return a dict of item names"),
        (lambda: {"a": "cpu"}, "component 'c': load_targets() returned 'cpu' for 'a'; return a Target, or None"),
        (
            lambda: {"a": Target("meta")},
            "'a', float32 [2], cannot be made where it is to go: the meta device has no memory",
        ),
        (lambda: {"a": Target("nowhere")}, "component 'c': a Target's device is 'nowhere'; use one such as"),
        (lambda: {"a": Target("mtia:7")}, "component 'c': 'a', float32 [2], cannot be made where it is to go: "),
    ],
)
@pytest.mark.parametrize("is_warm", [False, True])
def test_a_choice_that_means_nothing_is_told_and_touches_nothing(tmp_path, targets, shown, is_warm):
    with coordinator(tmp_path / "saved", Box({"a": torch.ones(2), "b": torch.ones(3)})) as saving:
        path = saving.save_checkpoint(step=1)
    chooser = Chooser({"a": torch.zeros(2), "b": torch.zeros(3)}, None)
    chooser.load_targets = lambda available: targets()
    with coordinator(tmp_path / "loaded", chooser) as loading:
        with pytest.raises(CheckpointError) as caught:
            loading.warm_start(path, ["c"]) if is_warm else loading.load_checkpoint(path)
        assert shown in caught.value.message
        assert caught.value.component == "c"
        assert_same(chooser.items, {"a": torch.zeros(2), "b": torch.zeros(3)})
        loading.save_checkpoint(step=2)  # not torn


@pytest.mark.parametrize(
    ("live", "shown"),
    [
        (torch.zeros(4), "'x' is float32 [3] in the checkpoint and float32 [4] in the job"),
        (torch.zeros(1, 3), "'x' is float32 [3] in the checkpoint and float32 [1, 3] in the job"),
        (
            torch.zeros(3).bfloat16(),
            "'x' is float32 [3] in the checkpoint and bfloat16 [3] in the job; build the job as it was saved, have it converted "
            "by warm_start(…, cast=True), or",
        ),
        (torch.zeros(()), "and float32 [] in the job; build the job as it was saved, or"),
    ],
)
def test_another_shape_or_dtype_is_named_and_nothing_is_touched(tmp_path, live, shown):
    saved = {"first": torch.ones(2), "x": torch.ones(3)}
    first = torch.zeros(2)
    with pytest.raises(LoadMismatch) as caught:
        through(tmp_path, saved, {"first": first, "x": live})
    assert shown in caught.value.message
    assert "component 'c'" in caught.value.message
    assert "give the stateful a load_targets()" in caught.value.message
    assert not first.any()
    assert not live.any()


def test_a_value_and_a_tensor_may_take_each_other_s_place(tmp_path):
    assert_same(through(tmp_path / "1", {"x": 5}, {"x": torch.zeros(2)}), {"x": 5})
    assert_same(through(tmp_path / "2", {"x": torch.ones(2)}, {"x": 5}), {"x": torch.ones(2)})


# ---- what does not make up a whole


def digest(text: str) -> bytes:
    return hashtree.digest(text.encode())


def row(name="w", shape=(4,), **fields) -> TensorRow:
    return TensorRow(name, 0, "float32", shape, "f", 4096, digest("x"), **fields)


VALUE, ALIAS = ValueRow("v", 1, 5, digest("v")), AliasRow("a", 2, "w")


@pytest.mark.parametrize(
    ("parts", "problem"),
    [
        ([IndexEntry("c", "all", (row(range=(0, 2)),))], "'w': the stored pieces do not make up the whole tensor"),
        ([IndexEntry("c", "all", (row(range=(1, 4)),))], "do not make up"),
        ([IndexEntry("c", "all", (row(range=(0, 2)), row(range=(3, 4))))], "do not make up"),
        ([IndexEntry("c", "all", (row(range=(0, 3)), row(range=(2, 4))))], "do not make up"),
        ([IndexEntry("c", "all", (row(),)), IndexEntry("c", "all", (row(),))], "do not make up"),
        ([IndexEntry("c", "all", (row(range=(0, 2)), row(range=(2, 4)), row(range=(2, 4))))], "do not make up"),
        ([IndexEntry("c", "all", (row(range=(0, 2)), row(shape=(5,), range=(2, 4))))], "do not make up"),
        ([IndexEntry("c", "all", (row(range=(0, 2)), row(range=(2, 4))._replace(dtype="int32")))], "do not make up"),
        ([IndexEntry("c", "all", (row(shape=(2, 4), box=((0, 1), (0, 4))),))], "do not make up"),
        ([IndexEntry("c", "all", (row(name="v"),), (VALUE,))], "is stored twice"),
        ([IndexEntry("c", "all", (), (VALUE,)), IndexEntry("c", "all", (), (VALUE,))], "is stored twice"),
        ([IndexEntry("c", "all", (row(),), (), (ALIAS, ALIAS))], "is stored twice"),
        ([IndexEntry("c", "all", (row(name="a"), row()), (), (ALIAS,))], "is stored twice"),
        ([IndexEntry("c", "all", (), (), (ALIAS,))], "'a': stands for 'w', which is not stored"),
        ([IndexEntry("c", "all", (), (VALUE,), (AliasRow("a", 1, "v"),))], "'a': stands for 'v', which is not stored"),
        ([IndexEntry("c", "all", (row(),), (), (ALIAS, AliasRow("b", 3, "a")))], "'b': stands for 'a', which is not stored"),
    ],
)  # fmt: skip
def test_what_does_not_make_up_whole_items_is_refused(parts, problem):
    with pytest.raises(FormatError, match=problem):
        gather("c", parts)


@given(st.integers(0, 20), st.sets(st.integers(1, 19), max_size=4), st.randoms())
def test_pieces_from_several_writers_make_up_a_tensor_in_any_order(length, cuts, random):
    bounds = sorted({0, length, *(cut for cut in cuts if cut < length)})
    pieces = [row(shape=(length,), range=(start, stop)) for start, stop in itertools.pairwise(bounds)]
    pieces = pieces or [row(shape=(0,))]
    parts = [IndexEntry("c", "all", (piece,)) for piece in random.sample(pieces, len(pieces))]
    stored = gather("c", parts)
    assert list(stored.tensors["w"]) == pieces
    [*wanted] = assemble(stored, None, {}).wanted
    assert sum(one.destination.numel() for one in wanted) == 4 * length


def test_a_part_of_a_state_keeps_what_its_names_stand_for():
    stored = gather("c", [IndexEntry("c", "all", (row(), row(name="x")), (VALUE,), (ALIAS,))])
    alone = stored.only({"a", "v"})
    assert (set(alone.tensors), set(alone.values), set(alone.aliases)) == ({"a"}, {"v"}, set())
    assert [alone.tensors["a"][0].file] == ["f"]
    both = stored.only({"a", "w"})
    assert (set(both.tensors), set(both.aliases)) == ({"w"}, {"a"})
