"""Which stored entries a rank's component is loaded from: pure, from the manifest and the topology."""

from dataclasses import dataclass
from typing import assert_never

from forgather_ckpt.component import StateComponent
from forgather_ckpt.errors import LoadMismatch
from forgather_ckpt.manifest import ComponentRecord
from forgather_ckpt.patterns import SharingPattern
from forgather_ckpt.portions import ENTRY_OF_ALL
from forgather_ckpt.replication import describe
from forgather_ckpt.topology import RankSet, Topology, same_place, sets_of


@dataclass(frozen=True)
class Resize:
    """The rank's set is not found again; the component's `on_resize` decides. `reason` says what differs."""

    reason: str


def entry_for(component: StateComponent, record: ComponentRecord, old: Topology, new: Topology) -> str | Resize:
    """The entry that holds this rank's state of `component`, or what keeps it from being found.

    `LoadMismatch` where the component was shared in another way when it was saved.
    """
    check_pattern(component, record)
    if not _fits(component, record):
        return Resize(f"it was saved as {record.pattern.name} with {record.names} names")
    found: str | Resize = ENTRY_OF_ALL
    if record.names == "local":
        found = _find(component.sharing_pattern, _own_set(component, new), record, old, new)
    if isinstance(found, str) and found not in record.entries:
        raise LoadMismatch(
            f"component {component.key!r}: the checkpoint has no state for {found!r} (it held nothing when saved), and "
            f"rank {new.rank} holds some; declare stateful=None there",
            component=component.key,
        )
    return found


def _fits(component: StateComponent, record: ComponentRecord) -> bool:
    return record.names == component.names and (component.is_global or record.pattern is component.sharing_pattern)


def check_pattern(component: StateComponent, record: ComponentRecord) -> None:
    """Global names can be read by any rank of any layout; local ones only under the pattern they were saved with, or
    by a function that makes the new state of the old entries."""
    if _fits(component, record) or callable(component.on_resize):
        return
    raise LoadMismatch(
        f"component {component.key!r} was saved as {record.pattern.name} with {record.names} names, and is declared "
        f"{component.sharing_pattern.name} with {component.names} names now; declare it as "
        "it was saved, give a function as on_resize, load without it (components=), or start that part afresh",
        component=component.key,
    )


def _own_set(component: StateComponent, topology: Topology) -> RankSet:
    for group in sets_of(component.sharing_pattern, component.process_group_name, topology):
        if topology.rank in group.ranks:
            return group
    raise LoadMismatch(
        f"component {component.key!r}: rank {topology.rank} is in no group {component.process_group_name!r}, but holds "
        "state; declare stateful=None there",
        component=component.key,
    )


def _find(pattern: SharingPattern, own: RankSet, record: ComponentRecord, old: Topology, new: Topology) -> str | Resize:
    match pattern:
        case SharingPattern.PER_RANK:
            if old.world_size != new.world_size:
                return Resize(f"it was saved by {old.world_size} ranks, now there are {new.world_size}")
            return own.id
        case SharingPattern.PER_NODE:
            if len(old.nodes) != len(new.nodes):
                return Resize(f"it was saved on {len(old.nodes)} nodes, now there are {len(new.nodes)}")
            return own.id
        case SharingPattern.PER_GROUP:
            for name, entry in record.entries.items():
                if own.coordinates is not None and entry.coordinates is not None:
                    is_same = same_place(entry.coordinates, own.coordinates)
                else:
                    is_same = entry.ranks == own.ranks
                if is_same:
                    return name
            saved = "; ".join(f"{name} (ranks {describe(entry.ranks)})" for name, entry in record.entries.items())
            return Resize(f"no saved group is {own.id!r} (ranks {describe(own.ranks)}); saved: {saved}")
        case SharingPattern.GLOBAL | SharingPattern.REPLICATED:
            return ENTRY_OF_ALL
    assert_never(pattern)
