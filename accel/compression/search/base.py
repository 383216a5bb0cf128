"""Base class of searchers, which measure candidates within a budget on the model, step after step.

A searcher is the counterpart of an allocator in closed form (allocators/base.py): both spread a budget over
units, but a searcher measures its candidates, by a callback. Samples, resuming, counting and the final comparison with
the start on all tokens are implemented here, once for all searchers; a method implements the beginning and one step.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple, Self, TypeAlias, TypedDict

import numpy as np

from hasten.accel.compression.allocators.base import Allocator, Unit
from hasten.accel.compression.allocators.budgets import BITS, BudgetUnit, check_budget
from hasten.accel.compression.search.measurements import Measure, Measurements
from hasten.accel.compression.search.moves import Genome, Space
from hasten.accel.errors import UserError

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"


class Problem:
    """A search problem.

    units: each gets one level. budget: cost of all units together. lengths: tokens of each calibration sequence. seed:
    0 or more; equal seeds give equal searches. start: choices of another allocator, or None. unit: of the budget, for
    messages. space: units and budget as the moves use them.
    Raises UserError where the budget is out of range of the levels, and where seed or start are not valid.
    """

    def __init__(
        self,
        units: Sequence[Unit],
        budget: int,
        lengths: Sequence[int],
        seed: int,
        start: Sequence[int] | None = None,
        unit: BudgetUnit = BITS,
    ) -> None:
        check_budget(units, budget, unit)
        if seed < 0:
            raise UserError(f"seed={seed} is out of range: 0 or more")
        # A sequence of one token has no token to predict, and is not used.
        self.lengths = [int(length) if length > 1 else 0 for length in lengths]
        self.seed = seed
        self.space = Space(units, budget)
        self.start = None if start is None else self.space.check("start", start)

    @property
    def tokens(self) -> int:
        """Number of calibration tokens."""
        return sum(self.lengths)

    def measurements(self, measure: Measure, step: int) -> Measurements:
        """Measurements of a step, whose random numbers depend only on the seed and the step's number."""
        return Measurements(measure, self.lengths, np.random.default_rng((self.seed, step)))


class StateValues(TypedDict):
    """A state as plain values; fitness is None where it is not finite."""

    step: int
    incumbent: list[int]
    fitness: float | None
    evaluated: int
    tokens: int
    memory: Json


@dataclass(frozen=True)
class State:
    """All that a search needs to resume after a step; step 0 is that of the first candidates.

    incumbent: the best candidate so far by the method's criterion. fitness: its loss on the tokens on which it was
    chosen. evaluated: number of candidates compared so far. tokens: number of tokens measured so far. memory: further
    state of the method.
    """

    step: int
    incumbent: Genome
    fitness: float
    evaluated: int
    tokens: int
    memory: Json = None

    def to_json(self) -> StateValues:
        """The state as JSON values."""
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
        """The state from the values of to_json; a fitness of None becomes infinity."""
        fitness = math.inf if values["fitness"] is None else float(values["fitness"])
        incumbent = tuple(values["incumbent"])
        return cls(values["step"], incumbent, fitness, values["evaluated"], values["tokens"], values["memory"])


@dataclass(frozen=True)
class StepStats:
    """Statistics of one step.

    candidates: number of candidates made. evaluated, tokens: as in State, of this step alone. previous_fitness: loss of
    the previous incumbent on the tokens on which the new one was chosen; in step 0, loss of the first candidate.
    changed: number of units in which the two incumbents differ.
    """

    candidates: int
    evaluated: int
    tokens: int
    previous_fitness: float
    changed: int


class Step(NamedTuple):
    """The state after a step, and the statistics of the step."""

    state: State
    stats: StepStats


class Outcome(NamedTuple):
    """Result of a method's step: the new incumbent with its fitness, and further fields of State and StepStats."""

    incumbent: Genome
    fitness: float
    candidates: int
    previous_fitness: float
    memory: Json = None


class Searcher(ABC):
    """A search for the levels of least loss within a budget that measures candidates on the model.

    Searchers are members of conf/allocator, as allocators in closed form are. step_name: name of a step in messages.
    steps: number of steps after the first candidates; a search of more steps can resume a search of fewer. counts_bits:
    as of an Allocator.
    """

    step_name: ClassVar[str] = "step"
    counts_bits: ClassVar[bool] = False

    @property
    @abstractmethod
    def steps(self) -> int:
        """Steps of the whole search."""

    @abstractmethod
    def with_steps(self, steps: int) -> Self:
        """The same search with another number of steps."""

    @abstractmethod
    def measured_tokens(self, available: int) -> int:
        """Tokens that are measured in all steps, summed over the candidates; `hasten plan` uses it.

        available: number of calibration tokens. An upper bound where samples end with a sequence. The final comparison
        with the start is not included.
        """

    def within(self, available: int) -> Self:
        """The same search with samples of at most so many tokens."""
        return self

    def check_tokens(self, available: int) -> None:
        """UserError where a step needs more calibration tokens at once than are available."""
        if available < 1:
            raise UserError("a search needs calibration sequences of two tokens or more")

    @abstractmethod
    def begin(self, problem: Problem, measurements: Measurements) -> Outcome:
        """The best of the first candidates, which include problem.start."""

    @abstractmethod
    def advance(self, problem: Problem, measurements: Measurements, state: State) -> Outcome:
        """One step from a state on; all random numbers must come from measurements.rng."""

    def fingerprint(self) -> str:
        """Text that is equal for two searches if one can resume from the other's states."""
        return repr(self.with_steps(1))

    def search(self, problem: Problem, measure: Measure, state: State | None = None) -> Iterator[Step]:
        """Iterator over the steps of the search; a step is measured when it is requested.

        state: state to resume from, with the same steps as in the search that was stopped; None begins with step 0.
        Raises UserError, immediately, where the calibration has too few tokens, and where the state is not an
        assignment within the budget.
        """
        self.check_tokens(problem.tokens)
        if state is not None:
            problem.space.check("state", state.incumbent)
        return self._steps(problem, measure, state)

    def answer(self, problem: Problem, measure: Measure, state: State) -> State:
        """The state of the last step, with the start as its incumbent where the start is better on all tokens.

        Steps compare on a part of the tokens, so the incumbent of the last step may be worse than the start.
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


# Members of conf/allocator.
AllocationMethod: TypeAlias = Allocator | Searcher


def _step(number: int, before: State, outcome: Outcome, measurements: Measurements) -> Step:
    evaluated, tokens = before.evaluated + measurements.evaluated, before.tokens + measurements.tokens
    changed = sum(new != old for new, old in zip(outcome.incumbent, before.incumbent, strict=True))
    return Step(
        State(number, outcome.incumbent, outcome.fitness, evaluated, tokens, outcome.memory),
        StepStats(outcome.candidates, measurements.evaluated, measurements.tokens, outcome.previous_fitness, changed),
    )
