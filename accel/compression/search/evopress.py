"""EvoPress: one parent, many offspring that move a few levels, judged in steps on ever more tokens.

Source: Sieberling et al. 2024, arXiv:2410.14649.
Departs from it: the budget is exact bits of any units, so a switch may leave bits over, and half of the offspring spend
them. Groups of equal size trade bits with one another in a share of the offspring (`across`), and always where no unit
has an equal. Another allocator's answer may stand among the first candidates. Of several drafts of an offspring the one
is measured whose units' errors add up to the least (`foresight`): most random switches are worse, and cost as much.
Parts of the model can be dropped in the same search that switches levels: a part that comes back takes over the levels
of the part that goes, and drops are bought and sold for levels. Each step of a generation compares on the sample of the
step before and more, where the paper draws a new one: a candidate that survives is measured on what is new alone. The
price is that the survivors, and not the parent, were chosen on a part of the tokens that they are compared with it on.
The random numbers of a generation follow from the seed and its number alone, so a search that was stopped goes on as if
it never had been.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np

from hasten.accel.compression.allocators.base import Allocator, Unit, check_budget, error, size
from hasten.accel.compression.search.moves import TRIES, Draft, Genome, Space
from hasten.accel.errors import UserError

# Units that a move across groups may change; one that changes more is a jump, which is hardly ever better.
_MAX_CHANGES = 10
# Share of the offspring that spend what is left of the budget. Not all: more bits are not always better.
_SPEND = 0.5
# Share of the offspring that drop parts or bring them back, where levels can be switched too.
_PARTS = 0.25


@dataclass(frozen=True)
class Sample:
    """Calibration tokens that candidates are compared on.

    parts: (number, tokens) of calibration sequences, each used from its start; all are whole but the last.
    """

    parts: tuple[tuple[int, int], ...]

    @property
    def tokens(self) -> int:
        """Tokens of all parts."""
        return sum(used for _, used in self.parts)


# A sample in parts that share no sequence, in an order that tells which were there in an earlier step.
Portions = tuple[Sample, ...]

# Fitness of every candidate on one and the same sample, lower is better: the mean over its scored tokens. Those are all
# that follow a used one in its sequence, one for each used token, but for none for a sequence's last.
Evaluate = Callable[[Sequence[Genome], Sample], Sequence[float]]
# Told of several evaluations before they are asked for, so that they can be made at once.
Prefetch = Callable[[Sequence[tuple[Sequence[Genome], Sample]]], None]


@dataclass(frozen=True)
class State:
    """All that a search needs to go on after a generation.

    generation: 0 for the first candidates. fitness: of the parent, on the tokens that it was chosen on. evaluated:
    candidates compared so far, in every step anew. tokens: of what `evaluate` was asked for them; what a candidate was
    measured on in an earlier step of its generation is not asked for again.
    """

    generation: int
    parent: Genome
    fitness: float
    evaluated: int
    tokens: int

    def to_json(self) -> dict[str, Any]:
        """Plain values; None for a fitness that is no finite number."""
        fitness = self.fitness if math.isfinite(self.fitness) else None
        return {
            "generation": self.generation,
            "parent": list(self.parent),
            "fitness": fitness,
            "evaluated": self.evaluated,
            "tokens": self.tokens,
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "State":
        """The state that to_json wrote; a fitness of None is read as infinite."""
        fitness = math.inf if values["fitness"] is None else float(values["fitness"])
        return cls(values["generation"], tuple(values["parent"]), fitness, values["evaluated"], values["tokens"])


@dataclass(frozen=True)
class Info:
    """What one generation did.

    offspring: candidates made. evaluated, tokens: of this generation alone. parent_fitness: of the old parent on the
    tokens of the last step, to be compared with the new state's fitness; in generation 0, of the first candidate.
    changed: units in which the new parent differs from the old one.
    """

    offspring: int
    evaluated: int
    tokens: int
    parent_fitness: float
    changed: int


@dataclass(frozen=True)
class EvoPress(Allocator):
    """Search that measures candidates on the model.

    offspring: candidates of a generation. survivors, tokens: how many candidates each step of the selection keeps, and
    on how many calibration tokens it compares them, those of the step before among them; the last keeps one, and there
    the parent joins. Where a step ends within a sequence, the next runs that sequence again. initial_candidates,
    initial_tokens: the first parent is the best of so many on so many tokens, where no level alone has the size of the
    budget. mutations: the most switches in one offspring. grouped: False lets all switches be between units of any
    size. across: share of the offspring for which that holds in any case; 0 in the paper. foresight: drafts of every
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

    needs_evaluation: ClassVar[bool] = True

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

    def choose(self, units: Sequence[Unit], budget: int) -> list[int]:
        """UserError: without a model to measure candidates on there is nothing to choose by."""
        raise UserError("allocator=evopress measures its candidates on the model: it needs a search, not an allocation")

    def search(
        self,
        units: Sequence[Unit],
        budget: int,
        evaluate: Evaluate,
        lengths: Sequence[int],
        seed: int,
        state: State | None = None,
        after: Callable[[State, Info], None] | None = None,
        start: Sequence[int] | None = None,
        prefetch: Prefetch | None = None,
    ) -> State:
        """The state after the last generation; its parent takes `budget` bits or less.

        lengths: tokens of each calibration sequence; one of a single token is never used. state: where to go on; the
        result is that of a search that was never stopped. after: called with every new state, that of generation 0
        included. start: choices of another allocator, to join the first candidates. Units inside a dropped part stand
        at their first choice.
        Raises UserError where the budget is out of the levels' reach, where the calibration has too few tokens, and
        where start or state is no assignment within the budget.
        """
        check_budget(units, budget)
        # No token follows, so it would score nothing.
        lengths = [int(length) if length > 1 else 0 for length in lengths]
        self.check_tokens(sum(lengths))
        if seed < 0:
            raise UserError(f"seed={seed} is out of range: 0 or more")
        space = Space(units, budget)
        if state is None:
            judge = _Judge(evaluate, prefetch, lengths, np.random.default_rng((seed, 0)))
            state, info = self._begin(space, judge, None if start is None else space.check("start", start))
            if after is not None:
                after(state, info)
        space.check("state", state.parent)
        for generation in range(state.generation + 1, self.generations + 1):
            judge = _Judge(evaluate, prefetch, lengths, np.random.default_rng((seed, generation)))
            state, info = self._next(space, judge, state)
            if after is not None:
                after(state, info)
        if start is None:
            return state
        judge = _Judge(evaluate, prefetch, lengths, np.random.default_rng((seed, self.generations + 1)))
        return self._settle(judge, state, space.check("start", start), sum(lengths))

    @staticmethod
    def _settle(judge: "_Judge", state: State, start: Genome, tokens: int) -> State:
        """The state with the start for its parent where that is better on all tokens: each generation saw a few."""
        if start == state.parent:
            return state
        (whole,) = judge.draw([tokens])
        both = [start, state.parent]
        order, fitness = judge.rank(both, whole)
        evaluated, tokens = state.evaluated + judge.evaluated, state.tokens + judge.tokens
        return State(state.generation, both[order[0]], fitness[order[0]], evaluated, tokens)

    def check_tokens(self, available: int) -> None:
        """UserError where a step asks for more tokens than are available."""
        for name, asked in (("tokens", self.tokens[-1]), ("initial_tokens", self.initial_tokens)):
            if asked > available:
                shown = list(self.tokens) if name == "tokens" else asked
                raise UserError(f"{name}={shown} asks for {asked} tokens at once: the calibration has {available}")

    def _begin(self, space: Space, judge: "_Judge", start: Genome | None) -> tuple[State, Info]:
        """Generation 0: the best of the first candidates."""
        candidates = space.first(self.initial_candidates, judge.rng)
        if start is not None and start not in candidates:
            candidates.append(start)
        (sample,) = judge.draw((self.initial_tokens,))
        order, fitness = judge.rank(candidates, sample)
        best = order[0]
        state = State(0, candidates[best], fitness[best], judge.evaluated, judge.tokens)
        return state, Info(len(candidates), judge.evaluated, judge.tokens, fitness[0], 0)

    def _next(self, space: Space, judge: "_Judge", state: State) -> tuple[State, Info]:
        """One generation: offspring, selection in steps, and the parent again where none is better."""
        offspring = self._offspring(space, state.parent, judge.rng)
        generation, left = state.generation + 1, offspring
        if not offspring:
            known = State(generation, state.parent, state.fitness, state.evaluated, state.tokens)
            return known, Info(0, 0, 0, state.fitness, 0)
        *samples, last = judge.draw(self.tokens)
        for keep, sample in zip(self.survivors[:-1], samples, strict=True):
            order, _ = judge.rank(left, sample)
            left = [left[index] for index in order[:keep]]
        # First in the list, the parent also wins where an offspring is just as good.
        left = [state.parent, *left]
        order, fitness = judge.rank(left, last)
        parent = left[order[0]]
        evaluated, tokens = state.evaluated + judge.evaluated, state.tokens + judge.tokens
        changed = sum(new != old for new, old in zip(parent, state.parent, strict=True))
        return (
            State(generation, parent, fitness[order[0]], evaluated, tokens),
            Info(len(offspring), judge.evaluated, judge.tokens, fitness[0], changed),
        )

    def _offspring(self, space: Space, parent: Genome, rng: np.random.Generator) -> list[Genome]:
        """Different genomes within the budget, none of them the parent's."""
        found: dict[Genome, None] = {}
        for _ in range(TRIES * self.offspring):
            if len(found) == self.offspring:
                break
            drafts = [Draft(space, parent) for _ in range(self.foresight)]
            fitting = [tuple(draft.genome) for draft in drafts if self._mutate(draft, rng)]
            new = [genome for genome in fitting if genome != parent and genome not in found]
            if new:
                found[min(new, key=partial(error, space.units))] = None
        assert all(size(space.units, genome) <= space.budget for genome in found), "an offspring is over the budget"
        return list(found)

    def _mutate(self, draft: Draft, rng: np.random.Generator) -> bool:
        """Whether a few random changes led to a genome within the budget."""
        space, parent = draft.space, list(draft.genome)
        switches = int(rng.integers(1, self.mutations + 1, 2).min())  # the smaller of two: few changes are more likely
        if space.parts and (not space.groups or rng.random() < _PARTS):
            if space.groups and (not draft.swappable() or rng.random() < 0.5):
                draft.trade(rng)
            else:
                draft.swap(switches, rng)
            if not draft.lower(rng, set()):
                return False
            draft.spend(rng)
            return True
        # A unit without an equal can only move across groups, and within one group there is nothing to cross.
        share = max(space.alone, self.across if len(space.groups) > 1 else 0.0) if self.grouped else 1.0
        across = rng.random() < share
        if across and not draft.shift(switches, rng):
            return False
        if not across:
            draft.switch(switches, rng)
        if rng.random() < _SPEND:
            draft.spend(rng)
        changes = sum(new != old for new, old in zip(draft.genome, parent, strict=True))
        return not across or changes <= _MAX_CHANGES


class _Judge:
    """The evaluations of one generation: its random numbers, what is known of its candidates, and what it has cost."""

    def __init__(
        self, evaluate: Evaluate, prefetch: Prefetch | None, lengths: Sequence[int], rng: np.random.Generator
    ) -> None:
        self.rng = rng
        self._prefetch = prefetch
        self.evaluated = 0
        self.tokens = 0
        self._evaluate = evaluate
        self._lengths = lengths
        self._known: dict[tuple[Genome, Sample], float] = {}

    def draw(self, steps: Sequence[int]) -> list[Portions]:
        """A new sample for each step, of so many tokens; each holds the one before."""
        return draw(self._lengths, steps, self.rng)

    def rank(self, candidates: list[Genome], portions: Portions) -> tuple[list[int], list[float]]:
        """Places of the candidates from the best to the worst on one sample, and the fitness of each.

        Of equals the earlier comes first; what is not a number comes last.
        """
        lots = [([each for each in candidates if (each, portion) not in self._known], portion) for portion in portions]
        if self._prefetch is not None:
            self._prefetch(lots)
        for lot in lots:
            self._measure(*lot)
        self.evaluated += len(candidates)
        scored = [self._scored(portion) for portion in portions]
        shares = [each / sum(scored) for each in scored]
        # The mean over the whole sample, but for rounding, which is the same for all and with any number of evaluators:
        # portions are added in their order. The mean of a single one stays as it is.
        fitness = [
            sum(share * self._known[each, portion] for share, portion in zip(shares, portions, strict=True))
            for each in candidates
        ]
        return np.argsort(fitness, kind="stable").tolist(), fitness

    def _measure(self, candidates: list[Genome], portion: Sample) -> None:
        if not candidates:
            return
        means = [float(value) for value in self._evaluate(candidates, portion)]
        if len(means) != len(candidates):
            raise ValueError(f"evaluate gave {len(means)} values for {len(candidates)} candidates")
        self.tokens += len(candidates) * portion.tokens
        self._known |= {(each, portion): mean for each, mean in zip(candidates, means, strict=True)}

    def _scored(self, portion: Sample) -> int:
        return sum(min(used, self._lengths[number] - 1) for number, used in portion.parts)


def draw(lengths: Sequence[int], steps: Sequence[int], rng: np.random.Generator) -> list[Portions]:
    """A random sample for each step, of so many tokens; each holds the one before, and what it shares with it is first.

    Sequences are used in one random order, each at most once; the lengths add up to the tokens of every step, which
    never fall. A sequence that a step cuts is a portion of its own, which the next step has instead of it whole or
    longer, unless that is the last step: there nothing grows, and all that is new is one portion.
    """
    order = [(number, length) for number, length in enumerate(lengths) if length]
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


def _whole_numbers(name: str, values: Any) -> tuple[int, ...]:
    """The values as a tuple; UserError where they are no whole numbers."""
    try:
        numbers = tuple(values)
    except TypeError:
        numbers = (None,)
    if isinstance(values, str) or not all(isinstance(number, int) for number in numbers):
        raise UserError(f"{name}={values} must be a list of whole numbers, one for each step")
    return numbers
