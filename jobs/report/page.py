"""The report as one self-contained HTML file, and the charts as PNG files beside it."""

import base64
import hashlib
from collections.abc import Sequence
from datetime import datetime
from importlib import metadata
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from hasten.accel.errors import UserError, is_disk_full
from hasten.jobs.report.charts import ANNOUNCED, SECTIONS, charts
from hasten.jobs.report.comparison import Group
from hasten.jobs.report.pictures import Chart, pictures, write_png
from hasten.jobs.report.sentences import facts, left_out, summary
from hasten.jobs.report.tables import allocator_tables, comparison_table, failure_table
from hasten.jobs.report.texts import notes

PAGE = "report.html"
# Files of charts, removed first: an earlier report may have charts for which there are no data now.
_CHART_FILES = (
    *("quality_against_*.png", "objectives_*.png", "bits_per_layer*.png", "allocators_*.png"),
    *("acceptance_by_depth.png", "time_share.png"),
)


def missing_sections(shown: Sequence[Chart]) -> str:
    """Line that names the sections without data; empty if there are none."""
    present = {chart.section for chart in shown}
    return left_out([section for section in ANNOUNCED if section not in present])


def write(
    groups: Sequence[Group], chart_groups: Sequence[Group], folders: Sequence[Path], output: Path
) -> tuple[Path, str]:
    """Write page and charts to the folder output; returns the page's path and the line that names missing sections.

    groups: rows of the tables; chart_groups: rows of the charts. UserError if the folder cannot be written.
    """
    shown = charts(chart_groups)
    missing = missing_sections(shown)
    try:
        output.mkdir(parents=True, exist_ok=True)
        for pattern in _CHART_FILES:
            for earlier in output.glob(pattern):
                earlier.unlink()
        for chart in shown:
            write_png(chart, output)
        path = output / PAGE
        unfinished = output / f".{PAGE}"
        unfinished.write_text(html(groups, shown, folders, missing), encoding="utf-8")
        unfinished.replace(path)
    except OSError as error:
        if is_disk_full(error):
            raise
        raise UserError(f"--output {output} cannot be written: {error.strerror or error}") from error
    return path, missing


def html(groups: Sequence[Group], shown: Sequence[Chart], folders: Sequence[Path], missing: str) -> str:
    """The page."""
    templates = Path(__file__).parent
    # Names and values of runs are untrusted text: all of it is escaped.
    environment = Environment(
        loader=FileSystemLoader(templates),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script = (templates / "page.js").read_text(encoding="utf-8")
    drawn = [pictures(chart) for chart in shown]
    return environment.get_template("page.html.jinja").render(
        title=_title(groups),
        written=f"{datetime.now():%Y-%m-%d %H:%M}",
        version=metadata.version("hasten"),
        folders=[str(folder) for folder in folders],
        groups=[(group, summary(group), facts(group), comparison_table(group)) for group in groups],
        sections=[
            (name, some)
            for name in SECTIONS
            if (some := [picture for picture in drawn if picture.chart.section == name])
        ],
        allocators=allocator_tables(groups),
        failures=failure_table(groups),
        missing=missing,
        notes=notes,
        marks=_marks,
        script=Markup(script),
        script_hash="sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def _title(groups: Sequence[Group]) -> str:
    *jobs, last = dict.fromkeys(group.job for group in groups)
    if jobs:
        return f"{', '.join(jobs)} and {last} compared"
    rows = [row for group in groups for row in group.rows]
    varied = " × ".join(list(dict.fromkeys(key for group in groups for key in group.settings))[:4])
    if len(rows) == 1:
        return f"{last}: {rows[0].entry.name}"
    subject = f"Sweep of {last}" if any(group.sweep for group in groups) else f"{len(rows)} runs of {last}"
    return f"{subject}: {varied}" if varied else subject


def _marks(text: str) -> list[str]:
    return text.split(", ") if text else []
