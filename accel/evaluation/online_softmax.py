"""Sums over a vocabulary of which one tile of logits is seen at a time.

Source: Milakov and Gimelshein 2018, arXiv:1805.02867. The exponentials are taken relative to the largest logit so far.
When a later tile has a larger one, the sums so far are rescaled.
Departs from it: a tile's sums are float32, and the running sums float64.
"""

import torch
from torch import Tensor


class LogSumExp:
    """Running log-sum-exp of each of M rows.

    maximum: (M,) float32, the largest logit so far. total: (M,) float64, the sum of exp(logit - maximum).
    """

    def __init__(self, rows: int, device: torch.device) -> None:
        self.maximum = torch.full((rows,), -torch.inf, device=device)
        self.total = torch.zeros(rows, dtype=torch.float64, device=device)

    def add(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Add a tile (M, C) float32 of finite logits.

        Returns exp(logits - maximum), with the new maximum, and the factor (M,) float64 by which the maximum's change
        scales other sums of such exponentials over the earlier tiles.
        """
        maximum = torch.maximum(self.maximum, logits.amax(-1))
        factor = (self.maximum - maximum).double().exp()
        self.maximum = maximum
        exponentials = torch.sub(logits, maximum[:, None]).exp_()
        self.total = self.total * factor + exponentials.sum(-1)
        return exponentials, factor

    def value(self) -> Tensor:
        """Log-sum-exp over all tiles so far, (M,) float64."""
        return self.maximum.double() + self.total.log()

    def probabilities(self, logits: Tensor) -> Tensor:
        """Softmax (M, C) float32 of a tile, once all tiles were added."""
        # Not exp(logits - value()): rounded to float32, the log-sum-exp would scale a row by up to one in a million.
        return torch.sub(logits, self.maximum[:, None]).exp_().mul_(self.total.reciprocal().float()[:, None])


class Divergence:
    """Running KL(original || model) of each of M rows, in nats.

    With logits a of the original and b of the model, and p = softmax(a), it is
    sum p (a - b) - logsumexp(a) + logsumexp(b).
    """

    def __init__(self, rows: int, device: torch.device) -> None:
        self.original, self.model = LogSumExp(rows, device), LogSumExp(rows, device)
        self._difference = torch.zeros(rows, dtype=torch.float64, device=device)

    def add(self, original: Tensor, model: Tensor) -> None:
        """Add a tile of both models' logits, each (M, C) float32."""
        exponentials, factor = self.original.add(original)
        self._difference = self._difference * factor + torch.linalg.vecdot(exponentials, original - model)
        self.model.add(model)

    def value(self) -> Tensor:
        """Divergence over all tiles so far, (M,) float64."""
        return self._difference / self.original.total - self.original.value() + self.model.value()


class PickedLogits:
    """Logits at given entries of the vocabulary, columns (M, K) int64, which are picked from the tiles as they pass."""

    def __init__(self, columns: Tensor) -> None:
        self._shape = columns.shape
        self._columns, self._places = columns.flatten().sort()
        self._values = torch.zeros(columns.numel(), device=columns.device)

    def add(self, first: int, logits: Tensor) -> None:
        """Pick from a tile (M, C) float32 that begins with entry `first`."""
        bounds = torch.tensor([first, first + logits.shape[1]], device=self._columns.device)
        begin, end = torch.searchsorted(self._columns, bounds).tolist()
        places = self._places[begin:end]
        rows = places if self._shape[1] == 1 else places // self._shape[1]
        self._values[places] = logits[rows, self._columns[begin:end] - first]

    def value(self) -> Tensor:
        """The picked logits (M, K) float32; zero where no tile held the entry."""
        return self._values.view(self._shape)


class MostLikely:
    """Entry of the vocabulary with the largest logit of each of M rows: the first of equal ones."""

    def __init__(self, rows: int, device: torch.device) -> None:
        self.entry = torch.zeros(rows, dtype=torch.int64, device=device)
        self._maximum = torch.full((rows,), -torch.inf, device=device)

    def add(self, first: int, logits: Tensor, maximum: Tensor) -> None:
        """Add a tile (M, C) that begins with entry `first`. maximum: (M,), over this tile and all earlier ones."""
        # A new maximum is rare after the first tiles, and a search for its place takes as long as ten sums.
        rows = (maximum > self._maximum).nonzero()[:, 0]
        self.entry[rows] = first + logits[rows].argmax(-1)
        self._maximum = maximum
