"""The index: every item and value that one writer stored, `index-<writer>.json`.

Columns, not rows: a million rows as JSON objects take 13 s and 1.3 GB to parse, as columns 2.3 s. What is
rare (boxes, ranges, block digests, …) is a sparse column: an object from row number to value.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from forgather_ckpt import hashtree, paths, strict_json
from forgather_ckpt.boxes import Box, rectangles, volume, whole_box
from forgather_ckpt.dtypes import ITEM_BYTES
from forgather_ckpt.errors import FormatError
from forgather_ckpt.manifest import VERSION, check_version
from forgather_ckpt.strict_json import Fields

FORMAT = "forgather_ckpt.index"
MAX_BYTES = 1 << 30
MAX_ITEMS = 100_000


class Lanes(NamedTuple):
    """What a part of a tensor adds to the block digests (`multilinear`) of the whole one."""

    first: int
    """The first block of the whole tensor that it has bytes of."""
    digests: bytes
    """16 bytes a block from there on."""


class TensorRow(NamedTuple):
    """One stored piece of a tensor: of its `box` (or the whole) the elements in `range` (or all), in C order."""

    name: str
    order: int
    """Where the item stood in its state dict, so that dicts come back in their order."""
    dtype: str
    shape: tuple[int, ...]
    """Of the whole tensor."""
    file: str
    offset: int
    """Of the piece's first byte in the file."""
    digest: bytes
    box: Box | None = None
    range: tuple[int, int] | None = None
    key: str | None = None
    """Its key in the safetensors file where that is not the item's name."""
    blocks: tuple[bytes, ...] = ()
    """The block digests of a piece of more than one block."""
    logical: bytes | None = None
    """The digest over the whole tensor, where the writer held it whole."""
    lanes: Lanes | None = None
    """Of the whole box, if the piece is the first of it, and the writer had it on a device."""

    @property
    def box_shape(self) -> tuple[int, ...]:
        return self.shape if self.box is None else tuple(stop - start for start, stop in self.box)

    @property
    def bounds(self) -> tuple[int, int]:
        """The piece's first and last byte + 1, counted from the first byte of its box in C order."""
        size = ITEM_BYTES[self.dtype]
        if self.range is not None:
            return self.range[0] * size, self.range[1] * size
        for length in self.box_shape:
            size *= length
        return 0, size

    @property
    def num_bytes(self) -> int:
        start, stop = self.bounds
        return stop - start

    @property
    def is_whole(self) -> bool:
        return self.box is None and self.range is None

    def rectangles(self, number: int) -> Iterator[Box]:
        """The elements of the piece's block of that number, as boxes of the tensor that follow one another."""
        size = ITEM_BYTES[self.dtype]
        box = self.box if self.box is not None else whole_box(self.shape)
        first, last = (bound // size for bound in self.bounds)
        step = hashtree.BLOCK_BYTES // size
        return rectangles(box, first + number * step, min(last, first + (number + 1) * step))

    def block_digests(self) -> tuple[bytes, ...]:
        return self.blocks or (self.digest,)


class ValueRow(NamedTuple):
    """One stored value: `value` is its typed JSON, already parsed as JSON."""

    name: str
    order: int
    value: Any
    digest: bytes


class AliasRow(NamedTuple):
    """A second name of the same tensor (tied weights): stored once, under `target`, and tied again on load."""

    name: str
    order: int
    target: str


@dataclass(frozen=True)
class IndexEntry:
    """What one writer stored of one entry of a component."""

    component: str
    entry: str
    tensors: Sequence[TensorRow] = ()
    values: Sequence[ValueRow] = ()
    aliases: Sequence[AliasRow] = ()

    @property
    def num_items(self) -> int:
        return len(self.tensors) + len(self.values) + len(self.aliases)


@dataclass(frozen=True)
class Index:
    """One index file."""

    writer: int
    entries: Sequence[IndexEntry] = field(default_factory=tuple)

    def to_bytes(self) -> bytes:
        return strict_json.dumps(
            {
                "format": FORMAT,
                "version": VERSION,
                "algorithm": hashtree.ALGORITHM,
                "writer": self.writer,
                "entries": [_entry_to_json(entry) for entry in self.entries],
            }
        )

    @classmethod
    def from_bytes(cls, data: bytes, *, what: str, sizes: Mapping[str, int]) -> "Index":
        """Parse an index; `sizes` are the sizes of the manifest's files, which no row may reach beyond."""
        top = Fields(strict_json.loads(data, what=what, max_bytes=MAX_BYTES), what)
        if top.text("format") != FORMAT:
            raise FormatError(f"{what} is of format {top.text('format')!r}; expected {FORMAT!r}")
        check_version(top.text("version"), what)
        if top.text("algorithm") != hashtree.ALGORITHM:
            raise FormatError(f"{what} has digests of {top.text('algorithm')!r}; expected {hashtree.ALGORITHM!r}")
        try:
            entries = tuple(_entry_from_json(Fields(entry, what), sizes) for entry in top.items("entries"))
        except (KeyError, TypeError, ValueError, IndexError) as err:
            if isinstance(err, FormatError):
                raise
            raise FormatError(f"{what} is malformed: {err!r}") from None
        return cls(writer=top.number("writer"), entries=entries)


def records(entry: IndexEntry) -> Iterator[tuple[str, bytes, bytes]]:
    """The records of the stored items in the digest of their state (`hashtree.state_digest`)."""
    for row in entry.tensors:
        yield row.name, hashtree.tensor_structure(row.dtype, row.shape, row.box), row.logical or row.digest
    for value in entry.values:
        yield value.name, b"value", value.digest
    for alias in entry.aliases:
        yield alias.name, b"alias", hashtree.digest(alias.target.encode())


def split(writer: int, entries: Sequence[IndexEntry]) -> Iterator[Index]:
    """Indexes of at most `MAX_ITEMS` items each that together hold `entries`; at least one."""
    batch: list[IndexEntry] = []
    room = MAX_ITEMS
    for entry in entries:
        rest = entry
        while rest.num_items > room:
            head, rest = _cut(rest, room)
            yield Index(writer, (*batch, head))
            batch, room = [], MAX_ITEMS
        batch.append(rest)
        room -= rest.num_items
    yield Index(writer, tuple(batch))


def _cut(entry: IndexEntry, count: int) -> tuple[IndexEntry, IndexEntry]:
    columns: list[Sequence[Any]] = [entry.tensors, entry.values, entry.aliases]
    head, tail = [], []
    for column in columns:
        head.append(column[:count])
        tail.append(column[count:])
        count -= len(head[-1])
    return IndexEntry(entry.component, entry.entry, *head), IndexEntry(entry.component, entry.entry, *tail)


def _sparse(rows: Sequence[Any]) -> dict[str, Any]:
    return {str(number): value for number, value in enumerate(rows) if value is not None}


def _entry_to_json(entry: IndexEntry) -> dict[str, Any]:
    rows = entry.tensors
    lanes = _sparse([row.lanes and [row.lanes.first, row.lanes.digests.hex()] for row in rows])
    return {
        "component": entry.component,
        "entry": entry.entry,
        "tensors": {
            "name": [row.name for row in rows],
            "order": [row.order for row in rows],
            "dtype": [row.dtype for row in rows],
            "shape": [list(row.shape) for row in rows],
            "file": [row.file for row in rows],
            "offset": [row.offset for row in rows],
            "digest": "".join(row.digest.hex() for row in rows),
            "box": _sparse([row.box and [list(bounds) for bounds in row.box] for row in rows]),
            "range": _sparse([row.range and list(row.range) for row in rows]),
            "key": _sparse([row.key for row in rows]),
            "blocks": _sparse([b"".join(row.blocks).hex() or None for row in rows]),
            "logical": _sparse([row.logical and row.logical.hex() for row in rows]),
            **({"lanes": lanes} if lanes else {}),
        },
        "values": {
            "name": [row.name for row in entry.values],
            "order": [row.order for row in entry.values],
            "value": [row.value for row in entry.values],
            "digest": "".join(row.digest.hex() for row in entry.values),
        },
        "aliases": {
            "name": [row.name for row in entry.aliases],
            "order": [row.order for row in entry.aliases],
            "target": [row.target for row in entry.aliases],
        },
    }


def _entry_from_json(data: Fields, sizes: Mapping[str, int]) -> IndexEntry:
    component, entry = data.text("component"), data.text("entry")
    where = f"{data.where}, component {component!r}"
    values = Fields(data.mapping("values"), f"{where}, values")
    aliases = Fields(data.mapping("aliases"), f"{where}, aliases")
    return IndexEntry(
        component,
        entry,
        tensors=tuple(_tensor_rows(Fields(data.mapping("tensors"), f"{where}, tensors"), sizes)),
        values=tuple(
            ValueRow(*row)
            for row in _rows(
                values,
                values.texts("name"),
                values.numbers("order"),
                values.items("value"),
                _digests(values.text("digest")),
            )
        ),
        aliases=tuple(
            AliasRow(*row)
            for row in _rows(aliases, aliases.texts("name"), aliases.numbers("order"), aliases.texts("target"))
        ),
    )


def _rows(fields: Fields, *columns: Sequence[Any]) -> Iterator[tuple[Any, ...]]:
    if len({len(column) for column in columns}) > 1:
        raise FormatError(f"{fields.where}: columns of different lengths {[len(column) for column in columns]}")
    return zip(*columns, strict=True)


def _digests(joined: str) -> list[bytes]:
    data = bytes.fromhex(joined)
    if len(data) % hashtree.DIGEST_BYTES:
        raise FormatError(f"a column of digests is {len(data)} bytes long; expected a multiple of 16")
    return [data[i : i + hashtree.DIGEST_BYTES] for i in range(0, len(data), hashtree.DIGEST_BYTES)]


def _tensor_rows(data: Fields, sizes: Mapping[str, int]) -> Iterator[TensorRow]:
    sparse = {key: data.mapping(key) for key in ("box", "range", "key", "blocks", "logical")}
    all_lanes = data.optional_mapping("lanes")
    columns = _rows(
        data,
        data.texts("name"),
        data.numbers("order"),
        data.texts("dtype"),
        data.items("shape"),
        data.texts("file"),
        data.numbers("offset"),
        _digests(data.text("digest")),
    )
    for number, (name, order, dtype, shape, file, offset, digest) in enumerate(columns):
        at = str(number)
        box, bounds, logical = sparse["box"].get(at), sparse["range"].get(at), sparse["logical"].get(at)
        lanes = all_lanes.get(at)
        row = TensorRow(
            name,
            order,
            dtype,
            tuple(shape),
            file,
            offset,
            digest,
            box=None if box is None else tuple((start, stop) for start, stop in box),
            range=None if bounds is None else (bounds[0], bounds[1]),
            key=sparse["key"].get(at),
            blocks=tuple(_digests(sparse["blocks"].get(at, ""))),
            logical=None if logical is None else _digests(logical)[0],
            lanes=None if lanes is None else Lanes(lanes[0], bytes.fromhex(lanes[1])),
        )
        _check_row(row, sizes, data.where)
        yield row


def _check_row(row: TensorRow, sizes: Mapping[str, int], where: str) -> None:
    """Trust no length: every row must fit its tensor, and its tensor the file, before anything is allocated."""

    def refuse(reason: str) -> FormatError:
        return FormatError(f"{where}: item {row.name!r} {reason}")

    if row.dtype not in ITEM_BYTES:
        raise refuse(f"has the unknown dtype {row.dtype!r}")
    if not all(type(length) is int and 0 <= length < 2**63 for length in row.shape):
        raise refuse(f"has the impossible shape {row.shape}")
    if row.key is not None and type(row.key) is not str:
        raise refuse(f"has the key {row.key!r}, which is not a string")
    if row.box is not None and (
        len(row.box) != len(row.shape)
        or not all(type(bound) is int for bounds in row.box for bound in bounds)
        or not all(0 <= start <= stop <= length for (start, stop), length in zip(row.box, row.shape, strict=True))
    ):
        raise refuse(f"has a box {row.box} that is not inside its shape {row.shape}")
    if row.range is not None:
        count = 1
        for length in row.box_shape:
            count *= length
        if not (all(type(bound) is int for bound in row.range) and 0 <= row.range[0] <= row.range[1] <= count):
            raise refuse(f"has a range {row.range} that is not inside its {count} elements")
    if not paths.is_safe_file_name(row.file) or row.file not in sizes:
        raise refuse(f"lies in the file {row.file!r}, which the manifest does not list")
    if row.lanes is not None and not _fits(row.lanes, row):
        raise refuse("has digests of blocks that are not the tensor's")
    if row.offset + row.num_bytes > sizes[row.file]:
        raise refuse(f"reaches beyond the end of {row.file!r}")
    if (
        len(row.block_digests()) != hashtree.num_blocks(row.num_bytes)
        or hashtree.join(row.block_digests()) != row.digest
    ):
        raise refuse("has block digests that do not make up its digest")


def _fits(lanes: Lanes, row: TensorRow) -> bool:
    count, rest = divmod(len(lanes.digests), hashtree.DIGEST_BYTES)
    num_blocks = hashtree.num_blocks(ITEM_BYTES[row.dtype] * volume(whole_box(row.shape)))
    return type(lanes.first) is int and rest == 0 and 0 <= lanes.first <= lanes.first + count <= num_blocks
