"""What compressing layers takes, by what the methods have in common: no method is known here by its name."""

from collections.abc import Sequence
from math import ceil
from typing import Any

from hasten.accel.compression.calibration.layer_groups import Group
from hasten.accel.compression.calibration.slabs import SOLVE_BYTES, searched_weights, slab_weights
from hasten.accel.compression.calibration.statistics import panel_bounds
from hasten.accel.compression.levels.base import Level
from hasten.accel.costs.estimate import Work

# Small operations on every weight for each range that a grid is searched among, and for one visit of its column: the
# column itself, and its error handed on within the columns that are visited one by one.
_TRIED, _VISITED = 9, 28
_LAUNCHES_OF_A_COLUMN = 50
_ROUNDED = 10
# Columns from which a factorisation runs as fast as a product; and what putting a number in its place counts.
_FAST_COLUMNS, _PLACED = 8192, 30
# Bytes of a weight that is rounded, in float32 and codes.
_ROUNDED_BYTES = 14


def moment_elements(columns: int) -> int:
    """Numbers in the sums of a second moment, of which panels up to the diagonal are kept."""
    return sum((stop - start) * stop for start, stop in panel_bounds(columns))


def moment_bytes(columns: int) -> int:
    """Bytes of these sums."""
    return 4 * moment_elements(columns)


def collect_work(groups: Sequence[Group], tokens: float) -> Work:
    """Adding up the second moments of some groups' inputs over so many tokens."""
    found = Work()
    for group in groups:
        found += Work(flops=2 * tokens * moment_elements(group.columns), launches=4 * len(panel_bounds(group.columns)))
    return found


def factor_work(group: Group, methods: Sequence[Any]) -> Work:
    """The factorisations of a group's second moment, one a method that needs it."""
    needed = sum(bool(method.needs_hessian) for method in methods)
    columns = group.columns
    # Of few columns a factorisation waits for itself; and numbers are put in their places one by one.
    flops = columns**3 / 3 * max(1.0, _FAST_COLUMNS / columns)
    one = Work(exact_flops=flops, elements=_PLACED * columns**2, launches=8 * len(panel_bounds(columns)))
    return one * needed


def solve_work(group: Group, method: Any, level: Level, gpu_memory: int = 0) -> Work:
    """Compressing the layers of a group at one level, the factor being there; gpu_memory: bytes, 0 without a GPU."""
    columns, rows = group.columns, sum(layer.rows for layer in group.layers)
    weights = rows * columns
    slabs = ceil(weights / slab_weights(gpu_memory))
    grid = level.loader_scheme
    tried = getattr(method, "search", 0) * (2 if grid and grid.symmetric else 1)
    found = Work(elements=weights * _ROUNDED, launches=100 * slabs, file_bytes=2 * weights)
    found += Work(
        elements=weights * _TRIED * tried, launches=30 * tried * ceil(weights / searched_weights(gpu_memory > 0))
    )
    if not method.needs_hessian:
        return found
    # Refitting ends with a fit: of two fits the first is of the first solve.
    refits = getattr(method, "refits", 0)
    solves = max(1, refits)
    # What finished columns leave to those to come, and of the first solve alone what the output would have been.
    found += Work(exact_flops=(solves + 1) * weights * columns)
    found += Work(elements=solves * weights * _VISITED, launches=solves * slabs * columns * _LAUNCHES_OF_A_COLUMN)
    if refits:
        groups = columns // grid.columns(columns) if grid else 1
        found += Work(exact_flops=2 * refits * weights * columns, elements=refits * 6 * weights * groups)
        found += Work(launches=refits * slabs * groups * 20)
    return found


def solve_bytes(group: Group, methods: Sequence[Any], gpu_memory: int) -> dict[str, int]:
    """Memory of the solve of a group, by part: factor and slab of weights; the sums that it reads are counted apart."""
    columns, rows = group.columns, sum(layer.rows for layer in group.layers)
    swept = any(method.needs_hessian for method in methods)
    slab = min(slab_weights(gpu_memory), rows * columns)
    parts = {"slab of weights": slab * (SOLVE_BYTES if swept else _ROUNDED_BYTES)}
    if swept:
        factor = 4 * columns**2
        # The sums come to a GPU panel by panel, and lie there once more while they are put together.
        parts["factor"] = factor + (2 * moment_bytes(columns) if gpu_memory else 0)
    return parts
