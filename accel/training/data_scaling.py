"""Acceptance over training tokens: a line over the logarithm of the tokens, and what more data would give.

Tokens a pass grow about linearly with the logarithm of the training tokens (Yan et al. 2025, arXiv:2505.07858,
Scylla) until they come near the depth of the draft, which the line does not know.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scipy import stats

from hasten.accel.errors import UserError

# With fewer points the interval of a line is of no use.
MIN_POINTS = 3


@dataclass(frozen=True)
class Prediction:
    """tokens: of the training. length: tokens a pass. low, high: the interval of a single measurement."""

    tokens: float
    length: float
    low: float
    high: float


@dataclass(frozen=True)
class LogLinear:
    """length = intercept + slope * log2(tokens): slope is what twice the tokens give.

    slope_error: standard error. residual: standard deviation around the line. points, mean, spread: number of
    measurements, and mean and sum of squared deviations of log2(tokens).
    """

    intercept: float
    slope: float
    slope_error: float
    residual: float
    points: int
    mean: float
    spread: float

    @classmethod
    def fit(cls, tokens: Sequence[float], lengths: Sequence[float]) -> "LogLinear":
        """Least squares; UserError for too few points, or points at one number of tokens."""
        count = len(tokens)
        if count < MIN_POINTS or len(set(tokens)) < 2 or min(tokens) <= 0:
            raise UserError(
                f"a line through {count} measurements at {len(set(tokens))} numbers of tokens has no interval: "
                f"measure at {MIN_POINTS} or more"
            )
        x = [math.log2(value) for value in tokens]
        mean, level = sum(x) / count, sum(lengths) / count
        spread = sum((value - mean) ** 2 for value in x)
        slope = sum((value - mean) * (y - level) for value, y in zip(x, lengths, strict=True)) / spread
        intercept = level - slope * mean
        errors = [y - intercept - slope * value for value, y in zip(x, lengths, strict=True)]
        residual = math.sqrt(sum(error**2 for error in errors) / (count - 2))
        return cls(intercept, slope, residual / math.sqrt(spread), residual, count, mean, spread)

    def predict(self, tokens: float, confidence: float = 0.95) -> Prediction:
        """Tokens a pass after a training of so many tokens."""
        x = math.log2(tokens)
        length = self.intercept + self.slope * x
        width = self.residual * math.sqrt(1 + 1 / self.points + (x - self.mean) ** 2 / self.spread)
        reach = float(stats.t.ppf(0.5 + confidence / 2, self.points - 2)) * width
        return Prediction(tokens, length, length - reach, length + reach)
