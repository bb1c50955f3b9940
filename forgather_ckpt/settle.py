"""Take every component's state on this rank, and agree with the others on what there is to store."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from forgather_ckpt.agreement import (
    Contribution,
    Entry,
    Table,
    contributions,
    differing_sets,
    entry_of_one,
    entry_of_several,
    first_difference,
    first_problem,
)
from forgather_ckpt.comm import Comm
from forgather_ckpt.component import StateComponent
from forgather_ckpt.declarations import agreed
from forgather_ckpt.errors import CheckpointError, RankFailed, StructureError
from forgather_ckpt.memory import wait_for_devices
from forgather_ckpt.patterns import TRAITS
from forgather_ckpt.portions import Declared, Portion, Report
from forgather_ckpt.structure import State, capture
from forgather_ckpt.topology import Topology

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settlement:
    """What will be stored: this rank's states, and what is equal on all ranks: portions, and what is left out."""

    states: Mapping[str, State]
    portions: tuple[Portion, ...]
    num_items: Mapping[tuple[str, str], int]
    """Of each entry of each component."""
    omitted: Mapping[str, str]
    """Optional components that could not be taken, with the reason."""


def settle(comm: Comm, topology: Topology, components: Sequence[StateComponent]) -> Settlement:
    """Call every `state_dict()` in order of declaration and agree on the structure, one small message a rank.

    Structure digests must be equal inside each set. Components with global names in several sets exchange their
    name tables too. A difference or an unstorable leaf is one error on every rank, before anything is written.
    """
    states: dict[str, State] = {}
    reported: list[list[list[Any] | None]] = []

    def report() -> list[list[Any] | None]:
        reports = capture_all(components, topology, states)
        return [None if report is None else report.to_json() for report in reports]

    def first(columns: list[list[list[Any] | None]]) -> dict[str, Any]:
        reported.extend(columns)
        return _decide(declared, topology, columns, {})

    declared = agreed(components)
    told = comm.agree("comparing structures", report, first)
    if wanted := told["tables"]:

        def tables() -> dict[str, Table]:
            return {key: states[key].table() for key, ranks in wanted.items() if comm.rank in ranks}

        def decide(columns: list[dict[str, Table]]) -> dict[str, Any]:
            tables = {
                key: {rank: column[key] for rank, column in enumerate(columns) if key in column} for key in wanted
            }
            return _decide(declared, topology, reported, tables)

        told = comm.agree("comparing structures", tables, decide)
    for key, reason in told["omitted"].items():
        logger.warning("component %r is left out of the checkpoint: %s", key, reason)
    portions, num_items = [], {}
    for key, entry, count, own in told["entries"]:
        num_items[key, entry] = count
        portions += [Portion.from_json(data) for data in own]
    return Settlement(states, tuple(portions), num_items, told["omitted"])


def capture_all(
    components: Sequence[StateComponent], topology: Topology, states: dict[str, State]
) -> list[Report | None]:
    """Take the state of every component into `states`, and report each; None where this rank holds nothing.

    `state_dict()` may be a collective, so each is called once, in order, whatever the ones before did; the first
    failure of a required component is raised at the end.
    """
    failures: list[CheckpointError] = []
    reports: list[Report | None] = []
    for component in components:
        taken = _take(component, is_wanted=holds_state(component, topology))
        if isinstance(taken, State):
            states[component.key] = taken
            reports.append(Report(taken.structure_digest().hex(), taken.num_items, taken.held()))
        elif taken is None:
            reports.append(None)
        else:
            reports.append(Report(problem=taken.message))
            if component.required:
                failures.append(taken)
    if failures:
        raise failures[0]
    wait_for_devices(item.tensor for state in states.values() for item in state.tensors.values())
    return reports


def capture_live(components: Sequence[StateComponent]) -> tuple[dict[str, State], dict[str, str]]:
    """The live states that this rank holds, and of optional components those that could not be taken, by key.

    As in a save, every `state_dict()` is called once; the first failure of a required component is raised at the end.
    """
    states: dict[str, State] = {}
    problems: dict[str, str] = {}
    failures: list[CheckpointError] = []
    for component in components:
        taken = _take(component, is_wanted=True)
        if isinstance(taken, State):
            states[component.key] = taken
        elif taken is not None and component.required:
            failures.append(taken)
        elif taken is not None:
            problems[component.key] = taken.message
    if failures:
        raise failures[0]
    return states, problems


def _take(component: StateComponent, *, is_wanted: bool) -> State | CheckpointError | None:
    if component.stateful is None:
        return None
    try:
        state_dict = component.stateful.state_dict()
        return capture(state_dict) if is_wanted else None
    except StructureError as err:
        return StructureError(f"component {component.key!r}: {err.message}", component=component.key)
    except Exception as err:
        failure = RankFailed(
            f"component {component.key!r}: state_dict() raised {type(err).__name__}: {err}", component=component.key
        )
        failure.__cause__ = err
        return failure


def holds_state(component: StateComponent, topology: Topology) -> bool:
    """Whether this rank's state of the component counts: in uncompared sets only the first rank's does."""
    if TRAITS[component.sharing_pattern].compared:
        return True
    declared = agreed([component])[0]
    return any(group.ranks[0] == topology.rank for group in declared.sets(topology))


Columns = Sequence[Sequence[list[Any] | None]]
"""By rank, the reports of all components."""


def _decide(
    declared: Sequence[Declared], topology: Topology, columns: Columns, tables: Mapping[str, Mapping[int, Table]]
) -> dict[str, Any]:
    """Entries and omissions; and where it takes tables to name a difference or to merge names, whose, by component."""
    entries: list[list[Any]] = []
    omitted: dict[str, str] = {}
    wanted: dict[str, list[int]] = {}
    for number, component in enumerate(declared):
        reports = {rank: Report.from_json(one) for rank, column in enumerate(columns) if (one := column[number])}
        if (problem := first_problem(component, reports)) is not None:
            omitted[component.key] = problem
            continue
        try:
            if differing := differing_sets(component, reports, topology):
                if component.key in tables:
                    raise first_difference(component.key, tables[component.key])
                wanted[component.key] = list(differing)
                continue
            given = contributions(component, reports, topology)
            speakers = [rank for one in given if len(one.families) > 1 for rank in one.speakers]
            if speakers and component.key not in tables:
                wanted[component.key] = speakers
                continue
            found = [_entry(one, tables.get(component.key, {})) for one in given]
        except StructureError as err:
            _omit_or_raise(component, err, omitted)
            continue
        for entry in found:
            portions = [portion.to_json() for portion in entry.portions]
            entries.append([component.key, entry.name, entry.num_items, portions])
    return {"entries": entries, "omitted": omitted, "tables": wanted}


def _entry(given: Contribution, tables: Mapping[int, Table]) -> Entry:
    return entry_of_one(given) if len(given.families) == 1 else entry_of_several(given, tables)


def _omit_or_raise(component: Declared, error: StructureError, omitted: dict[str, str]) -> None:
    if component.required:
        raise error
    omitted[component.key] = error.message
