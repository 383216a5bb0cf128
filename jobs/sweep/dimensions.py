"""The words of a sweep, in Hydra's grammar: `bits=2,3,4`, `range(2,6)`, `choice(a,b)`, `interval(0,1)`, `glob(*)`."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Glob, IntervalSweep, RangeSweep
from hydra.errors import HydraException

from hasten.accel.errors import UserError
from hasten.jobs.cli.methods import method_names
from hasten.jobs.cli.quotes import if_needed, quoted


@dataclass(frozen=True)
class Dimension:
    """One option with several values. values: texts in order; None for an interval from low to high.

    is_integer, is_log: kind of an interval's numbers. step: of a range; None if any number is allowed.
    """

    key: str
    values: tuple[str, ...] | None = None
    low: float = 0.0
    high: float = 0.0
    step: float | None = None
    is_integer: bool = False
    is_log: bool = False

    @property
    def is_numeric(self) -> bool:
        """Whether it is a range of numbers, whose order a sampler may use."""
        return self.values is None or self.step is not None

    def ends(self) -> tuple[str, ...]:
        """Texts to check: all values, or the bounds of an interval."""
        if self.values is not None:
            return self.values
        return tuple(f"{int(bound) if self.is_integer else bound}" for bound in (self.low, self.high))


@dataclass(frozen=True)
class Words:
    """A sweep's words. fixed: those with one value, as written. dimensions: those with several values."""

    fixed: tuple[str, ...]
    dimensions: tuple[Dimension, ...]

    @property
    def is_discrete(self) -> bool:
        """Whether the number of points is finite."""
        return all(dimension.values is not None for dimension in self.dimensions)


def read(words: Sequence[str], groups: Sequence[str]) -> Words:
    """Parse the words of a sweep; a word with one value need not follow Hydra's grammar. groups: options with methods.

    Quotes keep a text with commas together.
    """
    fixed: list[str] = []
    dimensions: dict[str, Dimension] = {}
    for word in words:
        key = word.partition("=")[0]
        dimension = _dimension(word, groups)
        fixed = [other for other in fixed if other.partition("=")[0] != key]
        dimensions.pop(key, None)
        if dimension is None:
            fixed.append(word)
        else:
            dimensions[key] = dimension
    return Words(tuple(fixed), tuple(dimensions.values()))


def _dimension(word: str, groups: Sequence[str]) -> Dimension | None:
    key, sign, text = word.partition("=")
    if not sign:
        return None
    try:
        override = OverridesParser.create().parse_override(word)
    except HydraException as error:
        if re.match(r"\s*(choice|range|interval|glob|tag|sort|shuffle)\s*\(", text):
            raise UserError(f"{word} is no list of values: {' '.join(str(error).split())}") from None
        return None  # a plain text
    if not override.is_sweep_override():
        return None
    value: object = override._value
    if isinstance(value, Glob):
        return Dimension(key, _globbed(word, key, value, groups))
    if isinstance(value, IntervalSweep):
        low, high = value.start, value.end
        if low is None or high is None or not (low < high and math.isfinite(high - low)):
            raise UserError(f"{word} is empty or has no end: expected interval(LOW,HIGH), LOW below HIGH")
        is_log = "log" in value.tags
        if is_log and low <= 0:
            raise UserError(f"{word} cannot be logarithmic: LOW must be above 0")
        is_integer = isinstance(low, int) and isinstance(high, int)
        return Dimension(key, None, float(low), float(high), 1.0 if is_integer else None, is_integer, is_log)
    if isinstance(value, RangeSweep):
        end: Any = value.stop
        numbers: list[Any] = []
        if value.step:  # int() may have made it 0
            numbers = list(override.sweep_iterator(transformer=lambda item: item))
        # A sum of floats may end just below the bound, which does not belong to the range.
        numbers = [number for number in numbers if (float(as_text(number)) - end) * value.step < 0]
        if not numbers:
            raise UserError(f"{word} is empty: expected range(START,STOP[,STEP]), without STOP")
        texts = tuple(as_text(number) for number in numbers)
        is_integer = all(isinstance(number, int) for number in numbers)
        low, high = (float(as_text(bound(numbers))) for bound in (min, max))
        return Dimension(key, texts, low, high, abs(float(value.step)), is_integer)
    assert isinstance(value, ChoiceSweep)
    if any(isinstance(item, RangeSweep | IntervalSweep | ChoiceSweep | Glob) for item in value.list):
        raise UserError(f"{word} mixes a list with ranges: expected one of the two, or every value by itself")
    # The parser's iterator has applied `sort` and `shuffle`.
    texts = tuple(as_text(item) for item in override.sweep_iterator(transformer=lambda item: item))
    return Dimension(key, texts)


def _globbed(word: str, key: str, pattern: Glob, groups: Sequence[str]) -> tuple[str, ...]:
    if key not in groups:
        raise UserError(
            f"{word}: {key} is not chosen from a folder; glob is for {', '.join(groups) or 'no option here'}"
        )
    names = tuple(pattern.filter(method_names(key)))
    if not names:
        raise UserError(f"{word} matches none of {', '.join(method_names(key))}")
    return names


def as_text(value: object) -> str:
    """A value as an option's text; floats with the 15 digits that are exact."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{','.join(_item(item) for item in value)}]"
    if isinstance(value, float):
        return str(float(f"{value:.15g}"))
    # A quoted text is an object with the attribute `text`.
    return str(getattr(value, "text", value))


def _item(value: object) -> str:
    """A value inside a list, where a text that was quoted, or is no plain word, is quoted."""
    text = getattr(value, "text", None)
    if text is not None:
        return quoted(text)
    return if_needed(value) if isinstance(value, str) else as_text(value)
