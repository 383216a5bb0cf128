"""Fitness of a candidate model: divergence of its predictions from the original's, or from the text; lower is better.

Source: Sieberling et al. 2024, arXiv:2410.14649 (EvoPress), which searches by KL divergence, by KL divergence over the
original's most likely tokens, or by perplexity.
Departs from it: the paper's sparse KL renormalises both distributions over the kept tokens. So it ignores the mass that
a candidate moves to other tokens, and may exceed the full divergence. Here all other tokens form one more class.
Merging classes can only lower a divergence (the log sum inequality), so this is a lower bound of the full divergence,
exact where no classes are merged, and the mass that leaves the kept tokens counts.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hasten.accel.errors import UserError


class Fitness(ABC):
    """A loss that is additive over tokens, in nats.

    needs_original: whether `loss` reads the tensors that `reference` makes of the original's predictions.
    """

    needs_original: ClassVar[bool] = True

    @abstractmethod
    def reference(self, logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Tensors to keep of the original's predictions, with one row a token.

        logits: (M, V) float32 of the original. targets: (M,) int64, the tokens that follow.
        """

    @abstractmethod
    def loss(self, logits: Tensor, targets: Tensor, stored: dict[str, Tensor]) -> float:
        """Sum of the loss over tokens. logits: (M, V) float32, the candidate's. stored: tensors of `reference`."""


@dataclass(frozen=True)
class KL(Fitness):
    """KL(original || candidate) over the whole vocabulary; keeps 4 V + 4 bytes a token."""

    def reference(self, logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """probs (M, V): the original's; negentropy (M,): the sum over the vocabulary of p log p."""
        probs = logits.softmax(-1)
        # The same formula as in `loss`, so that a model's divergence from itself is zero.
        return {"probs": probs, "negentropy": torch.linalg.vecdot(probs, logits) - logits.logsumexp(-1)}

    def loss(self, logits: Tensor, targets: Tensor, stored: dict[str, Tensor]) -> float:
        """Sum of divergences; rounding may make a divergence of zero slightly negative."""
        # Two passes over the vocabulary; the sum of p (log p - log q) would take four.
        cross_entropy = logits.logsumexp(-1) - torch.linalg.vecdot(stored["probs"], logits)
        return float((cross_entropy + stored["negentropy"]).sum(dtype=torch.float64))


@dataclass(frozen=True)
class SparseKL(Fitness):
    """KL(original || candidate) over the original's top_k tokens and, as one class, all others.

    Keeps 8 top_k + 4 bytes a token, whatever the vocabulary.
    """

    top_k: int = 512

    def __post_init__(self) -> None:
        if self.top_k < 1:
            raise UserError(f"top_k={self.top_k} is out of range: 1 or more")

    def reference(self, logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """ids (M, k) int32 and log_probs (M, k) of the k most likely tokens, k <= V; tail (M,): mass of the others."""
        log_probs = logits.log_softmax(-1)
        top = log_probs.topk(min(self.top_k, logits.shape[-1]), -1, sorted=False)
        # Summed, and not 1 minus the kept mass, so that the tail is exactly zero where no token is left.
        tail = log_probs.exp().scatter(-1, top.indices, 0).sum(-1)
        return {"log_probs": top.values, "ids": top.indices.int(), "tail": tail}

    def loss(self, logits: Tensor, targets: Tensor, stored: dict[str, Tensor]) -> float:
        """Sum of divergences; rounding may make a divergence of zero slightly negative."""
        log_probs = logits.gather(-1, stored["ids"].long()) - logits.logsumexp(-1, keepdim=True)
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

    def reference(self, logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """No tensors: predictions are compared with the text, not with the original."""
        return {}

    def loss(self, logits: Tensor, targets: Tensor, stored: dict[str, Tensor]) -> float:
        """Sum over tokens."""
        nll = logits.logsumexp(-1) - logits.gather(-1, targets[:, None])[:, 0]
        return float(nll.sum(dtype=torch.float64))
