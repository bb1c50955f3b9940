"""How differences between two checkpoints look: for people, and for programs."""

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from forgather_ckpt.catalog import Checkpoint
from forgather_ckpt.cli import table, text
from forgather_ckpt.cli.table import Column, Table
from forgather_ckpt.comparison import (
    Change,
    Comparison,
    ComponentComparison,
    Difference,
    Item,
    StoredTensor,
    Unmatched,
)

if TYPE_CHECKING:
    from forgather_ckpt.deltas import Delta

NUM_SHOWN = 20
_NUM_NAMED_ENTRIES = 8
_VALUE_CHARS = 32
_CONTEXT_CHARS = 8

Deltas = Mapping[int, "Delta"]
"""What was measured, by the place of the difference in `Comparison.differences`."""


def write(a: Checkpoint, b: Checkpoint, found: Comparison, deltas: Deltas, *, every: bool, more: str = "--all") -> None:
    """Everything about a comparison: the two sides, the components, the first items that differ, a sentence.

    `more` is what lists all items.
    """
    for line in _sides(a, b):
        click.echo(line)
    table.write(_components_table(found))
    for line in _remarks(a, b, found):
        click.echo(line)
    differences = list(found.differences)
    if differences:
        shown = differences if every else differences[:NUM_SHOWN]
        click.echo()
        table.write(_items_table(shown))
        if len(shown) < len(differences):
            click.echo(f"… and {text.plural(len(differences) - len(shown), 'more item')} ({more} lists them)")
            click.echo()
            table.write(_families_table(differences))
    if deltas:
        click.echo()
        numbers = list(deltas)
        shown_numbers = numbers if every else numbers[:NUM_SHOWN]
        table.write(_deltas_table([(differences[number], deltas[number]) for number in shown_numbers]))
        if not any(_has_special(delta) for delta in deltas.values()):
            click.echo("no NaN and no Inf in them, in A or in B")
        if len(shown_numbers) < len(numbers):
            click.echo(f"… and {text.plural(len(numbers) - len(shown_numbers), 'more tensor')} ({more} lists them)")
            for line in _farthest(differences, deltas):
                click.echo(line)
    click.echo(_sentence(found))


def _sides(a: Checkpoint, b: Checkpoint) -> Iterator[str]:
    for letter, checkpoint in (("A", a), ("B", b)):
        manifest = checkpoint.manifest
        ranks = text.plural(manifest.world_size, "rank")
        yield f"{letter}  {text.printable(str(checkpoint.path))}  step {manifest.step}  saved by {ranks}"


def _components_table(found: Comparison) -> Table:
    has_unknown = any(component.count(Change.UNKNOWN) for component in found.components)
    titles = ["ITEMS", "EQUAL", "DIFFER", "ONLY IN A", "ONLY IN B", *(["NOT KNOWN"] if has_unknown else [])]
    rows = []
    for component in found.components:
        counts = [
            component.num_items,
            component.num_equal,
            component.count(Change.KIND, Change.STRUCTURE, Change.BYTES, Change.VALUE),
            component.count(Change.ONLY_IN_A),
            component.count(Change.ONLY_IN_B),
            *([component.count(Change.UNKNOWN)] if has_unknown else []),
        ]
        rows.append([text.printable(component.key), *(f"{count:,}" if count else "-" for count in counts)])
    return Table([Column("COMPONENT"), *(Column(title, "right") for title in titles)], rows)


def _remarks(a: Checkpoint, b: Checkpoint, found: Comparison) -> Iterator[str]:
    for component in found.components:
        key = text.printable(component.key)
        for letter, other, entries in (("A", b, component.only_in_a), ("B", a, component.only_in_b)):
            if not entries:
                continue
            if component.key in other.manifest.components:
                yield f"{key}: only in {letter}: {_entry_names(entries)}"
            else:
                reason = other.manifest.omitted.get(component.key)
                left_out = "" if reason is None else f", left out of the other: {text.printable(reason)}"
                yield f"{key}: only {letter} has this component{left_out}"
        if component.num_retied:
            yield (
                f"{key}: {text.plural(component.num_retied, 'item')}, equal now, shared in memory with others in A than "
                "in B: tied on one side only, so not trained alike"
            )


def _entry_names(entries: Sequence[Unmatched]) -> str:
    names = [text.printable(entry.entry) for entry in entries[:_NUM_NAMED_ENTRIES]]
    more = "" if len(entries) <= _NUM_NAMED_ENTRIES else f", … ({len(entries):,} entries)"
    return f"{', '.join(names)}{more} ({text.plural(sum(entry.num_items for entry in entries), 'item')})"


def _items_table(differences: Sequence[Difference]) -> Table:
    has_entries = any(difference.entry != "all" for difference in differences)
    columns = [Column("COMPONENT"), *([Column("ENTRY")] if has_entries else []), Column("ITEM"), Column("DIFFERENCE")]
    rows = []
    for difference in differences:
        entry = [text.printable(difference.entry)] if has_entries else []
        rows.append(
            [text.printable(difference.component), *entry, text.printable(difference.name), _change(difference)]
        )
    return Table(columns, rows)


def _change(difference: Difference) -> str:
    one, other = difference.a, difference.b
    if one is None or other is None:
        present = one or other
        assert present is not None
        return f"{difference.change}: {_described(present)}"
    match difference.change:
        case Change.VALUE:
            return " → ".join(map(text.printable, old_and_new(_json_text(one), _json_text(other))))
        case Change.BYTES:
            return f"bytes of {_described(one)}"
        case Change.UNKNOWN:
            return f"not known without reading (--logical): {_described(one)}"
        case _:
            return f"{_described(one)} → {_described(other)}"


def _described(item: Item) -> str:
    if isinstance(item.content, StoredTensor):
        return f"{item.content.dtype} {list(item.content.shape)}"
    return f"value {text.printable(text.shortened(_json_text(item), _VALUE_CHARS))}"


def _json_text(item: Item) -> str:
    """A value as it is stored, digits and quotes and all: values are shown because they differ."""
    return "" if isinstance(item.content, StoredTensor) else json.dumps(item.content.value)


def old_and_new(old: str, new: str) -> tuple[str, str]:
    """Two texts shortened to where they differ."""
    if max(len(old), len(new)) <= _VALUE_CHARS:
        return old, new
    start = max(0, _num_common(old, new) - _CONTEXT_CHARS)
    head = "…" if start else ""
    window = slice(start, start + _VALUE_CHARS + 1)  # one more than is shown, so that shortening shows
    return text.shortened(head + old[window], _VALUE_CHARS), text.shortened(head + new[window], _VALUE_CHARS)


def _num_common(one: str, other: str) -> int:
    """How many letters two texts have in common at their beginning; they may be many millions."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def families(differences: Iterable[Difference]) -> Counter[tuple[str, str]]:
    """Items that differ, counted by component and by name with all numbers as `*`, in the order of the first."""
    return Counter((difference.component, re.sub(r"\d+", "*", difference.name)) for difference in differences)


def _families_table(differences: Sequence[Difference]) -> Table:
    counted = list(families(differences).items())
    rows = [
        [text.printable(component), text.printable(name), f"{count:,}"]
        for (component, name), count in counted[:NUM_SHOWN]
    ]
    if len(counted) > NUM_SHOWN:
        rows.append(["…", f"{len(counted) - NUM_SHOWN:,} more", f"{sum(count for _, count in counted[NUM_SHOWN:]):,}"])
    return Table([Column("COMPONENT"), Column("ALL ITEMS, BY NAME"), Column("DIFFER", "right")], rows)


def _deltas_table(measured: Sequence[tuple[Difference, "Delta"]]) -> Table:
    columns = [
        Column("COMPONENT"),
        Column("TENSOR"),
        Column("DIFFER", "right"),
        Column("OF", "right"),
        Column("FIRST AT"),
        Column("MAX |Δ|", "right"),
        Column("‖Δ‖/‖A‖", "right"),
    ]
    # most have none, and two columns less leave the names more room
    has_special = any(_has_special(delta) for _, delta in measured)
    rows = []
    for difference, delta in measured:
        found = delta.elements
        special = [f"{found.reference_nan:,}, {found.nan:,}", f"{found.reference_inf:,}, {found.inf:,}"]
        rows.append(
            [
                text.printable(difference.component),
                text.printable(difference.name),
                f"{found.num_different:,}",
                f"{found.num_elements:,}",
                "-" if found.first_index is None else str(list(found.first_index)),
                _number(found.max_abs),
                _number(delta.relative_norm),
                *(special if has_special else []),
            ]
        )
    if has_special:
        columns += [Column("NAN A, B", "right"), Column("INF A, B", "right")]
    return Table(columns, rows)


def _has_special(delta: "Delta") -> bool:
    found = delta.elements
    return bool(found.nan or found.inf or found.reference_nan or found.reference_inf)


def _farthest(differences: Sequence[Difference], deltas: Deltas) -> Iterator[str]:
    """Of each component the tensor that is farthest away, which may not be among those that are listed."""
    worst: dict[str, tuple[float, str]] = {}
    for number, delta in deltas.items():
        difference = differences[number]
        apart = delta.relative_norm
        if apart is not None and apart > worst.get(difference.component, (-1.0, ""))[0]:
            worst[difference.component] = apart, difference.name
    for component, (apart, name) in worst.items():
        yield f"{text.printable(component)}: farthest apart is {text.printable(name)}, ‖Δ‖/‖A‖ {_number(apart)}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _sentence(found: Comparison) -> str:
    num_items = sum(component.num_items for component in found.components)
    of = f"{text.plural(num_items, 'item')} of {text.plural(len(found.components), 'component')}"
    if found.is_equal:
        return f"{table.emphasised('equal', 'green')}: {of}"
    num_equal = sum(component.num_equal for component in found.components)
    num_unknown = sum(component.count(Change.UNKNOWN) for component in found.components)
    unknown = f", {num_unknown:,} not known" if num_unknown else ""
    if not found.is_different:
        return f"not known: {num_unknown:,} of {of}"
    keys = [text.printable(component.key) for component in found.components if component.is_different]
    return f"{table.emphasised('differ', 'red')}: {num_items - num_equal - num_unknown:,} of {of}{unknown}, in {', '.join(keys)}"


# ---- for programs


def data(a: Checkpoint, b: Checkpoint, found: Comparison, deltas: Deltas) -> dict[str, Any]:
    return {"a": _side_data(a), "b": _side_data(b), **comparison_data(found, deltas)}


def _side_data(checkpoint: Checkpoint) -> dict[str, Any]:
    manifest = checkpoint.manifest
    return {
        "path": str(checkpoint.path.absolute()),
        "step": manifest.step,
        "sequence": manifest.sequence,
        "world_size": manifest.world_size,
        "digest": manifest.digest,
    }


def comparison_data(found: Comparison, deltas: Deltas) -> dict[str, Any]:
    """`equal` is null where it is not known."""
    return {
        "equal": False if found.is_different else True if found.is_equal else None,
        "components": {component.key: _component_data(component) for component in found.components},
        "differences": [
            _difference_data(difference, deltas.get(number)) for number, difference in enumerate(found.differences)
        ],
    }


def _component_data(component: ComponentComparison) -> dict[str, Any]:
    return {
        "items": component.num_items,
        "equal": component.num_equal,
        **{change.name.lower(): component.count(change) for change in Change},
        "entries_only_in_a": {entry.entry: entry.num_items for entry in component.only_in_a},
        "entries_only_in_b": {entry.entry: entry.num_items for entry in component.only_in_b},
        "tied_otherwise": component.num_retied,
    }


def _difference_data(difference: Difference, delta: "Delta | None") -> dict[str, Any]:
    data: dict[str, Any] = {
        "component": difference.component,
        "entry": difference.entry,
        "name": difference.name,
        "change": difference.change.name.lower(),
        "a": _item_data(difference.a),
        "b": _item_data(difference.b),
    }
    if delta is not None:
        data["elements"] = delta.elements.to_json()
        norms = {"a": delta.norm, "difference": delta.difference_norm, "relative": delta.relative_norm}
        data["norms"] = {name: _json_number(norm) for name, norm in norms.items()}
    return data


def _item_data(item: Item | None) -> dict[str, Any] | None:
    match item:
        case None:
            return None
        case Item(content=StoredTensor(dtype, shape)):
            return {"dtype": dtype, "shape": list(shape)}
        case _:
            assert not isinstance(item.content, StoredTensor)
            return {"value": item.content.value}


def _json_number(value: float | None) -> float | str | None:
    """JSON has no infinities."""
    return value if value is None or math.isfinite(value) else str(value)
