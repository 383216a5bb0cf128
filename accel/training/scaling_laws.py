"""Scaling laws of drafts: acceptance is linear in the logarithms of draft size, training tokens and batch.

Source: Yan et al. 2025, arXiv:2505.07858 (Scylla).
Departs from it: one least-squares fit over all factors that the rows vary, where the paper fits one factor at a time.
Intervals are Student's t intervals of least squares.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import log2, sqrt

import numpy as np
from scipy import stats

from hasten.accel.errors import UserError

FACTORS = ("parameters", "tokens", "batch")


@dataclass(frozen=True)
class Row:
    """A trained draft. parameters, tokens, batch: by name, above 0. acceptance: tokens of a pass of the target."""

    factors: Mapping[str, float]
    acceptance: float


@dataclass(frozen=True)
class Interval:
    """A value with the bounds of its interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class ScalingLaw:
    """acceptance = coefficients · (1, log2 factor, …): a coefficient is what twice the factor gives.

    names: factors that the rows vary. constant: the one value of the others. residual: standard deviation around the
    law. r_squared: share of the variance that it explains. ranges: smallest and largest value of every factor.
    """

    names: tuple[str, ...]
    constant: Mapping[str, float]
    coefficients: tuple[Interval, ...]
    residual: float
    r_squared: float
    ranges: Mapping[str, tuple[float, float]]
    confidence: float
    _covariance: np.ndarray
    _freedom: int

    @classmethod
    def fit(cls, rows: Sequence[Row], confidence: float = 0.95) -> "ScalingLaw":
        """Least squares; UserError with the reason for rows that determine no law."""
        known = [name for name in FACTORS if all(name in row.factors for row in rows)]
        values = {name: [row.factors[name] for row in rows] for name in known}
        for name, column in values.items():
            if min(column, default=1) <= 0:
                raise UserError(f"{name}={min(column):g} of a draft is wrong: its logarithm needs a number above 0")
        names = tuple(name for name in known if len(set(values[name])) > 1)
        if not names:
            raise UserError(
                f"{len(rows)} rows have one value of {', '.join(known) or 'no factor'} each: a law needs drafts that "
                "differ in size, training tokens or batch"
            )
        needed = len(names) + 2
        if len(rows) < needed:
            raise UserError(
                f"{len(rows)} rows are too few: a law over {', '.join(names)} with an interval needs {needed} or more"
            )
        design = np.array([[1.0, *(log2(row.factors[name]) for name in names)] for row in rows])
        if np.linalg.matrix_rank(design) < design.shape[1]:
            raise UserError(
                f"{' and '.join(names)} vary together in all rows, so that their effects cannot be told apart: add "
                "drafts that differ in one of them alone"
            )
        acceptance = np.array([row.acceptance for row in rows])
        inverse = np.linalg.inv(design.T @ design)
        found = inverse @ design.T @ acceptance
        freedom = len(rows) - len(found)
        errors = acceptance - design @ found
        variance = float(errors @ errors) / freedom
        total = float(((acceptance - acceptance.mean()) ** 2).sum())
        reach = float(stats.t.ppf(0.5 + confidence / 2, freedom))
        widths = reach * np.sqrt(variance * np.diag(inverse))
        return cls(
            names,
            {name: values[name][0] for name in known if name not in names},
            tuple(Interval(float(v), float(v - w), float(v + w)) for v, w in zip(found, widths, strict=True)),
            sqrt(variance),
            1 - float(errors @ errors) / total if total else 1.0,
            {name: (min(values[name]), max(values[name])) for name in known},
            confidence,
            variance * inverse,
            freedom,
        )

    def predict(self, **factors: float) -> Interval:
        """Acceptance of a draft, with the interval of a single measurement."""
        x = np.array([1.0, *(log2(factors[name]) for name in self.names)])
        value = float(x @ [each.value for each in self.coefficients])
        width = float(stats.t.ppf(0.5 + self.confidence / 2, self._freedom))
        width *= sqrt(self.residual**2 + float(x @ self._covariance @ x))
        return Interval(value, value - width, value + width)

    def is_measured(self, **factors: float) -> bool:
        """Whether the factors are within those of the rows, so that nothing is extrapolated."""
        return all(self.ranges[name][0] <= factors[name] <= self.ranges[name][1] for name in self.names)


@dataclass(frozen=True)
class Costs:
    """Times in milliseconds.

    target_ms: a pass of the target over a draft. plain_ms: one over a single token. depth: tokens of a draft, each of
    them a pass of the draft model. per_million_ms: of such a pass for a million parameters. base_ms: what is added.
    """

    target_ms: float
    plain_ms: float
    depth: int
    per_million_ms: float
    base_ms: float = 0.0

    def speed_up(self, acceptance: float, parameters: float) -> float:
        """Speed against decoding without drafts; a pass gives at least one token and at most one more than drafted."""
        draft_ms = self.base_ms + self.per_million_ms * parameters / 1e6
        tokens = min(max(acceptance, 1.0), self.depth + 1.0)
        return tokens * self.plain_ms / (self.target_ms + self.depth * draft_ms)


@dataclass(frozen=True)
class Choice:
    """A draft. acceptance, speed_up: predicted. measured: whether its factors are within those of the rows."""

    factors: Mapping[str, float]
    acceptance: Interval
    speed_up: Interval
    measured: bool


def choices(
    law: ScalingLaw,
    costs: Costs,
    budget_flops: float | None = None,
    max_tokens: float | None = None,
    reach: float = 1.0,
    points: int = 33,
) -> list[Choice]:
    """A draft of each of `points` sizes, trained with all tokens that the budget allows.

    budget_flops: operations of the training, 6 for each parameter and token; None sets no bound. max_tokens: training
    tokens; None is as many as the rows have at most. reach: factor beyond the smallest and largest size of the rows.
    Drafts of which the budget trains less than the rows' smallest number of tokens are left out; UserError if all are.
    """
    low, high = law.ranges["parameters"]
    batch = law.ranges.get("batch", (1.0, 1.0))[0]
    first, last = law.ranges.get("tokens", (1.0, 1.0))
    sizes = np.geomspace(low / reach, high * reach, points) if high * reach > low / reach else [low]
    found = []
    for size in map(float, sizes):
        tokens = max_tokens or last
        if budget_flops is not None:
            tokens = min(tokens, budget_flops / (6 * size))
        if tokens < first * (1 - 1e-9):
            continue
        factors = {"parameters": size, "tokens": tokens, "batch": batch}
        expected = law.predict(**factors)
        speeds = [costs.speed_up(each, size) for each in (expected.value, expected.low, expected.high)]
        found.append(Choice(factors, expected, Interval(*speeds), law.is_measured(**factors)))
    if not found:
        raise UserError(
            f"a budget of {budget_flops:g} operations trains no draft of {low / reach:,.0f} parameters or more with "
            f"the {first:,.0f} tokens that the smallest training had: give {6 * first * low / reach:g} or more"
        )
    return found
