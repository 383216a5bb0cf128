"""A chart, as a PNG file for documents, and as SVG for wide and narrow, light and dark pages."""

import base64
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from hasten.jobs.common.plots import DARK, LIGHT, recoloured, themed

# At 96 pixels per inch a narrow chart fills a page of 400 pixels, two half charts one of 1280.
_NARROW_INCHES, _HALF_INCHES = 3.75, 5.5


@dataclass(frozen=True)
class Chart:
    """A chart that `draw` writes to a path. section: of the report; alt: its content in words.

    height: inches, None is the default. half: two of them fit beside each other on a wide page.
    """

    section: str
    name: str
    alt: str
    caption: str
    draw: Callable[[Path], Path]
    height: float | None = None
    half: bool = False


@dataclass(frozen=True)
class Pictures:
    """A chart as data URIs: for wide and narrow pages, light and dark."""

    chart: Chart
    light: str
    dark: str
    narrow_light: str
    narrow_dark: str


def write_png(chart: Chart, folder: Path) -> Path:
    """The chart as a file for documents and slides, on white."""
    theme = LIGHT if chart.height is None else replace(LIGHT, size=(LIGHT.size[0], chart.height))
    with themed(theme):
        return chart.draw(folder / f"{chart.name}.png")


def pictures(chart: Chart) -> Pictures:
    """The chart drawn for every kind of page."""
    height = chart.height or LIGHT.size[1]
    wide = _HALF_INCHES if chart.half else LIGHT.size[0]
    drawn = {}
    with tempfile.TemporaryDirectory() as folder:
        for kind, size in {"": (wide, height), "narrow_": (_NARROW_INCHES, min(height, 4.2))}.items():
            with themed(replace(LIGHT, size=size, titled=False)):
                svg = chart.draw(Path(folder) / "chart.svg").read_text(encoding="utf-8")
            drawn[f"{kind}light"] = _data(svg)
            drawn[f"{kind}dark"] = _data(recoloured(svg, LIGHT, DARK))
    return Pictures(chart, **drawn)


def _data(svg: str) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()
