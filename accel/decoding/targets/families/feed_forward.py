"""Feed-forward networks of the fast path."""

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from hasten.accel.decoding.targets.families.decoder import RowMap
from hasten.accel.decoding.targets.fused import runs_kernels
from hasten.kernels.gated_activation import gated_activation

# By their names in configs.
ACTIVATIONS: dict[str, RowMap] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
}
# Names of those that the kernel has.
_FUSED = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


class Gated:
    """down(activation(gate(x)) * up(x)); gate_up gives both next to each other. activation: a name of ACTIVATIONS."""

    def __init__(self, gate_up: RowMap, down: RowMap, activation: str) -> None:
        self._gate_up, self._down, self._activation = gate_up, down, ACTIVATIONS[activation]
        self._fused = _FUSED.get(activation)

    def __call__(self, x: Tensor) -> Tensor:
        """Output (rows, width) of rows (rows, width)."""
        both = self._gate_up(x)
        if self._fused is not None and runs_kernels(both):
            return self._down(gated_activation(both, self._fused)[0])
        gate, up = both.chunk(2, -1)
        return self._down(self._activation(gate) * up)


class Mixture:
    """A mixture of experts. router: weight (E, width). choices: K, the experts of a token.

    normalizes: whether a token's K weights sum to 1. rounds: whether they are rounded to the dtype of the states.
    """

    def __init__(
        self, router: Tensor, experts: Sequence[RowMap], choices: int, normalizes: bool, rounds: bool = False
    ) -> None:
        self._router, self._experts, self._choices = router, experts, choices
        self._normalizes, self._rounds = normalizes, rounds

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and numbers (rows, K) of the experts of rows (rows, width), by the operations of transformers."""
        weights, chosen = F.linear(x, self._router).softmax(-1, dtype=torch.float32).topk(self._choices, -1)
        if self._normalizes:
            weights = weights / weights.sum(-1, keepdim=True)
        return (weights.to(x.dtype) if self._rounds else weights), chosen

    def __call__(self, x: Tensor) -> Tensor:
        """Output (rows, width) of rows (rows, width): one product for every expert that has rows."""
        weights, chosen = self.route(x)
        # The rows of all tokens, in the order of their experts.
        order = chosen.flatten().argsort(stable=True)
        counts = chosen.flatten().bincount(minlength=len(self._experts)).tolist()
        parts = x[order // self._choices].split(counts)
        outputs = torch.cat([expert(part) for expert, part in zip(self._experts, parts, strict=True) if len(part)])
        # Back in the order of tokens: a sum over K does not depend on what else is in the pass, as atomic additions do.
        by_token = torch.empty_like(outputs)
        by_token[order] = outputs
        return (by_token.unflatten(0, (-1, self._choices)) * weights[..., None]).sum(1).to(x.dtype)
