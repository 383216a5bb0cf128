"""Checks that greedy output in a reduced dtype equals the target's own output, except for ties within rounding.

In bfloat16 a pass over several tokens rounds differently from a pass over one, so two tokens whose logits are equal up
to rounding may swap. Each decoded token that is not the most probable one by float32 logits is classified by the gap
between the two logits: a small gap is a tie, a larger one a fault.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from hasten.accel.decoding.targets.base import Target
from hasten.accel.decoding.tree import ROOT

# Largest gap of a tie, in units in the last place of the largest logit. A bfloat16 logit is a sum that was rounded to 8
# bits of mantissa many times; this many units covered all observed ties.
_UNITS = 8
# Bytes of the float32 logits of one pass: they are compared part by part, because a completion's may exceed the memory.
_PASS_BYTES = 1 << 26


@dataclass(frozen=True)
class Ties:
    """Counts of decoded tokens that are not the most probable ones by float32 logits.

    tokens: all decoded tokens. ties: those within rounding of the most probable token. faults: the others.
    largest_gap: largest difference between the two logits.
    """

    tokens: int = 0
    ties: int = 0
    faults: int = 0
    largest_gap: float = 0.0

    @classmethod
    def total(cls, parts: Iterable["Ties"]) -> "Ties":
        """Sum over several sequences."""
        sequences = list(parts)
        tokens, ties, faults = (sum(getattr(part, name) for part in sequences) for name in ("tokens", "ties", "faults"))
        return cls(tokens, ties, faults, max((part.largest_gap for part in sequences), default=0.0))


def check_ties(target: Target, prompt: Sequence[int], decoded: Sequence[int], dtype: torch.dtype) -> Ties:
    """Compare greedily decoded tokens with the logits of a float32 target. dtype: the one they were decoded in."""
    tokens = [*prompt, *decoded]
    target.reserve(1, len(tokens))
    target.prefill(0, prompt[:-1])
    rows = max(1, _PASS_BYTES // (4 * target.vocabulary))
    starts = range(0, len(decoded), rows)
    return Ties.total(
        _of_part(target, tokens[-len(decoded) - 1 + start : -1][:rows], decoded[start : start + rows], dtype)
        for start in starts
    )


def _of_part(target: Target, tokens: Sequence[int], decoded: Sequence[int], dtype: torch.dtype) -> Ties:
    """The check of some tokens, each of which was decoded after one of `tokens`; these are committed to slot 0."""
    logits = target.forward([0], [tokens], [range(ROOT, len(tokens) - 1)]).logits[0].float()
    target.commit(0, range(len(tokens)))
    best = logits.max(-1).values
    gaps = best - logits.gather(1, torch.tensor(decoded, device=logits.device)[:, None])[:, 0]
    within = _UNITS * torch.finfo(dtype).eps * logits.abs().max(-1).values
    off = gaps > 0
    return Ties(len(tokens), int((off & (gaps <= within)).sum()), int((gaps > within).sum()), float(gaps.max()))
