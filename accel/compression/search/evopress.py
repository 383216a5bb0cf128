"""EvoPress: one parent, many offspring that move a few levels, judged in steps on ever more tokens.

Source: Sieberling et al. 2024, arXiv:2410.14649.
Departs from it: the budget is exact bits of any units, so a switch may leave bits over, and half of the offspring spend
them. Groups of equal size trade bits with one another in a share of the offspring (`across`), and always where no unit
has an equal. Another allocator's answer may stand among the first candidates. Parts of the model can be dropped in the
same search that switches levels: a part that comes back takes over the levels of the part that goes, and drops are
bought and sold for levels. The random numbers of a generation follow from the seed and its number alone, so a search
that was stopped goes on as if it never had been.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from accel.compression.allocation.base import DROP, Allocator, Unit, check_budget, left_out, size
from accel.errors import UserError

# Index of the choice of every unit.
Genome = tuple[int, ...]

# Attempts at an offspring before a generation does with fewer: small problems run out of genomes.
_TRIES = 20
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


# Fitness of every candidate on one and the same sample; lower is better.
Evaluate = Callable[[Sequence[Genome], Sample], Sequence[float]]


@dataclass(frozen=True)
class State:
    """All that a search needs to go on after a generation.

    generation: 0 for the first candidates. fitness: of the parent, on the tokens that it was chosen on. evaluated,
    tokens: candidates handed to `evaluate` so far, one seen before counted again, and tokens of their samples.
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
    on how many calibration tokens it compares them; the last keeps one, and there the parent joins. initial_candidates,
    initial_tokens: the first parent is the best of so many on so many tokens, where no level alone has the size of the
    budget. mutations: the most switches in one offspring. grouped: False lets all switches be between units of any
    size. across: share of the offspring for which that holds in any case; 0 in the paper.
    The defaults fit a small model: 25 thousand tokens a generation. The paper's: 150 generations of 128 offspring,
    survivors (16, 4, 1), tokens (2048, 16384, 131072), 1.2 million tokens each.
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

    needs_evaluation: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in ("survivors", "tokens"):
            object.__setattr__(self, name, _whole_numbers(name, getattr(self, name)))
        for name in ("generations", "offspring", "initial_candidates", "initial_tokens", "mutations"):
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
    ) -> State:
        """The state after the last generation; its parent takes `budget` bits or less.

        lengths: tokens of each calibration sequence. state: where to go on; the result is that of a search that was
        never stopped. after: called with every new state, that of generation 0 included. start: choices of another
        allocator, to join the first candidates. Units inside a dropped part stand at their first choice.
        Raises UserError where the budget is out of the levels' reach, where the calibration has too few tokens, and
        where start or state is no assignment within the budget.
        """
        check_budget(units, budget)
        self.check_tokens(sum(lengths))
        if seed < 0:
            raise UserError(f"seed={seed} is out of range: 0 or more")
        space = _Space(units, budget)
        if state is None:
            judge = _Judge(evaluate, lengths, np.random.default_rng((seed, 0)))
            state, info = self._begin(space, judge, None if start is None else space.check("start", start))
            if after is not None:
                after(state, info)
        space.check("state", state.parent)
        for generation in range(state.generation + 1, self.generations + 1):
            judge = _Judge(evaluate, lengths, np.random.default_rng((seed, generation)))
            state, info = self._next(space, judge, state)
            if after is not None:
                after(state, info)
        return state

    def check_tokens(self, available: int) -> None:
        """UserError where a step asks for more tokens than are available."""
        for name, asked in (("tokens", self.tokens[-1]), ("initial_tokens", self.initial_tokens)):
            if asked > available:
                shown = list(self.tokens) if name == "tokens" else asked
                raise UserError(f"{name}={shown} asks for {asked} tokens at once: the calibration has {available}")

    def _begin(self, space: "_Space", judge: "_Judge", start: Genome | None) -> tuple[State, Info]:
        """Generation 0: the best of the first candidates."""
        candidates = space.first(self.initial_candidates, judge.rng)
        if start is not None and start not in candidates:
            candidates.append(start)
        order, fitness = judge.rank(candidates, self.initial_tokens)
        best = order[0]
        state = State(0, candidates[best], fitness[best], judge.evaluated, judge.tokens)
        return state, Info(len(candidates), judge.evaluated, judge.tokens, fitness[0], 0)

    def _next(self, space: "_Space", judge: "_Judge", state: State) -> tuple[State, Info]:
        """One generation: offspring, selection in steps, and the parent again where none is better."""
        offspring = self._offspring(space, state.parent, judge.rng)
        generation, left = state.generation + 1, offspring
        if not offspring:
            known = State(generation, state.parent, state.fitness, state.evaluated, state.tokens)
            return known, Info(0, 0, 0, state.fitness, 0)
        for keep, tokens in zip(self.survivors[:-1], self.tokens[:-1], strict=True):
            order, _ = judge.rank(left, tokens)
            left = [left[index] for index in order[:keep]]
        # First in the list, the parent also wins where an offspring is just as good.
        left = [state.parent, *left]
        order, fitness = judge.rank(left, self.tokens[-1])
        parent = left[order[0]]
        evaluated, tokens = state.evaluated + judge.evaluated, state.tokens + judge.tokens
        changed = sum(new != old for new, old in zip(parent, state.parent, strict=True))
        return (
            State(generation, parent, fitness[order[0]], evaluated, tokens),
            Info(len(offspring), judge.evaluated, judge.tokens, fitness[0], changed),
        )

    def _offspring(self, space: "_Space", parent: Genome, rng: np.random.Generator) -> list[Genome]:
        """Different genomes within the budget, none of them the parent's."""
        found: dict[Genome, None] = {}
        for _ in range(_TRIES * self.offspring):
            if len(found) == self.offspring:
                break
            draft = _Draft(space, parent)
            if self._mutate(draft, rng) and draft.genome != list(parent):
                found[tuple(draft.genome)] = None
        assert all(size(space.units, genome) <= space.budget for genome in found), "an offspring is over the budget"
        return list(found)

    def _mutate(self, draft: "_Draft", rng: np.random.Generator) -> bool:
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
    """The evaluations of one generation: its random numbers, and what it has cost so far."""

    def __init__(self, evaluate: Evaluate, lengths: Sequence[int], rng: np.random.Generator) -> None:
        self.rng = rng
        self.evaluated = 0
        self.tokens = 0
        self._evaluate = evaluate
        self._lengths = lengths

    def rank(self, candidates: list[Genome], tokens: int) -> tuple[list[int], list[float]]:
        """Places of the candidates from the best to the worst on one new sample, and the fitness of each.

        Of equals the earlier comes first; what is not a number comes last.
        """
        sample = draw(self._lengths, tokens, self.rng)
        fitness = [float(value) for value in self._evaluate(candidates, sample)]
        if len(fitness) != len(candidates):
            raise ValueError(f"evaluate gave {len(fitness)} values for {len(candidates)} candidates")
        self.evaluated += len(candidates)
        self.tokens += len(candidates) * sample.tokens
        return np.argsort(fitness, kind="stable").tolist(), fitness


def draw(lengths: Sequence[int], tokens: int, rng: np.random.Generator) -> Sample:
    """Random calibration sequences, each at most once, of `tokens` tokens together; the lengths add up to as many."""
    parts: list[tuple[int, int]] = []
    missing = tokens
    for number in rng.permutation(len(lengths)).tolist():
        used = min(int(lengths[number]), missing)
        if used:
            parts.append((number, used))
        missing -= used
        if not missing:
            break
    assert not missing, "more tokens asked for than there are"
    return Sample((*sorted(parts[:-1]), parts[-1]))


class _Space:
    """Units and budget as the moves see them; all units are named by their place.

    groups: units of the same bits at every choice, of those that have more than one; parts that can be dropped are in
    none. group: that of each such unit. alone: share of the grouped units that have no equal. parts: places of `drop`
    and of the other choice. inside: of every part, all that is left out with it.
    """

    def __init__(self, units: Sequence[Unit], budget: int) -> None:
        self.units = tuple(units)
        self.budget = budget
        self.bits = [[choice.bits for choice in unit.choices] for unit in units]
        place = {unit.name: index for index, unit in enumerate(units)}
        holders = {unit.part_of for unit in units} - {None}
        self.parts: dict[int, tuple[int, int]] = {}
        for index, unit in enumerate(units):
            levels = [choice.level for choice in unit.choices]
            if unit.name in holders or (DROP in levels and len(levels) == 2):
                if DROP not in levels or len(levels) != 2:
                    raise ValueError(
                        f"{unit.name} holds other units: its levels must be {DROP} and one more, not {levels}"
                    )
                self.parts[index] = (levels.index(DROP), 1 - levels.index(DROP))
        self.inside: dict[int, list[int]] = {part: [] for part in self.parts}
        for index, unit in enumerate(units):
            name = unit.part_of
            while name is not None:
                self.inside[place[name]].append(index)
                name = units[place[name]].part_of
        equals: dict[tuple[int, ...], list[int]] = {}
        for index, bits in enumerate(self.bits):
            if index not in self.parts and len(bits) > 1:
                equals.setdefault(tuple(bits), []).append(index)
        self.groups = list(equals.values())
        self.group = {index: group for group in self.groups for index in group}
        self.alone = sum(len(group) == 1 for group in self.groups) / max(len(self.group), 1)

    def check(self, name: str, genome: Sequence[int]) -> Genome:
        """The genome with all that lies in dropped parts at its first choice; UserError where it breaks the budget."""
        fits = len(genome) == len(self.units) and all(
            0 <= choice < len(bits) for choice, bits in zip(genome, self.bits, strict=True)
        )
        if not fits:
            raise UserError(f"{name} holds {len(genome)} choices that are not those of these {len(self.units)} units")
        if size(self.units, genome) > self.budget:
            raise UserError(f"{name} takes {size(self.units, genome)} bits: the budget is {self.budget}")
        return tuple(_Draft(self, [int(choice) for choice in genome]).genome)

    def first(self, count: int, rng: np.random.Generator) -> list[Genome]:
        """The one level that has the size of the budget, or up to `count` genomes lowered from the next level above."""
        tops = self._levels()
        exact = [genome for genome in tops if size(self.units, genome) == self.budget]
        if exact:
            return exact[:1]
        above = min((size(self.units, genome), genome) for genome in tops if size(self.units, genome) > self.budget)[1]
        found: dict[Genome, None] = {}
        for _ in range(_TRIES * count):
            draft = _Draft(self, above)
            draft.descend(rng)
            found[tuple(draft.genome)] = None
            if len(found) == count:
                break
        return list(found)

    def _levels(self) -> list[Genome]:
        """Nothing dropped and every unit at one level, for the levels that all have; last the highest of each."""
        kept = {part: keep for part, (_, keep) in self.parts.items()}
        inner = [unit for index, unit in enumerate(self.units) if index not in self.parts]
        known = [{choice.level for choice in unit.choices} for unit in inner]
        common = [choice.level for choice in inner[0].choices] if inner else []
        genomes = [
            tuple(kept[index] if index in kept else unit.index(level) for index, unit in enumerate(self.units))
            for level in common
            if all(level in levels for levels in known)
        ]
        highest = (kept.get(index, len(bits) - 1) for index, bits in enumerate(self.bits))
        return [*genomes, tuple(highest)]


class _Draft:
    """A genome in the making. size: its bits. live: whether each unit lies in no dropped part."""

    def __init__(self, space: _Space, genome: Sequence[int]) -> None:
        self.space = space
        self.genome = list(genome)
        self.settle()

    def settle(self) -> None:
        """Bring size and live up to date after parts changed.

        What lies in a dropped part goes to its first choice, so that equal models are equal genomes.
        """
        space = self.space
        self.live = [not out for out in left_out(space.units, self.genome)]
        for unit, live in enumerate(self.live):
            if not live:
                self.genome[unit] = space.parts[unit][0] if unit in space.parts else 0
        self.size = sum(
            bits[choice] for bits, choice, live in zip(space.bits, self.genome, self.live, strict=True) if live
        )

    def cost(self, unit: int, step: int) -> int:
        """Bits that a step adds."""
        bits, choice = self.space.bits[unit], self.genome[unit]
        return bits[choice + step] - bits[choice]

    def move(self, unit: int, step: int) -> None:
        """One level up or down."""
        self.size += self.cost(unit, step)
        self.genome[unit] += step

    def movable(self, step: int, units: Sequence[int] | None = None) -> list[int]:
        """Those of the units, or of all that have levels, that can go a level up or down."""
        live, genome, bits = self.live, self.genome, self.space.bits
        among = self.space.group if units is None else units
        return [unit for unit in among if live[unit] and 0 <= genome[unit] + step < len(bits[unit])]

    def switch(self, count: int, rng: np.random.Generator) -> None:
        """Level switches within groups: one unit goes down, an equal one up, and the budget holds."""
        for _ in range(count):
            units = [unit for unit in self.space.group if self.live[unit]]
            if not units:
                return
            group = self.space.group[_pick(units, rng)]  # that of a random unit: large groups are drawn more often
            for down in rng.permutation(self.movable(-1, group)).tolist():
                room = self.space.budget - self.size - self.cost(down, -1)
                ups = [up for up in self.movable(1, group) if up != down and self.cost(up, 1) <= room]
                if ups:
                    self.move(down, -1)
                    self.move(_pick(ups, rng), 1)
                    break

    def shift(self, count: int, rng: np.random.Generator) -> bool:
        """Raise units of any size and lower others until the budget holds; False where it cannot."""
        raised = set()
        for _ in range(count):
            ups = self.movable(1)
            if ups:
                unit = _pick(ups, rng)
                self.move(unit, 1)
                raised.add(unit)
        return self.lower(rng, raised)

    def lower(self, rng: np.random.Generator, spared: set[int]) -> bool:
        """Lower random units until the budget holds, but not the spared; False where it cannot hold."""
        while self.size > self.space.budget:
            downs = [unit for unit in self.movable(-1) if unit not in spared]
            if not downs:
                return False
            self.move(_pick(downs, rng), -1)
        return True

    def spend(self, rng: np.random.Generator) -> None:
        """Raise random units for as long as the budget holds."""
        while True:
            ups = [unit for unit in self.movable(1) if self.size + self.cost(unit, 1) <= self.space.budget]
            if not ups:
                return
            self.move(_pick(ups, rng), 1)

    def descend(self, rng: np.random.Generator) -> None:
        """Lower random units, and where that is not enough drop random parts, until the budget holds."""
        if not self.lower(rng, set()):
            while self.size > self.space.budget:
                self.drop(_pick(self.kept(), rng))
        # The last one dropped may have been larger than it had to be.
        for part in rng.permutation(self.dropped()).tolist():
            genome = list(self.genome)
            self.restore(part)
            if self.size > self.space.budget:
                self.genome = genome
                self.settle()
        self.spend(rng)

    def kept(self) -> list[int]:
        """Parts that can be dropped."""
        return [part for part, (drop, _) in self.space.parts.items() if self.live[part] and self.genome[part] != drop]

    def dropped(self) -> list[int]:
        """Parts that can come back."""
        return [part for part, (drop, _) in self.space.parts.items() if self.live[part] and self.genome[part] == drop]

    def drop(self, part: int) -> None:
        """Leave a part out."""
        self.genome[part] = self.space.parts[part][0]
        self.settle()

    def restore(self, part: int, like: Sequence[int] = ()) -> None:
        """Bring a part back, all of it: at these choices, one for each unit inside, or at the first ones."""
        self.genome[part] = self.space.parts[part][1]
        for place, unit in enumerate(self.space.inside[part]):
            if unit in self.space.parts:
                self.genome[unit] = self.space.parts[unit][1]
            if place < len(like):
                self.genome[unit] = min(like[place], len(self.space.bits[unit]) - 1)
        self.settle()

    def swappable(self) -> list[int]:
        """Dropped parts of a kind of which others are kept."""
        kinds = {self.space.units[part].kind for part in self.kept()}
        return [part for part in self.dropped() if self.space.units[part].kind in kinds]

    def swap(self, count: int, rng: np.random.Generator) -> None:
        """Drop a part and bring back another of its kind, which takes over the levels inside."""
        for _ in range(count):
            options = self.swappable()
            if not options:
                return
            back = _pick(options, rng)
            kind = self.space.units[back].kind
            gone = _pick([part for part in self.kept() if self.space.units[part].kind == kind], rng)
            levels = [self.genome[unit] for unit in self.space.inside[gone]]
            self.drop(gone)
            self.restore(back, levels)

    def trade(self, rng: np.random.Generator) -> None:
        """Drop a part, for bits that levels can take, or bring one back, for bits that levels must give."""
        kept, dropped = self.kept(), self.dropped()
        if dropped and (not kept or rng.random() < 0.5):
            self.restore(_pick(dropped, rng))
        elif kept:
            self.drop(_pick(kept, rng))


def _pick(options: Sequence[int], rng: np.random.Generator) -> int:
    return options[int(rng.integers(len(options)))]


def _whole_numbers(name: str, values: Any) -> tuple[int, ...]:
    """The values as a tuple; UserError where they are no whole numbers."""
    try:
        numbers = tuple(values)
    except TypeError:
        numbers = (None,)
    if isinstance(values, str) or not all(isinstance(number, int) for number in numbers):
        raise UserError(f"{name}={values} must be a list of whole numbers, one for each step")
    return numbers
