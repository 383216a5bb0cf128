"""Phi-3: queries, keys and values are one linear layer, gate and up another one; a part of a head may be rotated."""

from collections.abc import Sequence

import torch

from hasten.accel.decoding.targets.families.decoder import RowMap
from hasten.accel.decoding.targets.families.llama import Llama
from hasten.accel.decoding.targets.families.weights import Rows


class Phi3(Llama):
    """Phi-3."""

    partial_rotary = True

    def qkv(self, name: str) -> Sequence[Rows]:
        """See Llama."""
        rotated, values = self.heads + self.kv_heads, torch.arange(self.kv_heads * self.size)
        order = torch.cat([self.order_of_heads(rotated), values + rotated * self.size])
        return [Rows(f"{name}.qkv_proj", order)]

    def mlp(self, index: int, name: str) -> RowMap:
        """See Llama."""
        return self.gated([Rows(f"{name}.gate_up_proj")], f"{name}.down_proj")
