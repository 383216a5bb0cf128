"""A drafter measured on a text as if a target had written it greedily, without one: the text says what is accepted.

Departs from decoding where a drafter observes the target's most probable tokens: all that a text tells is its own next
token, which is given as certain, and nothing of drafted tokens that it does not go on with. A drafter that learns from
such tokens is flattered by none of this, and mostly loses.
"""

from collections.abc import Iterable, Sequence
from time import perf_counter
from typing import Any

import torch

from hasten.accel.decoding.context import Context
from hasten.accel.decoding.drafters.base import Drafter, Outcome
from hasten.accel.decoding.stats import DecodingStats
from hasten.accel.decoding.tree import ROOT, DraftTree
from hasten.accel.decoding.verifiers.base import descend


def replay(
    drafter: Drafter, memory: Any, sequences: Iterable[tuple[Sequence[int], int]], budget: int
) -> list[DecodingStats]:
    """Statistics of every sequence (ids, and how many of them are the prompt), one after the other.

    At each step at most `budget` tokens are drafted; the longest path that the text goes along is accepted, and the
    token after it follows. draft_seconds are those of proposing and observing; no other seconds are counted.
    """
    return [_replayed(drafter, memory, tokens, prompt, budget) for tokens, prompt in sequences]


def distinct_share(sequences: Iterable[Sequence[int]], n: int = 1) -> float:
    """Different n-grams of each sequence as a share of all of its n-grams, over all sequences; 1 where there is none.

    The lower it is, the more a text repeats itself, which flatters drafters that copy.
    """
    different = number = 0
    for tokens in sequences:
        grams = [tuple(tokens[start : start + n]) for start in range(len(tokens) - n + 1)]
        different += len(set(grams))
        number += len(grams)
    return different / number if number else 1.0


def _replayed(drafter: Drafter, memory: Any, tokens: Sequence[int], prompt: int, budget: int) -> DecodingStats:
    context = Context.start(list(tokens[:prompt]))
    stats = DecodingStats()
    drafter.begin(context, memory)
    while len(context.tokens) < len(tokens):
        left = tokens[len(context.tokens) :]
        started = perf_counter()
        tree = drafter.propose(context, memory, budget)
        seconds = perf_counter() - started
        # As in decoding: nothing may be drafted behind the last token that is wanted.
        if tree.depths and max(tree.depths) >= len(left):
            tree = tree.keep([node for node, depth in enumerate(tree.depths) if depth < len(left)])
        depths = {ROOT: 0, **dict(enumerate(tree.depths))}
        verdict = descend(tree, lambda node, left=left, depths=depths: left[depths[node]])  # type: ignore[misc]
        outcome = Outcome(context, tree, verdict.path, verdict.token)
        started = perf_counter()
        drafter.observe(memory, _with_top(outcome) if drafter.observes else outcome)
        seconds += perf_counter() - started
        stats.add(outcome, len(outcome.committed), seconds, 0.0, 0.0)
        context.tokens += outcome.committed
    drafter.end(context, memory)
    return stats


def _with_top(outcome: Outcome) -> Outcome:
    """What the text says after each accepted node; the others are left out, as it says nothing about them."""
    accepted = outcome.tree.keep(outcome.path) if outcome.path else DraftTree()
    top_tokens = torch.tensor(outcome.committed)[:, None]
    path = range(len(accepted))
    return Outcome(outcome.context, accepted, path, outcome.token, top_tokens, torch.ones(len(path) + 1, 1))
