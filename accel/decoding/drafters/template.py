"""A tree whose shape is fixed before anything is known of its tokens: nodes are paths of ranks among siblings."""

from collections.abc import Iterable, Sequence
from heapq import heapify, heappop, heappush
from math import prod

Path = tuple[int, ...]


def ordered(paths: Iterable[Path], rates: Sequence[float]) -> list[tuple[int, Path]]:
    """Paths with the place of their parent (-1 for the top), the likeliest first.

    rates: by rank, how often such a node is accepted if its parent is; falling, below one.
    """
    ordered = sorted(paths, key=lambda path: -prod(rates[rank] for rank in path))
    places = {(): -1} | {path: place for place, path in enumerate(ordered)}
    return [(places[path[:-1]], path) for path in ordered]


def likeliest(count: int, rates: Sequence[float], depth: int) -> list[Path]:
    """The `count` paths of at most `depth` ranks that are accepted most often."""
    chosen: list[Path] = []
    heap: list[tuple[float, Path]] = [(-rate, (rank,)) for rank, rate in enumerate(rates)]
    heapify(heap)
    while heap and len(chosen) < count:
        value, path = heappop(heap)
        chosen.append(path)
        if len(path) < depth:
            for rank, rate in enumerate(rates):
                heappush(heap, (value * rate, (*path, rank)))
    return chosen
