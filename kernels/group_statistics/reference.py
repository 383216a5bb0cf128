"""Statistics of groups in plain torch."""

from typing import NamedTuple

import torch
from torch import Tensor


class GroupStatistics(NamedTuple):
    """Each is (R, C / group_size) float32. absmax: largest magnitude. total: sum. squares: sum of squares."""

    minimum: Tensor
    maximum: Tensor
    absmax: Tensor
    total: Tensor
    squares: Tensor


def group_statistics(x: Tensor, group_size: int) -> GroupStatistics:
    """See hasten.kernels.group_statistics.group_statistics; float64 for x of float64."""
    groups = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(1, (-1, group_size))
    low, high = groups.amin(-1), groups.amax(-1)
    return GroupStatistics(low, high, torch.maximum(-low, high), groups.sum(-1), groups.square().sum(-1))
