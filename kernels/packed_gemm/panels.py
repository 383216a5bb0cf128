"""A packed weight in the order in which the CPU kernel reads it.

A panel is 64 outputs, whose words lie next to each other. A unit is the inputs whose codes fill whole words of an
output: 4 inputs of 8 bits, 8 of 4, 16 of 2 and 32 of 3, the last in three words. Codes are two's complement around the
middle of the grid, so that symmetric grids need no zero point. A group is adjacent inputs and whole units: where
activation order has permuted the columns, inputs are permuted alike, and other groups are padded.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from hasten.kernels.packed_weight import CODES_AT_ONCE, PackedWeight, pack_codes, unpack_codes

PANEL = 64
# Inputs of which the kernel adds up products before it scales them.
CHUNK = 128


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

    def rows(self, index: Tensor) -> Tensor:
        """Rows (N, C) of the weight by index (N,), dequantized to float32."""
        panel, output = index // PANEL, index % PANEL
        middle = 2 ** (self.bits - 1)
        words = self.codes[panel, :, :, output].flatten(1) ^ _signs(self.bits).repeat(self.codes.shape[1])
        inputs = self.codes.shape[1] * unit(self.bits)[0]
        codes = unpack_codes(words, self.bits, inputs).float() - middle
        codes = codes.unflatten(1, (-1, self.padded_group))[..., : self.group]
        if self.zero_point is not None:
            codes = codes - self.zero_point[panel, :, output].float()[..., None]
        weight = (codes * self.scale[panel, :, output].float()[..., None]).flatten(1)
        return weight if self.columns is None else weight[:, self.columns.argsort()]

    @cached_property
    def padded_group(self) -> int:
        """Columns of a group with its padding."""
        return padded(self.group, self.bits)

    @cached_property
    def addresses(self) -> tuple[int, int, int | None]:
        """Addresses of codes, scales and zero points: to ask for them takes longer than a small product."""
        zero_point = None if self.zero_point is None else self.zero_point.data_ptr()
        return self.codes.data_ptr(), self.scale.data_ptr(), zero_point


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
    group, (inputs, words) = columns // groups, unit(weight.bits)
    codes = weight.codes
    if order is not None or group % inputs:
        step = max(1, CODES_AT_ONCE // columns)
        codes = torch.cat([_regrouped(block, weight, order, group) for block in codes.split(step)])
    codes = F.pad(codes, (0, 0, 0, -rows % PANEL)).view(-1, PANEL, codes.shape[1] // words, words)
    codes = (codes.permute(0, 2, 3, 1) ^ _signs(weight.bits)[:, None]).contiguous()
    scale = _per_panel(weight.scale, torch.float32)
    short = scale.bfloat16()
    return Panels(
        codes,
        short if torch.equal(short.float(), scale) else scale,
        None
        if weight.zero_point is None
        else _per_panel(weight.zero_point.short() - 2 ** (weight.bits - 1), torch.int8),
        order,
        weight.shape,
        group,
        weight.bits,
    )


def _regrouped(block: Tensor, weight: PackedWeight, order: Tensor | None, group: int) -> Tensor:
    """Words of some rows, whose codes are put in the order of groups, and padded."""
    codes = unpack_codes(block, weight.bits, weight.columns)
    if order is not None:
        codes = codes[:, order]
    codes = F.pad(codes.unflatten(1, (-1, group)), (0, padded(group, weight.bits) - group))
    return pack_codes(codes.flatten(1), weight.bits)


def _signs(bits: int) -> Tensor:
    """Words of a unit with the highest bit of each code: what unsigned codes and two's complement differ in."""
    return pack_codes(torch.full((1, unit(bits)[0]), 2 ** (bits - 1)), bits)[0]


def _per_panel(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Values (P, G, 64) of a tensor (R, G)."""
    return F.pad(values.to(dtype), (0, 0, 0, -len(values) % PANEL)).unflatten(0, (-1, PANEL)).mT.contiguous()
