"""The report as one HTML file, with everything in it, and the charts as PNG files beside it."""

import base64
import hashlib
from collections.abc import Sequence
from datetime import datetime
from importlib import metadata
from pathlib import Path

from hasten.accel.errors import UserError, is_disk_full
from hasten.jobs.report.charts import ANNOUNCED, SECTIONS, charts
from hasten.jobs.report.comparison import Group
from hasten.jobs.report.pictures import Chart, pictures, write_png
from hasten.jobs.report.sentences import facts, left_out, summary
from hasten.jobs.report.tables import allocator_tables, comparison_table, failure_table

PAGE = "report.html"
# Earlier charts that this report may have no data for any more.
_OURS = (
    *("quality_against_*.png", "objectives_*.png", "bits_per_layer*.png", "allocators_*.png"),
    *("acceptance_by_depth.png", "time_share.png"),
)


def missing_sections(found: Sequence[Chart]) -> str:
    """Line that names what there is no data for, empty where nothing is missing."""
    there = {chart.section for chart in found}
    return left_out([section for section in ANNOUNCED if section not in there])


def write(groups: Sequence[Group], joined: Sequence[Group], folders: Sequence[Path], output: Path) -> tuple[Path, str]:
    """Write page and charts into the folder output; returns the page's path and the line of what is left out.

    groups are the tables, joined those that charts show. UserError where the folder cannot be written.
    """
    found = charts(joined)
    missing = missing_sections(found)
    try:
        output.mkdir(parents=True, exist_ok=True)
        for pattern in _OURS:
            for earlier in output.glob(pattern):
                earlier.unlink()
        for chart in found:
            write_png(chart, output)
        path = output / PAGE
        unfinished = output / f".{PAGE}"
        unfinished.write_text(html(groups, found, folders, missing), encoding="utf-8")
        unfinished.replace(path)
    except OSError as error:
        if is_disk_full(error):
            raise
        raise UserError(f"--output {output} cannot be written: {error.strerror or error}") from error
    return path, missing


def html(groups: Sequence[Group], found: Sequence[Chart], folders: Sequence[Path], missing: str) -> str:
    """The page."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    here = Path(__file__).parent
    # Every name and value of a run is text from outside: all of it is escaped.
    environment = Environment(
        loader=FileSystemLoader(here), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    script = (here / "page.js").read_text(encoding="utf-8")
    drawn = [pictures(chart) for chart in found]
    return environment.get_template("page.html.jinja").render(
        title=_title(groups),
        written=f"{datetime.now():%Y-%m-%d %H:%M}",
        version=metadata.version("hasten"),
        folders=[str(folder) for folder in folders],
        groups=[(group, summary(group), facts(group), comparison_table(group)) for group in groups],
        sections=[
            (name, some) for name in SECTIONS if (some := [each for each in drawn if each.chart.section == name])
        ],
        allocators=allocator_tables(groups),
        failures=failure_table(groups),
        missing=missing,
        marks=_marks,
        script=Markup(script),
        script_hash="sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def _title(groups: Sequence[Group]) -> str:
    if len(groups) > 1:
        *jobs, last = (group.job for group in groups)
        return f"{', '.join(jobs)} and {last} compared"
    (group,) = groups
    varied = " × ".join(group.settings[:4])
    if len(group.rows) == 1:
        return f"{group.job}: {group.rows[0].entry.name}"
    what = f"Sweep of {group.job}" if group.sweep else f"{len(group.rows)} runs of {group.job}"
    return f"{what}: {varied}" if varied else what


def _marks(text: str) -> list[str]:
    return text.split(", ") if text else []
