"""From what all ranks report of their writing to a manifest: pure."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from forgather_ckpt import hashtree, names
from forgather_ckpt.differences import Finding
from forgather_ckpt.errors import StorageError
from forgather_ckpt.manifest import NOT_COMPARED, ComponentRecord, EntryRecord, FileRecord, Validation
from forgather_ckpt.patterns import strongest
from forgather_ckpt.portions import Declared, Portion
from forgather_ckpt.topology import Ranks, Topology

Parts = Sequence[tuple[int, Portion]]
"""The portions of one entry, with their numbers."""


@dataclass(frozen=True)
class WriteReport:
    """What one rank says it has durably written."""

    files: Mapping[str, tuple[int, str]]
    indexes: Mapping[str, Sequence[tuple[str, str]]]
    num_bytes: Mapping[int, int]
    """Portion number -> bytes of tensors written."""
    digests: Mapping[int, str]
    """Portion number -> digest of what this rank wrote of it."""
    weights: Mapping[str, str]
    """Tensor name -> file, of the component `model` where several ranks write it."""
    check_seconds: Mapping[int, float]
    """Portion number -> what this rank spent on comparing it."""
    seconds: Mapping[str, float]
    """Of each phase."""

    def to_json(self) -> dict[str, Any]:
        return dict(self.__dict__)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "WriteReport":
        return cls(
            files={name: (size, digest) for name, (size, digest) in data["files"].items()},
            indexes={name: [(key, entry) for key, entry in pairs] for name, pairs in data["indexes"].items()},
            num_bytes={int(number): size for number, size in data["num_bytes"].items()},
            digests={int(number): digest for number, digest in data["digests"].items()},
            weights=data["weights"],
            check_seconds={int(number): seconds for number, seconds in data["check_seconds"].items()},
            seconds=data["seconds"],
        )


def file_records(reports: Sequence[WriteReport]) -> dict[str, FileRecord]:
    """All files by name; two ranks that claim one name are an error, never a choice."""
    records: dict[str, FileRecord] = {}
    for rank, report in enumerate(reports):
        for name, (size, digest) in report.files.items():
            if name in records:
                raise StorageError(f"ranks {records[name].writer} and {rank} both wrote {name!r}")
            records[name] = FileRecord(size, digest, rank)
    return records


def component_records(
    declared: Sequence[Declared],
    portions: Sequence[Portion],
    num_items: Mapping[tuple[str, str], int],
    findings: Mapping[int, Finding],
    reports: Sequence[WriteReport],
    metadata: Mapping[str, Mapping[str, Any]],
    topology: Topology,
) -> dict[str, ComponentRecord]:
    """The inventory of all components. `StorageError` where fewer or more bytes were written than agreed."""
    records = {}
    for component in declared:
        own = [(number, portion) for number, portion in enumerate(portions) if portion.component == component.key]
        sets = {group.id: group for group in component.sets(topology)}
        entries = {}
        for entry in dict.fromkeys(portion.entry for _, portion in own):
            parts = [(number, portion) for number, portion in own if portion.entry == entry]
            entries[entry] = EntryRecord(
                ranks=sets[entry].ranks if entry in sets else tuple(sorted({r for _, p in parts for r in p.holders})),
                coordinates=sets[entry].coordinates if entry in sets else None,
                writers=_writers(parts, reports),
                num_items=num_items[component.key, entry],
                num_bytes=_checked_bytes(parts, reports),
                digest=_joined(_digest(number, reports) for number, _ in parts),
                validation=_validation(parts, findings, reports),
                trusted=_trusted(parts, findings),
                excluded=_excluded(parts, findings),
            )
        records[component.key] = ComponentRecord(
            pattern=component.pattern,
            names="global" if component.is_global else "local",
            required=component.required,
            group=component.group,
            entries=entries,
            digest=_joined(entry.digest for entry in entries.values()),
            metadata=metadata[component.key],
        )
    return records


def weight_map(reports: Sequence[WriteReport]) -> dict[str, Any]:
    """The ecosystem's index of the component `model`; empty where one file holds it."""
    merged = {name: file for report in reports for name, file in report.weights.items()}
    if len(set(merged.values())) < 2:
        return {}
    return {"metadata": {}, "weight_map": dict(sorted(merged.items()))}


def timings(reports: Sequence[WriteReport]) -> dict[str, list[float]]:
    """Phase -> seconds by rank."""
    columns: dict[str, list[float]] = defaultdict(list)
    for report in reports:
        for phase, seconds in report.seconds.items():
            columns[phase].append(round(seconds, 6))
    return dict(columns)


def _validation(parts: Parts, findings: Mapping[int, Finding], reports: Sequence[WriteReport]) -> Validation:
    compared = [(portion, findings[number]) for number, portion in parts if number in findings]
    if not compared:
        return NOT_COMPARED
    num_items = sum(portion.num_items - len(finding.excluded) for portion, finding in compared)
    if not num_items:
        result = NOT_COMPARED.result
    elif all(finding.verdict.is_equal for _, finding in compared):
        result = "equal"
    else:
        result = "differed"
    holders = {rank for portion, _ in compared for rank in portion.holders}
    seconds = max(sum(reports[rank].check_seconds.get(number, 0.0) for number, _ in parts) for rank in holders)
    return Validation(strongest(finding.level for _, finding in compared), result, num_items, round(seconds, 6))


def _trusted(parts: Parts, findings: Mapping[int, Finding]) -> Ranks:
    """Where copies differ: the ranks of which all that they hold was stored, as they are in no minority."""
    minority = {rank for number, _ in parts if number in findings for rank in findings[number].verdict.minority}
    return tuple(sorted({rank for _, portion in parts for rank in portion.holders} - minority)) if minority else ()


def _excluded(parts: Parts, findings: Mapping[int, Finding]) -> tuple[str, ...]:
    left_out = {name for number, _ in parts if number in findings for name in findings[number].excluded}
    return tuple(sorted(set(map(names.item_name, left_out))))


def _writers(parts: Parts, reports: Sequence[WriteReport]) -> tuple[int, ...]:
    pairs = {(portion.component, portion.entry) for _, portion in parts}
    return tuple(
        rank
        for rank, report in enumerate(reports)
        if any(tuple(pair) in pairs for listed in report.indexes.values() for pair in listed)
    )


def _checked_bytes(parts: Parts, reports: Sequence[WriteReport]) -> int:
    total = 0
    for number, portion in parts:
        written = sum(report.num_bytes.get(number, 0) for report in reports)
        if written != portion.num_bytes:
            raise StorageError(
                f"component {portion.component!r}, entry {portion.entry!r}: {written} bytes were written, "
                f"{portion.num_bytes} agreed; nothing is committed",
                component=portion.component,
            )
        total += written
    return total


def _digest(number: int, reports: Sequence[WriteReport]) -> str:
    return _joined(report.digests[number] for report in reports if number in report.digests)


def _joined(digests: Iterable[str]) -> str:
    parts = [bytes.fromhex(digest) for digest in digests]
    return hashtree.join(parts).hex() if parts else hashtree.digest(b"").hex()
