"""One group of layers from statistics to codes, with the facts that a report gives of each layer."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from accel.compression.levels.database import LevelDatabase
from accel.compression.levels.level import Level
from accel.compression.plan import Group
from accel.compression.pruners.base import PrunedWeight, Pruner, Sparsity
from accel.compression.pruners.magnitude import Magnitude
from accel.compression.quantizers.base import QuantizedWeight, Quantizer
from accel.compression.quantizers.round_to_nearest import RoundToNearest
from accel.compression.result import Result
from accel.compression.statistics import SecondMoment
from accel.models.architecture import Layer
from accel.models.checkpoint import Checkpoint

_SLAB = 1 << 22


@dataclass(frozen=True)
class Solved:
    """Compressed layers of a group by name, and one row of facts for each."""

    weights: Mapping[str, QuantizedWeight | PrunedWeight]
    facts: list[dict[str, Any]]


@dataclass(frozen=True)
class Ready:
    """What the solves of a group by one method share, whatever the level. method: the one asked for, or a stand-in."""

    method: Quantizer | Pruner
    prepared: Any
    tokens: int
    notes: tuple[str, ...]


def prepare_group(
    group: Group, method: Quantizer | Pruner, moment: SecondMoment | None, expert_tokens: int, device: str = "cpu"
) -> Ready:
    """The one factorisation for all layers and levels of a group.

    moment: of their input; None if no token came by, or no method needs it. Experts that saw fewer than expert_tokens
    are rounded to nearest, or pruned by magnitude, as statistics of so few would fit noise.
    """
    tokens = moment.tokens if moment is not None else 0
    if method.needs_second_moment and (not tokens or (group.is_expert and tokens < expert_tokens)):
        is_pruner = isinstance(method, Pruner)
        method, moment = Magnitude() if is_pruner else RoundToNearest(), None
        instead = "pruned by magnitude" if is_pruner else "rounded to nearest"
        note = f"saw {tokens} calibration tokens, fewer than {max(1, expert_tokens)}: {instead}"
        return Ready(method, method.prepare(None), tokens, (note,))
    return Ready(method, method.prepare(None if moment is None else moment.to(device)), tokens, ())


def solve_group(group: Group, checkpoint: Checkpoint, ready: Ready, level: Level, device: str = "cpu") -> Solved:
    """Compress the layers of a group, stacked by rows so that they share one factorisation."""
    parts: dict[str, list[Result]] = {layer.name: [] for layer in group.layers}
    for slab in _slabs(group):
        read = [checkpoint.tensor(f"{layer.name}.weight")[rows] for layer, rows in slab]
        result = _compress(ready, torch.cat(read).to(device), level)
        start = 0
        for (layer, _), weight in zip(slab, read, strict=True):
            parts[layer.name].append(result.rows(start, start + len(weight)))
            start += len(weight)
    weights: dict[str, QuantizedWeight | PrunedWeight] = {}
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


def _compress(ready: Ready, weight: Tensor, level: Level) -> Result:
    if isinstance(level, Sparsity):
        assert isinstance(ready.method, Pruner)
        return ready.method.prune(weight, ready.prepared, level)
    assert isinstance(ready.method, Quantizer)
    return ready.method.quantize(weight, ready.prepared, level)


def solve_levels(
    database: LevelDatabase, group: Group, checkpoint: Checkpoint, methods: Sequence[Ready], device: str = "cpu"
) -> list[dict[str, Any]]:
    """Write the layers of a group at every level into a database; returns their facts, one row a layer and level.

    methods: a quantizer for levels that are grids, a pruner for those that are sparsities.
    """
    packed: dict[str, dict[str, Any]] = {layer.name: {} for layer in group.layers}
    facts: dict[str, dict[str, Any]] = {layer.name: {} for layer in group.layers}
    for name, level in database.levels_of(group):
        kind = Pruner if isinstance(level, Sparsity) else Quantizer
        ready = next(one for one in methods if isinstance(one.method, kind))
        solved = solve_group(group, checkpoint, ready, level, device)
        for row in solved.facts:
            # Packed at once: codes take a byte each until then.
            packed[row["layer"]][name] = database.pack(solved.weights[row["layer"]])
            facts[row["layer"]][name] = row | {"level": name}
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
    if isinstance(weight, QuantizedWeight):
        scheme, number = weight.scheme, weight.codes.numel()
        level = {"bits": scheme.bits, "group_size": scheme.group_size, "symmetric": scheme.symmetric}
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
