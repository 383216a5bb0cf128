"""A second-order Markov chain as target, its exact joint distribution, and the chi-square test against it."""

from collections.abc import Sequence
from itertools import product

import torch
from torch import Tensor

from hasten.accel.decoding.sampling import Sampling
from hasten.accel.decoding.targets.base import Pass, Target
from hasten.accel.decoding.tree import ROOT

_UNLIMITED = 1 << 20


class MarkovTarget(Target):
    """Target with logits (V, V, V), indexed by the last token but one, the last, and the next token.

    Token 0 precedes the first token. There is no cache: a pass looks logits up by each node and its parent.
    """

    def __init__(self, logits: Tensor) -> None:
        super().__init__(logits.shape[-1], _UNLIMITED, torch.device("cpu"))
        self._table = logits.flatten(0, 1)

    @property
    def cache_bytes(self) -> int:
        """0: there is no cache."""
        return 0

    @property
    def token_bytes(self) -> int:
        """0: there is no cache."""
        return 0

    def _append(
        self, slots: Sequence[int], tokens: Sequence[Sequence[int]], parents: Sequence[Sequence[int]], logits: bool
    ) -> Pass:
        width, rows = max(map(len, tokens)), []
        for slot, new, above in zip(slots, tokens, parents, strict=True):
            held = self._slots[slot]
            last = held.committed[-1] if held.committed else 0
            for token, parent in zip(new, above, strict=True):
                before = last if parent == ROOT else held.waiting[parent]
                held.depths.append(0 if parent == ROOT else held.depths[parent] + 1)
                held.waiting.append(token)
                held.parents.append(parent)
                rows.append(before * self.vocabulary + token)
            rows += [0] * (width - len(new))
        looked_up = self._table[torch.tensor(rows)].view(len(slots), width, -1)
        # Hidden states are not defined; drafters that ask for them get the logits.
        return Pass(looked_up, looked_up)

    def _allocate(self, slots: int, capacity: int) -> None:
        return

    def _run(
        self, slots: Sequence[int], starts: Sequence[int], ids: Tensor, positions: Tensor, allowed: Tensor, logits: bool
    ) -> Pass:
        raise AssertionError("MarkovTarget overrides _append, which calls this")

    def _copy_slot(self, source: int, slot: int, length: int) -> None:
        return

    def _move(self, slot: int, sources: Sequence[int], places: Sequence[int]) -> None:
        return


def joint(logits: Tensor, prompt: Sequence[int], sampling: Sampling, length: int) -> Tensor:
    """Probability of every sequence of `length` tokens after a prompt of at least two, (V,) * length float64."""
    size = logits.shape[-1]
    probs = torch.ones(1, dtype=torch.float64)
    for done in range(length):
        rows = []
        for path in product(range(size), repeat=done):
            tokens = [*prompt, *path]
            row = sampling.penalised(logits[tokens[-2], tokens[-1]], torch.tensor(tokens))
            rows.append(sampling.probs(row).double())
        after = torch.stack(rows)
        probs = (probs[:, None] * after / after.sum(-1, keepdim=True)).flatten()
    return probs.view([size] * length)


def chi_square(counts: Tensor, probs: Tensor) -> tuple[float, int, float]:
    """Statistic, degrees of freedom and p-value of counts against probabilities of the same shape.

    Cells with an expected count below five are merged into one, since the chi-square approximation does not hold for
    them. A count where the probability is zero makes the statistic infinite.
    """
    counts, expected = counts.double().flatten(), (probs * counts.sum() / probs.sum()).flatten()
    if counts[expected == 0].any():
        return float("inf"), int((expected > 0).sum()) - 1, 0.0
    rare = expected < 5
    if rare.any():
        counts = torch.cat((counts[~rare], counts[rare].sum()[None]))
        expected = torch.cat((expected[~rare], expected[rare].sum()[None]))
    kept = expected > 0
    statistic = ((counts[kept] - expected[kept]) ** 2 / expected[kept]).sum()
    freedom = int(kept.sum()) - 1
    tail = torch.special.gammaincc(torch.tensor(freedom / 2, dtype=torch.float64), statistic / 2)
    return float(statistic), freedom, float(tail)
