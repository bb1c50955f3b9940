"""JSON with one part changed: what a strict reader must survive."""

from __future__ import annotations

import copy
from typing import Any

from hypothesis import strategies as st

_JUNK = st.one_of(
    st.sampled_from(
        [
            None, True, False, 0, 1, -1, 2**31, 2**63 - 1, 2**63, 10**400, 0.5, -0.0, 1e308, "", "a", "0", "\ud800", "../x",
            "ff", "f" * 32, "0" * 32, "all", "global", "none", [], {}, [[]], [0], [1, 0], [[0, 1]], ["a"], [{}], {"0": 0},
            {"a": None}, {"": []}, [None], [0.0, 1.0], [True, 2],
        ]
    ),
    st.integers(),
    st.text(max_size=5),
)  # fmt: skip


def mutated(data: st.DataObject, document: Any) -> Any:
    """A copy of `document` in which one to three places are replaced, removed, doubled or swapped."""
    document = copy.deepcopy(document)
    for _ in range(data.draw(st.integers(1, 3))):
        _mutate(data, document)
    return document


def _mutate(data: st.DataObject, document: Any) -> None:
    places = list(_places(document))
    if not places:
        return
    container, key = data.draw(st.sampled_from(places))
    action = data.draw(st.sampled_from(["replace", "replace", "remove", "duplicate", "swap"]))
    if action == "replace":
        container[key] = copy.deepcopy(data.draw(_JUNK))
    elif action == "remove":
        del container[key]
    elif action == "duplicate" and isinstance(container, list):
        container.insert(key, copy.deepcopy(container[key]))
    else:
        other, other_key = data.draw(st.sampled_from(places))
        container[key] = copy.deepcopy(other[other_key])


def _places(node: Any) -> Any:
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, child in children:
        yield node, key
        yield from _places(child)
