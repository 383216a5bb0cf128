"""Heat maps of the bits per weight of each layer."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from hasten.jobs.common.plots import block_map, level_map
from hasten.jobs.report import metrics as known
from hasten.jobs.report.comparison import Row
from hasten.jobs.report.pictures import Chart

# Maximum number of maps, and of lines in the map of rows with uniform bits, that a reader can compare.
_MAPS, _LINES = 6, 16
# Maximum number of layers that can be distinguished in a map of half width.
_HALF_LAYERS = 400


# Layers with their bits per weight, in order.
Spread = tuple[tuple[str, float], ...]


def maps(rows: Sequence[Row]) -> list[Chart]:
    """A map for every distinct allocation of bits, winner and front first; uniform allocations share one map."""
    spreads: dict[Spread, list[Row]] = {}
    for row in sorted(rows, key=lambda row: (not row.winner, not row.on_front, row.number)):
        spread = _bits_of_layers(row)
        if spread:
            spreads.setdefault(spread, []).append(row)
    if not spreads:
        return []
    bits = [value for spread in spreads for _, value in spread]
    # A colour scale needs different limits.
    limits = (min(bits), max(bits)) if min(bits) < max(bits) else (min(bits) - 0.5, max(bits) + 0.5)
    even = {spread: some for spread, some in spreads.items() if len({value for _, value in spread}) == 1}
    if len(even) < 2:
        even = {}
    uneven = {spread: some for spread, some in spreads.items() if spread not in even}
    chosen = list(uneven.items())[:_MAPS]
    half = len(chosen) + bool(even) > 1 and max((len(spread) for spread, _ in chosen), default=0) <= _HALF_LAYERS
    charts = [_map(index, spread, some, limits, half) for index, (spread, some) in enumerate(chosen)]
    if len(uneven) > _MAPS:
        caption = f"{charts[-1].caption} {len(uneven) - _MAPS} further maps are left out."
        charts[-1] = replace(charts[-1], caption=caption)
    return charts + ([_even_map(even, limits, half and bool(charts))] if even else [])


def _map(index: int, spread: Spread, rows: Sequence[Row], limits: tuple[float, float], half: bool) -> Chart:
    bits = [value for _, value in spread]
    text = f"{min(bits):.3g} bits everywhere" if min(bits) == max(bits) else f"{min(bits):.3g} to {max(bits):.3g} bits"
    numbers = _row_numbers(rows)
    caption = f"{numbers}: {'; '.join(row.label for row in rows[:4])}"
    caption += f" and {len(rows) - 4} more." if len(rows) > 4 else "."
    kinds = len({layer.rpartition(".")[2] for layer, _ in spread})

    def draw(path: Path) -> Path:
        layers = [{"layer": layer, "bits_per_weight": value} for layer, value in spread]
        return level_map(layers, path, limits=limits)

    alt = f"Bits per weight of each layer, {numbers.lower()}: {len(spread)} layers, {text}."
    name = "bits_per_layer" if index == 0 else f"bits_per_layer_{index + 1}"
    return Chart("bits per layer", name, alt, caption, draw, 1.2 + 0.28 * kinds, half)


def _even_map(spreads: Mapping[Spread, Sequence[Row]], limits: tuple[float, float], half: bool) -> Chart:
    """One map of rows whose layers all have the same bits, a line for each."""
    lines = sorted(spreads.items(), key=lambda item: item[1][0].number)[:_LINES]

    def draw(path: Path) -> Path:
        return block_map({_row_numbers(rows): spread for spread, rows in lines}, path, limits)

    text = "; ".join(f"{_row_numbers(rows).lower()}: {spread[0][1]:.3g} bits" for spread, rows in lines)
    caption = "All layers of a row have the same bits." + (
        f" The first {_LINES} of {len(spreads)} are shown." if len(spreads) > _LINES else ""
    )
    alt = f"Bits per weight of each block. {text}."
    return Chart("bits per layer", "bits_per_layer_even", alt, caption, draw, 1.2 + 0.28 * len(lines), half)


def _row_numbers(rows: Sequence[Row]) -> str:
    numbers = ", ".join(str(row.number) for row in rows[:6]) + (", …" if len(rows) > 6 else "")
    return f"Row{'s' if len(rows) > 1 else ''} {numbers}"


def _bits_of_layers(row: Row) -> Spread:
    """Bits of a row's layers; empty if a layer occurs several times, as in a level database."""
    layers = row.entry.report.get("layers")
    if not isinstance(layers, list):
        return ()
    spread = tuple(
        (str(layer.get("layer")), bits)
        for layer in layers
        if (bits := known.number(layer.get("bits_per_weight"))) is not None
    )
    return spread if len({name for name, _ in spread}) == len(spread) else ()
