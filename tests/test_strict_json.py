"""JSON as the format's readers take it: what is not exactly right is a FormatError, and nothing else."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forgather_ckpt import strict_json
from forgather_ckpt.errors import FormatError
from forgather_ckpt.strict_json import Fields

MAX_BYTES = 1 << 20


def loads(data: bytes) -> object:
    return strict_json.loads(data, what="the test's text", max_bytes=MAX_BYTES)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda below: st.lists(below, max_size=4) | st.dictionaries(st.text(), below, max_size=4),
    max_leaves=20,
)


@given(json_values)
def test_what_is_written_is_read(value):
    for data in (strict_json.dumps(value), strict_json.pretty(value)):
        assert data.isascii()
        assert loads(data) == value


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), [{"a": float("nan")}]])
def test_a_writer_refuses_what_is_not_json(value):
    for dump in (strict_json.dumps, strict_json.pretty):
        with pytest.raises(ValueError, match="not JSON compliant"):
            dump(value)


def test_lists_of_numbers_stay_on_one_line_for_people():
    shown = strict_json.pretty({"ranks": [0, 1, -2], "names": ["[\n 1\n]", "b"], "mixed": [1, 2.5], "none": []})
    assert b'"ranks": [0, 1, -2]' in shown
    assert loads(shown) == {"ranks": [0, 1, -2], "names": ["[\n 1\n]", "b"], "mixed": [1, 2.5], "none": []}


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b'{"a": 1, "a": 2}', "key 'a' appears twice"),
        (b'{"x": {"b": 1, "c": 2, "b": 1}}', "key 'b' appears twice"),
        (b'{"a": 1, "\\u0061": 2}', "key 'a' appears twice"),
        (b"NaN", "NaN is not a JSON number"),
        (b"[Infinity]", "Infinity is not a JSON number"),
        (b"[-Infinity]", "-Infinity is not a JSON number"),
        (b"1e999", "1e999 is out of range"),
        (b"-1e999", "-1e999 is out of range"),
        (b"[" * 100_000 + b"]" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "nested too deeply"),
        (b"[" * 100_000, "nested too deeply"),
        (b"9" * 5000, "is not valid"),
        (b"1." + b"9" * 5000 + b"e400", "out of range"),
        (b'"' + b"a" * MAX_BYTES + b'"', f"is {MAX_BYTES + 2} bytes long; at most {MAX_BYTES}"),
        (b'"\xff"', "is not valid"),
        (b'"\xed\xa0\x80"', "is not valid"),
        (b'\xef\xbb\xbf{"a": 1}', "is not valid"),
        (b"", "is not valid"),
        (b"{} {}", "is not valid"),
        (b"{'a': 1}", "is not valid"),
        (b'{"a": 1,}', "is not valid"),
        (b'"\n"', "is not valid"),
        (b"\x00", "is not valid"),
    ],
    ids=lambda value: repr(value)[:24],
)
def test_a_reader_refuses(data, problem):
    with pytest.raises(FormatError) as caught:
        loads(data)
    assert problem in caught.value.message
    assert "the test's text" in caught.value.message


@given(st.binary() | st.text(alphabet='[]{}",:0123456789.eE+-\\unltrf ').map(str.encode))
def test_any_bytes_are_a_value_or_a_format_error(data):
    try:
        value = loads(data)
    except FormatError:
        return
    assert json.loads(data) == value


# ---- typed fields

OBJECT = {
    "text": "a", "count": 3, "flag": True, "null": None, "list": ["a", "b"], "numbers": [0, 5], "object": {"k": 1},
    "digest": "0123456789abcdef" * 2, "negative": -1, "huge": 2**63, "mixed": [1, True], "huge list": [2**63],
    "negative list": [0, -1], "short": "ab", "upper": "ABCDEF0123456789" * 2,
}  # fmt: skip


def test_fields_are_given_with_their_type():
    fields = Fields(OBJECT, "here")
    assert fields.text("text") == "a"
    assert fields.number("count") == 3
    assert fields.flag("flag") is True
    assert (fields.optional_text("null"), fields.optional_text("absent"), fields.optional_text("text")) == (
        None,
        None,
        "a",
    )
    assert (fields.items("list"), fields.texts("list"), fields.numbers("numbers")) == (["a", "b"], ["a", "b"], [0, 5])
    assert fields.mapping("object") == {"k": 1}
    assert fields.digest("digest") == "0123456789abcdef" * 2


@pytest.mark.parametrize(
    ("method", "key"),
    [
        ("text", "absent"), ("text", "count"), ("text", "null"), ("optional_text", "count"),
        ("number", "text"), ("number", "flag"), ("number", "negative"), ("number", "huge"), ("number", "null"),
        ("flag", "count"), ("items", "text"), ("items", "object"), ("mapping", "list"), ("mapping", "null"),
        ("texts", "numbers"), ("numbers", "list"), ("numbers", "mixed"), ("numbers", "huge list"),
        ("numbers", "negative list"), ("digest", "short"), ("digest", "upper"), ("digest", "count"),
    ],
)  # fmt: skip
def test_a_field_of_another_kind_is_refused_by_name(method, key):
    with pytest.raises(FormatError) as caught:
        getattr(Fields(OBJECT, "here"), method)(key)
    assert "here" in caught.value.message
    assert repr(key) in caught.value.message


@pytest.mark.parametrize("data", [None, 1, "text", ["list"]])
def test_what_is_no_object_has_no_fields(data):
    with pytest.raises(FormatError, match=r"here is .*; expected an object"):
        Fields(data, "here")
