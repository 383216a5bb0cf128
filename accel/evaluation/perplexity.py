"""Windows of a token stream for perplexity: every token is scored once, with as much context as the windows allow.

Source: the stride rule of transformers' guide "Perplexity of fixed-length models".
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hasten.accel.data.tokens import LIBRARY, holds_rows, load_tokens
from hasten.accel.errors import UserError

# Overlapping windows move over excerpts of the library; an excerpt is as long as this many windows.
_EXCERPT_WINDOWS = 8


@dataclass(frozen=True)
class Windows:
    """Windows of one length, and the positions that each of them scores.

    tokens: (N, T) int64. first, stop: (N,) int64; window n scores positions first[n] <= t < stop[n], and positions from
    stop[n] on are padding. first[n] is at least 1: a token without a predecessor has no probability.
    """

    tokens: Tensor
    first: Tensor
    stop: Tensor

    def __post_init__(self) -> None:
        if self.tokens.ndim != 2 or self.first.shape != self.stop.shape or self.first.shape != self.tokens.shape[:1]:
            raise ValueError(f"need tokens (N, T) and first and stop (N,), got {self.tokens.shape}, {self.first.shape}")

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def scored(self) -> int:
        """Number of tokens scored."""
        return int((self.stop - self.first).sum())

    def part(self, index: int, parts: int) -> "Windows":
        """Part `index` of `parts` parts of nearly equal size, which hold every window once."""
        low, high = len(self) * index // parts, len(self) * (index + 1) // parts
        return Windows(self.tokens[low:high], self.first[low:high], self.stop[low:high])


def load_windows(
    source: str,
    tokenizer: Any,
    sequences: int,
    sequence_length: int,
    stride: int | None = None,
    seed: int = 0,
    vocabulary: int | None = None,
) -> Windows:
    """Windows over sequences * sequence_length held-out tokens of a source; for sources see load_tokens.

    Overlapping windows (stride below sequence_length) move over the beginning of a file as one stream, or over excerpts
    of the library that are several windows long.
    Raises UserError where the stride is out of range, and where windows of a two-dimensional .npy would overlap.
    """
    stride = sequence_length if stride is None else stride
    if sequence_length < 2:
        raise UserError(f"sequence_length={sequence_length} must be at least 2: a window's first token is not scored")
    if not 1 <= stride <= sequence_length:
        raise UserError(f"stride={stride} must be from 1 to sequence_length={sequence_length}")
    rows = sequences
    if stride < sequence_length:
        if holds_rows(source):
            raise UserError(f"stride={stride} has nothing to move over: {source} holds single windows, not a stream")
        rows = -(-sequences // _EXCERPT_WINDOWS) if source == LIBRARY else 1
    length = -(-sequences * sequence_length // rows)
    return windows(load_tokens(source, tokenizer, rows, length, "held_out", seed, vocabulary), sequence_length, stride)


def windows(tokens: Tensor, length: int, stride: int | None = None) -> Windows:
    """Windows of a stream (S,), or of the rows of (R, S), each of which is a separate stream.

    A window starts stride positions after the one before it and scores the tokens that no earlier window has scored:
    the first window of a stream all but its first token, every other window its last stride tokens. Where a stream ends
    inside a window, the window is padded behind the scored tokens, which a causal model does not attend to.
    None and stride == length give disjoint windows, which score all but their first token.
    """
    stride = length if stride is None else stride
    if length < 2 or not 1 <= stride <= length:
        raise ValueError(f"need length >= 2 and 1 <= stride <= length, got length={length}, stride={stride}")
    streams = tokens if tokens.ndim == 2 else tokens[None]
    size = streams.shape[1]
    spans = []
    scored = 1
    for start in range(0, max(size - 1, 0), stride):
        end = min(start + length, size)
        # The first token of a disjoint window has no predecessor.
        spans.append((start, end, max(scored - start, 1)))
        scored = end
        if end == size:
            break
    rows = []
    for stream in streams:
        for start, end, _ in spans:
            row = stream.new_zeros(length)
            row[: end - start] = stream[start:end]
            rows.append(row)
    # A window that starts at the stream's last token would score nothing.
    scores_any = [first < end - start for start, end, first in spans] * len(streams)
    first = torch.tensor([first for _, _, first in spans] * len(streams), dtype=torch.int64)
    stop = torch.tensor([end - start for start, end, _ in spans] * len(streams), dtype=torch.int64)
    keep = torch.tensor(scores_any, dtype=torch.bool)
    joined = torch.stack(rows) if rows else streams.new_zeros((0, length))
    return Windows(joined[keep], first[keep], stop[keep])
