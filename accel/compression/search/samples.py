"""Samples of calibration tokens on which candidates are compared; a step's sample contains that of the step before."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Sample:
    """Calibration tokens on which candidates are compared.

    parts: (index of a calibration sequence, number of its first tokens that are used).
    """

    parts: tuple[tuple[int, int], ...]

    @property
    def tokens(self) -> int:
        """Tokens of all parts."""
        return sum(used for _, used in self.parts)

    def scored(self, lengths: Sequence[int]) -> int:
        """Number of tokens with a next token to predict. lengths: tokens of all calibration sequences."""
        return sum(min(used, lengths[index] - 1) for index, used in self.parts)


# A sample as a sequence of disjoint portions. Portions that an earlier step measured come first.
Portions = tuple[Sample, ...]


def draw_nested(lengths: Sequence[int], steps: Sequence[int], rng: np.random.Generator) -> list[Portions]:
    """A random sample of steps[i] tokens for each step i; the first portions of a sample are those of the one before.

    Sequences are used in one random order, each at most once, empty ones never. Requires steps that never fall, and as
    many tokens in all sequences. A sequence that a step uses in part is a separate portion, which the next step
    replaces by more of the sequence. After the last step no portion grows, so its new tokens are one portion.
    """
    order = [(index, length) for index, length in enumerate(lengths) if length]
    order = [order[place] for place in rng.permutation(len(order)).tolist()]
    samples: list[Portions] = []
    kept: Portions = ()
    whole = taken = 0
    for step, tokens in enumerate(steps, 1):
        begin = taken
        while taken < len(order) and whole + order[taken][1] <= tokens:
            whole += order[taken][1]
            taken += 1
        new, cut = sorted(order[begin:taken]), []
        if whole < tokens:
            assert taken < len(order), "more tokens requested than there are"
            cut = [(order[taken][0], tokens - whole)]
        added = [new + cut] if step == len(steps) else [new, cut]
        samples.append((*kept, *(Sample(tuple(parts)) for parts in added if parts)))
        kept = (*kept, Sample(tuple(new))) if new else kept
    return samples
