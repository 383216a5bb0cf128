"""SpecTr: the draft model draws several chains independently, and the target verifies them as one tree.

Source: Sun et al. 2023, arXiv:2310.15141.
Departs from it: chains share the nodes of a common prefix; a node counts how often it was drawn. A budget that is
smaller than the chains is spent depth by depth. Which chains continue is decided before their next tokens are drawn.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from hasten.accel.decoding.context import Context
from hasten.accel.decoding.drafters.model.base import GrowingTree, Growth, SmallModel, SmallModelDrafter
from hasten.accel.decoding.sampling import Sampling
from hasten.accel.decoding.tree import ROOT, DraftSampling
from hasten.accel.errors import UserError


@dataclass(frozen=True)
class SpecTr(SmallModelDrafter):
    """Drafter of `paths` chains of `length` tokens; of one chain at temperature 0, where all would be equal."""

    paths: int = 4
    length: int = 4

    def __post_init__(self) -> None:
        for name, value in (("paths", self.paths), ("length", self.length)):
            if value < 1:
                raise UserError(f"{name}={value} must be 1 or more")

    def draft_sampling(self, sampling: Sampling) -> DraftSampling:
        """Independent draws; deterministic at temperature 0."""
        return DraftSampling.DETERMINISTIC if sampling.is_greedy else DraftSampling.INDEPENDENT

    def chains(self) -> bool:
        """Whether there is one path."""
        return self.paths == 1

    def grow(self, context: Context, memory: SmallModel, budget: int, logits: Tensor) -> Growth:
        """The merged chains, depth by depth; nodes of a depth are in the order of the first chain through them."""
        tree = GrowingTree(context, memory, logits)
        greedy = context.drafting.is_greedy
        ends = [ROOT] * (1 if greedy else self.paths)  # the last node of every chain
        counts: list[int] = []
        for _ in range(self.length):
            # Decided before the next tokens are drawn: a choice by what was drawn would bias the verifier.
            ends = ends[: budget - len(tree)]
            if not ends:
                break
            yield from tree.evaluate(list(dict.fromkeys(ends)))
            probs = torch.stack([tree.probs[end] for end in ends])
            tokens = probs.argmax(-1) if greedy else _draw_each(probs, context.draft_generator)
            nodes_by_step: dict[tuple[int, int], int] = {}
            for chain, token in enumerate(tokens.tolist()):
                step = ends[chain], token
                if step not in nodes_by_step:
                    nodes_by_step[step] = tree.add(*step)
                    counts.append(0)
                counts[nodes_by_step[step]] += 1
                ends[chain] = nodes_by_step[step]
        return tree.done(self.draft_sampling(context.drafting), None if greedy else counts)


def _draw_each(probs: Tensor, generator: torch.Generator) -> Tensor:
    """One id (N,) drawn from each distribution (N, V), by the rule of `sampling.draw`."""
    cumulative = probs.double().cumsum(-1)
    points = torch.rand(len(probs), 1, dtype=torch.float64, generator=generator).to(probs.device)
    ids = torch.searchsorted(cumulative, points * cumulative[:, -1:], right=True)
    return ids[:, 0].clamp(max=probs.shape[-1] - 1)
