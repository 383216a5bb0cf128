"""RAPID: a draft model that reads only the end of a long sequence and the chunks that are relevant to the end.

Source: Chen et al. 2025, arXiv:2502.20330.
Departs from it: chunks are ranked by the tokens that they share with the end (BM25, Robertson and Zaragoza 2009), where
the paper has an embedding model, and are ranked again every `refresh` tokens. The target's logits are unchanged; the
paper shifts them towards the draft model's, which is not lossless.
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

_SATURATION = 1.2  # k1 of BM25; b has no effect, because all chunks have the same length


@dataclass
class _Shortened(Context):
    """The shortened sequence that the draft model reads. full: the whole sequence.

    updated_at: length of the whole sequence at the last update. ranked_at: its length when chunks were last chosen.
    """

    full: Context = field(default_factory=lambda: Context([], 0))
    updated_at: int = 0
    ranked_at: int = 0


@dataclass(frozen=True)
class Rapid(DraftModel):
    """Drafter that proposes a chain of at most `length` tokens.

    The draft model reads the last `recent` tokens, and before them the `keep` most relevant chunks of `chunk` tokens,
    in text order. It reads shorter sequences whole. Chunks are chosen again every `refresh` tokens.
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

    def longest_read(self, longest: int) -> int:
        """The kept chunks, an incomplete one, the recent tokens, and those until a refresh."""
        return min(longest, self.recent + (self.keep + 1) * self.chunk + self.refresh)

    def prefill(self, contexts: Sequence[Context], memory: SmallModel, budget: int) -> None:
        """Prefill the shortened prompts. Reading chunks that are chosen later is part of drafting: it recurs."""
        new = [context for context in contexts if self not in context.state]
        super().prefill([self._shortened(context) for context in new], memory, budget)

    def propose_all(self, contexts: Sequence[Context], memory: SmallModel, budget: int) -> list[DraftTree]:
        """A chain for each."""
        return super().propose_all([self._shortened(context) for context in contexts], memory, budget)

    def grow(self, context: Context, memory: SmallModel, budget: int, logits: Tensor) -> Growth:
        """As in DraftModel; the repetition penalty counts the tokens of the whole sequence."""
        assert isinstance(context, _Shortened)
        return super().grow(context.full, memory, budget, logits)

    def end(self, context: Context, memory: SmallModel) -> None:
        """Free the sequence's cache slot."""
        shortened = context.state.pop(self, None)
        if shortened is not None:
            memory.end(shortened)

    def shorten(self, tokens: Sequence[int]) -> list[int]:
        """The tokens that the draft model reads: the most relevant chunks in text order, then the end."""
        before = len(tokens) - self.recent
        if len(tokens) <= self.chunk * self.keep + self.recent:
            return list(tokens)
        ids = np.asarray(tokens)
        whole = before // self.chunk * self.chunk
        chunks = ids[:whole].reshape(-1, self.chunk)
        scores = relevance(chunks, ids[before:])
        best = sorted(np.argsort(-scores, kind="stable")[: self.keep].tolist())
        # The incomplete last chunk is joined to the end, so that the text has no gap there.
        return [*chunks[best].reshape(-1).tolist(), *tokens[whole:]]

    def _shortened(self, context: Context) -> _Shortened:
        tokens = context.tokens
        shortened: _Shortened | None = context.state.get(self)
        if shortened is None:
            shortened = _Shortened([], 0, context.sampling, context.generator, context.draft_generator, full=context)
            context.state[self] = shortened
        shortened.draws = context.draws
        if not shortened.ranked_at or len(tokens) - shortened.ranked_at >= self.refresh:
            shortened.tokens = self.shorten(tokens)
            shortened.ranked_at = len(tokens)
        else:
            shortened.tokens += tokens[shortened.updated_at :]
        shortened.updated_at = len(tokens)
        return shortened


def relevance(chunks: np.ndarray, query: np.ndarray) -> np.ndarray:
    """BM25 scores (N,) float64 of chunks (N, L) of token ids for a query (M,), whose repeated tokens count once."""
    words = np.unique(query)
    places = np.searchsorted(words, chunks).clip(max=len(words) - 1)
    row, column = np.nonzero(words[places] == chunks)
    counts = np.zeros((len(chunks), len(words)))
    np.add.at(counts, (row, places[row, column]), 1)
    document_frequency = (counts > 0).sum(0)
    idf = np.log1p((len(chunks) - document_frequency + 0.5) / (document_frequency + 0.5))
    scores: np.ndarray = (counts * (_SATURATION + 1) / (counts + _SATURATION)) @ idf
    return scores
