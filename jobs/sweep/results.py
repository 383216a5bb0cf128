"""Results of a sweep's points: rows of report.json, log lines, and the tables at the end."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hasten.jobs.common.records import Record
from hasten.jobs.common.schema import plain
from hasten.jobs.descriptors.metrics import QUALITY
from hasten.jobs.report.reading import Entry, entry_of_point
from hasten.jobs.report.references import described, reference_numbers
from hasten.jobs.sweep.points import Point

_CELL_CHARACTERS = 40


@dataclass
class Row:
    """Result of one point. status: waiting, running, finished, failed or stopped."""

    point: Point
    status: str = "waiting"
    seconds: float | None = None
    metrics: Mapping[str, Any] = field(default_factory=dict)
    error: Mapping[str, str] | None = None
    repeated: bool = False

    def plain(self, folder: Path) -> Record:
        """The row as JSON values, for report.json; folder: the sweep's."""
        return {
            "name": self.point.name,
            "folder": str(self.point.folder.relative_to(folder)),
            "values": {key: _value(text) for key, text in self.point.values.items()},
            "fingerprint": self.point.fingerprint,
            "status": self.status,
            "seconds": self.seconds,
            "metrics": dict(self.metrics),
            "error": self.error,
        }

    def line(self, shown: Iterable[str]) -> str:
        """Values and metrics in one line."""
        values = " ".join(f"{key}={text}" for key, text in self.point.values.items())
        if self.error:
            return f"{values}: {self.status}: {self.error['type']}: {self.error['message']}"
        figures = [f"{name}={_cell(self.metrics[name])}" for name in shown if self.metrics.get(name) is not None]
        return f"{values}: {', '.join([*figures, f'{self.seconds or 0:.1f} s'])}"


def table(rows: Sequence[Row], shown: Sequence[str], ascending: bool) -> list[str]:
    """Lines of a table of the finished points, sorted by the first shown metric, the best first.

    If the metrics are of quality, a table for each original and evaluation text, as others cannot be compared.
    """
    done = [row for row in rows if row.status == "finished"]
    texts = _references(done) if any(name in QUALITY for name in shown) else [""] * len(done)
    lines: list[str] = []
    for text in dict.fromkeys(texts):
        lines += [f"{text}:"] if text else []
        lines += _table([row for row, other in zip(done, texts, strict=True) if other == text], shown, ascending)
    return lines


def _references(rows: Sequence[Row]) -> list[str]:
    """For each row what tells the reference of its quality from those of other rows; empty if all agree."""
    entries = [_entry(row) for row in rows]
    numbers = reference_numbers(entries)
    members: dict[int | None, list[Entry]] = {}
    for number, entry in zip(numbers, entries, strict=True):
        members.setdefault(number, []).append(entry)
    texts = described(members)
    return [texts[number] for number in numbers]


def _entry(row: Row) -> Entry:
    """The row as an entry of a report, with what the point's own report says of its text and original."""
    entry = entry_of_point(row.point.folder, "", {"status": row.status, "metrics": row.metrics})
    return replace(entry, config=entry.config or plain(row.point.config))


def _table(done: Sequence[Row], shown: Sequence[str], ascending: bool) -> list[str]:
    present = [name for name in shown if any(row.metrics.get(name) is not None for row in done)]
    if present:
        known = [row for row in done if row.metrics.get(present[0]) is not None]
        unknown = [row for row in done if row.metrics.get(present[0]) is None]
        known.sort(key=lambda row: float(row.metrics[present[0]]), reverse=not ascending)
        done = known + unknown
    keys = list(done[0].point.values)
    head = [*keys, *present, "seconds"]
    cells = [
        [
            *(row.point.values.get(key, "")[:_CELL_CHARACTERS] for key in keys),
            *(_cell(row.metrics.get(name)) for name in present),
            f"{row.seconds or 0:.1f}",
        ]
        for row in done
    ]
    widths = [max(len(line[column]) for line in [head, *cells]) for column in range(len(head))]
    return ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in [head, *cells]]


def failures(rows: Sequence[Row]) -> list[str]:
    """A line for each failed point with its error and the file of its output."""
    return [
        f"  {row.point.name}: {row.error['type']}: {row.error['message']} ({row.point.folder}/output.txt)"
        for row in rows
        if row.status == "failed" and row.error
    ]


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, float) and not value.is_integer():
        return f"{value:.5g}"
    return f"{value:.0f}" if isinstance(value, float) else str(value)


def _value(text: str) -> int | float | str:
    """The text as a number if it is one, else the text."""
    try:
        return int(text)
    except ValueError:
        try:
            number = float(text)
        except ValueError:
            return text
    # JSON has no infinity.
    return number if math.isfinite(number) else text
