"""Targets whose caches a method keeps small, see accel/cache: a transformers model, or the fast path.

The method is applied when certain numbers of tokens are committed, see cache.base.CacheMethod. A pass never crosses
such a number (`room`), so that with and without drafts a token attends to the same cache.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hasten.accel.cache.attention import attach
from hasten.accel.cache.base import CacheBudget, CacheMethod
from hasten.accel.cache.cache import CompressedCache, CompressedLayer, Handle, TreePass
from hasten.accel.cache.sequence import NewTokens, SequenceCache
from hasten.accel.decoding.targets.attention import RotatedHeads
from hasten.accel.decoding.targets.base import PREFILL_CHUNK, Pass, Target
from hasten.accel.decoding.targets.families.decoder import Decoder, Layer
from hasten.accel.decoding.targets.fast import FastTarget, pass_of
from hasten.accel.decoding.targets.transformers import TransformersTarget
from hasten.accel.decoding.tree import ROOT
from hasten.kernels.attention.contract import Scoring


class CompressedSlots(Target):
    """Slots whose sequences are in a CompressedCache. shape: a model of the target's config, which may have no weights.

    budget: None for methods that have none. UserError for models and budgets that do not fit.
    """

    def _compress_with(self, shape: PreTrainedModel, method: CacheMethod, budget: CacheBudget | None) -> None:
        self._shape, self.method, self.budget = shape, method, budget
        self._compressed = CompressedCache(shape, method, budget)
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
            self._compressed.compress(slot)

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
            layer.sequences[slot] = SequenceCache(self.method)

    def swap(self, one: int, other: int) -> None:
        """See Target."""
        super().swap(one, other)
        self._ended[one] = self._ended[other]
        self._compressed.shared[one] = self._compressed.shared.pop(other, {})
        for layer in self._compressed.compressed:
            layer.sequences[one], layer.sequences[other] = layer.sequences[other], SequenceCache(self.method)

    def cut(self, slot: int, length: int) -> None:
        """See Target; ValueError where tokens behind `length` are compressed already."""
        dropped = len(self.committed(slot)) - length
        super().cut(slot, length)
        for layer in self._compressed.compressed:
            layer.sequences[slot].commit([])
            layer.sequences[slot].crop(max(0, dropped))

    def _allocate(self, slots: int, capacity: int) -> None:
        self._compressed = CompressedCache(self._shape, self.method, self.budget)
        for layer in self._compressed.compressed:
            layer.sequences = [SequenceCache(self.method) for _ in range(slots)]
            layer.is_initialized = True
        self._ended = [None] * slots

    def _begin_pass(self, slots: Sequence[int], starts: Sequence[int], positions: Tensor, allowed: Tensor) -> None:
        """Tell the caches what a pass adds; arguments as of `_run`."""
        above: list[Tensor | None] = []
        places = []
        for row, (slot, start) in enumerate(zip(slots, starts, strict=True)):
            committed, parents = len(self.committed(slot)), self._slots[slot].parents
            count = committed + len(parents) - start
            chain = count == len(parents) and parents == list(range(ROOT, count - 1))
            above.append(None if chain else allowed[row, :count, committed : committed + len(parents)])
            places.append(positions[row, :count].int())
        self._compressed.tree_pass = TreePass(tuple(slots), above, places)

    def _commit_layers(self, slot: int, path: Sequence[int] | None) -> None:
        for layer in self._compressed.compressed:
            layer.sequences[slot].commit(path)

    def _move(self, slot: int, sources: Sequence[int], places: Sequence[int]) -> None:
        """Committing a path moves its nodes."""

    def _copy_slot(self, source: int, slot: int, length: int) -> None:
        """Slots are swapped whole."""


class CachedTarget(CompressedSlots, TransformersTarget):
    """An unmodified transformers model with compressed caches. budget: None for methods that have none."""

    def __init__(
        self,
        model: PreTrainedModel,
        method: CacheMethod,
        budget: CacheBudget | None = None,
        keeps_hidden: bool = False,
    ) -> None:
        super().__init__(model, keeps_hidden)
        self._compress_with(model, method, budget)
        attach(model)

    def _allocate(self, slots: int, capacity: int) -> None:
        super()._allocate(slots, capacity)
        self._cache = self._compressed

    def _run(
        self, slots: Sequence[int], starts: Sequence[int], ids: Tensor, positions: Tensor, allowed: Tensor, logits: bool
    ) -> Pass:
        self._begin_pass(slots, starts, positions, allowed)
        return super()._run(slots, starts, ids, positions, allowed, logits)

    def _enter(self, slots: Sequence[int], starts: Sequence[int], allowed: Tensor) -> None:
        """The caches know their own places."""

    def _masks(self, slots: Sequence[int], positions: Tensor, allowed: Tensor) -> Tensor | dict[str, Tensor]:
        """A stand-in: the attention reads the pass from the cache."""
        return self._by_layer_type(allowed[:1, None, :1, :1], allowed[:1, None, :1, :1])


class CachedFastTarget(CompressedSlots, FastTarget):
    """The fast path with compressed caches. shape: a model of the decoder's config, whose weights are not read."""

    def __init__(
        self, decoder: Decoder, shape: PreTrainedModel, method: CacheMethod, budget: CacheBudget | None = None
    ) -> None:
        super().__init__(decoder)
        self._by_kernels, self._reads_masks = False, True
        self._compress_with(shape, method, budget)

    def first_layers(self, count: int) -> FastTarget:
        """See Target; the sub-model's caches hold everything."""
        return FastTarget(self._decoder.first_layers(count))

    def _allocate(self, slots: int, capacity: int) -> None:
        super()._allocate(slots, capacity)
        self._cache = list(self._compressed.compressed)
        self._tabulate(capacity)

    def _fill_layer(self, slot: int, layer: int, qkv: Tensor) -> None:
        heads, kv_heads = self._decoder.heads, self._decoder.kv_heads
        queries, keys, values = qkv.split([heads, kv_heads, kv_heads])
        positions = torch.arange(qkv.shape[1], dtype=torch.int32, device=qkv.device)
        self._cache[layer].sequences[slot].fill(NewTokens(keys, values, queries.transpose(0, 1), positions))

    def _run(
        self, slots: Sequence[int], starts: Sequence[int], ids: Tensor, positions: Tensor, allowed: Tensor, logits: bool
    ) -> Pass:
        self._begin_pass(slots, starts, positions, allowed)
        with torch.no_grad():
            attention = CompressedAttention(self._decoder, self._turns, positions, self._rotates_in_place)
            return pass_of(self._outputs(ids, attention, self.feature_layers, logits), *ids.shape)


class CompressedAttention(RotatedHeads):
    """The attention of the layers of a pass over compressed caches, see MaskedAttention."""

    def __init__(self, decoder: Decoder, tables: Sequence[Tensor], positions: Tensor, in_place: bool) -> None:
        super().__init__(decoder, tables, positions, in_place)
        # Keys are stored as transformers has them: of numbers that are rotated together, the first ones come first.
        turned = torch.arange(2 * len(decoder.rotations[0].frequencies), device=positions.device)
        rest = torch.arange(len(turned), decoder.head_size, device=positions.device)
        self._order = torch.cat([turned[::2], turned[1::2], rest])

    def __call__(self, layer: Layer, cache: CompressedLayer, qkv: Tensor) -> Tensor:
        """Outputs (B * N, H * G * D) of queries, keys and values (B * N, (H * G + 2 * H) * D) before their rotation."""
        decoder = self._decoder
        heads, both = decoder.heads, decoder.heads + decoder.kv_heads
        qkv = self.rotate(layer, qkv.view(len(qkv), -1, decoder.head_size)).unflatten(0, (self._count, -1))
        turned = qkv[:, :, :both].index_select(3, self._order)
        queries, keys, values = turned[:, :, :heads], turned[:, :, heads:], qkv[:, :, both:]
        cache.scoring = Scoring(decoder.scale, layer.window, decoder.score_cap)
        handle = Handle(cache, keys.transpose(1, 2), values.transpose(1, 2))
        return cache.attend(handle, queries, None, None, None).view(len(queries) * queries.shape[1], -1)
