"""Magnitudes of activations over the calibration tokens: the largest, and a histogram.

Maxima and counts are exact: they do not depend on the number of workers, on chunks or on the order of tokens.
"""

import numpy as np
import torch
from torch import Tensor

# Bins of a histogram are float32 numbers that agree in the exponent and the three highest bits of the mantissa.
_DROPPED_BITS = 20
BINS = 1 << (31 - _DROPPED_BITS)


class InputRange:
    """Largest magnitude of a layer's inputs, and a histogram of magnitudes where one is wanted, else None."""

    def __init__(self, histogram: bool = False) -> None:
        self._absmax: Tensor | None = None
        self._counts: Tensor | None = None
        self._is_counted = histogram

    def add(self, inputs: Tensor) -> None:
        """Add inputs of any shape."""
        if not inputs.numel():
            return
        magnitudes = inputs.detach().abs().float().flatten()
        largest = magnitudes.amax()
        self._absmax = largest if self._absmax is None else torch.maximum(self._absmax, largest)
        if self._is_counted:
            bins = magnitudes.view(torch.int32) >> _DROPPED_BITS
            counts = torch.bincount(bins, minlength=BINS)
            self._counts = counts if self._counts is None else self._counts + counts

    @property
    def is_empty(self) -> bool:
        """Whether there were no inputs."""
        return self._absmax is None

    @property
    def absmax(self) -> float:
        """Largest magnitude; 0 where there were no inputs, nan or inf where one is not finite."""
        return 0.0 if self._absmax is None else float(self._absmax)

    @property
    def counts(self) -> Tensor | None:
        """Number of inputs by bin, (BINS,) int64; None where no histogram was wanted."""
        return self._counts

    def merge(self, other: "InputRange") -> None:
        """Add the inputs of another range of the same kind."""
        if other._absmax is not None:
            self._absmax = other._absmax if self._absmax is None else torch.maximum(self._absmax, other._absmax)
        if other._counts is not None:
            self._counts = other._counts if self._counts is None else self._counts + other._counts

    def array(self) -> np.ndarray:
        """Largest magnitude and counts, float64, which is exact for fewer than 2**53 inputs of a bin."""
        counts = np.zeros(0) if self._counts is None else self._counts.cpu().numpy().astype(np.float64)
        return np.concatenate([[self.absmax], counts])

    @classmethod
    def from_array(cls, array: np.ndarray) -> "InputRange":
        """The range whose array() this is."""
        made = cls(len(array) > 1)
        made._absmax = torch.tensor(float(array[0]))
        if len(array) > 1:
            made._counts = torch.from_numpy(array[1:].astype(np.int64))
        return made


def bin_edges() -> Tensor:
    """Least magnitude of every bin and the end of the last one, (BINS + 1,) float32; from 2**128 on they are inf."""
    edges = torch.arange(BINS + 1, dtype=torch.int64) << _DROPPED_BITS
    finite = edges.clamp(max=0x7F800000).to(torch.int32).view(torch.float32)
    return finite


class HeadRanges:
    """Largest magnitude of queries, keys and values [B, H, T, D] of an attention, by head."""

    names = ("q", "k", "v")

    def __init__(self) -> None:
        self._absmax: dict[str, Tensor] = {}

    def add(self, *states: Tensor) -> None:
        """Add queries, keys and values."""
        for name, state in zip(self.names, states, strict=True):
            if state.numel():
                self._add(name, state.detach().abs().float().amax((0, 2, 3)))

    def _add(self, name: str, largest: Tensor) -> None:
        known = self._absmax.get(name)
        self._absmax[name] = largest if known is None else torch.maximum(known, largest)

    def merge(self, other: "HeadRanges") -> None:
        """Add the states of another."""
        for name, largest in other._absmax.items():
            self._add(name, largest)

    def of(self, name: str) -> Tensor:
        """Largest magnitude (H,) float32 of `q`, `k` or `v`."""
        return self._absmax[name]

    def array(self) -> dict[str, np.ndarray]:
        """Largest magnitudes by name."""
        return {name: largest.cpu().numpy() for name, largest in self._absmax.items()}

    @classmethod
    def from_array(cls, arrays: dict[str, np.ndarray]) -> "HeadRanges":
        """The ranges whose array() this is."""
        made = cls()
        # A copy, because arrays from an object store are read-only.
        made._absmax = {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}
        return made
