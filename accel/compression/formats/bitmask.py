"""A pruned weight in a level database: one mask bit for every weight, and the kept values.

compressed-tensors 0.20 and the servers no longer have a format for unstructured sparsity. So checkpoints hold pruned
layers dense, and only hasten reads this form.
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
