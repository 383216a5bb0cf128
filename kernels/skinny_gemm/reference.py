"""The packed layout of weights, and the product in plain torch."""

from torch import Tensor

PANEL = 32


def pack_panels(weight: Tensor) -> Tensor:
    """Panels (P, C, 16, 2) of a weight (R, C), R padded with zeros to 32 P.

    The weights of output 32 p + 16 i + j are at [p, :, j, i].
    """
    outputs, inputs = weight.shape
    count = -(-outputs // PANEL)
    padded = weight
    if outputs % PANEL:
        padded = weight.new_zeros(count * PANEL, inputs)
        padded[:outputs] = weight
    return padded.view(count, 2, PANEL // 2, inputs).permute(0, 3, 2, 1).contiguous()


def skinny_gemm(x: Tensor, packed: Tensor, outputs: int) -> Tensor:
    """Product (N, R) float32; see hasten.kernels.skinny_gemm.skinny_gemm."""
    return x @ packed.float().permute(0, 3, 2, 1).flatten(0, 2)[:outputs].T
