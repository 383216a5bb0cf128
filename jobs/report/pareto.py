"""The Pareto front: points that no other point dominates."""

from collections.abc import Sequence


def front(points: Sequence[tuple[float, ...]], signs: Sequence[int]) -> list[int]:
    """Indices of the points that are not dominated: no other is at least as good everywhere and better somewhere.

    signs: for each coordinate 1 where less is better, -1 where more is. Equal points are on the front together.
    """
    costs = [tuple(sign * value for sign, value in zip(signs, point, strict=True)) for point in points]
    # Sorted, so that points come after those that dominate them, which are usually on the front already.
    kept: list[int] = []
    for index in sorted(range(len(costs)), key=costs.__getitem__):
        if not any(_dominates(costs[other], costs[index]) for other in kept):
            kept.append(index)
    return sorted(kept)


def _dominates(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return one != other and all(left <= right for left, right in zip(one, other, strict=True))
