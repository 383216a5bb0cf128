"""Base class of transforms that rotate the model, and the file of a run's rotation.

The rotation is one file beside the output, made before the first block is compressed. It is written after each step of
learning, so that an interrupted run goes on at its step. Tensors are rotated when they are read, see rotation.py.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ClassVar, Protocol

from safetensors import safe_open
from torch import Tensor

from hasten.accel.compression.calibration.layer_groups import Group
from hasten.accel.compression.method import Method
from hasten.accel.compression.transforms.base import BlockTransform
from hasten.accel.compression.transforms.rotation import RotatedCheckpoint, Rotation, RotationGradient
from hasten.accel.costs.estimate import Work
from hasten.accel.errors import UserError
from hasten.accel.models.architecture import Architecture
from hasten.accel.models.checkpoint import Checkpoint
from hasten.accel.outputs.resumable import write_whole

_FILE = "rotation.safetensors"
_RESIDUAL = "residual"
# Names of the number of steps in a file's metadata, of which the library writes several in any order.
_FOLDED, _ONLINE = "steps", "steps, inputs rotated online"


class GradientPass(Protocol):
    """Computes gradients of a quantized model by its rotation."""

    def gradient(self, residual: Tensor, heads: Sequence[Tensor], tokens: Tensor) -> RotationGradient:
        """Gradients by R1 `residual` and R2 `heads` of each block, on tokens (B, T)."""


class RotatingTransform(BlockTransform):
    """A transform that rotates the whole model, before all others.

    has_residual: whether it rotates the residual stream. online: see Rotation. steps: steps in which the rotation is
    learned, on step_sequences calibration sequences each.
    """

    online: bool

    makes_edits: ClassVar[bool] = False

    @property
    def has_residual(self) -> bool:
        """Whether the residual stream is rotated."""
        return True

    @property
    def steps(self) -> int:
        """Number of steps in which the rotation is learned."""
        return 0

    @property
    def step_sequences(self) -> int:
        """Number of calibration sequences of a step."""
        return 0

    def check(self, architecture: Architecture, earlier: Sequence[BlockTransform]) -> None:
        """UserError where another transform comes first."""
        if earlier:
            names = [type(transform).__name__.lower() for transform in (*earlier, self)]
            raise UserError(
                f"transforms=[{','.join(names)}]: {names[-1]} rotates the whole model, so it must come first"
            )

    def begin(self, architecture: Architecture) -> Rotation:
        """The rotation before the first step. architecture: the original model."""
        raise NotImplementedError

    def gradient_pass(
        self,
        source: Checkpoint,
        layer_groups: Sequence[Sequence[Group]],
        methods: Sequence[Method],
        like: Architecture,
    ) -> GradientPass:
        """Computes gradients by the rotation. See learned_rotation.rotation_pass."""
        raise NotImplementedError

    def step_cost(self, weights: int, hidden: int, run: Callable[[], Work]) -> Work:
        """Work of a block's gradient in a step. weights: of its layers. run: work of its forward on the sequences."""
        return Work()

    def sequences(self, step: int, count: int) -> list[int]:
        """Calibration sequences of a step, of `count`."""
        raise NotImplementedError

    def advance(self, rotation: Rotation, gradient: RotationGradient, step: int) -> Rotation:
        """The rotation after a step. gradient: of the step's sequences."""
        raise NotImplementedError


def rotating_of(transforms: Sequence[BlockTransform]) -> RotatingTransform | None:
    """The transform that rotates the model, if there is one."""
    return next((transform for transform in transforms if isinstance(transform, RotatingTransform)), None)


class RotationFile:
    """The rotation of a run, and the number of steps that it has learned in. folder: of the edits of transforms."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / _FILE

    def read(self) -> tuple[Rotation, int]:
        """The rotation and its number of steps."""
        with safe_open(self.path, framework="pt") as file:
            names = sorted(file.keys())
            heads = tuple(file.get_tensor(name) for name in names if name != _RESIDUAL)
            residual = file.get_tensor(_RESIDUAL) if _RESIDUAL in names else None
            ((kind, steps),) = file.metadata().items()
            return Rotation(residual, heads, kind == _ONLINE), int(steps)

    def write(self, rotation: Rotation, steps: int) -> None:
        """Replace the rotation."""
        from safetensors.torch import save_file

        tensors = {f"head-{index:05d}": matrix for index, matrix in enumerate(rotation.heads)}
        if rotation.residual is not None:
            tensors[_RESIDUAL] = rotation.residual
        self.path.parent.mkdir(parents=True, exist_ok=True)
        needed = sum(tensor.nbytes for tensor in tensors.values())
        note = {_ONLINE if rotation.online else _FOLDED: str(steps)}
        write_whole(self.path, lambda temporary: save_file(tensors, temporary, metadata=note), needed)

    def is_finished(self, steps: int) -> bool:
        """Whether the rotation has learned in so many steps."""
        return self.path.exists() and self.read()[1] >= steps

    def finished(self, steps: int) -> Rotation:
        """The rotation, which must have learned in so many steps."""
        rotation, done = self.read()
        assert done >= steps, "the rotation is not finished"
        return rotation

    @property
    def has_residual(self) -> bool:
        """Whether the residual stream is rotated."""
        with safe_open(self.path, framework="pt") as file:
            return _RESIDUAL in file.keys()  # noqa: SIM118 (no mapping)

    @property
    def is_online(self) -> bool:
        """See Rotation."""
        with safe_open(self.path, framework="pt") as file:
            return _ONLINE in file.metadata()


def rotated(checkpoint: Checkpoint, folder: Path) -> Checkpoint:
    """The checkpoint with the rotation in a folder of edits; itself where there is none."""
    file = RotationFile(folder)
    if not file.path.exists():
        return checkpoint
    return RotatedCheckpoint(Architecture(checkpoint), lambda: file.read()[0], file.has_residual, file.is_online)
