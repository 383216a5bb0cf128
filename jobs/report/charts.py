"""The charts of a report for which there are data."""

from collections.abc import Sequence
from pathlib import Path

from hasten.jobs.common.plots import pareto
from hasten.jobs.report.bit_maps import maps
from hasten.jobs.report.comparison import Group, Row, quality_of
from hasten.jobs.report.comparison_plots import acceptance_by_depth, time_shares_of_runs
from hasten.jobs.report.pictures import Chart
from hasten.jobs.report.trade_offs import against, objectives

# Maximum numbers of lines and bars that a reader can distinguish.
_LINES, _BARS = 8, 16
SECTIONS = (
    "quality against size",
    "quality against tokens per second",
    "objectives against each other",
    "bits per layer",
    "allocators",
    "acceptance by depth",
    "time share",
)
# Sections that are not announced as missing.
_OPTIONAL = ("objectives against each other", "allocators")
ANNOUNCED = tuple(section for section in SECTIONS if section not in _OPTIONAL)


def charts(groups: Sequence[Group]) -> list[Chart]:
    """All charts for which the groups have data."""
    rows = [row for group in groups for row in group.rows if row.entry.finished]
    quality = quality_of(groups)
    drawable: list[Chart | None] = []
    if quality is not None:
        drawable += against(groups, "quality against size", quality, "bytes")
        drawable += against(groups, "quality against tokens per second", quality, "tokens_per_second")
    for place, group in enumerate(groups):
        earlier = sum(other.job == group.job for other in groups[:place])
        drawable.append(objectives(group, quality, earlier))
    drawable += maps(rows)
    drawable += [_allocators(row) for row in rows]
    drawable += [_acceptance(rows), _times(rows)]
    return [chart for chart in drawable if chart is not None]


def _allocators(row: Row) -> Chart | None:
    """Chart of a search's allocators, only for the row of its first budget."""
    table = row.entry.report.get("pareto")
    budgets = row.entry.report.get("budgets")
    if not isinstance(table, list) or not table or not isinstance(budgets, list):
        return None
    if row.values.get("budget") not in (None, f"{min(entry['budget'] for entry in budgets):g}"):
        return None
    names = ", ".join(dict.fromkeys(str(entry["allocator"]) for entry in table))

    def draw(path: Path) -> Path:
        return pareto(table, path)

    return Chart(
        "allocators",
        f"allocators_{row.number}",
        f"KL divergence against MiB of quantized weights for the allocators {names}.",
        f"Allocators of {row.entry.folder.name} at the same budgets, scales counted.",
        draw,
    )


def _acceptance(rows: Sequence[Row]) -> Chart | None:
    rates = {
        row.short: [float(share) for share in shares]
        for row in rows
        if isinstance(shares := row.entry.report.get("acceptance_per_position"), list) and shares
    }
    if not rates:
        return None
    shown = dict(list(rates.items())[:_LINES])

    def draw(path: Path) -> Path:
        return acceptance_by_depth(shown, path)

    text = "; ".join(f"{name}: {values[0]:.0%} at depth 1, {len(values)} deep" for name, values in shown.items())
    caption = "Share of target passes that accepted a drafted token at this depth." + _more(len(rates), _LINES)
    return Chart("acceptance by depth", "acceptance_by_depth", f"Acceptance by depth. {text}.", caption, draw)


def _times(rows: Sequence[Row]) -> Chart | None:
    parts_of_rows = {row.short: parts for row in rows if (parts := _parts(row))}
    if not parts_of_rows:
        return None
    shown = dict(list(parts_of_rows.items())[:_BARS])

    def draw(path: Path) -> Path:
        return time_shares_of_runs(shown, path)

    text = "; ".join(
        f"{name}: " + ", ".join(f"{part} {value / sum(parts.values()):.0%}" for part, value in parts.items())
        for name, parts in shown.items()
    )
    caption = "Share of the time of each row." + _more(len(parts_of_rows), _BARS)
    return Chart("time share", "time_share", f"Time share. {text}.", caption, draw, 1.3 + 0.32 * len(shown))


def _parts(row: Row) -> dict[str, float]:
    """Times or shares of a row's parts, by name; empty if its report has none."""
    shares = {name: row.metric(f"{name}_share") for name in ("draft", "target", "verify")}
    if None not in shares.values():
        known_shares = {name: share for name, share in shares.items() if share is not None}
        return known_shares if sum(known_shares.values()) > 0 else {}
    calibration, total = row.metric("calibration_seconds"), row.metric("seconds")
    if calibration is None or not total:
        return {}
    return {
        "calibration and quantization": calibration,
        "start, evaluation and the rest": max(0.0, total - calibration),
    }


def _more(number: int, limit: int) -> str:
    return f" The first {limit} of {number} rows are shown." if number > limit else ""
