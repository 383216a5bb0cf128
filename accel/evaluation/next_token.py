"""The gradient of the cross entropy of next tokens, with a tile of the vocabulary in memory at a time."""

from collections.abc import Callable

import torch
from torch import Tensor

from hasten.accel.evaluation.online_softmax import LogSumExp
from hasten.accel.models.output_layer import TILE_TOKENS, OutputLayer

# visit(inputs, weight, gradient, (first, last)): of a tile, inputs (M, D') and weight (C, D') of the output matrix, and
# the gradient (M, C) with respect to their products.
Visit = Callable[[Tensor, Tensor, Tensor, tuple[int, int]], None]


def next_token_gradient(layer: OutputLayer, hidden: Tensor, tokens: Tensor, visit: Visit | None = None) -> Tensor:
    """Gradient (B, T, D) of the cross entropy, summed over tokens (B, T), with respect to the last states (B, T, D)."""
    # The last position predicts no token of the sequence.
    states, labels = hidden[:, :-1].flatten(0, 1), tokens[:, 1:].flatten().to(hidden.device)
    gradients = []
    for part, targets in zip(states.split(TILE_TOKENS), labels.split(TILE_TOKENS), strict=True):
        inputs = layer.inputs(part)
        running, spans = LogSumExp(len(part), part.device), list(layer.spans(len(part)))
        for span in spans:
            running.add(layer.logits(inputs, layer.weight(*span), span[0]))
        inner = torch.zeros(len(part), layer.width, device=part.device)
        for first, last in spans:
            weight = layer.weight(first, last)
            logits = layer.logits(inputs, weight, first)
            change = running.probabilities(logits)
            inside = (first <= targets) & (targets < last)
            change[inside, targets[inside] - first] -= 1.0
            inner += layer.inputs_gradient(change, logits, weight)
            if visit is not None:
                # `change` is now the gradient with respect to the products.
                visit(inputs, weight, change, (first, last))
        gradients.append(layer.hidden_gradient(part, inner))
    gradient = torch.zeros_like(hidden)
    gradient[:, :-1] = torch.cat(gradients).unflatten(0, (len(hidden), -1))
    return gradient
