"""Plots of a run, as PNG or SVG files."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from cycler import cycler
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.axis import XAxis, YAxis
from matplotlib.figure import Figure
from matplotlib.ticker import AutoLocator, FuncFormatter, LogLocator, MaxNLocator, NullFormatter

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Theme:
    """Colours and size of plots.

    ink: colour of text and axes. paper: of the background. series: of lines and bars, in order. size: inches. titled:
    whether plots have a title, which they do not need below a heading of the same words.
    """

    ink: str
    paper: str
    series: tuple[str, ...]
    size: tuple[float, float]
    titled: bool = True


_SERIES_ON_WHITE = ("#0b62c4", "#b8500a", "#00795a", "#a8327e", "#6a4fc4", "#7a6200", "#c02f2f", "#4b5b6b")
_SERIES_ON_DARK = ("#6cb6ff", "#f69d50", "#4fd1a5", "#f28bc8", "#b39dff", "#e3c54a", "#ff8c85", "#a9b8c7")
LIGHT = Theme("#1c2127", "#ffffff", _SERIES_ON_WHITE, (11.3, 4.8))
DARK = Theme("#e4e8ed", "#1a1f26", _SERIES_ON_DARK, (11.3, 4.8))
_RUN_THEME = replace(LIGHT, size=(8.0, 4.5))
_THEME: ContextVar[Theme] = ContextVar("theme", default=_RUN_THEME)
_MARKERS = "osD^v<>P"


@contextmanager
def themed(theme: Theme) -> Iterator[None]:
    """Context in which plots have this theme and text is literal: a dollar sign does not start a formula."""
    inked = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "grid.color")
    papers = ("figure.facecolor", "axes.facecolor", "savefig.facecolor", "legend.facecolor")
    rules: Any = dict.fromkeys(inked, theme.ink) | dict.fromkeys(papers, theme.paper)
    rules |= {
        "axes.prop_cycle": cycler(color=theme.series),
        "axes.spines.top": False,
        "axes.spines.right": False,
        "legend.framealpha": 0.8,
        "legend.edgecolor": "none",
        "text.parse_math": False,
        # The same bytes for the same data.
        "svg.hashsalt": "hasten",
    }
    token = _THEME.set(theme)
    try:
        with rc_context(rules):
            yield
    finally:
        _THEME.reset(token)


def recoloured(svg: str, theme: Theme, other: Theme) -> str:
    """An SVG plot with its theme's colours replaced by another theme's."""
    colours = zip((theme.ink, theme.paper, *theme.series), (other.ink, other.paper, *other.series), strict=True)
    for old, new in colours:
        svg = svg.replace(old, new)
    return svg


def error_per_layer(layers: Sequence[Row], path: Path) -> Path:
    """Error of every quantized layer over the depth, one line for each kind of layer; returns path.

    layers: `layer` (its name in the checkpoint), `error` (relative to the original's output), and `bits`, which the
    legend shows where they differ between kinds.
    """
    kinds: dict[str, list[Row]] = {}
    blocks = _blocks([str(row["layer"]) for row in layers])
    for row in layers:
        kinds.setdefault(_kind(str(row["layer"])), []).append(row)
    several = len({row.get("bits") for row in layers}) > 1
    figure, axes = new_axes("Error of each quantized layer", "block", "relative squared error of the layer's output")
    for position, (kind, rows) in enumerate(sorted(kinds.items())):
        bits = sorted({f"{row['bits']:g}" for row in rows if row.get("bits") is not None})
        label = f"{kind} ({', '.join(bits)} bits)" if several and bits else kind
        points = sorted((blocks[str(row["layer"])], float(row["error"])) for row in rows)
        axes.plot(*zip(*points, strict=True), marker=marker(position), markersize=4, linewidth=1, label=label)
    if layers and all(row["error"] > 0 for row in layers):
        axes.set_yscale("log")
    if kinds:
        axes.legend(fontsize=8, ncols=2 if len(kinds) > 5 else 1)
    return save(figure, path)


def seconds_per_block(blocks: Sequence[Row], path: Path) -> Path:
    """Wall seconds of every block as bars; returns path.

    blocks: `seconds`, and `layer`, the block's number or any name with that number in it. Rows of one block, such as
    those of its layers, are added up.
    """
    seconds: dict[int, float] = {}
    for index, row in enumerate(blocks):
        block = _block(str(row["layer"]), index)
        seconds[block] = seconds.get(block, 0.0) + float(row["seconds"])
    figure, axes = new_axes("Time of each block", "block", "seconds")
    axes.bar(list(seconds), list(seconds.values()), width=0.8)
    return save(figure, path)


def level_map(layers: Sequence[Row], path: Path, limits: tuple[float, float] | None = None) -> Path:
    """Bits per weight of every layer as a heat map, kinds of layers by blocks; returns path.

    layers: `layer` (its name in the checkpoint) and `bits_per_weight`. Experts share a cell, which shows their mean.
    limits: bits of the lowest and the highest colour, for maps that are compared; None takes those of the layers.
    """
    cells: dict[tuple[str, int], list[float]] = {}
    blocks = _blocks([str(row["layer"]) for row in layers])
    for row in layers:
        name = str(row["layer"])
        cells.setdefault((_kind(name), blocks[name]), []).append(float(row["bits_per_weight"]))
    return _heat_map("Bits per weight of each layer", cells, path, limits)


def block_map(
    layers: Mapping[str, Sequence[tuple[str, float]]], path: Path, limits: tuple[float, float] | None = None
) -> Path:
    """Mean bits per weight of every block as a heat map, a line for each run; returns path.

    layers: (name in the checkpoint, bits per weight) of all layers, by the run's name. limits: as of `level_map`.
    """
    cells: dict[tuple[str, int], list[float]] = {}
    for run, rows in layers.items():
        blocks = _blocks([name for name, _ in rows])
        for name, bits in rows:
            cells.setdefault((run, blocks[name]), []).append(bits)
    return _heat_map("Bits per weight of each block", cells, path, limits)


def pareto(rows: Sequence[Row], path: Path) -> Path:
    """Divergence from the original over the size, a line for each allocator; returns path.

    rows: `allocator`, `bytes` and `kl_divergence`; rows without the latter are left out.
    """
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row["kl_divergence"] is not None:
            point = (float(row["bytes"]) / 2**20, float(row["kl_divergence"]))
            lines.setdefault(str(row["allocator"]), []).append(point)
    return _divergence_over_size(lines, "Quality against size", "MiB of quantized weights", path)


def cache_pareto(rows: Sequence[Row], path: Path) -> Path:
    """Divergence from the full cache over the bytes that are held, a line for each method; returns path.

    rows: `method`, `bytes_end` and `kl_divergence`.
    """
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        point = (float(row["bytes_end"]) / 2**20, float(row["kl_divergence"]))
        lines.setdefault(str(row["method"]), []).append(point)
    return _divergence_over_size(lines, "Quality against size of the cache", "MiB held by the cache", path)


def cache_levels(rows: Sequence[Row], path: Path) -> Path:
    """Bytes that each layer's cache holds for a token, as bars in a colour for each level; returns path.

    rows: `layer` (its number), `level` (its name) and `bytes`.
    """
    figure, axes = new_axes("Cache of each layer", "layer", "bytes a token")
    for level in dict.fromkeys(str(row["level"]) for row in rows):
        own = [row for row in rows if row["level"] == level]
        axes.bar([int(row["layer"]) for row in own], [float(row["bytes"]) for row in own], width=0.8, label=level)
    axes.legend(fontsize=8)
    return save(figure, path)


def _divergence_over_size(
    lines: Mapping[str, Sequence[tuple[float, float]]], title: str, size: str, path: Path
) -> Path:
    figure, axes = new_axes(title, size, "KL divergence, nats a token")
    for position, (name, points) in enumerate(lines.items()):
        axes.plot(*zip(*sorted(points), strict=True), marker=marker(position), linewidth=1, label=name)
    divergences = [divergence for points in lines.values() for _, divergence in points]
    if lines:
        if min(divergences) > 0:
            logarithmic(axes.yaxis, divergences)
        axes.xaxis.set_major_locator(AutoLocator())
        axes.legend(fontsize=8)
    return save(figure, path)


def acceptance(histogram: Sequence[int], path: Path) -> Path:
    """Share of the target's passes by how many drafted tokens they accepted, as bars; returns path.

    histogram: passes that accepted 0, 1, 2, … tokens.
    """
    passes = sum(histogram)
    figure, axes = new_axes("Accepted tokens of a pass", "drafted tokens that the target accepted", "share of passes")
    axes.bar(range(len(histogram)), [count / passes for count in histogram], width=0.8)
    return save(figure, path)


def time_shares(seconds: Mapping[str, float], path: Path) -> Path:
    """Share of the time by named part, as one stacked bar; returns path."""
    total = sum(seconds.values()) or 1.0
    figure, axes = new_axes("Time of decoding", "share of the time", "")
    start = 0.0
    for name, part in seconds.items():
        share = part / total
        axes.barh([0], [share], left=[start], height=0.5, label=f"{name} {share:.1%}")
        start += share
    axes.set_yticks([])
    axes.set_xlim(0, 1)
    axes.set_ylim(-0.5, 0.8)
    axes.xaxis.set_major_locator(AutoLocator())
    axes.legend(fontsize=8, ncols=4, loc="upper center")
    return save(figure, path)


def marker(position: int) -> str:
    """Marker of a line or point series by its position."""
    return _MARKERS[position % len(_MARKERS)]


def _block(name: str, otherwise: int) -> int:
    """Block number in a module name such as model.layers.3.mlp.up_proj; `otherwise` if it has none."""
    match = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
    return int(match[1]) if match else otherwise


def _blocks(names: Sequence[str]) -> dict[str, int]:
    """Block numbers by module name; output layer and embedding come behind the last block."""
    numbered = {name: _block(name, -1) for name in names}
    behind = max(numbered.values(), default=-1) + 1
    return {name: behind if number < 0 else number for name, number in numbered.items()}


def _kind(name: str) -> str:
    """Module name after the block number, with expert numbers replaced by `*`."""
    behind = re.split(r"(?:^|\.)\d+\.", name, maxsplit=1)[-1]
    return re.sub(r"\.\d+\.", ".*.", behind)


def _heat_map(
    title: str, cells: Mapping[tuple[str, int], Sequence[float]], path: Path, limits: tuple[float, float] | None
) -> Path:
    """Heat map of the mean of each cell; cells: values by line and block."""
    lines = list(dict.fromkeys(line for line, _ in cells))
    blocks = range(max((block for _, block in cells), default=-1) + 1)
    nothing = [float("nan")]
    means = [
        [sum(some) / len(some) for some in (cells.get((line, block), nothing) for block in blocks)] for line in lines
    ]
    figure, axes = new_axes(title, "block", "")
    axes.grid(visible=False)
    if means:
        low, high = limits or (None, None)
        image = axes.imshow(means, aspect="auto", cmap="viridis", vmin=low, vmax=high)
        figure.colorbar(image, label="bits per weight")
        # Names and colour bar take about 2.2 inches, a number about a quarter of an inch.
        readable = len(blocks) <= (figure.get_figwidth() - 2.2) / 0.27
        for position, values in enumerate(means):
            for block, value in enumerate(values):
                if readable and value == value:
                    ink = _ink_on(tuple(image.to_rgba(np.asarray(value))))
                    axes.text(block, position, f"{value:.3g}", ha="center", va="center", fontsize=7, color=ink)
    # Long names keep their end, which says what the layer is. A letter takes about a twelfth of an inch.
    max_letters = int(4.5 * figure.get_figwidth())
    names = [line if len(line) <= max_letters else f"…{line[1 - max_letters :]}" for line in lines]
    axes.set_yticks(range(len(lines)), names, fontsize=9)
    return save(figure, path)


def _ink_on(colour: Sequence[float]) -> str:
    """Near black or near white, whichever is easier to read on a colour (red, green, blue from 0 to 1).

    Neither is a colour of a theme, so `recoloured` leaves them.
    """
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in colour[:3])
    # Relative luminance of WCAG 2: above 0.179 black has more contrast than white.
    return "#0a0a0a" if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.179 else "#f8f8f8"


def new_axes(title: str, across: str, up: str) -> tuple[Figure, Axes]:
    """A figure in the current theme, and its axes; across, up: labels of the x and the y axis."""
    # Not pyplot, which would select a backend for the screen and keep every figure.
    figure = Figure(figsize=_THEME.get().size, layout="constrained")
    axes = figure.add_subplot(title=title if _THEME.get().titled else "", xlabel=across, ylabel=up)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y", alpha=0.3)
    return figure, axes


def logarithmic(axis: XAxis | YAxis, values: Sequence[float]) -> None:
    """Make an axis of positive values logarithmic, with plain numbers as tick labels."""
    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    # Within two decades, powers of ten alone would give at most two tick labels.
    wide = max(values) > 100 * min(values)
    axis.set_major_locator(LogLocator(subs=(1.0,) if wide else (1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def save(figure: Figure, path: Path) -> Path:
    """Write a figure in the format of the path's suffix; returns path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Without a date the same plot gives the same bytes.
    figure.savefig(path, dpi=120, metadata={"Date": None} if path.suffix == ".svg" else None)
    return path
