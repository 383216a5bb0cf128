"""Segments that hold all tokens and let each query read only some of them."""

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from hasten.accel.cache.segments.base import partial_attention, scores
from hasten.accel.cache.segments.dense import Dense
from hasten.kernels.attention.contract import Partial, Scoring


@dataclass(frozen=True)
class Selected(Dense):
    """Dense keys and values of which each query reads `budget` tokens of each head."""

    budget: int

    @abstractmethod
    def choose(self, queries: Tensor, scoring: Scoring) -> Tensor:
        """Indices (H, W, budget) of the tokens that queries (W, H * G, D) read; those of one query are different.

        A query's tokens must not depend on the other queries of the pass.
        """

    def attend(self, queries: Tensor, positions: Tensor, scoring: Scoring) -> Partial:
        """See Segment; a token that lies behind a window is not read although it was chosen."""
        if self.budget >= self.tokens:
            return super().attend(queries, positions, scoring)
        chosen = self.choose(queries, scoring)
        if len(queries) == 1:
            # Read alone, which is what makes the method fast.
            index = chosen[:, 0, :, None].expand(-1, -1, self.keys.shape[2])
            held = self.positions.gather(1, chosen[:, 0])
            part = Dense(self.keys.gather(1, index), self.values.gather(1, index), held)
            return part.attend(queries, positions, scoring)
        seen = torch.zeros(len(self.keys), len(queries), self.tokens, dtype=torch.bool, device=self.keys.device)
        seen.scatter_(2, chosen, True)
        if scoring.window is not None:
            seen &= positions[:, None] - self.positions[:, None] < scoring.window
        return partial_attention(queries, self.keys, self.values, scoring, seen)


def best_of_heads(approximate: Tensor, budget: int) -> Tensor:
    """Indices (H, W, budget) of the largest of scores (H, G, W, T), after a softmax and a sum over G; later first."""
    summed = approximate.softmax(-1).sum(1)
    order = summed.flip(-1).sort(dim=-1, descending=True, stable=True).indices[..., :budget]
    return summed.shape[-1] - 1 - order


def exact_scores(queries: Tensor, keys: Tensor, scoring: Scoring) -> Tensor:
    """Scores (H, G, W, T) of queries (W, H * G, D) and keys (H, T, D)."""
    return scores(queries, keys, scoring).unflatten(1, (-1, len(queries)))
