"""Tables of a report, the same for the page and for the terminal."""

from collections.abc import Sequence
from dataclasses import dataclass

from hasten.jobs.common.logs import LOG_FILE
from hasten.jobs.descriptors.metrics import texts
from hasten.jobs.report import metrics as known
from hasten.jobs.report.comparison import Group, Row

WINNER, FRONT = "winner", "front"


@dataclass(frozen=True)
class Column:
    """A column; kind: number (aligned to the right), text, name, status, marks or folder."""

    title: str
    kind: str = "text"
    unit: str = ""

    @property
    def heading(self) -> str:
        """Title and unit on one line."""
        return f"{self.title}, {self.unit}" if self.unit else self.title


@dataclass(frozen=True)
class Cell:
    """Text and sort key: a number, a text, or None, which comes last in both directions."""

    text: str
    key: float | str | None


@dataclass(frozen=True)
class Table:
    """Rows of cells. sorted_by: index of the column that they are sorted by; None if unsorted."""

    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    sorted_by: int | None = None
    descending: bool = False


def comparison_table(group: Group) -> Table:
    """A row for each run: marks, settings that differ, status, metrics, seconds, name; without settings name first."""
    name = (Column("point" if group.sweep else "run", "name"), [_text(row.entry.name) for row in group.rows])
    parts: list[tuple[Column, list[Cell]]] = [
        (Column("#", "number"), [Cell(str(row.number), row.number) for row in group.rows]),
        (Column("mark", "marks"), [_marks(row) for row in group.rows]),
    ]
    parts += [_setting(group.rows, key) for key in group.settings] or [name]
    parts.append((Column("status", "status"), [_text(row.entry.status) for row in group.rows]))
    metrics = [name for name in group.metrics if name != "seconds"]
    objective = group.objectives[0] if group.objectives else None
    by = len(parts) + [*metrics, "seconds"].index(objective.metric) if objective else None
    parts += [_numbers(metric, [row.metric(metric) for row in group.rows]) for metric in metrics]
    parts.append(_numbers("seconds", [known.number(row.entry.seconds) for row in group.rows]))
    if group.settings:
        parts.append(name)
    return Table(
        title=f"{group.job}: {'points' if group.sweep else 'runs'}"
        + (f" on {group.reference}" if group.reference else ""),
        columns=tuple(column for column, _ in parts),
        rows=tuple(zip(*(cells for _, cells in parts), strict=True)),
        sorted_by=by,
        descending=objective is not None and objective.sign < 0,
    )


def failure_table(groups: Sequence[Group]) -> Table | None:
    """Failed runs, their errors and the folders of their logs; None if nothing failed."""
    rows = [
        (
            Cell(str(row.number), row.number),
            _text(row.label),
            _text(row.entry.failure.type),
            _text(row.entry.failure.message),
            _text(str(row.entry.folder)),
        )
        for group in groups
        for row in group.failures
        if row.entry.failure
    ]
    columns = (
        Column("#", "number"),
        Column("settings"),
        Column("type"),
        Column("message"),
        Column(f"folder of {LOG_FILE}", "folder"),
    )
    return Table("Failures", columns, tuple(rows)) if rows else None


def allocator_tables(groups: Sequence[Group]) -> list[Table]:
    """Results of the allocators, a table for each search of several budgets."""
    tables: dict[str, Table] = {}
    for row in (row for group in groups for row in group.rows if row.entry.finished):
        pareto = row.entry.report.get("pareto")
        if not isinstance(pareto, list) or not pareto or str(row.entry.folder) in tables:
            continue
        names = ("budget", "bits_per_weight", "bytes", "kl_divergence")
        parts = [(Column("allocator"), [_text(str(entry["allocator"])) for entry in pareto])]
        parts += [_numbers(name, [known.number(entry.get(name)) for entry in pareto]) for name in names]
        cells = tuple(zip(*(cells for _, cells in parts), strict=True))
        title = f"Allocators of {row.entry.folder.name}"
        tables[str(row.entry.folder)] = Table(title, tuple(column for column, _ in parts), cells)
    return list(tables.values())


def _marks(row: Row) -> Cell:
    marks = [name for name, applies in ((WINNER, row.winner), (FRONT, row.on_front)) if applies]
    return Cell(", ".join(marks), 2 - len(marks) if marks else None)


def _text(text: str) -> Cell:
    return Cell(text, text)


def _setting(rows: Sequence[Row], key: str) -> tuple[Column, list[Cell]]:
    """Column of a setting, numeric if all its known values are numbers."""
    values = [row.values.get(key) for row in rows]
    numbers = [_number(value) for value in values]
    numeric = all(number is not None for number, value in zip(numbers, values, strict=True) if value is not None)
    cells = [
        Cell("–" if value is None else value, number if numeric else value)
        for value, number in zip(values, numbers, strict=True)
    ]
    return Column(key, "number" if numeric else "text"), cells


def _numbers(name: str, values: Sequence[float | None]) -> tuple[Column, list[Cell]]:
    metric = known.fitted(name, values)
    shown = texts([None if value is None else value / metric.scale for value in values])
    return Column(metric.title, "number", metric.unit), [
        Cell(text, value) for text, value in zip(shown, values, strict=True)
    ]


def _number(text: str | None) -> float | None:
    try:
        return None if text is None else known.number(float(text))
    except ValueError:
        return None
