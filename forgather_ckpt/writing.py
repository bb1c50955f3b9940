"""Writing this rank's part of a checkpoint: tensors into safetensors files, the rest into its index.

Tensors are written from where they lie, block by block: hashed, written, forgotten. Nothing but what is not
contiguous or not in host memory is copied, a few blocks at a time.
"""

import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch

from forgather_ckpt import container, files, hashtree, index, memory, names, paths, values
from forgather_ckpt.container import Slot
from forgather_ckpt.errors import CheckpointError
from forgather_ckpt.hashtree import BLOCK_BYTES
from forgather_ckpt.index import AliasRow, IndexEntry, Lanes, TensorRow, ValueRow
from forgather_ckpt.structure import AliasItem, TensorItem, ValueItem

SMALL_BYTES = 1 << 20
"""A component of which a rank writes less than this shares one file with other such components."""
IN_FLIGHT_BYTES = 16 * BLOCK_BYTES


class OwnedPiece(NamedTuple):
    """Bytes `start` to `stop`, in C order, of a tensor, or of a box of one, that this rank is to write."""

    item: TensorItem
    start: int
    stop: int
    expected: tuple[bytes, ...] | None = None
    """Block digests of the whole item, where the replication check has taken them just before."""
    lanes: Lanes | None = None
    """What the whole item adds to the digests of its tensor, for the first piece of it."""

    @property
    def is_all(self) -> bool:
        """Whether it is the whole item."""
        return self.stop - self.start == self.item.num_bytes

    @property
    def is_whole(self) -> bool:
        """Whether it is a whole tensor."""
        return self.is_all and self.item.box is None

    @property
    def range(self) -> tuple[int, int] | None:
        """The elements of the item that it is; None for all."""
        size = self.item.tensor.element_size()
        return None if self.is_all else (self.start // size, self.stop // size)


@dataclass(frozen=True)
class Assignment:
    """What this rank writes of one entry of a component."""

    component: str
    entry: str
    pieces: Sequence[OwnedPiece]
    values: Sequence[ValueItem] = ()
    aliases: Sequence[AliasItem] = ()
    num_writers: int = 1
    """How many ranks may write the component; it is part of the file's name only."""

    @property
    def num_bytes(self) -> int:
        return sum(piece.stop - piece.start for piece in self.pieces)


@dataclass(frozen=True)
class Written:
    """What a rank has durably written: its files, which of them are indexes of what, and the rows in them."""

    files: Mapping[str, tuple[int, str]] = field(default_factory=dict)
    """Name -> (size, digest)."""
    indexes: Mapping[str, Sequence[tuple[str, str]]] = field(default_factory=dict)
    entries: Sequence[IndexEntry] = ()


class _Placed(NamedTuple):
    assignment: int
    piece: OwnedPiece
    key: str

    @property
    def slot(self) -> Slot:
        dtype = self.piece.item.dtype
        if self.piece.is_whole:
            return Slot(self.key, dtype, self.piece.item.shape)
        size = self.piece.item.tensor.element_size()
        return Slot(self.key, dtype, ((self.piece.stop - self.piece.start) // size,))


def write(
    directory: Path,
    assignments: Sequence[Assignment],
    *,
    writer: int,
    stems: Mapping[str, str],
    on_progress: Callable[[], None] = lambda: None,
) -> Written:
    """Write and sync all files of this rank; `on_progress` is called with every block or so.

    `StorageError` where the file system refuses; `CheckpointError` where a tensor is no longer what was checked.
    """
    written: dict[str, tuple[int, str]] = {}
    rows: list[list[TensorRow]] = [[] for _ in assignments]
    with files.typed_errors(directory, "writing the checkpoint"), ThreadPoolExecutor(memory.num_threads()) as pool:
        for name, batch in _files(assignments, writer, stems):
            size, digest, batch_rows = _write_file(directory / name, batch, pool, on_progress)
            written[name] = (size, digest.hex())
            for placed, row in zip(batch, batch_rows, strict=True):
                rows[placed.assignment].append(row)
        entries = [_index_entry(assignment, tensors) for assignment, tensors in zip(assignments, rows, strict=True)]
        indexes: dict[str, list[tuple[str, str]]] = {}
        for part, content in enumerate(index.split(writer, entries) if entries else ()):
            name, data = paths.index(writer, part), content.to_bytes()
            files.write_new(directory / name, data)
            written[name] = (len(data), hashtree.digest(data).hex())
            indexes[name] = [(entry.component, entry.entry) for entry in content.entries]
    return Written(written, indexes, entries)


def _files(
    assignments: Sequence[Assignment], writer: int, stems: Mapping[str, str]
) -> Iterator[tuple[str, list[_Placed]]]:
    """Which pieces go into which file, in file order: falling element size, then the order of the state dict."""
    small: list[tuple[int, OwnedPiece]] = []
    for number, assignment in enumerate(assignments):
        pieces = [(number, piece) for piece in assignment.pieces]
        if assignment.num_bytes < SMALL_BYTES:
            small += pieces
            continue
        for part, batch in enumerate(_batches(assignments, pieces)):
            stem = stems[assignment.component]
            yield paths.tensors(stem, writer, part, num_writers=assignment.num_writers), batch
    for part, batch in enumerate(_batches(assignments, small)):
        yield paths.small_tensors(writer, part), batch


def _batches(assignments: Sequence[Assignment], pieces: Sequence[tuple[int, OwnedPiece]]) -> Iterator[list[_Placed]]:
    batch: dict[str, _Placed] = {}
    header_bytes = 0
    for number, piece in sorted(
        pieces, key=lambda one: (-one[1].item.tensor.element_size(), one[0], one[1].item.order)
    ):
        key = _key(assignments[number], piece, batch)
        placed = _Placed(number, piece, key)
        cost = container.header_cost(placed.slot)
        if len(batch) == container.MAX_ITEMS or header_bytes + cost > container.MAX_HEADER_BYTES:
            yield list(batch.values())
            batch, header_bytes = {}, 0
        batch[key] = placed
        header_bytes += cost
    if batch:
        yield list(batch.values())


def _key(assignment: Assignment, piece: OwnedPiece, taken: Mapping[str, object]) -> str:
    """The tensor's key in its file: its name if it can be, with box and range of elements where it is a piece."""
    key = piece.item.name
    if piece.item.box is not None:
        key = f"{key}#{names.box_text(piece.item.box)}"
    if piece.range is not None:
        key = f"{key}#{names.box_text([piece.range])}"
    while not container.is_free(key, taken):
        key = f"{assignment.component}:{key}"
    return key


def _write_file(
    path: Path, batch: Sequence[_Placed], pool: ThreadPoolExecutor, on_progress: Callable[[], None]
) -> tuple[int, bytes, list[TensorRow]]:
    layout = container.lay_out([placed.slot for placed in batch])
    descriptor = files.create(path, layout.size)
    try:
        files.write_at(descriptor, layout.header, 0)
        digests = _write_pieces(descriptor, batch, layout.offsets, pool, on_progress)
        os.fsync(descriptor)
        size = os.fstat(descriptor).st_size
    finally:
        os.close(descriptor)
    rows = []
    for placed, offset, blocks in zip(batch, layout.offsets, digests, strict=True):
        rows.append(_row(placed, path.name, offset, blocks))
    file_digest = hashtree.file_digest(hashtree.digest(layout.header), [row.digest for row in rows])
    return size, file_digest, rows


def _write_pieces(
    descriptor: int,
    batch: Sequence[_Placed],
    offsets: Sequence[int],
    pool: ThreadPoolExecutor,
    on_progress: Callable[[], None],
) -> list[list[bytes]]:
    """Write all pieces and return each one's block digests.

    Runs of small pieces are one request; large pieces are one request a block, so that several threads work on one
    tensor. At most `IN_FLIGHT_BYTES` are being hashed and written at a time.
    """
    digests: list[list[bytes]] = [[] for _ in batch]
    in_flight: deque[tuple[int, Sequence[int], Future[list[bytes]]]] = deque()
    pending_bytes = 0

    def settle(limit: int) -> None:
        nonlocal pending_bytes
        while in_flight and pending_bytes > limit:
            size, owners, future = in_flight.popleft()
            for number, digest in zip(owners, future.result(), strict=True):
                digests[number].append(digest)
            pending_bytes -= size
            on_progress()

    def submit(parts: list[torch.Tensor], owners: Sequence[int], offset: int) -> None:
        nonlocal pending_bytes
        size = sum(part.numel() for part in parts)
        in_flight.append((size, owners, pool.submit(_write_parts, descriptor, parts, offset)))
        pending_bytes += size
        settle(IN_FLIGHT_BYTES)

    run: list[torch.Tensor] = []
    run_start, run_bytes = 0, 0
    try:
        for number, (placed, offset) in enumerate(zip(batch, offsets, strict=True)):
            piece = placed.piece
            length = piece.stop - piece.start
            flat = memory.flat_bytes(piece.item.tensor)[piece.start : piece.stop]
            if run and run_bytes + length > BLOCK_BYTES:
                submit(run, range(number - len(run), number), run_start)
                run, run_bytes = [], 0
            if length > BLOCK_BYTES:
                for start, stop in hashtree.block_bounds(length):
                    submit([flat[start:stop]], [number], offset + start)
            else:
                run_start = offset if not run else run_start
                run.append(flat)
                run_bytes += length
        if run:
            submit(run, range(len(batch) - len(run), len(batch)), run_start)
        settle(-1)
    finally:
        # the file is closed next: nobody may still write to its descriptor, which may be another file's by then
        for _, _, future in in_flight:
            future.cancel()
        wait([future for _, _, future in in_flight])
    return digests


def _write_parts(descriptor: int, parts: Sequence[torch.Tensor], offset: int) -> list[bytes]:
    """Hash and write neighbouring parts (a block together at most), on a thread of the pool.

    From a copy, so that what is stored has the digest that is recorded, whatever another thread does to the state.
    """
    copy, views = memory.gathered(parts)
    digests = [hashtree.digest(view) for view in views]
    files.write_at(descriptor, copy, offset)
    files.start_writeback(descriptor, offset, len(copy))
    return digests


def _row(placed: _Placed, file: str, offset: int, blocks: Sequence[bytes]) -> TensorRow:
    piece = placed.piece
    item = piece.item
    if piece.expected is not None:
        first = piece.start // BLOCK_BYTES
        if piece.expected[first : first + len(blocks)] != tuple(blocks):
            raise changed(item.name)
    is_known = piece.expected is not None and item.box is None and not piece.is_whole
    logical = hashtree.join(piece.expected) if is_known and piece.expected else None
    return TensorRow(
        item.name,
        item.order,
        item.dtype,
        item.shape,
        file,
        offset,
        hashtree.join(blocks),
        box=item.box,
        range=piece.range,
        key=None if placed.key == item.name else placed.key,
        blocks=tuple(blocks) if len(blocks) > 1 else (),
        logical=logical,
        lanes=piece.lanes,
    )


def changed(name: str) -> CheckpointError:
    """The error of a tensor that is no longer what was compared."""
    return CheckpointError(
        f"{name!r} changed while it was being saved; nothing may modify the state until the call returns"
    )


def _index_entry(assignment: Assignment, tensors: Sequence[TensorRow]) -> IndexEntry:
    return IndexEntry(
        assignment.component,
        assignment.entry,
        tensors=tuple(tensors),
        values=tuple(
            ValueRow(item.name, item.order, values.encode(item.value), hashtree.digest(item.data))
            for item in assignment.values
        ),
        aliases=tuple(AliasRow(*item) for item in assignment.aliases),
    )
