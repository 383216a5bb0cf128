"""QuaRot: rotate the model by random Hadamard matrices, which spread outliers over all channels.

Source: Ashkboos et al. 2024, arXiv:2404.00456. Folded into weights are R1 of the residual stream, and R2 of the values
of attention heads.
Departs from it: rotations in the model's forward (of queries and keys, across heads, before the down projection) are
left out. transformers 5.23 does not read compressed-tensors' transform_config, so it would run another model.
"""

from dataclasses import dataclass

import torch

from hasten.accel.compression.transforms.hadamard import random_hadamard
from hasten.accel.compression.transforms.rotating import RotatingTransform
from hasten.accel.compression.transforms.rotation import Rotation, head_size
from hasten.accel.errors import UserError
from hasten.accel.models.architecture import Architecture


@dataclass(frozen=True)
class QuaRot(RotatingTransform):
    """Random Hadamard matrices. residual: whether to rotate the residual stream. heads: whether to rotate values."""

    residual: bool = True
    heads: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.residual and not self.heads:
            raise UserError("transform.quarot.residual=false and transform.quarot.heads=false leave nothing to rotate")

    @property
    def has_residual(self) -> bool:
        """As given."""
        return self.residual

    def begin(self, architecture: Architecture) -> Rotation:
        """The matrices; R2 differs from block to block."""
        return hadamard_rotation(architecture, self.seed, self.residual, self.heads)


def hadamard_rotation(architecture: Architecture, seed: int, residual: bool = True, heads: bool = True) -> Rotation:
    """Random Hadamard matrices for a model."""
    generator = torch.Generator().manual_seed(seed)
    stream = random_hadamard(architecture.hidden_size, generator, "hidden_size") if residual else None
    if not heads:
        return Rotation(stream)
    size = head_size(architecture)
    blocks = range(architecture.num_blocks)
    return Rotation(stream, tuple(random_hadamard(size, generator, "head_dim") for _ in blocks))
