"""Matrix products and norms of few rows, on which decoding spends its time.

Quantized weights stay packed, and are multiplied by the kernel packed_gemm. On a CPU, float32 weights that are exact in
bfloat16 are stored in it, and multiplied by the kernel skinny_gemm. Other weights are packed in MKL's order if MKL is
available, with which a product of 2 to 24 rows is up to twice as fast. MKL guarantees a packed order for one number of
rows only. It has been right for all, which is checked for each weight.
"""

import weakref
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hasten.kernels.packed_gemm import packed_gemm, prepare
from hasten.kernels.packed_gemm.panels import Panels
from hasten.kernels.packed_weight import PackedWeight
from hasten.kernels.rms_norm import rms_norm
from hasten.kernels.skinny_gemm import pack_weight, skinny_gemm

# With more rows than this, torch's product is as fast as the packed one.
_MAX_ROWS = 24
# Bound of the packed copies of weights in a process; further weights are not packed.
_MAX_BYTES = 2**31
_CHECKED_ROWS = (2, 3, 8)


class Weight:
    """A weight (out, in) and its bias (out,).

    packs: whether it may be packed. dtype: of inputs, in which the weight is multiplied; None is the weight's own.
    """

    _packed_bytes = 0

    def __init__(
        self, weight: Tensor, bias: Tensor | None = None, packs: bool = True, dtype: torch.dtype | None = None
    ) -> None:
        self.bias, self._outputs = bias, weight.shape[0]
        self._panels = pack_weight(weight, dtype) if packs else None
        if self._panels is not None:
            return
        weight = weight if dtype is None else weight.to(dtype)
        size = weight.numel() * 4
        self._packed = _packed(weight.contiguous()) if packs and Weight._packed_bytes + size <= _MAX_BYTES else None
        if self._packed is not None:
            Weight._packed_bytes += size
            # The bytes are returned when the weight is deleted: a target may be loaded again in another dtype.
            weakref.finalize(self, Weight._give_back, size).atexit = False
        # For an input of one row, a CPU reads the transposed weight at the memory's full bandwidth.
        self._transposed = weight.t().contiguous() if weight.device.type == "cpu" else weight.t()
        self._weight = self._transposed.t()

    def __call__(self, x: Tensor) -> Tensor:
        """Product (rows, out) of an input (rows, in)."""
        if self._panels is not None:
            out = skinny_gemm(x, self._panels, self._outputs)
            return out if self.bias is None else out.add_(self.bias)
        rows = x.shape[0]
        if self._packed is not None and 1 < rows <= _MAX_ROWS:
            product: Tensor = _MKL_LINEAR(x, self._packed, self._weight, self.bias, rows)
            return product
        return torch.mm(x, self._transposed) if self.bias is None else torch.addmm(self.bias, x, self._transposed)

    @staticmethod
    def _give_back(size: int) -> None:
        Weight._packed_bytes -= size


class QuantizedWeight:
    """A packed weight (out, in) and its bias (out,). packs: whether it may be repacked for this device."""

    def __init__(self, weight: PackedWeight | Panels, bias: Tensor | None = None, packs: bool = True) -> None:
        self.bias = bias
        self.weight = prepare(weight) if packs and isinstance(weight, PackedWeight) else weight

    def __call__(self, x: Tensor) -> Tensor:
        """Product (rows, out) of an input (rows, in)."""
        out = packed_gemm(x, self.weight)
        return out if self.bias is None else out.add_(self.bias)


def _packed(weight: Tensor) -> Tensor | None:
    """The weight in MKL's order; None without MKL, or if the order is wrong for some number of rows."""
    if _MKL_LINEAR is None or weight.dtype != torch.float32 or weight.device.type != "cpu":
        return None
    packed: Tensor = torch.ops.mkl._mkl_reorder_linear_weight(weight, _MAX_ROWS)
    for rows in _CHECKED_ROWS:
        x = torch.linspace(-1, 1, rows * weight.shape[1]).view(rows, -1)
        expected = F.linear(x, weight)
        if (_MKL_LINEAR(x, packed, weight, None, rows) - expected).abs().max() > 1e-4 * expected.abs().max():
            return None
    return packed


def _mkl_linear() -> Any:
    """torch's operation that multiplies by weights in MKL's order; None in a build without it."""
    try:
        return torch.ops.mkl._mkl_linear.default if torch.backends.mkl.is_available() else None
    except AttributeError:
        return None


_MKL_LINEAR = _mkl_linear()


class Norm:
    """Root mean square norm over the last dimension."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        self.weight, self.eps = weight.contiguous(), eps
        self._on_cpu = weight.dtype == torch.float32 and weight.device.type == "cpu"

    def __call__(self, x: Tensor) -> Tensor:
        """Normalised x (…, D)."""
        if self._on_cpu:
            return rms_norm(x, self.weight, self.eps)
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
