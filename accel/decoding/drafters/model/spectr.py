"""SpecTr: several chains, drawn by the draft model independently of each other, are verified as one tree.

Source: Sun et al. 2023, arXiv:2310.15141.
Departs from it: chains share the nodes of what they have in common, which count how often they were drawn. Where the
budget is smaller than the chains, it is spent depth by depth; which chains go on is settled before they are drawn.
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
    """Drafter of `paths` chains of `length` tokens; one chain at temperature 0, where all would be the same."""

    paths: int = 4
    length: int = 4

    def __post_init__(self) -> None:
        for name, value in (("paths", self.paths), ("length", self.length)):
            if value < 1:
                raise UserError(f"{name}={value} must be 1 or more")

    def draft_sampling(self, sampling: Sampling) -> DraftSampling:
        """Independent, unless there is nothing to draw."""
        return DraftSampling.DETERMINISTIC if sampling.is_greedy else DraftSampling.INDEPENDENT

    def chains(self) -> bool:
        """Only where there is one path."""
        return self.paths == 1

    def grow(self, context: Context, memory: SmallModel, budget: int, logits: Tensor) -> Growth:
        """The chains, merged, depth by depth; nodes of a depth in the order of the first chain through them."""
        tree = GrowingTree(context, memory, logits)
        greedy = context.sampling.is_greedy
        ends = [ROOT] * (1 if greedy else self.paths)  # the last node of every chain
        counts: list[int] = []
        for _ in range(self.length):
            # Settled before the next tokens are drawn, else the verifier would be biased.
            ends = ends[: budget - len(tree)]
            if not ends:
                break
            yield from tree.show(list(dict.fromkeys(ends)))
            probs = torch.stack([tree.probs[end] for end in ends])
            tokens = probs.argmax(-1) if greedy else _draw_each(probs, context.draft_generator)
            found: dict[tuple[int, int], int] = {}
            for chain, token in enumerate(tokens.tolist()):
                step = ends[chain], token
                if step not in found:
                    found[step] = tree.add(*step)
                    counts.append(0)
                counts[found[step]] += 1
                ends[chain] = found[step]
        return tree.done(self.draft_sampling(context.sampling), None if greedy else counts)


def _draw_each(probs: Tensor, generator: torch.Generator) -> Tensor:
    """One id for each distribution (N, V), as `sampling.draw` draws one."""
    cumulative = probs.double().cumsum(-1)
    points = torch.rand(len(probs), 1, dtype=torch.float64, generator=generator).to(probs.device)
    found = torch.searchsorted(cumulative, points * cumulative[:, -1:], right=True)
    return found[:, 0].clamp(max=probs.shape[-1] - 1)
