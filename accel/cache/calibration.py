"""The pass that shows calibration sequences to cache methods: block by block, one block in memory at a time.

Queries, keys and values are seen where the model hands them to its attention function, after the rotary embedding, as a
cache sees them; no model class is changed. For methods that read gradients the blocks run a second time, from the last
to the first, with the gradient of the text's cross entropy.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hasten.accel.activations.hooks import attention_path, attention_states
from hasten.accel.cache.base import CacheMethod, Place, Rotation
from hasten.accel.cache.calibrated import Calibrated, LayerTensors, LayerTokens
from hasten.accel.cache.rotary import rotary_of
from hasten.accel.errors import UserError
from hasten.accel.evaluation.next_token import next_token_gradient
from hasten.accel.models.architecture import Architecture
from hasten.kernels.attention.contract import Scoring

# Sums of a method by layer.
Sums = list[LayerTensors]


def gather(
    architecture: Architecture, methods: Sequence[CacheMethod], tokens: Tensor, sequences: int, batch: int
) -> list[Sums]:
    """Sums of each method over sequences (N, T), which are a part of all `sequences`; `batch` run at once.

    Memory: a block, and hidden states of the sequences; with gradients, those at the input of every block.
    """
    found = _Gathering(architecture, methods, tokens, sequences)
    plain = [number for number, method in enumerate(methods) if not _calibrated(method).needs_gradients]
    deep = [number for number in range(len(methods)) if number not in plain]
    parts = tokens.split(batch)
    states = [[architecture.embed(part)] for part in parts]
    for index in range(architecture.num_blocks):
        block = architecture.load_block(index)
        for number, hidden in enumerate(states):
            with _watched(block) as seen:
                output = architecture.run_block(block, index, hidden[-1])
            if plain:
                found.add(plain, index, block, number * batch, *seen)
            # Gradients need the inputs of all blocks.
            states[number] = [*hidden, output] if deep else [output]
    if not deep:
        return found.sums
    layer = architecture.output_layer()
    gradients = [next_token_gradient(layer, hidden.pop(), part) for hidden, part in zip(states, parts, strict=True)]
    for index in reversed(range(architecture.num_blocks)):
        block = architecture.load_block(index)
        for number, gradient in enumerate(gradients):
            before = states[number].pop().detach().requires_grad_()
            with torch.enable_grad(), _watched(block) as seen:
                output = architecture.run_block(block, index, before, differentiable=True)
                gradients[number], *of_states = torch.autograd.grad(output, [before, *seen[1:]], gradient)
            found.add(deep, index, block, number * batch, *(part.detach() for part in seen), *of_states)
    return found.sums


def merged(method: CacheMethod, one: Sums, other: Sums) -> Sums:
    """Sums of the sequences of both, in this order."""
    return [_calibrated(method).merge(*layers) for layers in zip(one, other, strict=True)]


class _Gathering:
    """Sums of all methods so far; sums: by method and layer."""

    def __init__(
        self, architecture: Architecture, methods: Sequence[CacheMethod], tokens: Tensor, sequences: int
    ) -> None:
        self.sums: list[Sums] = [[{} for _ in range(architecture.num_blocks)] for _ in methods]
        self._architecture, self._methods, self._sequences = architecture, methods, sequences
        self._shared: list[list[dict[str, Any]]] = [[{} for _ in methods] for _ in tokens]
        self._rotary: Callable[[int, Tensor, Tensor, bool], Tensor] | None = None
        if any(method.needs_rotary for method in methods):
            self._rotary = rotary_of(architecture.front)

    def add(
        self, numbers: Sequence[int], index: int, block: nn.Module, first: int, queries: Tensor, *parts: Tensor
    ) -> None:
        """Show a batch, whose first sequence is `first`, to methods. parts: keys, values, and gradients of both."""
        scoring = _scoring(block)
        layers = self._architecture.num_blocks
        positions = torch.arange(queries.shape[2], dtype=torch.int32, device=queries.device)
        for row in range(len(queries)):
            for number in numbers:
                method = self._methods[number]
                rotary: Rotation | None = None
                if method.needs_rotary:
                    assert self._rotary is not None
                    rotary = partial(self._rotary, index)
                shared = self._shared[first + row][number]
                place = Place(index, layers, len(positions), None, scoring, shared, rotary)
                keys, values, *gradients = (part[row] for part in parts)
                shown = LayerTokens(
                    keys, values, queries[row].transpose(0, 1), positions, place, self._sequences, *gradients
                )
                own, before = _calibrated(method), self.sums[number][index]
                sums = own.observe(shown)
                self.sums[number][index] = own.merge(before, sums) if before else sums


def _calibrated(method: CacheMethod) -> Calibrated:
    assert isinstance(method, Calibrated)
    return method


@contextmanager
def _watched(block: nn.Module) -> Iterator[list[Tensor]]:
    """The list that gets queries, keys and values (B, H, T, D) of the block's attention as it runs."""
    if attention_path(block) is None:
        raise UserError(f"{type(block).__name__} has no attention with keys and values: its caches have no statistics")
    states, seen = attention_states(block), list[Tensor]()
    states.observe = lambda *given: seen.extend(given)
    try:
        yield seen
    finally:
        states.observe = None


def _scoring(block: nn.Module) -> Scoring:
    """How the block's attention makes scores."""
    attention: Any = block.get_submodule(attention_path(block) or "")
    names = ("scaling", "sliding_window", "attn_logit_softcapping")
    return Scoring(*(getattr(attention, name, None) for name in names))
