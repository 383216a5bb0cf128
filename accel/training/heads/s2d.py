"""S2D: one draft model of which the first layers alone are draft models, too; a token takes as many as it needs.

Source: Kavehzadeh et al. 2024, arXiv:2407.01955 (S2D), with the sorted fine-tuning of Valipour et al. 2023,
arXiv:2309.00255 (SortedNet). The sub-models share the final norm and the output layer; the loss is the sum over them.
Departs from it: the sub-models are distilled from a target, where the paper fine-tunes the first layers of a pretrained
model on texts. A draft trained on the records of one target drafts for all targets of its tokenizer.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from hasten.accel.decoding.drafters.model.base import SmallModel
from hasten.accel.decoding.drafters.model.s2d import SortedModels
from hasten.accel.decoding.targets.fast import FastTarget
from hasten.accel.errors import UserError
from hasten.accel.training.heads.draft_head import DraftNetwork, HeadBatch, Loss
from hasten.accel.training.heads.draft_model import DistilledDraft, DraftModelNetwork


@dataclass(frozen=True)
class SortedDraft(DistilledDraft):
    """A draft model with sub-models; exits: numbers of layers of each, ascending, the last one all layers."""

    num_layers: int = 3
    exits: tuple[int, ...] = (1, 2, 3)
    drafter: ClassVar[str] = "s2d"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "exits", tuple(self.exits))
        exits = self.exits
        if not exits or exits[0] < 1 or list(exits) != sorted(set(exits)) or exits[-1] != self.num_layers:
            raise UserError(
                f"exits={list(exits)} is wrong: expected ascending numbers from 1, of which the last one is "
                f"num_layers={self.num_layers}"
            )

    def loss(self, network: DraftNetwork, batch: HeadBatch) -> Loss:
        """Sum of the losses of all sub-models; parts are named after the number of layers."""
        assert isinstance(network, DraftModelNetwork)
        losses = [self.loss_of(network, states, batch) for states in network.states(batch, self.exits)]
        parts = {
            f"{name.removesuffix('_1')}_of_{exit}": value
            for exit, loss in zip(self.exits, losses, strict=True)
            for name, value in loss.parts.items()
        }
        return Loss(torch.stack([loss.value for loss in losses]).sum(), parts)

    def drafter_memory(self, network: DraftNetwork) -> SortedModels:  # type: ignore[override]
        """The sub-models."""
        assert isinstance(network, DraftModelNetwork)
        target = FastTarget.of(network.model)
        return SortedModels([SmallModel(target.first_layers(count)) for count in self.exits])
