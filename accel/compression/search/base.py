"""What a search is: candidates within a budget of bits are measured on the model, step after step, and the best wins.

A searcher is the counterpart of an allocator in closed form (allocators/base.py): both spread a budget of bits over
units, but a searcher measures its candidates, and so takes a callback that does. Samples, resuming, counting and the
comparison with the start on all tokens are done here, once for all searchers; a method says how it begins, and what it
does in a step.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple, Self, TypeAlias, TypedDict

import numpy as np

from hasten.accel.compression.allocators.base import Allocator, Unit, check_budget
from hasten.accel.compression.search.measurements import Measure, Measurements
from hasten.accel.compression.search.moves import Genome, Space
from hasten.accel.errors import UserError

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"


class Problem:
    """What is searched.

    units, budget: what gets a level each, and the bits that all of them may take. lengths: tokens of each calibration
    sequence. seed: 0 or more; a search repeats itself from it. start: choices of another allocator, None for none.
    space: the units and the budget as moves see them; start is a genome of it.
    Raises UserError where the budget is out of the levels' reach, and where seed or start make no sense.
    """

    def __init__(
        self, units: Sequence[Unit], budget: int, lengths: Sequence[int], seed: int, start: Sequence[int] | None = None
    ) -> None:
        check_budget(units, budget)
        if seed < 0:
            raise UserError(f"seed={seed} is out of range: 0 or more")
        # A sequence of one token has nothing to predict, and would score nothing.
        self.lengths = [int(length) if length > 1 else 0 for length in lengths]
        self.seed = seed
        self.space = Space(units, budget)
        self.start = None if start is None else self.space.check("start", start)

    @property
    def tokens(self) -> int:
        """Calibration tokens that there are."""
        return sum(self.lengths)

    def measurements(self, measure: Measure, step: int) -> Measurements:
        """Those of a step, whose random numbers follow from the seed and the step's number alone."""
        return Measurements(measure, self.lengths, np.random.default_rng((self.seed, step)))


class StateValues(TypedDict):
    """A state as plain values; fitness is None where it is no finite number."""

    step: int
    incumbent: list[int]
    fitness: float | None
    evaluated: int
    tokens: int
    memory: Json


@dataclass(frozen=True)
class State:
    """All that a search needs to go on after a step, which is 0 for the first candidates.

    incumbent: the best candidate so far, as the method judges it. fitness: its loss on the tokens that it was chosen
    on. evaluated: candidates compared so far. tokens: measured for that. memory: what else the method has to remember.
    """

    step: int
    incumbent: Genome
    fitness: float
    evaluated: int
    tokens: int
    memory: Json = None

    def to_json(self) -> StateValues:
        """The state as values that JSON has."""
        return {
            "step": self.step,
            "incumbent": list(self.incumbent),
            "fitness": self.fitness if math.isfinite(self.fitness) else None,
            "evaluated": self.evaluated,
            "tokens": self.tokens,
            "memory": self.memory,
        }

    @classmethod
    def from_json(cls, values: StateValues) -> "State":
        """The state that to_json wrote; a fitness of None is read as infinite."""
        fitness = math.inf if values["fitness"] is None else float(values["fitness"])
        incumbent = tuple(values["incumbent"])
        return cls(values["step"], incumbent, fitness, values["evaluated"], values["tokens"], values["memory"])


@dataclass(frozen=True)
class StepStats:
    """What one step did.

    candidates: made. evaluated, tokens: of this step alone, as in State. previous_fitness: of the previous incumbent,
    on the tokens that the new one was chosen on; in step 0, of the first candidate. changed: units in which these two
    differ.
    """

    candidates: int
    evaluated: int
    tokens: int
    previous_fitness: float
    changed: int


class Step(NamedTuple):
    """The state after a step, and what the step did."""

    state: State
    stats: StepStats


class Outcome(NamedTuple):
    """What a method makes of one step: the new incumbent with its fitness, and what State and StepStats tell of it."""

    incumbent: Genome
    fitness: float
    candidates: int
    previous_fitness: float
    memory: Json = None


class Searcher(ABC):
    """A search for the levels of least loss within a budget of bits, which measures its candidates on the model.

    A member of conf/allocator, as the allocators in closed form are. step_name: what one step is called. steps: how
    many there are after the first candidates; a search of more steps goes on from the state of one of fewer.
    """

    step_name: ClassVar[str] = "step"

    @property
    @abstractmethod
    def steps(self) -> int:
        """Steps of the whole search."""

    @abstractmethod
    def with_steps(self, steps: int) -> Self:
        """The same search with another number of steps."""

    @abstractmethod
    def measured_tokens(self, available: int) -> int:
        """Tokens that candidates are measured on in all steps together, summed over the candidates.

        What `hasten plan` goes by. available: calibration tokens that there are. An upper bound where samples end with
        a sequence; the comparison with the start at the end is not counted.
        """

    def check_tokens(self, available: int) -> None:
        """UserError where a step needs more calibration tokens at once than are available."""
        if available < 1:
            raise UserError("a search needs calibration sequences of two tokens or more")

    @abstractmethod
    def begin(self, problem: Problem, measurements: Measurements) -> Outcome:
        """The best of the first candidates, problem.start among them."""

    @abstractmethod
    def advance(self, problem: Problem, measurements: Measurements, state: State) -> Outcome:
        """One step from a state on; random numbers are measurements.rng's alone."""

    def fingerprint(self) -> str:
        """Text that is equal for searches of which one can go on from the other's states."""
        return repr(self.with_steps(1))

    def search(self, problem: Problem, measure: Measure, state: State | None = None) -> Iterator[Step]:
        """The steps of the search, each measured when it is asked for.

        state: where to go on; what follows is what followed it in the search that was stopped. None is the beginning,
        which yields step 0. Raises UserError, at once, where the calibration has too few tokens, and where the state is
        no assignment within the budget.
        """
        self.check_tokens(problem.tokens)
        if state is not None:
            problem.space.check("state", state.incumbent)
        return self._steps(problem, measure, state)

    def answer(self, problem: Problem, measure: Measure, state: State) -> State:
        """The state of the last step, or the start in its place where that is better on all tokens.

        Steps compare on a part of the tokens, so that what they prefer to the start may be worse.
        """
        if problem.start is None or problem.start == state.incumbent:
            return state
        measurements = problem.measurements(measure, self.steps + 1)
        (whole,) = measurements.draw([problem.tokens])
        both = [problem.start, state.incumbent]
        order, losses = measurements.rank(both, whole)
        return replace(
            state,
            incumbent=both[order[0]],
            fitness=losses[order[0]],
            evaluated=state.evaluated + measurements.evaluated,
            tokens=state.tokens + measurements.tokens,
        )

    def _steps(self, problem: Problem, measure: Measure, state: State | None) -> Iterator[Step]:
        if state is None:
            measurements = problem.measurements(measure, 0)
            outcome = self.begin(problem, measurements)
            none = State(0, outcome.incumbent, outcome.fitness, 0, 0)
            step = _step(0, none, outcome, measurements)
            yield step
            state = step.state
        for number in range(state.step + 1, self.steps + 1):
            measurements = problem.measurements(measure, number)
            step = _step(number, state, self.advance(problem, measurements, state), measurements)
            yield step
            state = step.state


# What conf/allocator holds.
AllocationMethod: TypeAlias = Allocator | Searcher


def _step(number: int, before: State, outcome: Outcome, measurements: Measurements) -> Step:
    evaluated, tokens = before.evaluated + measurements.evaluated, before.tokens + measurements.tokens
    changed = sum(new != old for new, old in zip(outcome.incumbent, before.incumbent, strict=True))
    return Step(
        State(number, outcome.incumbent, outcome.fitness, evaluated, tokens, outcome.memory),
        StepStats(outcome.candidates, measurements.evaluated, measurements.tokens, outcome.previous_fitness, changed),
    )
