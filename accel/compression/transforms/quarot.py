"""QuaRot: rotate the model by random Hadamard matrices, which spread outliers over all channels.

Source: Ashkboos et al. 2024, arXiv:2404.00456. Folded into weights are R1 of the residual stream, and R2 of the values
of attention heads; with `online` the inputs of down projections are rotated while the model runs.
Departs from it: that is off by default, because transformers 5.23 does not read compressed-tensors' transform_config
and would run another model; the rotations across heads, and of queries and keys, are left out, see rotation.py.
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
    """Random Hadamard matrices.

    residual: whether to rotate the residual stream. heads: whether to rotate values. online: whether to rotate inputs
    of down projections while the model runs: vLLM does, transformers only with hasten's loader.
    """

    residual: bool = True
    heads: bool = True
    seed: int = 0
    online: bool = False

    def __post_init__(self) -> None:
        if not self.residual and not self.heads and not self.online:
            raise UserError("transform.quarot.residual=false and transform.quarot.heads=false leave nothing to rotate")

    @property
    def has_residual(self) -> bool:
        """As given."""
        return self.residual

    def begin(self, architecture: Architecture) -> Rotation:
        """The matrices; R2 differs from block to block."""
        return hadamard_rotation(architecture, self.seed, self.residual, self.heads, self.online)


def hadamard_rotation(
    architecture: Architecture, seed: int, residual: bool = True, heads: bool = True, online: bool = False
) -> Rotation:
    """Random Hadamard matrices for a model."""
    generator = torch.Generator().manual_seed(seed)
    stream = random_hadamard(architecture.hidden_size, generator, "hidden_size") if residual else None
    if not heads:
        return Rotation(stream, online=online)
    size = head_size(architecture)
    blocks = range(architecture.num_blocks)
    return Rotation(stream, tuple(random_hadamard(size, generator, "head_dim") for _ in blocks), online)
