"""STAND: a table of n-grams with the target's probabilities after them; drafts are drawn without replacement.

Source: Song et al. 2025, arXiv:2506.04708.
Departs from it: the shape of the tree is not fitted to maths problems, but is the one with the highest expected
acceptance at fixed acceptance rates by rank; noise is drawn on demand; the size of the table is bounded; it backs off
to single tokens, and learns from rejected nodes and from the end of the prompt: with the paper's tables of committed
text (min_ngram=2, learns_rejected=false, prompt_tokens=0) few n-grams of a short chat are known.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hasten.accel.decoding.context import Context
from hasten.accel.decoding.drafters.retrieval.ngram_probs import SUCCESSORS, NGram, NGramDrafter, NGramProbs
from hasten.accel.decoding.drafters.template import by_acceptance, most_accepted
from hasten.accel.decoding.sampling import Sampling
from hasten.accel.decoding.tree import ROOT, DraftSampling, DraftTree

_MIN_WEIGHT = 1e-12  # relative to the most probable successor; less likely ones are never drawn

# Acceptance rate of a node by its rank, given that its parent is accepted: between the rates measured on text and on
# greedy output for HumanEval.
_RATES = (0.55, 0.1, 0.05, 0.03, 0.02)
_TOPOLOGY = by_acceptance(most_accepted(80, _RATES, depth=10), _RATES)


@dataclass(frozen=True)
class Stand(NGramDrafter):
    """Drafter without a model; it looks up the longest known n-gram of min_ngram to max_ngram tokens at the end.

    learns_rejected: whether it learns n-grams of rejected nodes as well. newest_share: the least weight of the newest
    observation in an average; 0 weighs all alike, 1 keeps the newest alone. prompt_tokens: number of tokens at the end
    of a prompt after which it learns the target's probabilities; they cost the target's output layer for these tokens.
    max_ngrams: number of n-grams kept; the least recently updated one is dropped.
    """

    max_ngram: int = 4
    min_ngram: int = 1
    learns_rejected: bool = True
    newest_share: float = 0.0
    prompt_tokens: int = 64
    max_ngrams: int = 100_000

    def draft_sampling(self, sampling: Sampling) -> DraftSampling:
        """Draws without replacement; deterministic at temperature 0."""
        return DraftSampling.DETERMINISTIC if sampling.is_greedy else DraftSampling.WITHOUT_REPLACEMENT

    def propose(self, context: Context, memory: NGramProbs, budget: int) -> DraftTree:
        """The first nodes of the tree's topology for which the table has tokens.

        The request's temperature is applied to the table's probabilities; its top-k, top-p and penalty are not.
        """
        greedy = context.drafting.is_greedy
        tokens: list[int] = []
        parents: list[int] = []
        labels: list[tuple[str, int, int, int]] = []
        nodes = [ROOT]  # node of ROOT, then of each place of the topology; ROOT where a place is empty
        tails: dict[int, NGram] = {ROOT: tuple(context.tokens[-self.max_ngram :])}
        below: dict[int, tuple[int, list[int]]] = {}
        probs: dict[int, dict[int, float]] = {}
        noise: list[float] = []
        if not greedy:
            noise = torch.empty(budget * SUCCESSORS).exponential_(generator=context.draft_generator).tolist()
        for parent, path in _TOPOLOGY:
            above, rank = nodes[parent + 1], path[-1]
            if above == ROOT and parent != ROOT:  # the parent's place is empty
                nodes.append(ROOT)
                continue
            if above not in below:
                n, row = self._longest_match(memory, tails[above])
                if row and not greedy:
                    probs[above] = row = _with_temperature(row, context.sampling.temperature)
                    start = (above + 1) * SUCCESSORS
                    below[above] = n, _draw_order(row, noise[start : start + SUCCESSORS])
                else:
                    below[above] = n, list(row)
            n, candidates = below[above]
            if rank >= len(candidates):
                nodes.append(ROOT)
                continue
            node = len(tokens)
            nodes.append(node)
            tokens.append(candidates[rank])
            parents.append(above)
            labels.append(("stand", n, rank, min(len(path), 4)))
            tails[node] = (*tails[above], candidates[rank])[-self.max_ngram :]
            if len(tokens) == budget:
                break
        if greedy:
            return DraftTree(tokens, parents, labels=labels)
        full = _dense({parent: probs[parent] for parent in set(parents)}, memory.vocabulary)
        return DraftTree(tokens, parents, DraftSampling.WITHOUT_REPLACEMENT, full, labels=labels)

    def _longest_match(self, memory: NGramProbs, tail: NGram) -> tuple[int, dict[int, float]]:
        """Length of the longest known n-gram at the end of `tail`, and its successors; (0, {}) if none is known."""
        for n in range(min(self.max_ngram, len(tail)), self.min_ngram - 1, -1):
            row = memory.entries.get(tail[-n:])
            if row is not None:
                return n, row.probs
        return 0, {}


def _with_temperature(row: Mapping[int, float], temperature: float) -> dict[int, float]:
    """A row's distribution at a temperature, without tokens of negligible probability."""
    highest = max(row.values())
    weights = {token: (prob / highest) ** (1 / temperature) for token, prob in row.items()}
    weights = {token: weight for token, weight in weights.items() if weight > _MIN_WEIGHT}
    total = sum(weights.values())
    return {token: weight / total for token, weight in weights.items()}


def _draw_order(row: Mapping[int, float], noise: list[float]) -> list[int]:
    """All tokens of a row in the order of draws without replacement, from exponential noise.

    The Gumbel-top-k trick without logarithms: a token's arrival time is exponential with its probability as the rate.
    """
    times = {token: time / prob for (token, prob), time in zip(row.items(), noise, strict=False)}
    return sorted(times, key=times.__getitem__)


def _dense(rows: Mapping[int, Mapping[int, float]], vocabulary: int) -> dict[int, Tensor]:
    """Dense distributions (V,) float32 of sparse rows; one tensor operation fills all of them."""
    full = torch.zeros(len(rows), vocabulary)
    places = [place * vocabulary + token for place, row in enumerate(rows.values()) for token in row]
    full.view(-1)[torch.tensor(places, dtype=torch.long)] = torch.tensor(
        [prob for row in rows.values() for prob in row.values()]
    )
    return dict(zip(rows, full.unbind(), strict=True))
