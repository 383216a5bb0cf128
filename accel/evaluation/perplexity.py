"""Windows of a token stream, so that perplexity scores every token once with as much context as the windows allow.

Source: the stride rule of transformers' guide "Perplexity of fixed-length models".
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hasten.accel.data.tokens import LIBRARY, holds_rows, load_tokens
from hasten.accel.errors import UserError

# Windows that overlap need longer texts to move over; a library excerpt is this many windows' tokens long.
_EXCERPT = 8


@dataclass(frozen=True)
class Windows:
    """Windows of one length and the positions that each of them scores.

    tokens: (N, T) int64. first, stop: (N,) int64, window n scores its positions first[n] <= t < stop[n]; what stands
    at stop[n] and later is filler. first[n] is at least 1: a token without any before it has no probability.
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
        """The index-th of so many parts of nearly equal size; their sums add up to those of the whole."""
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
    """Windows over sequences * sequence_length held-out tokens of a source, see load_tokens.

    Where windows overlap (stride below sequence_length), they move over the beginning of a file as one stream, and
    over excerpts of the library that are several windows long.
    Raises UserError for a stride out of range, and for one that would have to move over the rows of a .npy.
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
        rows = -(-sequences // _EXCERPT) if source == LIBRARY else 1
    length = -(-sequences * sequence_length // rows)
    return windows(load_tokens(source, tokenizer, rows, length, "held_out", seed, vocabulary), sequence_length, stride)


def windows(tokens: Tensor, length: int, stride: int | None = None) -> Windows:
    """Windows of a stream (S,), or of every row of (R, S) as a stream of its own.

    A window moves on by stride positions and scores the tokens that no window before it has scored: the first window
    of a stream all but its first token, every other its last stride tokens. Where a stream ends inside a window, the
    rest of that window is filler behind the scored tokens, which no causal model lets them see.
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
        # A disjoint window's own first token has nothing before it.
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
    kept = [first < end - start for start, end, first in spans] * len(streams)
    first = torch.tensor([first for _, _, first in spans] * len(streams), dtype=torch.int64)
    stop = torch.tensor([end - start for start, end, _ in spans] * len(streams), dtype=torch.int64)
    keep = torch.tensor(kept, dtype=torch.bool)
    joined = torch.stack(rows) if rows else streams.new_zeros((0, length))
    return Windows(joined[keep], first[keep], stop[keep])
