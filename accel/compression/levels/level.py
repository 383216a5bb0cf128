"""Levels: the ways in which one layer may be stored, by names such as `w3g128`."""

import re
from collections.abc import Iterable, Sequence

from accel.compression.quantizers.base import Scheme
from accel.errors import UserError

_NAME = re.compile(r"w(\d+)(?:g(\d+))?(a?)")
# The layer as the checkpoint has it.
KEEP = "keep"


def level_name(scheme: Scheme) -> str:
    """`w3g128`: 3 bits, groups of 128; without g one scale a row; with a at the end zero points."""
    group = "" if scheme.group_size == -1 else f"g{scheme.group_size}"
    return f"w{scheme.bits}{group}{'' if scheme.symmetric else 'a'}"


def level_scheme(name: str) -> Scheme:
    """Scheme of a level's name; UserError where it is none."""
    found = _NAME.fullmatch(name)
    if not found:
        raise UserError(f"level {name!r} is none: levels are named like w4g128, w3 (one scale a row) or w4g128a")
    return Scheme(int(found[1]), int(found[2] or -1), symmetric=not found[3])


def make_schemes(bits: Sequence[int], group_sizes: Sequence[int], symmetric: bool) -> tuple[Scheme, ...]:
    """Every combination, by rising bits and falling group size; UserError where one is out of range or named twice."""
    for name, values in (("bits", bits), ("group_sizes", group_sizes)):
        if not values or len(set(values)) < len(values):
            raise UserError(f"{name}={list(values)} is wrong: expected one or more different values")
    return tuple(
        Scheme(one, size, symmetric) for one in sorted(bits) for size in sorted(group_sizes, key=_columns, reverse=True)
    )


def _columns(group_size: int) -> float:
    return float("inf") if group_size == -1 else group_size


def names(schemes: Iterable[Scheme]) -> list[str]:
    """Names of the levels of schemes."""
    return [level_name(scheme) for scheme in schemes]
