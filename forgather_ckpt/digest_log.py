"""The log of digests that one rank records step by step: the format, and its reader. `digest_writer` writes it.

A log is a file `digests-rank00003.fgdl`: records, one after the other, only ever appended. All integers are
little-endian and unsigned; a *check* is `xxh3_64` (https://xxhash.com) as such an integer, of 8 bytes.

    record   magic      4 bytes   "FGDL"
             kind       4 bytes   "HEAD" or "STEP"; a reader skips records of other kinds
             number     8 bytes   HEAD: how many columns it has; STEP: the step
             length     8 bytes   of the payload
             check      8 bytes   of the 24 bytes before it
             payload
             check      8 bytes   of all bytes of the record before it

    HEAD     payload    JSON, UTF-8: what the columns of the following steps are
    STEP     payload    the closing check of the HEAD that it belongs to (8 bytes), which is the last one before it;
                        then 16 bytes a column: the digests

A HEAD is

    {"format": "forgather_ckpt.digests", "version": "1.0",   another number before the dot: refuse
     "rank", "world_size",
     "started",                            UTC, when the process that writes opened the log; for people
     "include", "exclude",                 shell patterns of the items that were recorded
     "components": [{"key",
                     "pattern",            how the ranks share it ("replicated", …), null where that was not declared
                     "varies",             shell patterns of items that differ between the ranks by design
                     "names",              item names; field i of every list is item i's
                     "dtypes", "shapes",   torch's name and the list of lengths; null for a value
                     "algorithms"}]}       of the digests

Columns are the items of all components in that order. The digest of a tensor is `hashtree.join` of its block digests,
that of a value `xxh3_128` of its typed JSON; a second name of a tensor (tied weights) has the tensor's. Unknown fields
are to be ignored.

A new HEAD is written by every process that opens the log, and when the columns change. A step may be recorded twice,
by a job that resumed from an earlier one: all are kept, and the last counts. A log that ends within a record, or in
zeros, was cut off there (the process or the machine died, or is just writing): what comes before is good, and the next
writer cuts the rest away. Anything else that is not as described is damage: a `FormatError` that says at which byte.
"""

import os
import re
import struct
import weakref
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from xxhash import xxh3_64_intdigest

from forgather_ckpt import files, strict_json
from forgather_ckpt.errors import CheckpointNotFound, FormatError, UnsupportedVersion
from forgather_ckpt.hashtree import DIGEST_BYTES
from forgather_ckpt.strict_json import Fields

FORMAT = "forgather_ckpt.digests"
VERSION = "1.0"
DIRECTORY = "digests"
"""Where a trainer's logs lie in its run directory."""

MAGIC = b"FGDL"
HEAD, STEP = b"HEAD", b"STEP"
_FIELDS = struct.Struct("<4s4sQQ")
CHECK = struct.Struct("<Q")
_FIXED_BYTES = _FIELDS.size + CHECK.size
_MAX_HEAD_BYTES = 256 << 20
"""About a million columns."""
_NUM_KEPT_HEADERS = 2
_CHUNK_BYTES = 1 << 20
_FILE_NAME = re.compile(r"digests-rank(\d{5,18})\.fgdl", re.ASCII)


def file_name(rank: int) -> str:
    return f"digests-rank{rank:05d}.fgdl"


def rank_in(name: str) -> int | None:
    """The rank that a file's name says, if it is that of a log."""
    match = _FILE_NAME.fullmatch(name)
    return None if match is None else int(match[1])


def logs_in(directory: Path) -> dict[int, Path]:
    """The logs in a directory by rank."""
    with files.typed_errors(directory, "listing the logs of digests"):
        found = {rank: path for path in directory.iterdir() if (rank := rank_in(path.name)) is not None}
    return dict(sorted(found.items()))


class Column(NamedTuple):
    """One item: what its 16 bytes in a frame are the digest of. A value has neither dtype nor shape."""

    component: str
    name: str
    dtype: str | None
    shape: tuple[int, ...] | None
    algorithm: str


class Part(NamedTuple):
    """What is known of one component besides its items."""

    key: str
    pattern: str | None
    """How the ranks share it; None where that was not declared."""
    varies: tuple[str, ...] = ()
    """Shell patterns of items that differ between the ranks by design."""


@dataclass(frozen=True)
class Header:
    """What the frames that follow it hold."""

    rank: int
    world_size: int
    started: str
    include: tuple[str, ...]
    exclude: tuple[str, ...]
    parts: tuple[Part, ...]
    columns: tuple[Column, ...]
    """Those of one part lie together, in the order of the parts."""

    def to_bytes(self) -> bytes:
        columns: dict[str, list[Column]] = {part.key: [] for part in self.parts}
        for column in self.columns:
            columns[column.component].append(column)
        data = {
            "format": FORMAT,
            "version": VERSION,
            "rank": self.rank,
            "world_size": self.world_size,
            "started": self.started,
            "include": self.include,
            "exclude": self.exclude,
            "components": [
                {
                    "key": part.key,
                    "pattern": part.pattern,
                    "varies": part.varies,
                    "names": [column.name for column in columns[part.key]],
                    "dtypes": [column.dtype for column in columns[part.key]],
                    "shapes": [column.shape for column in columns[part.key]],
                    "algorithms": [column.algorithm for column in columns[part.key]],
                }
                for part in self.parts
            ],
        }
        return strict_json.dumps(data)

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """`FormatError` if it is malformed, `UnsupportedVersion` if a newer major version wrote it."""
        top = Fields(strict_json.loads(data, what="the header", max_bytes=_MAX_HEAD_BYTES), "the header")
        if (kind := top.text("format")) != FORMAT:
            raise FormatError(f"the header is of format {kind!r}; expected {FORMAT!r}")
        if (version := top.text("version")).partition(".")[0] != VERSION.partition(".")[0]:
            raise UnsupportedVersion(f"the log is of version {version!r}; this program reads {VERSION}: update it")
        parts = []
        columns: list[Column] = []
        for number, component in enumerate(top.items("components")):
            fields = Fields(component, f"component {number} of the header")
            key = fields.text("key")
            parts.append(Part(key, fields.optional_text("pattern"), tuple(fields.texts("varies"))))
            columns += _columns(key, fields)
        if len({part.key for part in parts}) < len(parts):
            raise FormatError("the header names a component twice")
        if len({column[:2] for column in columns}) < len(columns):
            raise FormatError("the header names an item twice")
        return cls(
            top.number("rank"),
            top.number("world_size"),
            top.text("started"),
            tuple(top.texts("include")),
            tuple(top.texts("exclude")),
            tuple(parts),
            tuple(columns),
        )


def _columns(component: str, fields: Fields) -> Iterator[Column]:
    names, algorithms = fields.texts("names"), fields.texts("algorithms")
    dtypes, shapes = fields.items("dtypes"), fields.items("shapes")
    if not len(names) == len(dtypes) == len(shapes) == len(algorithms):
        raise FormatError(f"{fields.where}: its lists differ in length")
    for name, dtype, shape, algorithm in zip(names, dtypes, shapes, algorithms, strict=True):
        if dtype is None and shape is None:
            yield Column(component, name, None, None, algorithm)
        elif isinstance(dtype, str) and isinstance(shape, list) and all(type(n) is int and n >= 0 for n in shape):
            yield Column(component, name, dtype, tuple(shape), algorithm)
        else:
            raise FormatError(f"{fields.where}: item {name!r} has dtype {dtype!r} and shape {shape!r}")


# ---- records


class _Record(NamedTuple):
    """Where a record lies, told from its first 32 bytes."""

    kind: bytes
    number: int
    start: int
    payload_bytes: int

    @property
    def stop(self) -> int:
        return self.start + _FIXED_BYTES + self.payload_bytes + CHECK.size


def encoded(kind: bytes, number: int, *payload: bytes) -> bytes:
    fields = _FIELDS.pack(MAGIC, kind, number, sum(map(len, payload)))
    record = b"".join([fields, CHECK.pack(xxh3_64_intdigest(fields)), *payload])
    return record + CHECK.pack(xxh3_64_intdigest(record))


def records(descriptor: int, size: int) -> Iterator[_Record]:
    """The whole records of a log, payloads unread; ends where the log was cut off. `FormatError` where it is damaged."""
    start = 0
    num_columns: int | None = None
    while start < size:
        fixed = os.pread(descriptor, min(_FIXED_BYTES, size - start), start)
        if len(fixed) < _FIXED_BYTES:
            if not (fixed.startswith(MAGIC) or MAGIC.startswith(fixed)) and any(fixed):
                raise _damaged(start, "no record begins there")
            return
        magic, kind, number, payload_bytes = _FIELDS.unpack_from(fixed)
        if CHECK.unpack_from(fixed, _FIELDS.size)[0] != xxh3_64_intdigest(fixed[: _FIELDS.size]) or magic != MAGIC:
            if not any(fixed) and _is_zero(descriptor, start, size):
                return
            raise _damaged(start, "no record begins there")
        if kind == HEAD:
            num_columns = number
            if payload_bytes > _MAX_HEAD_BYTES:
                raise _damaged(start, f"a header of {payload_bytes} bytes; at most {_MAX_HEAD_BYTES} are read")
        if kind == STEP:
            if num_columns is None:
                raise _damaged(start, "a step before any header")
            if payload_bytes != CHECK.size + DIGEST_BYTES * num_columns or number >= 1 << 63:
                raise _damaged(start, f"step {number} does not hold {num_columns} digests, as the header says")
        record = _Record(kind, number, start, payload_bytes)
        if record.stop > size:
            return
        yield record
        start = record.stop


def _is_zero(descriptor: int, start: int, stop: int) -> bool:
    return all(
        not any(os.pread(descriptor, min(_CHUNK_BYTES, stop - at), at)) for at in range(start, stop, _CHUNK_BYTES)
    )


def _damaged(at: int, what: str) -> FormatError:
    return FormatError(f"the log of digests is damaged at byte {at}: {what}")


def _payload(descriptor: int, record: _Record) -> tuple[bytes, int]:
    """The payload of a record and its closing check, which is verified."""
    what = f"step {record.number}" if record.kind == STEP else "a header"
    data = os.pread(descriptor, record.stop - record.start, record.start)
    if len(data) < record.stop - record.start:
        raise _damaged(record.start, f"{what} is not there any more")
    body = memoryview(data)[: -CHECK.size]
    (check,) = CHECK.unpack_from(data, len(body))
    if check != xxh3_64_intdigest(body):
        raise _damaged(record.start, f"{what} does not have the check that was recorded")
    return bytes(body[_FIXED_BYTES:]), check


def read_header(descriptor: int, record: _Record) -> tuple[Header, int]:
    payload, check = _payload(descriptor, record)
    try:
        header = Header.from_bytes(payload)
    except UnsupportedVersion:
        raise
    except FormatError as err:
        raise _damaged(record.start, err.message) from None
    if len(header.columns) != record.number:
        raise _damaged(record.start, f"a header of {len(header.columns)} columns that claims {record.number}")
    return header, check


# ---- logs


@dataclass(frozen=True)
class Frame:
    """The digests of one step: 16 bytes for each column of the header."""

    step: int
    header: Header
    header_number: int
    """Of all headers of the log; frames of one number have one header."""
    digests: bytes


class DigestLog:
    """A log, open for reading: where each frame lies. Frames are read, and verified, when they are asked for.

    It may be read while it is being written: what is there now is read. (In the very process that writes it, closing it
    gives up the writer's lock.)

    `CheckpointNotFound` if there is no such file, `StorageError` if it cannot be read, `FormatError` if it is damaged.

    >>> with DigestLog(Path("runs/a/digests/digests-rank00000.fgdl")) as log:
    ...     for frame in log.frames(): ...
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._headers: list[_Record] = []
        self._steps = array("Q")
        self._starts = array("Q")
        self._header_of = array("L")
        self._kept: dict[int, tuple[Header, int]] = {}
        end = 0
        with files.typed_errors(path, "reading the log of digests"):
            try:
                self._descriptor = files.open_to_read(path)
            except FileNotFoundError:
                raise CheckpointNotFound(f"there is no log of digests {path}", path=str(path)) from None
            self._close = weakref.finalize(self, os.close, self._descriptor)
            self.num_bytes = os.fstat(self._descriptor).st_size
            try:
                for record in records(self._descriptor, self.num_bytes):
                    end = record.stop
                    self._add(record)
            except FormatError as err:
                raise err.at(path=str(path)) from None
        self.num_torn_bytes = self.num_bytes - end
        """Bytes at the end that are no whole record: of a log that was cut off."""
        self.by_step: Mapping[int, int] = {step: number for number, step in enumerate(self._steps)}
        """Step -> the number of its frame; of a step that was recorded several times, the last one's."""

    def _add(self, record: _Record) -> None:
        if record.kind == HEAD:
            self._headers.append(record)
        elif record.kind == STEP:
            self._steps.append(record.number)
            self._starts.append(record.start)
            self._header_of.append(len(self._headers) - 1)

    @property
    def num_frames(self) -> int:
        return len(self._steps)

    @property
    def num_headers(self) -> int:
        return len(self._headers)

    @property
    def steps(self) -> Sequence[int]:
        """The steps in the order in which they were recorded."""
        return self._steps

    def header(self, number: int) -> Header:
        return self._header(number)[0]

    def frame(self, number: int) -> Frame:
        header_number = self._header_of[number]
        header, check = self._header(header_number)
        start = self._starts[number]
        record = _Record(STEP, self._steps[number], start, CHECK.size + DIGEST_BYTES * len(header.columns))
        with files.typed_errors(self.path, "reading the log of digests"):
            try:
                payload, _ = _payload(self._descriptor, record)
                if CHECK.unpack_from(payload)[0] != check:
                    raise _damaged(
                        start,
                        f"step {record.number} belongs to another header than the last one before it: two processes may "
                        "have written at once",
                    )
            except FormatError as err:
                raise err.at(path=str(self.path)) from None
        return Frame(record.number, header, header_number, payload[CHECK.size :])

    def last_header(self) -> Header:
        """`FormatError` where nothing has been recorded."""
        if not self._headers:
            raise FormatError("nothing has been recorded in this log", path=str(self.path))
        return self.header(len(self._headers) - 1)

    def frames(self) -> Iterator[Frame]:
        """All frames, in the order in which they were recorded, one at a time."""
        return map(self.frame, range(self.num_frames))

    def _header(self, number: int) -> tuple[Header, int]:
        if number not in self._kept:
            while len(self._kept) >= _NUM_KEPT_HEADERS:
                del self._kept[next(iter(self._kept))]
            with files.typed_errors(self.path, "reading the log of digests"):
                try:
                    self._kept[number] = read_header(self._descriptor, self._headers[number])
                except FormatError as err:
                    raise err.at(path=str(self.path)) from None
        return self._kept[number]

    def close(self) -> None:
        """A second call does nothing."""
        self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
