"""Levels by name, such as `w3g128`, `c3` and `s50`. The kinds are discovered in `levels/kinds`; no list names them."""

import importlib
import inspect
import pkgutil
from collections.abc import Sequence
from functools import cache

from hasten.accel.compression.calibration.group_sizes import AUTO_SIZES
from hasten.accel.compression.levels import kinds
from hasten.accel.compression.levels.base import Level
from hasten.accel.compression.levels.kinds.column_bits import ColumnBitsLevel
from hasten.accel.compression.levels.kinds.grid import GridLevel
from hasten.accel.compression.levels.kinds.sparsity import SparsityLevel
from hasten.accel.compression.levels.schemes import SCHEMES
from hasten.accel.compression.pruners.base import Sparsity
from hasten.accel.compression.quantizers.base import Scheme
from hasten.accel.compression.quantizers.columns import ColumnBits
from hasten.accel.errors import UserError

# The uncompressed layer, as in the original checkpoint.
KEEP = "keep"


@cache
def level_kinds() -> tuple[type[Level], ...]:
    """All kinds of levels, by the name of their module."""
    classes: list[type[Level]] = []
    for module in sorted(pkgutil.iter_modules(kinds.__path__), key=lambda module: module.name):
        path = f"{kinds.__name__}.{module.name}"
        members = vars(importlib.import_module(path)).values()
        classes += [
            member
            for member in members
            if inspect.isclass(member)
            and issubclass(member, Level)
            and member.__module__ == path
            and not inspect.isabstract(member)
        ]
    return tuple(classes)


def parse_level(name: str, option: str = "level") -> Level:
    """Level of a name; UserError, which names the job option, where no level has this name."""
    for kind in level_kinds():
        level = kind.parse(name)
        if level is not None:
            return level
    *others, last = (example for kind in level_kinds() for example in kind.examples)
    raise UserError(f"{option}={name} is wrong: expected a name like {', '.join(others)} or {last}")


def make_levels(
    bits: Sequence[int],
    group_sizes: Sequence[int | str],
    symmetric: bool,
    sparsities: Sequence[float] = (),
    column_bits: Sequence[float] = (),
    extra: Sequence[str] = (),
    schemes: Sequence[str] = (),
) -> tuple[Level, ...]:
    """Levels of a database, without duplicates.

    First all combinations of bits and group sizes, by ascending bits and descending group size; then column_bits,
    ascending; sparsities, descending; schemes, by the names that servers use, and extra levels, by their own names,
    both in their order. UserError where a value is
    out of range or given twice.
    """
    given: dict[str, Sequence[object]] = {
        "bits": bits,
        "group_sizes": group_sizes,
        "column_bits": column_bits,
        "sparsities": sparsities,
        "schemes": schemes,
        "extra_levels": extra,
    }
    for name, values in given.items():
        if len(set(values)) < len(values):
            raise UserError(f"{name}={list(values)} is wrong: expected different values")
    if bits and not group_sizes:
        raise UserError("group_sizes=[] is wrong: expected one or more values, such as auto; -1 is one scale a row")
    grids = [
        GridLevel(Scheme(width, size, symmetric))
        for width in sorted(bits)
        for size in sorted(group_sizes, key=_columns, reverse=True)
    ]
    columns = [ColumnBitsLevel(ColumnBits(float(mean))) for mean in sorted(column_bits)]
    # Parsed from their names, which round the fraction: reading a database must give the levels that were solved.
    pruned = [parse_level(SparsityLevel(Sparsity(fraction)).name) for fraction in sorted(sparsities, reverse=True)]
    wrong = [name for name in schemes if name not in SCHEMES]
    if wrong:
        raise UserError(f"schemes=[{wrong[0]}] is wrong: expected {', '.join(SCHEMES)}")
    named = [parse_level(SCHEMES[name]) for name in schemes]
    others = [parse_level(name, "extra_levels") for name in extra]
    return tuple(dict.fromkeys([*grids, *columns, *pruned, *named, *others]))


def _columns(group_size: int | str) -> float:
    if isinstance(group_size, str):
        return float(AUTO_SIZES[0])
    return float("inf") if group_size == -1 else group_size
