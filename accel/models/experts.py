"""The experts of a mixture as separate linear layers.

transformers fuses them in three-dimensional parameters, where no hook sees the input of a single expert.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

FUSED = ("gate_up_proj", "down_proj")


class FusedExperts(Protocol):
    """A module of transformers that fuses all experts of a layer: gate_up_proj is [experts, 2 * inner, width]."""

    gate_up_proj: Tensor
    act_fn: Callable[[Tensor], Tensor]


class Expert(nn.Module):
    """Gated feed-forward network of one expert."""

    def __init__(self, width: int, inner: int, activation: Callable[[Tensor], Tensor], dtype: torch.dtype):
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=False, dtype=dtype, device="meta")
        self.up_proj = nn.Linear(width, inner, bias=False, dtype=dtype, device="meta")
        self.down_proj = nn.Linear(inner, width, bias=False, dtype=dtype, device="meta")
        self.activation = activation

    def forward(self, tokens: Tensor) -> Tensor:
        """Output [N, width] for tokens [N, width]."""
        return self.down_proj(self.activation(self.gate_proj(tokens)) * self.up_proj(tokens))


class Experts(nn.ModuleList):
    """Replacement of transformers' fused experts with the same forward; made on the meta device."""

    def __init__(self, fused: FusedExperts):
        number, inner, width = expert_sizes(fused)
        dtype = fused.gate_up_proj.dtype
        super().__init__(Expert(width, inner, fused.act_fn, dtype) for _ in range(number))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Weighted sum of every token's experts.

        hidden_states [N, width], top_k_index and top_k_weights [N, K]. An expert without tokens is not called.
        """
        output = torch.zeros_like(hidden_states)
        for number in top_k_index.unique().tolist():
            token, choice = (top_k_index == number).nonzero(as_tuple=True)
            weighted = self[number](hidden_states[token]) * top_k_weights[token, choice, None]
            output.index_add_(0, token, weighted.to(output.dtype))
        return output


def expert_sizes(fused: FusedExperts) -> tuple[int, int, int]:
    """Number of experts, their inner width and their outer width."""
    number, double, width = fused.gate_up_proj.shape
    return number, double // 2, width


def is_fused(module: object) -> bool:
    """Whether a module holds fused experts."""
    return all(getattr(getattr(module, name, None), "ndim", 0) == 3 for name in FUSED)
