"""One group of layers from statistics to codes, with the facts that a report gives of each layer."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from accel.compression.levels.database import LevelDatabase
from accel.compression.plan import Group
from accel.compression.quantizers.base import QuantizedWeight, Quantizer, Result, Scheme
from accel.compression.quantizers.round_to_nearest import RoundToNearest
from accel.compression.statistics import SecondMoment
from accel.models.architecture import Layer
from accel.models.checkpoint import Checkpoint

_SLAB = 1 << 22


@dataclass(frozen=True)
class Solved:
    """Quantized layers of a group by name, and one row of facts for each."""

    weights: Mapping[str, QuantizedWeight]
    facts: list[dict[str, Any]]


@dataclass(frozen=True)
class Ready:
    """What the solves of a group share, whatever the scheme. method: the quantizer, or what takes its place."""

    method: Quantizer
    prepared: Any
    tokens: int
    notes: tuple[str, ...]


def prepare_group(
    group: Group, quantizer: Quantizer, moment: SecondMoment | None, expert_tokens: int, device: str = "cpu"
) -> Ready:
    """The one factorisation for all layers and schemes of a group.

    moment: of their input; None if no token came by, or the quantizer needs none. Experts that saw fewer than
    expert_tokens are rounded to nearest, as statistics of so few would fit noise.
    """
    tokens = moment.tokens if moment is not None else 0
    method: Quantizer = quantizer
    notes: tuple[str, ...] = ()
    if quantizer.needs_second_moment and (not tokens or (group.is_expert and tokens < expert_tokens)):
        method = RoundToNearest()
        notes = (f"saw {tokens} calibration tokens, fewer than {max(1, expert_tokens)}: rounded to nearest",)
    prepared = method.prepare(moment.to(device) if moment is not None and method is quantizer else None)
    return Ready(method, prepared, tokens, notes)


def solve_group(group: Group, checkpoint: Checkpoint, ready: Ready, scheme: Scheme, device: str = "cpu") -> Solved:
    """Quantize the layers of a group, stacked by rows so that they share one factorisation."""
    parts: dict[str, list[Result]] = {layer.name: [] for layer in group.layers}
    for slab in _slabs(group):
        read = [checkpoint.tensor(f"{layer.name}.weight")[rows] for layer, rows in slab]
        result = ready.method.quantize(torch.cat(read).to(device), ready.prepared, scheme)
        start = 0
        for (layer, _), weight in zip(slab, read, strict=True):
            parts[layer.name].append(result.rows(start, start + len(weight)))
            start += len(weight)
    weights: dict[str, QuantizedWeight] = {}
    facts = []
    for name, results in parts.items():
        whole = Result.join(results)
        weights[name] = whole.weight
        facts.append(_facts(group, name, whole))
        facts[-1] |= {
            "method": type(ready.method).__name__,
            "tokens": ready.tokens,
            "notes": [*ready.notes, *whole.notes],
        }
    return Solved(weights, facts)


def solve_levels(
    database: LevelDatabase, group: Group, checkpoint: Checkpoint, ready: Ready, device: str = "cpu"
) -> list[dict[str, Any]]:
    """Write the layers of a group at every level into a database; returns their facts, one row a layer and level."""
    packed: dict[str, dict[str, Any]] = {layer.name: {} for layer in group.layers}
    facts: dict[str, dict[str, Any]] = {layer.name: {} for layer in group.layers}
    for level, scheme in database.schemes_of(group):
        solved = solve_group(group, checkpoint, ready, scheme, device)
        for row in solved.facts:
            # Packed at once: codes take a byte each until then.
            packed[row["layer"]][level] = database.pack(solved.weights[row["layer"]])
            facts[row["layer"]][level] = row | {"level": level}
    for layer, by_level in packed.items():
        database.write_layer(layer, by_level, facts[layer])
    return [row for by_level in facts.values() for row in by_level.values()]


def _slabs(group: Group) -> Iterator[list[tuple[Layer, slice]]]:
    """The group's rows in slabs of about _SLAB weights: small layers together, large ones in pieces.

    A solve needs several times the memory of its weights in float32.
    """
    most = max(1, _SLAB // group.columns)
    slab: list[tuple[Layer, slice]] = []
    room = most
    for layer in group.layers:
        start = 0
        while start < layer.rows:
            stop = min(layer.rows, start + room)
            slab.append((layer, slice(start, stop)))
            room -= stop - start
            start = stop
            if not room:
                yield slab
                slab, room = [], most
    if slab:
        yield slab


def _facts(group: Group, name: str, result: Result) -> dict[str, Any]:
    weight, power, error = result.weight, float(result.power.double().sum()), float(result.error.double().sum())
    return {
        "layer": name,
        "block": group.block,
        "bits": weight.scheme.bits,
        "group_size": weight.scheme.group_size,
        "symmetric": weight.scheme.symmetric,
        "weights": weight.codes.numel(),
        "stored_bits": weight.bits,
        "bits_per_weight": weight.bits / weight.codes.numel(),
        # Relative to the layer's own output: layers of any width can be compared.
        "error": error / power if power else 0.0,
        "squared_error": error,
    }
