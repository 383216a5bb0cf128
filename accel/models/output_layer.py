"""The output layer of a model, from the last block's output to logits, a tile of the vocabulary at a time.

The logits of one token of Gemma 3 take 1 MB, and its output matrix 335 MB. So logits of many tokens are made for a few
thousand entries of the vocabulary at a time: the matrix is read once for all of the tokens, and the logits of a tile
stay in the processor's cache until the sums over them are made.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Tokens whose logits are computed at once: with fewer, reading and converting the weights takes a noticeable share of
# the time, and with more, nothing is gained.
TILE_TOKENS = 256
# Limits of a tile: bytes of its logits, and of its weights in float32. A GPU needs larger products.
TILE_LOGITS_BYTES = {"cpu": 2 << 20, "cuda": 64 << 20}
TILE_WEIGHT_BYTES = {"cpu": 8 << 20, "cuda": 256 << 20}
# Below this, calls take longer than products.
_LEAST_COLUMNS = 256


def tile_columns(tokens: int, width: int, device: torch.device) -> int:
    """Vocabulary entries of a tile for so many tokens at once, whose inputs to the output matrix have this width."""
    kind = "cpu" if device.type == "cpu" else "cuda"
    by_logits = TILE_LOGITS_BYTES[kind] // (4 * max(1, tokens))
    return max(_LEAST_COLUMNS, min(by_logits, TILE_WEIGHT_BYTES[kind] // (4 * width)))


class OutputLayer:
    """What follows the last block of a model: last norm, other modules, and the output matrix (V, D').

    tail: modules on the device, each of which gets the output of the one before it. read(first, last) returns these
    rows of the output matrix on the device, in any dtype. dtype: of the products. cap, logit_scale, input_scale: see
    Adapter. bias: of the output matrix (V,) on the device, None where it has none. rounding: of the matrix's inputs,
    None for none.
    """

    def __init__(
        self,
        tail: Sequence[nn.Module],
        read: Callable[[int, int], Tensor],
        shape: tuple[int, int],
        dtype: torch.dtype,
        cap: float | None,
        device: torch.device,
        logit_scale: float = 1.0,
        input_scale: float = 1.0,
        bias: Tensor | None = None,
        rounding: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.vocabulary, self.width = shape
        self.device = device
        self._tail, self._read, self._bias = tuple(tail), read, bias
        self._dtype, self._cap, self._rounding = dtype, cap, rounding
        self._logit_scale, self._input_scale = logit_scale, input_scale

    def inputs(self, hidden: Tensor) -> Tensor:
        """Inputs (..., D') of the output matrix, for the last block's output (..., D)."""
        with torch.no_grad():
            return self._before_matrix(hidden)

    def weight(self, first: int, last: int) -> Tensor:
        """Rows of the output matrix (C, D') in the dtype of the products."""
        return self._read(first, last).to(self._dtype)

    def logits(self, inputs: Tensor, weight: Tensor, first: int) -> Tensor:
        """Logits (..., C) float32 for inputs (..., D') and rows (C, D') of the output matrix from `first` on."""
        with torch.no_grad():
            bias = None if self._bias is None else self._bias[first : first + len(weight)]
            logits = F.linear(inputs, weight, bias).float()
            if self._logit_scale != 1.0:
                logits.mul_(self._logit_scale)
            if self._cap is not None:
                logits.div_(self._cap).tanh_().mul_(self._cap)
        return logits

    def spans(self, tokens: int) -> Iterator[tuple[int, int]]:
        """First entry and end of each tile of the vocabulary, for so many tokens at once."""
        columns = tile_columns(tokens, self.width, self.device)
        for first in range(0, self.vocabulary, columns):
            yield first, min(first + columns, self.vocabulary)

    def tiles(self, inputs: Tensor) -> Iterator[tuple[int, Tensor]]:
        """First entry and logits (M, C) float32 of each tile of the vocabulary, for inputs (M, D')."""
        for first, last in self.spans(len(inputs)):
            yield first, self.logits(inputs, self.weight(first, last), first)

    def inputs_gradient(self, gradient: Tensor, logits: Tensor, weight: Tensor) -> Tensor:
        """A tile's part (..., D') float32 of the gradient with respect to the inputs of the output matrix.

        gradient: (..., C) float32, with respect to the logits that `logits` returned; it is overwritten.
        """
        if self._cap is not None:
            # The derivative of cap tanh(x / cap).
            gradient.mul_(1 - (logits / self._cap).square())
        if self._logit_scale != 1.0:
            gradient.mul_(self._logit_scale)
        return (gradient.to(self._dtype) @ weight).float()

    def hidden_gradient(self, hidden: Tensor, gradient: Tensor) -> Tensor:
        """Gradient (..., D) with respect to hidden, for the gradient (..., D') with respect to inputs(hidden)."""
        with torch.enable_grad():
            given = hidden.detach().requires_grad_()
            output = self._before_matrix(given)
        (result,) = torch.autograd.grad(output, given, gradient.to(output.dtype))
        return result

    def _before_matrix(self, hidden: Tensor) -> Tensor:
        for module in self._tail:
            hidden = module(hidden)
        if self._input_scale != 1.0:
            hidden = hidden * self._input_scale
        return hidden if self._rounding is None else self._rounding(hidden)
