"""`fgckpt show`: what a checkpoint is made of, from its manifest, and with --tensors from its indexes."""

import datetime
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click

from forgather_ckpt import annotations, catalog, strict_json
from forgather_ckpt.catalog import Checkpoint
from forgather_ckpt.cli import listing, selection, table, text
from forgather_ckpt.cli.table import Column, Table
from forgather_ckpt.index import TensorRow
from forgather_ckpt.manifest import CheckpointManifest, ComponentRecord, EntryRecord, summary
from forgather_ckpt.replication import describe


@click.command("show", short_help="Show what a checkpoint is made of.")
@click.argument("selector", default="latest")
@selection.run_option
@click.option("--entries", "with_entries", is_flag=True, help="List the components' entries, each with its check.")
@click.option("--files", "with_files", is_flag=True, help="List the files.")
@click.option("--tensors", "with_tensors", is_flag=True, help="List all items; reads the indexes, no tensor's bytes.")
@click.option("--args", "with_args", is_flag=True, help="Show the training arguments and the environment.")
@selection.json_option
def show(
    selector: str, run: Path, with_entries: bool, with_files: bool, with_tensors: bool, with_args: bool, as_json: bool
) -> None:
    """\b
    Example: fgckpt show latest --tensors -d runs/gpt2

    Show what the checkpoint SELECTOR (latest, unless given) is made of: components, how they were shared, who wrote
    them, what was compared, metrics. --json gives the manifest, and with --tensors the items.
    """
    checkpoint = catalog.read_checkpoint(selection.find(run, selector))
    manifest = checkpoint.manifest
    if as_json:
        noted = annotations.read(checkpoint.path, manifest.digest)
        data = {
            "path": str(checkpoint.path.absolute()),
            "manifest": _json_of(manifest),
            "pinned": noted.is_pinned,
            "quarantined": noted.quarantined,
            "notes": list(noted.notes),
        }
        if with_tensors:
            data["items"] = list(items(checkpoint))
        selection.write_json("fgckpt.show/1", data)
        return
    for line in _header(checkpoint, datetime.datetime.now(datetime.UTC)):
        click.echo(line)
    table.write(_components(manifest))
    for component, reason in manifest.omitted.items():
        click.echo(f"left out: {text.printable(component)}: {text.printable(reason)}")
    click.echo(f"{text.plural(len(manifest.files), 'file')}  {text.size(manifest.num_bytes)}")
    if manifest.metrics:
        click.echo("metrics: " + "  ".join(_pairs(manifest.metrics)))
    if with_entries:
        click.echo()
        table.write(_entries(manifest))
    if with_files:
        click.echo()
        table.write(_files(manifest))
    if with_tensors:
        click.echo()
        table.write(_items(checkpoint))
    if with_args:
        for title, facts in (("training arguments", manifest.training_args), ("environment", manifest.environment)):
            click.echo(f"\n{title}:")
            for name, fact in facts.items():
                click.echo(f"  {text.printable(name)} = {text.value(fact)}")


def items(checkpoint: Checkpoint) -> Iterator[dict[str, Any]]:
    """All items as the indexes tell of them: tensors (their pieces joined), values, and second names of tensors."""
    manifest = checkpoint.manifest
    tensors: dict[tuple[str, str, str], list[TensorRow]] = {}
    others = []
    for name in manifest.indexes:
        for entry in catalog.read_index(checkpoint.path, manifest, name).entries:
            where = {"component": entry.component, "entry": entry.entry}
            for row in entry.tensors:
                tensors.setdefault((entry.component, entry.entry, row.name), []).append(row)
            others += [
                {**where, "name": value.name, "order": value.order, "value": value.value} for value in entry.values
            ]
            others += [
                {**where, "name": alias.name, "order": alias.order, "same_as": alias.target} for alias in entry.aliases
            ]
    found = [
        {
            "component": component,
            "entry": entry,
            "name": name,
            "order": rows[0].order,
            "dtype": rows[0].dtype,
            "shape": list(rows[0].shape),
            "bytes": sum(row.num_bytes for row in rows),
            "files": list(dict.fromkeys(row.file for row in rows)),
            "pieces": len(rows),
        }
        for (component, entry, name), rows in tensors.items()
    ]
    place = {
        (component, entry): number
        for number, (component, entry) in enumerate(
            (component, entry) for component, record in manifest.components.items() for entry in record.entries
        )
    }
    yield from sorted(
        [*found, *others],
        key=lambda item: (place.get((item["component"], item["entry"]), len(place)), item["order"]),
    )


def _json_of(manifest: CheckpointManifest) -> Any:
    data = manifest.to_bytes()
    return strict_json.loads(data, what="the manifest", max_bytes=len(data))


def _header(checkpoint: Checkpoint, now: datetime.datetime) -> Iterator[str]:
    manifest = checkpoint.manifest
    epoch = "" if manifest.epoch is None else f"  epoch {text.epoch(manifest.epoch)}"
    saved = text.printable(manifest.created).replace("T", " ").replace("+00:00", " UTC")
    ranks = text.plural(manifest.world_size, "rank")
    nodes = text.plural(len(manifest.topology.nodes), "node")
    yield (
        f"{text.printable(checkpoint.path.name)}  step {manifest.step}{epoch}  {text.printable(manifest.kind)}  "
        f"saved {saved} ({listing.age_of(manifest.created, now)} ago) by {ranks} on {nodes}"
    )
    parent = manifest.parent
    before = f"after step {text.value(parent.get('step'))}" if isinstance(parent, Mapping) else "no parent"
    noted = annotations.read(checkpoint.path, manifest.digest)
    run_id = "" if manifest.run_id is None else f"  run {text.printable(manifest.run_id)}"
    yield f"sequence {manifest.sequence}  {before}{run_id}  digest {manifest.digest}"
    if noted.is_pinned:
        yield "pinned"
    if noted.quarantined is not None:
        yield f"quarantined: {text.printable(noted.quarantined)}"
    for note in noted.notes:
        yield f"note: {text.printable(note)}"


def _components(manifest: CheckpointManifest) -> Table:
    columns = [
        Column("COMPONENT"),
        Column("PATTERN"),
        Column("WRITERS"),
        Column("ITEMS", "right"),
        Column("SIZE", "right"),
        Column("CHECK"),
    ]
    rows = [
        [
            text.printable(key),
            _pattern(record),
            describe(record.writers),
            f"{record.num_items:,}",
            text.size(record.num_bytes),
            _check(record.entries),
        ]
        for key, record in manifest.components.items()
    ]
    return Table(columns, rows)


def _entries(manifest: CheckpointManifest) -> Table:
    columns = [
        Column("COMPONENT"),
        Column("ENTRY"),
        Column("RANKS"),
        Column("WRITERS"),
        Column("ITEMS", "right"),
        Column("SIZE", "right"),
        Column("CHECK"),
        Column("TOOK", "right"),
    ]
    rows = [
        [
            text.printable(key),
            text.printable(name),
            describe(entry.ranks),
            describe(entry.writers),
            f"{entry.num_items:,}",
            text.size(entry.num_bytes),
            _check({name: entry}),
            f"{entry.validation.seconds * 1000:,.1f} ms" if entry.validation.num_items else "",
        ]
        for key, record in manifest.components.items()
        for name, entry in record.entries.items()
    ]
    return Table(columns, rows)


def _pattern(record: ComponentRecord) -> str:
    group = "" if record.group is None else f" ({text.printable(record.group)})"
    return f"{record.pattern.name}{group}"


def _check(entries: Mapping[str, EntryRecord]) -> str:
    """What was compared of some entries of a component, in one line."""
    found = summary(entry.validation for entry in entries.values())
    num_items = sum(entry.num_items for entry in entries.values())
    num_excluded = sum(len(entry.excluded) for entry in entries.values())
    excluded = f", {num_excluded} not compared" if num_excluded else ""
    match found.result:
        case "equal":
            compared = text.plural(found.num_items, "part" if found.num_items > num_items else "item")
            if found.num_items + num_excluded < num_items:
                compared = f"{found.num_items:,} of {text.plural(num_items, 'item')}"
            return f"{found.level.name}: {compared} equal on all holders{excluded}"
        case "differed":
            trusted = "; ".join(
                f"{f'{text.printable(name)} ' if len(entries) > 1 else ''}{_source(entry)}"
                for name, entry in entries.items()
                if entry.validation.result == "differed"
            )
            return f"{found.level.name}: DIFFERED, saved {trusted}{excluded}"
        case result if num_excluded:
            return f"{found.level.name}: {text.printable(result)}, {num_excluded} left out"
        case result:
            return text.printable(result)


def _source(entry: EntryRecord) -> str:
    return f"from rank {describe(entry.trusted)}" if entry.trusted else "by the majority of each item"


def _files(manifest: CheckpointManifest) -> Table:
    columns = [Column("FILE"), Column("WRITER", "right"), Column("SIZE", "right"), Column("DIGEST")]
    rows = [
        [name, str(record.writer), text.size(record.size), record.digest] for name, record in manifest.files.items()
    ]
    return Table(columns, rows)


def _items(checkpoint: Checkpoint) -> Table:
    columns = [
        Column("COMPONENT"),
        Column("ENTRY"),
        Column("ITEM"),
        Column("DTYPE"),
        Column("SHAPE"),
        Column("SIZE", "right"),
        Column("FILE"),
    ]
    rows = []
    for item in items(checkpoint):
        if "dtype" in item:
            tail = [item["dtype"], str(item["shape"]), text.size(item["bytes"]), ", ".join(item["files"])]
        elif "same_as" in item:
            tail = ["", f"= {text.printable(item['same_as'])}", "", ""]
        else:
            tail = ["value", text.shortened(text.value(item["value"]), 40), "", ""]
        rows.append([*map(text.printable, (item["component"], item["entry"], item["name"])), *tail])
    return Table(columns, rows)


def _pairs(facts: Mapping[str, Any]) -> Iterator[str]:
    return (f"{text.printable(name)} {text.value(fact)}" for name, fact in facts.items())
