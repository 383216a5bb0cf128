"""Rotations on a cluster: calibrators compute gradients of parts of a step's sequences, the driver makes the step."""

from collections.abc import Sequence

import torch
from ray import get, put
from torch import Tensor

from hasten.accel.compression.calibration.settings import Settings, Task
from hasten.accel.compression.transforms.learning import learn
from hasten.accel.compression.transforms.rotation import Rotation, RotationGradient
from hasten.cluster.runtime.actor_pool import ActorPool, wait_for_all


class RotationProgram:
    """Makes the rotation of a run. tokens: calibration sequences [N, T]."""

    def __init__(self, task: Task, pool: ActorPool, tokens: Tensor | None) -> None:
        self._task, self._pool, self._tokens = task, pool, tokens

    @property
    def is_finished(self) -> bool:
        """Whether the rotation is made, or there is none."""
        rotating = self._task.settings.rotating
        return rotating is None or (self._task.rotation is not None and self._task.rotation.is_finished(rotating.steps))

    def run(self, settings: Settings) -> None:
        """Go on with the rotation from its last step. settings: those of the calibrators."""
        if self.is_finished:
            return
        task, rotating = self._task, settings.rotating
        assert rotating is not None
        assert task.rotation is not None
        assert task.unrotated is not None
        learn(rotating, task.rotation, task.unrotated, self._tokens, settings.batch, self._gradients)

    def _gradients(self, rotation: Rotation, parts: Sequence[Tensor]) -> list[RotationGradient]:
        """Gradients of parts (B, T), in their order, by calibrators in turn."""
        residual = None if rotation.residual is None else rotation.residual.numpy()
        arrays = put((residual, [matrix.numpy() for matrix in rotation.heads]))
        members = self._pool.members
        calls = [member.rotate.remote(arrays, *parts[index :: len(members)]) for index, member in enumerate(members)]
        wait_for_all([self._pool], calls)
        results: list[RotationGradient | None] = [None] * len(parts)
        for index, call in enumerate(calls):
            for place, (tokens, divergence, of_residual, of_heads) in enumerate(get(call)):
                results[index + place * len(members)] = RotationGradient(
                    tokens,
                    divergence,
                    torch.from_numpy(of_residual.copy()),
                    tuple(torch.from_numpy(matrix.copy()) for matrix in of_heads),
                )
        return [result for result in results if result is not None]
