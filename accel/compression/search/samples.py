"""Samples of calibration tokens that candidates are compared on; each step's sample contains the one before."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Sample:
    """Calibration tokens that candidates are compared on.

    parts: (index, tokens) of calibration sequences, each used from its start.
    """

    parts: tuple[tuple[int, int], ...]

    @property
    def tokens(self) -> int:
        """Tokens of all parts."""
        return sum(used for _, used in self.parts)

    def scored(self, lengths: Sequence[int]) -> int:
        """Tokens that have a next token to predict; lengths: of all calibration sequences."""
        return sum(min(used, lengths[index] - 1) for index, used in self.parts)


# A sample in portions that share no sequence. Portions that an earlier step measured come first.
Portions = tuple[Sample, ...]


def draw_nested(lengths: Sequence[int], steps: Sequence[int], rng: np.random.Generator) -> list[Portions]:
    """A random sample of steps[i] tokens for each step i; each contains the sample before it, as its first portions.

    Sequences are used in one random order, each at most once, empty ones never. The lengths add up to the tokens of
    every step or more, and steps never fall. A sequence that a step cuts is a portion of its own, which the next step
    replaces by the whole sequence or by more of it. In the last step nothing grows, so all that is new is one portion.
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
            assert taken < len(order), "more tokens asked for than there are"
            cut = [(order[taken][0], tokens - whole)]
        added = [new + cut] if step == len(steps) else [new, cut]
        samples.append((*kept, *(Sample(tuple(parts)) for parts in added if parts)))
        kept = (*kept, Sample(tuple(new))) if new else kept
    return samples
