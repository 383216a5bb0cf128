"""A chart, and its pictures: a PNG file for documents, and one for every kind of page."""

import base64
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

# At 96 pixels an inch the narrow ones fill a page of 400 pixels, two halves one of 1280.
_NARROW_INCHES, _HALF_INCHES = 3.75, 5.5


@dataclass(frozen=True)
class Chart:
    """A picture that `draw` makes at a path. section: what it belongs to; alt: what it shows, in words.

    height: inches of the picture, None is the usual height. half: two of them fit beside each other on a wide page.
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
    from hasten.jobs.common.plots import LIGHT, looking

    look = LIGHT if chart.height is None else replace(LIGHT, size=(LIGHT.size[0], chart.height))
    with looking(look):
        return chart.draw(folder / f"{chart.name}.png")


def pictures(chart: Chart) -> Pictures:
    """The chart drawn for every kind of page."""
    from hasten.jobs.common.plots import DARK, LIGHT, looking, recoloured

    height = chart.height or LIGHT.size[1]
    wide = _HALF_INCHES if chart.half else LIGHT.size[0]
    drawn = {}
    with tempfile.TemporaryDirectory() as folder:
        for kind, size in {"": (wide, height), "narrow_": (_NARROW_INCHES, min(height, 4.2))}.items():
            with looking(replace(LIGHT, size=size, titled=False)):
                svg = chart.draw(Path(folder) / "chart.svg").read_text(encoding="utf-8")
            drawn[f"{kind}light"] = _data(svg)
            drawn[f"{kind}dark"] = _data(recoloured(svg, LIGHT, DARK))
    return Pictures(chart, **drawn)


def _data(svg: str) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()
