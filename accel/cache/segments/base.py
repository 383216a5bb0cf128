"""Base class of segments: keys and values of some tokens of one sequence in one layer.

A segment answers a pass's queries with a partial result, see kernels/attention/contract.py; partial results of several
segments are merged. So caches of any kinds of segments need one attention.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from hasten.kernels.attention.contract import Partial, Scoring
from hasten.kernels.segment_attention import segment_attention
from hasten.kernels.segmented_token import Operands


class Segment(ABC):
    """Keys and values of tokens that all later queries see, except where a sliding window ends. It never changes."""

    @property
    @abstractmethod
    def tokens(self) -> int:
        """Number of tokens; the largest over heads where they differ."""

    @abstractmethod
    def tensors(self) -> Iterator[Tensor]:
        """All tensors that the segment holds."""

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return storage_bytes(self.tensors())

    @abstractmethod
    def dense(self) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values (H, T, D), as queries see them, and positions (H, T) int32."""

    def asked(self, guides: Tensor) -> "Segment":
        """The segment for a pass of queries with guides (W, H * G, D), see CacheMethod; itself if it reads none."""
        return self

    def operands(self) -> Operands | None:
        """What attends as `attend` does where no window cuts the tokens, for a kernel; None where there is no such."""
        return None

    def attend(self, queries: Tensor, positions: Tensor, scoring: Scoring) -> Partial:
        """Partial result o (W, H * G, D), m and l (W, H * G) of queries (W, H * G, D) at positions (W,)."""
        keys, values, held = self.dense()
        seen = None if scoring.window is None else positions[:, None] - held[:, None] < scoring.window
        return partial_attention(queries, keys, values, scoring, seen)


def partial_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    scoring: Scoring,
    seen: Tensor | None = None,
    bias: Tensor | None = None,
) -> Partial:
    """Partial result o (W, H * G, D), m and l (W, H * G) of queries (W, H * G, D) over keys and values (H, T, D).

    seen: (W, T) or (H, W, T) bool, the keys that each query sees; None: all. bias: (H, T), added to the scores. In
    float32.
    """
    width, scale = len(queries), queries.shape[-1] ** -0.5 if scoring.scale is None else scoring.scale
    partial = segment_attention(by_head(queries, len(keys)), keys, values, scale, scoring.soft_cap, seen, bias)
    return by_query(partial, width)


def by_head(queries: Tensor, heads: int) -> Tensor:
    """Queries (W, H * G, D) as (H, G * W, D): the query heads of a KV head are rows of one product."""
    if len(queries) == 1:
        # Decoding, where every operation of torch counts.
        return queries.reshape(heads, -1, queries.shape[2])
    return queries.unflatten(1, (heads, -1)).permute(1, 2, 0, 3).flatten(1, 2)


def by_query(partial: Partial, width: int) -> Partial:
    """A partial result of rows (H, G * W) as one of queries and heads (W, H * G)."""
    if width == 1:
        o, m, total = (part.reshape(1, -1, *part.shape[2:]) for part in partial)
        return Partial(o, m, total)
    o, m, total = (part.unflatten(1, (-1, width)).movedim(2, 0).flatten(1, 2) for part in partial)
    return Partial(o, m, total)


def scores(queries: Tensor, keys: Tensor, scoring: Scoring) -> Tensor:
    """Scores (H, G * W, T) float32 of queries (W, H * G, D) and keys (H, T, D)."""
    scale = queries.shape[-1] ** -0.5 if scoring.scale is None else scoring.scale
    products = by_head(queries, len(keys)).float() * scale @ keys.float().mT
    return products if scoring.soft_cap is None else scoring.soft_cap * torch.tanh(products / scoring.soft_cap)


def attention_shares(queries: Tensor, keys: Tensor, scoring: Scoring, denominators: Tensor) -> Tensor:
    """Attention (H, G, W, T) of queries (W, H * G, D) on keys (H, T, D), without a causal mask.

    denominators: (W, H * G), logarithms of the sums of exp(score) over all that the queries see.
    """
    products = scores(queries, keys, scoring).unflatten(1, (-1, len(queries)))
    rows = denominators.unflatten(1, (keys.shape[0], -1)).permute(1, 2, 0)  # (H, G, W)
    return products.sub_(rows[..., None]).exp_()


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages of tensors, each once: a view of a larger tensor counts whole."""
    storages = {storage.data_ptr(): storage for storage in (tensor.untyped_storage() for tensor in tensors)}
    return sum(storage.nbytes() for storage in storages.values())
