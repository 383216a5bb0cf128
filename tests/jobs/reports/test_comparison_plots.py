import re
from pathlib import Path
from typing import Any

import pytest

from hasten.jobs.common import plots
from hasten.jobs.common.plots import DARK, LIGHT, recoloured, themed
from hasten.jobs.report import comparison_plots
from hasten.jobs.report.comparison_plots import Axis, Point


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Figures that were saved."""
    seen: list[Any] = []

    def watched(figure: Any, path: Path) -> Path:
        seen.append(figure)
        return plots.save(figure, path)

    monkeypatch.setattr(comparison_plots, "save", watched)
    return seen


POINTS = [
    Point(4.0, 0.01, "gptq", "1", on_front=True, winner=True),
    Point(2.0, 0.8, "gptq", "3", on_front=True),
    Point(4.0, 0.02, "round", "2"),
]


def test_the_front_is_a_line_its_points_are_labelled_and_colours_are_named(tmp_path: Path, drawn: list[Any]) -> None:
    comparison_plots.trade_off(POINTS, "Title", Axis("size"), Axis("divergence"), tmp_path / "trade_off.png")
    (axes,) = drawn[0].axes
    front = next(line for line in axes.lines if line.get_label() == "Pareto front")
    assert front.get_xydata().tolist() == [[2.0, 0.8], [4.0, 0.01]]
    assert sorted(text.get_text() for text in axes.texts) == ["1", "3"]
    (legend,) = drawn[0].legends
    assert [text.get_text() for text in legend.get_texts()] == ["Pareto front", "gptq", "round"]
    # 0.8 is far from 0.01, 4 is not far from 2.
    assert (axes.get_xscale(), axes.get_yscale()) == ("linear", "log")
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("size", "divergence")


def test_a_dollar_and_an_underscore_in_a_name_are_shown_as_they_are(tmp_path: Path, drawn: list[Any]) -> None:
    points = [Point(1.0, 1.0, "_$x_", "1"), Point(2.0, 2.0, "b", "2")]
    with themed(LIGHT):
        comparison_plots.trade_off(points, "Title", Axis("size"), Axis("divergence"), tmp_path / "trade_off.svg")
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == ["$x_", "b"]


def test_acceptance_is_a_line_for_each_run_from_depth_one(tmp_path: Path, drawn: list[Any]) -> None:
    comparison_plots.acceptance_by_depth({"a": [0.5, 0.25], "b": [0.4]}, tmp_path / "acceptance.png")
    (axes,) = drawn[0].axes
    assert {line.get_label(): line.get_xydata().tolist() for line in axes.lines} == {
        "a": [[1, 0.5], [2, 0.25]],
        "b": [[1, 0.4]],
    }


def test_shares_of_a_run_fill_its_bar(tmp_path: Path, drawn: list[Any]) -> None:
    runs = {"a": {"draft": 1.0, "target": 3.0}, "b": {"target": 5.0}}
    comparison_plots.time_shares_of_runs(runs, tmp_path / "time.png")
    bars = [(bar.get_y() + 0.35, bar.get_x(), bar.get_width()) for bar in drawn[0].axes[0].patches]
    assert bars == [
        (pytest.approx(y), x, width) for y, x, width in [(0, 0, 0.25), (1, 0, 0), (0, 0.25, 0.75), (1, 0, 1)]
    ]
    assert [label.get_text() for label in drawn[0].axes[0].get_yticklabels()] == ["a", "b"]


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
def test_colours_stand_out_from_the_paper(theme: plots.Theme) -> None:
    def luminance(colour: str) -> float:
        parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(colour: str) -> float:
        low, high = sorted((luminance(colour), luminance(theme.paper)))
        return (high + 0.05) / (low + 0.05)

    # WCAG 2, level AA: texts, and parts of graphics.
    assert contrast(theme.ink) >= 4.5
    assert min(map(contrast, theme.series)) >= 3


def test_a_look_ends_with_its_block(tmp_path: Path, drawn: list[Any]) -> None:
    with themed(DARK):
        comparison_plots.acceptance_by_depth({"a": [0.5]}, tmp_path / "dark.svg")
    comparison_plots.acceptance_by_depth({"a": [0.5]}, tmp_path / "plain.png")
    dark, plain = drawn
    assert (tuple(dark.get_size_inches()), tuple(plain.get_size_inches())) == (DARK.size, (8.0, 4.5))
    assert dark.get_facecolor() != plain.get_facecolor() == (1.0, 1.0, 1.0, 1.0)


def test_the_same_data_gives_the_same_bytes(tmp_path: Path) -> None:
    written = []
    for name in ("a.svg", "b.svg"):
        with themed(LIGHT):
            written.append(comparison_plots.acceptance_by_depth({"a": [0.5]}, tmp_path / name).read_bytes())
    assert written[0] == written[1]


def test_a_recoloured_plot_equals_one_drawn_with_the_other_theme(tmp_path: Path) -> None:
    written = []
    for name, theme in {"light": LIGHT, "dark": DARK}.items():
        with themed(theme):
            path = comparison_plots.trade_off(
                POINTS, "Title", Axis("size"), Axis("divergence"), tmp_path / f"{name}.svg"
            )
        # Ids of markers are made of all that they look like.
        written.append(re.sub(r"\b[mp][0-9a-f]{10}\b", "id", path.read_text()))
    assert written[0] != written[1]
    assert recoloured(written[0], LIGHT, DARK) == written[1]
