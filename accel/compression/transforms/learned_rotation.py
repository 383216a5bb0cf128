"""Gradients of a quantized model's divergence by the rotations of its weights, with one block in memory at a time.

A layer with the rotated weight W' = R1ᵀ W R1, quantized to Q(W'), acts in the basis of the original model as the weight
R1 Q(W') R1ᵀ. So the model runs in its own basis, where embedding, output layer and hidden states do not depend on the
rotation, and only the layers that are quantized have gradients by it. Roundings pass gradients as they are.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from hasten.accel.compression.calibration.layer_groups import Group
from hasten.accel.compression.levels.base import Level
from hasten.accel.compression.method import Method
from hasten.accel.compression.search.sensitivity import divergence_gradient
from hasten.accel.compression.transforms.rotation import (
    HeadRoles,
    RotatedCheckpoint,
    Rotation,
    RotationGradient,
    StreamRoles,
    by_head,
    head_roles,
    stream_roles,
)
from hasten.accel.models.architecture import Architecture
from hasten.accel.models.checkpoint import Checkpoint

# Weight (R, C) as a level stores it.
Rounding = Callable[[Tensor], Tensor]


class RotationPass:
    """Computes gradients. architecture: a model whose norms scale nothing, see RotatedCheckpoint.

    roundings: of each layer that is quantized, by layer name.
    """

    def __init__(self, architecture: Architecture, roundings: Mapping[str, Rounding]) -> None:
        self._architecture = architecture
        self._roundings = roundings
        blocks = range(architecture.num_blocks)
        self._streams = [stream_roles(architecture, index) for index in blocks]
        self._heads = [head_roles(architecture, index) for index in blocks]

    def gradient(self, residual: Tensor, heads: Sequence[Tensor], tokens: Tensor) -> RotationGradient:
        """Gradients by R1 `residual` and R2 `heads` of each block, on tokens (B, T)."""
        model = self._architecture
        residual = residual.to(model.device, torch.float32)
        heads = [matrix.to(model.device, torch.float32) for matrix in heads]
        original = hidden = model.embed(tokens)
        inputs: list[Tensor] = []
        for index in range(model.num_blocks):
            block = model.load_block(index)
            original = model.run_block(block, index, original)
            inputs.append(hidden)
            with torch.no_grad():
                self._quantize(block, index, residual, heads[index])
            hidden = model.run_block(block, index, hidden)
        layer = model.output_layer()
        divergence, gradient, _ = divergence_gradient((layer, layer), hidden, original)
        del original, hidden
        of_residual, of_heads = torch.zeros_like(residual), [torch.zeros_like(matrix) for matrix in heads]
        for index in reversed(range(model.num_blocks)):
            block = model.load_block(index)
            with torch.enable_grad():
                leaves = [tensor.detach().requires_grad_() for tensor in (inputs.pop(), residual, heads[index])]
                self._quantize(block, index, leaves[1], leaves[2])
                output = model.run_block(block, index, leaves[0], differentiable=True)
                gradients = torch.autograd.grad(output, leaves, gradient, allow_unused=True)
            assert gradients[0] is not None
            gradient = gradients[0]
            for total, part in ((of_residual, gradients[1]), (of_heads[index], gradients[2])):
                if part is not None:
                    total += part
        count = len(tokens) * (tokens.shape[1] - 1)
        return RotationGradient(count, divergence, of_residual, tuple(of_heads))

    def _quantize(self, block: nn.Module, index: int, residual: Tensor, head: Tensor) -> None:
        """Replace the weights of a block by those that their rotated and quantized forms stand for."""
        for layer in self._architecture.linears(index):
            rounding = self._roundings.get(layer.name)
            if rounding is not None:
                module = block.get_submodule(layer.module)
                weight = module._parameters.pop("weight")
                assert weight is not None
                turned = _turned(
                    weight.data.float(), layer.module, self._streams[index], self._heads[index], residual, head
                )
                quantized = turned + (rounding(turned.detach()) - turned).detach()
                back = residual.T, head.T
                # A plain attribute in place of the parameter: it has a graph.
                module.weight = _turned(quantized, layer.module, self._streams[index], self._heads[index], *back).to(
                    self._architecture.dtype
                )


def rotation_pass(
    source: Checkpoint,
    layer_groups: Sequence[Sequence[Group]],
    methods: Sequence[Method],
    like: Architecture,
    online: bool = False,
) -> RotationPass:
    """The pass that computes gradients for a model.

    source: the original. like: an architecture whose dtype and device the pass gets. online: see Rotation.
    """
    plain = Rotation(torch.eye(like.hidden_size, dtype=torch.float64), online=online)
    folded = RotatedCheckpoint(Architecture(source), lambda: plain, online=online)
    model = Architecture(folded, like.dtype, like.device, as_served=False)
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


def _turned(weight: Tensor, path: str, stream: StreamRoles, heads: HeadRoles, residual: Tensor, head: Tensor) -> Tensor:
    """A layer's weight (R, C) with R1 `residual` and R2 `head` on the sides that they are folded into."""
    if path in stream.readers:
        weight = weight @ residual
    if path in stream.writers:
        weight = residual.T @ weight
    if path in heads.outputs:
        weight = by_head(weight, head)
    if path in heads.values:
        rows = heads.values[path]
        weight = torch.cat([weight[: rows.start], by_head(weight[rows].T, head).T])
    return weight
