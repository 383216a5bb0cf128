"""ActQKV: blocks are read that agree with a probe of the last queries, in which unusual tokens weigh most.

Source: Xiao et al. 2025, arXiv:2502.13542; its abstract, and its code: a token's activation bias is the
squared deviation of its query from the window's mean, in variances of each channel; the probe is the mean of the
window's queries weighted by it. A block is known by the mean of those of its keys that receive most attention. The
layers share the budget by the entropy of their blocks' scores: the flatter, the more blocks.
Departs from it: the window slides with the tokens, so that it does not matter in which passes they come, and goes on
behind the prompt, where the code has windows of one token; mean and variance are the window's and not running ones; the
layers' current entropies divide the budget; the heads of a layer choose for themselves. What is left out: retrieval for
the prompt's own windows, which see all of it, and the question as a second probe.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import log
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from hasten.accel.cache.base import Kept, Place, Recent
from hasten.accel.cache.evict.base import candidates, window_attention
from hasten.accel.cache.retrieve.base import Retriever
from hasten.accel.cache.segments.base import Segment
from hasten.accel.cache.segments.selected import Guided, tokens_of_groups
from hasten.accel.errors import UserError
from hasten.kernels.attention.contract import Scoring

# Part of the mean variance that is added to all, so that a channel without any is no division by zero.
_FLOOR = 0.01


@dataclass(frozen=True)
class Blocks(Guided):
    """known: (H, blocks, D), the key that a block is known by. block: tokens of a block."""

    known: Tensor
    block: int

    def tensors(self) -> Iterator[Tensor]:
        """Keys, values and what blocks are known by."""
        yield from super().tensors()
        yield self.known

    def ranks(self) -> Tensor:
        """Cosine (H, W, blocks) of guides and what blocks are known by."""
        return normalize(self.guides_of_heads(), dim=-1) @ normalize(self.known.float(), dim=-1).mT

    def choose(self, queries: Tensor, scoring: Scoring) -> Tensor:
        """Tokens of the blocks with the largest ranks; the last block may have fewer tokens."""
        blocks = torch.arange(self.tokens, device=queries.device) // self.block
        return tokens_of_groups(self.ranks(), blocks.expand(len(self.keys), -1), self.budget)


@dataclass(frozen=True)
class ActQKV(Retriever):
    """Retriever of blocks of tokens by a probe of the last `window` queries.

    block: tokens of a block. representatives: its keys that receive most attention, by which it is known. The budget is
    the mean over layers.
    """

    window: int = 4
    block: int = 32
    representatives: int = 4

    guided: ClassVar[bool] = True
    joins_layers: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("window", "block"):
            if getattr(self, name) < 1:
                raise UserError(f"cache.{name}={getattr(self, name)} is out of range: 1 or more")
        if not 1 <= self.representatives <= self.block:
            raise UserError(
                f"cache.representatives={self.representatives} is out of range: 1 to cache.block={self.block}"
            )

    @property
    def query_window(self) -> int:
        """The window."""
        return self.window

    def guide(self, queries: Tensor, seen: Tensor, ends: Tensor | None) -> Tensor:
        """The probe of each query's window."""
        rows = queries.flatten(1).float()
        weights = activation_bias(rows, seen)
        return (weights @ rows).view(-1, *queries.shape[1:])

    def compress_layers(self, layers: Sequence[tuple[Sequence[Segment], Recent, Place]]) -> Sequence[Kept | None]:
        """The blocks of each layer, and how many of its tokens a query reads."""
        kept = [self.compress(*layer) for layer in layers]
        blocks, densities = [], []
        for one, (_, recent, _) in zip(kept, layers, strict=True):
            if one is None:
                return kept
            (segment,) = one.segments
            assert isinstance(segment, Blocks)
            assert recent.queries is not None
            seen = torch.ones(1, len(recent.queries), dtype=torch.bool, device=recent.queries.device)
            blocks.append(segment)
            asked = segment.asked(self.guide(recent.queries, seen, None))
            assert isinstance(asked, Blocks)
            densities.append(density(asked.ranks()))
        budgets = shared_out(sum(segment.budget for segment in blocks), densities, [part.tokens for part in blocks])
        return [
            replace(one, segments=[replace(segment, budget=budget)])
            for one, segment, budget in zip(filter(None, kept), blocks, budgets, strict=True)
        ]

    def index(
        self, keys: Tensor, values: Tensor, positions: Tensor, before: Sequence[Segment], recent: Recent, place: Place
    ) -> Segment:
        """Keys, values and what their blocks are known by."""
        assert place.budget is not None
        count, tokens = keys.shape[1], candidates(before, recent, place)
        received = window_attention(tokens)[:, :count]
        # What fills the last block receives nothing.
        missing = -count % self.block
        blocks = torch.nn.functional.pad(received, (0, missing), value=-1.0).unflatten(1, (-1, self.block))
        order = blocks.sort(dim=2, descending=True, stable=True).indices[..., : self.representatives]
        starts = torch.arange(blocks.shape[1], device=keys.device)[:, None] * self.block
        places = (starts + order).clamp(max=count - 1).flatten(1)
        chosen = keys.gather(1, places[..., None].expand(-1, -1, keys.shape[2]))
        known = chosen.unflatten(1, (-1, order.shape[2])).float().mean(2).to(keys.dtype)
        return Blocks(keys, values, positions, place.budget, known, self.block)


def activation_bias(rows: Tensor, seen: Tensor) -> Tensor:
    """Weight (W, R) of each row of (R, F) among those that are seen (W, R): its squared deviation from their mean."""
    share = seen.float() / seen.sum(1, keepdim=True)
    mean, square = share @ rows, share @ rows.square()
    variance = (square - mean.square()).clamp(min=0)
    scale = variance + _FLOOR * variance.mean(1, keepdim=True)
    # The sum over channels of (row - mean)^2 / scale. One row alone has no variance, and the whole weight.
    inverse = torch.where(scale > 0, 1 / scale, 0)
    bias = rows.square() @ inverse.mT - 2 * rows @ (mean * inverse).mT + (mean.square() * inverse).sum(1)
    bias = torch.where(seen, bias.mT.clamp(min=0), 0)
    total = bias.sum(1, keepdim=True)
    return torch.where(total > 0, bias / total, share)


def density(ranks: Tensor) -> float:
    """Entropy of the softmax of ranks (H, 1, blocks), relative to that of equal ones; the mean over heads."""
    count = ranks.shape[-1]
    if count == 1:
        return 1.0
    shares = ranks.softmax(-1)
    return float(-(shares * shares.log()).sum(-1).mean() / log(count))


def shared_out(total: int, weights: Sequence[float], most: Sequence[int]) -> list[int]:
    """Whole numbers in proportion to weights, none above `most`, that add up to total or to the sum of `most`."""
    shares = [0.0] * len(weights)
    open_ = list(range(len(weights)))
    left = float(min(total, sum(most)))
    while open_:
        unit = left / sum(weights[place] for place in open_)
        full = [place for place in open_ if weights[place] * unit >= most[place]]
        for place in full or open_:
            shares[place] = most[place] if full else weights[place] * unit
            left -= shares[place]
        open_ = [place for place in open_ if place not in full] if full else []
    # Rounded so that the sum stays.
    ends = [round(sum(shares[: place + 1])) for place in range(len(shares))]
    return [end - begin for begin, end in zip([0, *ends], ends, strict=False)]
