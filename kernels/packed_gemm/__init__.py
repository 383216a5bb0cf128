"""Product of activations and a weight of integer codes, read packed and dequantized in registers.

On a CPU with a C compiler, a weight is repacked once into the order in which the kernel reads it. The order of
summation is then the same for any number of rows and threads, so a token gets the same products alone, as a node of a
tree and in a prompt, to the bit.
"""

import torch
from torch import Tensor

from hasten.kernels.dispatch import use_triton
from hasten.kernels.packed_gemm import c_kernel, reference
from hasten.kernels.packed_gemm.panels import Panels, pack_panels
from hasten.kernels.packed_weight import PackedWeight


def prepare(weight: PackedWeight) -> PackedWeight | Panels:
    """The weight in the form that packed_gemm reads fastest on its device, of about the same size."""
    panels = None
    if weight.codes.device.type == "cpu" and c_kernel.is_available():
        panels = pack_panels(weight)
    return weight if panels is None else panels


def packed_gemm(x: Tensor, weight: PackedWeight | Panels) -> Tensor:
    """Product (N, R) in the dtype of x (N, C), a float dtype, with a weight (R, C). Panels multiply in float32.

    The product's row stride may exceed R.
    """
    if isinstance(weight, Panels):
        product = c_kernel.packed_gemm(x if x.dtype == torch.float32 else x.float(), weight)
        return product if product.dtype == x.dtype else product.to(x.dtype)
    if use_triton(x):
        # Imported here because importing triton takes seconds, and most processes have no GPU.
        from hasten.kernels.packed_gemm import triton_kernel

        return triton_kernel.packed_gemm(x, weight)
    return reference.packed_gemm(x, weight)


def dequantized_rows(index: Tensor, weight: PackedWeight | Panels) -> Tensor:
    """Rows (N, C) float32 of a weight by index (N,); other rows are not dequantized."""
    return weight.rows(index) if isinstance(weight, Panels) else reference.dequantize(weight.rows(index))
