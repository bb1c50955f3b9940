"""Typed JSON: plain Python data as JSON that comes back as the same Python types.

| Python | JSON |
|---|---|
| None, bool, str, finite float, int below 2^63 in magnitude | themselves |
| other int | `{"$int": "0x…"}` |
| nan, inf, -inf | `{"$float": "inf"}`; a NaN that is not the default one by its 16 hex digits |
| list | array |
| tuple, set, frozenset | `{"$tuple": […]}`, `{"$set": […]}`, `{"$frozenset": […]}` |
| dict with str keys | object, unless it has a single key that begins with `$` |
| any other dict | `{"$dict": [[key, value], …]}` |
| Counter; defaultdict of a builtin type | `{"$counter": [[key, count], …]}`, `{"$defaultdict": ["int", [[key, value], …]]}` |
| bytes, bytearray | `{"$bytes": "<base64>"}`, `{"$bytearray": "<base64>"}` |
| complex | `{"$complex": [real, imag]}` |
| numpy array, numpy scalar | `{"$ndarray": [dtype, shape, "<base64, C order>"]}`, `{"$npscalar": [dtype, "<base64>"]}` |
| torch.Size, torch.dtype, torch.device | `{"$size": […]}`, `{"$dtype": "bfloat16"}`, `{"$device": "cuda:0"}` |

So an object is a tag exactly if it has one key and that begins with `$`. Anything else is refused: loading must
never import or call what a file names. Subclasses of these types are refused too, since they would come back as
something else; numpy and torch are imported only when a value needs them.
"""

import base64
import math
import re
import struct
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from typing import Any

from forgather_ckpt import strict_json
from forgather_ckpt.errors import FormatError

MAX_VALUE_BYTES = 64 << 20
"""The longest typed JSON of one item. Larger data belongs into tensors."""

MAX_DEPTH = 100
"""A fixed limit, far below the interpreter's, which depends on how deep the caller stands: what is saved must load."""

_DEFAULT_NAN = "7ff8000000000000"
_SURROGATE_PAIR = re.compile("[\ud800-\udbff][\udc00-\udfff]")


class NotPlain(ValueError):
    """A value that typed JSON cannot hold. `steps` leads from the outermost value to the offender."""

    def __init__(self, reason: str, steps: tuple[str, ...] = ()) -> None:
        super().__init__(reason)
        self.reason = reason
        self.steps = steps


def dumps(value: Any) -> bytes:
    """Typed JSON of `value`, the same bytes for equal values of equal types; `NotPlain` if it is not plain data."""
    try:
        encoded = encode(value)
        if _is_deeper(encoded, 2 * MAX_DEPTH):  # a tuple takes two levels of JSON
            raise RecursionError
        data = strict_json.dumps(encoded)
    except RecursionError:
        raise NotPlain(f"is nested deeper than {MAX_DEPTH} levels, or contains itself") from None
    if len(data) > MAX_VALUE_BYTES:
        raise NotPlain(f"takes {len(data)} bytes as a value, at most {MAX_VALUE_BYTES} are stored; make it a tensor")
    return data


def _is_deeper(encoded: Any, depth: int) -> bool:
    if not isinstance(encoded, (list, dict)):
        return False
    items = encoded if isinstance(encoded, list) else encoded.values()
    return depth == 0 or any(_is_deeper(item, depth - 1) for item in items)


def loads(data: bytes) -> Any:
    """The value that `dumps` wrote; `FormatError` on anything else."""
    return decode(strict_json.loads(data, what="value", max_bytes=MAX_VALUE_BYTES))


def encode(value: Any) -> Any:
    """The JSON value (of dicts, lists, str, numbers) that stands for `value`."""
    kind = type(value)
    if value is None or kind is bool:
        return value
    if encoder := _ENCODERS.get(kind):
        return encoder(value)
    module = kind.__module__.partition(".")[0]
    if module == "numpy" and (encoded := _encode_numpy(value)) is not None:
        return encoded
    if module == "torch" and (encoded := _encode_torch(value)) is not None:
        return encoded
    raise NotPlain(f"{_describe(value)} cannot be checkpointed; return numbers, strings, tensors, lists or dicts")


def decode(data: Any) -> Any:
    """The value that `encode` turned into `data`; `FormatError` on anything else."""
    try:
        return _decode(data)
    except RecursionError:
        raise FormatError("a value is nested too deeply") from None


def _decode(data: Any) -> Any:
    if isinstance(data, list):
        return [_decode(item) for item in data]
    if not isinstance(data, dict):
        return data
    if len(data) == 1:
        [(tag, content)] = data.items()
        if tag.startswith("$"):
            decoder = _DECODERS.get(tag)
            if decoder is None:
                raise FormatError(f"a value has the unknown tag {tag!r}")
            try:
                return decoder(content)
            except (FormatError, RecursionError):
                raise
            except Exception as err:  # of any kind: numpy's own reader of dtypes raises even SyntaxError
                raise FormatError(f"a value tagged {tag!r} is malformed: {err}") from None
    return {key: _decode(item) for key, item in data.items()}


def _describe(value: Any) -> str:
    kind = type(value)
    if kind.__module__ == "builtins":
        return f"{kind.__name__} objects"
    return f"objects of type {kind.__module__}.{kind.__qualname__}"


def _sequence(values: Iterable[Any], letter: str) -> list[Any]:
    result = []
    for index, value in enumerate(values):
        try:
            result.append(encode(value))
        except NotPlain as err:
            raise NotPlain(err.reason, (f"~{letter}{index}", *err.steps)) from None
    return result


def _encode_str(value: str) -> str:
    if not value.isascii() and _SURROGATE_PAIR.search(value):
        raise NotPlain("text with a surrogate pair as two characters cannot be checkpointed: JSON joins them into one")
    return value


def _encode_int(value: int) -> Any:
    return value if -(2**63) < value < 2**63 else {"$int": hex(value)}


def _encode_float(value: float) -> Any:
    if math.isfinite(value):
        return value
    if math.isinf(value):
        return {"$float": "inf" if value > 0 else "-inf"}
    bits = struct.pack(">d", value).hex()
    return {"$float": "nan" if bits == _DEFAULT_NAN else bits}


def _decode_float(text: str) -> float:
    if text in ("nan", "inf", "-inf"):
        return float(text)
    return float(struct.unpack(">d", bytes.fromhex(text))[0])


def _encode_dict(value: dict[Any, Any]) -> Any:
    encoded = []
    for key, item in value.items():
        try:
            encoded.append([encode(key), encode(item)])
        except NotPlain as err:
            raise NotPlain(err.reason, (str(key), *err.steps)) from None
    only_strings = all(type(key) is str for key in value)
    is_taglike = len(value) == 1 and only_strings and next(iter(value)).startswith("$")
    if only_strings and not is_taglike:
        return {key: item for key, item in encoded}
    return {"$dict": encoded}


def _encode_pairs(value: dict[Any, Any]) -> list[Any]:
    return [[encode(key), encode(item)] for key, item in value.items()]


def _encode_defaultdict(value: "defaultdict[Any, Any]") -> Any:
    factory = value.default_factory
    if factory not in _FACTORIES.values():
        raise NotPlain("a defaultdict comes back only with a builtin type as its factory; return dict(…) of it")
    name = next(name for name, known in _FACTORIES.items() if known is factory)
    return {"$defaultdict": [name, _encode_pairs(value)]}


def _decode_pairs(pairs: list[Any]) -> dict[Any, Any]:
    return {_decode(key): _decode(item) for key, item in pairs}


def _decode_defaultdict(content: Any) -> Any:
    name, pairs = content
    return defaultdict(_FACTORIES[name], _decode_pairs(pairs))


def _encode_set(tag: str) -> Callable[[Any], Any]:
    def encoder(value: Iterable[Any]) -> Any:  # sorted, since the order of a set depends on the hash seed
        return {tag: sorted(_sequence(value, "s"), key=strict_json.dumps)}

    return encoder


def _encode_bytes(data: bytes | bytearray | memoryview) -> str:
    return base64.b64encode(data).decode("ascii")


def _decode_bytes(text: str) -> bytes:
    return base64.b64decode(text, validate=True)


def _encode_numpy(value: Any) -> Any:
    import numpy as np

    if type(value) is not np.ndarray and not isinstance(value, np.generic):
        return None
    if value.dtype.hasobject:
        raise NotPlain("a numpy array of Python objects cannot be checkpointed; use a numeric dtype or a list")
    descr = np.lib.format.dtype_to_descr(value.dtype)
    restored = np.lib.format.descr_to_dtype(descr)
    if restored != value.dtype or restored.type is not value.dtype.type:
        raise NotPlain(f"the numpy dtype {value.dtype} is not numpy's own; convert to a torch tensor")
    is_empty_text = isinstance(value, (np.str_, np.bytes_)) and not value
    if value.dtype.itemsize == 0 and not is_empty_text:
        raise NotPlain("a numpy array whose elements take no bytes cannot be checkpointed; store its shape")
    data = _encode_bytes(value.tobytes())
    if isinstance(value, np.generic):
        return {"$npscalar": [encode(descr), data]}
    return {"$ndarray": [encode(descr), list(value.shape), data]}


def _decode_ndarray(content: Any) -> Any:
    import numpy as np

    descr, shape, data = content
    dtype = np.lib.format.descr_to_dtype(_decode(descr))
    if dtype.hasobject:
        raise ValueError("an array of Python objects")
    if not all(type(length) is int and length >= 0 for length in shape):
        raise ValueError(f"the shape {shape}")
    # a copy, as frombuffer's arrays are read-only; reshape checks the length before anything is allocated
    return np.frombuffer(_decode_bytes(data), dtype).reshape(shape).copy()


def _decode_npscalar(content: Any) -> Any:
    import numpy as np

    descr, data = content
    if descr in ("<U0", ">U0", "|S0"):  # empty text, which numpy writes as if it were one character
        return np.bytes_() if descr == "|S0" else np.str_()
    return _decode_ndarray([descr, [1], data])[0]


def _encode_torch(value: Any) -> Any:
    import torch

    if type(value) is torch.Size:
        return {"$size": [int(length) for length in value]}
    if isinstance(value, torch.dtype):
        return {"$dtype": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"$device": str(value)}
    return None


def _decode_size(lengths: list[int]) -> Any:
    import torch

    if not all(type(length) is int and -(2**63) <= length < 2**63 for length in lengths):
        raise ValueError(f"the lengths {lengths}")
    return torch.Size(lengths)


def _decode_dtype(name: str) -> Any:
    import torch

    dtype = vars(torch).get(name)  # not getattr, which would import modules of that name
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"torch.{name} is not a dtype")
    return dtype


def _decode_device(text: str) -> Any:
    import torch

    if type(text) is not str:
        raise ValueError(f"{text!r} is not a string")
    try:
        return torch.device(text)
    except RuntimeError as err:
        raise ValueError(str(err)) from None


def _decode_items(items: list[Any]) -> list[Any]:
    if type(items) is not list:
        raise ValueError(f"{items!r} is not a list")
    return [_decode(item) for item in items]


def _decode_complex(parts: list[Any]) -> complex:
    real, imag = parts
    return complex(_decode(real), _decode(imag))


_FACTORIES: dict[str, Callable[[], Any] | None] = {
    "none": None,
    "int": int,
    "float": float,
    "str": str,
    "list": list,
    "dict": dict,
    "set": set,
}

_ENCODERS: dict[type, Callable[[Any], Any]] = {
    str: _encode_str,
    int: _encode_int,
    float: _encode_float,
    list: lambda value: _sequence(value, "l"),
    tuple: lambda value: {"$tuple": _sequence(value, "t")},
    set: _encode_set("$set"),
    frozenset: _encode_set("$frozenset"),
    dict: _encode_dict,
    Counter: lambda value: {"$counter": _encode_pairs(value)},
    defaultdict: _encode_defaultdict,
    bytes: lambda value: {"$bytes": _encode_bytes(value)},
    bytearray: lambda value: {"$bytearray": _encode_bytes(value)},
    complex: lambda value: {"$complex": [_encode_float(value.real), _encode_float(value.imag)]},
}

_DECODERS: dict[str, Callable[[Any], Any]] = {
    "$int": lambda text: int(text, 16),
    "$float": _decode_float,
    "$tuple": lambda items: tuple(_decode_items(items)),
    "$set": lambda items: set(_decode_items(items)),
    "$frozenset": lambda items: frozenset(_decode_items(items)),
    "$dict": _decode_pairs,
    "$counter": lambda pairs: Counter(_decode_pairs(pairs)),
    "$defaultdict": _decode_defaultdict,
    "$bytes": _decode_bytes,
    "$bytearray": lambda text: bytearray(_decode_bytes(text)),
    "$complex": _decode_complex,
    "$ndarray": _decode_ndarray,
    "$npscalar": _decode_npscalar,
    "$size": _decode_size,
    "$dtype": _decode_dtype,
    "$device": _decode_device,
}
