"""Plots of `hasten train`."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from hasten.jobs.common.plots import logarithmic, new_axes, save
from hasten.jobs.common.records import Record

# A mean over this share of the steps shows the trend of a noisy loss.
_SMOOTHED = 0.02


def plots(report: Record, folder: Path) -> Iterator[Path]:
    """Write the plots of a training's report into a folder; paths of the files."""
    yield loss_curve(report["losses"], folder / "loss.png")
    yield acceptance_by_position(report["evaluations"], folder / "acceptance.png")
    if report["data_scaling"] is not None:
        yield data_scaling(report["data_scaling"], folder / "data_scaling.png")


def loss_curve(losses: Sequence[float], path: Path) -> Path:
    """Loss by step, with its moving mean; returns path."""
    figure, axes = new_axes("Training loss", "step", "loss")
    steps = range(1, len(losses) + 1)
    axes.plot(steps, losses, linewidth=0.6, alpha=0.4, label="of the step")
    width = max(1, round(_SMOOTHED * len(losses)))
    means = [sum(losses[max(0, end - width) : end]) / min(width, end) for end in steps]
    axes.plot(steps, means, linewidth=1.5, label=f"mean of {width} steps")
    axes.legend(fontsize=8)
    return save(figure, path)


def acceptance_by_position(evaluations: Sequence[Record], path: Path) -> Path:
    """Share of passes that accept the draft of each position, over the training tokens; returns path.

    evaluations: rows with `tokens`, `branch` and `acceptance_per_position`; those of a decayed branch are left out.
    """
    rows = [row for row in evaluations if not row["branch"]]
    figure, axes = new_axes("Acceptance on held-out text", "training tokens", "share of passes")
    for position in range(max((len(row["acceptance_per_position"]) for row in rows), default=0)):
        shares = [(row["acceptance_per_position"] + [0.0] * (position + 1))[position] for row in rows]
        axes.plot([row["tokens"] for row in rows], shares, "o-", markersize=3, label=f"position {position + 1}")
    axes.set_ylim(0, None)
    if axes.lines:  # none if nothing was accepted anywhere
        axes.legend(fontsize=8)
    return save(figure, path)


def data_scaling(scaling: Record, path: Path) -> Path:
    """Tokens a pass over training tokens: what was measured, and the law with its intervals; returns path."""
    figure, axes = new_axes("Acceptance over training tokens", "training tokens", "tokens a pass")
    points, predicted = scaling["points"], scaling["predictions"]
    axes.plot([x for x, _ in points], [y for _, y in points], "o", markersize=5, label="measured")
    tokens = [row["tokens"] for row in predicted]
    low, high = ([row[name] - row["value"] for row in predicted] for name in ("low", "high"))
    bars = [[-value for value in low], high]
    axes.errorbar(tokens, [row["value"] for row in predicted], bars, fmt="s--", capsize=3, label="extrapolated")
    logarithmic(axes.xaxis, [*(x for x, _ in points), *tokens])
    axes.legend(fontsize=8)
    return save(figure, path)
