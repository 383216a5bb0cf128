"""Replay: measures a drafter without a target, on a text that stands for greedy output of the target.

Differs from decoding for a drafter that observes the target's most probable tokens: a text gives only its own next
token, with probability 1, and nothing after drafted tokens that it does not continue with. Such a drafter is never
overestimated, and mostly underestimated.
"""

import itertools
from collections.abc import Iterable, Sequence
from time import perf_counter

import torch
from torch import Tensor

from hasten.accel.decoding.context import Context
from hasten.accel.decoding.drafters.base import Drafter, Memory, Outcome
from hasten.accel.decoding.stats import DecodingStats
from hasten.accel.decoding.tree import ROOT, DraftTree
from hasten.accel.decoding.verifiers.base import descend


def replay(
    drafter: Drafter,
    memory: Memory,
    sequences: Iterable[tuple[Sequence[int], int]],
    budget: int,
    features: Iterable[Tensor] | None = None,
) -> list[DecodingStats]:
    """Statistics of every sequence, replayed one after the other. sequences: ids, and the length of the prompt.

    features: (T, F * D) of each sequence, for a drafter that reads the target's hidden states.

    At each step the drafter drafts at most `budget` tokens; the longest path that the text follows is accepted, and the
    text's next token is committed after it. draft_seconds: time of proposing and observing; other times are zero.
    """
    recorded = itertools.repeat(None) if features is None else features
    return [
        _replayed(drafter, memory, tokens, prompt, budget, states)
        for (tokens, prompt), states in zip(sequences, recorded, strict=False)
    ]


def distinct_share(sequences: Iterable[Sequence[int]], n: int = 1) -> float:
    """Distinct n-grams of each sequence divided by all of its n-grams, summed over sequences; 1 if there are none.

    A low share means a repetitive text, which favours drafters that copy.
    """
    distinct = total = 0
    for tokens in sequences:
        grams = [tuple(tokens[start : start + n]) for start in range(len(tokens) - n + 1)]
        distinct += len(set(grams))
        total += len(grams)
    return distinct / total if total else 1.0


def _replayed(
    drafter: Drafter, memory: Memory, tokens: Sequence[int], prompt: int, budget: int, features: Tensor | None
) -> DecodingStats:
    context = Context.start(list(tokens[:prompt]))
    stats = DecodingStats()
    drafter.begin(context, memory)
    read = 0
    while len(context.tokens) < len(tokens):
        # As in decoding, those of all committed tokens except the last, which has not run.
        if features is not None and (known := len(context.tokens) - 1) > read:
            drafter.observe_features(memory, context, read, features[read:known])
            read = known
        rest = tokens[len(context.tokens) :]
        drafter.prefill([context], memory, budget)
        started = perf_counter()
        tree = drafter.propose(context, memory, budget)
        seconds = perf_counter() - started
        # As in decoding, nodes beyond the last token are dropped.
        if tree.depths and max(tree.depths) >= len(rest):
            tree = tree.keep([node for node, depth in enumerate(tree.depths) if depth < len(rest)])
        depths = {ROOT: 0, **dict(enumerate(tree.depths))}
        verdict = descend(tree, lambda node, rest=rest, depths=depths: rest[depths[node]])  # type: ignore[misc]
        outcome = Outcome(context, tree, verdict.path, verdict.token)
        started = perf_counter()
        drafter.observe(memory, _with_text_tokens(outcome) if drafter.observes else outcome)
        seconds += perf_counter() - started
        stats.add(outcome, len(outcome.committed), seconds, 0.0, 0.0)
        context.tokens += outcome.committed
    drafter.end(context, memory)
    return stats


def _with_text_tokens(outcome: Outcome) -> Outcome:
    """The outcome with the text's own tokens as top tokens, without rejected nodes, which the text does not cover."""
    accepted = outcome.tree.keep(outcome.path) if outcome.path else DraftTree()
    top_tokens = torch.tensor(outcome.committed)[:, None]
    path = range(len(accepted))
    return Outcome(outcome.context, accepted, path, outcome.token, top_tokens, torch.ones(len(path) + 1, 1))
