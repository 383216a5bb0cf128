"""RAPID: a draft model that reads, of a long sequence, the chunks that have to do with its end, and the end itself.

Source: Chen et al. 2025, arXiv:2502.20330.
Departs from it: chunks are ranked by the words that they share with the end (BM25, Robertson and Zaragoza 2009) and not
by an embedding model, and again every `refresh` tokens; what the target says is left as it is, where the paper pulls
its logits towards the draft model's and is not lossless.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from hasten.accel.decoding.context import Context
from hasten.accel.decoding.drafters.model.base import Growth, SmallModel
from hasten.accel.decoding.drafters.model.draft_model import DraftModel
from hasten.accel.decoding.tree import DraftTree
from hasten.accel.errors import UserError

_SATURATION = 1.2  # k1 of BM25; its b is of no use where all texts are equally long


@dataclass
class _Shortened(Context):
    """What the draft model reads of a sequence. full: that sequence. known: its tokens when this was last brought up.

    made: its tokens when chunks were last chosen.
    """

    full: Context = field(default_factory=lambda: Context([], 0))
    known: int = 0
    made: int = 0


@dataclass(frozen=True)
class Rapid(DraftModel):
    """Drafter that proposes a chain of at most `length` tokens.

    Of what stands before the last `recent` tokens, `keep` chunks of `chunk` tokens are read, in their order; a sequence
    that is no longer than all these is read whole. They are chosen anew every `refresh` tokens.
    """

    length: int = 5
    chunk: int = 64
    keep: int = 4
    recent: int = 128
    refresh: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("chunk", "recent", "refresh"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be 1 or more")
        if self.keep < 0:
            raise UserError(f"keep={self.keep} must be 0 or more")

    def propose_all(self, contexts: Sequence[Context], memory: SmallModel, budget: int) -> list[DraftTree]:
        """A chain for each."""
        return super().propose_all([self._shortened(context) for context in contexts], memory, budget)

    def grow(self, context: Context, memory: SmallModel, budget: int, logits: Tensor) -> Growth:
        """As the draft model's; a penalty counts the tokens of the whole sequence."""
        assert isinstance(context, _Shortened)
        return super().grow(context.full, memory, budget, logits)

    def end(self, context: Context, memory: SmallModel) -> None:
        """Its cache is free for another sequence."""
        held = context.state.pop(self, None)
        if held is not None:
            memory.end(held)

    def shorten(self, tokens: Sequence[int]) -> list[int]:
        """What of a sequence is read: the best chunks in their order, and the end."""
        before = len(tokens) - self.recent
        if len(tokens) <= self.chunk * self.keep + self.recent:
            return list(tokens)
        ids = np.asarray(tokens)
        whole = before // self.chunk * self.chunk
        chunks = ids[:whole].reshape(-1, self.chunk)
        scores = relevance(chunks, ids[before:])
        best = sorted(np.argsort(-scores, kind="stable")[: self.keep].tolist())
        # What is left over of the last chunk goes with the end, so that this has no gap.
        return [*chunks[best].reshape(-1).tolist(), *tokens[whole:]]

    def _shortened(self, context: Context) -> _Shortened:
        tokens = context.tokens
        held: _Shortened | None = context.state.get(self)
        if held is None:
            held = _Shortened([], 0, context.sampling, context.generator, context.draft_generator, full=context)
            context.state[self] = held
        if not held.made or len(tokens) - held.made >= self.refresh:
            held.tokens = self.shorten(tokens)
            held.made = len(tokens)
        else:
            held.tokens += tokens[held.known :]
        held.known = len(tokens)
        return held


def relevance(chunks: np.ndarray, query: np.ndarray) -> np.ndarray:
    """BM25 scores (N,) float64 of chunks (N, L) of token ids for a query (M,), whose repeated tokens count once."""
    words = np.unique(query)
    places = np.searchsorted(words, chunks).clip(max=len(words) - 1)
    row, column = np.nonzero(words[places] == chunks)
    counts = np.zeros((len(chunks), len(words)))
    np.add.at(counts, (row, places[row, column]), 1)
    holding = (counts > 0).sum(0)
    rarity = np.log1p((len(chunks) - holding + 0.5) / (holding + 0.5))
    scores: np.ndarray = (counts * (_SATURATION + 1) / (counts + _SATURATION)) @ rarity
    return scores
