"""LServe: half of the heads hold the first and the last tokens alone, the others read the pages that promise most.

Source: Yang et al. 2025, arXiv:2502.14866, with the bounds of Tang et al. 2024, arXiv:2406.10774 (Quest): for each
channel the larger of query * minimum and query * maximum of a part. A page's score is the largest of its parts'. Heads
are split as in Xiao et al. 2024, arXiv:2410.10819 (DuoAttention), over the whole model.
Departs from them: pages are chosen anew for every query; a head's gate is not trained but is the share of attention
that the prompt's last queries give to the first and the last tokens; and all heads attend to the whole prompt in it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hasten.accel.cache.base import Kept, Place, Recent
from hasten.accel.cache.evict.base import candidates
from hasten.accel.cache.retrieve.base import Retriever
from hasten.accel.cache.segments.base import Segment, scores
from hasten.accel.cache.segments.dense import Dense
from hasten.accel.cache.segments.head_groups import HeadGroups
from hasten.accel.cache.segments.selected import Selected, tokens_of_groups
from hasten.accel.errors import UserError
from hasten.kernels.attention.contract import Scoring

Layer = tuple[Sequence[Segment], Recent, Place]


@dataclass(frozen=True)
class Pages(Selected):
    """low, high: (H, pages, parts, D), the least and the largest of each channel. page: tokens of a page."""

    low: Tensor
    high: Tensor
    page: int

    def tensors(self) -> Iterator[Tensor]:
        """Keys, values and bounds."""
        yield from super().tensors()
        yield from (self.low, self.high)

    def choose(self, queries: Tensor, scoring: Scoring) -> Tensor:
        """Tokens of the best pages; the last page may have fewer tokens."""
        folded = queries.unflatten(1, (len(self.keys), -1)).float()  # (W, H, G, D)
        low, high = self.low.float(), self.high.float()
        bounds = torch.einsum("whgd,hpsd->hwgps", folded.clamp(min=0), high)
        bounds += torch.einsum("whgd,hpsd->hwgps", folded.clamp(max=0), low)
        pages = torch.arange(self.tokens, device=low.device) // self.page
        return tokens_of_groups(bounds.amax((2, 4)), pages.expand(len(self.keys), -1), self.budget)


@dataclass(frozen=True)
class LServe(Retriever):
    """Retriever of pages, in the heads that are not streaming.

    page: tokens of a page. parts: parts of a page that have bounds of their own. streaming_heads: share of the model's
    KV heads that hold only the first `sinks` and the last `local` tokens; 0: all heads retrieve. window: last queries
    of the prompt that decide which heads. A budget that holds all tokens drops none.
    """

    page: int = 64
    parts: int = 4
    streaming_heads: float = 0.5
    sinks: int = 128
    local: int = 256
    window: int = 64

    frees: ClassVar[bool] = True
    joins_layers: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.parts < 1 or self.page < 1 or self.page % self.parts:
            raise UserError(f"cache.page={self.page} must be a multiple of cache.parts={self.parts}, 1 or more")
        if not 0 <= self.streaming_heads <= 1:
            raise UserError(f"cache.streaming_heads={self.streaming_heads} is out of range: 0 to 1")
        if self.sinks < 0 or self.window < 1 or self.local < self.recent:
            raise UserError(
                f"need cache.sinks >= 0, cache.window >= 1 and cache.local >= cache.recent={self.recent}, got "
                f"{self.sinks}, {self.window} and {self.local}"
            )

    @property
    def query_window(self) -> int:
        """The window."""
        return self.window

    def compress_layers(self, layers: Sequence[Layer]) -> Sequence[Kept | None]:
        """Pages, and the first and last tokens of streaming heads, which are chosen when the first token is dropped.

        The memory of a layer is which heads are streaming, (H,) bool.
        """
        streaming = [recent.memory for _, recent, _ in layers]
        if streaming[0] is None:
            place = layers[0][2]
            assert place.budget is not None
            if not self.streaming_heads or place.length <= max(place.budget, self.sinks + self.local):
                return [self.compress(*layer) for layer in layers]
            streaming = self._streaming(layers)
        return [self._split(*layer, own) for layer, own in zip(layers, streaming, strict=True)]

    def index(
        self, keys: Tensor, values: Tensor, positions: Tensor, before: Sequence[Segment], recent: Recent, place: Place
    ) -> Segment:
        """Keys, values and the bounds of their pages."""
        assert place.budget is not None
        missing = -keys.shape[1] % self.page
        # The last page is filled with its last key, which changes no bound.
        filled = torch.cat([keys, keys[:, -1:].expand(-1, missing, -1)], 1) if missing else keys
        parts = filled.unflatten(1, (-1, self.parts, self.page // self.parts))
        return Pages(keys, values, positions, place.budget, parts.amin(3), parts.amax(3), self.page)

    def _streaming(self, layers: Sequence[Layer]) -> list[Tensor]:
        """The heads of each layer whose gates are among the model's largest."""
        gates = [self.gates(*layer) for layer in layers]
        order = torch.cat(gates).sort(descending=True, stable=True).indices
        chosen = torch.zeros_like(order, dtype=torch.bool)
        chosen[order[: round(self.streaming_heads * len(order))]] = True
        return list(chosen.split([len(part) for part in gates]))

    def gates(self, segments: Sequence[Segment], recent: Recent, place: Place) -> Tensor:
        """Share (H,) of the last queries' attention that the first and the last tokens receive."""
        tokens = candidates(segments, recent, place)
        assert tokens.queries is not None
        width, held = len(tokens.queries), tokens.positions[0]
        behind = held[-width:, None] - held
        products = scores(tokens.queries, tokens.keys, place.scoring).unflatten(1, (-1, width))
        attention = products.masked_fill_(behind < 0, -torch.inf).softmax(-1)
        near = (held < self.sinks) | (behind < self.local)
        return (attention * near).sum(-1).mean((1, 2))

    def _split(self, segments: Sequence[Segment], recent: Recent, place: Place, streaming: Tensor) -> Kept | None:
        """Pages of the heads that retrieve, and the tokens of those that stream."""
        last = min(self.recent, recent.keys.shape[1])
        heads: list[Tensor] = []
        parts: list[Segment] = []
        for streams in (False, True):
            own = (streaming == streams).nonzero()[:, 0]
            if not len(own):
                continue
            keys, values, positions = _tokens_of(segments, recent, own)
            count = positions.shape[1] - last
            if count < 1:
                return None
            kept = torch.arange(count, device=own.device)
            if streams:
                # Those of the last tokens that are not held densely.
                kept = kept[(positions[0, :count] < self.sinks) | (kept >= count + last - self.local)]
            keys, values, positions = (part[:, kept] for part in (keys, values, positions))
            heads.append(own)
            if streams:
                parts.append(Dense(keys, values, positions))
            else:
                parts.append(self.index(keys, values, positions, segments, recent, place))
        return Kept([HeadGroups(heads, parts)], last, memory=streaming)


def _tokens_of(segments: Sequence[Segment], recent: Recent, heads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, values and positions of all tokens that are held of some heads."""
    held = [
        segment.of_heads(heads) if isinstance(segment, HeadGroups) else [part[heads] for part in segment.dense()]
        for segment in segments
    ]
    new = recent.keys[heads], recent.values[heads], recent.positions.expand(len(heads), -1)
    keys, values, positions = (torch.cat(part, 1) for part in zip(*held, new, strict=True))
    return keys, values, positions
