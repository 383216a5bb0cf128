"""How a rotation is made and learned before the first block is compressed."""

from collections.abc import Callable, Sequence

from torch import Tensor

from hasten.accel.compression.transforms.rotating import RotatingTransform, RotationFile
from hasten.accel.compression.transforms.rotation import RotatedCheckpoint, Rotation, RotationGradient, check_rotation
from hasten.accel.models.architecture import Architecture

# gradients(rotation, parts): of tokens (B, T), in their order.
Gradients = Callable[[Rotation, Sequence[Tensor]], Sequence[RotationGradient]]


def learn(
    transform: RotatingTransform,
    file: RotationFile,
    architecture: Architecture,
    tokens: Tensor | None,
    batch: int,
    gradients: Gradients,
) -> None:
    """Learn the rotation of a model, from where the file is. architecture: the original. batch: sequences of a part."""
    if file.path.exists():
        rotation, step = file.read()
    else:
        rotation, step = transform.begin(architecture), 0
        view = RotatedCheckpoint(architecture, lambda: rotation, transform.has_residual, transform.online)
        model = Architecture(view, architecture.dtype, architecture.device, as_served=False)
        check_rotation(architecture, model, rotation.residual, _kinds_of_blocks(architecture))
        file.write(rotation, 0)
    for number in range(step, transform.steps):
        assert tokens is not None
        chosen = tokens[transform.sequences(number, len(tokens))]
        first, *others = gradients(rotation, chosen.split(batch))
        # In their order, so that sums do not depend on who computed the parts.
        total = sum(others, start=first)
        rotation = transform.advance(rotation, total, number)
        file.write(rotation, number + 1)


def _kinds_of_blocks(architecture: Architecture) -> list[int]:
    """The first block of each kind, by the names of its parameters."""
    kinds: dict[tuple[str, ...], int] = {}
    for index in range(architecture.num_blocks):
        kinds.setdefault(tuple(sorted(architecture.block_parameters(index))), index)
    return list(kinds.values())
