"""Training windows: recorded sequences packed into windows of T tokens, several in one.

Windows are packed once, best fit of decreasing length, and drawn in an order that depends on the seed and on the number
of the step alone, so that a resumed training goes on with the batches that it would have had.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hasten.accel.errors import UserError
from hasten.accel.training.data.records import Records
from hasten.accel.training.heads.draft_head import HeadBatch


@dataclass(frozen=True)
class Piece:
    """Tokens of one sequence. row: of the first one in its shard. start: position of the first one in the sequence."""

    shard: int
    row: int
    start: int
    length: int


def pack(pieces: Sequence[Piece], length: int) -> list[list[Piece]]:
    """Windows of at most `length` tokens, each a list of pieces; best fit of decreasing length."""
    windows: list[list[Piece]] = []
    room: list[tuple[int, int]] = []  # (free tokens, window), ascending
    for piece in sorted(pieces, key=lambda piece: -piece.length):
        index = bisect_left(room, (piece.length, -1))
        if index < len(room):
            free, window = room.pop(index)
        else:
            free, window = length, len(windows)
            windows.append([])
        windows[window].append(piece)
        if free > piece.length:
            insort(room, (free - piece.length, window))
    return windows


class PackedWindows:
    """Windows of the records of a folder. layers: hidden states that batches have. length: T.

    A sequence of more than T tokens is cut; otherwise one sequence is in one window. UserError if the folder holds no
    token that is to be learned, or lacks a layer.
    """

    def __init__(self, records: Records, layers: Sequence[int], length: int, seed: int = 0) -> None:
        self.length = length
        self._records, self._layers, self._seed = records, tuple(layers), seed
        records.select(torch.empty(0, len(records.meta.layers) * records.meta.hidden_size), layers)
        self._paths = records.shards()
        self._files: dict[Path, Any] = {}
        pieces, learned = [], []
        for shard, path in enumerate(self._paths):
            row = 0
            flags = self._tensor(path, "learned").long().cumsum(0)
            for count in self._tensor(path, "lengths").tolist():
                for start in range(0, count, length):
                    piece = Piece(shard, row + start, start, min(length, count - start))
                    before = int(flags[piece.row - 1]) if piece.row else 0
                    learns = int(flags[piece.row + piece.length - 1]) - before
                    if learns:
                        pieces.append(piece)
                        learned.append(learns)
                row += count
        self.learned_tokens = sum(learned)
        if not pieces:
            raise UserError(f"{records.folder} holds no token to be learned: record texts, or answers of the target")
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(pieces), generator=generator).tolist()
        self._windows = pack([pieces[index] for index in order], length)

    def __len__(self) -> int:
        return len(self._windows)

    def order(self, step: int, batch: int) -> list[int]:
        """Windows of the batch of a step, from 0; every epoch has all windows once, in another order."""
        numbers = range(step * batch, (step + 1) * batch)
        orders = {epoch: self._shuffled(epoch) for epoch in {number // len(self) for number in numbers}}
        return [orders[number // len(self)][number % len(self)] for number in numbers]

    def _shuffled(self, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed((self._seed + 1) * 1_000_003 + epoch)
        return torch.randperm(len(self), generator=generator).tolist()

    def counts(self, vocabulary: int) -> Tensor:
        """How often each id is to be learned, (V,) int64."""
        counts = torch.zeros(vocabulary, dtype=torch.long)
        for path in self._paths:
            tokens = self._tensor(path, "tokens")[self._tensor(path, "learned")]
            counts += torch.bincount(tokens, minlength=vocabulary)
        return counts

    def batch(self, numbers: Sequence[int]) -> HeadBatch:
        """The windows of these numbers, on the CPU; features are in bfloat16, as recorded."""
        meta = self._records.meta
        shape = len(numbers), self.length
        tokens = torch.zeros(shape, dtype=torch.long)
        features = torch.zeros(*shape, len(self._layers) * meta.hidden_size, dtype=torch.bfloat16)
        top_ids = torch.zeros(*shape, meta.top, dtype=torch.long)
        top_log_probs = torch.full((*shape, meta.top), -torch.inf)
        learned = torch.zeros(shape, dtype=torch.bool)
        segments = torch.full(shape, -1)
        positions = torch.zeros(shape, dtype=torch.long)
        for row, number in enumerate(numbers):
            place = 0
            for segment, piece in enumerate(self._windows[number]):
                path = self._paths[piece.shard]
                first, last = piece.row, piece.row + piece.length
                to = slice(place, place + piece.length)
                tokens[row, to] = self._tensor(path, "tokens", first, last)
                features[row, to] = self._records.select(self._tensor(path, "features", first, last), self._layers)
                top_ids[row, to] = self._tensor(path, "top_ids", first, last).long()
                top_log_probs[row, to] = self._tensor(path, "top_log_probs", first, last).float()
                learned[row, to] = self._tensor(path, "learned", first, last)
                segments[row, to] = segment
                positions[row, to] = torch.arange(piece.start, piece.start + piece.length)
                place += piece.length
        return HeadBatch(tokens, features, top_ids, top_log_probs, learned, segments, positions)

    def _tensor(self, path: Path, name: str, first: int = 0, last: int | None = None) -> Tensor:
        """Rows of a shard's tensor, of which only these are read."""
        try:
            if path not in self._files:
                self._files[path] = safe_open(path, framework="pt")
            tensor: Tensor = self._files[path].get_slice(name)[first:last]
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} is damaged ({error}): delete it and record it again") from error
        return tensor
