"""Gradient scores: what every level of every unit costs, from one backward pass of the original model.

Source: AutoQuantize of NVIDIA Model Optimizer (github.com/NVIDIA/Model-Optimizer). A level's score is the sum, over all
tokens and outputs of the layer, of the squared gradient of the loss times the squared change of the output that the
level makes. It is the diagonal of an empirical Fisher matrix of the layer's outputs: no candidate is measured, and no
interaction of levels is seen. The loss is the cross entropy of the text's next tokens, as there; the divergence from
the original, whose gradient at the original is zero, tells nothing.
Departs from it: one block is in memory at a time.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hasten.accel.compression.allocators.base import DROP, Unit
from hasten.accel.compression.levels.level import KEEP
from hasten.accel.compression.search.blocks import Block, check_units, load_block
from hasten.accel.compression.search.outer import OuterWeights
from hasten.accel.evaluation.next_token import next_token_gradient
from hasten.accel.models.architecture import EMBEDDING, HEAD, Architecture


@dataclass(frozen=True)
class Scores:
    """Scores of one batch of sequences, summed over its tokens. tokens: number of predicted ones.

    values: for each unit those of its choices; 0 for levels that change nothing, such as `keep`, and for `drop`.
    """

    tokens: int
    values: list[list[float]]


class GradientScorePass:
    """Scores the choices of units on tokens (N, T) int64.

    weights(layer, level) returns a layer's weight (R, C), in any dtype. Memory: one block, one layer's weight at a
    level, the head, and the hidden states of a batch at the input of every block.
    """

    def __init__(
        self,
        architecture: Architecture,
        units: Sequence[Unit],
        weights: Callable[[str, str], Tensor],
        tokens: Tensor,
    ) -> None:
        if tokens.ndim != 2 or tokens.shape[1] < 2:
            raise ValueError(f"need tokens (N, T), T of 2 or more, got {tuple(tokens.shape)}")
        check_units(architecture, units)
        self.architecture, self.units, self.tokens = architecture, tuple(units), tokens
        self._weights = weights
        self._outer = OuterWeights(architecture, units, weights)
        self._places = {unit.name: place for place, unit in enumerate(units)}

    def measure(self, batches: Sequence[Sequence[int]]) -> list[Scores]:
        """One result for each batch, which is a list of sequences."""
        return [self._measure(self.tokens[list(batch)]) for batch in batches]

    def _measure(self, tokens: Tensor) -> Scores:
        values = [[0.0] * len(unit.choices) for unit in self.units]
        hidden = self.architecture.embed(tokens)
        embedded, inputs = hidden, []
        for index in range(self.architecture.num_blocks):
            inputs.append(hidden)
            hidden = self.architecture.run_block(self.architecture.load_block(index), index, hidden)
        gradient = self._head(hidden, tokens, values)
        for index in reversed(range(self.architecture.num_blocks)):
            block = load_block(self.architecture, self.units, index)
            with torch.enable_grad(), self._watched(block, values):
                states = inputs.pop().detach().requires_grad_()
                output = self.architecture.run_block(block.module, index, states, differentiable=True)
                (gradient,) = torch.autograd.grad(output, states, gradient)
        for place, choice, level in self._levels(EMBEDDING):
            change = self._outer.embed(tokens, level) - embedded
            values[place][choice] += _score(change, gradient)
        return Scores(tokens.shape[0] * (tokens.shape[1] - 1), values)

    def _levels(self, role: str) -> Iterator[tuple[int, int, str]]:
        """Unit, choice and level of the levels of the output layer or the embedding."""
        if role in self._outer.units:
            place = self._places[self._outer.units[role]]
            for choice, option in enumerate(self.units[place].choices):
                if option.level not in (KEEP, DROP):
                    yield place, choice, option.level

    def _head(self, hidden: Tensor, tokens: Tensor, values: list[list[float]]) -> Tensor:
        """Gradient (B, T, D) of the cross entropy with respect to the last states; adds the output layer's scores."""
        others = [(place, choice, self._outer.output_layer(level)) for place, choice, level in self._levels(HEAD)]

        def score(inputs: Tensor, weight: Tensor, change: Tensor, span: tuple[int, int]) -> None:
            for place, choice, other in others:
                values[place][choice] += _score(nn.functional.linear(inputs, other.weight(*span) - weight), change)

        return next_token_gradient(self.architecture.output_layer(), hidden, tokens, score)

    @contextmanager
    def _watched(self, block: Block, values: list[list[float]]) -> Iterator[None]:
        """Adds the scores of a block's layers while it runs forward and backward."""
        handles = []
        for slot in block.slots:

            def forward(
                module: nn.Module,
                inputs: tuple[Tensor, ...],
                output: Tensor,
                name: str = slot.name,
                unit: str = slot.unit,
            ) -> None:
                given = inputs[0].detach()

                def backward(gradient: Tensor) -> None:
                    self._add(name, unit, module, given, gradient, values)

                if output.requires_grad:
                    output.register_hook(backward)

            handles.append(slot.linear.register_forward_hook(forward))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _add(
        self, name: str, unit: str, module: nn.Module, inputs: Tensor, gradient: Tensor, values: list[list[float]]
    ) -> None:
        """Add the scores of a layer's levels. inputs: (..., C). gradient: (..., R), of the layer's output."""
        place = self._places[unit]
        original = module.weight
        assert isinstance(original, Tensor)
        for choice, option in enumerate(self.units[place].choices):
            if option.level not in (KEEP, DROP):
                error = self._weights(name, option.level).to(original.device, original.dtype) - original
                values[place][choice] += _score(nn.functional.linear(inputs, error), gradient)


def _score(change: Tensor, gradient: Tensor) -> float:
    """Sum of squared change times squared gradient, both of any one shape."""
    return float((change.float() * gradient.float()).square().sum(dtype=torch.float64))
