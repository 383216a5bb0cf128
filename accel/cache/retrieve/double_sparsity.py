"""Double Sparsity: a few channels of the keys, in 4 bits, say which tokens a query reads whole.

Source: Yang et al. 2024, arXiv:2408.07092, and its code: the channels of a head are those with the largest mean
|query * key| of a query and its own token's key, over calibration text. Without calibrated statistics they are those of
the largest mean |query| * mean |key|, of the prompt's last queries and all its keys.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from hasten.accel.cache.base import Place, Recent
from hasten.accel.cache.calibrated import Calibrated, LayerTensors, LayerTokens
from hasten.accel.cache.retrieve.base import Retriever
from hasten.accel.cache.segments.base import Segment
from hasten.accel.cache.segments.selected import Selected, best_of_heads, exact_scores
from hasten.accel.errors import UserError
from hasten.kernels.attention.contract import Scoring
from hasten.kernels.quantize_pack import Packed, quantize_pack, unpack_dequantize

_BITS = 4


@dataclass(frozen=True)
class LabelCache(Selected):
    """channels: (H, C), the channels of each head. labels: codes of (H * T, C), with a scale a token."""

    channels: Tensor
    labels: Packed

    def tensors(self) -> Iterator[Tensor]:
        """Keys, values and labels."""
        yield from super().tensors()
        yield from (self.channels, self.labels.words, self.labels.scale)
        if self.labels.offset is not None:
            yield self.labels.offset

    def choose(self, queries: Tensor, scoring: Scoring) -> Tensor:
        """The tokens with the largest scores over the label channels."""
        heads, size = len(self.keys), self.keys.shape[2]
        labels = unpack_dequantize(self.labels).unflatten(0, (heads, -1))
        groups = queries.shape[1] // heads
        own = self.channels.repeat_interleave(groups, 0).expand(len(queries), -1, -1)
        scale = size**-0.5 if scoring.scale is None else scoring.scale
        return best_of_heads(exact_scores(queries.gather(2, own), labels, Scoring(scale)), self.budget)


@dataclass(frozen=True)
class DoubleSparsity(Retriever, Calibrated):
    """Retriever by label channels. channels: share of a key's channels. window: queries that they are chosen on."""

    channels: float = 0.25
    window: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.channels <= 1:
            raise UserError(f"cache.channels={self.channels} is out of range: above 0, at most 1")
        if self.window < 1:
            raise UserError(f"cache.window={self.window} is out of range: 1 or more")

    @property
    def query_window(self) -> int:
        """The window."""
        return self.window

    def index(
        self, keys: Tensor, values: Tensor, positions: Tensor, before: Sequence[Segment], recent: Recent, place: Place
    ) -> Segment:
        """Keys, values and labels; the channels stay those of the prompt."""
        assert place.budget is not None
        earlier = next((segment for segment in before if isinstance(segment, LabelCache)), None)
        channels = self._channels(keys, recent, place) if earlier is None else earlier.channels
        index = channels[:, None].expand(-1, keys.shape[1], -1)
        labels = quantize_pack(keys.gather(2, index).flatten(0, 1), _BITS, "token")
        return LabelCache(keys, values, positions, place.budget, channels, labels)

    def observe(self, tokens: LayerTokens) -> LayerTensors:
        """Sums of |query * key|, (H, D)."""
        queries = tokens.queries.unflatten(1, (len(tokens.keys), -1)).double()  # (T, H, G, D)
        products = (queries * tokens.keys.double().transpose(0, 1)[:, :, None]).abs()
        return {"weight": products.sum((0, 2))}

    def solve(self, layers: Sequence[LayerTensors]) -> list[LayerTensors]:
        """The sums, relative to a head's largest."""
        return [{"weight": (own["weight"] / own["weight"].amax(1, keepdim=True)).float()} for own in layers]

    def _channels(self, keys: Tensor, recent: Recent, place: Place) -> Tensor:
        if place.statistics is not None:
            weight = place.statistics["weight"]
        else:
            assert recent.queries is not None
            queries = recent.queries.unflatten(1, (len(keys), -1)).float()  # (W, H, G, D)
            weight = queries.abs().mean((0, 2)) * keys.float().abs().mean(1)
        count = max(1, round(self.channels * keys.shape[2]))
        return weight.sort(dim=1, descending=True, stable=True).indices[:, :count].sort(1).values.contiguous()
