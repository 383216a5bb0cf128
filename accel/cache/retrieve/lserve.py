"""LServe's page selection: pages of keys are read whole where the bounds of their parts promise a large score.

Source: Yang et al. 2025, arXiv:2502.14866, with the bounds of Tang et al. 2024, arXiv:2406.10774 (Quest): for each
channel the larger of query * minimum and query * maximum of a part. A page's score is the largest of its parts'.
Departs from it: pages are chosen anew for every query, and all heads retrieve; its streaming heads need gates that are
trained (DuoAttention).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hasten.accel.cache.base import Place, Recent
from hasten.accel.cache.retrieve.base import Retriever
from hasten.accel.cache.segments.base import Segment
from hasten.accel.cache.segments.selected import Selected
from hasten.accel.errors import UserError
from hasten.kernels.attention.contract import Scoring


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
        """Tokens of the best pages; the last page may have fewer tokens, and is filled with tokens of the next best."""
        heads, width = len(self.keys), len(queries)
        folded = queries.unflatten(1, (heads, -1)).float()  # (W, H, G, D)
        low, high = self.low.float(), self.high.float()
        bounds = torch.einsum("whgd,hpsd->hwgps", folded.clamp(min=0), high)
        bounds += torch.einsum("whgd,hpsd->hwgps", folded.clamp(max=0), low)
        pages = bounds.amax((2, 4))  # (H, W, pages)
        order = pages.flip(-1).sort(dim=-1, descending=True, stable=True).indices
        ranked = pages.shape[-1] - 1 - order
        tokens = (ranked[..., None] * self.page + torch.arange(self.page, device=pages.device)).flatten(-2)
        # Places behind the last token go to the end.
        real = tokens < self.tokens
        place = torch.where(real, 0, 1).sort(dim=-1, stable=True).indices
        return tokens.gather(-1, place)[..., : self.budget].view(heads, width, -1)


@dataclass(frozen=True)
class LServe(Retriever):
    """Retriever of pages. page: tokens of a page. parts: parts of a page that have bounds of their own."""

    page: int = 64
    parts: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.parts < 1 or self.page < 1 or self.page % self.parts:
            raise UserError(f"cache.page={self.page} must be a multiple of cache.parts={self.parts}, 1 or more")

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
