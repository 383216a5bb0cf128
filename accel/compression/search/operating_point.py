"""Errors of units at an operating point: measured where a model of the budget's size is, and not at the original.

One level of a layer, with all other layers original, changes the predictions little; at 3 bits all layers together
change them much, and their errors interact. So a unit's error is its part of the divergence of a whole candidate (see
sensitivity.py). The best levels by these errors are the next candidate, and so on: levels that a candidate has are
measured, and the others follow from them by the ratio of the squared output errors.

The ratio is not exact: on SmolLM2-135M the parts at 2 bits are 1.1 to 1.4 times those that it predicts from 3 bits. So
what a level has in common over all units is fitted, and a unit's own deviation from it counts as far as the noise of
its measurement allows.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypedDict

import numpy as np
from numpy.typing import NDArray

from hasten.accel.compression.allocators.base import Unit
from hasten.accel.compression.allocators.exact import Exact
from hasten.accel.compression.levels.level import KEEP
from hasten.accel.compression.search.moves import Genome
from hasten.accel.compression.search.sensitivity import Sensitivity

# Standard deviation, over units, of the logarithm of a level's part against the ratio of output errors; on SmolLM2-135M
# it was 0.3 to 0.4.
_DEVIATION = 0.35
# Units that must show a level before its common deviation is believed; fewer count in part.
_FEW = 5
# No measurement counts as more exact than this, relative to the part.
_LEAST_NOISE = 0.05


class ObservationValues(TypedDict):
    """An observation as plain values."""

    genome: list[int]
    parts: list[float | None]
    noise: list[float | None]
    divergence: float


@dataclass(frozen=True)
class Observation:
    """The parts of the divergence measured on one candidate.

    parts: (units,), nats per token; nan for a unit that was not measured. noise: their standard errors, over batches of
    sequences; infinite for a single batch. divergence: KL(original || candidate), nats per token.
    """

    genome: Genome
    parts: NDArray[np.float64]
    noise: NDArray[np.float64]
    divergence: float

    def to_json(self) -> ObservationValues:
        """The observation as JSON values: None for nan and for infinity."""
        return {
            "genome": list(self.genome),
            "parts": [None if math.isnan(part) else part for part in self.parts.tolist()],
            "noise": [noise if math.isfinite(noise) else None for noise in self.noise.tolist()],
            "divergence": self.divergence,
        }

    @classmethod
    def from_json(cls, values: ObservationValues) -> "Observation":
        """The observation from the values of to_json."""
        parts = np.array([math.nan if part is None else part for part in values["parts"]])
        noise = np.array([math.inf if value is None else value for value in values["noise"]])
        return cls(tuple(values["genome"]), parts, noise, values["divergence"])


def observe(genome: Genome, measured: Sequence[Sensitivity]) -> Observation:
    """The observation of a candidate that was measured on one or more batches."""
    tokens = np.array([batch.tokens for batch in measured], dtype=np.float64)
    parts = np.stack([batch.parts.numpy() / batch.tokens for batch in measured])
    mean = np.array([math.fsum(column) for column in (parts * tokens[:, None]).T]) / tokens.sum()
    count = len(measured)
    noise = parts.std(0, ddof=1) / math.sqrt(count) if count > 1 else np.full(len(mean), np.inf)
    return Observation(genome, mean, noise, math.fsum(batch.divergence for batch in measured) / float(tokens.sum()))


def with_parts(units: Sequence[Unit], observations: Sequence[Observation]) -> list[Unit]:
    """The units with errors in nats per token, fitted to all observations; choices of parts and `keep` stay.

    units: their errors are those of the outputs, which give the ratios between the levels of a unit. A unit that no
    observation measured gets errors from the ratio of parts to output errors that the median unit has.
    """
    units = list(units)
    choices = [
        (place, index)
        for place, unit in enumerate(units)
        for index, choice in enumerate(unit.choices)
        if unit.layers and choice.level != KEEP and choice.error > 0
    ]
    if not choices or not observations:
        return units
    fitted = _fit(units, choices, observations)
    errors = dict(zip(choices, fitted, strict=True))
    return [
        replace(
            unit,
            choices=tuple(
                replace(choice, error=errors.get((place, index), choice.error))
                for index, choice in enumerate(unit.choices)
            ),
        )
        for place, unit in enumerate(units)
    ]


def _fit(units: Sequence[Unit], choices: Sequence[tuple[int, int]], observations: Sequence[Observation]) -> list[float]:
    """Errors of the choices (unit, index).

    In logarithms, relative to the output error, a measured part is a + b + d + noise: a of the unit, b of the level, d
    of both with standard deviation _DEVIATION. The estimate of d is its mean given the noise.
    """
    owner = np.array([place for place, _ in choices])
    levels = [units[place].choices[index].level for place, index in choices]
    names = list(dict.fromkeys(levels))
    level = np.array([names.index(name) for name in levels])
    output = np.log([units[place].choices[index].error for place, index in choices])
    position = {key: number for number, key in enumerate(choices)}
    total, weight = np.zeros(len(choices)), np.zeros(len(choices))
    for observation in observations:
        for place, index in enumerate(observation.genome):
            number, part, noise = position.get((place, index)), observation.parts[place], observation.noise[place]
            if number is None or math.isnan(part):
                continue
            # A part that is not clear of its noise counts as its noise. A single batch tells no noise: as much as d.
            noise = noise if math.isfinite(noise) else abs(part) * _DEVIATION
            value = max(part, noise, 1e-12)
            precision = 1 / max(noise / value, _LEAST_NOISE) ** 2
            total[number] += precision * (math.log(value) - output[number])
            weight[number] += precision
    seen = weight > 0
    if not seen.any():
        return np.exp(output).tolist()
    variance = np.divide(1.0, weight, out=np.full(len(choices), np.inf), where=seen)
    mean = np.divide(total, weight, out=np.zeros(len(choices)), where=seen)
    trust = np.where(seen, 1 / (_DEVIATION**2 + variance), 0.0)
    of_level = np.zeros(len(names))
    of_unit = np.zeros(len(units))
    # Alternating least squares; the level that most units show is the reference, whose b is 0.
    counts = np.bincount(level[seen], minlength=len(names))
    reference = int(counts.argmax())
    for _ in range(50):
        owned = np.bincount(owner, trust * (mean - of_level[level]), len(units))
        weights = np.bincount(owner, trust, len(units))
        known = weights > 0
        of_unit = np.where(known, owned / np.maximum(weights, 1e-300), 0.0)
        of_unit[~known] = np.median(of_unit[known])
        shared = np.bincount(level, trust * (mean - of_unit[owner]), len(names))
        of_level = shared / np.maximum(np.bincount(level, trust, len(names)), 1e-300) * counts / (counts + _FEW)
        of_level[reference] = 0.0
    common = of_unit[owner] + of_level[level]
    own = np.where(seen, _DEVIATION**2 / (_DEVIATION**2 + np.where(seen, variance, 1.0)), 0.0)
    return np.exp(output + common + own * np.where(seen, mean - common, 0.0)).tolist()


def iterate(
    units: Sequence[Unit],
    budget: int,
    start: Genome,
    passes: int,
    measure: Callable[[Genome, int], Observation],
) -> list[Unit]:
    """The units with errors after `passes` measurements: of the start, and of the best candidate by the errors so far.

    units: with output errors. budget: cost of all units together. start: a candidate within the budget. measure(genome,
    number): observation of a candidate in measurement `number`, from 0. Ends early where the candidate repeats: its
    further measurements would only lower the noise.
    """
    observations = [measure(start, 0)]
    for number in range(1, passes):
        fitted = with_parts(units, observations)
        best = tuple(Exact().choose(fitted, budget))
        observations.append(measure(best, number))
        if best == observations[-2].genome:
            break
    return with_parts(units, observations)
