"""Figures of a run, as PNG files."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]


def error_per_layer(layers: Sequence[Row], path: Path) -> Path:
    """Error of every quantized layer over the depth, one line for each kind of layer; returns path.

    layers: `layer` (its name in the checkpoint), `error` (relative to the original's output), and `bits`, which the
    legend shows where they differ between kinds.
    """
    kinds: dict[str, list[Row]] = {}
    for row in layers:
        kinds.setdefault(_kind(str(row["layer"])), []).append(row)
    several = len({row.get("bits") for row in layers}) > 1
    figure, axes = _axes("Error of each quantized layer", "block", "relative squared error of the layer's output")
    for position, (kind, rows) in enumerate(sorted(kinds.items())):
        bits = sorted({f"{row['bits']:g}" for row in rows if row.get("bits") is not None})
        label = f"{kind} ({', '.join(bits)} bits)" if several and bits else kind
        points = sorted((_block(str(row["layer"]), index), float(row["error"])) for index, row in enumerate(rows))
        axes.plot(*zip(*points, strict=True), marker="osD^v<>P"[position % 8], markersize=4, linewidth=1, label=label)
    if layers and all(row["error"] > 0 for row in layers):
        axes.set_yscale("log")
    if kinds:
        axes.legend(fontsize=8, ncols=2 if len(kinds) > 5 else 1)
    return _save(figure, path)


def seconds_per_block(blocks: Sequence[Row], path: Path) -> Path:
    """Wall seconds of every block as bars; returns path.

    blocks: `seconds`, and `layer`, the block's number or any name with that number in it. Rows of one block, such as
    those of its layers, are added up.
    """
    seconds: dict[int, float] = {}
    for index, row in enumerate(blocks):
        block = _block(str(row["layer"]), index)
        seconds[block] = seconds.get(block, 0.0) + float(row["seconds"])
    figure, axes = _axes("Time of each block", "block", "seconds")
    axes.bar(list(seconds), list(seconds.values()), width=0.8)
    return _save(figure, path)


def level_map(layers: Sequence[Row], path: Path) -> Path:
    """Bits per weight of every layer as a heat map, kinds of layers by blocks; returns path.

    layers: `layer` (its name in the checkpoint) and `bits_per_weight`. Experts share a cell, which shows their mean.
    """
    cells: dict[tuple[str, int], list[float]] = {}
    for index, row in enumerate(layers):
        name = str(row["layer"])
        cells.setdefault((_kind(name), _block(name, index)), []).append(float(row["bits_per_weight"]))
    kinds = list(dict.fromkeys(kind for kind, _ in cells))
    blocks = range(max((block for _, block in cells), default=-1) + 1)
    nothing = [float("nan")]
    means = [
        [sum(some) / len(some) for some in (cells.get((kind, block), nothing) for block in blocks)] for kind in kinds
    ]
    figure, axes = _axes("Bits per weight of each layer", "block", "")
    axes.grid(visible=False)
    if means:
        image = axes.imshow(means, aspect="auto", cmap="viridis")
        figure.colorbar(image, label="bits per weight")
        for line, values in enumerate(means):
            for block, value in enumerate(values):
                if len(blocks) <= 40 and value == value:
                    axes.text(block, line, f"{value:.3g}", ha="center", va="center", fontsize=7, color="white")
    axes.set_yticks(range(len(kinds)), kinds)
    return _save(figure, path)


def pareto(rows: Sequence[Row], path: Path) -> Path:
    """Divergence from the original over the size, a line for each allocator; returns path.

    rows: `allocator`, `bytes` and `kl_divergence`; rows without the latter are left out.
    """
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row["kl_divergence"] is not None:
            point = (float(row["bytes"]) / 2**20, float(row["kl_divergence"]))
            lines.setdefault(str(row["allocator"]), []).append(point)
    figure, axes = _axes("Quality against size", "MiB of quantized weights", "KL divergence, nats a token")
    for position, (name, points) in enumerate(lines.items()):
        axes.plot(*zip(*sorted(points), strict=True), marker="osD^v<>P"[position % 8], linewidth=1, label=name)
    if lines:
        axes.set_yscale("log")
        axes.legend(fontsize=8)
    return _save(figure, path)


def acceptance(histogram: Sequence[int], path: Path) -> Path:
    """Share of the target's passes by how many drafted tokens they accepted, as bars; returns path.

    histogram: passes that accepted 0, 1, 2, … tokens.
    """
    passes = sum(histogram)
    figure, axes = _axes("Accepted tokens of a pass", "drafted tokens that the target accepted", "share of passes")
    axes.bar(range(len(histogram)), [count / passes for count in histogram], width=0.8)
    return _save(figure, path)


def time_shares(seconds: Mapping[str, float], path: Path) -> Path:
    """What the time went to, one bar cut into named parts; returns path."""
    from matplotlib.ticker import AutoLocator

    total = sum(seconds.values()) or 1.0
    figure, axes = _axes("Time of decoding", "share of the time", "")
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
    return _save(figure, path)


def _block(name: str, otherwise: int) -> int:
    """The first number that stands alone between dots, as in model.layers.3.mlp.up_proj."""
    found = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
    return int(found[1]) if found else otherwise


def _kind(name: str) -> str:
    """What the same layers of all blocks have in common: the name behind the block's number, experts as one."""
    behind = re.split(r"(?:^|\.)\d+\.", name, maxsplit=1)[-1]
    return re.sub(r"\.\d+\.", ".*.", behind)


def _axes(title: str, across: str, up: str) -> tuple[Any, Any]:
    # pyplot would pick a backend for the screen and keep every figure: the Figure class draws to files only.
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot(title=title, xlabel=across, ylabel=up)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y", alpha=0.3)
    return figure, axes


def _save(figure: Any, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return path
