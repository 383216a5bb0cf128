"""Feed-forward networks of the fast path."""

from functools import partial

import torch.nn.functional as F
from torch import Tensor

from hasten.accel.decoding.targets.families.decoder import RowMap

# By their names in configs.
ACTIVATIONS: dict[str, RowMap] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
}


class Gated:
    """down(activation(gate(x)) * up(x)); gate_up gives both next to each other."""

    def __init__(self, gate_up: RowMap, down: RowMap, activation: RowMap) -> None:
        self._gate_up, self._down, self._activation = gate_up, down, activation

    def __call__(self, x: Tensor) -> Tensor:
        """Output (rows, width) of rows (rows, width)."""
        gate, up = self._gate_up(x).chunk(2, -1)
        return self._down(self._activation(gate) * up)
