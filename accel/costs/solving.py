"""Cost of compressing groups of layers, from the costs that methods state; no method is named here."""

from collections.abc import Sequence
from functools import lru_cache

from hasten.accel.compression.calibration.layer_groups import Group
from hasten.accel.compression.calibration.statistics import panel_bounds
from hasten.accel.compression.levels.base import Level
from hasten.accel.compression.method import Method
from hasten.accel.costs.estimate import Work
from hasten.accel.costs.method import LayerStack, MethodCost, guessed_cost, hessian_elements


def collect_work(groups: Sequence[Group], tokens: float) -> Work:
    """Work of accumulating the Hessians of the groups' inputs over `tokens` tokens."""
    total = Work()
    for group in groups:
        total += Work(flops=2 * tokens * hessian_elements(group.columns), launches=4 * len(panel_bounds(group.columns)))
    return total


def stack_of(group: Group, gpu_memory: int = 0) -> LayerStack:
    """Shape of a group's layers; gpu_memory: bytes, 0 without a GPU."""
    return LayerStack(sum(layer.rows for layer in group.layers), group.columns, gpu_memory)


# A mixture has thousands of groups of few shapes.
@lru_cache(maxsize=1024)
def method_cost(layers: LayerStack, method: Method, level: Level) -> MethodCost:
    """Cost that the method states, or a guess where it states none."""
    return level.cost(method, layers) or guessed_cost(layers, method.needs_hessian)


def guess_notes(solves: Sequence[tuple[Method, Level]], layers: LayerStack) -> tuple[str, ...]:
    """`guess: METHOD states no cost` for every method without a stated cost."""
    guessed = dict.fromkeys(type(method).__name__ for method, level in solves if level.cost(method, layers) is None)
    return tuple(f"guess: {name} states no cost" for name in guessed)


def group_work(layers: LayerStack, solves: Sequence[tuple[Method, Level]]) -> Work:
    """Work of solving a group at levels, each by its method: prepare() once for each method, and the solves.

    Collecting the statistics is not included.
    """
    costs = [method_cost(layers, method, level) for method, level in solves]
    prepared: dict[int, Work] = {}
    for (method, _), cost in zip(solves, costs, strict=True):
        prepared.setdefault(id(method), cost.prepare)
    total = sum(prepared.values(), Work())
    for cost in costs:
        total += Work(file_bytes=2 * layers.weights) + cost.solve
    return total


def group_bytes(layers: LayerStack, solves: Sequence[tuple[Method, Level]]) -> dict[str, int]:
    """Memory of the solve of a group, by part: slab of weights, and factor. The sums that it reads are not included."""
    costs = [method_cost(layers, method, level) for method, level in solves]
    parts = {"slab of weights": layers.slab * max(cost.weight_bytes for cost in costs)}
    prepared = max(cost.prepared_bytes for cost in costs)
    return parts | ({"factor": prepared} if prepared else {})
