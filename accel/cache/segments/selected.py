"""Segments that hold all tokens and let each query read only some of them."""

from abc import abstractmethod
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from hasten.accel.cache.segments.base import partial_attention, scores
from hasten.accel.cache.segments.dense import Dense
from hasten.kernels.attention.contract import Partial, Scoring
from hasten.kernels.segmented_token import Operands


@dataclass(frozen=True)
class Selected(Dense):
    """Dense keys and values of which each query reads `budget` tokens of each head."""

    budget: int

    @abstractmethod
    def choose(self, queries: Tensor, scoring: Scoring) -> Tensor:
        """Indices (H, W, budget) of the tokens that queries (W, H * G, D) read; those of one query are different.

        A query's tokens must not depend on the other queries of the pass.
        """

    def operands(self) -> Operands | None:
        """None: which tokens are read depends on the query."""
        return None

    def attend(self, queries: Tensor, positions: Tensor, scoring: Scoring) -> Partial:
        """See Segment; a token that lies behind a window is not read although it was chosen."""
        if self.budget >= self.tokens:
            return super().attend(queries, positions, scoring)
        chosen = self.choose(queries, scoring)
        if len(queries) == 1:
            # Read alone, which is what makes the method fast.
            return self._read(chosen[:, 0]).attend(queries, positions, scoring)
        seen = torch.zeros(len(self.keys), len(queries), self.tokens, dtype=torch.bool, device=self.keys.device)
        seen.scatter_(2, chosen, True)
        if scoring.window is not None:
            seen &= positions[:, None] - self.positions[:, None] < scoring.window
        return self._attend_seen(queries, scoring, seen)

    def _read(self, index: Tensor) -> Dense:
        """The tokens with indices (H, K)."""
        keys, values = (
            part.gather(1, index[..., None].expand(-1, -1, part.shape[2])) for part in (self.keys, self.values)
        )
        return Dense(keys, values, self.positions.gather(1, index))

    def _attend_seen(self, queries: Tensor, scoring: Scoring, seen: Tensor) -> Partial:
        """Partial result of queries that see the tokens of a mask (H, W, T)."""
        return partial_attention(queries, self.keys, self.values, scoring, seen)


@dataclass(frozen=True)
class Guided(Selected):
    """Segment whose queries choose by guides (W, H * G, D), which are given for a pass, see CacheMethod.guide."""

    guides: Tensor | None = field(default=None, kw_only=True)

    def asked(self, guides: Tensor) -> "Guided":
        """See Segment."""
        return replace(self, guides=guides)

    def guides_of_heads(self) -> Tensor:
        """Mean guide (H, W, D) of the query heads of each KV head, which choose together."""
        assert self.guides is not None
        return self.guides.unflatten(1, (len(self.keys), -1)).mean(2).transpose(0, 1)


def tokens_of_groups(ranks: Tensor, groups: Tensor, budget: int) -> Tensor:
    """Indices (H, W, budget) of the tokens of the groups with the largest ranks (H, W, S), one group after the other.

    groups: (H, T), the group of each token. Of groups with equal ranks the later comes first; the last group that is
    read may be read in part, from its first token on.
    """
    order = ranks.shape[-1] - 1 - ranks.flip(-1).sort(dim=-1, descending=True, stable=True).indices
    places = torch.empty_like(order).scatter_(
        -1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order)
    )
    of_tokens = places.gather(-1, groups.long()[:, None].expand(-1, ranks.shape[1], -1))
    return of_tokens.sort(dim=-1, stable=True).indices[..., :budget]


def best_of_heads(approximate: Tensor, budget: int) -> Tensor:
    """Indices (H, W, budget) of the largest of scores (H, G, W, T), after a softmax and a sum over G; later first."""
    summed = approximate.softmax(-1).sum(1)
    order = summed.flip(-1).sort(dim=-1, descending=True, stable=True).indices[..., :budget]
    return summed.shape[-1] - 1 - order


def exact_scores(queries: Tensor, keys: Tensor, scoring: Scoring) -> Tensor:
    """Scores (H, G, W, T) of queries (W, H * G, D) and keys (H, T, D)."""
    return scores(queries, keys, scoring).unflatten(1, (-1, len(queries)))
