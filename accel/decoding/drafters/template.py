"""Trees of a fixed shape: a node is the path of ranks among siblings that leads to it from the root."""

from collections.abc import Iterable, Sequence
from heapq import heapify, heappop, heappush
from math import prod

Path = tuple[int, ...]


def by_acceptance(paths: Iterable[Path], rates: Sequence[float]) -> list[tuple[int, Path]]:
    """(index of the parent, path) of each path, most likely to be accepted first; the root's index is -1.

    rates: acceptance rate of a node by its rank, given that its parent is accepted; descending, below one.
    """
    ordered = sorted(paths, key=lambda path: -prod(rates[rank] for rank in path))
    indices = {(): -1} | {path: index for index, path in enumerate(ordered)}
    return [(indices[path[:-1]], path) for path in ordered]


def most_accepted(count: int, rates: Sequence[float], depth: int) -> list[Path]:
    """The `count` paths of at most `depth` ranks with the highest probability of acceptance."""
    selected: list[Path] = []
    heap: list[tuple[float, Path]] = [(-rate, (rank,)) for rank, rate in enumerate(rates)]
    heapify(heap)
    while heap and len(selected) < count:
        value, path = heappop(heap)
        selected.append(path)
        if len(path) < depth:
            for rank, rate in enumerate(rates):
                heappush(heap, (value * rate, (*path, rank)))
    return selected
