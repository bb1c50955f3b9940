"""Tables: aligned text for pipes and files, boxes where a person looks at a terminal."""

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TextIO

import click


@dataclass(frozen=True)
class Column:
    """One column: its title, and the side at which its cells are aligned."""

    title: str
    align: Literal["left", "right"] = "left"


@dataclass(frozen=True)
class Table:
    """Columns and rows of text."""

    columns: Sequence[Column]
    rows: Sequence[Sequence[str]]

    def plain(self) -> str:
        """The table as aligned text, two spaces between columns."""
        lines = [[column.title for column in self.columns], *self.rows]
        widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
        return "\n".join(
            "  ".join(
                cell.rjust(width) if column.align == "right" else cell.ljust(width)
                for cell, width, column in zip(line, widths, self.columns, strict=True)
            ).rstrip()
            for line in lines
        )


def wants_boxes(stream: TextIO, environ: Mapping[str, str]) -> bool:
    """Whether a person looks at this stream and has not asked for plain text (https://no-color.org)."""
    return stream.isatty() and not environ.get("NO_COLOR") and environ.get("TERM") != "dumb"


def write(table: Table) -> None:
    """Write a table to stdout."""
    if not wants_boxes(sys.stdout, os.environ):
        click.echo(table.plain())
        return
    # imported where it is used: it takes longer than all that `ls` does
    from rich import box
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    boxes = RichTable(box=box.ROUNDED, header_style="bold")
    for column in table.columns:
        boxes.add_column(Text(column.title), justify=column.align, overflow="fold")
    for row in table.rows:
        boxes.add_row(*map(Text, row))
    Console(highlight=False).print(boxes)


def emphasised(text: str, colour: str) -> str:
    """Text in colour where stdout is a terminal that wants it."""
    return click.style(text, fg=colour, bold=True) if wants_boxes(sys.stdout, os.environ) else text
