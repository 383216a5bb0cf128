"""Evaluation of a search's candidates on one model in memory, whose layers are swapped in place.

Two candidates that make the same choices in blocks 0 to b have the same hidden states after block b. So genomes are
traversed as a trie, depth first and block by block: every distinct prefix of choices runs once, and hidden states are
kept only as long as another branch starts from them.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hasten.accel.compression.allocators.base import BLOCK, Unit
from hasten.accel.compression.levels.level import KEEP
from hasten.accel.compression.search.blocks import (
    KV_CACHE,
    ROUNDED,
    Block,
    BlockState,
    Slot,
    StoredRoundings,
    WeightCache,
    load_blocks,
)
from hasten.accel.compression.search.fitness import Fitness, Tiles
from hasten.accel.compression.search.moves import Genome
from hasten.accel.compression.search.outer import OuterWeights
from hasten.accel.compression.search.samples import Sample
from hasten.accel.models.architecture import EMBEDDING, HEAD, Architecture
from hasten.accel.models.output_layer import TILE_TOKENS, OutputLayer

# Used as the index of a choice: the unit as in the original checkpoint.
ORIGINAL = -1

# Matrix products may round differently where their operands are aligned differently.
_ALIGNMENT = 64


class Candidates:
    """Evaluates genomes on calibration tokens (N, T) int64, and counts the work.

    A genome holds the index of a choice, or ORIGINAL, for each unit. weights(layer, level) returns a layer's weight
    (R, C), in any dtype; for the level `keep` the checkpoint is read. A unit without layers, of kind `attention`, `mlp`
    or `block`, is that part of its block: at the level `drop` the part adds nothing to the residual stream (norms of
    the residual stream, as in OPT-350m, stay, but not those of a dropped block); at any other level it stays. stored:
    how inputs at the levels, and keys and values, are rounded; the original rounds none. The state
    at position t predicts the token at t + 1. So a part of a sample scores as many tokens as it uses, except that the
    last token of a sequence predicts none.

    Losses do not depend, to the bit, on the order of genomes or on which genomes are evaluated together. They depend on
    the batch in which a sequence runs, see batches(). The original's predictions are computed for one sequence alone.

    Memory: the model in the architecture's dtype; cache_bytes for weights that are swapped out; states_bytes, or one
    batch's states for every open branch, of which there are no more than genomes or blocks; and, per token of every
    evaluated sequence, what the fitness stores of the original's predictions, on the architecture's device. The
    original's hidden states are not kept.

    swapped: number of weights swapped. block_runs: number of batches run through a block. seconds: wall time of all
    evaluations; swap_seconds: the part of it for swapping weights.
    """

    def __init__(
        self,
        architecture: Architecture,
        units: Sequence[Unit],
        weights: Callable[[str, str], Tensor],
        tokens: Tensor,
        fitness: Fitness,
        batch: int = 4,
        cache_bytes: int = 2**30,
        states_bytes: int = 2**30,
        stored: StoredRoundings | None = None,
    ) -> None:
        if tokens.ndim != 2 or tokens.shape[1] < 2 or batch < 1:
            raise ValueError(f"need tokens (N, T), T of 2 or more, and batch >= 1, got {tokens.shape} and {batch}")
        self.architecture, self.units, self.tokens = architecture, tuple(units), tokens
        self.fitness, self.batch = fitness, batch
        self.swapped = self.block_runs = 0
        self.swap_seconds = self.seconds = 0.0
        self._states_bytes = states_bytes
        self._read = weights
        self._cache = WeightCache(cache_bytes)
        self._blocks = load_blocks(architecture, self.units, stored)
        self._outer = OuterWeights(architecture, self.units, weights, self._cache)
        # By sequence, for each of the parts that `_tiles` makes of it.
        self._references: dict[int, list[dict[str, Tensor]]] = {}

    def evaluate(self, genomes: Sequence[Genome], sample: Sample) -> list[float]:
        """Mean fitness per scored token of every genome, in nats; lower is better."""
        scored = self.scored(sample)
        if not scored:
            raise ValueError(f"no token to score in {sample}")
        # fsum rounds exactly, so the result is the same if several processes evaluate the parts.
        return [math.fsum(row) / scored for row in self.losses(genomes, sample).tolist()]

    def losses(self, genomes: Sequence[Genome], sample: Sample) -> Tensor:
        """Sum over the scored tokens of every part of the sample, (genomes, parts) float64."""
        levels = [self._levels(genome) for genome in genomes]
        heads = [self._outer.level(HEAD, chosen) for chosen in levels]
        pieces = self._pieces(sample)
        if self.fitness.needs_original:
            self.remember(number for number, _ in sample.parts)
        losses = torch.zeros(len(levels), len(sample.parts), dtype=torch.float64)

        def score(members: list[int], piece: "_Piece", hidden: Tensor) -> None:
            for head in sorted({heads[member] for member in members}):
                layer, same = self._outer.output_layer(head), [member for member in members if heads[member] == head]
                for row, (number, used) in enumerate(piece.parts):
                    losses[same, piece.first + row] = self._loss(layer, hidden[row], number, used)

        self._walk(levels, pieces, score)
        return losses

    def remember(self, sequences: Iterable[int]) -> None:
        """Store the original's predictions on those sequences for which they are not stored yet.

        Evaluations call it. Call it for all sequences at the beginning where cache_bytes does not hold the original
        weights, because every swap back to them reads the checkpoint.
        """
        length = self.tokens.shape[1]
        missing = sorted({number for number in sequences if number not in self._references})
        # One sequence a piece, so that results do not depend, to the bit, on the other sequences.
        pieces = [_Piece(0, ((number, length),)) for number in missing]

        def keep(_: list[int], piece: "_Piece", hidden: Tensor) -> None:
            number, targets = piece.parts[0][0], self._targets(piece.parts[0][0])
            parts = _tiles(self.architecture.output_layer(), hidden[0], length - 1)
            self._references[number] = [self.fitness.reference(tiles, targets[rows]) for rows, tiles in parts]

        original = self._levels((ORIGINAL,) * len(self.units)) | {KV_CACHE: KEEP}
        self._walk([original], pieces, keep)

    def scored(self, sample: Sample) -> int:
        """Tokens that a sample scores."""
        return sum(self._positions(used) for _, used in sample.parts)

    def _pieces(self, sample: Sample) -> list["_Piece"]:
        for number, used in sample.parts:
            if not (0 <= number < len(self.tokens) and 1 <= used <= self.tokens.shape[1]):
                raise ValueError(f"{used} tokens of sequence {number} are not in tokens {tuple(self.tokens.shape)}")
        return _pieces(sample, self.batch)

    def _levels(self, genome: Genome) -> dict[str, str]:
        """Levels of the units by name, and what a candidate does with keys and values."""
        levels = {KV_CACHE: ROUNDED}
        for unit, choice in zip(self.units, genome, strict=True):
            if not ORIGINAL <= choice < len(unit.choices):
                raise ValueError(f"choice {choice} of {unit.name} is none of its {len(unit.choices)}, nor ORIGINAL")
            levels[unit.name] = KEEP if choice == ORIGINAL else unit.choices[choice].level
        return levels

    def _walk(
        self,
        levels: list[dict[str, str]],
        pieces: list["_Piece"],
        leaf: Callable[[list[int], "_Piece", Tensor], None],
    ) -> None:
        """Call leaf(genomes, piece, last hidden states) for every piece and every set of genomes of equal states.

        levels: of the units by name, for each genome.
        """
        begin = time.perf_counter()
        states = [[block.state_of(chosen) for block in self._blocks] for chosen in levels]
        embeddings = dict[str, list[int]]()
        for member, chosen in enumerate(levels):
            embeddings.setdefault(self._outer.level(EMBEDDING, chosen), []).append(member)
        with torch.no_grad():
            for group in self._groups(pieces, branches=min(len(states) - 1, len(self._blocks)) + 2):
                for embedding, same in sorted(embeddings.items()):
                    tokens = [self.tokens[piece.numbers, : piece.length] for piece in group]
                    hidden = [self._outer.embed(part, embedding) for part in tokens]
                    for members, outputs in self._descend(0, same, states, hidden):
                        for piece, output in zip(group, outputs, strict=True):
                            leaf(members, piece, output)
        self.seconds += time.perf_counter() - begin

    def _groups(self, pieces: list["_Piece"], branches: int) -> Iterator[list["_Piece"]]:
        """Pieces that are traversed together: of equal length, so that masks are made once, and within states_bytes."""
        token_bytes = self.architecture.hidden_size * self.architecture.dtype.itemsize * branches
        group: list[_Piece] = []
        group_bytes = 0
        for piece in pieces:
            size = len(piece.parts) * piece.length * token_bytes
            if group and (group[0].length != piece.length or group_bytes + size > self._states_bytes):
                yield group
                group, group_bytes = [], 0
            group.append(piece)
            group_bytes += size
        if group:
            yield group

    def _descend(
        self, index: int, members: list[int], states: list[list[BlockState]], hidden: list[Tensor]
    ) -> Iterator[tuple[list[int], list[Tensor]]]:
        """Sets of genomes that share all blocks, and their last hidden states.

        hidden: states before block `index`; the list is overwritten.
        """
        if index == len(self._blocks):
            yield members, hidden
            return
        block, branches = self._blocks[index], dict[BlockState, list[int]]()
        for member in members:
            branches.setdefault(states[member][index], []).append(member)
        # The loaded state comes first, because it needs no swap.
        order = sorted(branches, key=lambda state: (state != block.state, state))
        for state in order:
            self._change(block, state)
            if state is order[-1]:
                # No other branch starts from these states: each is freed as soon as the block has run on it.
                outputs = hidden
                for place in range(len(hidden)):
                    outputs[place] = self._run(index, hidden[place])
            else:
                outputs = [self._run(index, states_before) for states_before in hidden]
            yield from self._descend(index + 1, branches[state], states, outputs)

    def _run(self, index: int, hidden: Tensor) -> Tensor:
        block = self._blocks[index]
        if BLOCK in block.state.dropped:
            return hidden
        self.block_runs += 1
        return self.architecture.run_block(block.module, index, hidden)

    def _change(self, block: Block, state: BlockState) -> None:
        """Bring a block into a state; only layers whose level differs are swapped."""
        begin = time.perf_counter()
        for slot, level in zip(block.slots, state.levels, strict=False):
            if level not in ("", slot.level):
                weight = self._cache.take((slot.name, level))
                if weight is None:
                    weight = self._weight(slot, level)
                self._cache.put((slot.name, slot.level), slot.linear.weight.data)
                slot.linear.weight = nn.Parameter(weight, requires_grad=False)
                slot.level = level
                block.round_inputs(slot, level)
                self.swapped += 1
        if state.kv_cache != block.state.kv_cache:
            block.round_attention(state.kv_cache)
        block.drop(state.dropped)
        block.state = state
        self.swap_seconds += time.perf_counter() - begin

    def _weight(self, slot: Slot, level: str) -> Tensor:
        keep = level == KEEP
        weight = self.architecture.checkpoint.tensor(f"{slot.name}.weight") if keep else self._read(slot.name, level)
        if weight.shape != slot.linear.weight.shape:
            needed = tuple(slot.linear.weight.shape)
            raise ValueError(f"weight of {slot.name} at {level} is {tuple(weight.shape)}, the layer is {needed}")
        weight = weight.to(self.architecture.device, self.architecture.dtype).contiguous()
        return weight.clone() if weight.is_cpu and weight.data_ptr() % _ALIGNMENT else weight

    def _positions(self, used: int) -> int:
        """Number of the first `used` states that have a next token."""
        return min(used, self.tokens.shape[1] - 1)

    def _targets(self, number: int) -> Tensor:
        return self.tokens[number, 1:].to(self.architecture.device)

    def _loss(self, layer: OutputLayer, hidden: Tensor, number: int, used: int) -> float:
        """Sum of the losses over the scored tokens of a sequence; hidden: its last hidden states (T, D)."""
        targets, stored = self._targets(number), self._references.get(number, [])
        sums = []
        for place, (rows, tiles) in enumerate(_tiles(layer, hidden, self._positions(used))):
            size = rows.stop - rows.start
            part = {name: value[:size] for name, value in stored[place].items()} if stored else {}
            sums.append(self.fitness.loss(tiles, targets[rows], part))
        return math.fsum(sums)


class _Piece(NamedTuple):
    """Parts of a sample that run as one batch: (sequence, tokens used), of equal length. first: index of the first."""

    first: int
    parts: tuple[tuple[int, int], ...]

    @property
    def length(self) -> int:
        return self.parts[0][1]

    @property
    def numbers(self) -> list[int]:
        return [number for number, _ in self.parts]


def _tiles(layer: OutputLayer, hidden: Tensor, positions: int) -> Iterator[tuple[slice, Tiles]]:
    """Some positions at a time of a sequence's last hidden states (T, D), and the tiles of their logits."""
    for first in range(0, positions, TILE_TOKENS):
        rows = slice(first, min(first + TILE_TOKENS, positions))
        yield rows, layer.tiles(layer.inputs(hidden[rows]))


def _pieces(sample: Sample, batch: int) -> list[_Piece]:
    pieces: list[_Piece] = []
    for index, (number, used) in enumerate(sample.parts):
        if pieces and pieces[-1].length == used and len(pieces[-1].parts) < batch:
            pieces[-1] = _Piece(pieces[-1].first, (*pieces[-1].parts, (number, used)))
        else:
            pieces.append(_Piece(index, ((number, used),)))
    return pieces


def batches(sample: Sample, batch: int) -> list[Sample]:
    """The sample cut into the batches that run through a block at once: at most `batch` neighbours of equal length.

    A batch, or consecutive batches joined, have the same losses to the bit as in the whole sample. So several processes
    can split a sample, and each of them still runs shared prefixes of genomes once.
    """
    return [Sample(piece.parts) for piece in _pieces(sample, batch)]
