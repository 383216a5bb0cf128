"""Training in a group of ranks that is built again, from the last checkpoint, after a rank was lost."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from ray.exceptions import RayError
from torch import Tensor

from hasten.accel.errors import UserError
from hasten.accel.training.resumable import ResumableTraining, Weights, read_progress
from hasten.accel.training.setup import HeadSetup
from hasten.accel.training.trainer import TrainSettings
from hasten.cluster.actors.trainer import TrainerRank
from hasten.cluster.runtime import recovery
from hasten.cluster.runtime.placement import ActorResources
from hasten.cluster.runtime.process_group import ProcessGroup

_LOG = logging.getLogger(__name__)
# Groups that may be lost in a row without a checkpoint in between.
LOSSES = 4


class GroupTrainer:
    """The interface of `Trainer` to a group of `TrainerRank`s; inside a Ray session.

    device: cpu or cuda. needs: resources of each rank.
    """

    def __init__(
        self, setup: HeadSetup, settings: TrainSettings, ranks: int, zero: int, device: str, needs: ActorResources
    ) -> None:
        arguments = (setup, settings, zero, device, max(1, int(needs.cpus)))
        self.group = ProcessGroup(TrainerRank, ranks, needs, arguments, device, "training with ranks")
        self.step = 0

    def prepare(self) -> None:
        """Return once all ranks can train."""
        self.group.call("prepare")

    def train(self, count: int, decay_from: int | None = None, decay_steps: int = 1) -> list[dict[str, float]]:
        """Do `count` steps; see `Trainer.train`."""
        done: list[dict[str, float]] = self.group.call("train", count, decay_from, decay_steps)[0]
        self.step += count
        return done

    def weights(self) -> Weights:
        """The network's tensors by name, float32 on the CPU."""
        arrays: dict[str, Any] = self.group.call("weights")[0]
        return {name: torch.tensor(array) for name, array in arrays.items()}

    def measure(self, weights: dict[str, Tensor]) -> dict[str, Any]:
        """Acceptance, measured by rank 0. weights: those that `weights` returned last, which rank 0 still has."""
        row: dict[str, Any] = self.group.call("measure")[0]
        return row

    def save(self, folder: Path) -> None:
        """Rank 0 writes a checkpoint into a new folder."""
        self.group.call("save", folder.absolute())

    def load(self, folder: Path) -> None:
        """Go on from a checkpoint, of any number of ranks."""
        self.step = self.group.call("load", folder.absolute())[0]

    def close(self) -> None:
        """End all ranks."""
        self.group.close()


@dataclass(frozen=True)
class Finished:
    """A finished training. usage: of each rank of the last group. optimizer_bytes: of the rank that holds most."""

    training: ResumableTraining
    usage: list[dict[str, float]]
    optimizer_bytes: int


def train_in_groups(
    start: Callable[[], GroupTrainer], training_of: Callable[[GroupTrainer], ResumableTraining], folder: Path
) -> Finished:
    """Do the training in this folder to its end. start: starts a group. training_of: the training as the folder has it.

    UserError if ranks are lost again and again, or run out of memory; the checkpoint is kept.
    """
    losses, last = 0, -1
    while True:
        trainer = start()
        try:
            trainer.prepare()
            training = training_of(trainer)
            training.run()
            call = trainer.group.call
            return Finished(training, call("usage"), max(call("optimizer_bytes")))
        except RayError as error:
            step = read_progress(folder).step
            losses = losses + 1 if step == last else 1
            last = step
            kept = f"the checkpoint of step {step} is kept, and the same command goes on from it"
            if recovery.is_out_of_memory(error):
                raise UserError(
                    f"a rank ran out of memory: give a smaller train.micro_batch, a higher train.zero, or more "
                    f"train.ranks; {kept}"
                ) from error
            if not recovery.is_loss(error):
                raise
            if losses == LOSSES:
                raise UserError(
                    f"{losses} groups in a row lost a rank, the last one because: {recovery.reason(error)}; {kept}"
                ) from error
            _LOG.warning(
                "lost a rank (%s); all ranks are started again and go on from step %d", recovery.reason(error), step
            )
        finally:
            trainer.close()
