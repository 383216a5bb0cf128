"""A packed weight in the order in which the CPU kernel reads it.

A panel is 64 outputs. A unit is the inputs of which whole 32-bit words hold the codes of one output: 4 inputs of 8 bits,
8 of 4, 16 of 2 and 32 of 3, the last in three words. Codes are two's complement around the middle of the grid, so that
symmetric grids need no zero point. Groups are adjacent: where activation order has permuted the columns, the inputs are
permuted instead. A group that is not made of whole units is padded.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hasten.kernels.packed_gemm.layout import PackedWeight, unpack_codes

PANEL = 64
# Inputs of which the kernel adds up products before it scales them.
CHUNK = 128
# Codes that are repacked at a time: an output layer may have a thousand times as many.
_CODES_AT_ONCE = 1 << 21


@dataclass(frozen=True)
class Panels:
    """Weight (R, C) in P panels; its G groups have `group` columns each, padded to U units in all.

    codes: int32 (P, U, words of a unit, 64). scale: (P, G, 64), bfloat16 where that is exact, else float32. zero_point:
    int8 (P, G, 64), from the middle of the grid, or None. columns: int64 (C,), the columns in the order of groups, or
    None.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    columns: Tensor | None
    shape: tuple[int, int]
    group: int
    bits: int

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        parts = (self.codes, self.scale, self.zero_point, self.columns)
        return sum(part.nbytes for part in parts if part is not None)

    @property
    def padded_group(self) -> int:
        """Columns of a group with its padding."""
        return padded(self.group, self.bits)


def unit(bits: int) -> tuple[int, int]:
    """Inputs and words of a unit."""
    return (32, 3) if bits == 3 else (32 // bits, 1)


def padded(group: int, bits: int) -> int:
    """Columns of a group, padded to whole units."""
    inputs = unit(bits)[0]
    return -(-group // inputs) * inputs


def pack_panels(weight: PackedWeight) -> Panels | None:
    """The weight in panels; None if activation order left groups of unequal numbers of columns."""
    rows, columns = weight.shape
    groups = weight.scale.shape[1]
    order = None
    if weight.group_index is not None:
        index = weight.group_index.long()
        if groups * int(index.bincount().max()) != columns:
            return None
        order = index.argsort(stable=True)
    count, group = -(-rows // PANEL), columns // groups
    inputs, words = unit(weight.bits)
    codes = torch.empty(count, groups * padded(group, weight.bits) // inputs, words, PANEL, dtype=torch.int32)
    step = max(1, _CODES_AT_ONCE // (columns * PANEL))
    for first in range(0, count, step):
        block = weight.codes[first * PANEL : (first + step) * PANEL]
        codes[first : first + step] = _panel_codes(block, weight, order, group)
    scale = _per_panel(weight.scale, torch.float32)
    short = scale.bfloat16()
    middle = 2 ** (weight.bits - 1)
    return Panels(
        codes,
        short if torch.equal(short.float(), scale) else scale,
        None if weight.zero_point is None else _per_panel(weight.zero_point.short() - middle, torch.int8),
        order,
        weight.shape,
        group,
        weight.bits,
    )


def _panel_codes(block: Tensor, weight: PackedWeight, order: Tensor | None, group: int) -> Tensor:
    """Codes (p, U, words, 64) of some rows' words."""
    bits = weight.bits
    codes = unpack_codes(block, bits, weight.columns)
    if order is not None:
        codes = codes[:, order]
    codes = (codes ^ 2 ** (bits - 1)).unflatten(1, (-1, group))
    codes = F.pad(codes, (0, padded(group, bits) - group, 0, 0, 0, -len(codes) % PANEL)).int()
    fields = codes.flatten(1).unflatten(1, (-1, unit(bits)[0])).unflatten(0, (-1, PANEL))
    if bits == 3:
        # Three words of ten codes each; the two bits that remain of every word hold the last two codes.
        tens = (fields[..., :30].unflatten(-1, (3, 10)) << 3 * torch.arange(10, dtype=torch.int32)).sum(-1)
        one, other = fields[..., 30], fields[..., 31]
        merged = tens.int() | torch.stack([one, other, one >> 2 | (other >> 2) << 1], -1) << 30
    else:
        merged = (fields << bits * torch.arange(32 // bits, dtype=torch.int32)).sum(-1, dtype=torch.int32)[..., None]
    return merged.permute(0, 2, 3, 1)


def _per_panel(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Values (P, G, 64) of a tensor (R, G)."""
    return F.pad(values.to(dtype), (0, 0, 0, -len(values) % PANEL)).unflatten(0, (-1, PANEL)).mT.contiguous()
