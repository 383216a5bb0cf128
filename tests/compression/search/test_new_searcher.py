"""A new searcher: one class, which defines its beginning, its step and its number of tokens."""

import json
from dataclasses import dataclass, replace

from hasten.accel.compression.search.base import Outcome, Searcher, State
from hasten.accel.compression.search.moves import MutableGenome
from tests.compression.search.problems import LENGTHS, Additive, equal, search


@dataclass(frozen=True)
class HillClimb(Searcher):
    """One switch a step, on all tokens. memory: number of switches that failed in a row."""

    climbs: int = 10

    @property
    def steps(self):
        return self.climbs

    def with_steps(self, steps):
        return replace(self, climbs=steps)

    def measured_tokens(self, available):
        return (1 + 2 * self.climbs) * available

    def begin(self, problem, measurements):
        (genome,) = problem.space.first(1, measurements.rng)
        return Outcome(genome, float("inf"), 1, float("inf"), {"failed": 0})

    def advance(self, problem, measurements, state):
        genome = MutableGenome(problem.space, state.incumbent)
        genome.switch(1, measurements.rng)
        (whole,) = measurements.draw([problem.tokens])
        both = [state.incumbent, tuple(genome.genome)]
        order, losses = measurements.rank(both, whole)
        failed = 0 if order[0] else state.memory["failed"] + 1
        return Outcome(both[order[0]], losses[order[0]], 1, losses[0], {"failed": failed})


def test_it_searches_and_goes_on_from_its_own_memory():
    units = equal(8)
    fitness, states = Additive(units, 0), []
    answer = search(HillClimb(), units, 240, fitness, LENGTHS, 0, after=lambda state, _: states.append(state))
    assert fitness.exact(answer.incumbent) < fitness.exact(states[0].incumbent)
    saved = State.from_json(json.loads(json.dumps(states[4].to_json())))
    assert saved.memory == states[4].memory
    assert search(HillClimb(), units, 240, Additive(units, 0), LENGTHS, 0, state=saved) == answer
