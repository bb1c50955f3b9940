"""The container of tensors: plain safetensors files (https://github.com/huggingface/safetensors#format).

8 bytes little-endian header length, a JSON header padded with spaces so that the data starts 4 KiB-aligned,
then the tensors without holes. They are ordered by falling element size, so that each is naturally aligned.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from forgather_ckpt import strict_json
from forgather_ckpt.dtypes import ITEM_BYTES, SAFETENSORS
from forgather_ckpt.errors import FormatError

ALIGNMENT = 4096
MAX_HEADER_BYTES = 32 << 20
"""Far below the 100 MB that safetensors readers refuse."""
MAX_ITEMS = 100_000

_METADATA = {"format": "pt", "forgather_ckpt": "1"}
_RESERVED_KEY = "__metadata__"


class Slot(NamedTuple):
    """One tensor in a file, before it has a place: its key, torch dtype, and shape."""

    key: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        count = ITEM_BYTES[self.dtype]
        for length in self.shape:
            count *= length
        return count


class Layout(NamedTuple):
    """A file before its data: the header's bytes, each slot's offset from the file's start, the file's size."""

    header: bytes
    offsets: tuple[int, ...]
    size: int


def is_free(key: str, taken: Mapping[str, Any]) -> bool:
    """Whether a tensor may have this key in a file that already holds the keys in `taken`."""
    return key != _RESERVED_KEY and key not in taken


def lay_out(slots: Sequence[Slot]) -> Layout:
    """The layout of a file that holds `slots` in the given order, which must be of falling element size."""
    header: dict[str, Any] = {_RESERVED_KEY: _METADATA}
    starts = []
    position = 0
    for slot in slots:
        starts.append(position)
        stop = position + slot.num_bytes
        header[slot.key] = {
            "dtype": SAFETENSORS.get(slot.dtype, "U8"),
            "shape": list(stored_shape(slot.dtype, slot.shape)),
            "data_offsets": [position, stop],
        }
        position = stop
    text = strict_json.dumps(header)
    padded = -(-(8 + len(text)) // ALIGNMENT) * ALIGNMENT
    data = (padded - 8).to_bytes(8, "little") + text.ljust(padded - 8)
    return Layout(data, tuple(padded + start for start in starts), padded + position)


def stored_shape(dtype: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape under which a safetensors reader sees the tensor: one more dimension where its type is U8 instead."""
    size = ITEM_BYTES[dtype]
    return shape if dtype in SAFETENSORS or size == 1 else (*shape, size)


def header_cost(slot: Slot) -> int:
    """An upper bound of the bytes that the slot takes in the header."""
    escapes = len(slot.key.encode("utf-16-le")) // 2  # `\uXXXX` each at most
    return 6 * escapes + 24 * len(slot.shape) + 120


def header_size(prefix: bytes, *, what: str) -> int:
    """The length of the header, its own 8 length bytes included, from the first 8 bytes of a file."""
    if len(prefix) < 8:
        raise FormatError(f"{what} is too short to be a safetensors file")
    size = 8 + int.from_bytes(prefix[:8], "little")
    if size > MAX_HEADER_BYTES + ALIGNMENT:
        raise FormatError(f"{what} claims a header of {size} bytes; at most {MAX_HEADER_BYTES} are written")
    return size
