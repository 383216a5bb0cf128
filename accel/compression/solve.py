"""One group of layers from statistics to codes, with the facts that a report gives of each layer."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from accel.compression.plan import Group
from accel.compression.quantizers.base import QuantizedWeight, Quantizer, Result
from accel.compression.quantizers.round_to_nearest import RoundToNearest
from accel.compression.statistics import SecondMoment
from accel.models.checkpoint import Checkpoint


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
    weight = torch.cat([checkpoint.tensor(f"{layer.name}.weight") for layer in group.layers]).to(device)
    result = method.quantize(
        weight, method.prepare(moment.to(device) if moment is not None and method is quantizer else None), group.scheme
    )
    del weight
    weights: dict[str, QuantizedWeight] = {}
    facts = []
    start = 0
    for layer in group.layers:
        stop = start + layer.rows
        weights[layer.name] = result.weight.rows(start, stop)
        facts.append(_facts(group, layer.name, weights[layer.name], result, slice(start, stop)))
        facts[-1] |= {"method": type(method).__name__, "tokens": tokens, "notes": [*notes, *result.notes]}
        start = stop
    return Solved(weights, facts)


def _facts(group: Group, name: str, weight: QuantizedWeight, result: Result, rows: slice) -> dict[str, Any]:
    power = float(result.power[rows].double().sum())
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
        "error": float(result.error[rows].double().sum()) / power if power else 0.0,
    }
