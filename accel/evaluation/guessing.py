"""Perplexity of guessing, which a model must be clearly below for its predictions to say anything.

The guesser knows how often each token occurred so far, and no context: a predictor of order 0 with the escape
probability of method C of Moffat 1990, "Implementing the PPM data compression scheme" (IEEE Trans. Comm. 38). It learns
while it predicts, so that a short text, in which most tokens are new, does not look predictable: there it is at the
size of the vocabulary, and on a long text near the entropy of the token frequencies.
"""

import math

from torch import Tensor

# A model within a tenth of the guesser's perplexity counts as guessing.
_CLEARLY_BELOW = 0.9


def guessing_perplexity(tokens: Tensor, vocabulary: int) -> float:
    """Perplexity of the guesser on scored tokens (M,), at most the size of the vocabulary: that of uniform guesses."""
    counts: dict[int, int] = {}
    nll = 0.0
    for total, token in enumerate(tokens.tolist()):
        count, distinct = counts.get(token, 0), len(counts)
        if count:
            nll -= math.log(count / (total + distinct))
        else:
            # Tokens that did not occur yet share the probability of an escape.
            escape = distinct / (total + distinct) if total else 1.0
            nll -= math.log(escape / (vocabulary - distinct))
        counts[token] = count + 1
    return min(float(vocabulary), math.exp(nll / len(tokens)))


def is_guessing(perplexity: float, guessing: float) -> bool:
    """Whether a perplexity is not clearly below that of guessing, or not finite."""
    return not perplexity < _CLEARLY_BELOW * guessing
