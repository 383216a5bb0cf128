"""EvoPress: evolutionary search with one parent; offspring change a few levels and are selected on ever more tokens.

Source: Sieberling et al. 2024, arXiv:2410.14649.
Departs from it: for offspring see mutation.py. Another allocator's answer may be among the first candidates. A restored
part of the model takes over the levels of the part that is dropped for it, and drops are traded for levels. The sample
of each selection step contains that of the step before, where the paper draws a new one: a survivor is measured only on
the new tokens. The cost is a bias: survivors were selected on a part of the tokens on which they are then compared with
the parent.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from hasten.accel.compression.search.base import Outcome, Problem, Searcher, State
from hasten.accel.compression.search.measurements import Measurements
from hasten.accel.compression.search.mutation import Mutation
from hasten.accel.errors import UserError


@dataclass(frozen=True)
class EvoPress(Searcher):
    """Evolutionary search with one parent.

    offspring: candidates of a generation. survivors, tokens: for each selection step the number of candidates that it
    keeps, and the number of calibration tokens on which it compares them, including those of the step before; the
    parent joins the last step, which keeps one. A sequence that a step uses only in part runs again in the next step.
    initial_candidates, initial_tokens: the first parent is the best of this many candidates on this many tokens; where
    a single level has exactly the size of the budget, it is the only candidate. mutations: maximum number of switches
    in an offspring. grouped: True limits switches to units of equal sizes. across: share of the offspring that is
    exempt from that; 0 in the paper. foresight: variants made of every offspring, of which the one with the least sum
    of the units' errors is measured; 1 in the paper.
    The defaults suit a small model and a start that is close to the best: 20 thousand tokens a generation. The paper
    has 150 generations of 128 offspring with survivors (16, 4, 1) and tokens (2048, 16384, 131072), which are here 1.1
    million tokens a generation.
    """

    generations: int = 10
    offspring: int = 16
    survivors: tuple[int, ...] = (4, 2, 1)
    tokens: tuple[int, ...] = (512, 1024, 4096)
    initial_candidates: int = 16
    initial_tokens: int = 1024
    mutations: int = 3
    grouped: bool = True
    across: float = 0.25
    foresight: int = 16

    step_name: ClassVar[str] = "generation"

    def __post_init__(self) -> None:
        for name in ("survivors", "tokens"):
            object.__setattr__(self, name, _whole_numbers(name, getattr(self, name)))
        for name in ("generations", "offspring", "initial_candidates", "initial_tokens", "mutations", "foresight"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise UserError(f"{name}={value} is out of range: a whole number, 1 or more")
        if not 0 <= self.across <= 1:
            raise UserError(f"across={self.across} is out of range: a share from 0 to 1")
        self._check_steps()

    def _check_steps(self) -> None:
        """UserError where the selection steps are not valid."""
        survivors, tokens = list(self.survivors), list(self.tokens)
        if len(survivors) != len(tokens):
            fewer = "fewer" if len(survivors) < len(tokens) else "more"
            raise UserError(
                f"survivors={survivors} has {fewer} numbers than tokens={tokens}: each selection step takes one of both"
            )
        if not survivors or min(survivors) < 1 or survivors != sorted(survivors, reverse=True):
            raise UserError(f"survivors={survivors} must be whole numbers from 1 up that never rise, one for each step")
        if min(tokens) < 1 or tokens != sorted(tokens):
            raise UserError(f"tokens={tokens} must be whole numbers from 1 up that never fall, one for each step")
        if survivors[-1] != 1:
            raise UserError(f"survivors={survivors} must end with 1: the last step leaves one, the next parent")
        if survivors[0] < len(survivors):
            raise UserError(f"survivors={survivors} begins with fewer survivors than its {len(survivors)} steps")
        if survivors[0] > self.offspring + 1:
            raise UserError(
                f"survivors={survivors} begins with more than offspring={self.offspring} and the parent: keep at most "
                f"{self.offspring + 1}"
            )

    @property
    def steps(self) -> int:
        """Generations after the first candidates."""
        return self.generations

    def with_steps(self, steps: int) -> "EvoPress":
        """The same search with another number of generations."""
        return replace(self, generations=steps)

    def within(self, available: int) -> "EvoPress":
        """Selection steps of no more tokens than there are."""
        tokens = tuple(min(count, available) for count in self.tokens)
        return replace(self, tokens=tokens, initial_tokens=min(self.initial_tokens, available))

    def measured_tokens(self, available: int) -> int:
        """Tokens of the first candidates, and the new tokens of each selection step of each generation."""
        candidates = [self.offspring, *self.survivors[:-1]]
        new = [after - before for before, after in zip((0, *self.tokens), self.tokens, strict=False)]
        generation = sum(count * tokens for count, tokens in zip(candidates, new, strict=True)) + self.tokens[-1]
        return self.generations * generation + self.initial_candidates * self.initial_tokens

    def check_tokens(self, available: int) -> None:
        """UserError where a step needs more tokens than are available."""
        for name, needed in (("tokens", self.tokens[-1]), ("initial_tokens", self.initial_tokens)):
            if needed > available:
                value = list(self.tokens) if name == "tokens" else needed
                raise UserError(f"{name}={value} asks for {needed} tokens at once: the calibration has {available}")

    def begin(self, problem: Problem, measurements: Measurements) -> Outcome:
        """Generation 0: the best of the first candidates."""
        candidates = problem.space.first(self.initial_candidates, measurements.rng)
        if problem.start is not None and problem.start not in candidates:
            candidates.append(problem.start)
        (sample,) = measurements.draw((self.initial_tokens,))
        order, fitness = measurements.rank(candidates, sample)
        return Outcome(candidates[order[0]], fitness[order[0]], len(candidates), fitness[0])

    def advance(self, problem: Problem, measurements: Measurements, state: State) -> Outcome:
        """One generation: offspring, selection in steps, and the parent again where no offspring is better."""
        parent = state.incumbent
        mutation = Mutation(self.mutations, self.grouped, self.across, self.foresight)
        offspring = mutation.offspring(problem.space, parent, self.offspring, measurements.rng)
        if not offspring:
            return Outcome(parent, state.fitness, 0, state.fitness)
        survivors = offspring
        *samples, last = measurements.draw(self.tokens)
        for count, sample in zip(self.survivors[:-1], samples, strict=True):
            order, _ = measurements.rank(survivors, sample)
            survivors = [survivors[place] for place in order[:count]]
        # The parent is first in the list, so that it wins ties.
        survivors = [parent, *survivors]
        order, fitness = measurements.rank(survivors, last)
        return Outcome(survivors[order[0]], fitness[order[0]], len(offspring), fitness[0])


def _whole_numbers(name: str, values: object) -> tuple[int, ...]:
    """The values as a tuple; UserError where they are not a list of whole numbers."""
    if not isinstance(values, Sequence) or not all(isinstance(number, int) for number in values):
        raise UserError(f"{name}={values} must be a list of whole numbers, one for each step")
    return tuple(values)
