"""Round to nearest: every weight goes to the closest point of its group's grid.

Source: Nagel et al. 2021, arXiv:2106.08295. The baseline every quantizer here is compared with.
"""

from dataclasses import dataclass

from torch import Tensor

from hasten.accel.compression.calibration.inputs import Inputs, without
from hasten.accel.compression.calibration.statistics import Hessian
from hasten.accel.compression.quantizers.base import QuantizedWeight, Quantizer, WeightScheme
from hasten.accel.compression.quantizers.grid import Grid
from hasten.accel.compression.result import Result
from hasten.accel.costs.method import LayerStack, MethodCost, range_search, rounding
from hasten.accel.errors import UserError


@dataclass(frozen=True)
class RoundToNearest(Quantizer[Inputs | None]):
    """Quantizer that needs no calibration data; where there are statistics, its error is of the output.

    search, shrink: ranges that are tried for each scale, see quantizers.grid.find_grid; 0 takes the full range.
    """

    search: int = 0
    shrink: float = 0.6

    def __post_init__(self) -> None:
        if self.search < 0 or not 0 < self.shrink < 1:
            raise UserError(f"need search >= 0 and 0 < shrink < 1, got search={self.search} shrink={self.shrink}")

    def prepare(self, hessian: Hessian | None) -> Inputs:
        """Statistics of the input, for the error."""
        return Inputs.of(hessian, "the error is of the weights")

    def quantize(self, weight: Tensor, prepared: Inputs | None, scheme: WeightScheme) -> Result[QuantizedWeight]:
        """Codes of weight (R, C)."""
        inputs = prepared or Inputs(None)
        grid = Grid.of(without(weight, inputs.dead_columns), scheme, self.search, self.shrink)
        quantized = grid.quantize(weight)
        error = inputs.power(weight.float() - quantized.dequantize().float())
        return Result(quantized, error, inputs.power(weight), inputs.notes, inputs.hessian is not None)

    def cost(self, layers: LayerStack, scheme: WeightScheme) -> MethodCost:
        """A search of the ranges, and rounding."""
        return MethodCost(rounding(layers) + range_search(layers, len(scheme.factors(self.search, self.shrink))))
