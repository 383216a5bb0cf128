"""What a search asks to be measured, and what it ends with."""

from tests.compression.search.problems import LENGTHS, SMALL, Additive, equal, unequal


def test_the_answer_is_no_worse_than_the_start_on_all_tokens():
    units, start = equal(), (1, 1, 1, 1, 1, 1)
    everything = sum(LENGTHS)

    def misleading(genomes, sample):
        # What moves away looks better on every few tokens, and is worse on all.
        return [float((genome == start) == (sample.tokens < everything)) for genome in genomes]

    states = []
    found = SMALL.search(units, 180, misleading, LENGTHS, 0, after=lambda state, _: states.append(state), start=start)
    assert states[-1].parent != start
    assert found.parent == start
    assert found.fitness == 0.0
    assert found.tokens == states[-1].tokens + 2 * everything


def test_every_evaluation_of_a_step_is_told_before_the_first_is_asked_for():
    fitness = Additive(unequal(), 0)
    told = []

    def prefetch(lots):
        told.append((len(fitness.calls), [(tuple(genomes), sample) for genomes, sample in lots if genomes]))

    SMALL.search(unequal(), 400, fitness, LENGTHS, 0, prefetch=prefetch)
    asked = [(tuple(genomes), sample) for genomes, sample, _ in fitness.calls]
    assert [lot for _, lots in told for lot in lots] == asked
    assert [count for count, _ in told] == [sum(len(lots) for _, lots in told[:step]) for step in range(len(told))]
    # The parent is told with the survivors, though they were measured on parts of the sample.
    assert max(len(lots) for _, lots in told) > 1
