"""One group of layers from statistics to codes, with the facts that a report gives of each layer."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from accel.compression.plan import Group
from accel.compression.quantizers.base import QuantizedWeight, Quantizer, Result
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


def solve_group(
    group: Group,
    checkpoint: Checkpoint,
    quantizer: Quantizer,
    moment: SecondMoment | None,
    expert_tokens: int,
    device: str = "cpu",
) -> Solved:
    """Quantize the layers of a group, stacked by rows so that they share one factorisation.

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
    parts: dict[str, list[Result]] = {layer.name: [] for layer in group.layers}
    for slab in _slabs(group):
        read = [checkpoint.tensor(f"{layer.name}.weight")[rows] for layer, rows in slab]
        result = method.quantize(torch.cat(read).to(device), prepared, group.scheme)
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
        facts[-1] |= {"method": type(method).__name__, "tokens": tokens, "notes": [*notes, *whole.notes]}
    return Solved(weights, facts)


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
    weight, power = result.weight, float(result.power.double().sum())
    return {
        "layer": name,
        "block": group.block,
        "bits": group.scheme.bits,
        "group_size": group.scheme.group_size,
        "symmetric": group.scheme.symmetric,
        "weights": weight.codes.numel(),
        "stored_bits": weight.bits,
        "bits_per_weight": weight.bits / weight.codes.numel(),
        # Relative to the layer's own output: layers of any width can be compared.
        "error": float(result.error.double().sum()) / power if power else 0.0,
    }
