"""Draft model: a smaller model with the same tokenizer drafts a chain, token by token.

Source: Leviathan et al. 2023, arXiv:2211.17192; Chen et al. 2023, arXiv:2302.01318.
At temperature 0 it drafts its most probable tokens. Otherwise it draws from its distribution, with the request's
temperature, top-k, top-p and repetition penalty.
"""

from dataclasses import dataclass

from torch import Tensor

from hasten.accel.decoding.context import Context
from hasten.accel.decoding.drafters.model.base import Growth, SmallModel, SmallModelDrafter
from hasten.accel.decoding.sampling import Sampling, draw
from hasten.accel.decoding.tree import DraftSampling, DraftTree
from hasten.accel.errors import UserError


@dataclass(frozen=True)
class DraftModel(SmallModelDrafter):
    """Drafter that proposes a chain of at most `length` tokens."""

    length: int = 5

    def __post_init__(self) -> None:
        if self.length < 1:
            raise UserError(f"length={self.length} must be 1 or more")

    def draft_sampling(self, sampling: Sampling) -> DraftSampling:
        """Independent draws; deterministic at temperature 0."""
        return DraftSampling.DETERMINISTIC if sampling.is_greedy else DraftSampling.INDEPENDENT

    def chains(self) -> bool:
        """Every draft is a chain."""
        return True

    def max_evaluated(self, budget: int) -> int:
        """The length of the chain."""
        return min(budget, self.length)

    def grow(self, context: Context, memory: SmallModel, budget: int, logits: Tensor) -> Growth:
        """A chain of the draft model's own tokens."""
        greedy = context.drafting.is_greedy
        tokens: list[int] = []
        probs: list[Tensor] = []
        for node in range(min(budget, self.length)):
            if node:
                logits = (yield [tokens[-1]], [node - 2])[0]
            if greedy:
                tokens.append(memory.best(context, logits, tokens))
            else:
                probs.append(memory.probs(context, logits, tokens))
                tokens.append(draw(probs[-1], context.draft_generator))
        return DraftTree.chain(tokens, None if greedy else probs)
