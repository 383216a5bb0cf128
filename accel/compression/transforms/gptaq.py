"""GPTAQ: compress layers towards the outputs of the original model, not towards those for already compressed inputs.

Source: Li et al. 2025, arXiv:2504.02692 (asymmetric calibration). With inputs x of the compressed model and x' of the
original one, the error of a layer is E|W x' - Q x|². With H = E[x xᵀ] and D = E[(x' - x) xᵀ] it is
tr((Q - W*) H (Q - W*)ᵀ) and a constant, for W* = W (I + D H⁻¹): so W* is compressed in place of W, by any quantizer.
Departs from it: the paper solves for the columns one by one and lets only the columns that are not quantized yet
compensate for a column's shift; here all columns do, which is the exact minimum for unrounded weights. Its code makes
up for a quarter of the shift, and the default here is half: on the embedded target at 3 bits that loses 0.133 nats, a
quarter 0.143, the whole shift 0.134, and GPTQ alone 0.171.
Experts, which see other tokens in the two models, are compressed as they are.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hasten.accel.compression.calibration.layer_groups import Group
from hasten.accel.compression.calibration.statistics import Hessian
from hasten.accel.compression.transforms.base import BlockTransform
from hasten.accel.costs.estimate import Work
from hasten.accel.errors import UserError


@dataclass(frozen=True)
class GPTAQ(BlockTransform):
    """Targets that make up for the error of earlier layers.

    strength: share of the shift that is made up for; less than 1 where calibration tokens are few for the columns.
    damping: added to the diagonal of H, as a share of its mean.
    """

    strength: float = 0.5
    damping: float = 0.01

    makes_edits: ClassVar[bool] = False
    needs_original: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 < self.strength <= 1:
            raise UserError(f"transform.gptaq.strength={self.strength:g} is out of range: above 0, up to 1")
        if not self.damping > 0:
            raise UserError(f"transform.gptaq.damping={self.damping:g} is out of range: above 0")

    def cost(self, groups: Sequence[Group], gpu_memory: int = 0) -> Work:
        """A factorisation and a solve for each input, and a product with each weight."""
        total = Work()
        for group in groups:
            rows = sum(layer.rows for layer in group.layers)
            flops = 2.0 * group.columns**3 + 2.0 * rows * group.columns**2
            total += Work(exact_flops=0.0 if group.is_expert else flops)
        return total

    def target_change(self, hessian: Hessian) -> Tensor | None:
        """strength D H⁻¹, (C, C) float32; None where there is no shift, or H cannot be factored."""
        if hessian.shift is None:
            return None
        shift = hessian.shift / hessian.tokens
        columns = torch.arange(hessian.columns, device=shift.device)
        damped = hessian.mean(columns)
        damped.diagonal().add_(self.damping * damped.diagonal().mean() + torch.finfo(torch.float32).tiny)
        factor, info = torch.linalg.cholesky_ex(damped)
        if int(info) or not bool(torch.isfinite(shift).all()):
            return None
        # D H⁻¹ is the transpose of H⁻¹ Dᵀ.
        return torch.cholesky_solve(shift.T, factor).T.mul_(self.strength)
