"""Group sizes: the size that `auto` stands for in each layer, and the check of a size that was given.

`auto` is the largest of 128, 64 and 32 that divides the columns of a layer, and one scale a row where none does. Layers
that servers fuse (q/k/v, gate/up) read the same input, so they get the same size. Layers with zero points get the
largest size that divides the columns of all layers, and so do experts, because transformers reads one grid for all of
these layers.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from math import gcd

from hasten.accel.compression.levels.base import AutoSize, Level
from hasten.accel.errors import UserError
from hasten.accel.models.architecture import Layer

AUTO_SIZES = (128, 64, 32)
# Divisors that a message names are multiples of this, up to this.
_STEP, _MAX_NAMED = 8, 512


def auto_group_size(columns: Iterable[int]) -> int:
    """The largest of 128, 64 and 32 that divides all numbers of columns; -1, one scale a row, where none does."""
    common = gcd(*columns)
    return next((size for size in AUTO_SIZES if common and common % size == 0), -1)


def auto_group_sizes(layers: Sequence[Layer]) -> dict[str, AutoSize]:
    """Sizes that `auto` stands for, by layer name. layers: all that are compressed."""
    dense = auto_group_size(layer.columns for layer in layers if layer.expert is None)
    experts = auto_group_size(layer.columns for layer in layers if layer.expert is not None)
    return {
        layer.name: AutoSize(auto_group_size([layer.columns]), dense)
        if layer.expert is None
        else AutoSize(experts, experts)
        for layer in layers
    }


def check_group_size(level: Level, layers: Sequence[Layer]) -> None:
    """UserError, which names all layers whose columns the level's group size does not divide, and sizes that divide."""
    scheme = None if level.loader_scheme is None else level.loader_scheme.weights
    if scheme is None or scheme.kind != "int":
        # Sizes of other grids are not given: Level.check refuses the layer.
        return
    wrong = [layer for layer in layers if not scheme.fits(layer.columns)]
    if not wrong:
        return
    common = gcd(*(layer.columns for layer in layers))
    sizes = [size for size in range(_STEP, min(common, _MAX_NAMED) + 1, _STEP) if common % size == 0]
    right = f"one of {', '.join(map(str, sizes))}, which divide all layers" if sizes else "no size divides all layers"
    raise UserError(
        f"group_size={scheme.group_size} does not divide {_named(wrong)} ({len(wrong)} of {len(layers)} layers): "
        f"use group_size=auto; {right}; group_size=-1 (one scale a row); or ignore these layers"
    )


def _named(layers: Sequence[Layer]) -> str:
    """The numbers of columns, each with its first layer and the number of the others."""
    by_columns: dict[int, list[Layer]] = {}
    for layer in layers:
        by_columns.setdefault(layer.columns, []).append(layer)
    parts = []
    for columns, same in by_columns.items():
        others = f" and {len(same) - 1} more" if len(same) > 1 else ""
        parts.append(f"the {columns} columns of {same[0].name}{others}")
    return ", nor ".join(parts)


def layers_of_sizes(sizes: Mapping[str, int]) -> dict[int, int]:
    """Number of layers by group size, from the sizes by layer name."""
    return dict(sorted(Counter(sizes.values()).items()))


def described(counts: Mapping[int, int]) -> str:
    """Number of layers by group size, in words: `64 for 120 layers, 128 for 90 layers`."""
    return ", ".join(
        f"{'one scale a row' if size == -1 else size} for {count} layer{'s' * (count > 1)}"
        for size, count in counts.items()
    )
