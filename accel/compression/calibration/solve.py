"""One group of layers from statistics to codes, with the facts that a report gives of each layer."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hasten.accel.compression.calibration.layer_groups import Group
from hasten.accel.compression.calibration.slabs import slab_of
from hasten.accel.compression.calibration.statistics import SecondMoment
from hasten.accel.compression.levels.database import LevelDatabase
from hasten.accel.compression.levels.level import Level
from hasten.accel.compression.pruners.base import PrunedWeight, Pruner, Sparsity
from hasten.accel.compression.pruners.magnitude import Magnitude
from hasten.accel.compression.quantizers.base import QuantizedWeight, Quantizer, Scheme
from hasten.accel.compression.quantizers.columns import ColumnBits, ColumnQuantizer, ColumnWeight
from hasten.accel.compression.quantizers.round_to_nearest import RoundToNearest
from hasten.accel.compression.result import Result
from hasten.accel.models.architecture import Layer
from hasten.accel.models.checkpoint import Checkpoint

Compressed = QuantizedWeight | ColumnWeight | PrunedWeight
Method = Quantizer | ColumnQuantizer | Pruner


@dataclass(frozen=True)
class Solved:
    """Compressed layers of a group by name, and one row of facts for each."""

    weights: Mapping[str, Compressed]
    facts: list[dict[str, Any]]


@dataclass(frozen=True)
class Ready:
    """What the solves of a group by one method share, whatever the level. method: the one asked for, or a stand-in."""

    method: Method
    prepared: Any
    tokens: int
    notes: tuple[str, ...]


def prepare_group(
    group: Group, method: Method, moment: SecondMoment | None, expert_tokens: int, device: str = "cpu"
) -> Ready:
    """The one factorisation for all layers and levels of a group.

    moment: of their input; None if no token came by, or no method needs it. Experts that saw fewer than expert_tokens
    are rounded to nearest, or pruned by magnitude, as statistics of so few would fit noise.
    """
    tokens = moment.tokens if moment is not None else 0
    if method.needs_second_moment and (not tokens or (group.is_expert and tokens < expert_tokens)):
        moment, instead = None, "rounded to nearest"
        if isinstance(method, Pruner):
            method, instead = Magnitude(), "pruned by magnitude"
        elif isinstance(method, Quantizer):
            method = RoundToNearest()
        note = f"saw {tokens} calibration tokens, fewer than {max(1, expert_tokens)}: {instead}"
        return Ready(method, method.prepare(None), tokens, (note,))
    return Ready(method, method.prepare(None if moment is None else moment.to(device)), tokens, ())


def solve_group(group: Group, checkpoint: Checkpoint, ready: Ready, level: Level, device: str = "cpu") -> Solved:
    """Compress the layers of a group, which share one factorisation."""
    solve = _one_by_one if isinstance(level, ColumnBits) else _stacked
    parts = solve(group, checkpoint, ready, level, device)
    weights: dict[str, Compressed] = {}
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


def _stacked(group: Group, checkpoint: Checkpoint, ready: Ready, level: Level, device: str) -> dict[str, list[Result]]:
    """Results of every layer's rows, for methods by which no row depends on another: layers are stacked."""
    parts: dict[str, list[Result]] = {layer.name: [] for layer in group.layers}
    for slab in _slabs(group.layers, slab_of(device)):
        read = [checkpoint.tensor(f"{layer.name}.weight")[rows] for layer, rows in slab]
        result = _compress(ready, torch.cat(read).to(device), level)
        start = 0
        for (layer, _), weight in zip(slab, read, strict=True):
            parts[layer.name].append(result.rows(start, start + len(weight)))
            start += len(weight)
    return parts


def _one_by_one(
    group: Group, checkpoint: Checkpoint, ready: Ready, level: Level, device: str
) -> dict[str, list[Result]]:
    """Results of every layer's rows where a layer's columns have widths of their own, chosen for all of its rows.

    A layer is read twice, in slabs that depend on nothing but its shape and the device.
    """
    method = ready.method
    assert isinstance(method, ColumnQuantizer)
    assert isinstance(level, ColumnBits)
    parts: dict[str, list[Result]] = {}
    for layer in group.layers:
        weight = checkpoint.tensor(f"{layer.name}.weight")
        pieces = [rows for slab in _slabs([layer], slab_of(device)) for _, rows in slab]
        losses = torch.zeros(layer.columns, dtype=torch.float64, device=device)
        for rows in pieces:
            losses += method.losses(weight[rows].to(device), ready.prepared, level)
        widths = method.widths(losses, level)
        parts[layer.name] = [method.encode(weight[rows].to(device), ready.prepared, widths) for rows in pieces]
    return parts


def _compress(ready: Ready, weight: Tensor, level: Level) -> Result:
    if isinstance(level, Sparsity):
        assert isinstance(ready.method, Pruner)
        return ready.method.prune(weight, ready.prepared, level)
    assert isinstance(ready.method, Quantizer)
    assert isinstance(level, Scheme)
    return ready.method.quantize(weight, ready.prepared, level)


def solve_levels(
    database: LevelDatabase, group: Group, checkpoint: Checkpoint, methods: Sequence[Ready], device: str = "cpu"
) -> list[dict[str, Any]]:
    """Write the layers of a group at every level into a database; returns their facts, one row a layer and level.

    methods: a quantizer for levels that are grids, a pruner for sparsities, a column quantizer for the rest.
    """
    packed: dict[str, dict[str, Any]] = {layer.name: {} for layer in group.layers}
    facts: dict[str, dict[str, Any]] = {layer.name: {} for layer in group.layers}
    for name, level in database.levels_of(group):
        kind = {Scheme: Quantizer, ColumnBits: ColumnQuantizer, Sparsity: Pruner}[type(level)]
        ready = next(one for one in methods if isinstance(one.method, kind))
        solved = solve_group(group, checkpoint, ready, level, device)
        for row in solved.facts:
            # Packed at once: codes take a byte each until then.
            packed[row["layer"]][name] = database.pack(solved.weights[row["layer"]])
            facts[row["layer"]][name] = row | {"level": name}
    for layer, by_level in packed.items():
        database.write_layer(layer, by_level, facts[layer])
    return [row for by_level in facts.values() for row in by_level.values()]


def _slabs(layers: Sequence[Layer], weights: int) -> Iterator[list[tuple[Layer, slice]]]:
    """The layers' rows in slabs of about so many weights: small layers together, large ones in pieces.

    A solve needs several times the memory of its weights in float32.
    """
    most = max(1, weights // layers[0].columns)
    slab: list[tuple[Layer, slice]] = []
    room = most
    for layer in layers:
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
    if isinstance(weight, QuantizedWeight):
        scheme, number = weight.scheme, weight.codes.numel()
        level: dict[str, Any] = {"bits": scheme.bits, "group_size": scheme.group_size, "symmetric": scheme.symmetric}
    elif isinstance(weight, ColumnWeight):
        number = weight.codes.numel()
        of_width = torch.bincount(weight.widths.long()).tolist()
        level = {
            "bits": float(weight.widths.double().mean()),
            "columns_of_bits": {str(width): count for width, count in enumerate(of_width) if count},
        }
    else:
        number = weight.mask.numel()
        level = {"bits": 8 * weight.weight.element_size(), "sparsity": 1 - float(weight.mask.sum()) / number}
    return {
        "layer": name,
        "block": group.block,
        **level,
        "weights": number,
        "stored_bits": weight.bits,
        "bits_per_weight": weight.bits / number,
        # Relative to the layer's own output: layers of any width can be compared.
        "error": error / power if power else 0.0,
        "squared_error": error,
    }
