"""What each choice costs by itself: the model's loss with one unit at one choice and all others original.

Measuring every choice of every unit is expensive. A small change of a layer's output moves the divergence by a
quadratic form, so that what the levels of one layer cost is in the ratio of their squared output errors, which are
known from the level database: one measured level of a layer gives all of them.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

from hasten.accel.compression.allocators.base import Choice, Unit
from hasten.accel.compression.levels.level import KEEP
from hasten.accel.compression.search.candidates import ORIGINAL
from hasten.accel.compression.search.moves import Genome
from hasten.accel.compression.search.samples import Sample


def with_errors(
    units: Sequence[Unit],
    evaluate: Callable[[Sequence[Genome], Sample], Sequence[float]],
    sample: Sample,
    scaled: bool = False,
) -> list[Unit]:
    """The units with the increase of the loss that each of their choices makes alone as its error, in nats.

    scaled: measures one choice of each unit, the middle one, and takes the others in the ratio of the errors that the
    units have, which are those of their outputs; parts that can be dropped are measured in any case. A choice that the
    sample shows to be better than the original costs nothing.
    """
    original = (ORIGINAL,) * len(units)
    keys = [
        (place, index)
        for place, unit in enumerate(units)
        for index in (_middle(unit) if scaled and unit.layers else range(len(unit.choices)))
        if unit.choices[index].level != KEEP
    ]
    genomes = [(*original[:place], index, *original[place + 1 :]) for place, index in keys]
    base, *losses = evaluate([original, *genomes], sample)
    increases = {key: max(0.0, loss - base) for key, loss in zip(keys, losses, strict=True)}

    def at(place: int, index: int, choice: Choice) -> Choice:
        if choice.level == KEEP or (place, index) in increases:
            return replace(choice, error=increases.get((place, index), 0.0))
        (measured,) = _middle(units[place])
        known = units[place].choices[measured].error
        return replace(choice, error=increases[place, measured] * (choice.error / known if known > 0 else 1.0))

    return [
        replace(unit, choices=tuple(at(place, index, choice) for index, choice in enumerate(unit.choices)))
        for place, unit in enumerate(units)
    ]


def _middle(unit: Unit) -> list[int]:
    """The choice in the middle, of those that change the layers; none where all of them keep these."""
    changed = [index for index, choice in enumerate(unit.choices) if choice.level != KEEP]
    return changed[(len(changed) - 1) // 2 :][:1]
