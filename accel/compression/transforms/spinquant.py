"""SpinQuant: learn the rotations of the model on the loss of the quantized one.

Source: Liu et al. 2024, arXiv:2405.16406. R1 and R2 begin as random Hadamard matrices and descend by Cayley transforms,
with weights rounded to nearest; the quantizer of the run then compresses the rotated model. With `online` the inputs of
down projections are rotated while the model runs (R4), by a matrix that is not learned.
Departs from it: the loss is the divergence from the original model, not the cross-entropy of the text, because that
can also fall by learning the text; its gradients come from passes with one block in memory at a time. R3 is left
out, and R4 off by default, see quarot.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from hasten.accel.compression.calibration.layer_groups import Group
from hasten.accel.compression.method import Method
from hasten.accel.compression.transforms.cayley import cayley_step
from hasten.accel.compression.transforms.learned_rotation import RotationPass, rotation_pass
from hasten.accel.compression.transforms.quarot import hadamard_rotation
from hasten.accel.compression.transforms.rotating import RotatingTransform
from hasten.accel.compression.transforms.rotation import Rotation, RotationGradient
from hasten.accel.errors import UserError
from hasten.accel.models.architecture import Architecture
from hasten.accel.models.checkpoint import Checkpoint


@dataclass(frozen=True)
class SpinQuant(RotatingTransform):
    """Learned rotations.

    learning_steps: of descent. batch: calibration sequences of a step. rate: of the first step; it falls linearly to 0.
    seed: of the first matrices, and of the order of sequences. online: whether to rotate inputs of down projections
    while the model runs: vLLM does, transformers only with hasten's loader.
    """

    learning_steps: int = 100
    batch: int = 8
    rate: float = 1.5
    seed: int = 0
    online: bool = False

    needs_tokens: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in ("learning_steps", "batch"):
            if getattr(self, name) < 1:
                raise UserError(f"transform.spinquant.{name}={getattr(self, name)} is out of range: 1 or more")
        if not self.rate > 0:
            raise UserError(f"transform.spinquant.rate={self.rate:g} is out of range: above 0")

    @property
    def steps(self) -> int:
        """As given."""
        return self.learning_steps

    def begin(self, architecture: Architecture) -> Rotation:
        """Random Hadamard matrices."""
        return hadamard_rotation(architecture, self.seed, online=self.online)

    def gradient_pass(
        self,
        source: Checkpoint,
        layer_groups: Sequence[Sequence[Group]],
        methods: Sequence[Method],
        like: Architecture,
    ) -> RotationPass:
        """Gradients of the divergence."""
        return rotation_pass(source, layer_groups, methods, like, self.online)

    def sequences(self, step: int, count: int) -> list[int]:
        """All sequences in a random order, then all again in another."""
        wanted = range(step * self.batch, (step + 1) * self.batch)
        orders: dict[int, list[int]] = {}
        for place in wanted:
            epoch = place // count
            if epoch not in orders:
                generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
                orders[epoch] = torch.randperm(count, generator=generator).tolist()
        return [orders[place // count][place % count] for place in wanted]

    def advance(self, rotation: Rotation, gradient: RotationGradient, step: int) -> Rotation:
        """A step against the gradient of the mean divergence."""
        rate = self.rate * (1 - step / self.learning_steps)
        assert rotation.residual is not None
        return Rotation(
            cayley_step(rotation.residual, gradient.residual / gradient.tokens, rate),
            tuple(
                cayley_step(matrix, of_matrix / gradient.tokens, rate)
                for matrix, of_matrix in zip(rotation.heads, gradient.heads, strict=True)
            ),
            rotation.online,
        )
