"""The solve of the output layer or the embedding, in tiles of rows: a matrix of 262,144 rows takes gigabytes."""

import math

import torch
from torch import Tensor

from hasten.accel.compression.calibration.layer_groups import Group
from hasten.accel.compression.calibration.slabs import slab_of
from hasten.accel.compression.calibration.solve import OUTPUT, WEIGHTS, PreparedMethod
from hasten.accel.compression.levels.base import Level
from hasten.accel.compression.levels.database import LevelDatabase
from hasten.accel.compression.quantizers.base import QuantizedWeight
from hasten.accel.compression.result import Facts
from hasten.accel.models.checkpoint import Checkpoint


def solve_outer(
    group: Group, level: Level, checkpoint: Checkpoint, prepared: PreparedMethod, device: str = "cpu"
) -> tuple[dict[str, Tensor], Facts]:
    """Packed tensors of the group's matrix at a level, and its facts.

    Rows are read, solved and packed a tile at a time: besides the packed matrix, memory holds one tile.
    """
    (layer,) = group.layers
    name = f"{layer.name}.weight"
    step = max(1, slab_of(device) // layer.columns)
    tiles: list[dict[str, Tensor]] = []
    # Of outputs, or of weights where there are no statistics; and of weights in double precision.
    error, power, weight_error, weight_power = 0.0, 0.0, 0.0, 0.0
    facts: Facts = {}
    for first in range(0, layer.rows, step):
        weight = checkpoint.row_range(name, first, min(first + step, layer.rows))
        checkpoint.check_finite(weight, name)
        result = level.make(prepared.method, weight.to(device), prepared.prepared)
        assert isinstance(result.weight, QuantizedWeight)
        tiles.append(level.pack(result.weight))
        error += float(result.error.double().sum())
        power += float(result.power.double().sum())
        exact = weight.double()
        weight_power += float(exact.square().sum())
        weight_error += float(exact.sub_(result.weight.dequantize().cpu().double()).square_().sum())
        facts = level.facts(result.weight) | {
            "error_of": OUTPUT if result.of_output else WEIGHTS,
            "notes": list(result.notes),
        }
    if not math.isfinite(error) or not math.isfinite(power):
        error, power, facts["error_of"] = weight_error, weight_power, WEIGHTS
        facts["notes"].append("squares of weights or outputs are beyond float32: is the tensor damaged?")
    packed = {part: torch.cat([tile[part] for tile in tiles]) for part in tiles[0] if part != "weight_shape"}
    packed["weight_shape"] = torch.tensor([layer.rows, layer.columns])
    bits = level.stored_bits(layer.rows, layer.columns, checkpoint.dtype(name).itemsize)
    weights = layer.rows * layer.columns
    return packed, {
        "layer": layer.name,
        "block": group.block,
        **facts,
        "weights": weights,
        "stored_bits": bits,
        "bits_per_weight": bits / weights,
        "error": error / power if power else 0.0,
        "squared_error": error,
        "method": type(prepared.method).__name__,
        "tokens": prepared.tokens,
    }


def solve_outer_levels(
    database: LevelDatabase, group: Group, prepared: PreparedMethod, device: str = "cpu"
) -> list[Facts]:
    """Write the group's matrix at every level to a database; returns one row of facts a level."""
    packed: dict[str, dict[str, Tensor]] = {}
    facts: dict[str, Facts] = {}
    for name, level in database.levels_of(group):
        packed[name], row = solve_outer(group, level, database.checkpoint, prepared, device)
        facts[name] = row | {"level": name}
    database.write_layer(group.key, packed, facts)
    return list(facts.values())
