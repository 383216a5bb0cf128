"""Small problems for searches: units, a short search, and a fitness that is additive over units."""

import itertools
import zlib

import numpy as np

from hasten.accel.compression.allocators.base import DROP, Choice, Unit, size
from hasten.accel.compression.search.base import Problem
from hasten.accel.compression.search.evopress import EvoPress

LENGTHS = [7, 30, 12, 25, 40, 3, 18, 64]
SMALL = EvoPress(generations=6, offspring=8, survivors=(4, 2, 1), tokens=(20, 50, 90), initial_tokens=30, foresight=4)


def search(searcher, units, budget, fitness, lengths, seed, state=None, after=None, start=None):
    """The answer of a search whose requests fitness(genomes, sample) measures one by one; after(state, stats)."""
    problem = Problem(units, budget, lengths, seed, start)

    def measure(requests):
        return [fitness(genomes, sample) for genomes, sample in requests]

    for step in searcher.search(problem, measure, state):
        state = step.state
        if after is not None:
            after(*step)
    return searcher.answer(problem, measure, state)


def unit(name, weights, levels=(2, 3, 4), kind="mlp", part_of=None):
    choices = tuple(Choice(str(level), weights * level) for level in levels)
    return Unit(name, (name,), 0, kind, weights, choices, part_of)


def part(name, kind="attention", part_of=None):
    return Unit(name, (), 0, kind, 0, (Choice(DROP, 0), Choice("keep", 0)), part_of)


def equal(count=6):
    return [unit(f"u{i}", 10) for i in range(count)]


def unequal():
    return [unit(f"u{i}", weights) for i, weights in enumerate([10, 13, 17, 24, 31, 40])]


def droppable(parts=3, levels=(2, 3, 4)):
    units = []
    for i in range(parts):
        kind = "attention" if i % 2 else "mlp"
        units += [part(f"p{i}", kind), unit(f"a{i}", 10, levels, part_of=f"p{i}")]
        units += [unit(f"b{i}", 20, levels, part_of=f"p{i}")]
    return units


class Additive:
    """Fitness that is additive over units, with noise of 1e-9 by genome and sample; it records its calls."""

    def __init__(self, units, seed):
        rng = np.random.default_rng(seed)
        self.units = units
        self.costs = [np.sort(rng.random(len(u.choices)))[::-1].tolist() for u in units]
        for index, u in enumerate(units):
            if u.choices[0].level == DROP:
                # Dropping a part is worse than any levels of the units inside.
                inside = sum(cost[0] for other, cost in zip(units, self.costs, strict=True) if other.part_of == u.name)
                self.costs[index] = [inside + self.costs[index][0], 0.0]
        self.calls = []

    def exact(self, genome):
        dropped = {u.name for u, g in zip(self.units, genome, strict=True) if u.choices[g].level == DROP}
        terms = zip(self.units, self.costs, genome, strict=True)
        return sum(cost[g] for u, cost, g in terms if u.part_of not in dropped)

    def __call__(self, genomes, sample):
        values = [self.exact(g) + 1e-9 * zlib.crc32(repr((g, sample)).encode()) / 2**32 for g in genomes]
        self.calls.append((list(genomes), sample, values))
        return values

    def optimum(self, budget):
        every = itertools.product(*(range(len(u.choices)) for u in self.units))
        return min(self.exact(g) for g in every if size(self.units, g) <= budget)


class PerToken:
    """Fitness with a random loss for every genome and position, averaged over scored tokens; it records its calls."""

    def __init__(self, lengths):
        self.lengths = lengths
        self.calls = []

    def mean(self, genome, parts):
        losses = [
            zlib.crc32(repr((genome, number, position)).encode()) / 2**32
            for number, used in parts
            for position in range(min(used, self.lengths[number] - 1))
        ]
        return sum(losses) / len(losses)

    def __call__(self, genomes, sample):
        self.calls.append((list(genomes), sample))
        return [self.mean(genome, sample.parts) for genome in genomes]


def problem(seed):
    """Units of random sizes and levels, some of them equal, some inside parts that can be dropped, and a budget."""
    rng = np.random.default_rng(seed)
    units = []
    for block in range(rng.integers(1, 4)):
        holder = None
        if rng.random() < 0.5:
            holder = f"p{block}"
            units.append(part(holder))
        for i in range(rng.integers(1, 5)):
            weights = int(rng.integers(1, 30)) if rng.random() < 0.5 else 16
            levels = sorted(rng.choice([1, 2, 3, 4, 6, 8], rng.integers(1, 5), replace=False).tolist())
            units.append(unit(f"{block}.{i}", weights, levels, part_of=holder))
    low, high = size(units, [0] * len(units)), size(units, [len(u.choices) - 1 for u in units])
    return units, int(rng.integers(low, high + 1))
