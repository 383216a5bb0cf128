"""How a rotation is made and learned before the first block is compressed."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from hasten.accel.compression.calibration.layer_groups import Group
from hasten.accel.compression.levels.base import Level
from hasten.accel.compression.method import Method
from hasten.accel.compression.transforms.learned_rotation import RotationPass, Rounding
from hasten.accel.compression.transforms.rotating import RotatingTransform, RotationFile
from hasten.accel.compression.transforms.rotation import RotatedCheckpoint, Rotation, RotationGradient, check_rotation
from hasten.accel.models.architecture import Architecture
from hasten.accel.models.checkpoint import Checkpoint

# gradients(rotation, parts): of tokens (B, T), in their order.
Gradients = Callable[[Rotation, Sequence[Tensor]], Sequence[RotationGradient]]


def learn(
    transform: RotatingTransform,
    file: RotationFile,
    architecture: Architecture,
    tokens: Tensor | None,
    batch: int,
    gradients: Gradients,
) -> None:
    """Learn the rotation of a model, from where the file is. architecture: the original. batch: sequences of a part."""
    if file.path.exists():
        rotation, step = file.read()
    else:
        rotation, step = transform.begin(architecture), 0
        view = RotatedCheckpoint(architecture, lambda: rotation, transform.has_residual)
        model = Architecture(view, architecture.dtype, architecture.device)
        check_rotation(architecture, model, rotation.residual, _kinds_of_blocks(architecture))
        file.write(rotation, 0)
    for number in range(step, transform.steps):
        assert tokens is not None
        chosen = tokens[transform.sequences(number, len(tokens))]
        first, *others = gradients(rotation, chosen.split(batch))
        # In their order, so that sums do not depend on who computed the parts.
        total = sum(others, start=first)
        rotation = transform.advance(rotation, total, number)
        file.write(rotation, number + 1)


def rotation_pass(
    source: Checkpoint, layer_groups: Sequence[Sequence[Group]], methods: Sequence[Method], like: Architecture
) -> RotationPass:
    """The pass that computes gradients for a model.

    source: the original. like: an architecture whose dtype and device the pass gets.
    """
    plain = Rotation(torch.eye(like.hidden_size, dtype=torch.float64))
    folded = RotatedCheckpoint(Architecture(source), lambda: plain)
    model = Architecture(folded, like.dtype, like.device)
    return RotationPass(model, _roundings(layer_groups, methods, source))


def _roundings(
    layer_groups: Sequence[Sequence[Group]], methods: Sequence[Method], source: Checkpoint
) -> Mapping[str, Rounding]:
    """Of each layer that is compressed: the weight as its level stores it, rounded without statistics."""
    roundings: dict[str, Rounding] = {}
    for group in (group for groups in layer_groups for group in groups if group.role is None):
        level = group.level
        method, _ = level.without_statistics(level.method_of(methods))
        prepared = method.prepare(None)
        for layer in group.layers:
            dtype = source.dtype(f"{layer.name}.weight")

            def rounding(
                weight: Tensor,
                level: Level = level,
                method: Method = method,
                prepared: object = prepared,
                dtype: torch.dtype = dtype,
            ) -> Tensor:
                return level.dense(level.make(method, weight.to(dtype), prepared).weight).to(weight)

            roundings[layer.name] = rounding
    return roundings


def _kinds_of_blocks(architecture: Architecture) -> list[int]:
    """The first block of each kind, by the names of its parameters."""
    kinds: dict[tuple[str, ...], int] = {}
    for index in range(architecture.num_blocks):
        kinds.setdefault(tuple(sorted(architecture.block_parameters(index))), index)
    return list(kinds.values())
