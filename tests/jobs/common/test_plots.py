from pathlib import Path
from typing import Any

import pytest

from hasten.jobs.common import plots

LAYERS: list[dict[str, Any]] = [
    {"layer": f"model.layers.{block}.{kind}", "error": 0.01 * (block + 1), "seconds": 0.5, "bits": bits}
    for block in range(3)
    for kind, bits in (("self_attn.q_proj", 4), ("mlp.down_proj", 3))
]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Axes of the figures that were saved."""
    seen: list[Any] = []
    save = plots.save

    def watched(figure: Any, path: Path) -> Path:
        seen.extend(figure.axes)
        return save(figure, path)

    monkeypatch.setattr(plots, "save", watched)
    return seen


def is_png(path: Path) -> bool:
    return path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_errors_are_lines_over_the_blocks_for_each_kind_of_layer(tmp_path: Path, drawn: list[Any]) -> None:
    assert is_png(plots.error_per_layer(LAYERS, tmp_path / "figures" / "error.png"))
    (axes,) = drawn
    lines = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    points = [[0, 0.01], [1, 0.02], [2, pytest.approx(0.03)]]
    assert lines == {"mlp.down_proj (3 bits)": points, "self_attn.q_proj (4 bits)": points}
    assert axes.get_yscale() == "log"
    assert axes.get_xlabel() == "block"
    assert "error" in axes.get_ylabel()


def test_experts_of_a_layer_share_a_line(tmp_path: Path, drawn: list[Any]) -> None:
    rows = [{"layer": f"model.layers.0.mlp.experts.{expert}.up_proj", "error": 0.1, "bits": 4} for expert in range(5)]
    plots.error_per_layer(rows, tmp_path / "error.png")
    assert [line.get_label() for line in drawn[0].lines] == ["mlp.experts.*.up_proj"]


def test_an_error_of_zero_has_a_place_in_the_figure(tmp_path: Path, drawn: list[Any]) -> None:
    plots.error_per_layer([{**row, "error": 0.0} for row in LAYERS], tmp_path / "error.png")
    assert drawn[0].get_yscale() == "linear"


def test_seconds_of_a_blocks_layers_are_added_up(tmp_path: Path, drawn: list[Any]) -> None:
    assert is_png(plots.seconds_per_block(LAYERS, tmp_path / "seconds.png"))
    assert [(bar.get_x() + bar.get_width() / 2, bar.get_height()) for bar in drawn[0].patches] == [
        (pytest.approx(block), pytest.approx(1.0)) for block in range(3)
    ]
    assert drawn[0].get_ylabel() == "seconds"


def test_blocks_may_be_given_by_number(tmp_path: Path, drawn: list[Any]) -> None:
    plots.seconds_per_block([{"layer": 4, "seconds": 2.0}, {"layer": 5, "seconds": 3.0}], tmp_path / "seconds.png")
    assert [bar.get_height() for bar in drawn[0].patches] == [2.0, 3.0]
    assert drawn[0].patches[0].get_x() + 0.4 == pytest.approx(4)


def test_nothing_quantized_gives_an_empty_figure(tmp_path: Path) -> None:
    assert is_png(plots.error_per_layer([], tmp_path / "error.png"))


def test_accepted_tokens_are_bars_of_shares(tmp_path: Path, drawn: list[Any]) -> None:
    assert is_png(plots.acceptance([5, 0, 3, 2], tmp_path / "acceptance.png"))
    (axes,) = drawn
    assert [bar.get_height() for bar in axes.patches] == [0.5, 0, 0.3, 0.2]


def test_shares_of_time_stand_one_behind_the_other(tmp_path: Path, drawn: list[Any]) -> None:
    assert is_png(plots.time_shares({"draft": 1.0, "target": 3.0}, tmp_path / "time.png"))
    (axes,) = drawn
    assert [(bar.get_x(), bar.get_width()) for bar in axes.patches] == [(0, 0.25), (0.25, 0.75)]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["draft 25.0%", "target 75.0%"]


def test_output_layer_and_embedding_are_drawn_behind_the_last_block(tmp_path: Path, drawn: list[Any]) -> None:
    outer = [{"layer": name, "error": 0.5, "bits": 8} for name in ("lm_head", "model.embed_tokens")]
    plots.error_per_layer([*LAYERS, *outer], tmp_path / "error.png")
    (axes,) = drawn
    lines = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    assert lines["lm_head (8 bits)"] == lines["model.embed_tokens (8 bits)"] == [[3, 0.5]]
