"""Groups of layers that must share a level, because servers fuse them into one matrix or one kernel."""

import re
from collections.abc import Callable, Mapping, Sequence

from hasten.accel.compression.allocators.base import Choice, Unit
from hasten.accel.errors import UserError

GROUPINGS = ("none", "serving")
# Fused module by the last part of a layer's name; the same for all model families.
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
    """Name of the module into which a server fuses a layer; the layer's own name where it is not fused.

    q, k and v become `qkv_proj`, gate and up `gate_up_proj`, and all routed experts of a block `experts`.
    """
    expert = _EXPERT.fullmatch(layer)
    if expert:
        return expert[1]
    parent, dot, last = layer.rpartition(".")
    return f"{parent}{dot}{_FUSED.get(last, last)}"


def mixed_modules(levels: Mapping[str, str]) -> list[str]:
    """Modules that servers fuse from layers whose levels, by layer name, differ: servers cannot load them."""
    members: dict[str, set[str]] = {}
    for layer, level in levels.items():
        members.setdefault(serving_module(layer), set()).add(level)
    return [module for module, different in members.items() if len(different) > 1]


def group_units(units: Sequence[Unit], rule: str, fused: Callable[[str], str] = serving_module) -> list[Unit]:
    """Units joined by a rule, in the order of their first members; each resulting unit gets one level.

    rule: `none` joins no units; `serving` joins units whose first layers `fused` maps to the same name. A joined unit
    has the levels that all its members have, with the sums of their bits, costs, errors and weights.
    UserError where the members have no level in common.
    """
    if rule not in GROUPINGS:
        raise UserError(f"grouping={rule!r} is none of {', '.join(GROUPINGS)}")
    if rule == "none":
        return list(units)
    members: dict[str, list[Unit]] = {}
    for unit in units:
        # A part of a block has no layers, and is not joined.
        members.setdefault(fused(unit.layers[0]) if unit.layers else unit.name, []).append(unit)
    return [_fuse(name, group) if len(group) > 1 else group[0] for name, group in members.items()]


def _fuse(name: str, units: Sequence[Unit]) -> Unit:
    first = units[0]
    for unit in units:
        if (unit.block, unit.part_of) != (first.block, first.part_of):
            raise ValueError(f"{first.name} and {unit.name} are fused, but lie in different parts of the model")
    return join(first.name, units, _BLOCK.sub("", name, count=1))


def join(name: str, units: Sequence[Unit], kind: str) -> Unit:
    """One unit in place of several, with the levels that all of them have; UserError where there is no such level."""
    first = units[0]
    choices = sorted((_sum(level, units) for level in _common_levels(units)), key=lambda choice: choice.cost)
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
    """Levels that all units have; UserError, which names layers without a common level."""
    common = [choice.level for choice in units[0].choices]
    for unit in units:
        own = [choice.level for choice in unit.choices]
        shared = [level for level in common if level in own]
        if not shared:
            before = ", ".join(earlier.name for earlier in units[: units.index(unit)][:3])
            raise UserError(
                f"grouping=serving leaves no level for {unit.name}: it has {', '.join(own)}, and {before}, which must "
                f"share its level, {', '.join(common)}; give them a level in common, or use grouping=none"
            )
        common = shared
    return common


def _sum(level: str, units: Sequence[Unit]) -> Choice:
    """Choice of a level for all units together."""
    chosen = [unit.choices[unit.index(level)] for unit in units]
    bits, error, cost = (sum(getattr(choice, name) for choice in chosen) for name in ("bits", "error", "cost"))
    return Choice(level, bits, error, cost)
