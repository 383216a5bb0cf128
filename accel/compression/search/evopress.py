"""EvoPress: one parent, many offspring that move a few levels, selected in steps on ever more tokens.

Source: Sieberling et al. 2024, arXiv:2410.14649.
Departs from it: offspring are made as mutation.py says. Another allocator's answer may be among the first candidates. A
part of the model that comes back takes over the levels of the part that goes, and drops are bought and sold for levels.
Each step of the selection compares on the sample of the step before and more, where the paper draws a new one: a
candidate that survives is measured on what is new alone. The price is that the survivors, and not the parent, were
selected on a part of the tokens that they are compared with it on.
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

    offspring: candidates of a generation. survivors, tokens: how many candidates each step of the selection keeps, and
    on how many calibration tokens it compares them, those of the step before among them; the last keeps one, and there
    the parent joins. Where a step ends within a sequence, the next runs that sequence again. initial_candidates,
    initial_tokens: the first parent is the best of so many on so many tokens, where no level alone has the size of the
    budget. mutations: the most switches in one offspring. grouped: False lets all switches be between units of any
    size. across: share of the offspring for which that holds in any case; 0 in the paper. foresight: variants of every
    offspring, of which the one with the least sum of the units' errors is measured; 1 in the paper.
    The defaults fit a small model: 20 thousand tokens a generation. The paper's: 150 generations of 128 offspring,
    survivors (16, 4, 1), tokens (2048, 16384, 131072), here 1.1 million tokens each.
    """

    generations: int = 30
    offspring: int = 16
    survivors: tuple[int, ...] = (4, 2, 1)
    tokens: tuple[int, ...] = (512, 1024, 4096)
    initial_candidates: int = 16
    initial_tokens: int = 1024
    mutations: int = 3
    grouped: bool = True
    across: float = 0.25
    foresight: int = 4

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
        """UserError where the steps of the selection make no sense."""
        survivors, tokens = list(self.survivors), list(self.tokens)
        if len(survivors) != len(tokens):
            fewer = "fewer" if len(survivors) < len(tokens) else "more"
            raise UserError(
                f"survivors={survivors} has {fewer} numbers than tokens={tokens}: "
                "each step of the selection takes one of both"
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
        """The same search of another number of generations."""
        return replace(self, generations=steps)

    def measured_tokens(self, available: int) -> int:
        """Tokens of the first candidates, and those that are new to the candidates of each step of each generation."""
        candidates = [self.offspring, *self.survivors[:-1]]
        new = [after - before for before, after in zip((0, *self.tokens), self.tokens, strict=False)]
        generation = sum(count * tokens for count, tokens in zip(candidates, new, strict=True)) + self.tokens[-1]
        return self.generations * generation + self.initial_candidates * self.initial_tokens

    def check_tokens(self, available: int) -> None:
        """UserError where a step asks for more tokens than are available."""
        for name, asked in (("tokens", self.tokens[-1]), ("initial_tokens", self.initial_tokens)):
            if asked > available:
                shown = list(self.tokens) if name == "tokens" else asked
                raise UserError(f"{name}={shown} asks for {asked} tokens at once: the calibration has {available}")

    def begin(self, problem: Problem, measurements: Measurements) -> Outcome:
        """Generation 0: the best of the first candidates."""
        candidates = problem.space.first(self.initial_candidates, measurements.rng)
        if problem.start is not None and problem.start not in candidates:
            candidates.append(problem.start)
        (sample,) = measurements.draw((self.initial_tokens,))
        order, fitness = measurements.rank(candidates, sample)
        return Outcome(candidates[order[0]], fitness[order[0]], len(candidates), fitness[0])

    def advance(self, problem: Problem, measurements: Measurements, state: State) -> Outcome:
        """One generation: offspring, selection in steps, and the parent again where none is better."""
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
        # First in the list, the parent also wins where an offspring is just as good.
        survivors = [parent, *survivors]
        order, fitness = measurements.rank(survivors, last)
        return Outcome(survivors[order[0]], fitness[order[0]], len(offspring), fitness[0])


def _whole_numbers(name: str, values: object) -> tuple[int, ...]:
    """The values as a tuple; UserError where they are no whole numbers."""
    if not isinstance(values, Sequence) or not all(isinstance(number, int) for number in values):
        raise UserError(f"{name}={values} must be a list of whole numbers, one for each step")
    return tuple(values)
