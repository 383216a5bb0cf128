"""What allocators choose for: the layers of a level database with the sizes and errors of their levels."""

from collections.abc import Mapping

from accel.compression.allocation.base import Choice, Unit
from accel.compression.allocation.grouping import group_units
from accel.compression.levels.database import LevelDatabase
from accel.compression.quantizers.base import Scheme


def make_units(database: LevelDatabase, grouping: str) -> list[Unit]:
    """A unit for every layer, or for the layers that get the same level by the rule `grouping`.

    Errors are those of the layer's output, relative to it. Experts are one unit in any case: transformers reads one
    scheme for those of all blocks.
    """
    units: list[Unit] = []
    experts: list[Unit] = []
    for groups in database.plan:
        for group in groups:
            for layer in group.layers:
                facts = database.facts(layer.name)
                choices = tuple(
                    Choice(level, facts[level]["stored_bits"], facts[level]["error"]) for level in database.levels
                )
                weights = facts[database.levels[0]]["weights"]
                unit = Unit(layer.name, (layer.name,), group.block, layer.module, weights, choices)
                (experts if group.is_expert else units).append(unit)
    units = group_units(units, grouping)
    return [*units, _joined(experts)] if experts else units


def planned_units(database: LevelDatabase) -> list[Unit]:
    """A unit for every layer with the sizes that its levels will have, and no errors: nothing need be solved yet."""
    units = []
    for groups in database.plan:
        for group in groups:
            for layer in group.layers:
                weights = layer.rows * layer.columns
                choices = tuple(
                    Choice(level, _stored_bits(layer.rows, layer.columns, scheme))
                    for level, scheme in database.schemes_of(group)
                )
                units.append(Unit(layer.name, (layer.name,), group.block, layer.module, weights, choices))
    return units


def _stored_bits(rows: int, columns: int, scheme: Scheme) -> int:
    groups = rows * (columns // scheme.columns(columns))
    # Scales have the dtype of the weights, of 16 bits in the checkpoints that are worth compressing.
    return rows * columns * scheme.bits + groups * (16 + (0 if scheme.symmetric else scheme.bits))


def layer_levels(units: list[Unit], assignment: Mapping[str, str]) -> dict[str, str]:
    """Level of every layer, from the levels of the units."""
    return {layer: assignment[unit.name] for unit in units for layer in unit.layers}


def _joined(units: list[Unit]) -> Unit:
    first = units[0]
    choices = tuple(
        Choice(
            choice.level,
            sum(unit.choices[index].bits for unit in units),
            sum(unit.choices[index].error for unit in units),
        )
        for index, choice in enumerate(first.choices)
    )
    layers = tuple(layer for unit in units for layer in unit.layers)
    return Unit(first.name, layers, first.block, "experts", sum(unit.weights for unit in units), choices)
