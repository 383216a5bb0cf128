"""Where the fast path's weights come from: named tensors, and linear layers in whatever form they are multiplied.

Names are those of the modules of transformers below the decoder, with unfused experts (`layers.0.self_attn.q_proj`,
`layers.0.mlp.experts.3.up_proj`), and `lm_head`. A source of packed weights implements the same four methods.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hasten.accel.decoding.targets.families.decoder import RowMap
from hasten.accel.decoding.targets.matmul import Weight
from hasten.kernels.skinny_gemm import exact_bfloat16

_EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj)\.weight")


class Rows(NamedTuple):
    """Outputs of a linear layer. module: its name. order: (R,) its outputs in the wanted order; None: as stored."""

    module: str
    order: Tensor | None = None


class WeightSource(ABC):
    """Weights of a model, computed with in `dtype` on `device`."""

    dtype: torch.dtype
    device: torch.device

    @abstractmethod
    def has(self, name: str) -> bool:
        """Whether there is a tensor of this name, such as `layers.0.self_attn.q_norm.weight`."""

    @abstractmethod
    def tensor(self, name: str) -> Tensor:
        """A tensor that is not packed: the weight of a norm or of a router."""

    @abstractmethod
    def embedding(self) -> tuple[RowMap, Callable[[], Tensor]]:
        """Look-up of rows (N, width) of ids (N,), and what makes the weight (V, width)."""

    @abstractmethod
    def product(self, parts: Sequence[Rows]) -> RowMap:
        """Linear layers of one input, with their biases, whose outputs are next to each other in the order of `parts`.

        The order of outputs is that of weight rows: of codes, scales and zero points alike where they are packed. A
        source fuses the parts where it can; where it cannot, it multiplies by each of them, see `side_by_side`.
        """


def side_by_side(products: Sequence[RowMap]) -> RowMap:
    """The outputs of several layers of one input, next to each other."""
    return lambda x: torch.cat([product(x) for product in products], -1)


class ModelWeights(WeightSource):
    """Weights of a transformers model, copied or shared. packs: whether they may be packed, see matmul.Weight."""

    def __init__(self, model: Any, packs: bool = True) -> None:
        self.dtype, self.device, self._packs = model.dtype, model.device, packs
        decoder = model.get_decoder()
        self._embedding: Tensor = decoder.get_input_embeddings().weight.detach()
        self._tensors = {name: parameter.detach() for name, parameter in decoder.named_parameters()}
        head = model.get_output_embeddings()
        self._tensors |= {f"lm_head.{name}": parameter.detach() for name, parameter in head.named_parameters()}

    def has(self, name: str) -> bool:
        """See WeightSource."""
        return name in self._tensors

    def tensor(self, name: str) -> Tensor:
        """See WeightSource. The weight of an expert is a part of a tensor of all experts."""
        expert = None if name in self._tensors else _EXPERT.fullmatch(name)
        if expert is None:
            return self._tensors[name]
        parent, number, projection = expert.groups()
        if projection == "down_proj":
            return self._tensors[f"{parent}.down_proj"][int(number)]
        gate, up = self._tensors[f"{parent}.gate_up_proj"][int(number)].chunk(2)
        return gate if projection == "gate_proj" else up

    def embedding(self) -> tuple[RowMap, Callable[[], Tensor]]:
        """See WeightSource. On a CPU the weight is in bfloat16 where that is exact."""
        weight, dtype = self._embedding, self.dtype
        if self.device.type == "cpu":
            short = exact_bfloat16(weight)
            weight = weight if short is None else short
        return (lambda ids: weight[ids].to(dtype)), lambda: weight

    def product(self, parts: Sequence[Rows]) -> RowMap:
        """See WeightSource: always one product."""
        weights = [ordered(self.tensor(f"{part.module}.weight"), part.order) for part in parts]
        bias = None
        if any(self.has(f"{part.module}.bias") for part in parts):
            bias = torch.cat([self._bias(part, weight) for part, weight in zip(parts, weights, strict=True)])
        return Weight(weights[0] if len(weights) == 1 else torch.cat(weights), bias, self._packs)

    def _bias(self, part: Rows, weight: Tensor) -> Tensor:
        name = f"{part.module}.bias"
        return ordered(self.tensor(name), part.order) if self.has(name) else weight.new_zeros(len(weight))


def ordered(rows: Tensor, order: Tensor | None) -> Tensor:
    """Rows in an order; None: as they are."""
    return rows if order is None else rows[order.to(rows.device)]
