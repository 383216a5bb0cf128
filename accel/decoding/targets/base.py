"""The interface of targets: a causal language model with KV caches for several sequences, each with a draft tree.

A sequence has a slot. Its cache holds the committed tokens, and after them the waiting nodes of a tree. `forward` adds
nodes, in one or several calls; `commit` keeps one path of them and drops the others. A draft model is a target, too.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from hasten.accel.decoding.targets.virtual import Insertion, VirtualTokens, insertions
from hasten.accel.decoding.tree import ROOT
from hasten.accel.errors import UserError

PREFILL_CHUNK = 512
# The logits of a pass, their float32 copy, and the probabilities that are computed from them.
COPIES_OF_LOGITS = 3
# Values of the option `path` for the fast path, which began as Llama's.
FAST_PATHS = ("fast", "llama")


# Number of the hidden states after the final norm, of which the output layer makes logits, in `Target.feature_layers`.
FINAL = -1


@dataclass(frozen=True)
class Pass:
    """logits (B, N, V) and last hidden states (B, N, D) of new nodes; rows beyond a sequence's nodes are padding.

    features: (B, N, F * D), see `Target.feature_layers`; None if the target keeps none.
    """

    logits: Tensor
    hidden: Tensor
    features: Tensor | None = None


@dataclass
class _Slot:
    """committed: ids in the cache. waiting: ids of the nodes after them. parents: each node's parent, or ROOT."""

    committed: list[int] = field(default_factory=list)
    waiting: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.committed) + len(self.waiting)

    def drop(self) -> None:
        """Drop all waiting nodes."""
        self.waiting, self.parents, self.depths = [], [], []


class Target(ABC):
    """A model with caches for `slots` sequences of at most `capacity` tokens, including waiting nodes.

    A pass over adjacent slots, such as 0 to B - 1, reads the caches without a copy. feature_layers: F numbers of
    hidden states that passes return, next to each other, as the features of a token: i is after the first i decoder
    layers, FINAL after the final norm. waits_for_others: whether a pass waits for other processes. virtual: virtual
    tokens that passes may have, with the ids from V on; None for none. reads_prompts: whether `prefill` must get a
    prompt whole, since the target decides itself which of its tokens run; then no features are returned.
    """

    waits_for_others = False
    reads_prompts = False

    def __init__(self, vocabulary: int, max_length: int, device: torch.device) -> None:
        self.vocabulary, self.max_length, self.device = vocabulary, max_length, device
        self.capacity = 0
        self.feature_layers: tuple[int, ...] = ()
        self.virtual: VirtualTokens | None = None
        self._reads_masks = True
        self._inserted: dict[int, Insertion] = {}  # what enters the current pass, by layer
        self._slots: list[_Slot] = []

    def reserve(self, slots: int, capacity: int) -> None:
        """Allocate caches; this drops all sequences."""
        self.capacity = capacity
        self._slots = [_Slot() for _ in range(slots)]
        self._allocate(slots, capacity)

    @property
    def slots(self) -> int:
        """Number of slots."""
        return len(self._slots)

    @property
    @abstractmethod
    def cache_bytes(self) -> int:
        """Bytes of the allocated caches."""

    @property
    def token_bytes(self) -> int:
        """Bytes of the keys and values of one token in all layers; 0 for a target without a cache."""
        return 0

    def committed(self, slot: int) -> Sequence[int]:
        """Committed ids of the slot."""
        return self._slots[slot].committed

    def depths(self, slot: int) -> Sequence[int]:
        """Depth of every waiting node of the slot; children of ROOT have depth 0."""
        return self._slots[slot].depths

    def check_contexts(self, contexts: Sequence[int]) -> None:
        """UserError where contexts of a request are missing, or of no use; see Request."""
        if contexts:
            raise UserError("only the KV cache of cache=ape reads contexts: leave them out")

    def begin_prompt(self, slot: int, tokens: Sequence[int], new: int, contexts: Sequence[int] = ()) -> None:
        """Called before `prefill` with a whole prompt, the number of tokens to decode at most, and its contexts."""
        return None

    def end_prompt(self, slot: int) -> None:
        """Called when all of a prompt is committed that is before decoding begins."""
        return None

    def room(self, slot: int) -> int | None:
        """Largest number of tokens, in depth, that a pass may add to a slot; None for no limit."""
        return None

    def clear(self, slot: int) -> None:
        """Drop a slot's sequence."""
        self._slots[slot] = _Slot()

    def embedding(self) -> Tensor:
        """Weight (V, D) of the token embedding, which heads share; NotImplementedError for a target without one."""
        raise NotImplementedError(f"{type(self).__name__} has no token embedding")

    def first_layers(self, count: int) -> "Target":
        """The model of the first `count` decoder layers, the final norm and the output layer.

        It shares the weights and has caches of its own. UserError for a model that cannot be cut, or has fewer layers.
        """
        raise UserError(
            f"a {type(self).__name__} has no sub-models: choose a draft model of the Llama family, with path=auto"
        )

    def prefill(self, slot: int, tokens: Sequence[int], chunk: int = PREFILL_CHUNK) -> Tensor | None:
        """Commit tokens without computing their logits, `chunk` of them in a pass.

        Returns their features (T, F * D); None if the target keeps none, or for no tokens.
        """
        features = []
        for start in range(0, len(tokens), chunk):
            part = list(tokens[start : start + chunk])
            rows = self._append([slot], [part], [range(ROOT, len(part) - 1)], logits=False)
            if rows.features is not None:
                features.append(rows.features[0])
            self._slots[slot].committed += part
            self._slots[slot].drop()
        return torch.cat(features) if features else None

    def forward(self, slots: Sequence[int], tokens: Sequence[Sequence[int]], parents: Sequence[Sequence[int]]) -> Pass:
        """Add new nodes to slots' trees and run them. parents: indices among the slot's waiting nodes, or ROOT."""
        return self._append(slots, tokens, parents, logits=True)

    def commit(self, slot: int, path: Sequence[int]) -> None:
        """Keep the waiting nodes of a path, each the parent of the next, and drop the others."""
        sequence = self._slots[slot]
        length = len(sequence.committed)
        assert all(sequence.parents[node] == before for before, node in zip([ROOT, *path], path, strict=False)), path
        # Only nodes whose position changes are copied; those of a chain never are.
        moved = [(length + node, length + index) for index, node in enumerate(path) if node != index]
        if moved:
            self._move(slot, [source for source, _ in moved], [destination for _, destination in moved])
        sequence.committed += [sequence.waiting[node] for node in path]
        sequence.drop()

    def swap(self, one: int, other: int) -> None:
        """Move the sequence of slot `other` to slot `one`, whose sequence is dropped."""
        self._copy_slot(other, one, len(self._slots[other].committed))
        self._slots[one] = self._slots[other]
        self._slots[other] = _Slot()

    def cut(self, slot: int, length: int) -> None:
        """Truncate a sequence to its first `length` committed tokens, and drop its waiting nodes."""
        sequence = self._slots[slot]
        del sequence.committed[length:]
        sequence.drop()

    def _append(
        self, slots: Sequence[int], tokens: Sequence[Sequence[int]], parents: Sequence[Sequence[int]], logits: bool
    ) -> Pass:
        width = max(map(len, tokens))
        starts = [len(self._slots[slot]) for slot in slots]
        if max(starts) + width > self.capacity:
            raise UserError(f"{max(starts) + width} tokens do not fit the cache's capacity={self.capacity}")
        total = max(starts) + width if self._reads_masks else 0
        sequence = self._slots[slots[0]]
        self._inserted = {}
        # A fast case for decoding without drafts, whose passes are so short that this code counts.
        if len(slots) == width == 1 and not sequence.waiting:
            ids, positions = torch.tensor([list(tokens[0])]), torch.tensor([[starts[0]]])
            allowed = torch.ones(1, 1, total, dtype=torch.bool)
            sequence.waiting, sequence.parents, sequence.depths = list(tokens[0]), list(parents[0]), [0]
        else:
            # Filled by numpy, whose small writes cost a fraction of torch's, and copied to the device once.
            ids, positions = torch.zeros(2, len(slots), width, dtype=torch.long)
            allowed = torch.zeros(len(slots), width, total, dtype=torch.bool)
            inputs = (tensor.numpy() for tensor in (ids, positions, allowed))
            for slot, new, above, *rows in zip(slots, tokens, parents, *inputs, strict=True):
                self._place(slot, list(new), list(above), *rows)
            if self.virtual is not None:
                entries = self._virtual_entries(slots, width, tokens)
                self._inserted = insertions(self.virtual, entries, self.device)
                ids.masked_fill_(ids >= self.vocabulary, 0)
        ids, positions, allowed = map(self._to_device, (ids, positions, allowed))
        return self._run(slots, starts, ids, positions, allowed, logits)

    def _place(
        self, slot: int, new: list[int], above: list[int], ids: np.ndarray, positions: np.ndarray, allowed: np.ndarray
    ) -> None:
        """Add nodes to a slot, and fill its rows of the inputs: ids (N,), positions (N,), allowed (N, L)."""
        sequence = self._slots[slot]
        committed, first, count = len(sequence.committed), len(sequence.waiting), len(new)
        sequence.waiting += new
        sequence.parents += above
        ids[:count] = new
        chain = first == 0 and above == list(range(ROOT, count - 1))
        if chain:
            sequence.depths = list(range(count))
        else:
            for parent in above:
                sequence.depths.append(0 if parent == ROOT else sequence.depths[parent] + 1)
        positions[:count] = sequence.depths[first:]
        positions[:count] += committed
        if not self._reads_masks:
            return
        allowed[:, :committed] = True
        if chain:
            allowed[:count, committed : committed + count] = np.tri(count, dtype=np.bool_)
        else:
            for node, row in enumerate(allowed[:count], first):
                above_it = node
                while above_it != ROOT:
                    row[committed + above_it] = True
                    above_it = sequence.parents[above_it]
        # Padding attends to itself, because a softmax over no keys is nan.
        padding = np.arange(count, len(ids))
        allowed[padding, committed + first + padding] = True

    def _virtual_entries(
        self, slots: Sequence[int], width: int, tokens: Sequence[Sequence[int]]
    ) -> list[tuple[int, int, int]]:
        """Row, number and anchor of every virtual token among new nodes, which have been placed."""
        entries = []
        for row, (slot, new) in enumerate(zip(slots, tokens, strict=True)):
            sequence = self._slots[slot]
            first = len(sequence.waiting) - len(new)
            for index, token in enumerate(new):
                if token < self.vocabulary:
                    continue
                anchor = first + index
                while sequence.waiting[anchor] >= self.vocabulary:
                    anchor = sequence.parents[anchor]
                assert anchor >= first, "a virtual token hangs on a node of its own pass"
                entries.append((row * width + index, token - self.vocabulary, row * width + anchor - first))
        return entries

    def _to_device(self, tensor: Tensor) -> Tensor:
        """A CPU tensor, copied without waiting for what the device does: CUDA has read it when the call returns."""
        return tensor.to(self.device, non_blocking=True)

    def _key_positions(self, slots: Sequence[int], total: int) -> Tensor:
        """Position (B, 1, L) of the token in each cell of the slots' caches; nodes of one depth share a position."""
        key_positions = torch.arange(total).repeat(len(slots), 1)
        for row, slot in enumerate(slots):
            depths = self.depths(slot)
            start = len(self.committed(slot))
            key_positions[row, start : start + len(depths)] = torch.tensor(depths) + start
        return self._to_device(key_positions[:, None])

    @abstractmethod
    def _allocate(self, slots: int, capacity: int) -> None:
        """Allocate empty caches."""

    @abstractmethod
    def _run(
        self, slots: Sequence[int], starts: Sequence[int], ids: Tensor, positions: Tensor, allowed: Tensor, logits: bool
    ) -> Pass:
        """Run new nodes, and write their keys and values into the caches, from position starts[b] of slots[b].

        ids, positions: (B, N). allowed: (B, N, L) bool, the cache positions of its slot that each node attends to;
        L is 0 if the target does not read masks.
        """

    @abstractmethod
    def _copy_slot(self, source: int, slot: int, length: int) -> None:
        """Copy the first `length` keys and values of one slot to another."""

    @abstractmethod
    def _move(self, slot: int, sources: Sequence[int], places: Sequence[int]) -> None:
        """Copy a slot's keys and values from some cache positions to others; the two sets may overlap."""
