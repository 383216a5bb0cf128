"""Optimal transport: the highest acceptance of K independent draws by any lossless rule.

Source: Sun et al. 2023, arXiv:2310.15141 (SpecTr's transport with membership cost, as a linear programme).
A reference for k-SEQ and not a verifier, because the programme has a variable for each of 2^V sets of drawn tokens.
"""

from itertools import combinations

import numpy as np
from scipy.optimize import linprog
from torch import Tensor

from hasten.accel.errors import UserError

_MAX_TOKENS = 12


def optimal_acceptance(target_probs: Tensor, draft_probs: Tensor, k: int) -> float:
    """Highest probability that the output token is one of k draws; target_probs, draft_probs: (V,) with V up to 12."""
    size = len(target_probs)
    if not 1 <= size <= _MAX_TOKENS:
        raise UserError(f"target_probs has {size} tokens: the linear programme takes 1 to {_MAX_TOKENS}")
    if k < 1:
        raise UserError(f"k={k} must be 1 or more")
    target, draft = (np.asarray(probs.tolist(), dtype=np.float64) for probs in (target_probs, draft_probs))
    target, draft = target / target.sum(), draft / draft.sum()
    # Only the set of drawn tokens matters, not their order or number.
    sets = [chosen for count in range(1, min(k, size) + 1) for chosen in combinations(range(size), count)]
    # One variable for each pair of a set and a token in it: the probability mass that is transported from set to token.
    pairs = [(index, token) for index, chosen in enumerate(sets) for token in chosen]
    limits = np.zeros((len(sets) + size, len(pairs)))
    for column, (index, token) in enumerate(pairs):
        limits[index, column] = limits[len(sets) + token, column] = 1
    available = np.concatenate(([_probability(draft, chosen, k) for chosen in sets], target))
    solution = linprog(-np.ones(len(pairs)), A_ub=limits, b_ub=available, method="highs")
    assert solution.success, solution.message
    return float(-solution.fun)


def _probability(draft: np.ndarray, chosen: tuple[int, ...], k: int) -> float:
    """Probability that the set of k draws is exactly `chosen`, by inclusion and exclusion."""
    total = 0.0
    for count in range(1, len(chosen) + 1):
        sign = -1 if (len(chosen) - count) % 2 else 1
        total += sign * sum(draft[list(part)].sum() ** k for part in combinations(chosen, count))
    return max(0.0, total)
