"""Which layers must share a level: those that servers fuse into one matrix, or into one kernel, hold one format."""

import re
from collections.abc import Callable, Sequence

from hasten.accel.compression.allocators.base import Choice, Unit
from hasten.accel.errors import UserError

GROUPINGS = ("none", "serving")
# Fused layers by the last part of their names; independent of the family.
_FUSED = {
    "q_proj": "qkv_proj",
    "k_proj": "qkv_proj",
    "v_proj": "qkv_proj",
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
}
_EXPERT = re.compile(r"(.*\.experts)\.\d+\..+")
_BLOCK = re.compile(r".*?\.\d+\.")


def serving_module(layer: str) -> str:
    """Name of the module that a server fuses a layer into; the layer's own where it stays alone.

    q, k and v become `qkv_proj`, gate and up `gate_up_proj`, and all routed experts of a block `experts`.
    """
    expert = _EXPERT.fullmatch(layer)
    if expert:
        return expert[1]
    parent, dot, last = layer.rpartition(".")
    return f"{parent}{dot}{_FUSED.get(last, last)}"


def group_units(units: Sequence[Unit], rule: str, fused: Callable[[str], str] = serving_module) -> list[Unit]:
    """Units of which each gets one level under the rule, in the order of their first members.

    rule: `none` leaves units as they are; `serving` joins those whose first layers `fused` maps to one name. A joined
    unit has the levels that all its members have, with bits, errors and weights added up. UserError where they have
    none in common.
    """
    if rule not in GROUPINGS:
        raise UserError(f"grouping={rule!r} is none of {', '.join(GROUPINGS)}")
    if rule == "none":
        return list(units)
    members: dict[str, list[Unit]] = {}
    for unit in units:
        # A part of a block has no layers, and stays by itself.
        members.setdefault(fused(unit.layers[0]) if unit.layers else unit.name, []).append(unit)
    return [_fuse(name, group) if len(group) > 1 else group[0] for name, group in members.items()]


def _fuse(name: str, units: Sequence[Unit]) -> Unit:
    first = units[0]
    for unit in units:
        if (unit.block, unit.part_of) != (first.block, first.part_of):
            raise ValueError(f"{first.name} and {unit.name} become one module, but lie in different parts of the model")
    return join(first.name, units, _BLOCK.sub("", name, count=1))


def join(name: str, units: Sequence[Unit], kind: str) -> Unit:
    """One unit in the place of several, with the levels that all of them have; UserError where there is none."""
    first = units[0]
    choices = sorted((_sum(level, units) for level in _common_levels(units)), key=lambda choice: choice.bits)
    return Unit(
        name=name,
        layers=tuple(layer for unit in units for layer in unit.layers),
        block=first.block,
        kind=kind,
        weights=sum(unit.weights for unit in units),
        choices=tuple(choices),
        part_of=first.part_of,
    )


def _common_levels(units: Sequence[Unit]) -> list[str]:
    """Levels that all units have; UserError that names layers which have none in common."""
    common = [choice.level for choice in units[0].choices]
    for unit in units:
        own = [choice.level for choice in unit.choices]
        left = [level for level in common if level in own]
        if not left:
            before = ", ".join(one.name for one in units[: units.index(unit)][:3])
            raise UserError(
                f"grouping=serving leaves no level for {unit.name}: it has {', '.join(own)}, and {before}, which must "
                f"share its level, {', '.join(common)}; give them a level in common, or use grouping=none"
            )
        common = left
    return common


def _sum(level: str, units: Sequence[Unit]) -> Choice:
    """A level for all units together."""
    chosen = [unit.choices[unit.index(level)] for unit in units]
    return Choice(level, sum(choice.bits for choice in chosen), sum(choice.error for choice in chosen))
