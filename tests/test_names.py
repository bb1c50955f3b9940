"""Item names: every path has one, no two share one, and it leads back to the path."""

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from forgather_ckpt import names, values
from forgather_ckpt.errors import FormatError
from forgather_ckpt.names import ListIndex, TupleIndex
from tests.states import assert_same, keys, texts

steps = keys | texts | st.integers(0, 10**6).map(ListIndex) | st.integers(0, 10**6).map(TupleIndex)
paths = st.lists(steps, min_size=1, max_size=4).map(tuple)


@given(paths)
def test_a_name_leads_back_to_its_path(path):
    name = names.encode_path(path)
    name.encode("utf-8")
    assert_same(names.decode_path(name), path)


@given(paths, paths)
def test_different_paths_have_different_names(one, other):
    try:
        assert_same(one, other)
    except AssertionError:
        assert names.encode_path(one) != names.encode_path(other)
    else:
        assert names.encode_path(one) == names.encode_path(other)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        (("layers.0.weight",), "layers.0.weight"),
        (("state", 0, "exp_avg"), "state/~i0/exp_avg"),
        (("a", ListIndex(3), TupleIndex(1)), "a/~l3/~t1"),
        (("a/b", "c~d"), "a~1b/c~0d"),
        (("~i0", "~k1"), "~0i0/~0k1"),
        (("",), ""),
        (("", ""), "/"),
        (("..", "..", "evil"), "../../evil"),
        (("../../evil",), "..~1..~1evil"),
        (("line\nbreak\0",), "line\nbreak\0"),
        ((-5,), "~i-5"),
        ((10**30,), f"~i{10**30}"),
        ((True,), "~ktrue"),
        ((None,), "~knull"),
        ((1.5,), "~k1.5"),
        ((-0.0,), "~k-0.0"),
        ((float("nan"),), '~k{"$float":"nan"}'),
        (((1, "a/b"),), '~k{"$tuple":[1,"a~1b"]}'),
        ((b"~",), '~k{"$bytes":"fg=="}'),
        (("\ud800",), '~k"\\ud800"'),
        ((torch.float32,), '~k{"$dtype":"float32"}'),
        ((torch.Size([2]),), '~k{"$size":[2]}'),
    ],
    ids=lambda value: repr(value)[:24],
)
def test_names(path, name):
    assert names.encode_path(path) == name
    assert_same(names.decode_path(name), path)


def test_equal_keys_of_other_types_have_other_names():
    equal = [1, True, 1.0, 1 + 0j]
    assert len({names.encode_path((key,)) for key in equal}) == len(equal)
    assert len({names.encode_path((step,)) for step in [0, ListIndex(0), TupleIndex(0), "~i0", "0"]}) == 5


def test_a_flat_state_dict_keeps_its_own_names():
    own = [*torch.nn.TransformerEncoderLayer(8, 2, 8).state_dict(), "head.weight_g", "layer 1:α"]
    assert [names.encode_path((name,)) for name in own] == own


def test_ten_thousand_characters_are_a_name():
    path = ("~/" * 5000, "x" * 10_000)
    assert names.decode_path(names.encode_path(path)) == path


@pytest.mark.parametrize("key", [object(), lambda: 0, ValueError, range(3), slice(1)])
def test_a_key_that_is_not_plain_has_no_name(key):
    with pytest.raises(values.NotPlain):
        names.encode_path(("a", key))


@pytest.mark.parametrize(
    "name",
    [
        "~", "~x1", "~2", "a~b", "~i", "~ix", "~i01", "~i+1", "~i 1", "~i1_0", "~i٣", "~l", "~l1.0", "~tx", "~k", "~k[1]",
        '~k{"$set":[]}', "~k01", "~k 1", '~k"a"', "~k1", '~k{"$unknown":1}', '~k{"a":1}', "~i" + "9" * 5000,
        "~k" + "[" * 5000, '~k{"$tuple":[' * 5000, "~k~2", '~k{"$float":"7ff8000000000000"}',
    ],
)  # fmt: skip
def test_what_names_no_path_is_refused(name):
    with pytest.raises(FormatError):
        names.decode_path(name)


@given(st.text(alphabet='~/01iltk$"{}[]:tuple', max_size=12))
def test_any_text_is_one_canonical_name_or_refused(name):
    try:
        path = names.decode_path(name)
    except FormatError:
        assume(False)
    assert names.encode_path(path) == name


def test_b36_an_int_key_that_python_would_not_print_is_refused_with_its_path():
    with pytest.raises(values.NotPlain, match="at most 4,000 digits"):
        names.encode_path(("a", 10**5000))


def test_the_item_of_a_part_is_told_from_what_is_shown_of_it():
    for name in ("w", "w[0:2]", "layers/~l0/w"):
        assert names.item_shown(names.shown(name, [(0, 4), (8, 16)]), 2) == name
        assert names.item_shown(names.shown(name, None), 2) == name
