"""The solve of one group of layers: from statistics to compressed weights, and to a report's facts of each layer."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from hasten.accel.activations.observers.base import InputObserver
from hasten.accel.activations.ranges import InputRange
from hasten.accel.activations.scales import input_tensors
from hasten.accel.compression.calibration.layer_groups import Group
from hasten.accel.compression.calibration.statistics import Hessian
from hasten.accel.compression.levels.base import Level
from hasten.accel.compression.levels.database import LevelDatabase
from hasten.accel.compression.method import Method
from hasten.accel.compression.result import CompressedWeight, Facts, Result
from hasten.accel.compression.transforms.base import BlockTransform
from hasten.accel.models.architecture import Architecture, Layer
from hasten.accel.models.checkpoint import Checkpoint

# What the error of a report's row is of; errors of weights are comparable with each other only.
OUTPUT, WEIGHTS = "output", "weights"


@dataclass(frozen=True)
class Solved:
    """Compressed layers of a group by name, and one row of facts for each."""

    weights: Mapping[str, CompressedWeight]
    facts: list[Facts]


@dataclass(frozen=True)
class ObservedInputs:
    """Range of a group's inputs, empty where none was collected, and what chooses static scales from it."""

    range: InputRange
    observer: InputObserver

    def tensors(self, group: Group, layer: Layer, level: Level, checkpoint: Checkpoint) -> dict[str, Tensor]:
        """Calibrated tensors of a layer's inputs at a level."""
        if level.inputs is None:
            return {}
        # No token may reach any expert of a block; other layers all see every token.
        assert not (level.inputs.is_calibrated and self.range.is_empty) or group.is_expert, layer.name
        dtype = checkpoint.dtype(f"{layer.name}.weight")
        return input_tensors(level.inputs, self.range, self.observer, dtype, group.range_key)


@dataclass(frozen=True)
class PreparedMethod:
    """State that all levels of a group share, if one method makes them.

    prepared: result of method.prepare(). tokens: number of tokens in the statistics. too_few: the required number of
    tokens, where the statistics have fewer; else 0.
    """

    method: Method
    prepared: object
    tokens: int
    too_few: int = 0


def prepare_group(
    group: Group, method: Method, hessian: Hessian | None, expert_tokens: int, device: str = "cpu"
) -> PreparedMethod:
    """Run method.prepare(), such as a factorisation, once for all layers and levels of a group.

    hessian: Hessian of the group's input; None where no token reached it, or no method needs it. An expert that saw
    fewer than expert_tokens is not prepared, because its statistics would fit noise; see Level.without_statistics.
    """
    tokens = hessian.tokens if hessian is not None else 0
    too_few = not tokens or (group.is_expert and tokens < expert_tokens)
    if method.needs_hessian and too_few:
        return PreparedMethod(method, None, tokens, max(1, expert_tokens))
    # A layer's errors must be of the same kind at all levels: where one method goes without statistics, all do.
    used = None if hessian is None or too_few else hessian.to(device)
    return PreparedMethod(method, method.prepare(used), tokens)


def solve_group(
    group: Group,
    checkpoint: Checkpoint,
    methods: Sequence[PreparedMethod],
    level: Level,
    device: str = "cpu",
    change: Tensor | None = None,
) -> Solved:
    """Compress the layers of a group at a level, by the prepared method of the level's family.

    change: see BlockTransform.target_change; errors are of the changed weights then.
    """
    chosen = next(candidate for candidate in methods if isinstance(candidate.method, level.family))
    method, prepared, notes = chosen.method, chosen.prepared, list[str]()
    if chosen.too_few:
        method, instead = level.without_statistics(method)
        prepared = method.prepare(None)
        notes = [f"saw {chosen.tokens} calibration tokens, fewer than {chosen.too_few}: {instead}"]

    def read(layer: Layer) -> Tensor:
        weight = checkpoint.tensor(f"{layer.name}.weight")
        if change is None:
            return weight
        wide = weight.to(change.device, torch.float32)
        return (wide + wide @ change).to(weight.dtype)

    solved = level.solve(method, group.layers, read, prepared, device)
    facts = [
        _row(group, layer, level, solved[layer.name], read, notes)
        | {"method": type(method).__name__, "tokens": chosen.tokens}
        for layer in group.layers
    ]
    return Solved({name: result.weight for name, result in solved.items()}, facts)


def solve_block(
    solver: BlockTransform,
    architecture: Architecture,
    block: int,
    groups: Sequence[Group],
    quantizer: Method,
    inputs: Tensor,
    targets: Tensor,
) -> tuple[dict[str, dict[str, Tensor]], list[Facts]]:
    """Checkpoint tensors of all layers of a block, and their facts; see BlockTransform.solve_block."""
    solved = solver.solve_block(architecture, block, groups, quantizer, inputs, targets)
    packed, facts = {}, []
    for group in groups:
        for layer in group.layers:
            result = solved[layer.name]
            packed[layer.name] = group.level.checkpoint_tensors(group.level.pack(result.weight))
            row = _row(group, layer, group.level, result, partial(_weight, architecture.checkpoint))
            facts.append(row | {"method": type(solver).__name__, "tokens": inputs.shape[0] * inputs.shape[1]})
    return packed, facts


def solve_for_checkpoint(
    group: Group,
    checkpoint: Checkpoint,
    methods: Sequence[PreparedMethod],
    observed: ObservedInputs,
    device: str = "cpu",
    packed_form: bool = False,
    change: Tensor | None = None,
) -> tuple[dict[str, dict[str, Tensor]], list[Facts]]:
    """Checkpoint tensors of a group's layers at its level, by layer and by name behind the layer's; and their facts.

    packed_form: tensors as a level database has them, for outputs that are no checkpoints of transformers.
    """
    solved, level = solve_group(group, checkpoint, methods, group.level, device, change), group.level
    packed = {layer.name: level.pack(solved.weights[layer.name]) for layer in group.layers}
    if not packed_form:
        packed = {
            layer.name: level.checkpoint_tensors(packed[layer.name]) | observed.tensors(group, layer, level, checkpoint)
            for layer in group.layers
        }
    return packed, solved.facts


def solve_levels(
    database: LevelDatabase,
    group: Group,
    checkpoint: Checkpoint,
    methods: Sequence[PreparedMethod],
    observed: ObservedInputs,
    device: str = "cpu",
    change: Tensor | None = None,
) -> list[Facts]:
    """Write the layers of a group at every level to a database; returns one row of facts a layer and level."""
    packed: dict[str, dict[str, dict[str, Tensor]]] = {layer.name: {} for layer in group.layers}
    facts: dict[str, Facts] = {layer.name: {} for layer in group.layers}
    for name, level in database.levels_of(group):
        solved = solve_group(group, checkpoint, methods, level, device, change)
        for layer, row in zip(group.layers, solved.facts, strict=True):
            # Packed immediately, because an unpacked code takes a whole byte.
            weight = level.pack(solved.weights[layer.name])
            packed[layer.name][name] = weight | observed.tensors(group, layer, level, checkpoint)
            facts[layer.name][name] = row | {"level": name}
    for written, by_level in packed.items():
        database.write_layer(written, by_level, facts[written])
    return [row for by_level in facts.values() for row in by_level.values()]


def _weight(checkpoint: Checkpoint, layer: Layer) -> Tensor:
    return checkpoint.tensor(f"{layer.name}.weight")


def _row(
    group: Group,
    layer: Layer,
    level: Level,
    result: Result[CompressedWeight],
    read: Callable[[Layer], Tensor],
    notes: Sequence[str] = (),
) -> Facts:
    """Facts of a layer with its error."""
    error, of_layer = _error(result), [*notes, *result.notes]
    if not math.isfinite(error["error"]):
        error = _error_of_weights(read(layer), level.unpack(level.pack(result.weight)))
        of_layer.append("squares of weights or outputs are beyond float32: is the tensor damaged?")
    return _facts(group, layer, level, result) | error | {"notes": of_layer}


def _facts(group: Group, layer: Layer, level: Level, result: Result[CompressedWeight]) -> Facts:
    weights = layer.rows * layer.columns
    return {
        "layer": layer.name,
        "block": group.block,
        **level.facts(result.weight),
        "weights": weights,
        "stored_bits": result.weight.bits,
        "bits_per_weight": result.weight.bits / weights,
    }


def _error(result: Result[CompressedWeight]) -> Facts:
    power, error = float(result.power.double().sum()), float(result.error.double().sum())
    return {
        # Relative to the layer's own output, so that layers of any width can be compared.
        "error": error / power if power else 0.0,
        "squared_error": error,
        "error_of": OUTPUT if result.of_output else WEIGHTS,
    }


def _error_of_weights(weight: Tensor, stored: Tensor) -> Facts:
    """Error of a weight whose squares are beyond float32."""
    power, error = float(weight.double().square().sum()), float((weight.double() - stored.double()).square().sum())
    return {"error": error / power, "squared_error": error, "error_of": WEIGHTS}
