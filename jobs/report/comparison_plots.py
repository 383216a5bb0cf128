"""Plots that compare several runs, as PNG or SVG files."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.axis import XAxis, YAxis
from matplotlib.figure import Figure
from matplotlib.ticker import AutoLocator, PercentFormatter

from hasten.jobs.common.plots import logarithmic, marker, new_axes, save


@dataclass(frozen=True)
class Point:
    """A run in two metrics. series: runs of one colour and marker; label: shown if the run is on the Pareto front."""

    across: float
    up: float
    series: str
    label: str
    on_front: bool = False
    winner: bool = False


@dataclass(frozen=True)
class Axis:
    """What an axis shows. may_be_log: logarithmic if all values are positive and span a decade."""

    title: str
    less_is_better: bool = True
    may_be_log: bool = True


def trade_off(points: Sequence[Point], title: str, across: Axis, up: Axis, path: Path) -> Path:
    """One metric over another, the Pareto front as a line with its points labelled, the winner a star; returns path."""
    figure, axes = new_axes(title, across.title, up.title)
    front = sorted((point for point in points if point.on_front), key=lambda point: (point.across, point.up))
    if len(front) > 1:
        line = [[point.across for point in front], [point.up for point in front]]
        axes.plot(*line, color="gray", linewidth=1.2, linestyle="--", label="Pareto front", zorder=1)
    series = list(dict.fromkeys(point.series for point in points))
    for position, name in enumerate(series):
        some = [point for point in points if point.series == name]
        # A name that begins with an underscore would be left out of the legend.
        label = name.lstrip("_") or name
        for sizes, edge, chosen in (
            (34, 0.0, [point for point in some if not point.on_front and not point.winner]),
            (64, 1.4, [point for point in some if point.on_front and not point.winner]),
            (230, 1.4, [point for point in some if point.winner]),
        ):
            shape = "*" if sizes == 230 else marker(position)
            places = [point.across for point in chosen], [point.up for point in chosen]
            axes.scatter(
                *places,
                s=sizes,
                marker=shape,
                color=f"C{position % 8}",
                edgecolors=axes.spines["left"].get_edgecolor() if edge else "none",
                linewidths=edge,
                alpha=1.0 if edge else 0.75,
                zorder=3 if edge else 2,
            )
        axes.scatter([], [], s=40, marker=marker(position), color=f"C{position % 8}", label=label)
    # Labels go to the better side of the front, where no points are.
    aside, ahead = (-5 if across.less_is_better else 5), (-6 if up.less_is_better else 6)
    for point in points:
        if point.on_front or point.winner:
            axes.annotate(
                point.label,
                (point.across, point.up),
                xytext=(aside, ahead),
                textcoords="offset points",
                ha="right" if across.less_is_better else "left",
                va="top" if up.less_is_better else "bottom",
                fontsize=9,
                zorder=4,
            )
    _scale(axes.xaxis, across, [point.across for point in points])
    _scale(axes.yaxis, up, [point.up for point in points])
    axes.grid(visible=True, axis="both", alpha=0.25)
    axes.margins(0.08)
    if len(series) > 1 or len(front) > 1:
        _legend_below(figure, axes)
    return save(figure, path)


def acceptance_by_depth(shares: Mapping[str, Sequence[float]], path: Path) -> Path:
    """Share of the target's passes that accepted a drafted token at each depth, a line for each name; returns path.

    shares: of depth 1, 2, …
    """
    figure, axes = new_axes("Acceptance by depth", "depth of the drafted token", "share of passes that accepted it")
    for position, (name, values) in enumerate(shares.items()):
        style = "-" if position < 8 else ":"
        depths = range(1, len(values) + 1)
        axes.plot(
            depths, values, style, marker=marker(position), markersize=4, linewidth=1.3, label=_short(name, figure, 8.0)
        )
    highest = max((value for values in shares.values() for value in values), default=1.0)
    axes.set_ylim(0, min(1.02, max(0.05, 1.1 * highest)))
    if shares:
        _legend_below(figure, axes)
    return save(figure, path)


def time_shares_of_runs(seconds: Mapping[str, Mapping[str, float]], path: Path) -> Path:
    """Share of the time by named part, a stacked bar for each run, the first on top; returns path.

    seconds: of the named parts, in any unit, by the run's name.
    """
    figure, axes = new_axes("Time share", "share of the time", "")
    parts = list(dict.fromkeys(part for run_seconds in seconds.values() for part in run_seconds))
    starts = [0.0] * len(seconds)
    for position, part in enumerate(parts):
        shares = [run_seconds.get(part, 0.0) / (sum(run_seconds.values()) or 1.0) for run_seconds in seconds.values()]
        axes.barh(range(len(seconds)), shares, left=starts, height=0.7, color=f"C{position % 8}", label=part)
        starts = [start + share for start, share in zip(starts, shares, strict=True)]
    axes.set_yticks(range(len(seconds)), [_short(name, figure, 4.2) for name in seconds])
    axes.set_xlim(0, 1)
    axes.invert_yaxis()
    axes.grid(visible=False)
    axes.xaxis.set_major_locator(AutoLocator())
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    _legend_below(figure, axes)
    return save(figure, path)


def _scale(axis: XAxis | YAxis, options: Axis, values: Sequence[float]) -> None:
    if options.may_be_log and values and min(values) > 0 and max(values) > 10 * min(values):
        logarithmic(axis, values)
    else:
        axis.set_major_locator(AutoLocator())


def _legend_below(figure: Figure, axes: Axes) -> None:
    """The legend under the axes, where it hides nothing, in as many columns as fit."""
    handles, labels = axes.get_legend_handles_labels()
    # In inches: a letter is about 0.075 wide, a line or marker with its gaps about 0.6.
    widest = max(map(len, labels), default=0) * 0.075 + 0.6
    columns = max(1, min(len(labels), int(figure.get_figwidth() / widest)))
    figure.legend(handles, labels, fontsize=8, loc="outside lower center", ncols=columns)


def _short(name: str, figure: Figure, letters_per_inch: float) -> str:
    """The name, cut if it is too wide for the figure."""
    max_letters = int(figure.get_figwidth() * letters_per_inch)
    return name if len(name) <= max_letters else name[: max_letters - 1] + "…"
