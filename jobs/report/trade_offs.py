"""Charts of one metric against another, with the Pareto front."""

from collections.abc import Sequence
from pathlib import Path

from hasten.jobs.report import metrics as known
from hasten.jobs.report.comparison import Group, Row, complete
from hasten.jobs.report.comparison_plots import Axis, Point, trade_off
from hasten.jobs.report.pareto import front
from hasten.jobs.report.pictures import Chart
from hasten.jobs.report.reading import Objective

# Maximum number of values of a setting that colours can distinguish.
_SERIES = 6


def against(groups: Sequence[Group], section: str, quality: Objective, cost: str) -> list[Chart]:
    """Charts of quality against cost, one for each reference that two rows with both metrics have."""
    rows = complete([row for group in groups for row in group.rows], [quality.metric, cost])
    name = "quality_against_size" if cost == "bytes" else "quality_against_speed"
    second = Objective(cost, known.metric(cost).better or "minimize")
    texts = {row.reference: group.reference for group in reversed(groups) for row in group.rows if group.reference}
    made: list[Chart] = []
    for number in sorted({row.reference for row in rows}, key=lambda number: -1 if number is None else number):
        some = [row for row in rows if row.reference == number]
        chart = _trade_off(section, _numbered(name, len(made)), some, quality, second, texts.get(number, ""))
        made += [] if chart is None else [chart]
    return made


def objectives(group: Group, quality: Objective | None, earlier: int) -> Chart | None:
    """Chart of the first two objectives of a sweep; None if another chart shows them.

    earlier: number of the job's groups before this one.
    """
    if len(group.objectives) < 2:
        return None
    first, second = group.objectives[:2]
    if quality and {first.metric, second.metric} in ({quality.metric, "bytes"}, {quality.metric, "tokens_per_second"}):
        return None
    rows = complete(group.rows, [first.metric, second.metric])
    name = _numbered(f"objectives_{group.job}", earlier)
    return _trade_off("objectives against each other", name, rows, first, second, group.reference)


def _numbered(name: str, earlier: int) -> str:
    return f"{name}_{earlier + 1}" if earlier else name


def _trade_off(
    section: str, name: str, rows: Sequence[Row], up: Objective, across: Objective, reference: str
) -> Chart | None:
    if len(rows) < 2:
        return None
    values = {objective.metric: [row.metrics[objective.metric] or 0.0 for row in rows] for objective in (up, across)}
    axes = {metric: known.fitted(metric, numbers) for metric, numbers in values.items()}
    points = list(zip(values[across.metric], values[up.metric], strict=True))
    on_front = set(front(points, [across.sign, up.sign]))
    series = _series(rows)
    best = min(range(len(rows)), key=lambda index: (up.sign * points[index][1], across.sign * points[index][0]))

    title = f"{axes[up.metric].title} against {axes[across.metric].title}"

    def draw(path: Path) -> Path:
        scales = axes[across.metric].scale, axes[up.metric].scale
        drawn = [
            Point(
                across=point[0] / scales[0],
                up=point[1] / scales[1],
                series=series[index],
                label=str(rows[index].number),
                on_front=index in on_front,
                winner=index == best,
            )
            for index, point in enumerate(points)
        ]
        return trade_off(
            drawn,
            title[:1].upper() + title[1:],
            Axis(axes[across.metric].heading, across.sign > 0),
            Axis(axes[up.metric].heading, up.sign > 0),
            path,
        )

    members = "; ".join(
        f"{rows[index].label}: {axes[up.metric].text(points[index][1])}, {axes[across.metric].text(points[index][0])}"
        for index in sorted(on_front, key=lambda index: points[index])
    )
    on = f" on {reference}" if reference else ""
    alt = f"{title} of {len(rows)} finished rows{on}. On the Pareto front: {members}."
    first = f"Rows{on}. " if on else ""
    caption = (
        f"{first}The dashed line is the Pareto front: no other row is better in both. Numbers are rows of the table, "
        f"the star is the best by {axes[up.metric].title}."
    )
    return Chart(section, name, alt, caption, draw)


def _series(rows: Sequence[Row]) -> list[str]:
    """Colour group of each row: its job if there are several, else a setting with few values that are not numbers."""
    jobs = [row.entry.job for row in rows]
    if len(set(jobs)) > 1:
        return jobs
    for key in dict.fromkeys(key for row in rows for key in row.values):
        values = [row.values.get(key, "–") for row in rows]
        if 1 < len(set(values)) <= _SERIES and not all(_is_number(value) for value in values):
            return [f"{key}={value}" for value in values]
    return jobs


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
