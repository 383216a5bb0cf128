"""Cholesky factor of a layer's Hessian, by which columns are visited and make up for each other's error.

Source: Chen et al. 2025, arXiv:2507.18553, who read GPTQ as Babai's nearest plane on H itself. With H = L Lᵀ and
columns visited from the last row of L to the first, an error d_k in column k adds (d_k L_kk)² to the output error where
the columns before it are free to make up for it, and what they would best be is w_k + sum_{i>k} d_i L_ik / L_kk.
Columns are laid out in the reverse of the order in which they are visited.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hasten.accel.compression.calibration.statistics import Hessian
from hasten.accel.errors import UserError

ORDERS = ("static", "none")


@dataclass(frozen=True)
class Factor:
    """Cholesky factor of a damped Hessian, for any number of layers and levels that share an input.

    lower: (C, C) float32, columns contiguous and divided by their diagonal entry; what is above the diagonal means
    nothing. pivots: (C,), that diagonal. order: (C,) input column of every row, in reverse order of visit. dead: (C,)
    bool, rows whose input is always zero; they have a pivot of 1 and touch no other. damping: what was added to the
    diagonal of all others. is_known: False for the identity that stands in for a matrix that could not be factored.
    """

    lower: Tensor
    pivots: Tensor
    order: Tensor
    dead: Tensor
    damping: float
    notes: tuple[str, ...]
    is_known: bool = True

    def back(self) -> Tensor:
        """Row (C,) of every input column: the inverse of order."""
        back = torch.empty_like(self.order)
        back[self.order] = torch.arange(len(back), device=back.device)
        return back


def check_factor(damping: float, max_damping: float, act_order: str = "none") -> None:
    """Raise UserError where these are no arguments for factorise."""
    if act_order not in ORDERS:
        raise UserError(f"act_order={act_order!r} is none of {', '.join(ORDERS)}")
    if not 0 < damping <= max_damping:
        raise UserError(f"need 0 < damping <= max_damping, got {damping} and {max_damping}")


def factorise(hessian: Hessian, damping: float, max_damping: float, act_order: str, instead: str) -> Factor:
    """Factor of a Hessian whose columns are visited by falling E[x²] (`static`) or as they come (`none`).

    damping: added to the diagonal, as a share of its mean; raised tenfold, up to max_damping, where the matrix cannot
    be factored. instead: what the caller does where that does not help either, for the note.
    """
    importance = hessian.diagonal()
    columns = len(importance)
    if act_order == "static":
        # Ties are broken by position, so that the order is the same everywhere.
        order = torch.argsort(importance, descending=True, stable=True).flip(0)
    else:
        order = torch.arange(columns - 1, -1, -1, device=importance.device)
    # A column whose input is always zero touches nothing: any positive entry keeps it apart.
    dead = importance[order] <= 0
    mean, share = float(importance.mean()), damping
    while share <= max_damping and math.isfinite(mean):
        # Factored in place and built anew for another try: two of these matrices may not fit. LAPACK wants columns
        # contiguous and would copy; of a symmetric matrix the transpose is the same.
        lower = hessian.mean(order).mT
        lower.diagonal()[dead] = 1.0
        lower.diagonal()[~dead] += share * mean
        info = torch.empty((), dtype=torch.int32, device=lower.device)
        torch.linalg.cholesky_ex(lower, out=(lower, info))
        pivots = lower.diagonal().clone()
        if int(info) == 0 and bool(torch.isfinite(pivots).all()):
            notes = (f"Hessian could not be factored: damping raised to {share:g}",) * (share > damping)
            return Factor(lower.div_(pivots), pivots, order, dead, share * mean, notes)
        share *= 10
    failed = f"Hessian could not be factored with damping {max_damping:g}: {instead}"
    ones = torch.ones_like(importance)
    identity, dead = torch.eye(columns, device=ones.device), torch.zeros_like(dead)
    return Factor(identity, ones, order, dead, 0.0, (failed,), is_known=False)
