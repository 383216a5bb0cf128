"""GPTQ: quantize column by column, and let the columns to come make up for the error made so far.

Source: Frantar et al. 2022, arXiv:2210.17323.
Departs from it: solved as Babai's nearest plane on H itself (Chen et al. 2025, arXiv:2507.18553, show the two are the
same algorithm). With H = L Lᵀ and columns visited from the last row of L to the first, the value to round in column k
is w_k + sum_{i>k} (w_i - q_i) L_ik / L_kk: one Cholesky factorisation, no inverse, and the sum over finished blocks
is one matrix product. Columns are laid out in the reverse of the order in which they are visited. Where H cannot be
factored the damping grows tenfold, and past `max_damping` the columns are rounded independently.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from accel.compression.quantizers.base import QuantizedWeight, Quantizer, Result, Scheme
from accel.compression.quantizers.grid import find_grid
from accel.compression.statistics import SecondMoment
from accel.errors import UserError

# Columns visited one by one before their error goes to the rest of the block in a matrix product.
_INNER = 32
_BLOCK = 128
ORDERS = ("static", "none")


@dataclass(frozen=True)
class Factor:
    """Cholesky factor of a damped second moment, for any number of layers and schemes that share an input.

    lower: (C, C) float32, its columns divided by their diagonal entry. pivots: (C,), that diagonal. order: (C,)
    input column of every row, in reverse order of visit.
    """

    lower: Tensor
    pivots: Tensor
    order: Tensor
    notes: tuple[str, ...]


@dataclass(frozen=True)
class GPTQ(Quantizer):
    """Quantizer that minimises the layer's output error on the calibration tokens.

    damping: added to the diagonal, as a share of its mean; raised tenfold, up to max_damping, where H cannot be
    factored. act_order: `static` visits columns by falling second moment, each with the scale of its own group;
    `none` visits them as they come and takes a group's scale from its weights as corrected so far. search: ranges tried
    for each scale by mean squared error, between shrink times the full range and the full range; 0 takes the full
    range.
    """

    damping: float = 0.01
    max_damping: float = 1.0
    act_order: str = "static"
    search: int = 24
    shrink: float = 0.4

    needs_second_moment: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.act_order not in ORDERS:
            raise UserError(f"act_order={self.act_order!r} is none of {', '.join(ORDERS)}")
        if not 0 < self.damping <= self.max_damping:
            raise UserError(f"need 0 < damping <= max_damping, got {self.damping} and {self.max_damping}")
        if self.search < 0 or not 0 < self.shrink < 1:
            raise UserError(f"need search >= 0 and 0 < shrink < 1, got search={self.search} shrink={self.shrink}")

    def prepare(self, moment: SecondMoment | None) -> Factor:
        """Factor of the second moment of the layers' input."""
        assert moment is not None
        importance = moment.diagonal()
        columns = len(importance)
        if self.act_order == "static":
            # Ties are broken by position, so that the order is the same everywhere.
            order = torch.argsort(importance, descending=True, stable=True).flip(0)
        else:
            order = torch.arange(columns - 1, -1, -1, device=importance.device)
        # A column whose input is always zero touches nothing: any positive entry keeps it apart.
        dead = importance[order] <= 0
        mean, damping = float(importance.mean()), self.damping
        while damping <= self.max_damping and math.isfinite(mean):
            # Factored in place and built anew for another try: two of these matrices may not fit.
            lower = moment.mean(order)
            lower.diagonal()[dead] = 1.0
            lower.diagonal()[~dead] += damping * mean
            info = torch.empty((), dtype=torch.int32, device=lower.device)
            torch.linalg.cholesky_ex(lower, out=(lower, info))
            pivots = lower.diagonal().clone()
            if int(info) == 0 and bool(torch.isfinite(pivots).all()):
                raised = f"second moment could not be factored: damping raised to {damping:g}"
                return Factor(lower.div_(pivots), pivots, order, (raised,) * (damping > self.damping))
            damping *= 10
        failed = f"second moment could not be factored with damping {self.max_damping:g}: rounded to nearest"
        ones = torch.ones_like(importance)
        return Factor(torch.eye(columns, device=ones.device), ones, order, (failed,))

    def quantize(self, weight: Tensor, prepared: Factor, scheme: Scheme) -> Result:
        """Codes of weight (R, C), whose dtype is also that of the scales."""
        rows, columns = weight.shape
        size = scheme.columns(columns)
        target = weight.float()[:, prepared.order].T.contiguous()  # (C, R): a column is contiguous
        fixed = self.act_order == "static" or size == columns
        if fixed:
            scale, zero = find_grid(weight, scheme, self.search, self.shrink)
        else:
            scale = torch.empty(rows, columns // size, dtype=weight.dtype, device=weight.device)
            zero = torch.empty(rows, columns // size, device=weight.device)
        scales, zeros = scale.float().T.contiguous(), zero.T.contiguous()  # (G, R)
        groups = (prepared.order // size).tolist()
        codes = torch.empty(columns, rows, dtype=torch.uint8, device=weight.device)
        residual = torch.zeros_like(target)  # w - q, column by column
        error = torch.zeros(rows, device=weight.device)
        power = torch.zeros(rows, device=weight.device)
        block = max(_BLOCK, size) if not fixed else _BLOCK
        inner = min(_INNER, size)
        for stop in range(columns, 0, -block):
            start = max(0, stop - block)
            panel = prepared.lower[stop:, start:stop]
            carried = panel.T @ residual[stop:]  # (block, R): error of the finished columns
            signal = panel.T @ target[stop:] + prepared.lower[start:stop, start:stop].tril().T @ target[start:stop]
            power += (signal * prepared.pivots[start:stop, None]).square_().sum(0)
            for last in range(stop, start, -inner):
                first = max(start, last - inner)
                if not fixed and last % size == 0:
                    corrected = target[last - size : last] + carried[last - size - start : last - start]
                    group = groups[last - 1]
                    scales[group], zeros[group] = self._group_grid(corrected.T.to(weight.dtype), scheme)
                for k in range(last - 1, first - 1, -1):
                    wanted = target[k] + carried[k - start]
                    step, offset = scales[groups[k]], zeros[groups[k]]
                    code = (wanted / step).add_(offset).round_().clamp_(0, scheme.top)
                    codes[k] = code
                    value = code.sub_(offset).mul_(step)
                    if weight.dtype != torch.float32:
                        # Servers round the product to the checkpoint's dtype; at 8 bits that is as large as the grid.
                        value = value.to(weight.dtype).float()
                    torch.sub(target[k], value, out=residual[k])
                    error += wanted.sub_(value).mul_(prepared.pivots[k]).square_()
                    if k > first:
                        carried[first - start : k - start].addr_(prepared.lower[k, first:k], residual[k])
                if first > start:
                    carried[: first - start].addmm_(prepared.lower[first:last, start:first].T, residual[first:last])
        back = torch.empty_like(prepared.order)
        back[prepared.order] = torch.arange(columns, device=back.device)
        quantized = QuantizedWeight(
            codes[back].T.contiguous(),
            scales.T.contiguous().to(weight.dtype),
            zeros.T.contiguous().to(torch.uint8),
            scheme,
        )
        return Result(quantized, error, power, prepared.notes)

    def _group_grid(self, corrected: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
        """Scale (R,) and zero point (R,), float32, of one group (R, group_size)."""
        whole = Scheme(scheme.bits, -1, scheme.symmetric)
        scale, zero = find_grid(corrected, whole, self.search, self.shrink)
        return scale[:, 0].float(), zero[:, 0]
