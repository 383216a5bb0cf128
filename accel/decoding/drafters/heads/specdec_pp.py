"""SpecDec++: a chain of the draft model that ends where a trained head predicts that the target rejects a token of it.

Source: Huang et al. 2024, arXiv:2405.19715, and its code, github.com/Kaffaljidhmah2/SpecDec_pp.
As there, the pass that computes the hidden state of a token for the head also gives the distribution of the next token,
which is drawn and kept before the chain ends. So no pass is wasted. The decision to draw a token depends on earlier
tokens only, so the chain is as valid a sample as one of fixed length.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from torch import Tensor

from hasten.accel.decoding.context import Context
from hasten.accel.decoding.drafters.base import Models
from hasten.accel.decoding.drafters.model.base import Growth, SmallModel, SmallModelDrafter
from hasten.accel.decoding.sampling import Sampling, draw
from hasten.accel.decoding.targets.base import Target
from hasten.accel.decoding.tree import DraftSampling, DraftTree
from hasten.accel.errors import UserError
from hasten.accel.models.checkpoint import Checkpoint
from hasten.accel.training.heads.acceptance import FILE, AcceptanceHead


class HeadedModel(SmallModel):
    """A draft model with its acceptance head. accepts: the head's latest prediction for each sequence."""

    def __init__(self, target: Target, head: AcceptanceHead, vocabulary: int | None = None) -> None:
        super().__init__(target, vocabulary)
        self.head = head.to(target.device)
        self.accepts: dict[int, float] = {}

    def extend_all(
        self, contexts: Sequence[Context], tokens: Sequence[Sequence[int]], parents: Sequence[Sequence[int]]
    ) -> list[Tensor]:
        """As in the base class; the head then runs over all sequences at once."""
        logits = super().extend_all(contexts, tokens, parents)
        assert self.last is not None
        width = self.last.hidden.shape[-1]
        assert width, "the draft model must be loaded with keeps_hidden=True"
        if width != self.head.hidden_size:
            raise UserError(
                f"the acceptance head is for a draft model with hidden_size={self.head.hidden_size}, and this one has "
                f"hidden_size={width}: train a head for it with hasten train_drafter"
            )
        # Chains grow by one node in every pass.
        probs = self.head.accepts(self.last.hidden[:, 0]).tolist()
        self.accepts = {id(context): prob for context, prob in zip(contexts, probs, strict=True)}
        return logits


@dataclass(frozen=True)
class SpecDecPlusPlus(SmallModelDrafter):
    """Drafter that stops where the probability that a token of its chain is rejected exceeds `threshold`.

    min_length, max_length: bounds of the chain, in tokens. head: file of the acceptance head; None takes the one in the
    draft model's folder.
    """

    threshold: float = 0.3
    min_length: int = 2
    max_length: int = 20
    head: str | None = None
    needs_hidden: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1:
            raise UserError(f"threshold={self.threshold} is wrong: expected a probability from 0 to 1")
        if not 1 <= self.min_length <= self.max_length:
            raise UserError(f"min_length={self.min_length} must be from 1 to max_length={self.max_length}")

    def draft_sampling(self, sampling: Sampling) -> DraftSampling:
        """Independent draws; deterministic at temperature 0."""
        return DraftSampling.DETERMINISTIC if sampling.is_greedy else DraftSampling.INDEPENDENT

    def chains(self) -> bool:
        """Every draft is a chain."""
        return True

    def new_memory(self, models: Models) -> HeadedModel:
        """The draft model with its head; UserError if the head is missing."""
        draft = models.load_draft()
        folder = models.draft_path
        if self.head is not None:
            path = Path(self.head).expanduser()
        elif folder is not None:
            path = folder / FILE
        else:
            raise UserError("head=None, and the draft model has no folder to look for a head in: give head=PATH")
        if not path.is_file():
            raise UserError(f"there is no acceptance head at {path}: train one with hasten train_drafter")
        is_checkpoint = folder is not None and (folder / "config.json").is_file()
        fingerprint = Checkpoint(folder).fingerprint() if folder is not None and is_checkpoint else ""
        head = AcceptanceHead.load(path, fingerprint)
        return HeadedModel(draft, head, models.vocabulary)

    def grow(self, context: Context, memory: SmallModel, budget: int, logits: Tensor) -> Growth:
        """A chain of the draft model's own tokens."""
        assert isinstance(memory, HeadedModel)
        greedy = context.drafting.is_greedy
        tokens: list[int] = []
        probs: list[Tensor] = []
        all_accepted = 1.0
        while True:
            probs.append(memory.probs(context, logits, tokens))
            tokens.append(int(probs[-1].argmax()) if greedy else draw(probs[-1], context.draft_generator))
            if len(tokens) >= min(budget, self.max_length):
                break
            if len(tokens) >= self.min_length and 1 - all_accepted > self.threshold:
                break
            logits = (yield [tokens[-1]], [len(tokens) - 2])[0]
            all_accepted *= memory.accepts[id(context)]
        return DraftTree.chain(tokens, None if greedy else probs)
