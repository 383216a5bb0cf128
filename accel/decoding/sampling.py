"""Sampling parameters: temperature, top-k, top-p and repetition penalty, applied to a model's logits.

They are applied to the target before verification: lossless decoding has this distribution. Their order and meaning
are those of transformers' logits processors.
"""

from dataclasses import dataclass
from math import inf

import numpy as np
import torch
from torch import Tensor

from hasten.accel.errors import check_fields

_CHUNK = 64  # ids in a chunk of the two-step search for the most probable ones
# Below this temperature logits are divided after their maximum was subtracted, because the quotient may overflow.
_SMALL_TEMPERATURE = 1e-6
# Range of divisors and penalised logits: quotients of logits by them are finite float32 numbers.
_LEAST, _MOST = 1e-30, 1e30


@dataclass(frozen=True)
class Sampling:
    """temperature=0 takes the most probable token; top_k=0, top_p=1 and repetition_penalty=1 change nothing."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        check_fields(
            self,
            ("temperature", 0 <= self.temperature < inf, "a finite number, 0 or more"),
            ("top_k", self.top_k >= 0, "0 or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < inf, "a finite number above 0"),
        )

    @property
    def is_greedy(self) -> bool:
        """Whether tokens are chosen by argmax (temperature 0) and nothing is drawn."""
        return self.temperature == 0

    @property
    def has_penalty(self) -> bool:
        """Whether the distribution depends on the tokens seen so far."""
        return self.repetition_penalty != 1

    def penalised(self, logits: Tensor, seen: Tensor) -> Tensor:
        """Logits (V,) float32, lowered for the ids in seen (T,) int64; the logits themselves without a penalty."""
        if not self.has_penalty:
            return logits
        penalised = logits.float().clone()
        chosen = penalised[seen]
        penalty = min(max(self.repetition_penalty, _LEAST), _MOST)
        changed = torch.where(chosen < 0, chosen * penalty, chosen / penalty).clamp(-_MOST, _MOST)
        penalised[seen] = changed.masked_fill(chosen == -torch.inf, -torch.inf)
        return penalised

    def probs(self, logits: Tensor) -> Tensor:
        """Distribution (…, V) float32 of penalised logits (…, V); one-hot if greedy.

        As the temperature falls it tends to the one-hot one, to equal shares where the largest logits are equal.
        """
        if self.is_greedy:
            return torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).float()
        scaled = logits.float()
        if self.temperature < _SMALL_TEMPERATURE:
            scaled = scaled - scaled.amax(-1, keepdim=True)
        scaled = scaled / min(max(self.temperature, _LEAST), _MOST)
        if self.top_k and self.top_k < scaled.shape[-1]:
            smallest = scaled.topk(self.top_k, -1).values[..., -1:]
            scaled = scaled.masked_fill(scaled < smallest, -torch.inf)
        if self.top_p < 1:
            # As transformers does: in ascending order, the tail with a mass of at most 1 - top_p is removed.
            ordered, order = scaled.sort(-1)
            tail = ordered.softmax(-1).cumsum(-1) <= 1 - self.top_p
            tail[..., -1] = False
            scaled = scaled.masked_fill(torch.zeros_like(tail).scatter(-1, order, tail), -torch.inf)
        return scaled.softmax(-1)


def draw(probs: Tensor, generator: torch.Generator) -> int:
    """One id drawn from a distribution (V,), which need not sum to exactly one.

    It is drawn by inverting the cumulative distribution, with one number of the generator whatever the vocabulary.
    """
    # float64: in float32 the sum over a large vocabulary is off by more than a rare token's share. numpy, because its
    # operations on so few numbers cost less than torch's.
    cumulative = np.cumsum(probs.cpu().numpy(), dtype=np.float64)
    point = float(torch.rand((), dtype=torch.float64, generator=generator)) * cumulative[-1]
    return min(int(np.searchsorted(cumulative, point, side="right")), len(cumulative) - 1)


def most_probable(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The largest logits of each row of (N, V), float32, and their ids: (N, count) each, in descending order."""
    rows, vocabulary = logits.shape
    logits, count = logits.float(), min(count, vocabulary)
    if vocabulary % _CHUNK or vocabulary < count * _CHUNK:
        return logits.topk(count, -1)
    # Two steps take half the time on a CPU: the `count` chunks with the largest maxima contain all of them.
    chunks = logits.view(rows, -1, _CHUNK)
    best = chunks.amax(-1).topk(count, -1, sorted=False).indices
    values, inside = chunks.gather(1, best[:, :, None].expand(-1, -1, _CHUNK)).flatten(1).topk(count, -1)
    return values, best.gather(1, inside // _CHUNK) * _CHUNK + inside % _CHUNK
