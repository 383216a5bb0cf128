"""The rows of `hasten fit_scaling`: of a folder of reports, a CSV file or a JSON file."""

import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hasten.accel.errors import UserError
from hasten.accel.training.scaling_laws import FACTORS, Row
from hasten.jobs.fit_scaling.options import FitScalingConfig


def read_rows(config: FitScalingConfig) -> list[Row]:
    """All rows; UserError for a source without rows, or a row without acceptance or with a value that is no number."""
    if config.rows is None:
        raise UserError("rows=null is wrong: give a folder with reports of hasten train, or a .csv or .json file")
    source = Path(config.rows).expanduser()
    records = _records(source)
    if not records:
        raise UserError(f"rows={source} holds no rows: expected report.json files of hasten train, or rows of a table")
    rows = []
    for place, record in records:
        columns = {name: getattr(config, name) for name in (*FACTORS, "acceptance")}
        values = {name: _number(record, column, f"{source}, {place}") for name, column in columns.items()}
        acceptance = values.pop("acceptance")
        if acceptance is None:
            raise UserError(
                f"{source}, {place} has no column {config.acceptance}: it has {', '.join(sorted(record))}; give "
                "acceptance=COLUMN"
            )
        rows.append(Row({name: value for name, value in values.items() if value is not None}, acceptance))
    return rows


def _records(source: Path) -> list[tuple[str, Mapping[str, Any]]]:
    """(place, columns) of every row."""
    try:
        if source.is_dir():
            paths = sorted(source.rglob("report.json"))
            reports = [(path, json.loads(path.read_text(encoding="utf-8"))) for path in paths]
            # The report of a sweep names its points, which have reports of their own.
            return [(str(path), _flat(report)) for path, report in reports if report.get("job") == "train"]
        text = source.read_text(encoding="utf-8")
        if source.suffix == ".csv":
            return [(f"line {number}", row) for number, row in enumerate(csv.DictReader(text.splitlines()), 2)]
        return [(f"row {number}", row) for number, row in enumerate(json.loads(text), 1)]
    except (OSError, ValueError) as error:
        raise UserError(f"rows={source} cannot be read: {error}") from error


def _flat(report: Mapping[str, Any]) -> dict[str, Any]:
    """Options with the names of the command line, and metrics, which come first."""
    flat: dict[str, Any] = {}

    def add(values: Mapping[str, Any], prefix: str = "") -> None:
        for name, value in values.items():
            if isinstance(value, Mapping):
                add(value, f"{prefix}{name}.")
            else:
                flat[f"{prefix}{name}"] = value

    add(report.get("config", {}))
    add(report.get("metrics", {}))
    return flat


def _number(record: Mapping[str, Any], column: str, place: str) -> float | None:
    value = record.get(column)
    if value in (None, ""):
        return None
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise UserError(f"{place}: {column}={value} is no number") from error
