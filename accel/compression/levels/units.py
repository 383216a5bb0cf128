"""The units of a level database, for allocators: its layers with sizes and errors of their levels, and its parts."""

from collections.abc import Callable, Iterator, Mapping, Sequence

from hasten.accel.compression.allocators.base import ATTENTION, BLOCK, DROP, MLP, Choice, Unit
from hasten.accel.compression.allocators.grouping import group_units, join
from hasten.accel.compression.calibration.layer_groups import Group
from hasten.accel.compression.calibration.solve import WEIGHTS
from hasten.accel.compression.levels.base import Level
from hasten.accel.compression.levels.database import LevelDatabase
from hasten.accel.compression.levels.depth import dropped_bits, part_of
from hasten.accel.compression.levels.level import KEEP
from hasten.accel.compression.result import Facts
from hasten.accel.errors import UserError
from hasten.accel.models.architecture import Layer

PARTS = (ATTENTION, MLP, BLOCK)
# Cost of a layer at a level, None for `keep`, that takes so many bits.
Price = Callable[[Layer, Level | None, int], int]


def make_units(
    database: LevelDatabase,
    grouping: str,
    keep: bool = False,
    drop: Sequence[str] = (),
    solved: bool = True,
    price: Price | None = None,
) -> list[Unit]:
    """Units of the layers, joined by the rule `grouping` (see group_units), and of the parts that may be dropped.

    keep: adds the level `keep`, of error 0, to all layers. drop: kinds of parts that may be dropped in every block:
    `attention`, `mlp` or `block`. solved: False makes units with sizes but without errors, before the database exists.
    price: cost of a level in the unit of the budget; None counts bits.
    Errors are those of the layer's output, relative to that output; a dropped part has an error of 1 for each of its
    layers. All experts are one unit under every rule, because transformers reads one scheme for all of them. Experts
    that too few tokens reached, whose errors are of the weights, add no error to those of the others.
    """
    parts = _parts(database, drop)
    units: list[Unit] = []
    experts: list[Unit] = []
    facts = {layer.name: database.facts(layer.name) for _, layer in _layers(database)} if solved else {}
    unmeasured = _unmeasured(database, facts)
    for group, layer in _layers(database):
        is_measured = solved and layer.name not in unmeasured
        options: list[tuple[str, Level | None, int]] = [
            (name, level, database.stored_bits(group, layer, level)) for name, level in database.levels_of(group)
        ]
        if keep:
            options.append((KEEP, None, 8 * database.checkpoint.nbytes(f"{layer.name}.weight")))
        choices = [
            Choice(
                name,
                bits,
                facts[layer.name][name]["error"] if is_measured and level is not None else 0.0,
                bits if price is None else price(layer, level, bits),
            )
            for name, level, bits in options
        ]
        unit = Unit(
            name=layer.name,
            layers=(layer.name,),
            block=group.block,
            kind=layer.module,
            weights=layer.rows * layer.columns,
            choices=tuple(sorted(choices, key=lambda choice: choice.cost)),
            part_of=_holder(group.block, part_of(layer), parts),
        )
        (experts if group.is_expert else units).append(unit)
    if experts and experts[0].part_of:
        raise UserError(
            f"drop=[{','.join(drop)}] cannot leave out experts, of which transformers reads one level for all blocks: "
            f"use drop=[attention]"
        )
    units = group_units(units, grouping)
    if experts:
        units.append(join(experts[0].name, experts, "experts"))
    return [*units, *parts.values()]


def _unmeasured(database: LevelDatabase, facts: Mapping[str, Mapping[str, Facts]]) -> set[str]:
    """Experts whose errors are of the weights, where those of other experts are of the output."""
    experts = {layer.name for group, layer in _layers(database) if group.is_expert and facts.get(layer.name)}
    of_weights = {name for name in experts if any(row["error_of"] == WEIGHTS for row in facts[name].values())}
    return set() if of_weights == experts else of_weights


def layer_levels(units: Sequence[Unit], assignment: Mapping[str, str]) -> dict[str, str]:
    """Level of every layer, from the levels of the units."""
    return {layer: assignment[unit.name] for unit in units for layer in unit.layers}


def dropped_parts(units: Sequence[Unit], assignment: Mapping[str, str]) -> dict[int, set[str]]:
    """Kinds of the dropped parts, by block."""
    dropped: dict[int, set[str]] = {}
    for unit in units:
        if assignment[unit.name] == DROP:
            dropped.setdefault(unit.block, set()).add(unit.kind)
    return dropped


def _layers(database: LevelDatabase) -> Iterator[tuple[Group, Layer]]:
    for groups in database.layer_groups:
        for group in groups:
            for layer in group.layers:
                yield group, layer


def _parts(database: LevelDatabase, drop: Sequence[str]) -> dict[tuple[int, str], Unit]:
    """Units of the parts that may be dropped, by block and kind."""
    for kind in drop:
        if kind not in PARTS:
            raise UserError(f"drop={kind} is none of {', '.join(PARTS)}")
    inside: dict[tuple[int, str], list[Layer]] = {}
    for group, layer in _layers(database):
        if group.role is not None:
            continue
        for kind in (part_of(layer), BLOCK):
            if kind in drop:
                inside.setdefault((group.block, kind), []).append(layer)
    parts = {}
    for (block, kind), layers in inside.items():
        # A dropped block is not written; for a dropped part of a block, transformers still needs the tensors.
        remaining_bits = 0 if kind == BLOCK else dropped_bits(layers, database.checkpoint)
        parts[block, kind] = Unit(
            name=f"{kind} of block {block}",
            layers=(),
            block=block,
            kind=kind,
            weights=0,
            choices=(Choice(DROP, remaining_bits, float(len(layers))), Choice(KEEP, 0)),
            part_of=f"{BLOCK} of block {block}" if kind != BLOCK and BLOCK in drop else None,
        )
    return parts


def _holder(block: int, kind: str, parts: Mapping[tuple[int, str], Unit]) -> str | None:
    """Name of the smallest droppable part that contains a layer of this block and kind; None where there is none."""
    unit = parts.get((block, kind)) or parts.get((block, BLOCK))
    return unit.name if unit else None
