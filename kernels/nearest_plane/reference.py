"""Definition of the nearest plane, in plain torch."""

from typing import TYPE_CHECKING

import torch

from hasten.kernels.grid_rounding.reference import encode_

if TYPE_CHECKING:
    from hasten.kernels.nearest_plane import Plane

# Columns visited one by one before a matrix product carries their errors to the rest of the block.
_INNER = 32


def visit(plane: "Plane", first: int, last: int) -> None:
    """See hasten.kernels.nearest_plane.visit."""
    groups = plane.groups.tolist()
    while last > first:
        begin = max(first, last - _INNER)
        for k in range(last - 1, begin - 1, -1):
            wanted = plane.target[k] + plane.carried[k]
            step, zero = plane.scales[groups[k]], plane.zeros[groups[k]]
            value = encode_(wanted / step, zero, plane.points, plane.codes[k]).mul_(step)
            if plane.dtype != torch.float32:
                value = value.to(plane.dtype).float()
            torch.sub(plane.target[k], value, out=plane.residual[k])
            torch.sub(wanted, value, out=plane.error[k])
            if k > begin:
                plane.carried[begin:k].addr_(plane.lower[k, begin:k], plane.residual[k])
        if begin:
            plane.carried[:begin].addmm_(plane.lower[begin:last, :begin].T, plane.residual[begin:last])
        last = begin
