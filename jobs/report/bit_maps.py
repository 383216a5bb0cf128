"""Heat maps of the bits that layers have."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from hasten.jobs.common.records import Record
from hasten.jobs.report import metrics as known
from hasten.jobs.report.comparison import Row
from hasten.jobs.report.pictures import Chart

# More maps, or lines of the map of rows whose layers are all alike, would be too many to compare.
_MAPS, _LINES = 6, 16
# Layers that can be told from each other in a map of half the width.
_HALF_LAYERS = 400


def maps(rows: Sequence[Row]) -> list[Chart]:
    """A map for every different spread of bits, the winner and the front first; one for all spreads that are even."""
    spreads: dict[tuple[tuple[str, float], ...], list[Row]] = {}
    for row in sorted(rows, key=lambda row: (not row.winner, not row.on_front, row.number)):
        layers = _layers(row)
        if layers:
            spread = tuple((str(each["layer"]), float(each["bits_per_weight"])) for each in layers)
            spreads.setdefault(spread, []).append(row)
    if not spreads:
        return []
    bits = [value for spread in spreads for _, value in spread]
    # Limits of colours are no point.
    limits = (min(bits), max(bits)) if min(bits) < max(bits) else (min(bits) - 0.5, max(bits) + 0.5)
    even = {spread: some for spread, some in spreads.items() if len({value for _, value in spread}) == 1}
    if len(even) < 2:
        even = {}
    uneven = {spread: some for spread, some in spreads.items() if spread not in even}
    chosen = list(uneven.items())[:_MAPS]
    half = len(chosen) + bool(even) > 1 and max((len(spread) for spread, _ in chosen), default=0) <= _HALF_LAYERS
    found = [_map(index, spread, some, limits, half) for index, (spread, some) in enumerate(chosen)]
    if len(uneven) > _MAPS:
        told = f"{found[-1].caption} {len(uneven) - _MAPS} further maps are left out."
        found[-1] = replace(found[-1], caption=told)
    return found + ([_even_map(even, limits, half and bool(found))] if even else [])


def _map(
    index: int, spread: Sequence[tuple[str, float]], rows: Sequence[Row], limits: tuple[float, float], half: bool
) -> Chart:
    bits = [value for _, value in spread]
    told = f"{min(bits):.3g} bits everywhere" if min(bits) == max(bits) else f"{min(bits):.3g} to {max(bits):.3g} bits"
    numbers = _row_numbers(rows)
    caption = f"{numbers}: {'; '.join(row.label for row in rows[:4])}"
    caption += f" and {len(rows) - 4} more." if len(rows) > 4 else "."
    kinds = len({layer.rpartition(".")[2] for layer, _ in spread})

    def draw(path: Path) -> Path:
        from hasten.jobs.common.plots import level_map

        layers = [{"layer": layer, "bits_per_weight": value} for layer, value in spread]
        return level_map(layers, path, limits=limits)

    alt = f"Bits per weight of each layer, {numbers.lower()}: {len(spread)} layers, {told}."
    name = "bits_per_layer" if index == 0 else f"bits_per_layer_{index + 1}"
    return Chart("bits per layer", name, alt, caption, draw, 1.2 + 0.28 * kinds, half)


def _even_map(
    spreads: Mapping[tuple[tuple[str, float], ...], Sequence[Row]], limits: tuple[float, float], half: bool
) -> Chart:
    """Rows whose layers all have the same bits: a line for each is enough."""
    lines = sorted(spreads.items(), key=lambda item: item[1][0].number)[:_LINES]

    def draw(path: Path) -> Path:
        from hasten.jobs.common.plots import block_map

        return block_map({_row_numbers(rows): spread for spread, rows in lines}, path, limits)

    told = "; ".join(f"{_row_numbers(rows).lower()}: {spread[0][1]:.3g} bits" for spread, rows in lines)
    caption = "All layers of a row have the same bits." + (
        f" The first {_LINES} of {len(spreads)} are shown." if len(spreads) > _LINES else ""
    )
    alt = f"Bits per weight of each block. {told}."
    return Chart("bits per layer", "bits_per_layer_even", alt, caption, draw, 1.2 + 0.28 * len(lines), half)


def _row_numbers(rows: Sequence[Row]) -> str:
    numbers = ", ".join(str(row.number) for row in rows[:6]) + (", …" if len(rows) > 6 else "")
    return f"Row{'s' if len(rows) > 1 else ''} {numbers}"


def _layers(row: Row) -> list[Record]:
    """Bits of a row's layers; none where a layer has several, as in a database of levels."""
    layers = row.entry.report.get("layers")
    if not isinstance(layers, list):
        return []
    known_bits = [each for each in layers if known.number(each.get("bits_per_weight")) is not None]
    return known_bits if len({each.get("layer") for each in known_bits}) == len(known_bits) else []
