"""Descent on orthogonal matrices by Cayley transforms.

Source: Li et al. 2020, arXiv:2002.01113. The gradient G of a loss by R gives the skew matrix Y = (G Rᵀ - R Gᵀ) / 2, and
(I + α/2 Y)⁻¹ (I - α/2 Y) R is orthogonal, and lies in the direction of descent.
Departs from it: the inverse is solved for, and not approached by fixed-point steps, so that errors do not add up over
the steps.
"""

import torch
from torch import Tensor


def cayley_step(rotation: Tensor, gradient: Tensor, rate: float) -> Tensor:
    """The next rotation (C, C), float64. gradient: (C, C).

    rate: of the step, which is at most 1 over the largest row sum of |Y|.
    """
    product = gradient.double() @ rotation.T
    skew = (product - product.T) / 2
    step = min(rate, 1.0 / max(float(skew.abs().sum(1).max()), torch.finfo(torch.float64).tiny))
    identity = torch.eye(len(rotation), dtype=torch.float64, device=rotation.device)
    moved = (identity - skew * (step / 2)) @ rotation
    return torch.linalg.solve(identity + skew * (step / 2), moved).contiguous()
