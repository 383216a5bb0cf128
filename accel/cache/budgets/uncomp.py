"""UNComp: heads whose keys have much entropy hold twice as many tokens as the others.

Source: Xiong et al. 2024, arXiv:2410.03090, and its code: the entropy of the spectrum of a head's keys, each centred
and normalised, cut off after the largest eigenvalues; heads are grouped on calibration text, and without calibrated
statistics on the prompt itself. Departs from it: hidden states, which its layers also drop in the prompt, are left as
they are.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hasten.accel.cache.base import CacheMethod, Kept, Place, Recent
from hasten.accel.cache.calibrated import Calibrated, LayerTensors, LayerTokens
from hasten.accel.cache.segments.base import Segment, scores
from hasten.accel.cache.segments.ragged import Ragged
from hasten.accel.errors import UserError


@dataclass(frozen=True)
class UNComp(CacheMethod, Calibrated):
    """Evictor of heads' own numbers of tokens by the attention of the last queries.

    window: last queries. sinks, recent: first and last tokens that are always kept. eigenvalues: largest ones that the
    entropy counts.
    """

    window: int = 8
    sinks: int = 4
    recent: int = 16
    eigenvalues: int = 16

    def __post_init__(self) -> None:
        if self.window < 1 or self.eigenvalues < 2 or self.sinks < 0 or self.recent < 0:
            raise UserError(
                "need cache.window >= 1, cache.eigenvalues >= 2, cache.sinks >= 0 and cache.recent >= 0, got "
                f"{self.window}, {self.eigenvalues}, {self.sinks} and {self.recent}"
            )

    @property
    def query_window(self) -> int:
        """The window."""
        return self.window

    def compress(self, segments: Sequence[Segment], recent: Recent, place: Place) -> Kept | None:
        """Each head's tokens; the mean over heads is the budget. The memory is whether a head is one of the larger."""
        assert place.budget is not None
        heads = _heads(segments, recent)
        large = self._large(heads, place) if recent.memory is None else recent.memory
        number = int(large.sum())
        # 2 c for the larger heads and c for the others, with the budget as the mean.
        unit = place.budget * len(heads) / (len(heads) + number)
        kept = []
        for head, (keys, values, positions) in enumerate(heads):
            budget = max(1, int(unit * (2 if large[head] else 1)))
            chosen = self._choose(head, keys, positions, recent, place, min(budget, len(positions)))
            kept.append((keys[chosen].clone(), values[chosen].clone(), positions[chosen].clone()))
        return Kept([Ragged(*zip(*kept, strict=True))], 0, memory=large)

    def observe(self, tokens: LayerTokens) -> LayerTensors:
        """Second moments (H, D, D) of the rows whose spectrum has the entropy."""
        rows = _rows(tokens.keys).double()
        return {"moments": rows.mT @ rows}

    def solve(self, layers: Sequence[LayerTensors]) -> list[LayerTensors]:
        """The spectrum (H, D) of each head, from the largest eigenvalue on."""
        return [{"spectrum": torch.linalg.eigvalsh(own["moments"]).flip(1).float()} for own in layers]

    def _large(self, heads: Sequence[tuple[Tensor, Tensor, Tensor]], place: Place) -> Tensor:
        """Which heads have an entropy above the median, (H,) bool."""
        if place.statistics is not None:
            spectra = place.statistics["spectrum"].unbind()
            entropies = torch.stack([spectral_entropy(spectrum, self.eigenvalues) for spectrum in spectra])
        else:
            entropies = torch.stack([entropy(keys, self.eigenvalues) for keys, _, _ in heads])
        return entropies > entropies.median()

    def _choose(self, head: int, keys: Tensor, positions: Tensor, recent: Recent, place: Place, budget: int) -> Tensor:
        """Ascending indices of a head's tokens that stay."""
        assert recent.queries is not None
        groups = recent.queries.shape[1] // len(recent.keys)
        queries = recent.queries[:, head * groups : (head + 1) * groups]
        width, count = len(queries), len(keys)
        products = scores(queries, keys[None], place.scoring)[0].unflatten(0, (groups, width))
        seen = torch.ones(width, count, dtype=torch.bool, device=keys.device).tril(count - width)
        ranks = products.masked_fill_(~seen, -torch.inf).softmax(-1).sum((0, 1))
        sinks = positions < min(self.sinks, budget)
        ranks[sinks] = torch.inf
        last = min(self.recent, budget - int(sinks.sum()))
        ranks[count - last :] = torch.inf
        order = ranks.flip(0).sort(descending=True, stable=True).indices
        return (count - 1 - order[:budget]).sort().values


def entropy(states: Tensor, eigenvalues: int) -> Tensor:
    """Entropy of the spectrum of states (T, D), relative to that of D equal eigenvalues."""
    rows = _rows(states)
    return spectral_entropy(torch.linalg.eigvalsh(rows.T @ rows / len(rows)).flip(0), eigenvalues)


def spectral_entropy(spectrum: Tensor, eigenvalues: int) -> Tensor:
    """The same of a spectrum (D,) from the largest eigenvalue on."""
    shares = (spectrum / spectrum.sum())[:eigenvalues].clamp(min=1e-12)
    return -(shares * shares.log()).sum() / torch.log(torch.tensor(float(len(spectrum))))


def _rows(states: Tensor) -> Tensor:
    """States (..., T, D), centred and normalised."""
    return torch.nn.functional.normalize(states.float() - states.float().mean(-2, keepdim=True), dim=-1)


def _heads(segments: Sequence[Segment], recent: Recent) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Keys and values (T_h, D) and positions (T_h,) of every head."""
    heads = []
    for head in range(len(recent.keys)):
        parts = [
            (segment.keys[head], segment.values[head], segment.positions[head])
            for segment in segments
            if isinstance(segment, Ragged)
        ]
        parts.append((recent.keys[head], recent.values[head], recent.positions))
        keys, values, positions = (torch.cat(part) for part in zip(*parts, strict=True))
        heads.append((keys, values, positions))
    return heads
