"""Prints the tables of a report to the terminal."""

import sys
from collections.abc import Sequence
from typing import Literal

from rich import box
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from hasten.jobs.report.comparison import Group
from hasten.jobs.report.sentences import facts, summary
from hasten.jobs.report.tables import Table, allocator_tables, comparison_table, failure_table
from hasten.jobs.report.texts import notes

# Kinds of columns that are shown in every terminal, however narrow.
_KEPT = 4


def show(groups: Sequence[Group], left_out: str) -> None:
    """Print the content of the page, without its charts."""
    for group in groups:
        print("\n".join([str(summary(group)), facts(group), *notes(group), ""]))
        _show(comparison_table(group))
    for table in (*allocator_tables(groups), failure_table(groups)):
        if table is not None:
            print(table.title)
            _show(table)
    if left_out:
        print(left_out)


def _show(table: Table) -> None:
    # A file or a pipe has no width.
    width = Console(file=sys.stdout).width if sys.stdout.isatty() else None
    console = Console(file=sys.stdout, highlight=False, width=100_000)
    columns = list(range(len(table.columns)))
    while width and len(columns) > _KEPT and console.measure(_drawn(table, columns)).maximum > width:
        columns.pop()
    drawn = _drawn(table, columns)
    with console.capture() as captured:
        console.print(drawn, width=min(width or 100_000, console.measure(drawn).maximum))
    print("\n".join(line.rstrip() for line in captured.get().splitlines() if line.strip()))
    if len(columns) < len(table.columns):
        hidden = ", ".join(column.heading for column in table.columns[len(columns) :])
        print(f"The terminal is too narrow for: {hidden}.")
    print()


def _drawn(table: Table, columns: Sequence[int]) -> RichTable:
    drawn = RichTable(box=box.MARKDOWN)
    for index in columns:
        # Text objects: rich would interpret square brackets, as in [2.5,3], as markup.
        justify: Literal["right", "left"] = "right" if table.columns[index].kind == "number" else "left"
        drawn.add_column(Text(table.columns[index].heading), justify=justify, overflow="fold")
    for row in table.rows:
        drawn.add_row(*(Text(row[index].text) for index in columns))
    return drawn
