"""Mixtures of texts: sources with weights, written `mix:SOURCE:WEIGHT+SOURCE:WEIGHT`.

All windows have the same length, so a share of the windows is the same share of the tokens.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path

from hasten.accel.errors import UserError

PREFIX = "mix:"
# A name may hold colons and plus signs itself: the weight is the last number, before a plus sign or the end.
_COMPONENT = re.compile(r"(.+?):(\d+(?:\.\d*)?|\.\d+)(?:\+|$)")


@dataclass(frozen=True)
class Component:
    """One source of a mixture. weight: its share of the tokens; the weights of a mixture add up to 1."""

    source: str
    weight: float


def is_mixture(source: str) -> bool:
    """Whether a source is a mixture."""
    return source.startswith(PREFIX)


def components(source: str) -> list[Component]:
    """Sources and shares of a mixture; any other source is the only one of itself. UserError for a wrong mixture."""
    if not is_mixture(source):
        return [Component(source, 1.0)]
    text = source.removeprefix(PREFIX)
    found = list(_COMPONENT.finditer(text))
    if not found or "".join(match[0] for match in found) != text or text.endswith("+"):
        raise UserError(
            f"source={source} must be {PREFIX}SOURCE:WEIGHT+SOURCE:WEIGHT, such as mix:a.jsonl:0.7+library:0.3"
        )
    weights = [float(match[2]) for match in found]
    names = [match[1] for match in found]
    if min(weights) <= 0 or not isfinite(sum(weights)):
        raise UserError(f"source={source} has the weight {min(weights):g}: weights must be above 0")
    if len(set(names)) < len(names) or any(map(is_mixture, names)):
        raise UserError(f"source={source} must name each source once, and no mixture inside it")
    return [Component(name, weight / sum(weights)) for name, weight in zip(names, weights, strict=True)]


def counts(parts: Sequence[Component], sequences: int, source: str) -> list[int]:
    """Sequences of each component, by largest remainder; UserError where one would have none."""
    exact = [part.weight * sequences for part in parts]
    whole = [int(number) for number in exact]
    # Equal remainders go to the component that is named first.
    order = sorted(range(len(parts)), key=lambda index: (whole[index] - exact[index], index))
    for index in order[: sequences - sum(whole)]:
        whole[index] += 1
    if 0 in whole:
        part = parts[whole.index(0)]
        raise UserError(
            f"source={source} has a share of {part.weight:.3g} of {part.source}, which is none of the {sequences} "
            "sequences asked for: give more sequences or a larger weight"
        )
    return whole


def absolute(source: str) -> str:
    """The source, paths of files absolute: later runs have other current folders."""
    if not is_mixture(source):
        return str(Path(source).absolute()) if Path(source).is_file() else source
    return PREFIX + "+".join(f"{absolute(part.source)}:{part.weight:.6g}" for part in components(source))
