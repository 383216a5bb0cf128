"""An architecture whose blocks are divided over ranks: each holds a part of every linear layer's rows.

A layer's weight is gathered just for its product, for all of a rank's forwards at once, and dropped after it (see
`supplied`). So a device holds 1/n of a block and one whole layer.

Source: partitioned parameters of ZeRO-3, Rajbhandari et al. 2020, arXiv:1910.02054; ZeRO-Infinity, arXiv:2104.07857.
Departs from them: forwards go through a block layer by layer, and not one after another, so that a weight is gathered
once for all sequences; ranks may have different numbers of forwards and run different experts.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from hasten.accel.models.architecture import Architecture, Weight
from hasten.accel.models.checkpoint import Checkpoint
from hasten.accel.models.exchange import Exchange
from hasten.accel.models.forwards import Forward
from hasten.accel.models.supplied import SuppliedWeights

# Number of no layer.
_NONE = 1 << 62


class DividedWeights(SuppliedWeights):
    """Weights of a block's linear layers, of which each rank holds consecutive rows.

    device: on which layers run. offload: whether this rank's rows are held in main memory.
    """

    def __init__(self, exchange: Exchange, device: torch.device, dtype: torch.dtype, offload: bool = False) -> None:
        super().__init__(device, dtype)
        self._exchange = exchange
        self._home = torch.device("cpu") if offload else device
        self._rows: list[int] = []
        self._parts: list[Tensor] = []

    @property
    def nbytes(self) -> int:
        """Bytes of this rank's rows."""
        return sum(part.nbytes for part in self._parts)

    def divide(self, path: str, layer: nn.Linear, read: Callable[[int, int], Tensor]) -> None:
        """Add a layer, whose path in the block is `path`. read(first, last): rows of its weight."""
        rows = layer.out_features
        self._rows.append(rows)
        self._parts.append(self._part(rows, read))
        self._add(path, layer, alone=False)

    def replace(self, path: str, weight: Tensor) -> None:
        """Replace a layer's weight by `weight` (R, C), of which this rank keeps its rows."""
        number = self._numbers[path]
        self._parts[number] = self._part(self._rows[number], lambda first, last: weight[first:last])

    def next_layer(self, forwards: Sequence[Forward]) -> int | None:
        """The first layer that a forward on any rank waits for; called on all ranks at once."""
        needed = super().next_layer(forwards)
        number = self._exchange.minimum(_NONE if needed is None else needed)
        return None if number == _NONE else number

    def bring(self, number: int) -> Tensor:
        """The weight gathered from all ranks."""
        whole = self._exchange.gather(self._parts[number].to(self._device, non_blocking=True))
        return whole[: self._rows[number]]

    def _part(self, rows: int, read: Callable[[int, int], Tensor]) -> Tensor:
        """The rows of this rank, filled up with zeros to the same number on all ranks."""
        size = -(-rows // self._exchange.size)
        first, last = (min(rows, rank * size) for rank in (self._exchange.rank, self._exchange.rank + 1))
        part = read(first, last).to(self._home, self._dtype)
        if len(part) < size:
            part = torch.cat([part, part.new_zeros(size - len(part), part.shape[1])])
        elif part.untyped_storage().nbytes() > part.nbytes:
            # A view would hold the whole weight.
            part = part.clone()
        if self._home != self._device:
            return part.pin_memory() if torch.cuda.is_available() else part
        return part


class DividedArchitecture(Architecture):
    """An architecture that loads this rank's part of a block. All ranks load and run the same blocks at once.

    offload: whether parts are held in main memory.
    """

    streams: ClassVar[bool] = False

    def __init__(
        self,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        device: torch.device | str,
        exchange: Exchange,
        offload: bool = False,
        as_served: bool = True,
    ) -> None:
        super().__init__(checkpoint, dtype, device, as_served)
        self._exchange, self._offload = exchange, offload
        self._weights: WeakKeyDictionary[nn.Module, DividedWeights] = WeakKeyDictionary()

    def load_block(self, index: int) -> nn.Module:
        """Block with this rank's rows of its linear layers, and everything else of it; see Architecture."""
        block = self._empty_block(index)
        weights = DividedWeights(self._exchange, self.device, self.dtype, self._offload)
        for layer in self.linears(index):
            module = block.get_submodule(layer.module)
            assert isinstance(module, nn.Linear)
            weights.divide(
                layer.module, module, lambda *rows, name=f"{layer.name}.weight": self._read_rows(name, *rows)
            )
        self._fill_block(block, index, {f"{layer.module}.weight" for layer in self.linears(index)})
        self._weights[block] = weights
        # Behind the hook that waits for a layer's weight: only inputs of the layer that runs are held twice.
        self._rotate_inputs(block, index)
        self._round_as_stored(block, index)
        return block.eval()

    def replace_weights(self, block: nn.Module, weights: Iterable[tuple[str, Weight]]) -> None:
        """See Architecture."""
        for path, weight in weights:
            self._weights[block].replace(path, weight if isinstance(weight, Tensor) else weight())

    def supply(self, block: nn.Module, forwards: Sequence[Forward]) -> None:
        """See Architecture."""
        with torch.no_grad():
            self._weights[block].supply(forwards)

    def _read_rows(self, name: str, first: int, last: int) -> Tensor:
        """Rows of a weight; one whose rows cannot be read alone is dequantized whole."""
        checkpoint = self.checkpoint
        if checkpoint.has_rows(name):
            rows = checkpoint.row_range(name, first, last)
        else:
            rows = checkpoint.tensor(name)[first:last]
        checkpoint.check_finite(rows, name)
        return rows
