"""The first agreement of every operation: all ranks declare the same, and want the same.

In the good case each rank sends one digest. Where they differ, each sends what it declared, and the error names
the ranks and the first difference.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

from forgather_ckpt import hashtree, strict_json
from forgather_ckpt.comm import Comm
from forgather_ckpt.component import StateComponent
from forgather_ckpt.errors import DeclarationError
from forgather_ckpt.portions import Declared
from forgather_ckpt.topology import Topology, sets_of


class DeclaresComponents(Protocol):
    """A trainer: asked at every save and load, so it may answer by what it is actually doing."""

    def get_state_components(self) -> Sequence[StateComponent]: ...


Source = DeclaresComponents | Sequence[StateComponent]


def declare(
    comm: Comm,
    topology: Topology,
    source: Source,
    request: Mapping[str, Any],
    *,
    prepare: Callable[[], None] = lambda: None,
) -> list[StateComponent]:
    """This rank's components, after all ranks have agreed on keys, patterns, flags, and on `request`."""
    components: list[StateComponent] = []
    declared: dict[str, Any] = {}

    def digest() -> str:
        prepare()
        components.extend(_components(source, topology))
        declared.update({"request": dict(request), "components": [one.declaration() for one in components]})
        return hashtree.digest(strict_json.dumps(declared)).hex()

    if not comm.agree("comparing declarations", digest, lambda digests: len(set(digests)) == 1):
        comm.agree("comparing declarations", lambda: declared, _refuse_difference)
    return components


def agreed(components: Sequence[StateComponent]) -> list[Declared]:
    return [
        Declared(
            one.key,
            one.sharing_pattern,
            one.process_group_name,
            one.required,
            one.is_global,
            tuple(one.validation_exclude),
        )
        for one in components
    ]


def _components(source: Source, topology: Topology) -> list[StateComponent]:
    components: Iterable[StateComponent]
    if isinstance(source, Sequence):
        components, said = source, "the list holds"
    else:
        components, said = source.get_state_components(), "get_state_components() returned"
        if isinstance(components, (str, bytes, Mapping)) or not isinstance(components, Iterable):
            raise DeclarationError(f"{said} a {type(components).__name__}; return a list of StateComponent")
    result = list(components)
    seen = set()
    for component in result:
        if not isinstance(component, StateComponent):
            verb = "give" if isinstance(source, Sequence) else "return"
            raise DeclarationError(f"{said} a {type(component).__name__}; {verb} a list of StateComponent")
        if component.key in seen:
            raise DeclarationError(f"component {component.key!r} is declared twice", component=component.key)
        seen.add(component.key)
        sets_of(component.sharing_pattern, component.process_group_name, topology)
    return result


def _refuse_difference(declared: list[dict[str, Any]]) -> None:
    reference = declared[0]
    for rank, other in enumerate(declared):
        if other == reference:
            continue
        if other["request"] != reference["request"]:
            raise DeclarationError(
                f"the ranks ask for different things: {reference['request']} on rank 0, {other['request']} on rank {rank}",
                rank=rank,
            )
        expected = {one["key"]: one for one in reference["components"]}
        found = {one["key"]: one for one in other["components"]}
        for key in sorted(expected.keys() ^ found.keys()):
            having, missing = (0, rank) if key in expected else (rank, 0)
            raise DeclarationError(
                f"component {key!r} is declared on rank {having} and not on rank {missing}; every rank declares every key, "
                "with stateful=None where it holds nothing",
                rank=rank,
                component=key,
            )
        for key, one in expected.items():
            for name, value in one.items():
                if found[key][name] != value:
                    raise DeclarationError(
                        f"component {key!r}: {name} is {value!r} on rank 0 and {found[key][name]!r} on rank {rank}; "
                        "declare it alike on all ranks",
                        rank=rank,
                        component=key,
                    )
        raise DeclarationError(
            f"rank {rank} declares its components in another order than rank 0; the order matters where state_dict() "
            "is a collective",
            rank=rank,
        )
