"""Each unit's part of a compressed model's KL divergence, from one backward pass, with one block in memory at a time.

At a small change D of the weights the divergence is a quadratic form, KL = 1/2 <D, H D>, whose gradient is H D. So the
divergence is the sum over the layers of 1/2 <dKL/dW, W' - W>, where W' is the layer's compressed weight W at the point
at which the gradient is taken. A layer's part has its own error, and half of what it has in common with each other
layer's error, which a measurement of the layer alone does not see. For a change that is not small the sum is an
approximation; on SmolLM2-135M at 3.25 bits it exceeded the divergence by 4 to 6 %.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hasten.accel.activations.hooks import rotated_inputs, rounds_inputs
from hasten.accel.compression.allocators.base import BLOCK, Unit
from hasten.accel.compression.levels.level import KEEP
from hasten.accel.compression.search.blocks import (
    KV_CACHE,
    ROUNDED,
    Block,
    BlockState,
    StoredRoundings,
    check_units,
    load_block,
)
from hasten.accel.compression.search.moves import Genome
from hasten.accel.compression.search.outer import OuterWeights
from hasten.accel.evaluation.online_softmax import Divergence
from hasten.accel.models.architecture import EMBEDDING, HEAD, Architecture
from hasten.accel.models.output_layer import TILE_TOKENS, OutputLayer

# Bytes of hidden states that a group of batches may hold.
STATES_BYTES = 2**31
# Bytes of logits that are kept from the divergence to its gradient, of each of the two models. Where so many bytes are
# the logits of fewer tokens than a matrix product needs, logits are computed again for the gradient.
_KEPT_LOGITS_BYTES = 80 * 2**20
_LEAST_TOKENS = 128


@dataclass(frozen=True)
class Sensitivity:
    """Parts of the divergence on one batch of sequences, summed over its scored tokens, in nats.

    tokens: number of scored tokens. divergence: sum of KL(original || compressed). parts: (units,) float64, each unit's
    part; nan for a unit that the candidate leaves out, or leaves as it is.
    """

    tokens: int
    divergence: float
    parts: Tensor


class SensitivityPass:
    """Measures the units' parts of a candidate's divergence on tokens (N, T) int64.

    weights(layer, level) returns a layer's weight (R, C), in any dtype. Batches do not affect each other's results, so
    several processes may share them. stored: how inputs at the levels, and keys and values, are rounded: the error of a
    layer's inputs counts to its unit, that of keys and values to none.
    Memory: one block with its original and its compressed weights, the head, and, in states_bytes, but at least for
    one batch, the hidden states at the input of every block. As many batches as that holds run together; for each such
    group the model is read twice, since a block runs again for its backward pass.
    """

    def __init__(
        self,
        architecture: Architecture,
        units: Sequence[Unit],
        weights: Callable[[str, str], Tensor],
        tokens: Tensor,
        states_bytes: int = STATES_BYTES,
        stored: StoredRoundings | None = None,
    ) -> None:
        if tokens.ndim != 2 or tokens.shape[1] < 2:
            raise ValueError(f"need tokens (N, T), T of 2 or more, got {tuple(tokens.shape)}")
        check_units(architecture, units)
        self.architecture, self.units, self.tokens = architecture, tuple(units), tokens
        self._weights, self._stored = weights, stored
        self._outer = OuterWeights(architecture, units, weights)
        # Hidden states of the compressed model at every block, and the last ones of both models.
        token_bytes = architecture.hidden_size * architecture.dtype.itemsize * (architecture.num_blocks + 2)
        self._group_sequences = max(1, states_bytes // (token_bytes * tokens.shape[1]))
        self._places = {unit.name: place for place, unit in enumerate(units)}

    def measure(self, genome: Genome, batches: Sequence[Sequence[int]]) -> list[Sensitivity]:
        """One result for each batch, which is a list of sequences. genome: the index of a choice for each unit."""
        levels = {unit.name: unit.choices[choice].level for unit, choice in zip(self.units, genome, strict=True)}
        levels[KV_CACHE] = ROUNDED
        count = max(1, self._group_sequences // max(map(len, batches), default=1))
        groups = [batches[first : first + count] for first in range(0, len(batches), count)]
        return [result for group in groups for result in self._measure_group(levels, group)]

    def _measure_group(self, levels: dict[str, str], batches: Sequence[Sequence[int]]) -> list[Sensitivity]:
        tokens = [self.tokens[list(batch)] for batch in batches]
        original = [self.architecture.embed(part) for part in tokens]
        embedding = self._outer.level(EMBEDDING, levels)
        # The change of the states that a changed embedding causes.
        moved = [] if embedding == KEEP else [self._outer.embed(part, embedding) for part in tokens]
        hidden = moved or list(original)
        moved = [changed - states for changed, states in zip(moved, original, strict=False)]
        inputs: list[list[Tensor]] = []
        for index in range(self.architecture.num_blocks):
            block = load_block(self.architecture, self.units, index, self._stored)
            state = block.state_of(levels)
            original = [self.architecture.run_block(block.module, index, states) for states in original]
            inputs.append(hidden)
            if BLOCK not in state.dropped:
                self._change(block, state)
                hidden = [self.architecture.run_block(block.module, index, states) for states in hidden]
        divergences, gradients = [], []
        parts = torch.full((len(batches), len(self.units)), torch.nan, dtype=torch.float64)
        head = self._outer.level(HEAD, levels)
        for number, (compressed, reference) in enumerate(zip(hidden, original, strict=True)):
            divergence, gradient, product = self._head(compressed, reference, head)
            divergences.append(divergence)
            gradients.append(gradient)
            if head != KEEP:
                parts[number, self._places[self._outer.units[HEAD]]] = product / 2
        del original, hidden
        for index in reversed(range(self.architecture.num_blocks)):
            self._backward(index, levels, inputs.pop(), gradients, parts)
        for number, change in enumerate(moved):
            place = self._places[self._outer.units[EMBEDDING]]
            product = float((change.float() * gradients[number].float()).sum(dtype=torch.float64))
            # Of a tied pair, the output layer's part is known.
            parts[number, place] = parts[number, place].nan_to_num() + product / 2
        scored = [len(batch) * (self.tokens.shape[1] - 1) for batch in batches]
        return [Sensitivity(*result) for result in zip(scored, divergences, parts, strict=True)]

    def _head(self, compressed: Tensor, reference: Tensor, level: str) -> tuple[float, Tensor, float]:
        """Sum of the divergences, its gradient (B, T, D), and the product of _divergence. level: of the output matrix.

        The gradient is with respect to the compressed model's last states.
        """
        layers = self._outer.output_layer(level), self.architecture.output_layer()
        return divergence_gradient(layers, compressed, reference, level != KEEP)

    def _backward(
        self, index: int, levels: dict[str, str], inputs: list[Tensor], gradients: list[Tensor], parts: Tensor
    ) -> None:
        """Add the parts of a block's units, and replace the gradients by those at the block's input.

        inputs: the states that enter the block; the list is emptied. parts: (batches, units).
        """
        block = load_block(self.architecture, self.units, index, self._stored)
        state = block.state_of(levels)
        if BLOCK in state.dropped:
            return
        errors = self._change(block, state)
        for number, gradient in enumerate(gradients):
            with torch.enable_grad(), _products(block, errors) as products:
                states = inputs[number].detach().requires_grad_()
                output = self.architecture.run_block(block.module, index, states, differentiable=True)
                (gradients[number],) = torch.autograd.grad(output, states, gradient)
            inputs[number] = torch.empty(0)
            for slot in block.slots:
                if slot.name in errors:
                    place = self._places[slot.unit]
                    known = parts[number, place]
                    # A layer of experts that no token of the batch reached adds nothing.
                    added = sum(products.get(slot.name, ())) / 2
                    parts[number, place] = (0.0 if known.isnan() else known) + added

    def _change(self, block: Block, state: BlockState) -> dict[str, Tensor]:
        """Bring a block, which has its original weights, into a state; returns the errors W' - W of changed layers."""
        errors = {}
        for slot, level in zip(block.slots, state.levels, strict=True):
            if level not in ("", KEEP):
                weight = self._weights(slot.name, level)
                weight = weight.to(self.architecture.device, self.architecture.dtype).contiguous()
                errors[slot.name] = weight - slot.linear.weight.data
                slot.linear.weight = nn.Parameter(weight, requires_grad=False)
                slot.level = level
                block.round_inputs(slot, level)
        block.round_attention(state.kv_cache)
        block.drop(state.dropped)
        return errors


def divergence_gradient(
    layers: tuple[OutputLayer, OutputLayer], compressed: Tensor, reference: Tensor, has_error: bool = False
) -> tuple[float, Tensor, float]:
    """Sum of the divergences of two models' last states (B, T, D), its gradient (B, T, D), and _divergence's product.

    The gradient is with respect to the compressed model's states. layers, has_error: see _divergence.
    """
    # The last position predicts no token of the sequence.
    states, originals = (model[:, :-1].flatten(0, 1) for model in (compressed, reference))
    kept = kept_tokens(layers[0].vocabulary)
    step = kept or TILE_TOKENS
    total, product, gradients = 0.0, 0.0, []
    for part, original in zip(states.split(step), originals.split(step), strict=True):
        divergence, gradient, change = _divergence(layers, part, original, kept > 0, has_error)
        total, product = total + divergence, product + change
        gradients.append(gradient)
    gradient = torch.zeros_like(compressed)
    gradient[:, :-1] = torch.cat(gradients).unflatten(0, (len(compressed), -1))
    return total, gradient, product


def kept_tokens(vocabulary: int) -> int:
    """Tokens at once whose logits are kept for the gradient; 0 where they are computed again instead."""
    fitting = _KEPT_LOGITS_BYTES // (4 * vocabulary)
    return min(TILE_TOKENS, fitting) if fitting >= _LEAST_TOKENS else 0


def _divergence(
    layers: tuple[OutputLayer, OutputLayer], compressed: Tensor, reference: Tensor, keep: bool, has_error: bool
) -> tuple[float, Tensor, float]:
    """Sum of the divergences of M tokens, its gradient (M, D), and <dKL/dW, W' - W> of the output matrix.

    The gradient is with respect to the compressed model's last states; a product of 0 stands for W' = W.
    layers: of the compressed model and of the original. compressed, reference: (M, D). keep: whether to keep all logits
    of both models for the gradient. has_error: whether the two output matrices differ.
    """
    layer, exact = layers
    models = layer.inputs(compressed), exact.inputs(reference)
    running = Divergence(len(compressed), compressed.device)
    spans = list(layer.spans(len(compressed)))
    kept: list[tuple[Tensor, Tensor]] = []
    for span in spans:
        model, original = _logits(layers, models, span)
        running.add(original=original, model=model)
        if keep:
            kept.append((model, original))
    inner = torch.zeros(len(compressed), layer.width, device=compressed.device)
    product = 0.0
    for number, span in enumerate(spans):
        weight = layer.weight(*span)
        model, original = kept[number] if keep else _logits(layers, models, span)
        change = running.model.probabilities(model).sub_(running.original.probabilities(original))
        inner += layer.inputs_gradient(change, model, weight)
        if has_error:
            # `change` is now the gradient with respect to the products.
            moved = nn.functional.linear(models[0], weight - exact.weight(*span))
            product += float((moved.float() * change).sum(dtype=torch.float64))
    return float(running.value().sum()), layer.hidden_gradient(compressed, inner), product


def _logits(
    layers: tuple[OutputLayer, OutputLayer], models: tuple[Tensor, Tensor], span: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Logits of both models for a span of the vocabulary. models: inputs of the two output matrices."""
    weight = layers[0].weight(*span)
    # The weights of a shared matrix are converted once.
    exact = weight if layers[0] is layers[1] else layers[1].weight(*span)
    return layers[0].logits(models[0], weight, span[0]), layers[1].logits(models[1], exact, span[0])


@contextmanager
def _products(block: Block, errors: dict[str, Tensor]) -> Iterator[dict[str, list[float]]]:
    """Records <dL/dW, error> by layer while the block runs forward and backward.

    With input x (n, C) and gradient g (n, R) of the output it is the sum of (x error^T) g over all positions, so that
    the gradient of the weight itself, a matrix in float32 for every layer, is not made. Where the layer rounds x to x',
    it is that of (x' W'^T - x W^T) g.
    """
    products: dict[str, list[float]] = {}
    handles = []
    for slot in block.slots:
        if slot.name in errors:
            exact: dict[str, Tensor] = {}

            def remember(layer: nn.Module, inputs: tuple[Tensor, ...], exact: dict[str, Tensor] = exact) -> None:
                exact["inputs"] = rotated_inputs(layer, inputs[0].detach())

            def forward(
                layer: Any,
                inputs: tuple[Tensor, ...],
                output: Tensor,
                name: str = slot.name,
                exact: dict[str, Tensor] = exact,
            ) -> None:
                used, given = inputs[0].detach(), exact.pop("inputs")
                moved = nn.functional.linear(used, errors[name])
                if used is not given and rounds_inputs(layer):
                    moved += nn.functional.linear(used - given, layer.weight.detach() - errors[name])

                def backward(gradient: Tensor) -> None:
                    value = (moved.float() * gradient.float()).sum(dtype=torch.float64)
                    products.setdefault(name, []).append(float(value))

                if output.requires_grad:
                    output.register_hook(backward)

            handles.append(slot.linear.register_forward_pre_hook(remember, prepend=True))
            handles.append(slot.linear.register_forward_hook(forward))
    try:
        yield products
    finally:
        for handle in handles:
            handle.remove()
