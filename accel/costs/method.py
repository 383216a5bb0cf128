"""Cost that a compression method states for itself, and building blocks for stating it.

A method's `cost` is in its own file, next to the algorithm whose operations it counts. A method without it is estimated
by `guessed_cost`, and the dry run says so.
"""

from dataclasses import dataclass, field
from functools import cache
from math import ceil

from hasten.accel.compression.calibration.slabs import SOLVE_BYTES, searched_weights, slab_weights
from hasten.accel.compression.calibration.statistics import panel_bounds
from hasten.accel.costs.estimate import Work

# Bytes of a weight that is rounded or pruned independently: float32 copies and codes.
ROUNDED_BYTES = 14
# Elementwise operations on every weight for each range of a grid search, and for one visit of its column, which solves
# the column and propagates its error within the columns that are visited one by one.
_TRIED, _VISITED = 9, 28
_LAUNCHES_OF_A_COLUMN = 50
_ROUNDED = 10
# Columns from which a factorisation runs as fast as a product; operations for moving an element to its place.
_FAST_COLUMNS, _PLACED = 8192, 30


@dataclass(frozen=True)
class LayerStack:
    """Shape of linear layers that share an input and are solved together.

    rows: of all layers together. columns: of each layer. gpu_memory: bytes of the GPU that solves them, 0 for a CPU.
    """

    rows: int
    columns: int
    gpu_memory: int = 0

    @property
    def weights(self) -> int:
        """Weights of all layers."""
        return self.rows * self.columns

    @property
    def slabs(self) -> int:
        """Number of slabs of rows, which are solved one after the other."""
        return ceil(self.weights / slab_weights(self.gpu_memory))

    @property
    def slab(self) -> int:
        """Weights that are solved at once."""
        return min(slab_weights(self.gpu_memory), self.weights)


@dataclass(frozen=True)
class MethodCost:
    """Cost of a method for a stack of layers at one level, without reading the weights.

    solve: work at this level. prepare: work of prepare(), done once for all levels. weight_bytes: memory for each
    weight of a slab while it is solved. prepared_bytes: memory of the result of prepare().
    """

    solve: Work
    weight_bytes: int = ROUNDED_BYTES
    prepare: Work = field(default_factory=Work)
    prepared_bytes: int = 0


def factored_cost(layers: LayerStack, solve: Work) -> MethodCost:
    """Cost of a method that factors the Hessian of its input and solves all columns of a slab against it."""
    # The sums are copied to a GPU panel by panel, and held there twice while they are assembled.
    copies = 2 * hessian_bytes(layers.columns) if layers.gpu_memory else 0
    return MethodCost(solve, SOLVE_BYTES, factorisation(layers.columns), 4 * layers.columns**2 + copies)


def guessed_cost(layers: LayerStack, needs_hessian: bool) -> MethodCost:
    """Guess for a method that states no cost: rounding to nearest, or, with a Hessian, one visit of all columns."""
    if not needs_hessian:
        return MethodCost(rounding(layers))
    return factored_cost(layers, rounding(layers) + column_visits(layers, 1))


def rounding(layers: LayerStack) -> Work:
    """Work of rounding every weight independently."""
    return Work(elements=layers.weights * _ROUNDED, launches=100 * layers.slabs)


def range_search(layers: LayerStack, ranges: int) -> Work:
    """Work of searching the scales of all groups among `ranges` ranges, by squared error."""
    parts = ceil(layers.weights / searched_weights(layers.gpu_memory > 0, by_kernel=True))
    return Work(elements=layers.weights * _TRIED * ranges, launches=30 * ranges * parts)


def column_visits(layers: LayerStack, solves: int) -> Work:
    """Work of `solves` solves column by column, each propagating the error of finished columns to the rest.

    The power of the output, and of its error, is computed once, after the last solve.
    """
    return Work(
        exact_flops=(solves + 2) * layers.weights * layers.columns,
        elements=solves * layers.weights * _VISITED,
        launches=solves * layers.slabs * layers.columns * _LAUNCHES_OF_A_COLUMN,
    )


def scale_fits(layers: LayerStack, fits: int, groups: int) -> Work:
    """Work of fitting scales to the codes by the output error, `fits` times. groups: number of scales of a row."""
    return Work(
        exact_flops=2 * fits * layers.weights * layers.columns,
        elements=fits * 6 * layers.weights * groups,
        launches=fits * layers.slabs * groups * 20,
    )


def factorisation(columns: int) -> Work:
    """Work of the Cholesky factorisation of a Hessian, including sorting its columns in the order of the solve."""
    # Small matrices are bound by latency, and sorting moves elements one by one.
    flops = columns**3 / 3 * max(1.0, _FAST_COLUMNS / columns)
    return Work(exact_flops=flops, elements=_PLACED * columns**2, launches=8 * len(panel_bounds(columns)))


@cache
def hessian_elements(columns: int) -> int:
    """Number of stored elements of a Hessian: its panels up to the diagonal."""
    return sum((stop - start) * stop for start, stop in panel_bounds(columns))


def hessian_bytes(columns: int) -> int:
    """Bytes of the stored elements of a Hessian."""
    return 4 * hessian_elements(columns)
