"""Fitness of a candidate model: divergence of its predictions from the original's, or from the text; lower is better.

Source: Sieberling et al. 2024, arXiv:2410.14649 (EvoPress), which searches by KL divergence, by KL divergence over the
original's most likely tokens, or by perplexity.
Departs from it: the paper's sparse KL renormalises both distributions over the kept tokens. So it ignores the mass that
a candidate moves to other tokens, and may exceed the full divergence. Here all other tokens form one more class.
Merging classes can only lower a divergence (the log sum inequality), so this is a lower bound of the full divergence,
exact where no classes are merged, and the mass that leaves the kept tokens counts.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hasten.accel.errors import UserError
from hasten.accel.evaluation.online_softmax import LogSumExp, PickedLogits

# Tiles of the vocabulary in order, once: the first entry of each, and its logits (M, C) float32 of M tokens.
Tiles = Iterable[tuple[int, Tensor]]


class Fitness(ABC):
    """A loss that is additive over tokens, in nats.

    needs_original: whether `loss` reads the tensors that `reference` makes of the original's predictions.
    """

    needs_original: ClassVar[bool] = True

    @abstractmethod
    def reference(self, tiles: Tiles, targets: Tensor) -> dict[str, Tensor]:
        """Tensors to keep of the original's predictions, with one row a token.

        tiles: of the original's logits. targets: (M,) int64, the tokens that follow.
        """

    @abstractmethod
    def loss(self, tiles: Tiles, targets: Tensor, stored: dict[str, Tensor]) -> float:
        """Sum of the loss over tokens. tiles: of the candidate's logits. stored: tensors of `reference`."""


@dataclass(frozen=True)
class KL(Fitness):
    """KL(original || candidate) over the whole vocabulary; keeps 4 V + 8 bytes a token."""

    def reference(self, tiles: Tiles, targets: Tensor) -> dict[str, Tensor]:
        """probs (M, V): the original's; negentropy (M,): the sum over the vocabulary of p log p."""
        normalizer, logits = LogSumExp(len(targets), targets.device), []
        for _, tile in tiles:
            normalizer.add(tile)
            logits.append(tile)
        probs = torch.empty(len(targets), sum(tile.shape[1] for tile in logits), device=targets.device)
        mean = torch.zeros_like(targets, dtype=torch.float64)
        for part in probs.split([tile.shape[1] for tile in logits], 1):
            # Each tile is freed once its part is written.
            tile = logits.pop(0)
            part.copy_(normalizer.probabilities(tile))
            # The same formula as in `loss`, so that a model's divergence from itself is exactly zero.
            mean += torch.linalg.vecdot(part, tile)
        return {"probs": probs, "negentropy": mean - normalizer.value()}

    def loss(self, tiles: Tiles, targets: Tensor, stored: dict[str, Tensor]) -> float:
        """Sum of divergences; rounding may make a divergence of zero slightly negative."""
        normalizer, mean = LogSumExp(len(targets), targets.device), torch.zeros_like(targets, dtype=torch.float64)
        for first, tile in tiles:
            normalizer.add(tile)
            mean += torch.linalg.vecdot(stored["probs"][:, first : first + tile.shape[1]], tile)
        return float((stored["negentropy"] - (mean - normalizer.value())).sum())


@dataclass(frozen=True)
class SparseKL(Fitness):
    """KL(original || candidate) over the original's top_k tokens and, as one class, all others.

    Keeps 8 top_k + 4 bytes a token, whatever the vocabulary.
    """

    top_k: int = 512

    def __post_init__(self) -> None:
        if self.top_k < 1:
            raise UserError(f"top_k={self.top_k} is out of range: 1 or more")

    def reference(self, tiles: Tiles, targets: Tensor) -> dict[str, Tensor]:
        """ids (M, k) int32 and log_probs (M, k) of the k most likely tokens, k <= V; tail (M,): mass of the others."""
        rows, device = len(targets), targets.device
        normalizer, tail = LogSumExp(rows, device), torch.zeros(rows, dtype=torch.float64, device=device)
        top, ids = torch.empty(rows, 0, device=device), torch.empty(rows, 0, dtype=torch.int32, device=device)
        for first, tile in tiles:
            _, factor = normalizer.add(tile)
            entries = torch.arange(first, first + tile.shape[1], dtype=torch.int32, device=device)
            logits, ids = torch.cat([top, tile], -1), torch.cat([ids, entries.expand(rows, -1)], -1)
            top, places = logits.topk(min(self.top_k, logits.shape[-1]), -1, sorted=False)
            ids = ids.gather(-1, places)
            # Summed, and not 1 minus the kept mass, so that the tail is exactly zero where no token is left.
            others = logits.sub_(normalizer.maximum[:, None]).exp_().scatter_(-1, places, 0)
            tail = tail * factor + others.sum(-1)
        log_probs = (top - normalizer.value()[:, None]).float()
        return {"log_probs": log_probs, "ids": ids, "tail": (tail / normalizer.total).float()}

    def loss(self, tiles: Tiles, targets: Tensor, stored: dict[str, Tensor]) -> float:
        """Sum of divergences; rounding may make a divergence of zero slightly negative."""
        normalizer, kept = LogSumExp(len(targets), targets.device), PickedLogits(stored["ids"].long())
        for first, tile in tiles:
            normalizer.add(tile)
            kept.add(first, tile)
        log_probs = (kept.value() - normalizer.value()[:, None]).float()
        # Rounding may leave no mass: then the tail is the rounding error, since more mass keeps this a lower bound.
        tail = (1 - log_probs.exp().sum(-1)).clamp(min=torch.finfo(torch.float32).eps)
        divergence = torch.linalg.vecdot(stored["log_probs"].exp(), stored["log_probs"] - log_probs)
        # xlogy: a tail without mass adds nothing.
        divergence += torch.xlogy(stored["tail"], stored["tail"]) - stored["tail"] * tail.log()
        return float(divergence.sum(dtype=torch.float64))


@dataclass(frozen=True)
class Perplexity(Fitness):
    """Negative log-likelihood of the next token, whose mean is the logarithm of the perplexity; stores no tensors."""

    needs_original: ClassVar[bool] = False

    def reference(self, tiles: Tiles, targets: Tensor) -> dict[str, Tensor]:
        """No tensors: predictions are compared with the text, not with the original."""
        return {}

    def loss(self, tiles: Tiles, targets: Tensor, stored: dict[str, Tensor]) -> float:
        """Sum over tokens."""
        normalizer, target = LogSumExp(len(targets), targets.device), PickedLogits(targets[:, None])
        for first, tile in tiles:
            normalizer.add(tile)
            target.add(first, tile)
        return float((normalizer.value() - target.value()[:, 0]).sum())
