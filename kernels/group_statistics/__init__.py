"""Minimum, maximum, largest magnitude, sum and sum of squares of groups of adjacent columns, in one pass."""

from torch import Tensor

from hasten.kernels.dispatch import use_triton
from hasten.kernels.group_statistics import reference
from hasten.kernels.group_statistics.reference import GroupStatistics

__all__ = ["GroupStatistics", "group_statistics"]


def group_statistics(x: Tensor, group_size: int) -> GroupStatistics:
    """Statistics of each group of x (R, C), whose C / group_size groups are adjacent columns; of x's own numbers."""
    if group_size < 1 or x.shape[1] % group_size:
        raise ValueError(f"group_size={group_size} must divide the {x.shape[1]} columns")
    if use_triton(x):
        from hasten.kernels.group_statistics import triton_kernel

        return triton_kernel.group_statistics(x, group_size)
    return reference.group_statistics(x, group_size)
