"""Random Hadamard matrices, the rotations that QuaRot folds into weights and SpinQuant begins with.

Source: compressed-tensors' table of Hadamard matrices of all orders up to 256; a matrix of order n is one of them times
Sylvester's of a power of 2, with random signs.
"""

import torch
from torch import Tensor

from hasten.accel.errors import UserError


def random_hadamard(size: int, generator: torch.Generator, what: str) -> Tensor:
    """Orthogonal matrix (size, size) float64 of entries of one magnitude. what: names the size in an error."""
    from compressed_tensors.transform.utils.hadamard import random_hadamard_matrix

    try:
        signs = random_hadamard_matrix(size, torch.float64, torch.device("cpu"), generator)
    except ValueError:
        raise UserError(
            f"{what} of {size} has no Hadamard matrix: it must be 1, 2 or a multiple of 4 up to 256, times a power of 2"
        ) from None
    return signs / size**0.5
