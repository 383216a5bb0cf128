"""A pruned weight as a level database stores it: a bit for every weight, and the values of those that are kept.

compressed-tensors 0.20 has no format for weights without structure any more, and neither have the servers: checkpoints
hold pruned layers dense, this form is for what only hasten reads.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from hasten.accel.compression.pruners.base import PrunedWeight


def pack(pruned: PrunedWeight) -> dict[str, Tensor]:
    """`mask` (R, ceil(C / 8)) uint8, column 8 i + b in bit b of byte i; `values` (kept,) by rows; `weight_shape`."""
    mask = pruned.mask.cpu()
    return {
        "mask": torch.from_numpy(np.packbits(mask.numpy(), axis=1, bitorder="little")),
        "values": pruned.weight.cpu()[mask],
        "weight_shape": torch.tensor(mask.shape),
    }


def unpack(stored: Mapping[str, Tensor]) -> Tensor:
    """Weight (R, C) in the dtype of the values."""
    rows, columns = stored["weight_shape"].tolist()
    mask = np.unpackbits(stored["mask"].numpy(), axis=1, count=columns, bitorder="little").astype(bool)
    weight = stored["values"].new_zeros(rows, columns)
    weight[torch.from_numpy(mask)] = stored["values"]
    return weight
