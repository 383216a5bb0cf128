"""The experts of a mixture as separate linear layers.

transformers fuses them in three-dimensional parameters, where no hook sees the input of a single expert. A decorator of
transformers describes the layout of such a module by attributes: `is_transposed` (weights are [experts, in, out]),
`is_concatenated` (gate rows above up rows, else interleaved), `has_bias`, `has_gate`, and the method `_apply_gate`. The
few modules without them have the usual layout, or a transposed one, which their shapes show.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

GATE, UP, DOWN = "gate_proj", "up_proj", "down_proj"
# Parameters of a fused module: the first two of modules with and without a gate.
_FIRST, _LAST, _BIAS = ("gate_up_proj", "up_proj"), "down_proj", "_bias"
# The gate of modules without one of their own, act_fn(gate) * up, which needs no joined matrix.
_USUAL_GATE = "_default_apply_gate"


@dataclass(frozen=True)
class ExpertLayer:
    """One linear layer of an expert. path: below the module of all experts, such as `3.up_proj`.

    group: equal for layers that read the same input.
    """

    path: str
    rows: int
    columns: int
    group: str
    expert: int


@dataclass(frozen=True)
class Layout:
    """How a module of transformers holds the experts of a layer.

    number: of experts with weights. width, inner: of their input and output, and of what is between. scores_inputs:
    whether the module is called with one scaled copy of all tokens for each expert (Llama 4), and not with the choice
    of experts.
    """

    number: int
    width: int
    inner: int
    dtype: torch.dtype
    has_gate: bool = True
    has_bias: bool = False
    interleaved: bool = False
    transposed: bool = False
    scores_inputs: bool = False

    @classmethod
    def of(cls, fused: Any) -> "Layout":
        """Layout of a module of which `is_fused` is true."""
        has_gate = isinstance(getattr(fused, _FIRST[0], None), Tensor)
        first, last = getattr(fused, _FIRST[0] if has_gate else _FIRST[1]), getattr(fused, _LAST)
        transposed = is_transposed(tuple(first.shape), tuple(last.shape), 2 if has_gate else 1)
        inner, width = last.shape[1:] if transposed else reversed(last.shape[1:])
        return cls(
            number=len(last),
            width=width,
            inner=inner,
            dtype=first.dtype,
            has_gate=has_gate,
            has_bias=isinstance(getattr(fused, _LAST + _BIAS, None), Tensor),
            interleaved=not getattr(fused, "is_concatenated", True),
            transposed=transposed,
            scores_inputs=not hasattr(fused, "has_gate") and fused.forward.__code__.co_argcount == 2,
        )

    def layers(self) -> Iterator[ExpertLayer]:
        """The linear layers of all experts, in the order in which they run."""
        first = (GATE, UP) if self.has_gate else (UP,)
        for expert in range(self.number):
            for name in first:
                yield ExpertLayer(f"{expert}.{name}", self.inner, self.width, f"{expert}.{first[0]}", expert)
            yield ExpertLayer(f"{expert}.{DOWN}", self.width, self.inner, f"{expert}.{DOWN}", expert)


class Expert(nn.Module):
    """Feed-forward network of one expert. activation: of gate and up projection, or of the up projection alone."""

    def __init__(self, layout: Layout, activation: Callable[..., Tensor]):
        super().__init__()

        def linear(columns: int, rows: int) -> nn.Linear:
            return nn.Linear(columns, rows, bias=layout.has_bias, dtype=layout.dtype, device="meta")

        if layout.has_gate:
            self.gate_proj = linear(layout.width, layout.inner)
        self.up_proj = linear(layout.width, layout.inner)
        self.down_proj = linear(layout.inner, layout.width)
        self._has_gate = layout.has_gate
        self._activation = activation

    def forward(self, tokens: Tensor) -> Tensor:
        """Output [N, width] for tokens [N, width]."""
        gate = (self.gate_proj(tokens),) if self._has_gate else ()
        output: Tensor = self.down_proj(self._activation(*gate, self.up_proj(tokens)))
        return output


class Experts(nn.Module):
    """Replacement of transformers' fused experts with the same call and output; made on the meta device.

    Experts are its children `0`, `1`, …; other children and parameters of the fused module remain. all_tokens: whether
    `show` calls every expert with all tokens, and not only with those that are routed to it.
    """

    def __init__(self, fused: Any, all_tokens: bool = False):
        super().__init__()
        self.layout, self.all_tokens = Layout.of(fused), all_tokens
        for name, child in fused.named_children():
            if name != "act_fn":
                self.add_module(name, child)
        activation = _activation(fused, self.layout)
        for number in range(self.layout.number):
            self.add_module(str(number), Expert(self.layout, activation))
        self._normalises = bool(getattr(fused, "has_post_expert_norm", False))

    def forward(self, hidden_states: Tensor, *choice: Tensor, **named: Tensor) -> Tensor:
        """Output of the routed experts. An expert without tokens is not called.

        choice: indices and weights [N, K] of the experts of tokens hidden_states [N, width]. Where the layout scores
        inputs there is none: hidden_states [E * N, width] are the tokens for each expert, zero where it is not chosen.
        """
        if self.layout.scores_inputs:
            return self._run_scored(hidden_states)
        indices, weights = (*choice, *named.values())
        output = torch.zeros_like(hidden_states)
        for number in indices.unique().tolist():
            token, place = (indices == number).nonzero(as_tuple=True)
            outputs = self._run(number, hidden_states[token])
            if outputs is not None:
                output.index_add_(0, token, (outputs * weights[token, place, None]).to(output.dtype))
        return output

    def show(self, members: Sequence[int], hidden_states: Tensor, *choice: Tensor, **named: Tensor) -> None:
        """Call experts with the tokens that their statistics are of. members: their numbers; others: see forward."""
        if not self.all_tokens:
            for number, tokens in self._routed(hidden_states, *choice, **named):
                if number in members:
                    self._expert(number)(tokens)
            return
        if self.layout.scores_inputs:
            scaled = hidden_states.unflatten(0, (self.layout.number, -1))
            # The copy for the expert that the router scores highest: no other is known here.
            best = scaled.abs().amax(-1).argmax(0)
            hidden_states = scaled[best, torch.arange(len(best), device=best.device)]
        for number in members:
            self._expert(number)(hidden_states)

    def _routed(self, hidden_states: Tensor, *choice: Tensor, **named: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Number and tokens of each expert that has any."""
        if self.layout.scores_inputs:
            for number, tokens in enumerate(hidden_states.unflatten(0, (self.layout.number, -1))):
                if bool(tokens.any()):
                    yield number, tokens[tokens.any(-1)]
            return
        indices = (*choice, *named.values())[0]
        for number in indices.unique().tolist():
            yield number, hidden_states[(indices == number).any(-1)]

    def _expert(self, number: int) -> nn.Module:
        return self.get_submodule(str(number))

    def _run(self, number: int, tokens: Tensor) -> Tensor | None:
        """Output of an expert for its tokens; None for a number that stands for no expert."""
        if number >= self.layout.number:
            # Numbers beyond the experts are identities where the model has any, and padding elsewhere.
            return tokens if "identity_expert" in self._modules else None
        outputs: Tensor = self._expert(number)(tokens)
        return self.get_submodule("post_expert_norm")(outputs) if self._normalises else outputs

    def _run_scored(self, hidden_states: Tensor) -> Tensor:
        output = torch.zeros_like(hidden_states)
        scaled = hidden_states.unflatten(0, (self.layout.number, -1))
        for number, (tokens, outputs) in enumerate(zip(scaled, output.view_as(scaled), strict=True)):
            chosen = tokens.any(-1).nonzero()[:, 0]
            if len(chosen):
                outputs[chosen] = self._expert(number)(tokens[chosen])
        return output


def is_fused(module: object) -> bool:
    """Whether a module holds the experts of a layer in three-dimensional parameters."""
    first = any(getattr(getattr(module, name, None), "ndim", 0) == 3 for name in _FIRST)
    return first and getattr(getattr(module, _LAST, None), "ndim", 0) == 3


def is_transposed(first: tuple[int, ...], last: tuple[int, ...], parts: int) -> bool:
    """Whether weights are stored as [experts, in, out]; from the shapes of the first and the last parameter.

    parts: matrices in the first one, 2 with a gate.
    """
    return first[2] == parts * last[1] and first[1] == last[2] and first[1] != parts * last[2]


def _activation(fused: Any, layout: Layout) -> Callable[..., Tensor]:
    """Function between the first layers of an expert and the last one, by transformers' own code.

    It refers to the fused module, whose parameters are on the meta device.
    """
    if not layout.has_gate:
        act: Callable[[Tensor], Tensor] = fused.act_fn
        return act
    apply = getattr(fused, "_apply_gate", None)
    if apply is None or apply.__func__.__name__ == _USUAL_GATE:
        return lambda gate, up: fused.act_fn(gate) * up

    def gated(gate: Tensor, up: Tensor) -> Tensor:
        output: Tensor = apply(
            torch.stack([gate, up], -1).flatten(-2) if layout.interleaved else torch.cat([gate, up], -1)
        )
        return output

    return gated
