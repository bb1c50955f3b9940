"""Every error that leaves this package is a `CheckpointError`.

CheckpointError
├── DeclarationError        components were declared wrongly, or not alike on all ranks
├── StructureError          a state dict cannot be stored, or differs where it must be equal
├── ReplicaMismatch         copies that must be equal are not
├── RankFailed              a rank raised something that is not a CheckpointError
├── RankTimeout             ranks did not answer before the deadline, or died
├── StorageError            the file system refused an operation
│   └── NoSpace             … because there is no room
├── RunDirectoryInUse       another live job writes to this run directory
├── CheckpointNotFound      no committed checkpoint where one was asked for
├── CheckpointQuarantined   there are some, and a person has set all of them aside
├── FormatError             a manifest or index cannot be believed
│   └── UnsupportedVersion  … because it was written by a newer major version
├── CheckpointDamaged       stored bytes do not have the digest that was recorded
├── LoadMismatch            the checkpoint and the job do not fit together
└── TornState               a load failed half-way; the live state is not one checkpoint's

The same error is raised on every rank: it crosses the store as plain data (`to_wire`, `from_wire`)
and names the rank, the component and the path that it is about.
"""

from typing import Any, Self


class CheckpointError(Exception):
    """The root of the tree. `rank`, `component` and `path` say where, as far as it is known."""

    def __init__(
        self, message: str, *, rank: int | None = None, component: str | None = None, path: str | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.rank = rank
        self.component = component
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return from_wire, (self.to_wire(),)

    def to_wire(self) -> dict[str, Any]:
        return {
            "type": type(self).__name__,
            "message": self.message,
            "rank": self.rank,
            "component": self.component,
            "path": self.path,
        }

    def at(self, *, rank: int | None = None, component: str | None = None, path: str | None = None) -> Self:
        """Fill in what is not known yet about where it happened; returns itself, for `raise err.at(...)`."""
        self.rank = self.rank if self.rank is not None else rank
        self.component = self.component if self.component is not None else component
        self.path = self.path if self.path is not None else path
        return self

    def in_component(self, key: str) -> Self:
        """The same error, with the component in its message too."""
        told = f"component {key!r}"
        message = self.message if self.message.startswith(told) else f"{told}: {self.message}"
        return type(self)(message, rank=self.rank, component=key, path=self.path)


class DeclarationError(CheckpointError, ValueError):
    """Components were declared wrongly, or differently on different ranks."""


class StructureError(CheckpointError):
    """A state dict holds something that cannot be stored, or differs between ranks that must be alike."""


class ReplicaMismatch(CheckpointError):
    """Ranks that must hold the same state hold different bytes."""


class RankFailed(CheckpointError):
    """A rank raised an exception of its own; the message quotes it."""


class RankTimeout(CheckpointError):
    """Ranks did not answer before the deadline, or are no longer alive."""


class StorageError(CheckpointError):
    """The file system refused an operation."""


class NoSpace(StorageError):
    """There is no room for the checkpoint."""


class RunDirectoryInUse(CheckpointError):
    """Another live job writes to this run directory."""


class CheckpointNotFound(CheckpointError):
    """There is no committed checkpoint where one was asked for."""


class CheckpointQuarantined(CheckpointError):
    """There are committed checkpoints, but all of them are quarantined: no choice among them is made without a person."""


class FormatError(CheckpointError):
    """A manifest or an index cannot be believed: it is malformed, truncated or fails its own digest."""


class UnsupportedVersion(FormatError):
    """Written by a newer major version of the format than this reader knows."""


class CheckpointDamaged(CheckpointError):
    """Stored bytes do not have the digest that was recorded for them."""


class LoadMismatch(CheckpointError):
    """The checkpoint and the running job do not fit together."""


class TornState(CheckpointError):
    """A load failed after live state was touched; load a checkpoint successfully before saving again."""


_BY_NAME = {
    cls.__name__: cls
    for cls in (
        CheckpointError,
        DeclarationError,
        StructureError,
        ReplicaMismatch,
        RankFailed,
        RankTimeout,
        StorageError,
        NoSpace,
        RunDirectoryInUse,
        CheckpointNotFound,
        CheckpointQuarantined,
        FormatError,
        UnsupportedVersion,
        CheckpointDamaged,
        LoadMismatch,
        TornState,
    )
}


def from_wire(data: dict[str, Any]) -> CheckpointError:
    """The error that `to_wire` described; a type that this version does not know becomes the root type."""
    cls = _BY_NAME.get(data["type"], CheckpointError)
    return cls(data["message"], rank=data["rank"], component=data["component"], path=data["path"])
