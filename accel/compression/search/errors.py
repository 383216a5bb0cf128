"""Error of each choice alone: the increase of the model's loss with one unit at one choice and all others original.

Measuring every choice of every unit is expensive. For small changes the divergence is a quadratic form of the change of
a layer's output. So the errors of a layer's levels are proportional to their squared output errors, which the level
database holds: measuring one level of a layer gives all of them.
"""

from collections.abc import Callable, Collection, Sequence
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
    only: Collection[str] | None = None,
) -> list[Unit]:
    """The units with new errors: each choice's is the increase of the loss, in nats, that this choice makes alone.

    scaled: measures only the middle choice of each unit, and scales the given errors, which are those of the outputs,
    to match it; choices of parts that can be dropped are all measured. only: names of the units that are measured; None
    is all, and the others keep their errors. A choice that is better than the original on the sample has an error of 0.
    """
    original = (ORIGINAL,) * len(units)
    keys = [
        (place, index)
        for place, unit in enumerate(units)
        if only is None or unit.name in only
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
        unit
        if only is not None and unit.name not in only
        else replace(unit, choices=tuple(at(place, index, choice) for index, choice in enumerate(unit.choices)))
        for place, unit in enumerate(units)
    ]


def _middle(unit: Unit) -> list[int]:
    """Index of the middle choice among those that are not `keep`, as a list; empty where there are none."""
    changed = [index for index, choice in enumerate(unit.choices) if choice.level != KEEP]
    return changed[(len(changed) - 1) // 2 :][:1]
