"""Shared by drafters that copy: an index of a sequence's n-grams that can be rolled back, and the copy itself."""

from collections import deque
from collections.abc import Sequence

NGram = tuple[int, ...]

# The index can be rolled back by at least this many tokens; beyond that it is built again.
_UNDO_TOKENS = 256


class NGramIndex:
    """Position after the latest, or else the first, occurrence of every n-gram of min_n to max_n tokens.

    An n-gram is indexed once a token follows it, so that the suffix of a sequence does not match itself.
    """

    def __init__(self, min_n: int, max_n: int, latest: bool) -> None:
        self._min_n, self._max_n, self._latest = min_n, max_n, latest
        self._ends: dict[NGram, int] = {}
        self._known = 0  # number of indexed tokens
        # Changes of `_ends` in their order: the position, the n-gram, and its position before, None if it was new.
        self._undo: deque[tuple[int, NGram, int | None]] = deque(maxlen=_UNDO_TOKENS * (max_n - min_n + 1))
        self._undo_from = 0  # the oldest length to which it can be rolled back

    def extend(self, tokens: Sequence[int]) -> None:
        """Index the tokens that are new since the last call."""
        ends = self._ends
        for end in range(self._known, len(tokens)):
            for n in range(self._min_n, min(self._max_n, end) + 1):
                ngram = tuple(tokens[end - n : end])
                before = ends.get(ngram)
                if before is None or self._latest:
                    if len(self._undo) == self._undo.maxlen:
                        self._undo_from = self._undo[0][0] + 1
                    self._undo.append((end, ngram, before))
                    ends[ngram] = end
        self._known = max(self._known, len(tokens))

    def truncate(self, length: int) -> None:
        """Forget all tokens after the first `length`."""
        if length >= self._known:
            return
        if length < self._undo_from:
            self._ends.clear()
            self._undo.clear()
            self._known = self._undo_from = 0
            return
        while self._undo and self._undo[-1][0] >= length:
            _, ngram, before = self._undo.pop()
            if before is None:
                del self._ends[ngram]
            else:
                self._ends[ngram] = before
        self._known = length

    def after(self, ngram: NGram) -> int | None:
        """Position after the n-gram's occurrence; None if it did not occur."""
        return self._ends.get(ngram)


def copied(tokens: Sequence[int], start: int, count: int) -> list[int]:
    """`count` tokens that continue a sequence as the one at `start` < len(tokens) did.

    Where the copy reaches the end of the sequence it continues through itself: text in a loop is drafted for as many
    rounds as fit.
    """
    chain = list(tokens[start : start + count])
    while len(chain) < count:
        chain += chain[: count - len(chain)]
    return chain
