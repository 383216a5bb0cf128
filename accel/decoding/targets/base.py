"""What a target is: a causal language model with room for several sequences, each of which may branch into a tree.

A sequence has a slot. Its cache holds what was committed, and behind it the nodes of a tree that wait: `forward` adds
nodes, as often as it takes, and `commit` keeps one path of them. A draft model is a target, too.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hasten.accel.decoding.tree import ROOT
from hasten.accel.errors import UserError

_PREFILL_CHUNK = 512


@dataclass(frozen=True)
class Pass:
    """logits (B, N, V) and last hidden states (B, N, D) of the new nodes; rows beyond a sequence's own are noise."""

    logits: Tensor
    hidden: Tensor


@dataclass
class _Slot:
    """committed: ids in the cache. waiting: ids of nodes behind them, parents: their parents among those, or ROOT."""

    committed: list[int] = field(default_factory=list)
    waiting: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.committed) + len(self.waiting)

    def drop(self) -> None:
        """No nodes wait any more."""
        self.waiting, self.parents, self.depths = [], [], []


class Target(ABC):
    """A model and the caches of `slots` sequences of at most `capacity` tokens, waiting nodes counted.

    Slots that run are 0 to B - 1 in most passes, and then nothing is gathered.
    """

    def __init__(self, vocabulary: int, max_length: int, device: torch.device) -> None:
        self.vocabulary, self.max_length, self.device = vocabulary, max_length, device
        self.capacity = 0
        self._slots: list[_Slot] = []

    def reserve(self, slots: int, capacity: int) -> None:
        """Room for sequences; what was there before is gone."""
        self.capacity = capacity
        self._slots = [_Slot() for _ in range(slots)]
        self._allocate(slots, capacity)

    @property
    def slots(self) -> int:
        """Sequences that there is room for."""
        return len(self._slots)

    @property
    @abstractmethod
    def cache_bytes(self) -> int:
        """Bytes held for caches."""

    @property
    def token_bytes(self) -> int:
        """Bytes of the keys and values of one token, all layers together; 0 where there is no cache to speak of."""
        return 0

    def committed(self, slot: int) -> Sequence[int]:
        """Ids whose keys and values the slot keeps."""
        return self._slots[slot].committed

    def depths(self, slot: int) -> Sequence[int]:
        """Depth of every waiting node of the slot, 0 for those right behind what is committed."""
        return self._slots[slot].depths

    def clear(self, slot: int) -> None:
        """Forget a sequence."""
        self._slots[slot] = _Slot()

    def prefill(self, slot: int, tokens: Sequence[int], chunk: int = _PREFILL_CHUNK) -> None:
        """Commit tokens, some at a time, without their logits."""
        for start in range(0, len(tokens), chunk):
            part = list(tokens[start : start + chunk])
            self._append([slot], [part], [range(ROOT, len(part) - 1)], logits=False)
            self._slots[slot].committed += part
            self._slots[slot].drop()

    def forward(self, slots: Sequence[int], tokens: Sequence[Sequence[int]], parents: Sequence[Sequence[int]]) -> Pass:
        """Add nodes to the trees of some slots. parents: among all waiting nodes of the slot, or ROOT."""
        return self._append(slots, tokens, parents, logits=True)

    def commit(self, slot: int, path: Sequence[int]) -> None:
        """Keep these waiting nodes, each the parent of the next, and drop the others."""
        held = self._slots[slot]
        length = len(held.committed)
        assert all(held.parents[node] == before for before, node in zip([ROOT, *path], path, strict=False)), path
        # What is in its place already stays there: of a chain nothing is copied.
        moved = [(length + node, length + place) for place, node in enumerate(path) if node != place]
        if moved:
            self._move(slot, [source for source, _ in moved], [place for _, place in moved])
        held.committed += [held.waiting[node] for node in path]
        held.drop()

    def swap(self, one: int, other: int) -> None:
        """Put the sequence of `other` into the slot `one`, whose own is gone."""
        self._copy_slot(other, one, len(self._slots[other].committed))
        self._slots[one] = self._slots[other]
        self._slots[other] = _Slot()

    def cut(self, slot: int, length: int) -> None:
        """Keep the first tokens of a sequence only."""
        held = self._slots[slot]
        del held.committed[length:]
        held.drop()

    def _append(
        self, slots: Sequence[int], tokens: Sequence[Sequence[int]], parents: Sequence[Sequence[int]], logits: bool
    ) -> Pass:
        width = max(map(len, tokens))
        starts = [len(self._slots[slot]) for slot in slots]
        if max(starts) + width > self.capacity:
            raise UserError(f"{max(starts) + width} tokens do not fit the cache's capacity={self.capacity}")
        total = max(starts) + width
        held = self._slots[slots[0]]
        if len(slots) == width == 1 and not held.waiting:  # plain decoding, whose passes are short
            ids, positions = torch.tensor([list(tokens[0])]), torch.tensor([[total - 1]])
            allowed = torch.ones(1, 1, total, dtype=torch.bool)
            held.waiting, held.parents, held.depths = list(tokens[0]), list(parents[0]), [0]
        else:
            # On the CPU, where many small writes are cheap; one copy takes it to the device.
            ids, positions = torch.zeros(2, len(slots), width, dtype=torch.long)
            allowed = torch.zeros(len(slots), width, total, dtype=torch.bool)
            for row, (slot, new, above) in enumerate(zip(slots, tokens, parents, strict=True)):
                self._place(slot, list(new), list(above), ids[row], positions[row], allowed[row])
        ids, positions, allowed = (tensor.to(self.device) for tensor in (ids, positions, allowed))
        return self._run(slots, starts, ids, positions, allowed, logits)

    def _place(
        self, slot: int, new: list[int], above: list[int], ids: Tensor, positions: Tensor, allowed: Tensor
    ) -> None:
        held = self._slots[slot]
        committed, first, count = len(held.committed), len(held.waiting), len(new)
        held.waiting += new
        held.parents += above
        ids[:count] = torch.tensor(new)
        allowed[:, :committed] = True
        if first == 0 and above == list(range(ROOT, count - 1)):  # a chain on its own
            allowed[:count, committed : committed + count] = torch.ones(count, count, dtype=torch.bool).tril()
            held.depths = list(range(count))
        else:
            for node in range(first, first + count):
                parent = held.parents[node]
                held.depths.append(0 if parent == ROOT else held.depths[parent] + 1)
                row = allowed[node - first]
                row[committed + node] = True
                while parent != ROOT:
                    row[committed + parent] = True
                    parent = held.parents[parent]
        positions[:count] = torch.tensor(held.depths[first:]) + committed
        # Padding sees itself, as a softmax over nothing is not a number.
        for extra in range(count, ids.shape[0]):
            allowed[extra, committed + first + extra] = True

    @abstractmethod
    def _allocate(self, slots: int, capacity: int) -> None:
        """Make empty caches."""

    @abstractmethod
    def _run(
        self, slots: Sequence[int], starts: Sequence[int], ids: Tensor, positions: Tensor, allowed: Tensor, logits: bool
    ) -> Pass:
        """Run new nodes and put their keys and values into the caches, from starts on.

        ids, positions: (B, N). allowed: (B, N, L) bool, what each node attends to among the first L places of its slot.
        """

    @abstractmethod
    def _copy_slot(self, source: int, slot: int, length: int) -> None:
        """Copy the first `length` keys and values of one slot to another."""

    @abstractmethod
    def _move(self, slot: int, sources: Sequence[int], places: Sequence[int]) -> None:
        """Copy keys and values of a slot from some places to others, which may overlap."""
