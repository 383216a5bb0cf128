"""All points of a grid, in Hydra's order: the last option changes fastest."""

import itertools
from collections.abc import Iterator, Mapping, Sequence

from hasten.jobs.sweep.dimensions import Dimension


def grid(dimensions: Sequence[Dimension]) -> Iterator[Mapping[str, str]]:
    """Values of every point by key; each dimension must have a list of values."""
    keys = [dimension.key for dimension in dimensions]
    for values in itertools.product(*(dimension.values or () for dimension in dimensions)):
        yield dict(zip(keys, values, strict=True))
