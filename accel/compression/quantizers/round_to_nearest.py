"""Round to nearest: every weight goes to the closest point of its group's grid.

Source: Nagel et al. 2021, arXiv:2106.08295. The baseline every quantizer here is compared with.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from hasten.accel.compression.calibration.inputs import Inputs, without
from hasten.accel.compression.calibration.slabs import rows_at_once
from hasten.accel.compression.calibration.statistics import Hessian
from hasten.accel.compression.quantizers.base import QuantizedWeight, Quantizer, WeightScheme
from hasten.accel.compression.quantizers.block_grid import TRIED, find_block_grid, round_to_blocks
from hasten.accel.compression.quantizers.grid import Grid
from hasten.accel.compression.result import Result
from hasten.accel.costs.method import LayerStack, MethodCost, range_search, rounding
from hasten.accel.errors import UserError
from hasten.accel.models.ggml.base import BlockType, BlockWeight


@dataclass(frozen=True)
class RoundToNearest(Quantizer[Inputs | None]):
    """Quantizer that needs no calibration data; where there are statistics, its error is of the output.

    search, shrink: ranges that are tried for each scale, see quantizers.grid.find_grid; 0 takes the full range. None is
    the full range of integers and a short search on floats, see WeightScheme.searched.
    """

    search: int | None = None
    shrink: float = 0.6

    def __post_init__(self) -> None:
        if (self.search or 0) < 0 or not 0 < self.shrink < 1:
            raise UserError(f"need search >= 0 and 0 < shrink < 1, got search={self.search} shrink={self.shrink}")

    def prepare(self, hessian: Hessian | None) -> Inputs:
        """Statistics of the input, for the error."""
        return Inputs.of(hessian, "the error is of the weights")

    def quantize(self, weight: Tensor, prepared: Inputs | None, scheme: WeightScheme) -> Result[QuantizedWeight]:
        """Codes of weight (R, C)."""
        inputs = prepared or Inputs(None)
        # Once, because all that follows calculates in float32.
        wide = weight.float()
        grid = Grid.of(without(wide, inputs.dead_columns), scheme, self._search(scheme), self.shrink, weight.dtype)
        quantized = grid.quantize(wide)
        power = inputs.power(wide)
        return Result(quantized, _error(wide, quantized, inputs), power, inputs.notes, inputs.hessian is not None)

    def cost(self, layers: LayerStack, scheme: WeightScheme) -> MethodCost:
        """A search of the ranges, and rounding."""
        tried = scheme.factors(self._search(scheme), self.shrink)
        return MethodCost(rounding(layers) + range_search(layers, len(tried)))

    def _search(self, scheme: WeightScheme) -> int:
        return scheme.searched if self.search is None else self.search

    def quantize_blocks(self, weight: Tensor, prepared: Inputs | None, kind: type[BlockType]) -> Result[BlockWeight]:
        """Blocks of weight (R, C); scales are searched in any case, by squared error times E[x²] of the column."""
        inputs = prepared or Inputs(None)
        importance = None if inputs.hessian is None else inputs.hessian.diagonal().to(weight.device)
        grid = find_block_grid(weight, kind, importance)
        quantized = BlockWeight(kind, kind.encode(round_to_blocks(weight, kind, grid), grid), weight.dtype)
        error = inputs.power(weight.float() - quantized.dequantize().to(weight.dtype).float())
        return Result(quantized, error, inputs.power(weight), inputs.notes, inputs.hessian is not None)

    def blocks_cost(self, layers: LayerStack, kind: type[BlockType]) -> MethodCost:
        """A search of the scales, and rounding."""
        return MethodCost(rounding(layers) + range_search(layers, TRIED))


def _error(weight: Tensor, quantized: QuantizedWeight, inputs: Inputs) -> Tensor:
    """Error of every row of weight (R, C), (R,) float32."""
    if inputs.hessian is not None:
        return inputs.power(weight.float() - quantized.dequantize().float())
    step = rows_at_once(weight, weight.shape[1])
    slabs = [(first, min(first + step, len(weight))) for first in range(0, len(weight), step)]
    return torch.cat(
        [inputs.power(weight[start:stop].float() - quantized.rows(start, stop).dequantize()) for start, stop in slabs]
    )
