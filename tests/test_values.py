"""Typed JSON: what comes back is what went in, type for type and bit for bit; anything else is refused."""

import collections
import enum
import functools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from forgather_ckpt import strict_json, values
from forgather_ckpt.errors import FormatError
from tests.states import assert_same, float_of, plain_values

Pair = collections.namedtuple("Pair", "x y")
Color = enum.IntEnum("Color", "RED")
Word = enum.StrEnum("Word", "ONE")


def round_trip(value):
    return values.loads(values.dumps(value))


@given(plain_values)
def test_plain_data_comes_back_exactly(value):
    assert_same(round_trip(value), value)


@given(plain_values)
def test_equal_values_of_equal_types_have_the_same_bytes(value):
    assert values.dumps(round_trip(value)) == values.dumps(value)


STRUCTURED = np.array(
    [(1, 2.5, b"ab", [[1, 2], [3, 4]])], [("i", ">i4"), ("f", "f8"), ("s", "S3"), ("a", "u1", (2, 2))]
)

EXACT = {
    "none": None, "true": True, "false": False, "zero": 0, "negative zero": -0.0, "int": -7, "float": 7.0,
    "int of 64 bits": 2**63 - 1, "least of 64 bits": -(2**63), "past 64 bits": 2**63, "huge": -(10**6000),
    "subnormal": 5e-324, "largest": 1.7976931348623157e308, "a third": 1 / 3,
    "inf": float("inf"), "-inf": -float("inf"), "nan": float("nan"), "-nan": -float("nan"),
    "nan with a payload": float_of(0x7FF8DEADBEEF0001), "signalling nan": float_of(0xFFF0000000000001),
    "complex": complex(-0.0, float_of(0x7FF8000000000002)), "complex inf": complex(float("inf"), -1),
    "text": "a\n\0\u2028\U0001f600", "surrogates": "\udfff\ud800 \udc80", "empty text": "",
    "bytes": bytes(range(256)), "empty bytes": b"", "bytearray": bytearray(b"\0x"),
    "list": [1, [2, []], ()], "tuple": (1, (2, ()), []), "nested": [({"a": ({"b": [()]},)},)],
    "set": {1, "1", 1.5, (1, 2), None}, "frozenset": frozenset([frozenset([1]), frozenset()]), "empty set": set(),
    "dict": {"b": 1, "a": 2}, "empty dict": {}, "int keys": {1: "a", 0: "b", -3: "c"},
    "keys of all kinds": {None: 1, True: 2, 0: 3, 2.5: 4, (1, "x"): 5, b"k": 6, "": 7, frozenset([1]): 8},
    "true as key": {True: 1}, "one as key": {1: 1}, "one as float key": {1.0: 1}, "one as text": {"1": 1},
    "like a tag": {"$int": "0x5"}, "like two tags": {"$int": 1, "$set": 2}, "tag within": [{"$tuple": [{"$bytes": ""}]}],
    "size": torch.Size([2, 0, 3]), "empty size": torch.Size([]), "dtype": torch.bfloat16, "fp8": torch.float8_e4m3fn,
    "device": torch.device("cuda:1"), "device without index": torch.device("cpu"), "meta": torch.device("meta"),
    "array": np.arange(6, dtype=np.int16).reshape(2, 3), "array of no dimension": np.array(2.5),
    "big-endian": np.arange(3, dtype=">f8"), "empty array": np.empty((0, 4), np.float32),
    "empty and huge": np.empty((0, 2**40), np.uint8), "bools": np.array([True, False]),
    "nan array": np.array([float_of(0x7FF8DEADBEEF0001), -0.0]), "half": np.float16([1.5, np.inf]),
    "long double": np.longdouble([1]) / 3, "complex array": np.array([1 + 2j], np.complex64),
    "datetimes": np.array(["2024-01-01T00:00:01", "NaT"], "M8[ns]"), "odd unit": np.array([5], "m8[25s]"),
    "no datetimes": np.array([], "M8[D]"), "text array": np.array(["a", "bcd"]), "byte array": np.array([b"a", b"bc"]),
    "structured": STRUCTURED,
    "structured scalar": STRUCTURED[0], "np.float64": np.float64("nan"), "np.float32": np.float32(0.1),
    "np.int64": np.int64(-5), "np.uint8": np.uint8(200), "np.bool": np.bool_(True), "np.str": np.str_("αb"),
    "empty np.str": np.str_(""), "empty np.bytes": np.bytes_(b""), "np.bytes": np.bytes_(b"a\0b"),
    "np.datetime64": np.datetime64("2024-01-01", "us"), "NaT": np.datetime64("NaT", "s"),
    "np.timedelta64": np.timedelta64(3, "h"), "np.longdouble": np.longdouble(1) / 3, "np.void": np.void(b"abc"),
    "np.complex64": np.complex64(1 - 0j), "big-endian scalar": np.array([3], ">i4")[0],
}  # fmt: skip


@pytest.mark.parametrize("value", EXACT.values(), ids=EXACT)
def test_it_comes_back_with_its_type_and_bits(value):
    assert_same(round_trip(value), value)
    assert_same(round_trip([{"deeper": (value,)}]), [{"deeper": (value,)}])


def test_layouts_of_arrays_do_not_matter():
    array = np.arange(24).reshape(2, 3, 4)
    for view in (array.T, array[:, ::-1], np.asfortranarray(array), np.broadcast_to(np.arange(3), (2, 3))):
        assert_same(round_trip(view), view)


def test_what_lies_between_aligned_fields_is_not_kept():
    aligned = np.ones(3, np.dtype([("a", "i1"), ("b", "f8")], align=True))
    copy = round_trip(aligned)
    assert copy.dtype == aligned.dtype
    assert (copy == aligned).all()


def test_an_array_comes_back_writable_and_of_its_own():
    array = np.zeros(3)
    copy = round_trip(array)
    copy += 1
    assert array.sum() == 0


class Holder:
    def method(self): ...


class Float(float): ...


class MyDict(dict): ...


class MyArray(np.ndarray): ...


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (lambda: 0, "function objects cannot be checkpointed; return numbers, strings, tensors, lists or dicts"),
        (len, "builtin_function_or_method objects"),
        (object(), "object objects"),
        (int, "type objects"),
        (range(3), "range objects"),
        (slice(1), "slice objects"),
        (iter([]), "list_iterator objects"),
        (memoryview(b""), "memoryview objects"),
        (..., "ellipsis objects"),
        (ValueError("x"), "ValueError objects"),
        (os, "module objects"),
        (Holder(), "objects of type tests.test_values.Holder"),
        (Holder().method, "method objects"),
        (functools.partial(print), "objects of type functools.partial"),
        (Path("x"), "objects of type pathlib."),
        (collections.deque([1]), "objects of type collections.deque"),
        (collections.OrderedDict(a=1), "objects of type collections.OrderedDict"),
        (collections.defaultdict(lambda: 0), "a builtin type as its factory"),
        (MyDict(), "objects of type tests.test_values.MyDict"),
        (Pair(1, 2), "objects of type tests.test_values.Pair"),
        (Color.RED, "objects of type tests.test_values.Color"),
        (Word.ONE, "objects of type tests.test_values.Word"),
        (Float(1), "objects of type tests.test_values.Float"),
        (np.array([None]), "a numpy array of Python objects"),
        (np.array([(1, None)], [("a", "i4"), ("b", "O")]), "a numpy array of Python objects"),
        (np.empty(2, np.dtype([])), "whose elements take no bytes"),
        (np.void(b""), "whose elements take no bytes"),
        ("a\ud83d\ude00", "text with a surrogate pair as two characters"),
        (np.ma.array([1]), "objects of type numpy.ma"),
        (np.zeros(2).view(MyArray), "objects of type tests.test_values.MyArray"),
        (np.rec.array([(1,)], [("a", "i4")]), "objects of type numpy.rec"),
        (np.rec.array([(1,)], [("a", "i4")])[0], "is not numpy's own"),
        (np.zeros(1, np.dtype((np.record, [("a", "i4")]))), "is not numpy's own"),
        (np.dtype("f4"), "objects of type numpy.dtypes"),
        (np.random.default_rng(0), "objects of type numpy.random"),
        (torch.zeros(1), "objects of type torch.Tensor"),
        (torch.Generator(), "objects of type torch"),
        (torch.contiguous_format, "objects of type torch"),
        (torch.nn.ReLU(), "objects of type torch.nn"),
    ],
    ids=lambda value: ascii(value)[:24] if isinstance(value, str) else type(value).__name__,
)
def test_what_would_not_come_back_is_refused(value, problem):
    with pytest.raises(values.NotPlain) as caught:
        values.dumps(value)
    assert problem in caught.value.reason
    assert caught.value.steps == ()


@pytest.mark.parametrize(
    ("value", "steps"),
    [
        ([1, print], ("~l1",)),
        ({"a": {"b": (0, [print])}}, ("a", "b", "~t1", "~l0")),
        ({1: print}, ("1",)),
        ([{print: 1}], ("~l0", str(print))),
        ({"s": {Color.RED}}, ("s", "~s0")),
        ([collections.defaultdict(print)], ("~l0",)),
    ],
)
def test_a_refusal_leads_to_the_offender(value, steps):
    with pytest.raises(values.NotPlain) as caught:
        values.dumps(value)
    assert caught.value.steps == steps


def test_what_contains_itself_is_refused():
    endless: list[object] = []
    endless.append(endless)
    deep: tuple[object, ...] = ()
    for _ in range(100_000):
        deep = (deep,)
    for value in (endless, deep):
        with pytest.raises(values.NotPlain, match="is nested deeper than 100 levels, or contains itself"):
            values.dumps(value)


def test_a_value_that_is_too_long_is_refused(monkeypatch):
    monkeypatch.setattr(values, "MAX_VALUE_BYTES", 100)
    with pytest.raises(values.NotPlain, match="takes 103 bytes as a value, at most 100 are stored; make it a tensor"):
        values.dumps("x" * 101)


SETS = """
from forgather_ckpt import values
words = [f"word {i}" for i in range(50)]
print(values.dumps({"set": set(words), "nested": frozenset([frozenset(words[:3]), frozenset(words[3:9]), (1, None)])}))
"""


def test_the_bytes_of_sets_do_not_depend_on_the_hash_seed():
    shown = {
        subprocess.run(
            [sys.executable, "-c", SETS],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(values.__file__).parents[1])},
            check=True,
            capture_output=True,
        ).stdout
        for seed in ("0", "1", "2")
    }
    assert len(shown) == 1


def test_numpy_and_torch_are_not_imported_for_plain_values():
    code = (
        "import sys; from forgather_ckpt import values; values.loads(values.dumps([1, {2: (3.0, b'')}]));"
        "assert not {'numpy', 'torch'} & set(sys.modules)"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(values.__file__).parents[1])}
    subprocess.run([sys.executable, "-c", code], env=env, check=True)


MALFORMED = [
    '{"$unknown": 1}', '{"$": 1}', '{"$int": 5}', '{"$int": "x"}', '{"$int": null}', '{"$float": 1.5}', '{"$float": "00"}',
    '{"$float": "zz"}', '{"$float": "NaN"}', '{"$float": "7ff80000000000000"}', '{"$tuple": 5}', '{"$tuple": null}',
    '{"$tuple": "ab"}', '{"$tuple": {"a": 1}}', '{"$set": [[1]]}', '{"$set": [{"$set": []}]}', '{"$frozenset": [{}]}',
    '{"$dict": [[1]]}', '{"$dict": [[[1], 1]]}', '{"$dict": 5}', '{"$dict": [[1, 2, 3]]}', '{"$bytes": 5}',
    '{"$bytes": "é"}', '{"$bytes": "YQ"}', '{"$bytes": "Y Q=="}', '{"$bytearray": null}', '{"$complex": [1]}',
    '{"$complex": [1, 2, 3]}', '{"$complex": ["a", 1]}', '{"$size": ["a"]}', '{"$size": 5}', '{"$size": [1.5]}',
    '{"$size": [100000000000000000000]}', '{"$dtype": "nn"}', '{"$dtype": "_inductor"}', '{"$dtype": "no_such"}',
    '{"$dtype": 5}', '{"$dtype": null}', '{"$device": "nowhere"}', '{"$device": ""}', '{"$device": {}}', '{"$device": 5}',
    '{"$npscalar": ["<f8", ""]}', '{"$npscalar": []}', '{"$npscalar": ["|O", "AAAAAAAAAAA="]}', '{"$ndarray": 1}',
    '{"$ndarray": ["<f8", [2], "AAAAAAAAAAA="]}', '{"$ndarray": ["<f8", [-1], "AAAAAAAAAAA="]}',
    '{"$ndarray": ["<f8", [100000000000000000000], ""]}', '{"$ndarray": ["<f8", [1000000000000], ""]}',
    '{"$ndarray": ["|O", [1], "AAAAAAAAAAA="]}', '{"$ndarray": ["f8,(", [1], ""]}', '{"$ndarray": ["x9", [1], ""]}',
    '{"$ndarray": [[["a", 5]], [1], ""]}', '{"$ndarray": [{"$dict": [[1, 2]]}, [1], ""]}',
    '{"$ndarray": [["<f8", {"a": 1}], [1], "AAAAAAAAAAA="]}', '{"$ndarray": ["<f4", ["a"], "AAAAAA=="]}',
    '{"$ndarray": ["V99999999999", [1], ""]}', '{"$ndarray": ["|V0", [1000000000000], ""]}',
    "[" * 900 + "]" * 900, '{"$tuple":[' * 400 + "]}" * 400, '{"a":' * 900 + "1" + "}" * 900,
]  # fmt: skip


@pytest.mark.parametrize("text", MALFORMED, ids=lambda text: text[:40])
def test_what_was_not_written_by_us_is_a_format_error(text):
    with pytest.raises(FormatError):
        values.loads(text.encode())


def test_loading_imports_nothing_that_a_file_names():
    sys.modules.pop("torch.onnx", None)
    with pytest.raises(FormatError):
        values.loads(b'{"$dtype": "onnx"}')
    assert "torch.onnx" not in sys.modules


junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=6)
    | st.sampled_from(["<f8", "|O", "M8[s]", "AAAA", "AAAAAAAAAAA=", "(2,)f4", "f8,i4", "cuda:0", "nan", "0x5", "float32"]),
    lambda below: (
        st.lists(below, max_size=3)
        | st.dictionaries(st.text(max_size=3), below, max_size=2)
        | st.dictionaries(st.sampled_from(sorted(values._DECODERS)), below, min_size=1, max_size=1)
    ),
    max_leaves=8,
)  # fmt: skip


@pytest.mark.filterwarnings("ignore:Data type alias")
@given(junk)
def test_any_json_is_a_value_or_a_format_error(data):
    try:
        value = values.decode(data)
    except FormatError:
        return
    values.dumps(value)


@given(plain_values, st.data())
def test_damaged_bytes_are_a_value_or_a_format_error(value, data):
    written = bytearray(strict_json.dumps(values.encode(value)))
    written[data.draw(st.integers(0, len(written) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    try:
        values.loads(bytes(written))
    except FormatError:
        return
