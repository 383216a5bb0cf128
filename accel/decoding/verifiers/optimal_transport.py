"""Optimal transport: the most that K independent draws can be accepted by any lossless rule.

Source: Sun et al. 2023, arXiv:2310.15141 (SpecTr's transport with membership cost, as a linear programme).
The reference for k-SEQ, not a verifier: the programme has 2^V sets of drawn tokens.
"""

from itertools import combinations

import numpy as np
from torch import Tensor

from hasten.accel.errors import UserError

_MAX_TOKENS = 12


def optimal_acceptance(target_probs: Tensor, draft_probs: Tensor, k: int) -> float:
    """Highest probability that the token that comes out is one of k draws; both (V,), of at most 12 tokens."""
    from scipy.optimize import linprog

    size = len(target_probs)
    if not 1 <= size <= _MAX_TOKENS:
        raise UserError(f"target_probs has {size} tokens: the linear programme takes 1 to {_MAX_TOKENS}")
    if k < 1:
        raise UserError(f"k={k} must be 1 or more")
    target, draft = (np.asarray(probs.tolist(), dtype=np.float64) for probs in (target_probs, draft_probs))
    target, draft = target / target.sum(), draft / draft.sum()
    # Which tokens were drawn is all that matters, not in which order or how often.
    sets = [chosen for count in range(1, min(k, size) + 1) for chosen in combinations(range(size), count)]
    # One variable for every way from a set to one of its tokens: how much of both goes that way.
    ways = [(index, token) for index, chosen in enumerate(sets) for token in chosen]
    limits = np.zeros((len(sets) + size, len(ways)))
    for column, (index, token) in enumerate(ways):
        limits[index, column] = limits[len(sets) + token, column] = 1
    available = np.concatenate(([_probability(draft, chosen, k) for chosen in sets], target))
    solution = linprog(-np.ones(len(ways)), A_ub=limits, b_ub=available, method="highs")
    assert solution.success, solution.message
    return float(-solution.fun)


def _probability(draft: np.ndarray, chosen: tuple[int, ...], k: int) -> float:
    """That k draws give these tokens and no others, by inclusion and exclusion."""
    total = 0.0
    for count in range(1, len(chosen) + 1):
        sign = -1 if (len(chosen) - count) % 2 else 1
        total += sign * sum(draft[list(part)].sum() ** k for part in combinations(chosen, count))
    return max(0.0, total)
