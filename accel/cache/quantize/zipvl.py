"""ZipVL: as many tokens are held in more bits as make up a given share of the attention, layer by layer.

Source: He et al. 2024, arXiv:2410.08584 (abstract), in its form for text. What is left out: its attention in the prompt
among the important tokens only. Departs from it: all queries count, and not probes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from hasten.accel.cache.quantize.mikv import MiKV
from hasten.accel.errors import UserError


@dataclass(frozen=True)
class ZipVL(MiKV):
    """Quantizer of two precisions. attention: share of it that the tokens in more bits received."""

    high_bits: int = 4
    attention: float = 0.97

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.attention <= 1:
            raise UserError(f"cache.attention={self.attention} is out of range: above 0, at most 1")

    def number(self, attention: Tensor) -> int:
        """The least number of tokens that have the share, of the sum over heads."""
        received = attention.clamp(min=0).sum(0).sort(descending=True).values.double().cumsum(0)
        return int(torch.searchsorted(received, self.attention * received[-1])) + 1
