"""The manifest: a checkpoint's commit record and inventory, `checkpoint_manifest.json`.

A directory is a checkpoint exactly if this file parses, has its own digest, and names files that exist with the
sizes it gives (`catalog.read_checkpoint`). It is small, O(components + files), and made for people to read.

Its `digest` is `xxh3_128` of the file's own bytes with the 32 hex digits of that digest replaced by zeros.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from forgather_ckpt import hashtree, paths, strict_json
from forgather_ckpt.errors import FormatError, UnsupportedVersion
from forgather_ckpt.patterns import SharingPattern, ValidationLevel, strongest
from forgather_ckpt.strict_json import Fields
from forgather_ckpt.topology import Coordinates, Ranks, Topology

FORMAT = "forgather_ckpt"
VERSION = "1.0"
MAX_BYTES = 64 << 20
KINDS = ("periodic", "epoch", "emergency", "final")

_NO_DIGEST = "0" * 32


@dataclass(frozen=True)
class FileRecord:
    """One data or index file. `digest` is the tree's file digest for tensors, of all bytes for an index."""

    size: int
    digest: str
    writer: int


@dataclass(frozen=True)
class Validation:
    """What was compared among the copies, and what came out.

    `result` is "equal", "differed" (saved all the same, from the majority alone, because of `on_mismatch="warn"`)
    or "not compared" (level NONE, or there is one copy only).
    """

    level: ValidationLevel
    result: str
    num_items: int = 0
    """How many were compared; of sharded items, each part that has several holders counts."""
    seconds: float = 0.0
    """What taking digests and comparing bytes took on the rank that it took longest."""


NOT_COMPARED = Validation(ValidationLevel.NONE, "not compared")


def summary(validations: Iterable[Validation]) -> Validation:
    """Several in one: the strongest level, the worst result, all items, the longest time."""
    found = list(validations)
    results = {one.result for one in found}
    return Validation(
        level=strongest(one.level for one in found),
        result=next((result for result in ("differed", "equal") if result in results), NOT_COMPARED.result),
        num_items=sum(one.num_items for one in found),
        seconds=max((one.seconds for one in found), default=0.0),
    )


@dataclass(frozen=True)
class EntryRecord:
    """One entry of a component: a namespace of items, stored once.

    `ranks` is the set whose state it is; `coordinates` its place on the mesh's other axes, if it came from one.
    """

    ranks: Ranks
    coordinates: Coordinates | None
    writers: Ranks
    num_items: int
    num_bytes: int
    digest: str
    validation: Validation = NOT_COMPARED
    trusted: Ranks = ()
    """Where copies differed, the ranks of which all that they held was stored: those in the minority of no item."""
    excluded: Sequence[str] = ()
    """The items that were not compared because the component says so: one rank's are stored."""


@dataclass(frozen=True)
class ComponentRecord:
    """One component: how it was shared, where it lies, what was checked."""

    pattern: SharingPattern
    names: str
    required: bool
    group: str | None
    entries: Mapping[str, EntryRecord]
    digest: str
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @property
    def validation(self) -> Validation:
        return summary(entry.validation for entry in self.entries.values())

    @property
    def trusted(self) -> dict[str, Ranks]:
        """By entry in which copies differed, the ranks of which all that they held was stored; there may be none."""
        return {name: entry.trusted for name, entry in self.entries.items() if entry.validation.result == "differed"}

    @property
    def excluded(self) -> dict[str, Sequence[str]]:
        """By entry, the items that were not compared."""
        return {name: entry.excluded for name, entry in self.entries.items() if entry.excluded}

    @property
    def num_items(self) -> int:
        return sum(entry.num_items for entry in self.entries.values())

    @property
    def num_bytes(self) -> int:
        return sum(entry.num_bytes for entry in self.entries.values())

    @property
    def writers(self) -> Ranks:
        return tuple(sorted({rank for entry in self.entries.values() for rank in entry.writers}))


@dataclass(frozen=True)
class CheckpointManifest:
    """A checkpoint's commit record and inventory. `CheckpointManifest.load(path)` reads and verifies one."""

    step: int
    sequence: int
    kind: str
    created: str
    """UTC, RFC 3339. For people only: nothing is ever ordered by it."""
    topology: Topology
    components: Mapping[str, ComponentRecord]
    files: Mapping[str, FileRecord]
    indexes: Mapping[str, Sequence[tuple[str, str]]]
    """For each index file the `(component, entry)` pairs of which it holds items."""
    epoch: float | None = None
    run_id: str | None = None
    parent: Mapping[str, Any] | None = None
    """The checkpoint that this run had resumed from or saved last: its step, sequence and digest."""
    omitted: Mapping[str, str] = field(default_factory=dict)
    """Optional components that could not be saved, each with the reason."""
    metrics: Mapping[str, Any] = field(default_factory=dict)
    training_args: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)
    timings: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """Seconds that each phase took, by rank."""
    elapsed_seconds: float | None = None
    """For which the run has been training, over all its lives, by the clock of rank 0."""
    digest: str = _NO_DIGEST

    @property
    def world_size(self) -> int:
        return self.topology.world_size

    @property
    def num_bytes(self) -> int:
        return sum(record.size for record in self.files.values())

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read the manifest of a checkpoint directory (or the file itself); `FormatError` if it cannot be believed."""
        file = Path(path)
        file = file / paths.MANIFEST if file.is_dir() else file
        try:
            with file.open("rb") as stream:
                data = stream.read(MAX_BYTES + 1)
        except OSError as err:
            raise FormatError(f"cannot read the manifest: {err}", path=str(file)) from err
        try:
            return cls.from_bytes(data)
        except FormatError as err:
            raise err.at(path=str(file)) from None

    def to_bytes(self) -> bytes:
        """The file's bytes, with their own digest in them."""
        data = strict_json.pretty(self._to_json())
        own = hashtree.digest(data).hex().encode()
        return data.replace(_NO_DIGEST.encode(), own, 1)

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        top = Fields(strict_json.loads(data, what="the manifest", max_bytes=MAX_BYTES), "the manifest")
        if top.text("format") != FORMAT:
            raise FormatError(f"the manifest is of format {top.text('format')!r}; expected {FORMAT!r}")
        check_version(top.text("version"), "the manifest")
        own = top.digest("digest")
        # `digest` comes right after format and version, so its first occurrence is the field itself
        blanked = data.replace(own.encode(), _NO_DIGEST.encode(), 1)
        if hashtree.digest(blanked).hex() != own:
            raise FormatError("the manifest does not have the digest that it claims; it was damaged or edited")
        try:
            return cls._from_json(top, own)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as err:
            if isinstance(err, FormatError):
                raise
            raise FormatError(f"the manifest is malformed: {err!r}") from None

    def _to_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "version": VERSION,
            "digest": _NO_DIGEST,
            "algorithm": hashtree.ALGORITHM,
            "sequence": self.sequence,
            "step": self.step,
            "epoch": self.epoch,
            "kind": self.kind,
            "created": self.created,
            **self.topology.to_json(),
            "run_id": self.run_id,
            "parent": self.parent,
            "components": {key: _component_to_json(record) for key, record in self.components.items()},
            "omitted": dict(self.omitted),
            "files": {
                name: {"size": record.size, "digest": record.digest, "writer": record.writer}
                for name, record in self.files.items()
            },
            "indexes": {name: [list(pair) for pair in pairs] for name, pairs in self.indexes.items()},
            "metrics": dict(self.metrics),
            "training_args": dict(self.training_args),
            "environment": dict(self.environment),
            "timings": {phase: list(seconds) for phase, seconds in self.timings.items()},
            **({} if self.elapsed_seconds is None else {"elapsed_seconds": self.elapsed_seconds}),
        }

    @classmethod
    def _from_json(cls, top: Fields, own: str) -> Self:
        if (algorithm := top.text("algorithm")) != hashtree.ALGORITHM:
            raise UnsupportedVersion(f"the manifest's digests are {algorithm!r}; this version reads xxh3_128")
        world_size = top.number("world_size")
        files = {}
        for name, data in top.mapping("files").items():
            if not paths.is_safe_file_name(name):
                raise FormatError(f"the manifest names the file {name!r}, which is not a plain file name")
            record = Fields(data, f"file {name!r}")
            files[name] = FileRecord(record.number("size"), record.digest("digest"), record.number("writer"))
        indexes = {name: [(key, entry) for key, entry in pairs] for name, pairs in top.mapping("indexes").items()}
        if missing := sorted(set(indexes) - set(files)):
            raise FormatError(f"the manifest's index files {missing} are not among its files")
        components = {
            key: _component_from_json(Fields(data, f"component {key!r}"), world_size)
            for key, data in top.mapping("components").items()
        }
        known = {(key, entry) for key, record in components.items() for entry in record.entries}
        if strays := sorted({pair for pairs in indexes.values() for pair in pairs} - known):
            raise FormatError(f"the manifest's indexes hold entries of no component: {strays[:3]}")
        return cls(
            step=top.number("step"),
            sequence=top.number("sequence"),
            kind=top.text("kind"),
            created=top.text("created"),
            topology=Topology.from_json(top.data, rank=0),
            components=components,
            files=files,
            indexes=indexes,
            epoch=top.data.get("epoch"),
            run_id=top.optional_text("run_id"),
            parent=top.data.get("parent"),
            omitted=top.mapping("omitted"),
            metrics=top.mapping("metrics"),
            training_args=top.mapping("training_args"),
            environment=top.mapping("environment"),
            timings=top.mapping("timings"),
            elapsed_seconds=top.optional_float("elapsed_seconds"),
            digest=own,
        )


def check_version(version: str, what: str) -> None:
    """Refuse a file of another major version; a newer minor version may only have added fields."""
    major = version.partition(".")[0]
    if major != VERSION.partition(".")[0]:
        raise UnsupportedVersion(
            f"{what} has format version {version!r}; this version reads {VERSION}. Update the package"
        )


def _component_to_json(record: ComponentRecord) -> dict[str, Any]:
    return {
        "pattern": record.pattern,
        "names": record.names,
        "required": record.required,
        "group": record.group,
        "items": record.num_items,
        "bytes": record.num_bytes,
        "digest": record.digest,
        "writers": list(record.writers),
        "validation": _validation_to_json(record.validation),
        "metadata": dict(record.metadata),
        "entries": {
            name: {
                "ranks": list(entry.ranks),
                "coordinates": None if entry.coordinates is None else [list(axis) for axis in entry.coordinates],
                "writers": list(entry.writers),
                "items": entry.num_items,
                "bytes": entry.num_bytes,
                "digest": entry.digest,
                "validation": {
                    **_validation_to_json(entry.validation),
                    "trusted": list(entry.trusted),
                    "excluded": list(entry.excluded),
                },
            }
            for name, entry in record.entries.items()
        },
    }


def _validation_to_json(validation: Validation) -> dict[str, Any]:
    return {
        "level": validation.level,
        "result": validation.result,
        "items": validation.num_items,
        "seconds": validation.seconds,
    }


def _component_from_json(data: Fields, world_size: int) -> ComponentRecord:
    return ComponentRecord(
        pattern=SharingPattern(data.text("pattern")),
        names=data.text("names"),
        required=data.flag("required"),
        group=data.optional_text("group"),
        entries={
            name: _entry_from_json(Fields(entry, f"{data.where}, entry {name!r}"), world_size)
            for name, entry in data.mapping("entries").items()
        },
        digest=data.digest("digest"),
        metadata=data.mapping("metadata"),
    )


def _entry_from_json(data: Fields, world_size: int) -> EntryRecord:
    ranks = tuple(data.numbers("ranks"))
    if not all(rank < world_size for rank in ranks):
        raise FormatError(f"{data.where} names ranks {ranks} of a job of {world_size}")
    coordinates = data.data.get("coordinates")
    told = data.mapping("validation") if "validation" in data.data else _NOTHING_TOLD
    validation = Fields(told, f"{data.where}, validation")
    return EntryRecord(
        ranks=ranks,
        coordinates=None if coordinates is None else tuple((axis, at, size) for axis, at, size in coordinates),
        writers=tuple(data.numbers("writers")),
        num_items=data.number("items"),
        num_bytes=data.number("bytes"),
        digest=data.digest("digest"),
        validation=Validation(
            level=ValidationLevel(validation.text("level")),
            result=validation.text("result"),
            num_items=validation.number("items"),
            seconds=float(validation.data.get("seconds", 0.0)),
        ),
        trusted=tuple(validation.numbers("trusted")),
        excluded=tuple(validation.texts("excluded")),
    )


_NOTHING_TOLD = {**_validation_to_json(NOT_COMPARED), "trusted": [], "excluded": []}
"""Of the entries of the first checkpoints."""
