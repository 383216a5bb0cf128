"""Root mean square norm in plain torch."""

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalised x (…, D); see hasten.kernels.rms_norm.rms_norm."""
    # sqrt(mean(x^2) + eps) is hypot(norm(x), sqrt(D * eps)) / sqrt(D): three small operations, instead of the eight of
    # torch's own norm on a CPU.
    size = weight.numel()
    floor = torch.tensor((size * eps) ** 0.5, dtype=x.dtype, device=x.device)
    return x / torch.hypot(torch.linalg.vector_norm(x, dim=-1, keepdim=True), floor) * (weight * size**0.5)
