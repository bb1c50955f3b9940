"""Take every component's state on this rank, and agree with the others on what there is to store."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from forgather_ckpt.comm import Comm
from forgather_ckpt.component import StateComponent
from forgather_ckpt.declarations import agreed
from forgather_ckpt.errors import CheckpointError, RankFailed, StructureError
from forgather_ckpt.memory import wait_for_devices
from forgather_ckpt.patterns import TRAITS
from forgather_ckpt.portions import (
    Declared,
    Portion,
    Report,
    Table,
    base_portions,
    differing_sets,
    first_difference,
    first_problem,
    merge_tables,
)
from forgather_ckpt.structure import State, capture
from forgather_ckpt.topology import Topology

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settlement:
    """What will be stored: this rank's states, and what is equal on all ranks: portions, and what is left out."""

    states: Mapping[str, State]
    portions: tuple[Portion, ...]
    omitted: Mapping[str, str]
    """Optional components that could not be taken, with the reason."""


def settle(comm: Comm, topology: Topology, components: Sequence[StateComponent]) -> Settlement:
    """Call every `state_dict()` in order of declaration and agree on the structure, one small message a rank.

    Structure digests must be equal inside each set. Components with global names in several sets exchange their
    name tables too. A difference or an unstorable leaf is one error on every rank, before anything is written.
    """
    states: dict[str, State] = {}

    def report() -> list[list[Any] | None]:
        reports = capture_all(components, topology, states)
        return [None if report is None else report.to_json() for report in reports]

    declared = agreed(components)
    told = comm.agree("comparing structures", report, lambda reports: _decide(declared, topology, reports))
    if told["tables"]:

        def tables() -> dict[str, Table]:
            return {key: _sized_table(states[key]) for key, ranks in told["tables"].items() if comm.rank in ranks}

        told = comm.agree("comparing structures", tables, lambda tables: _decide_tables(declared, told, tables))
    for key, reason in told["omitted"].items():
        logger.warning("component %r is left out of the checkpoint: %s", key, reason)
    return Settlement(states, tuple(Portion.from_json(data) for data in told["portions"]), told["omitted"])


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
            reports.append(Report(taken.structure_digest().hex(), taken.num_items, taken.num_bytes))
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


def _sized_table(state: State) -> Table:
    sizes = {name: item.num_bytes for name, item in state.tensors.items()}
    return [[*row, sizes.get(row[0], 0)] for row in state.table()]


def _decide(declared: Sequence[Declared], topology: Topology, columns: list[list[list[Any] | None]]) -> dict[str, Any]:
    """Portions and omissions; and whose tables are needed, by component, to name a difference or to merge names."""
    portions: list[Portion] = []
    omitted: dict[str, str] = {}
    tables: dict[str, list[int]] = {}
    differing: list[str] = []
    for number, component in enumerate(declared):
        reports = {rank: Report(*column[number]) for rank, column in enumerate(columns) if column[number] is not None}  # type: ignore[misc]
        if (problem := first_problem(component, reports)) is not None:
            omitted[component.key] = problem
            continue
        if differing_ranks := differing_sets(component, reports, topology):
            tables[component.key] = list(differing_ranks[0])
            differing.append(component.key)
            continue
        try:
            base = base_portions(component, reports, topology)
        except StructureError as err:
            _omit_or_raise(component, err, omitted)
            continue
        if component.is_global and len(base) > 1:
            tables[component.key] = [portion.holders[0] for portion in base]
        portions += base
    return {
        "portions": [portion.to_json() for portion in portions],
        "omitted": omitted,
        "tables": tables,
        "differing": differing,
    }


def _decide_tables(
    declared: Sequence[Declared], told: Mapping[str, Any], answers: list[dict[str, Table]]
) -> dict[str, Any]:
    omitted = dict(told["omitted"])
    portions = [Portion.from_json(data) for data in told["portions"]]
    by_key = {component.key: component for component in declared}
    for key in told["tables"]:
        tables = {rank: answer[key] for rank, answer in enumerate(answers) if key in answer}
        own = [portion for portion in portions if portion.component == key]
        merged: list[Portion] = []
        try:
            if key in told["differing"]:
                raise first_difference(key, tables)
            merged = merge_tables(own, tables)
        except StructureError as err:
            _omit_or_raise(by_key[key], err, omitted)
        portions = [portion for portion in portions if portion.component != key] + merged
    return {"portions": [portion.to_json() for portion in portions], "omitted": omitted}


def _omit_or_raise(component: Declared, error: StructureError, omitted: dict[str, str]) -> None:
    if component.required:
        raise error
    omitted[component.key] = error.message
