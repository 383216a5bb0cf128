"""What a compression method states of its own cost, and the parts that such a statement is put together from.

A method's `cost` stands in its file, beside the algorithm whose operations it counts. A method that states nothing is
planned by `guessed_cost`, and the plan says so.
"""

from dataclasses import dataclass, field
from math import ceil

from hasten.accel.compression.calibration.slabs import SOLVE_BYTES, searched_weights, slab_weights
from hasten.accel.compression.calibration.statistics import panel_bounds
from hasten.accel.costs.estimate import Work

# Bytes of a weight that is rounded or pruned by itself, in float32 and codes.
ROUNDED_BYTES = 14
# Small operations on every weight for each range that a grid is searched among, and for one visit of its column: the
# column itself, and its error propagated within the columns that are visited one by one.
_TRIED, _VISITED = 9, 28
_LAUNCHES_OF_A_COLUMN = 50
_ROUNDED = 10
# Columns from which a factorisation runs as fast as a product; and operations to put an element in its place.
_FAST_COLUMNS, _PLACED = 8192, 30


@dataclass(frozen=True)
class LayerStack:
    """Shape of linear layers that share an input and are solved together.

    rows: of all layers. columns: of each. gpu_memory: bytes of the GPU that solves them, 0 on a processor.
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
        """Slabs of rows that are solved one after the other."""
        return ceil(self.weights / slab_weights(self.gpu_memory))

    @property
    def slab(self) -> int:
        """Weights that are solved at once."""
        return min(slab_weights(self.gpu_memory), self.weights)


@dataclass(frozen=True)
class MethodCost:
    """What a method takes for a stack of layers at one level; reading the weights is counted by the plan.

    solve: arithmetic at this level. prepare: arithmetic of prepare(), done once for all levels. weight_bytes: memory
    for each weight of a slab while it is solved. prepared_bytes: memory of what prepare() makes.
    """

    solve: Work
    weight_bytes: int = ROUNDED_BYTES
    prepare: Work = field(default_factory=Work)
    prepared_bytes: int = 0


def factored_cost(layers: LayerStack, solve: Work) -> MethodCost:
    """Cost of a method that factors the Hessian of its input and solves all columns of a slab against it."""
    # The sums come to a GPU panel by panel, and lie there once more while they are put together.
    copies = 2 * hessian_bytes(layers.columns) if layers.gpu_memory else 0
    return MethodCost(solve, SOLVE_BYTES, factorisation(layers.columns), 4 * layers.columns**2 + copies)


def guessed_cost(layers: LayerStack, needs_hessian: bool) -> MethodCost:
    """Cost of a method that states none: of rounding to nearest, or of one visit of all columns, as GPTQ's."""
    if not needs_hessian:
        return MethodCost(rounding(layers))
    return factored_cost(layers, rounding(layers) + column_visits(layers, 1))


def rounding(layers: LayerStack) -> Work:
    """Every weight goes to a value of its own."""
    return Work(elements=layers.weights * _ROUNDED, launches=100 * layers.slabs)


def range_search(layers: LayerStack, ranges: int) -> Work:
    """Search of the scales of all groups among so many ranges, by squared error."""
    parts = ceil(layers.weights / searched_weights(layers.gpu_memory > 0))
    return Work(elements=layers.weights * _TRIED * ranges, launches=30 * ranges * parts)


def column_visits(layers: LayerStack, solves: int) -> Work:
    """Column by column, with the error of finished columns propagated to the rest, so many times.

    The first solve alone computes what the output would have been.
    """
    return Work(
        exact_flops=(solves + 1) * layers.weights * layers.columns,
        elements=solves * layers.weights * _VISITED,
        launches=solves * layers.slabs * layers.columns * _LAUNCHES_OF_A_COLUMN,
    )


def scale_fits(layers: LayerStack, fits: int, groups: int) -> Work:
    """Scales fitted to the codes by the output error, so many times; groups: scales of a row."""
    return Work(
        exact_flops=2 * fits * layers.weights * layers.columns,
        elements=fits * 6 * layers.weights * groups,
        launches=fits * layers.slabs * groups * 20,
    )


def factorisation(columns: int) -> Work:
    """Cholesky factorisation of a Hessian, its columns put in the order of the solve."""
    # Small matrices are bound by latency; and elements are put in their places one by one.
    flops = columns**3 / 3 * max(1.0, _FAST_COLUMNS / columns)
    return Work(exact_flops=flops, elements=_PLACED * columns**2, launches=8 * len(panel_bounds(columns)))


def hessian_elements(columns: int) -> int:
    """Elements of the sums of a Hessian, of which panels up to the diagonal are kept."""
    return sum((stop - start) * stop for start, stop in panel_bounds(columns))


def hessian_bytes(columns: int) -> int:
    """Bytes of these sums."""
    return 4 * hessian_elements(columns)
