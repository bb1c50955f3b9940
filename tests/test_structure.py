"""State dicts as named items, and back; what cannot be stored is refused with its path."""

import collections
import enum
import gc
import re

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

from forgather_ckpt import CheckpointCoordinator, SharingPattern, StateComponent, dtypes, structure
from forgather_ckpt.errors import FormatError, StructureError
from forgather_ckpt.structure import AliasItem, capture, collector_paused, restore
from tests.components import Box
from tests.states import assert_same, plain_values, state_dicts, tensor_of, texts

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")


def through(state_dict):
    """The state dict after capture and restore, by the names alone."""
    state = capture(state_dict)
    leaves = [(item.order, name, item.tensor) for name, item in state.tensors.items()]
    leaves += [(item.order, name, item.value) for name, item in state.values.items()]
    leaves += [(item.order, name, state.tensors[item.target].tensor) for name, item in state.aliases.items()]
    return restore(reversed(leaves))


def has_equal_names(state_dict) -> bool:
    try:
        capture(state_dict)
    except StructureError as err:
        assert "have one name" in err.message
        return True
    return False


@given(state_dicts)
def test_any_nesting_comes_back(state_dict):
    assume(not has_equal_names(state_dict))
    assert_same(through(state_dict), state_dict)


@given(st.dictionaries(texts, plain_values, max_size=3))
def test_plain_values_come_back(state_dict):
    assert_same(through(state_dict), state_dict)


NESTED = {
    "flat.weight": torch.zeros(2),
    "dict": {"a": {}, "b": {"c": torch.ones(1), "d": 5}},
    0: {1: np.zeros(1), -1: "x", (True, None): {None: 2.5}},
    "list": [torch.zeros(1), {}, [], (torch.ones(1), 3), None],
    "tuple": ({"a": 1}, (), [{}]),
    "plain": [1, [2, (3,)], {4}],
    "empty": [],
    "": {"": torch.zeros(3)},
    "a/b~c": {"../../evil": torch.zeros(1)},
}


def test_items_have_the_names_of_their_paths():
    state = capture(NESTED)
    assert list(state.tensors) == [
        "flat.weight", "dict/b/c", "list/~l0", "list/~l3/~t0", "/", "a~1b~0c/..~1..~1evil",
    ]  # fmt: skip
    assert list(state.values) == [
        "dict/a", "dict/b/d", "~i0/~i1", "~i0/~i-1",
        '~i0/~k{"$tuple":[true,null]}/~knull', "list/~l1", "list/~l2", "list/~l3/~t1", "list/~l4",
        "tuple/~t0/a", "tuple/~t1", "tuple/~t2/~l0", "plain", "empty",
    ]  # fmt: skip
    [held] = state.held().values()
    assert (state.num_items, held.num_parts, held.num_bytes) == (20, 20, 4 * (2 + 1 + 1 + 1 + 3 + 1))
    assert_same(through(NESTED), NESTED)


@pytest.mark.parametrize("state_dict", [{}, {"a": {}}, {"a": []}, {"a": [{}]}, {"a": ({},)}, {"a": {"b": {"c": ()}}}])
def test_empty_containers_come_back(state_dict):
    assert_same(through(state_dict), state_dict)


@pytest.mark.parametrize("dtype", dtypes.ITEM_BYTES)
def test_every_dtype_is_taken_as_it_is(dtype):
    tensor = tensor_of(dtype)
    item = capture({"x": tensor}).tensors["x"]
    assert (item.dtype, item.shape, item.num_bytes) == (dtype, (3, 5), 15 * dtypes.ITEM_BYTES[dtype])
    assert item.tensor.data_ptr() == tensor.data_ptr(), "nothing is copied"


def test_ordered_dicts_come_back_as_dicts_and_others_as_they_were():
    state_dict = {
        "ordered": collections.OrderedDict(b=torch.zeros(1), a=1),
        "default": collections.defaultdict(int, {3: 4}),
        "in a list": [collections.OrderedDict(a=1), collections.defaultdict(list)],
        "empty": collections.Counter(),
    }
    back = through(collections.OrderedDict(state_dict))
    assert_same(back["ordered"], {"b": torch.zeros(1), "a": 1})
    assert back["in a list"][0] == {"a": 1}
    assert (type(back["empty"]), type(back["default"])) == (collections.Counter, collections.defaultdict)
    assert back["default"][3] == 4 and back["default"]["new"] == 0
    assert back["in a list"][1]["new"] == []


@pytest.mark.parametrize("kind", [collections.defaultdict, collections.Counter])
def test_other_dicts_that_hold_tensors_are_refused_with_the_way_out(kind):
    held = kind()
    held["w"] = torch.zeros(1)
    with pytest.raises(StructureError, match=r"x: a .* that holds tensors would come back as a dict; return dict"):
        capture({"x": held})


def test_a_single_element_may_have_any_stride(tmp_path):
    state_dict = {"a": torch.arange(2.0).view(1, 2)[:, 1], "b": torch.arange(4.0)[::2][:1], "c": torch.tensor(1.0)}
    for _ in range(2):  # the second time into live memory of the same strides
        with CheckpointCoordinator([StateComponent("x", Box(state_dict), SharingPattern.REPLICATED)], tmp_path) as c:
            c.save_checkpoint(1)
            c.load_checkpoint()
    assert [value.tolist() for value in state_dict.values()] == [[1.0], [0.0], 1.0]


def test_parameters_and_buffers_are_tensors():
    module = nn.Linear(2, 2)
    module.register_buffer("extra", nn.Buffer(torch.ones(1)))
    state_dict = {"own": module.weight, **module.state_dict(), "buffer": module.extra}
    state = capture(state_dict)
    assert not any(item.tensor.requires_grad for item in state.tensors.values())
    assert_same(through(state_dict), state_dict)


# ---- tied tensors


def test_b40_tied_weights_are_one_item_and_an_alias():
    weight = nn.Parameter(torch.zeros(3, 2))
    state_dict = {"embedding": weight, "bias": torch.zeros(2), "deep": {"head": weight.detach(), "again": weight.data}}
    state = capture(state_dict)
    assert list(state.tensors) == ["embedding", "bias"]
    assert state.aliases == {
        "deep/head": AliasItem("deep/head", 3, "embedding"), "deep/again": AliasItem("deep/again", 4, "embedding"),
    }  # fmt: skip
    back = through(state_dict)
    assert back["deep"]["head"] is back["embedding"] is back["deep"]["again"]
    assert list(back) == list(state_dict)


BASE = torch.arange(12.0)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (BASE, BASE[:6]),
        (BASE[:6], BASE[6:]),
        (BASE[:8], BASE[4:]),
        (BASE.view(3, 4), BASE.view(4, 3)),
        (BASE.view(3, 4), BASE.view(3, 4).t()),
        (BASE.view(torch.int32), BASE),
        (BASE, BASE.clone()),
        (BASE[:0], BASE[:0]),
        (torch.view_as_complex(BASE.view(6, 2)), torch.view_as_complex(BASE.view(6, 2)).conj()),
        (torch.view_as_complex(BASE.view(6, 2)).imag, torch.view_as_complex(BASE.view(6, 2)).conj().imag),
    ],
    ids=["prefix", "disjoint", "overlapping", "reshaped", "transposed", "other dtype", "equal", "empty", "conj", "neg"],
)  # fmt: skip
def test_tensors_that_only_share_memory_are_stored_each(one, other):
    state = capture({"one": one, "other": other})
    assert (len(state.tensors), len(state.aliases)) == (2, 0)


def test_each_of_several_views_that_begin_alike_has_its_own_second_names():
    items = {"all": BASE, "half": BASE[:6], "table": BASE.view(3, 4), "half too": BASE[:6], "all too": BASE[:]}
    aliases = {alias.name: alias.target for alias in capture(items).aliases.values()}
    assert aliases == {"half too": "half", "all too": "all"}


def test_arrays_that_share_memory_are_tied_whichever_way_they_came_by_it():
    array = np.arange(12.0)
    state = capture({"view": torch.from_numpy(array)[4:], "part": torch.from_numpy(array[4:])})
    assert state.aliases == {"part": AliasItem("part", 2, "view")}


# ---- what cannot be stored

Pair = collections.namedtuple("Pair", "x y")
Color = enum.IntEnum("Color", "RED")


class Marked(torch.Tensor): ...


def quantized():
    return torch.quantize_per_tensor(torch.zeros(2), 0.1, 0, torch.quint8)


def nested():
    return torch.nested.nested_tensor([torch.zeros(1), torch.zeros(2)])


def jagged():
    return torch.nested.nested_tensor([torch.zeros(1), torch.zeros(2)], layout=torch.jagged)


REFUSED = "objects cannot be checkpointed; return numbers, strings, tensors, lists or dicts"


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda: {"callbacks": {"early_stop": {"fn": lambda: 0}}}, f"callbacks/early_stop/fn: function {REFUSED}"),
        (lambda: {"a": [1, {"b": (0, print)}]}, f"a/~l1/b/~t1: builtin_function_or_method {REFUSED}"),
        (lambda: {"a": {1: object()}}, f"a/~i1: object {REFUSED}"),
        (lambda: {"x": Pair(1, 2)}, "x: objects of type tests.test_structure.Pair cannot be checkpointed"),
        (lambda: {"x": Pair(torch.zeros(1), 2)}, "x: objects of type tests.test_structure.Pair"),
        (lambda: {"x": [torch.zeros(1), Color.RED]}, "x/~l1: objects of type tests.test_structure.Color"),
        (lambda: {"x": {torch.zeros(1)}}, "x/~s0: objects of type torch.Tensor"),
        (lambda: {"x": np.array([None])}, "x: a numpy array of Python objects"),
        (lambda: {"x": nn.ReLU()}, "x: objects of type torch.nn"),
        (lambda: {"a": {object: 1}}, "the key <class 'object'>: type objects"),
        (lambda: {"a": {Color.RED: 1}}, "the key <Color.RED: 1>: objects of type tests.test_structure.Color"),
        (lambda: {"a": {float("nan"): 1, -float("nan"): 2, float("nan") * 1: 3}}, "two keys have one name"),
        (lambda: {"x": {"m": torch.zeros(1, device="meta")}}, "x/m: a meta tensor has no data; materialize it"),
        (
            lambda: {"x": [torch.zeros(2, 2).to_sparse()]},
            "x/~l0: tensors of layout torch.sparse_coo cannot be checkpointed",
        ),
        (lambda: {"x": torch.eye(2).to_sparse_csr()}, "x: tensors of layout torch.sparse_csr cannot be checkpointed"),
        (
            lambda: {"x": quantized()},
            "x: quantized tensors cannot be checkpointed; store int_repr(), scale and zero point",
        ),
        (lambda: {"x": {"n": nested()}}, "x/n: nested tensors cannot be checkpointed"),
        (lambda: {"x": jagged()}, "x: tensors of type NestedTensor cannot be checkpointed; return plain tensors"),
        (lambda: {"x": torch.zeros(2).as_subclass(Marked)}, "x: tensors of type Marked cannot be checkpointed"),
        (lambda: {"x": torch.empty(2, dtype=torch.bits8)}, "x: tensors of dtype torch.bits8 cannot be checkpointed"),
        (lambda: [("a", 1)], "state_dict() returned a list; expected a dict"),
        (lambda: None, "state_dict() returned a NoneType; expected a dict"),
        (lambda: torch.zeros(1), "state_dict() returned a Tensor; expected a dict"),
    ],
)
def test_b36_what_would_not_come_back_is_refused_with_its_path(make, problem):
    with pytest.raises(StructureError) as caught:
        capture(make())
    assert problem in caught.value.message


def test_b36_what_contains_itself_is_refused():
    endless: dict[str, object] = {}
    endless["x"] = {"y": [endless]}
    with pytest.raises(StructureError, match="nested deeper than 100 levels, or contains itself"):
        capture(endless)


# ---- comparing structures


def test_the_structure_says_what_must_be_equal_besides_the_bytes():
    weight = torch.zeros(2)
    table = capture({"b": {"x": 1}, "a": weight, "c": weight}).table()
    assert table == [["a", "tensor", "float32", [2]], ["b/x", "value"], ["c", "alias", "a"]]


SAME = {"a": torch.zeros(2, 3), "b": 5, "c": {"d": torch.zeros(1)}}


@pytest.mark.parametrize(
    "other",
    [
        {"a": torch.ones(2, 3), "b": 6, "c": {"d": torch.ones(1)}},
        {"c": {"d": torch.zeros(1)}, "b": 5, "a": torch.zeros(2, 3)},
        {"a": torch.zeros(3, 2).t(), "b": "x", "c": {"d": torch.zeros(1)}},
    ],
    ids=["content", "order", "layout"],
)
def test_content_and_order_and_layout_are_not_structure(other):
    assert capture(other).structure_digest() == capture(SAME).structure_digest()


@pytest.mark.parametrize(
    "other",
    [
        {**SAME, "a": torch.zeros(3, 2)},
        {**SAME, "a": torch.zeros(2, 3, dtype=torch.bfloat16)},
        {**SAME, "a": 5},
        {**SAME, "e": 1},
        {"a": SAME["a"], "b": 5},
        {**SAME, "c": {"D": torch.zeros(1)}},
        {**SAME, "c": [torch.zeros(1)]},
        {**SAME, "c": {"d": SAME["a"]}},
    ],
)
def test_names_kinds_dtypes_and_shapes_are_structure(other):
    assert capture(other).structure_digest() != capture(SAME).structure_digest()


# ---- names that do not form a state


@pytest.mark.parametrize(
    ("names", "problem"),
    [
        (["a", "a"], "appears twice"),
        (["a", "a/b"], "contradicts another name"),
        (["a/b", "a"], "appears twice"),
        (["a/b", "a/~l0"], "contradicts another name"),
        (["a/~l0", "a/~t0"], "contradicts another name"),
        (["a/~l1"], "has the indexes [1]"),
        (["a/~l0", "a/~l2"], "has the indexes [0, 2]"),
        (["a/~l-1"], "has the indexes [-1]"),
        (["a/~t1", "a/~t2"], "has the indexes [1, 2]"),
        (["~l0", "a"], "begins with an index"),
        (["a/~i1", "a/~ktrue"], "has equal keys: [1, True]"),
        (["a~"], "not in canonical form"),
        (["/".join("a" * 3000)], "nested too deeply"),
    ],
)
def test_names_that_contradict_each_other_are_refused(names, problem):
    leaves = [(number, name, number) for number, name in enumerate(names)]
    with pytest.raises(FormatError, match=re.escape(problem)):
        restore(leaves)


@given(st.lists(st.text(alphabet="a/~l01tik", max_size=6), max_size=4))
def test_any_names_form_a_state_or_are_refused(names):
    try:
        state = restore([(number, name, number) for number, name in enumerate(names)])
    except FormatError:
        return
    assert leaves_of(state) == list(range(len(names)))
    assert_same(through(state), state)


def leaves_of(value):
    if isinstance(value, int):
        return [value]
    return sorted(leaf for inner in (value.values() if isinstance(value, dict) else value) for leaf in leaves_of(inner))


def test_a_path_is_described_as_a_person_would():
    assert structure.describe_path(("a", 1, None)) == "a/1/None"


@pytest.mark.parametrize("is_enabled", [True, False])
def test_the_collector_is_as_it_was_whatever_happens_while_it_is_paused(is_enabled, monkeypatch):
    calls = []
    monkeypatch.setattr(gc, "isenabled", lambda: is_enabled)
    monkeypatch.setattr(gc, "disable", lambda: calls.append("disable"))
    monkeypatch.setattr(gc, "enable", lambda: calls.append("enable"))
    with pytest.raises(KeyError), collector_paused():
        assert calls == ["disable"]
        raise KeyError
    assert calls == ["disable", *(["enable"] if is_enabled else [])]
