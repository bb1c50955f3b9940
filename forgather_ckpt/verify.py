"""The offline check of a checkpoint: every byte of every file, against the digests taken when it was written.

Needs neither torch nor a job. Damage is told by what it hits: the file, the component, the item, the block. Memory:
the rows of the indexes, and a few blocks of 4 MiB.
"""

import os
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple, TypeVar

from forgather_ckpt import catalog, container, files, hashtree, paths, strict_json
from forgather_ckpt.dtypes import ITEM_BYTES, SAFETENSORS
from forgather_ckpt.errors import CheckpointDamaged, CheckpointError, FormatError
from forgather_ckpt.hashtree import BLOCK_BYTES
from forgather_ckpt.index import Index, IndexEntry, TensorRow
from forgather_ckpt.manifest import CheckpointManifest, FileRecord
from forgather_ckpt.pieces import Block, item_problems, requests
from forgather_ckpt.replication import describe

NUM_THREADS = 4
IN_FLIGHT = 8
"""Requests of at most a block each that are waiting or being hashed."""

T = TypeVar("T")
Entry = tuple[str, str]
"""`(component, entry)`."""
OnProgress = Callable[[int, int], None]


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a checkpoint, and what it hits as far as that is known."""

    file: str
    component: str | None
    item: str | None
    detail: str


@dataclass(frozen=True)
class Verification:
    """What the check of one checkpoint found."""

    path: Path
    step: int | None
    """None where the manifest cannot be read, and so is `digest`, which is the manifest's."""
    digest: str | None
    num_files: int
    num_bytes: int
    problems: tuple[Problem, ...]
    untidy: tuple[str, ...]
    """What lies in the directory and is no part of the checkpoint. Harms nothing."""
    seconds: float

    @property
    def is_good(self) -> bool:
        return not self.problems


def verify(path: str | Path, *, on_progress: OnProgress = lambda num_done, num_total: None) -> Verification:
    """Check one checkpoint directory; what is wrong is told, never raised.

    `on_progress` is told the number of bytes that have been checked, and of all.
    """
    started = time.perf_counter()
    path = Path(path)
    problems: list[Problem] = []
    manifest: CheckpointManifest | None = None
    refusal: CheckpointError | None = None
    try:
        manifest = catalog.read_checkpoint(path).manifest
    except CheckpointError as err:
        refusal = err
        manifest = _manifest_if_readable(path)
    if manifest is not None:
        with ThreadPoolExecutor(NUM_THREADS) as pool:
            problems += _Check(path, manifest, pool, on_progress).problems()
    if refusal is not None and not problems:
        problems.append(Problem(_file_of(refusal), None, None, refusal.message))
    return Verification(
        path=path,
        step=None if manifest is None else manifest.step,
        digest=None if manifest is None else manifest.digest,
        num_files=0 if manifest is None else len(manifest.files),
        num_bytes=0 if manifest is None else manifest.num_bytes,
        problems=tuple(problems),
        untidy=() if manifest is None else _untidy(path, manifest),
        seconds=time.perf_counter() - started,
    )


def _manifest_if_readable(path: Path) -> CheckpointManifest | None:
    """The manifest of what is not a committed checkpoint, so that the rest of the damage can be told too."""
    try:
        return CheckpointManifest.load(path / paths.MANIFEST)
    except CheckpointError:
        return None


def _file_of(refusal: CheckpointError) -> str:
    if isinstance(refusal, FormatError) and refusal.path is not None:
        return Path(refusal.path).name
    return paths.MANIFEST


def _untidy(path: Path, manifest: CheckpointManifest) -> tuple[str, ...]:
    known = {*manifest.files, paths.MANIFEST, paths.ANNOTATIONS}
    try:
        return tuple(sorted(entry.name for entry in os.scandir(path) if entry.name not in known))
    except OSError:
        return ()


class _Piece(NamedTuple):
    component: str
    row: TensorRow


class _Check:
    """The check of one checkpoint whose manifest is believed: the indexes first, then what they describe."""

    def __init__(
        self, path: Path, manifest: CheckpointManifest, pool: ThreadPoolExecutor, on_progress: OnProgress
    ) -> None:
        self._path = path
        self._manifest = manifest
        self._pool = pool
        self._on_progress = on_progress
        self._num_done = 0
        self._indexes: dict[str, Index] = {}
        self._unreadable: list[str] = []
        """Indexes that are damaged: what they alone describe cannot be checked."""

    def problems(self) -> Iterator[Problem]:
        for name in self._manifest.indexes:
            yield from self._check_index(name)
        yield from self._check_entries()
        pieces: dict[str, list[_Piece]] = defaultdict(list)
        for index in self._indexes.values():
            for entry in index.entries:
                for row in entry.tensors:
                    pieces[row.file].append(_Piece(entry.component, row))
        for name, record in self._manifest.files.items():
            if name in self._manifest.indexes:
                continue
            if (problem := _size_problem(self._path / name, record)) is not None:
                components = sorted({piece.component for piece in pieces[name]})
                yield _of_file(name, components, problem)
                continue
            try:
                if pieces[name]:
                    yield from self._check_tensors(name, record, pieces[name])
                else:
                    yield from self._check_whole(name, record)
            except CheckpointError as err:
                yield _of_file(name, sorted({piece.component for piece in pieces[name]}), err.message)

    def _advance(self, num_bytes: int) -> None:
        self._num_done += num_bytes
        self._on_progress(self._num_done, self._manifest.num_bytes)

    def _check_index(self, name: str) -> Iterator[Problem]:
        manifest = self._manifest
        expected = [tuple(pair) for pair in manifest.indexes[name]]
        components = list(dict.fromkeys(component for component, _ in expected))
        try:
            if (problem := _size_problem(self._path / name, manifest.files[name])) is not None:
                raise FormatError(problem)
            index = catalog.read_index(self._path, manifest, name)
            held = [(entry.component, entry.entry) for entry in index.entries]
            if index.writer != manifest.files[name].writer or held != expected:
                raise FormatError(
                    f"holds {held} of writer {index.writer}; the manifest says {expected} of writer "
                    f"{manifest.files[name].writer}"
                )
        except CheckpointDamaged:
            problem = "does not have the digest that the manifest gives"
        except CheckpointError as err:
            problem = err.message
        else:
            self._indexes[name] = index
            self._advance(manifest.files[name].size)
            return
        self._unreadable.append(name)
        yield _of_file(name, components, problem)

    def _check_entries(self) -> Iterator[Problem]:
        """Whether the indexes, joined, hold the items and bytes of each entry that the manifest counts."""
        parts: dict[Entry, list[tuple[str, IndexEntry]]] = defaultdict(list)
        for name, index in self._indexes.items():
            for part in index.entries:
                parts[part.component, part.entry].append((name, part))
        incomplete = {tuple(pair) for name in self._unreadable for pair in self._manifest.indexes[name]}
        for component, record in self._manifest.components.items():
            for entry, expected in record.entries.items():
                held = parts[component, entry]
                for name, part in held:
                    yield from _check_values(name, part)
                if (component, entry) in incomplete:
                    continue
                where = held[0][0] if held else paths.MANIFEST
                for item, detail in item_problems([part for _, part in held]):
                    yield Problem(where, component, item, detail)
                names = {name for _, part in held for name in _names(part)}
                num_bytes = sum(row.num_bytes for _, part in held for row in part.tensors)
                if (len(names), num_bytes) != (expected.num_items, expected.num_bytes):
                    yield Problem(
                        where,
                        component,
                        None,
                        f"entry {entry!r} has {len(names)} items of {num_bytes} bytes in the indexes; the manifest expects "
                        f"{expected.num_items} of {expected.num_bytes}",
                    )

    def _check_whole(self, name: str, record: FileRecord) -> Iterator[Problem]:
        """A file that no index describes: its digest is over all its bytes."""
        with files.typed_errors(self._path / name, "reading the checkpoint"):
            descriptor = files.open_to_read(self._path / name)
            try:
                digest = hashtree.digest_of_parts(_read_parts(descriptor, record.size, self._advance))
            finally:
                os.close(descriptor)
        if digest.hex() != record.digest:
            reason = "does not have the digest that the manifest gives"
            if self._unreadable:
                reason = f"cannot be checked: {self._missing_indexes()}, and no other index describes this file"
            yield _of_file(name, [], reason)

    def _missing_indexes(self) -> str:
        return f"{', '.join(self._unreadable)} cannot be read"

    def _check_tensors(self, name: str, record: FileRecord, pieces: list[_Piece]) -> Iterator[Problem]:
        # a piece without bytes stands before the one that begins where it does, as it does in the file
        pieces.sort(key=lambda piece: (piece.row.offset, piece.row.num_bytes))
        components = list(dict.fromkeys(piece.component for piece in pieces))
        gaps = list(_gaps(pieces, record.size))
        for start, stop in gaps:
            reason = f": {self._missing_indexes()}" if self._unreadable else ", they belong to no item or to several"
            yield _of_file(name, components, f"bytes {min(start, stop)}-{max(start, stop)} cannot be checked{reason}")
        with files.typed_errors(self._path / name, "reading the checkpoint"):
            descriptor = files.open_to_read(self._path / name)
            try:
                if not gaps and (problem := self._header_problem(descriptor, record, pieces)) is not None:
                    yield _of_file(name, components, problem)
                yield from self._check_blocks(descriptor, name, pieces)
            finally:
                os.close(descriptor)

    def _header_problem(self, descriptor: int, record: FileRecord, pieces: Sequence[_Piece]) -> str | None:
        """What is wrong with all that stands before the first piece, if something is.

        The file's digest is taken over the header that is there and the pieces as they should be, so that it tells
        the header's damage from that of the pieces.
        """
        size = pieces[0].row.offset
        if size <= container.MAX_HEADER_BYTES + container.ALIGNMENT:
            header = b"".join([bytes(part) for part in _read_parts(descriptor, size, self._advance)])
            digest = hashtree.file_digest(hashtree.digest(header), [piece.row.digest for piece in pieces])
            if digest.hex() == record.digest:
                return _header_disagrees(header, pieces)
        if self._unreadable:  # what seems to be the header may be pieces that a damaged index describes
            return f"bytes 0-{size} cannot be checked: {self._missing_indexes()}"
        return f"its header (bytes 0-{size}) does not have the digest that was recorded, or is another file's"

    def _check_blocks(self, descriptor: int, name: str, pieces: Sequence[_Piece]) -> Iterator[Problem]:
        damaged: dict[_Piece, list[Block[_Piece]]] = {}
        checked = _in_order(self._pool, lambda request: _damaged_blocks(descriptor, request), requests(pieces))
        for request, blocks in checked:
            self._advance(request[-1].stop - request[0].start)
            for block in blocks:
                damaged.setdefault(block.piece, []).append(block)
        for piece, blocks in damaged.items():
            yield Problem(name, piece.component, piece.row.name, _describe(piece.row, blocks))


def _of_file(name: str, components: Sequence[str], detail: str) -> Problem:
    """A problem of a whole file; of one component where the file is that component's alone."""
    if len(components) == 1:
        return Problem(name, components[0], None, detail)
    holds = f" (it holds items of {', '.join(map(repr, components))})" if components else ""
    return Problem(name, None, None, detail + holds)


def _size_problem(path: Path, record: FileRecord) -> str | None:
    size = files.regular_size(path)
    if size is None:
        return "is not a regular file" if os.path.lexists(path) else "is missing"
    if size != record.size:
        return f"has {size} bytes; the manifest expects {record.size}"
    return None


def _names(part: IndexEntry) -> Iterator[str]:
    yield from (row.name for row in part.tensors)
    yield from (row.name for row in part.values)
    yield from (row.name for row in part.aliases)


def _check_values(name: str, part: IndexEntry) -> Iterator[Problem]:
    for row in part.values:
        if hashtree.digest(strict_json.dumps(row.value)) != row.digest:
            yield Problem(name, part.component, row.name, "the value does not have the digest that was recorded")


def _gaps(pieces: Sequence[_Piece], size: int) -> Iterator[tuple[int, int]]:
    """Where a file's pieces, in file order, leave a hole up to the next piece or the file's end, or overlap."""
    position = pieces[0].row.offset
    for piece in pieces:
        if piece.row.offset != position:
            yield position, piece.row.offset
        position = piece.row.offset + piece.row.num_bytes
    if position != size:
        yield position, size


def _header_disagrees(header: bytes, pieces: Sequence[_Piece]) -> str | None:
    """Whether other readers of safetensors would find the same tensors as the index does."""
    try:
        if container.header_size(header, what="the header") != len(header):
            return "its header has another length than the index says"
        told = strict_json.loads(header[8:], what="its header", max_bytes=len(header))
    except FormatError as err:
        return err.message
    for _, row in pieces:
        start = row.offset - len(header)
        # a whole tensor has its own shape; a piece is a run of elements
        shape = row.shape if row.is_whole else (row.num_bytes // ITEM_BYTES[row.dtype],)
        expected = {
            "dtype": SAFETENSORS.get(row.dtype, "U8"),
            "shape": list(container.stored_shape(row.dtype, shape)),
            "data_offsets": [start, start + row.num_bytes],
        }
        key = row.name if row.key is None else row.key
        if not isinstance(told, dict) or told.get(key) != expected:
            return f"its header and the index disagree about {key!r}"
    return None


def _read_parts(descriptor: int, size: int, advance: Callable[[int], None]) -> Iterator[memoryview]:
    """The first `size` bytes of a file, a block at a time, each valid until the next is asked for."""
    buffer = memoryview(bytearray(min(size, BLOCK_BYTES)))
    position = 0
    while position < size:
        count = files.read_at(descriptor, buffer[: size - position], position)
        if count == 0:
            raise FormatError(f"ends at byte {position}; expected {size}")
        yield buffer[:count]
        position += count
        advance(count)


def _damaged_blocks(descriptor: int, request: Sequence[Block[_Piece]]) -> list[Block[_Piece]]:
    """Read neighbouring blocks and return those that are not what was written. On a thread of the pool."""
    start = request[0].start
    view = memoryview(bytearray(request[-1].stop - start))
    count = files.read_at(descriptor, view, start)
    return [
        block
        for block in request
        if block.stop - start > count or hashtree.digest(view[block.start - start : block.stop - start]) != block.digest
    ]


def _in_order(
    pool: ThreadPoolExecutor, work: Callable[[list[Block[_Piece]]], T], requests: Iterable[list[Block[_Piece]]]
) -> Iterator[tuple[list[Block[_Piece]], T]]:
    """Each request with its outcome, in order; at most `IN_FLIGHT` of them are under way."""
    waiting = iter(requests)
    in_flight: deque[tuple[list[Block[_Piece]], Future[T]]] = deque()
    try:
        while True:
            for request in islice(waiting, IN_FLIGHT - len(in_flight)):
                in_flight.append((request, pool.submit(work, request)))
            if not in_flight:
                return
            request, future = in_flight[0]
            outcome = future.result()
            in_flight.popleft()
            yield request, outcome
    finally:
        # the descriptor is closed after this: nothing may still be reading from it
        for _, future in in_flight:
            future.cancel()
        for _, future in in_flight:
            if not future.cancelled():
                future.exception()


def _describe(row: TensorRow, blocks: Sequence[Block[_Piece]]) -> str:
    total = hashtree.num_blocks(row.num_bytes)
    at = f"bytes {blocks[0].start}-{blocks[0].stop}"
    if len(blocks) == 1:
        return f"block {blocks[0].number + 1} of {total} ({at}) does not have the digest that was recorded"
    numbers = describe(tuple(block.number + 1 for block in blocks))
    return f"{len(blocks)} of {total} blocks ({numbers}; the first is {at}) do not have the digests that were recorded"
