"""Candidates compared on samples: only what has not been measured yet is asked for, and its tokens are counted."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from hasten.accel.compression.search.moves import Genome
from hasten.accel.compression.search.samples import Portions, Sample, draw_nested


class Request(NamedTuple):
    """Different candidates that are to be measured on one sample."""

    genomes: Sequence[Genome]
    sample: Sample


# The loss of every candidate of every request, lower is better: the mean over the scored tokens of the request's
# sample. Scored are all tokens that follow a used one in its sequence: one for each used token, but none for the last
# of a sequence. A search asks for everything that it can have measured at once in one call.
Measure = Callable[[Sequence[Request]], Sequence[Sequence[float]]]


class Measurements:
    """What one step of a search measures: its random numbers, the losses known so far, and what they cost.

    lengths: tokens of the calibration sequences. evaluated: candidates compared, anew in every comparison. tokens: what
    was measured for that; what a candidate was measured on in an earlier comparison is not measured again.
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
        """Places of the candidates from the best to the worst on one sample, and the loss of each.

        Of equals the earlier comes first; what is not a number comes last.
        """
        unknown = [
            Request([genome for genome in candidates if (genome, portion) not in self._known], portion)
            for portion in portions
        ]
        self._ask([request for request in unknown if request.genomes])
        self.evaluated += len(candidates)
        scored = [portion.scored(self.lengths) for portion in portions]
        shares = [count / sum(scored) for count in scored]
        # The mean over the whole sample, but for rounding, which is the same for all and with any number of evaluators:
        # portions are added in their order. The mean of a single one stays as it is.
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
