"""Random search: measure candidates a few random moves away from the start, and take the best.

Source: Bergstra and Bengio 2012, jmlr.org/papers/v13/bergstra12a.html. The baseline every search here is compared with:
measured losses do not change which candidates are tried next.
Departs from it: candidates are not uniform over the space, where hardly any is as good as the answer of a closed form;
they are made from the start by the moves of EvoPress. All are compared on one sample, so that chance favours none.
"""

import math
from dataclasses import dataclass, replace
from typing import ClassVar, cast

import numpy as np

from hasten.accel.compression.search.base import Outcome, Problem, Searcher, State
from hasten.accel.compression.search.measurements import Measurements
from hasten.accel.compression.search.moves import TRIES, Genome, Space
from hasten.accel.compression.search.mutation import Mutation
from hasten.accel.compression.search.samples import Portions, draw_nested
from hasten.accel.errors import UserError


@dataclass(frozen=True)
class RandomSearch(Searcher):
    """Search by candidates that are independent of each other.

    rounds: number of rounds. candidates: number of new candidates of a round. tokens: number of calibration tokens on
    which a candidate is measured, or all where there are fewer. max_moves: a candidate is made from the start by 1 to
    max_moves mutations, uniformly. mutations, grouped, across, foresight: parameters of a mutation, as in EvoPress.
    With the defaults, a round measures as many tokens as a generation of EvoPress with its defaults.
    """

    rounds: int = 30
    candidates: int = 5
    tokens: int = 4096
    max_moves: int = 3
    mutations: int = 3
    grouped: bool = True
    across: float = 0.25
    foresight: int = 1

    step_name: ClassVar[str] = "round"

    def __post_init__(self) -> None:
        for name in ("rounds", "candidates", "tokens", "max_moves", "mutations", "foresight"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise UserError(f"{name}={value} is out of range: a whole number, 1 or more")
        if not 0 <= self.across <= 1:
            raise UserError(f"across={self.across} is out of range: a share from 0 to 1")

    @property
    def steps(self) -> int:
        """Rounds after the start."""
        return self.rounds

    def with_steps(self, steps: int) -> "RandomSearch":
        """The same search with another number of rounds."""
        return replace(self, rounds=steps)

    def measured_tokens(self, available: int) -> int:
        """Tokens of the start and of all candidates."""
        return (1 + self.rounds * self.candidates) * min(self.tokens, available)

    def begin(self, problem: Problem, measurements: Measurements) -> Outcome:
        """The start, or a random first candidate where there is none; all candidates are made from it."""
        (origin,) = problem.space.first(1, measurements.rng) if problem.start is None else [problem.start]
        _, (fitness,) = measurements.rank([origin], self._sample(problem))
        return Outcome(origin, fitness, 1, fitness, list(origin))

    def advance(self, problem: Problem, measurements: Measurements, state: State) -> Outcome:
        """One round: the best of its candidates, or the incumbent where none is better."""
        origin = tuple(cast(list[int], state.memory))
        candidates = self._candidates(problem.space, origin, measurements.rng)
        if candidates:
            order, fitness = measurements.rank(candidates, self._sample(problem))
            best = order[0]
            if fitness[best] < state.fitness or not math.isfinite(state.fitness):
                return Outcome(candidates[best], fitness[best], len(candidates), state.fitness, state.memory)
        return Outcome(state.incumbent, state.fitness, len(candidates), state.fitness, state.memory)

    def _sample(self, problem: Problem) -> Portions:
        """The sample on which all candidates are compared."""
        tokens = min(self.tokens, problem.tokens)
        (sample,) = draw_nested(problem.lengths, (tokens,), np.random.default_rng((problem.seed, 0)))
        return sample

    def _candidates(self, space: Space, origin: Genome, rng: np.random.Generator) -> list[Genome]:
        """Distinct genomes without the origin; fewer than requested where there are not as many."""
        mutation = Mutation(self.mutations, self.grouped, self.across, self.foresight)
        made: dict[Genome, None] = {}
        for _ in range(TRIES * self.candidates):
            if len(made) == self.candidates:
                break
            genome = origin
            for _ in range(int(rng.integers(1, self.max_moves + 1))):
                genome = next(iter(mutation.offspring(space, genome, 1, rng)), genome)
            if genome != origin:
                made[genome] = None
        return list(made)
