"""Windows of a token stream for perplexity: every token is scored once, with as much context as the windows allow.

Source: the stride rule of transformers' guide "Perplexity of fixed-length models".
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hasten.accel.data.documents import LIBRARY
from hasten.accel.data.parts import Part
from hasten.accel.data.tokens import fingerprint, holds_rows, load_tokens
from hasten.accel.errors import UserError

# Overlapping windows move over excerpts of the library and of parts; an excerpt is as long as this many windows.
_EXCERPT_WINDOWS = 8


@dataclass(frozen=True)
class Windows:
    """Windows of one length, and the positions that each of them scores.

    tokens: (N, T) int64. first, stop: (N,) int64; window n scores positions first[n] <= t < stop[n], and positions from
    stop[n] on are padding. first[n] is at least 1: a token without a predecessor has no probability. begin: ids with
    which every window begins, as context. They begin the documents inside a window, too, where they are not scored
    either: no text leads to them.
    """

    tokens: Tensor
    first: Tensor
    stop: Tensor
    begin: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.tokens.ndim != 2 or self.first.shape != self.stop.shape or self.first.shape != self.tokens.shape[:1]:
            raise ValueError(f"need tokens (N, T) and first and stop (N,), got {self.tokens.shape}, {self.first.shape}")

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def is_scored(self) -> Tensor:
        """Whether a position is scored, (N, T) bool."""
        position = torch.arange(self.tokens.shape[1])
        scored = (position >= self.first[:, None]) & (position < self.stop[:, None])
        return scored & ~torch.isin(self.tokens, torch.tensor(self.begin, dtype=torch.int64))

    @property
    def scored(self) -> int:
        """Number of tokens scored."""
        return int(self.is_scored.sum())

    def part(self, index: int, parts: int) -> "Windows":
        """Part `index` of `parts` parts of nearly equal size, which hold every window once."""
        return self[part_of(len(self), index, parts)]

    def __getitem__(self, rows: slice) -> "Windows":
        """Some of the windows."""
        return Windows(self.tokens[rows], self.first[rows], self.stop[rows], self.begin)

    def fingerprint(self) -> str:
        """SHA-256 of the ids and of what is scored, in hexadecimal."""
        return fingerprint(torch.where(self.is_scored, self.tokens, -1 - self.tokens))


def part_of(count: int, index: int, parts: int) -> slice:
    """Part `index` of `parts` parts of nearly equal size of `count` items."""
    return slice(count * index // parts, count * (index + 1) // parts)


def load_windows(
    source: str,
    tokenizer: Any,
    sequences: int,
    sequence_length: int,
    stride: int | None = None,
    seed: int = 0,
    vocabulary: int | None = None,
    part: Part | None = None,
    begin: tuple[int, ...] = (),
) -> Windows:
    """Windows over sequences * sequence_length held-out tokens of a source; for source, part and begin see load_tokens.

    Overlapping windows (stride below sequence_length) move over the beginning of a file as one stream, or over excerpts
    of the library or of a part that are several windows long.
    Raises UserError where the stride is out of range, and where windows of a two-dimensional .npy would overlap.
    """
    stride = sequence_length if stride is None else stride
    if sequence_length < 2:
        raise UserError(f"sequence_length={sequence_length} must be at least 2: a window's first token is not scored")
    if not 1 <= stride <= sequence_length:
        raise UserError(f"stride={stride} must be from 1 to sequence_length={sequence_length}")
    if stride == sequence_length:
        tokens = load_tokens(
            source, tokenizer, sequences, sequence_length, "held_out", seed, vocabulary, part=part, begin=begin
        )
        first = torch.full((sequences,), max(1, len(begin)), dtype=torch.int64)
        return Windows(tokens, first, torch.full_like(first, sequence_length), begin)
    if holds_rows(source):
        raise UserError(f"stride={stride} has nothing to move over: {source} holds single windows, not a stream")
    rows = 1 if part is None and source != LIBRARY else -(-sequences // _EXCERPT_WINDOWS)
    length = -(-sequences * sequence_length // rows)
    tokens = load_tokens(source, tokenizer, rows, length, "held_out", seed, vocabulary, part=part)
    return windows(tokens, sequence_length, stride, begin)


def windows(tokens: Tensor, length: int, stride: int | None = None, begin: tuple[int, ...] = ()) -> Windows:
    """Windows of a stream (S,), or of the rows of (R, S), each of which is a separate stream.

    A window starts stride positions after the one before it and scores the tokens that no earlier window has scored:
    the first window of a stream all but its first token, every other window its last stride tokens. Where a stream ends
    inside a window, the window is padded behind the scored tokens, which a causal model does not attend to.
    None and stride == length give disjoint windows, which score all but their first token.
    begin: ids before the tokens of every window, which take part of its length. Behind them a stream's first token is
    scored, too.
    """
    stride = length if stride is None else stride
    if length < 2 or not 1 <= stride <= length or length <= len(begin):
        raise ValueError(f"need length >= 2 and 1 <= stride <= length, got length={length}, stride={stride}")
    text = length - len(begin)
    stride = min(stride, text)
    streams = tokens if tokens.ndim == 2 else tokens[None]
    size = streams.shape[1]
    head = streams.new_tensor(begin)
    # A token without a predecessor is not scored.
    unscored = 0 if begin else 1
    rows, first, stop = [], [], []
    for stream in streams:
        scored = unscored
        for start in range(0, max(size - unscored, 0), stride):
            end = min(start + text, size)
            # Where the stream itself goes on with `begin`, it is not repeated.
            inside = start + (len(begin) if begin and torch.equal(stream[start : start + len(begin)], head) else 0)
            row = stream.new_zeros(length)
            row[: len(begin) + end - inside] = torch.cat([head, stream[inside:end]])
            low = max(scored, inside, start + unscored)
            # A window that starts at the stream's last token would score nothing.
            if low < end:
                rows.append(row)
                first.append(len(begin) + low - inside)
                stop.append(len(begin) + end - inside)
            scored = end
            if end == size:
                break
    joined = torch.stack(rows) if rows else streams.new_zeros((0, length))
    return Windows(joined, torch.tensor(first, dtype=torch.int64), torch.tensor(stop, dtype=torch.int64), begin)
