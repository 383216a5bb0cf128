"""Levels by their names, such as `w3g128`, `c3` and `s50`. Kinds are found in `levels/kinds`: no list names them."""

import importlib
import inspect
import pkgutil
from collections.abc import Sequence
from functools import cache

from hasten.accel.compression.levels import kinds
from hasten.accel.compression.levels.base import Level
from hasten.accel.compression.levels.kinds.column_bits import ColumnBitsLevel
from hasten.accel.compression.levels.kinds.grid import GridLevel
from hasten.accel.compression.levels.kinds.sparsity import SparsityLevel
from hasten.accel.compression.pruners.base import Sparsity
from hasten.accel.compression.quantizers.base import Scheme
from hasten.accel.compression.quantizers.columns import ColumnBits
from hasten.accel.errors import UserError

# The layer as the checkpoint has it.
KEEP = "keep"


@cache
def level_kinds() -> tuple[type[Level], ...]:
    """All kinds of levels, by the name of their module."""
    found: list[type[Level]] = []
    for module in sorted(pkgutil.iter_modules(kinds.__path__), key=lambda module: module.name):
        path = f"{kinds.__name__}.{module.name}"
        members = vars(importlib.import_module(path)).values()
        found += [
            member
            for member in members
            if inspect.isclass(member)
            and issubclass(member, Level)
            and member.__module__ == path
            and not inspect.isabstract(member)
        ]
    return tuple(found)


def parse_level(name: str, option: str = "level") -> Level:
    """Level of a name; UserError, which names the option that it was given in, where it is none."""
    for kind in level_kinds():
        level = kind.parse(name)
        if level is not None:
            return level
    *others, last = (example for kind in level_kinds() for example in kind.examples)
    raise UserError(f"{option}={name} is wrong: expected a name like {', '.join(others)} or {last}")


def make_levels(
    bits: Sequence[int],
    group_sizes: Sequence[int],
    symmetric: bool,
    sparsities: Sequence[float] = (),
    column_bits: Sequence[float] = (),
    extra: Sequence[str] = (),
) -> tuple[Level, ...]:
    """All combinations of bits and group sizes, by rising bits and falling group size, then the others.

    Those are column_bits, rising, sparsities, falling, and extra levels by their names, in their order; one that is
    there already counts once. UserError where a value is out of range or named twice.
    """
    given: dict[str, Sequence[object]] = {
        "bits": bits,
        "group_sizes": group_sizes,
        "column_bits": column_bits,
        "sparsities": sparsities,
        "extra_levels": extra,
    }
    for name, values in given.items():
        if len(set(values)) < len(values):
            raise UserError(f"{name}={list(values)} is wrong: expected different values")
    if bits and not group_sizes:
        raise UserError("group_sizes=[] is wrong: expected one or more values, -1 is one scale a row")
    grids = [
        GridLevel(Scheme(one, size, symmetric))
        for one in sorted(bits)
        for size in sorted(group_sizes, key=_columns, reverse=True)
    ]
    columns = [ColumnBitsLevel(ColumnBits(float(one))) for one in sorted(column_bits)]
    # By way of their names, whose digits end: a database that is read must have the levels that were solved.
    pruned = [parse_level(SparsityLevel(Sparsity(one)).name) for one in sorted(sparsities, reverse=True)]
    return tuple(dict.fromkeys([*grids, *columns, *pruned, *(parse_level(name, "extra_levels") for name in extra)]))


def _columns(group_size: int) -> float:
    return float("inf") if group_size == -1 else group_size
