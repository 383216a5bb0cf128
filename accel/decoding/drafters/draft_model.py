"""Draft model: a smaller model of the same tokenizer writes ahead, one token after the other.

Source: Leviathan et al. 2023, arXiv:2211.17192; Chen et al. 2023, arXiv:2302.01318.
At temperature 0 its most probable tokens are drafted, else they are drawn from its distribution under the same
temperature, top-k, top-p and penalty as the target's.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from accel.decoding.context import Context
from accel.decoding.drafters.base import Drafter, Models
from accel.decoding.drafters.small_model import SmallModel
from accel.decoding.sampling import Sampling, draw
from accel.decoding.tree import ROOT, Draws, DraftTree
from accel.errors import UserError


@dataclass(frozen=True)
class DraftModel(Drafter):
    """Drafter that proposes a chain of at most `length` tokens."""

    length: int = 5
    needs_draft_model: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.length < 1:
            raise UserError(f"length={self.length} must be 1 or more")

    def draws(self, sampling: Sampling) -> Draws:
        """Drawn, unless there is nothing to draw."""
        return Draws.DETERMINISTIC if sampling.is_greedy else Draws.INDEPENDENT

    def chains(self) -> bool:
        """Every draft is a chain."""
        return True

    def new_memory(self, models: Models) -> SmallModel:
        """The draft model with the caches of the sequences."""
        return SmallModel.of(models)

    def propose(self, context: Context, memory: SmallModel, budget: int) -> DraftTree:
        """A chain of the draft model's own tokens."""
        count = min(budget, self.length)
        logits = memory.start(context, count)
        if logits is None:
            return DraftTree()
        tokens: list[int] = []
        probs: list[Tensor] = []
        for node in range(count):
            if node:
                logits = memory.extend(context, [tokens[-1]], [node - 2 if node > 1 else ROOT])[0]
            probs.append(memory.probs(context, logits, tokens))
            greedy = context.sampling.is_greedy
            tokens.append(int(probs[-1].argmax()) if greedy else draw(probs[-1], context.draft_generator))
        return DraftTree.chain(tokens, None if context.sampling.is_greedy else probs)

    def end(self, context: Context, memory: Any) -> None:
        """Its cache is free for another sequence."""
        memory.end(context)
