"""The loss of a head over the depths of its drafts, with the share of right drafts at each depth."""

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from hasten.accel.training.division import mean
from hasten.accel.training.heads.draft_head import DepthTargets, Loss
from hasten.accel.training.heads.vocabulary import DraftVocabulary
from hasten.accel.training.objectives.soft_cross_entropy import soft_cross_entropy

# From logits (N, R), top_ids and top_log_probs (N, K), the draft's vocabulary and weights (N,) to a sum over rows.
Objective: TypeAlias = Callable[[Tensor, Tensor, Tensor, DraftVocabulary, Tensor], Tensor]


class DepthLoss:
    """Adds the depths of a batch up. decay: weight of a depth relative to that of the one before."""

    def __init__(
        self, vocabulary: DraftVocabulary, decay: float = 1.0, objective: Objective = soft_cross_entropy
    ) -> None:
        self._vocabulary, self._decay, self._objective = vocabulary, decay, objective
        self._total: Tensor | None = None
        self._parts: dict[str, Tensor] = {}

    def add(self, depth: int, logits: Tensor, targets: DepthTargets, weight: Tensor | None = None) -> None:
        """Add a depth, from 1. logits: (N, R) of the N valid positions, in order. weight: (N,), ones for None."""
        top_ids, top_log_probs = targets.top_ids[targets.valid], targets.top_log_probs[targets.valid]
        weight = torch.ones(len(logits), device=logits.device) if weight is None else weight
        loss = self._objective(logits, top_ids, top_log_probs, self._vocabulary, weight)
        self.add_loss(depth, mean(loss, weight.sum(), 1e-6))
        with torch.no_grad():
            right = self._vocabulary.ids.to(logits.device)[logits.argmax(-1)] == top_ids[:, 0]
            self._parts[f"accuracy_{depth}"] = mean(right.float().sum(), len(right))

    def add_loss(self, depth: int, loss: Tensor) -> None:
        """Add a scalar to the loss of a depth."""
        value = self._decay ** (depth - 1) * loss
        self._total = value if self._total is None else self._total + value
        name = f"loss_{depth}"
        self._parts[name] = self._parts.get(name, torch.zeros((), device=loss.device)) + loss.detach()

    def loss(self) -> Loss:
        """The weighted sum, with the loss and the share of right drafts of each depth as parts."""
        assert self._total is not None, "no depth was added"
        return Loss(self._total, self._parts)
