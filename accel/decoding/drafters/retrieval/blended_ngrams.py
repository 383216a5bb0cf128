"""Blended n-grams: a best-first tree over probabilities that are interpolated from n-grams of all lengths.

Source: the interpolation is that of the hierarchical Dirichlet language model, MacKay and Peto 1995; the n-grams keep
the target's own probabilities, as in STAND (Song et al. 2025, arXiv:2506.04708); trees are DySpec's, arXiv:2410.11744.
Departs from them: the prompt's text is learned as if the target had given its tokens with probability 1, so that
passages of the prompt are copied without a pass of the output layer over the prompt.
"""

from dataclasses import dataclass
from math import log2
from operator import itemgetter
from typing import ClassVar

from hasten.accel.decoding.context import Context
from hasten.accel.decoding.drafters.best_first import best_first
from hasten.accel.decoding.drafters.retrieval.ngram_probs import NGram, NGramDrafter, NGramProbs
from hasten.accel.decoding.tree import DraftTree
from hasten.accel.errors import UserError

_NEGLIGIBLE = 0.02  # weight of shorter n-grams that are not looked up
_CLASSES = 12  # of nodes by their probability


@dataclass(frozen=True)
class BlendedNGrams(NGramDrafter):
    """Drafter without a model; it blends the n-grams of min_ngram to max_ngram tokens at the end of the sequence.

    An n-gram that was seen c times has the weight c / (c + concentration), and shorter ones share the rest.
    min_probability: of a node's path; less probable nodes are not proposed. max_depth: of a node. learns_prompt:
    whether the text of prompts is learned. learns_rejected: whether n-grams of rejected nodes are learned as well.
    newest_share: the least weight of the newest observation in an average; 1 keeps the newest alone. prompt_tokens:
    number of tokens at the end of a prompt after which it learns the target's probabilities; they cost the target's
    output layer for these tokens. max_ngrams: number of n-grams kept; the least recently updated one is dropped.
    """

    max_ngram: int = 6
    min_ngram: int = 1
    concentration: float = 1.0
    min_probability: float = 0.01
    max_depth: int = 16
    learns_prompt: bool = True
    learns_rejected: bool = True
    newest_share: float = 1.0
    prompt_tokens: int = 0
    max_ngrams: int = 200_000
    # Short rows are learned and blended in less time.
    least_kept: ClassVar[float] = 0.005

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.concentration > 0:
            raise UserError(f"concentration={self.concentration} must be above 0")
        if not 0 <= self.min_probability < 1:
            raise UserError(f"min_probability={self.min_probability} must be 0 or more and below 1")
        if self.max_depth < 1:
            raise UserError(f"max_depth={self.max_depth} must be 1 or more")

    def begin(self, context: Context, memory: NGramProbs) -> None:
        """Learn the text of the prompt."""
        if self.learns_prompt:
            tokens = context.tokens
            for end in range(1, len(tokens)):
                self.learn(memory, tuple(tokens[max(0, end - self.max_ngram) : end]), {tokens[end]: 1.0})

    def propose(self, context: Context, memory: NGramProbs, budget: int) -> DraftTree:
        """The most probable nodes under the blended probabilities."""
        tail = tuple(context.tokens[-self.max_ngram :])
        nodes = best_first(tail, lambda tail: self.blended(memory, tail), budget, self.max_depth, self.min_probability)
        labels = [("ngrams", min(int(-2 * log2(max(prob, 1e-9))), _CLASSES)) for prob in nodes.probs]
        return DraftTree(nodes.tokens, nodes.parents, labels=labels)

    def blended(self, memory: NGramProbs, tail: NGram) -> list[tuple[int, float]]:
        """Tokens after `tail` with their interpolated probabilities, most probable first; empty if none is known."""
        probs: dict[int, float] = {}
        rest = 1.0  # weight of the shorter n-grams
        for n in range(len(tail), self.min_ngram - 1, -1):
            entry = memory.entries.get(tail[-n:])
            if entry is None:
                continue
            weight = rest * entry.visits / (entry.visits + self.concentration)
            for token, prob in entry.probs.items():
                probs[token] = probs.get(token, 0.0) + weight * prob
            rest -= weight
            if rest < _NEGLIGIBLE:
                break
        return sorted(probs.items(), key=itemgetter(1), reverse=True)
