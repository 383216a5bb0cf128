"""Cholesky factor of a layer's Hessian, with which columns are solved one by one and compensate each other's errors.

Source: Chen et al. 2025, arXiv:2507.18553, who read GPTQ as Babai's nearest plane on H itself. Let H = L Lᵀ, and let
columns be visited from the last row of L to the first. An error d_k in column k adds (d_k L_kk)² to the output error if
the columns that are visited later compensate for it; the best value of column k is w_k + sum_{i>k} d_i L_ik / L_kk.
Columns are stored in reverse order of visit.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hasten.accel.compression.calibration.inputs import Inputs, dead_columns
from hasten.accel.compression.calibration.statistics import Hessian
from hasten.accel.errors import UserError

ORDERS = ("static", "none")
# Damping where there are many tokens, and what is tried where there are fewer than this many for each column.
DAMPING = 0.01
_TRIED, _ENOUGH = (0.01, 0.03, 0.1, 0.3, 1.0), 32
# Rows of random rounding errors on which dampings are compared.
_ROWS = 64
# Rows of a product with the factor that are computed at once.
_BLOCK = 128


@dataclass(frozen=True)
class Factor:
    """Cholesky factor of a damped Hessian, for any number of layers and levels that share an input.

    lower: (C, C) float32, columns contiguous and divided by their diagonal entry; entries above the diagonal are
    undefined. pivots: (C,), that diagonal. order: (C,) input column of every row, in reverse order of visit. dead: (C,)
    bool, rows whose input is always zero, or negligible (see calibration/inputs.py); they have a pivot of 1 and zeros
    elsewhere. damping: what was added to the diagonal of all other rows. is_known: False for the identity that replaces
    a matrix that could not be factored. inputs: the statistics that errors are measured on where the factor is the
    identity.
    """

    lower: Tensor
    pivots: Tensor
    order: Tensor
    dead: Tensor
    damping: float
    notes: tuple[str, ...]
    is_known: bool = True
    inputs: Inputs = field(default=Inputs(None))

    @property
    def measures_output(self) -> bool:
        """Whether `power` is of the output, not of the weights."""
        return self.is_known or self.inputs.hessian is not None

    @property
    def dead_columns(self) -> Tensor:
        """Input columns (C,) bool of the dead rows."""
        return self.dead[self.inverse_order()]

    def errors(self) -> Tensor:
        """Factor of each row's own error in the output error, (C, 1): the pivots, and 0 for dead rows."""
        return self.pivots.masked_fill(self.dead, 0.0)[:, None]

    def power(self, values: Tensor) -> Tensor:
        """Mean squared output of weights `values` (C, R), in the order of the rows, without the damping, (R,) float32.

        Where there are no statistics, their squared length.
        """
        if not self.is_known:
            return self.inputs.power(values[self.inverse_order()].T)
        total, errors = values.new_zeros(values.shape[1]), self.errors()
        for span, outputs in self._outputs(values):
            total += outputs.mul_(errors[span]).square_().sum(0)
            # L is a factor of the damped Hessian.
            total -= (values[span] * ~self.dead[span, None]).square_().sum(0).mul_(self.damping)
        return total.clamp_(min=0)

    def outputs(self, values: Tensor) -> Tensor:
        """Lᵀ values (C, R), whose squared length is the damped output of weights `values`, in the order of the rows."""
        found = torch.empty_like(values)
        for span, outputs in self._outputs(values):
            found[span] = outputs
        return found.mul_(self.errors())

    def _outputs(self, values: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """The rows of a block, and those of the product with `lower`, which has no entries above the diagonal."""
        for stop in range(len(values), 0, -_BLOCK):
            span = slice(max(0, stop - _BLOCK), stop)
            yield span, self.lower[stop:, span].T @ values[stop:] + self.lower[span, span].tril().T @ values[span]

    def inverse_order(self) -> Tensor:
        """Row (C,) of every input column: the inverse of order."""
        back = torch.empty_like(self.order)
        back[self.order] = torch.arange(len(back), device=back.device)
        return back


def check_factor(damping: float | None, max_damping: float, act_order: str = "none") -> None:
    """UserError where factorise would not accept these arguments."""
    if act_order not in ORDERS:
        raise UserError(f"act_order={act_order!r} is none of {', '.join(ORDERS)}")
    if not 0 < (max_damping if damping is None else damping) <= max_damping:
        raise UserError(f"need 0 < damping <= max_damping, got {damping} and {max_damping}")


def factorise(hessian: Hessian, damping: float | None, max_damping: float, act_order: str, instead: str) -> Factor:
    """Factor of a Hessian; columns are visited by descending E[x²] (act_order `static`) or in their order (`none`).

    damping: added to the diagonal, as a share of its mean; None chooses it, see choose_damping. Raised tenfold, up to
    max_damping, where the matrix cannot be factored. instead: for the note, what the caller does where it cannot be
    factored at max_damping either.
    """
    importance = hessian.diagonal()
    columns = len(importance)
    if act_order == "static":
        # Ties are broken by position, so that the order is the same everywhere.
        order = torch.argsort(importance, descending=True, stable=True).flip(0)
    else:
        order = torch.arange(columns - 1, -1, -1, device=importance.device)
    # The rows of dead inputs are zero: any positive diagonal entry makes the matrix positive definite.
    dead = dead_columns(importance)[order]
    mean = float(importance.mean())
    first = share = choose_damping(hessian, max_damping, order) if damping is None else damping
    while share <= max_damping and math.isfinite(mean):
        lower = _cholesky(hessian, order, dead, share * mean)
        if lower is not None:
            pivots = lower.diagonal().clone()
            notes = (f"Hessian could not be factored: damping raised to {share:g}",) * (share > first)
            return Factor(lower.div_(pivots), pivots, order, dead, share * mean, notes)
        share *= 10
    failed = f"Hessian could not be factored with damping {max_damping:g}: {instead}"
    inputs = Inputs(hessian if math.isfinite(mean) else None)
    ones = torch.ones_like(importance)
    identity = torch.eye(columns, device=ones.device)
    return Factor(identity, ones, order, dead, 0.0, (failed,), is_known=False, inputs=inputs)


def choose_damping(hessian: Hessian, max_damping: float, order: Tensor) -> float:
    """The damping of least expected error on tokens that the factor is not made of; 0.01 where tokens are many.

    Where they are few for the number of columns, errors compensate each other on these tokens and add up on others. The
    factor is made of one half of the tokens, and the error is that on the other half. Rounding leaves in every column
    an error e_k that is spread evenly between two codes, and the weights' error d solves d L = (e_k L_kk)_k. So neither
    weights nor a grid are needed: the mean error of random e ranks the dampings. order: (C,), see Factor.
    """
    halves = hessian.halves
    usual = min(DAMPING, max_damping)
    if halves is None or not all(half.tokens for half in halves) or hessian.tokens >= _ENOUGH * hessian.columns:
        return usual
    fitted, other = halves
    importance = fitted.diagonal()
    dead, mean = dead_columns(importance)[order], float(importance.mean())
    if not math.isfinite(mean):
        return usual
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (_ROWS, hessian.columns), generator=generator) * 2.0 - 1.0
    signs = signs.to(importance.device).masked_fill_(dead, 0.0)
    errors: dict[float, float] = {}
    for share in _TRIED:
        lower = _cholesky(fitted, order, dead, share * mean) if share <= max_damping else None
        if lower is not None:
            solved = torch.linalg.solve_triangular(lower, signs * lower.diagonal(), upper=False, left=False)
            difference = torch.empty_like(solved)
            difference[:, order] = solved
            errors[share] = float(other.power(difference).double().sum())
    return min(errors, key=errors.__getitem__, default=usual)


def _cholesky(hessian: Hessian, order: Tensor, dead: Tensor, damping: float) -> Tensor | None:
    """Lower Cholesky factor (C, C) with the damping on the diagonal of all live rows; None where there is none.

    Entries above the diagonal are undefined.
    """
    # Factored in place, and built again for another try, because two of these matrices may not fit in memory. LAPACK
    # needs contiguous columns and would copy; the transpose of a symmetric matrix has them.
    lower = hessian.mean(order).mT
    if bool(dead.any()):
        lower[dead] = 0.0
        lower[:, dead] = 0.0
    lower.diagonal()[dead] = 1.0
    lower.diagonal()[~dead] += damping
    info = torch.empty((), dtype=torch.int32, device=lower.device)
    torch.linalg.cholesky_ex(lower, out=(lower, info))
    return lower if int(info) == 0 and bool(torch.isfinite(lower.diagonal()).all()) else None
