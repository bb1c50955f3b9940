"""What differs between two checkpoints, told from their manifests and indexes: pure, no tensor's byte is read.

Compared is what is stored, however it was written: by how many ranks, into which files, whole or in pieces. A second
name of a tensor counts as that tensor. What only the bytes could tell is `UNKNOWN`, never guessed.
"""

import itertools
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import NamedTuple

from forgather_ckpt import hashtree, multilinear
from forgather_ckpt.boxes import Box
from forgather_ckpt.dtypes import ITEM_BYTES
from forgather_ckpt.errors import FormatError
from forgather_ckpt.hashtree import BLOCK_BYTES
from forgather_ckpt.index import Index, IndexEntry, TensorRow, ValueRow
from forgather_ckpt.manifest import CheckpointManifest, ComponentRecord, EntryRecord
from forgather_ckpt.patterns import SharingPattern
from forgather_ckpt.pieces import item_problems
from forgather_ckpt.topology import telling_axes


class Change(StrEnum):
    """How an item of A differs from the item of the same name in B."""

    ONLY_IN_A = "only in A"
    ONLY_IN_B = "only in B"
    KIND = "kind"
    """A tensor on one side, a value on the other."""
    STRUCTURE = "structure"
    """A tensor of another dtype or shape."""
    BYTES = "bytes"
    VALUE = "value"
    """Another typed JSON: `1` is not `1.0`."""
    UNKNOWN = "unknown"
    """A tensor of the same dtype and shape whose pieces were cut so that their digests do not make up comparable ones."""


class StoredTensor(NamedTuple):
    """A tensor as one checkpoint holds it: the rows of all its pieces."""

    dtype: str
    shape: tuple[int, ...]
    rows: tuple[TensorRow, ...]

    @property
    def num_elements(self) -> int:
        count = 1
        for length in self.shape:
            count *= length
        return count


class Item(NamedTuple):
    """An item as one checkpoint holds it; of a second name `content` is the tensor that it stands for."""

    name: str
    order: int
    content: StoredTensor | ValueRow
    tied_to: str
    """The first, in the order of names, of all names of this tensor."""


@dataclass(frozen=True)
class Difference:
    """One item that is not known to be equal."""

    component: str
    entry: str
    """A's name of the entry."""
    name: str
    change: Change
    a: Item | None
    b: Item | None

    @property
    def tensors(self) -> tuple[StoredTensor, StoredTensor] | None:
        """Both sides, where they are tensors of one dtype and shape, whose elements can be compared."""
        if self.change not in (Change.BYTES, Change.UNKNOWN) or self.a is None or self.b is None:
            return None
        one, other = self.a.content, self.b.content
        return (one, other) if isinstance(one, StoredTensor) and isinstance(other, StoredTensor) else None


@dataclass(frozen=True)
class Unmatched:
    """An entry whose set only one side has, such as rank 3's of a job of four: its items have nothing to be compared
    with, and are only counted."""

    entry: str
    num_items: int


@dataclass(frozen=True)
class ComponentComparison:
    """How one component compares. `differences` are in the order of the state dict."""

    key: str
    num_equal: int = 0
    differences: tuple[Difference, ...] = ()
    only_in_a: tuple[Unmatched, ...] = ()
    """All its entries, where B does not have the component."""
    only_in_b: tuple[Unmatched, ...] = ()
    num_retied: int = 0
    """Equal tensors that share their memory with other names in A than in B: equal now, but not trained alike."""

    def count(self, *changes: Change) -> int:
        """The number of items that differ in one of these ways, items of unmatched entries included."""
        counts = Counter(difference.change for difference in self.differences)
        counts[Change.ONLY_IN_A] += sum(entry.num_items for entry in self.only_in_a)
        counts[Change.ONLY_IN_B] += sum(entry.num_items for entry in self.only_in_b)
        return sum(counts[change] for change in changes)

    @property
    def num_items(self) -> int:
        """Of both sides together."""
        return self.num_equal + self.count(*Change)

    @property
    def is_equal(self) -> bool:
        """Known to be equal: same entries, same items."""
        return not (self.differences or self.only_in_a or self.only_in_b)

    @property
    def is_different(self) -> bool:
        """Known to differ."""
        return bool(self.only_in_a or self.only_in_b) or any(
            difference.change is not Change.UNKNOWN for difference in self.differences
        )


@dataclass(frozen=True)
class Comparison:
    """How two checkpoints compare, component by component in A's order, then what only B has."""

    components: tuple[ComponentComparison, ...]

    @property
    def is_equal(self) -> bool:
        return all(component.is_equal for component in self.components)

    @property
    def is_different(self) -> bool:
        return any(component.is_different for component in self.components)

    @property
    def differences(self) -> Iterator[Difference]:
        return (difference for component in self.components for difference in component.differences)

    def settled(self, is_equal: Callable[[Difference], bool]) -> "Comparison":
        """The comparison after `is_equal` has read what was `UNKNOWN`."""
        return Comparison(tuple(_settled(component, is_equal) for component in self.components))


@dataclass(frozen=True)
class Side:
    """One of the two checkpoints: its manifest, and how to get at an index file of it (verified, by its name)."""

    manifest: CheckpointManifest
    read_index: Callable[[str], Index]


def compare(a: Side, b: Side, components: Collection[str] | None = None) -> Comparison:
    """Compare two checkpoints, or only some `components` of them.

    Where the manifests tell that an entry is equal, its indexes are not read. `FormatError` where an index does not hold
    whole items.
    """
    ours, theirs = a.manifest.components, b.manifest.components
    keys = [key for key in dict.fromkeys([*ours, *theirs]) if components is None or key in components]
    pairs = {key: _matched(ours[key], theirs[key]) for key in keys if key in ours and key in theirs}
    our_witnesses, their_witnesses = _witnesses(a.manifest), _witnesses(b.manifest)
    to_read = {
        (key, one): (key, other)
        for key in pairs
        for one, other in pairs[key].items()
        if our_witnesses[key, one].isdisjoint(their_witnesses[key, other])
    }
    our_parts, their_parts = _parts(a, set(to_read)), _parts(b, set(to_read.values()))
    found = []
    for key in keys:
        matched = pairs.get(key, {})
        entries = []
        for one, other in matched.items():
            if (key, one) in to_read:
                entries.append(_compare_entry(key, one, items(our_parts[key, one]), items(their_parts[key, other])))
            else:
                entries.append(_Entry(ours[key].entries[one].num_items))
        found.append(
            ComponentComparison(
                key,
                num_equal=sum(entry.num_equal for entry in entries),
                differences=tuple(itertools.chain.from_iterable(entry.differences for entry in entries)),
                only_in_a=_unmatched(ours.get(key), set(matched)),
                only_in_b=_unmatched(theirs.get(key), set(matched.values())),
                num_retied=sum(entry.num_retied for entry in entries),
            )
        )
    return Comparison(tuple(found))


def algorithms_differ(a: str, b: str) -> str:
    """Why checkpoints whose digests are of two algorithms cannot be compared."""
    return (
        f"A has digests of {a!r} and B of {b!r}. Digests of different algorithms are never compared: they differ for "
        "equal bytes too. Load one of the two with the version that wrote it and save it with the other's"
    )


def items(parts: Sequence[IndexEntry]) -> dict[str, Item]:
    """All items of one entry, from what each writer stored of it; `FormatError` where they are not whole."""
    for name, problem in item_problems(parts):
        raise FormatError(
            f"component {parts[0].component!r}: item {name!r} {problem}; see `fgckpt verify`",
            component=parts[0].component,
        )
    rows: dict[str, list[TensorRow]] = defaultdict(list)
    names: dict[str, list[str]] = defaultdict(list)
    for part in parts:
        for row in part.tensors:
            rows[row.name].append(row)
        for alias in part.aliases:
            names[alias.target].append(alias.name)
    tied_to = {target: min(target, *others) for target, others in names.items()}
    tensors = {name: StoredTensor(own[0].dtype, own[0].shape, tuple(own)) for name, own in rows.items()}
    found = {name: Item(name, rows[name][0].order, tensor, tied_to.get(name, name)) for name, tensor in tensors.items()}
    for part in parts:
        for value in part.values:
            found[value.name] = Item(value.name, value.order, value, value.name)
        for alias in part.aliases:
            found[alias.name] = Item(alias.name, alias.order, tensors[alias.target], tied_to[alias.target])
    return found


def logical_digest(tensor: StoredTensor) -> bytes | None:
    """The digest over the whole tensor, if the index tells it: a writer had it whole, or pieces that begin at
    multiples of a block make it up."""
    for row in tensor.rows:
        if row.is_whole:
            return row.digest
        if row.logical is not None:
            return row.logical
    if any(row.box is not None for row in tensor.rows):
        return None
    pieces = sorted((row for row in tensor.rows if row.num_bytes), key=lambda row: row.bounds)
    if not pieces or any(row.bounds[0] % BLOCK_BYTES for row in pieces):
        return None
    return hashtree.join([digest for row in pieces for digest in row.block_digests()])


def device_digests(tensor: StoredTensor) -> list[bytes] | None:
    """The block digests of the whole tensor by the algorithm of devices, if all of its parts lay on some when they were
    written: their sums."""
    if any(row.lanes is None and row.bounds[0] == 0 for row in tensor.rows):
        return None
    num_blocks = hashtree.num_blocks(tensor.num_elements * ITEM_BYTES[tensor.dtype])
    added: list[list[bytes]] = [[] for _ in range(num_blocks)]
    for lanes in (row.lanes for row in tensor.rows if row.lanes is not None):
        for number, at in enumerate(range(0, len(lanes.digests), hashtree.DIGEST_BYTES)):
            added[lanes.first + number].append(lanes.digests[at : at + hashtree.DIGEST_BYTES])
    return [multilinear.total(parts) for parts in added]


def compare_items(a: Item | None, b: Item | None) -> Change | None:
    """How two items of one name differ; None where they are equal."""
    if a is None or b is None:
        return Change.ONLY_IN_B if a is None else Change.ONLY_IN_A
    one, other = a.content, b.content
    if isinstance(one, ValueRow) and isinstance(other, ValueRow):
        return None if one.digest == other.digest else Change.VALUE
    if not isinstance(one, StoredTensor) or not isinstance(other, StoredTensor):
        return Change.KIND
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return Change.STRUCTURE
    return _compare_tensors(one, other)


def _compare_tensors(a: StoredTensor, b: StoredTensor) -> Change | None:
    one, other = logical_digest(a), logical_digest(b)
    if one is not None and other is not None:
        return None if one == other else Change.BYTES
    our_pieces, their_pieces = _pieces(a), _pieces(b)
    if our_pieces.keys() == their_pieces.keys():  # cut alike, so each piece has its counterpart
        return None if our_pieces == their_pieces else Change.BYTES
    our_sums, their_sums = device_digests(a), device_digests(b)
    if our_sums is not None and their_sums is not None:
        return None if our_sums == their_sums else Change.BYTES
    # whatever pieces are the same elements on both sides: one that differs is enough
    common = our_pieces.keys() & their_pieces.keys()
    return Change.BYTES if any(our_pieces[cut] != their_pieces[cut] for cut in common) else Change.UNKNOWN


def _pieces(tensor: StoredTensor) -> dict[tuple[Box, tuple[int, int]], bytes]:
    """The digests of a tensor's pieces, by which elements they are; empty ones tell nothing."""
    size = ITEM_BYTES[tensor.dtype]
    whole = tuple((0, length) for length in tensor.shape)
    found = {}
    for row in tensor.rows:
        if row.num_bytes:
            start, stop = row.bounds
            found[whole if row.box is None else row.box, (start // size, stop // size)] = row.digest
    return found


def _matched(a: ComponentRecord, b: ComponentRecord) -> dict[str, str]:
    """Entries of the same set, A's name to B's: found again as a load would find them."""
    is_group = all(record.names == "local" and record.pattern is SharingPattern.PER_GROUP for record in (a, b))
    has_places = all(entry.coordinates is not None for record in (a, b) for entry in record.entries.values())

    def place(name: str, entry: EntryRecord) -> Hashable:
        if is_group and has_places and entry.coordinates is not None:
            return telling_axes(entry.coordinates)
        return entry.ranks if is_group else name

    theirs = {place(name, entry): name for name, entry in b.entries.items()}
    places = {name: place(name, entry) for name, entry in a.entries.items()}
    return {name: theirs[at] for name, at in places.items() if at in theirs}


def _witnesses(manifest: CheckpointManifest) -> Mapping[tuple[str, str], set[Hashable]]:
    """What a manifest says of each entry that is equal on two sides only if all its items are.

    The digests of the index files that hold it; and its own digest if it had one writer, who wrote whole tensors. The
    digest of an entry of several writers does not say which elements a piece is.
    """
    indexes: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name, held in manifest.indexes.items():
        for component, entry in held:
            indexes[component, entry].append(manifest.files[name].digest)
    found: dict[tuple[str, str], set[Hashable]] = {}
    for key, record in manifest.components.items():
        for name, own in record.entries.items():
            found[key, name] = {("indexes", *sorted(indexes[key, name]))} if indexes[key, name] else set()
            if len(own.writers) == 1:
                found[key, name].add(("entry", own.digest))
    return found


def _unmatched(record: ComponentRecord | None, matched: Collection[str]) -> tuple[Unmatched, ...]:
    entries = {} if record is None else record.entries
    return tuple(Unmatched(name, entry.num_items) for name, entry in entries.items() if name not in matched)


def _parts(side: Side, wanted: Collection[tuple[str, str]]) -> Mapping[tuple[str, str], list[IndexEntry]]:
    """What each writer stored of the wanted `(component, entry)` pairs. Only indexes that hold some are read."""
    parts: dict[tuple[str, str], list[IndexEntry]] = defaultdict(list)
    for name, held in side.manifest.indexes.items():
        if wanted and not {(component, entry) for component, entry in held}.isdisjoint(wanted):
            for part in side.read_index(name).entries:
                if (part.component, part.entry) in wanted:
                    parts[part.component, part.entry].append(part)
    return parts


class _Entry(NamedTuple):
    """How the items of one entry compare."""

    num_equal: int
    differences: Sequence[Difference] = ()
    num_retied: int = 0


def _compare_entry(component: str, entry: str, a: Mapping[str, Item], b: Mapping[str, Item]) -> _Entry:
    differences = []
    num_equal = num_retied = 0
    for name in _in_order(a, b):
        one, other = a.get(name), b.get(name)
        change = compare_items(one, other)
        if change is not None:
            differences.append(Difference(component, entry, name, change, one, other))
        elif one is not None and other is not None:
            num_equal += 1
            num_retied += one.tied_to != other.tied_to
    return _Entry(num_equal, differences, num_retied)


def _in_order(a: Mapping[str, Item], b: Mapping[str, Item]) -> Iterable[str]:
    """All names in the order of A's state dict; what only B has stands where it stood there."""
    return sorted({**b, **a}, key=lambda name: ((a.get(name) or b[name]).order, name))


def _settled(component: ComponentComparison, is_equal: Callable[[Difference], bool]) -> ComponentComparison:
    kept = []
    for difference in component.differences:
        if difference.change is not Change.UNKNOWN:
            kept.append(difference)
        elif not is_equal(difference):
            kept.append(replace(difference, change=Change.BYTES))
    num_settled = len(component.differences) - len(kept)
    return replace(component, num_equal=component.num_equal + num_settled, differences=tuple(kept))
