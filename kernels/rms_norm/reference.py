"""Root mean square norm in plain torch."""

from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalised x (…, D); see hasten.kernels.rms_norm.rms_norm."""
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight
