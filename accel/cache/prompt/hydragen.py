"""Hydragen: sequences that begin with the same tokens hold these once, and read them once in a pass.

Source: Juravsky et al. 2024, arXiv:2402.05099: attention over a shared prefix is one product for the queries of all of
its sequences, attention over the rest is each sequence's own, and the two are merged by their log-sum-exp. A prefix may
itself begin with a shorter one that more sequences share. It is exact.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from hasten.accel.cache.base import Kept, Place, Recent
from hasten.accel.cache.prompt.base import PromptMethod
from hasten.accel.cache.segments.base import Segment
from hasten.accel.cache.segments.dense import Dense
from hasten.accel.cache.sequence import SequenceCache
from hasten.accel.errors import UserError


@dataclass(frozen=True)
class Hydragen(PromptMethod):
    """Method that shares prefixes. shortest: tokens of a prefix, and of each part of one that fewer sequences share."""

    shortest: int = 64

    has_budget: ClassVar[bool] = False
    frees: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.shortest < 1:
            raise UserError(f"cache.shortest={self.shortest} is out of range: 1 or more")

    @property
    def shared_tokens(self) -> int | None:
        """The shortest prefix."""
        return self.shortest

    def compress(self, segments: Sequence[Segment], recent: Recent, place: Place) -> Kept | None:
        """Everything is kept."""
        return None


def common_length(one: Sequence[int], other: Sequence[int]) -> int:
    """Number of equal first tokens."""
    pairs = zip(one, other, strict=False)
    return next((place for place, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def share(
    all_sequences: Iterable[SequenceCache], giver: SequenceCache, taker: SequenceCache, length: int, shortest: int
) -> int:
    """Let an empty sequence hold the first `length` tokens of another one, too; returns how many it holds.

    all_sequences: of the layer; those that hold a segment which is divided hold its parts instead. No part has fewer
    than `shortest` tokens in front of where it is divided.
    """
    held: list[Segment] = []
    for segment in giver.segments:
        missing = length - sum(part.tokens for part in held)
        if segment.tokens <= missing:
            held.append(segment)
            continue
        if missing >= shortest:
            assert isinstance(segment, Dense)
            first, rest = _part(segment, 0, missing), _part(segment, missing, segment.tokens)
            for sequence in all_sequences:
                sequence.segments = [
                    part for own in sequence.segments for part in ((first, rest) if own is segment else (own,))
                ]
            held.append(first)
        break
    else:
        recent = giver.uncompressed()
        missing = length - sum(part.tokens for part in held)
        if missing >= shortest and recent is not None:
            positions = recent.positions.expand(len(recent.keys), -1)
            segment = _part(Dense(recent.keys, recent.values, positions), 0, missing)
            giver.keep(Kept([*giver.segments, segment], recent.keys.shape[1] - missing))
            held.append(segment)
    taker.begin_with(held)
    return taker.length


def _part(segment: Dense, start: int, stop: int) -> Dense:
    """Copies, so that parts are freed on their own."""
    held = segment.keys, segment.values, segment.positions
    return Dense(*(tensor[:, start:stop].clone() for tensor in held))
