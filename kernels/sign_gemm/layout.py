"""A weight of sign bits with scales, in one or several planes, and a low-rank part.

Two planes with scales per row or group are two-binary quantization: W = a1 B1 + a2 B2, with B in {-1, 1}, or in {0, 1}
as in DB-LLM (arXiv 2402.11960). One plane and factors of rank K are sign + low rank: W = scale * sign + left right.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SignWeight:
    """Weight (R, C): sum over planes p of scale[:, p] * B_p, plus left @ right.

    signs: int32 (R, P, ceil(C / 32)), least significant bit first; a set bit is 1, another -1, or 0 if zero_one. scale:
    (R, P, G), any float dtype; C / G adjacent columns, a multiple of 32, share a scale; G = 1 is one scale a row. left
    (R, K) and right (K, C): None without a low-rank part.
    """

    signs: Tensor
    scale: Tensor
    columns: int
    zero_one: bool = False
    left: Tensor | None = None
    right: Tensor | None = None

    def __post_init__(self) -> None:
        words = -(-self.columns // 32)
        if self.signs.dtype != torch.int32 or self.signs.ndim != 3 or self.signs.shape[2] != words:
            raise ValueError(
                f"signs of {self.columns} columns must be int32 (rows, planes, {words}), got {self.signs.dtype} "
                f"{tuple(self.signs.shape)}"
            )
        if self.scale.ndim != 3 or self.scale.shape[:2] != self.signs.shape[:2]:
            raise ValueError(
                f"scale must be (rows, planes, groups) for signs {tuple(self.signs.shape)}, got {tuple(self.scale.shape)}"
            )
        groups = self.scale.shape[2]
        if groups > 1 and self.columns % (32 * groups):
            raise ValueError(f"{groups} groups of {self.columns} columns: a group must have a multiple of 32 columns")
        if (self.left is None) != (self.right is None):
            raise ValueError("left and right are the two factors of the low-rank part: give both or none")

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the weight."""
        return self.signs.shape[0], self.columns

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        parts = (self.signs, self.scale, self.left, self.right)
        return sum(part.nbytes for part in parts if part is not None)


def pack_signs(positive: Tensor) -> Tensor:
    """Words int32 (..., ceil(C / 32)) of booleans (..., C): whether each element is 1."""
    padded = torch.nn.functional.pad(positive, (0, -positive.shape[-1] % 32)).unflatten(-1, (-1, 32)).long()
    packed = (padded << torch.arange(32, device=positive.device)).sum(-1)
    return torch.where(packed < 2**31, packed, packed - 2**32).int()


def unpack_signs(words: Tensor, columns: int) -> Tensor:
    """Booleans (..., C) of words (..., ceil(C / 32))."""
    bits = words[..., None] >> torch.arange(32, device=words.device) & 1
    return bits.flatten(-2)[..., :columns].bool()
