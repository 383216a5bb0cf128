"""Levels: the ways in which one layer may be stored, by names such as `w3g128`, `c3` and `s50`."""

import re
from collections.abc import Iterable, Sequence

from hasten.accel.compression.pruners.base import Sparsity
from hasten.accel.compression.quantizers.base import Scheme
from hasten.accel.compression.quantizers.columns import ColumnBits
from hasten.accel.errors import UserError

# What a layer is stored as: codes on a grid, codes whose bits differ by column, or the weights that are left of it.
Level = Scheme | ColumnBits | Sparsity

_QUANTIZED = re.compile(r"w(\d+)(?:g(\d+))?(a?)")
_COLUMNS = re.compile(r"c(\d+(?:\.\d+)?)")
_PRUNED = re.compile(r"s(\d+(?:\.\d+)?)")
# The layer as the checkpoint has it.
KEEP = "keep"


def level_name(level: Level) -> str:
    """`w3g128`: 3 bits, groups of 128; without g one scale a row; with a at the end zero points. `s50`: 50 % zeros.

    `c2.5`: bits of the columns average 2.5.
    """
    if isinstance(level, ColumnBits):
        # All digits: the size depends on them.
        return f"c{str(level.mean).removesuffix('.0')}"
    if isinstance(level, Sparsity):
        return f"s{100 * level.fraction:.6g}"
    group = "" if level.group_size == -1 else f"g{level.group_size}"
    return f"w{level.bits}{group}{'' if level.symmetric else 'a'}"


def parse_level(name: str) -> Level:
    """Level of a name; UserError where it is none."""
    pruned, quantized, columns = _PRUNED.fullmatch(name), _QUANTIZED.fullmatch(name), _COLUMNS.fullmatch(name)
    if columns:
        return ColumnBits(float(columns[1]))
    if pruned:
        # As many digits as a name has: what was parsed has the name that it was parsed from.
        return Sparsity(round(float(pruned[1]) / 100, 8))
    if not quantized:
        raise UserError(
            f"level {name!r} is none: levels are named like w4g128, w3 (one scale a row), w4g128a, c3 or s50"
        )
    return Scheme(int(quantized[1]), int(quantized[2] or -1), symmetric=not quantized[3])


def make_levels(
    bits: Sequence[int],
    group_sizes: Sequence[int],
    symmetric: bool,
    sparsities: Sequence[float] = (),
    column_bits: Sequence[float] = (),
) -> tuple[Level, ...]:
    """All combinations of bits and group sizes, by rising bits and falling group size, then the others.

    Those are column_bits, rising, and sparsities, falling. UserError where a value is out of range or named twice.
    """
    given = {"bits": bits, "group_sizes": group_sizes, "column_bits": column_bits, "sparsities": sparsities}
    for name, values in given.items():
        if len(set(values)) < len(values):
            raise UserError(f"{name}={list(values)} is wrong: expected different values")
    if bits and not group_sizes:
        raise UserError("group_sizes=[] is wrong: expected one or more values, -1 is one scale a row")
    grids = [
        Scheme(one, size, symmetric) for one in sorted(bits) for size in sorted(group_sizes, key=_columns, reverse=True)
    ]
    columns = [ColumnBits(float(one)) for one in sorted(column_bits)]
    # By way of their names, whose digits end: a database that is read must have the levels that were solved.
    pruned = [parse_level(level_name(Sparsity(one))) for one in sorted(sparsities, reverse=True)]
    return (*grids, *columns, *dict.fromkeys(pruned))


def _columns(group_size: int) -> float:
    return float("inf") if group_size == -1 else group_size


def names(levels: Iterable[Level]) -> list[str]:
    """Names of levels."""
    return [level_name(level) for level in levels]
