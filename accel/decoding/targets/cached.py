"""A transformers model as a target whose caches a method keeps small, see accel/cache.

The method is applied when certain numbers of tokens are committed, see cache.base.CacheMethod. A pass never crosses
such a number (`room`), so that with and without drafts a token attends to the same cache.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hasten.accel.cache.attention import attach
from hasten.accel.cache.base import CacheBudget, CacheMethod
from hasten.accel.cache.cache import CompressedCache, TreePass
from hasten.accel.cache.statistics import Statistics
from hasten.accel.decoding.targets.base import PREFILL_CHUNK, Pass
from hasten.accel.decoding.targets.transformers import TransformersTarget


class CachedTarget(TransformersTarget):
    """An unmodified transformers model with compressed caches. budget, statistics: see CompressedCache."""

    def __init__(
        self,
        model: PreTrainedModel,
        method: CacheMethod,
        budget: CacheBudget | None = None,
        keeps_hidden: bool = False,
        statistics: Statistics | None = None,
    ) -> None:
        super().__init__(model, keeps_hidden)
        self.method, self.budget, self.statistics = method, budget, statistics
        # Refuses models and budgets that do not fit before anything is decoded.
        CompressedCache(model, method, budget, statistics)
        attach(model)
        self._ended: list[int | None] = []

    @property
    def cache_bytes(self) -> int:
        """Bytes held by all slots."""
        return self._compressed.nbytes if self._slots else 0

    def prefill(self, slot: int, tokens: Sequence[int], chunk: int = PREFILL_CHUNK) -> Tensor | None:
        """See Target."""
        features = []
        for start in range(0, len(tokens), chunk):
            features.append(super().prefill(slot, tokens[start : start + chunk], chunk))
            self._commit_layers(slot, None)
        known = [part for part in features if part is not None]
        return torch.cat(known) if known else None

    def commit(self, slot: int, path: Sequence[int]) -> None:
        """See Target; applies the method where it is due."""
        super().commit(slot, path)
        self._commit_layers(slot, path)
        ended = self._ended[slot]
        generated = None if ended is None else len(self.committed(slot)) - ended
        if generated and generated % self.method.interval == 0:
            self._compressed.compress(slot, generated=generated)

    def end_prompt(self, slot: int) -> None:
        """Apply the method to the prompt."""
        self._ended[slot] = len(self.committed(slot))
        self._compressed.compress(slot)

    def room(self, slot: int) -> int | None:
        """Tokens until the method is applied next."""
        ended = self._ended[slot]
        if ended is None:
            return None
        interval = self.method.interval
        return interval - (len(self.committed(slot)) - ended) % interval

    def clear(self, slot: int) -> None:
        """See Target."""
        super().clear(slot)
        self._ended[slot] = None
        self._compressed.shared.pop(slot, None)
        for layer in self._compressed.compressed:
            layer.sequences[slot] = layer.new_sequence()

    def swap(self, one: int, other: int) -> None:
        """See Target."""
        super().swap(one, other)
        self._ended[one] = self._ended[other]
        self._compressed.shared[one] = self._compressed.shared.pop(other, {})
        for layer in self._compressed.compressed:
            layer.sequences[one], layer.sequences[other] = layer.sequences[other], layer.new_sequence()

    def cut(self, slot: int, length: int) -> None:
        """See Target; ValueError where tokens behind `length` are compressed already."""
        dropped = len(self.committed(slot)) - length
        super().cut(slot, length)
        for layer in self._compressed.compressed:
            layer.sequences[slot].commit([])
            layer.sequences[slot].crop(max(0, dropped))

    def _allocate(self, slots: int, capacity: int) -> None:
        self._compressed = CompressedCache(self._model, self.method, self.budget, self.statistics)
        for layer in self._compressed.compressed:
            layer.sequences = [layer.new_sequence() for _ in range(slots)]
            layer.is_initialized = True
        self._ended = [None] * slots
        self._cache = self._compressed

    def _run(
        self, slots: Sequence[int], starts: Sequence[int], ids: Tensor, positions: Tensor, allowed: Tensor, logits: bool
    ) -> Pass:
        above, places = [], []
        for row, (slot, start) in enumerate(zip(slots, starts, strict=True)):
            committed, waiting = len(self.committed(slot)), len(self.depths(slot))
            count = committed + waiting - start
            above.append(allowed[row, :count, committed : committed + waiting])
            places.append(positions[row, :count])
        self._compressed.tree_pass = TreePass(tuple(slots), above, places, ids)
        return super()._run(slots, starts, ids, positions, allowed, logits)

    def _enter(self, slots: Sequence[int], starts: Sequence[int], allowed: Tensor) -> None:
        """The caches know their own places."""

    def _masks(self, slots: Sequence[int], positions: Tensor, allowed: Tensor) -> Tensor | dict[str, Tensor]:
        """A stand-in: the attention reads the pass from the cache."""
        return self._by_layer_type(allowed[:1, None, :1, :1], allowed[:1, None, :1, :1])

    def _commit_layers(self, slot: int, path: Sequence[int] | None) -> None:
        for layer in self._compressed.compressed:
            layer.sequences[slot].commit(path)

    def _move(self, slot: int, sources: Sequence[int], places: Sequence[int]) -> None:
        """Committing a path moves its nodes."""

    def _copy_slot(self, source: int, slot: int, length: int) -> None:
        """Slots are swapped whole."""
