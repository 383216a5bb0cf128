"""A target that looks its logits up in a table, so that distributions of drafts and of texts are known exactly."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hasten.accel.decoding.sampling import draw
from hasten.accel.decoding.targets.base import Pass, Target
from hasten.accel.decoding.tree import DraftTree
from hasten.accel.decoding.verifiers.base import TargetRows, Verifier


class MarkovTarget(Target):
    """Logits by the token (V, V), or by the token before it and the token (V, V, V); before the first token stands 0.

    The token before is read where the mask points in a cache of ids, so that a wrong mask, a node that was not moved or
    a sequence that was not followed shows in the logits. The hidden states are the logits. passes: nodes of every slot
    that each pass ran, padding included, as (slots, width).
    """

    def __init__(self, logits_table: Tensor, max_length: int = 1 << 20) -> None:
        assert logits_table.ndim in (2, 3), logits_table.shape
        assert len(set(logits_table.shape)) == 1, logits_table.shape
        super().__init__(logits_table.shape[-1], max_length, torch.device("cpu"))
        self.table = logits_table.float()
        self.passes: list[tuple[int, int]] = []

    @property
    def cache_bytes(self) -> int:
        return self._cache.numel() * self._cache.element_size()

    @property
    def token_bytes(self) -> int:
        return 8  # an id

    def _allocate(self, slots: int, capacity: int) -> None:
        self._cache = torch.zeros(slots, capacity, dtype=torch.long)

    def _run(
        self, slots: Sequence[int], starts: Sequence[int], ids: Tensor, positions: Tensor, allowed: Tensor, logits: bool
    ) -> Pass:
        rows, width = len(slots), ids.shape[1]
        self.passes.append((rows, width))
        for row, (slot, start) in enumerate(zip(slots, starts, strict=True)):
            self._cache[slot, start : start + width] = ids[row]
        if self.table.ndim == 2:
            found = self.table[ids]
            return Pass(found, found)
        # Ancestors lie in rising order: the last place that a node sees before its own is its parent's.
        places = torch.arange(allowed.shape[-1])
        own = torch.tensor(list(starts))[:, None, None] + torch.arange(width)[:, None]
        above = torch.where(allowed & (places < own), places, -1).amax(-1)
        before = self._cache[list(slots)].gather(1, above.clamp(min=0)).masked_fill(above < 0, 0)
        found = self.table[before, ids]
        return Pass(found, found)

    def _copy_slot(self, source: int, slot: int, length: int) -> None:
        self._cache[slot, :length] = self._cache[source, :length]

    def _move(self, slot: int, sources: Sequence[int], places: Sequence[int]) -> None:
        self._cache[slot, list(places)] = self._cache[slot, list(sources)]


def random_table(vocabulary: int, order: int = 1, seed: int = 0, scale: float = 1.0) -> Tensor:
    """Logits of a random chain, the same for the same arguments."""
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*[vocabulary] * (order + 1), generator=generator)


def grown(drafter: Any, memory: Any, context: Any, budget: int) -> DraftTree:
    """What a drafter with a draft model over a (V, V) table proposes, without the passes: for many draws."""
    table = memory.target.table
    growth = drafter.grow(context, memory, budget, table[context.tokens[-1]])
    try:
        tokens, _ = next(growth)
        while True:
            tokens, _ = growth.send(table[tokens])
    except StopIteration as stop:
        return stop.value


def decoded(drafter: Any, verifier: Verifier, memory: Any, context: Any, table: Tensor, budget: int, count: int) -> Any:
    """How often each pair of tokens follows a sequence when the target has a (V, V) table; so many draws.

    Where a pass gives one token only, the second is the target's own.
    """
    found: Counter[tuple[int, int]] = Counter()
    after = context.sampling.probs(table)
    for _ in range(count):
        tree = grown(drafter, memory, context, budget)
        rows = TargetRows(table[[context.tokens[-1], *tree.tokens]], tree, context)
        verdict = verifier.verify(tree, rows, context.generator)
        tokens = [*(tree.tokens[node] for node in verdict.path), verdict.token]
        if len(tokens) == 1:
            tokens.append(draw(after[tokens[0]], context.generator))
        found[tokens[0], tokens[1]] += 1
    return found


def pairs(table: Tensor, token: int) -> dict[tuple[int, int], float]:
    """Probability of every pair of tokens after one, at temperature 1."""
    probs = table.double().softmax(-1)
    both = (probs[token][:, None] * probs).tolist()
    return {(first, second): share for first, row in enumerate(both) for second, share in enumerate(row)}


def is_drawn_from(counts: Mapping[Any, int], expected: Mapping[Any, float]) -> bool:
    """Chi-square test of counts against probabilities that add up to one, at a level of 0.1 %."""
    total = sum(counts.values())
    assert {each for each, count in counts.items() if count} <= set(expected), set(counts) - set(expected)
    assert abs(sum(expected.values()) - 1) < 1e-5, sum(expected.values())
    # What is expected less than five times is one cell.
    rare = [each for each, share in expected.items() if total * share < 5]
    cells = [[each] for each in expected if each not in rare] + ([rare] if rare else [])
    statistic = 0.0
    for cell in cells:
        wanted = total * sum(expected[each] for each in cell)
        statistic += (sum(counts.get(each, 0) for each in cell) - wanted) ** 2 / wanted
    # Wilson and Hilferty's quantile of the chi-square distribution.
    freedom = len(cells) - 1
    assert freedom > 0, "one cell says nothing"
    return statistic < freedom * (1 - 2 / (9 * freedom) + 3.09 * (2 / (9 * freedom)) ** 0.5) ** 3
