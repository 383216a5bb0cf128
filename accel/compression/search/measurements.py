"""Comparison of candidates on samples; only losses that are not known yet are measured, and their tokens counted."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from hasten.accel.compression.search.moves import Genome
from hasten.accel.compression.search.samples import Portions, Sample, draw_nested


class Request(NamedTuple):
    """Distinct candidates to be measured on one sample."""

    genomes: Sequence[Genome]
    sample: Sample


# Callback that returns the loss of every candidate of every request, lower is better: the mean over the scored tokens
# of the request's sample. Every used token scores the token that follows it in its sequence; the last token of a
# sequence scores none. A search passes in one call all requests that do not depend on each other.
Measure = Callable[[Sequence[Request]], Sequence[Sequence[float]]]


class Measurements:
    """Measurements of one step of a search: random numbers, known losses, and counters of their cost.

    lengths: tokens of each calibration sequence. evaluated: number of candidates, summed over all comparisons. tokens:
    number of tokens measured; a candidate is not measured twice on the same tokens.
    """

    def __init__(self, measure: Measure, lengths: Sequence[int], rng: np.random.Generator) -> None:
        self.lengths = lengths
        self.rng = rng
        self.evaluated = 0
        self.tokens = 0
        self._measure = measure
        self._known: dict[tuple[Genome, Sample], float] = {}

    def draw(self, steps: Sequence[int]) -> list[Portions]:
        """A new random sample of steps[i] tokens for each step i; each contains the one before."""
        return draw_nested(self.lengths, steps, self.rng)

    def rank(self, candidates: Sequence[Genome], portions: Portions) -> tuple[list[int], list[float]]:
        """Indices of the candidates from best to worst on one sample, and the loss of each candidate.

        Ties go to the earlier candidate; a loss of nan comes last.
        """
        unknown = [
            Request([genome for genome in candidates if (genome, portion) not in self._known], portion)
            for portion in portions
        ]
        self._ask([request for request in unknown if request.genomes])
        self.evaluated += len(candidates)
        scored = [portion.scored(self.lengths) for portion in portions]
        shares = [count / sum(scored) for count in scored]
        # The mean over the whole sample. Portions are added in order, so that rounding is the same for all candidates
        # and for any number of evaluators. The mean of a single portion is not changed.
        losses = [
            sum(share * self._known[genome, portion] for share, portion in zip(shares, portions, strict=True))
            for genome in candidates
        ]
        return np.argsort(losses, kind="stable").tolist(), losses

    def _ask(self, requests: list[Request]) -> None:
        if not requests:
            return
        for (genomes, sample), measured in zip(requests, self._measure(requests), strict=True):
            losses = [float(loss) for loss in measured]
            if len(losses) != len(genomes):
                raise ValueError(f"measure gave {len(losses)} losses for {len(genomes)} candidates")
            self.tokens += len(genomes) * sample.tokens
            self._known |= {(genome, sample): loss for genome, loss in zip(genomes, losses, strict=True)}
