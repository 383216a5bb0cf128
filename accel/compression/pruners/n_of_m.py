"""N:M sparsity: of every M consecutive input weights of a row, N are kept.

Source: Mishra et al. 2021, arXiv:2104.08378 (2:4, which sparse tensor cores multiply at twice the speed).
"""

from dataclasses import dataclass

from torch import Tensor

from hasten.accel.compression.pruners.base import Pattern, lowest
from hasten.accel.errors import UserError


@dataclass(frozen=True)
class NOfM(Pattern):
    """Pattern that keeps n of every m weights."""

    n: int = 2
    m: int = 4

    def __post_init__(self) -> None:
        if not 0 < self.n < self.m:
            raise UserError(f"need 0 < n < m, got n={self.n} m={self.m}")

    @property
    def group_size(self) -> int:
        """m."""
        return self.m

    def lowest(self, score: Tensor) -> Tensor:
        """The m - n lowest of every group of scores (R, C); ValueError where m does not divide C."""
        if score.shape[1] % self.m:
            raise ValueError(f"m={self.m} does not divide the {score.shape[1]} columns")
        groups = score.reshape(-1, self.m)
        return lowest(groups, self.m - self.n).reshape(score.shape)
