"""Targets whose caches a method keeps small, see accel/cache: a transformers model, or the fast path.

The method is applied when certain numbers of tokens are committed, see cache.base.CacheMethod. A pass never crosses
such a number (`room`), so that with and without drafts a token attends to the same cache.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hasten.accel.cache.attention import attach
from hasten.accel.cache.base import CacheBudget, CacheMethod
from hasten.accel.cache.cache import CompressedCache, CompressedLayer, Handle, TreePass
from hasten.accel.cache.prompt.base import Prompt, PromptMethod, Reading
from hasten.accel.cache.prompts import Prompts, check_contexts
from hasten.accel.cache.sequence import NewTokens
from hasten.accel.cache.statistics import Statistics
from hasten.accel.decoding.targets.attention import RotatedHeads, normalize
from hasten.accel.decoding.targets.base import PREFILL_CHUNK, Pass, Target
from hasten.accel.decoding.targets.families.decoder import Decoder, Layer
from hasten.accel.decoding.targets.fast import FastTarget, pass_of
from hasten.accel.decoding.targets.transformers import TransformersTarget
from hasten.accel.decoding.tree import ROOT
from hasten.accel.errors import UserError
from hasten.kernels.attention.contract import Scoring


class CompressedSlots(Target):
    """Slots whose sequences are in a CompressedCache. shape: a model of the target's config, which may have no weights.

    budget, statistics: see CompressedCache. UserError for models and budgets that do not fit.
    """

    def _compress_with(
        self,
        shape: PreTrainedModel,
        method: CacheMethod,
        budget: CacheBudget | None,
        statistics: Statistics | None,
    ) -> None:
        self._shape, self.method, self.budget, self.statistics = shape, method, budget, statistics
        self._compressed = CompressedCache(shape, method, budget, statistics)
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
        if generated and generated % self._compressed.interval(slot) == 0:
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
        interval = self._compressed.interval(slot)
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
        self._compressed = CompressedCache(self._shape, self.method, self.budget, self.statistics)
        for layer in self._compressed.compressed:
            layer.sequences = [layer.new_sequence() for _ in range(slots)]
            layer.is_initialized = True
        self._ended = [None] * slots

    def _begin_pass(
        self, slots: Sequence[int], starts: Sequence[int], ids: Tensor, positions: Tensor, allowed: Tensor
    ) -> None:
        """Tell the caches what a pass adds; arguments as of `_run`."""
        above: list[Tensor | None] = []
        places = []
        for row, (slot, start) in enumerate(zip(slots, starts, strict=True)):
            committed, parents = len(self.committed(slot)), self._slots[slot].parents
            count = committed + len(parents) - start
            chain = count == len(parents) and parents == list(range(ROOT, count - 1))
            above.append(None if chain else allowed[row, :count, committed : committed + len(parents)])
            places.append(positions[row, :count].int())
        self._compressed.tree_pass = TreePass(tuple(slots), above, places, ids)

    def _commit_layers(self, slot: int, path: Sequence[int] | None) -> None:
        for layer in self._compressed.compressed:
            layer.sequences[slot].commit(path)

    def _move(self, slot: int, sources: Sequence[int], places: Sequence[int]) -> None:
        """Committing a path moves its nodes."""

    def _copy_slot(self, source: int, slot: int, length: int) -> None:
        """Slots are swapped whole."""


@dataclass(frozen=True)
class _Plan:
    """A prompt that the method has read."""

    prompt: Prompt
    reading: Reading


class CachedTarget(CompressedSlots, TransformersTarget):
    """An unmodified transformers model with compressed caches. budget, statistics: see CompressedCache.

    draft: draft model of methods that ask one; None is the model itself.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        method: CacheMethod,
        budget: CacheBudget | None = None,
        keeps_hidden: bool = False,
        statistics: Statistics | None = None,
        draft: PreTrainedModel | None = None,
    ) -> None:
        super().__init__(model, keeps_hidden)
        self._compress_with(model, method, budget, statistics)
        self._draft = draft
        self._prompts: Prompts | None = None
        # Methods that only look ahead let all tokens run as usual.
        self.reads_prompts = isinstance(method, PromptMethod) and method.selects
        attach(model)
        self._plans: list[_Plan | None] = []

    def prefill(self, slot: int, tokens: Sequence[int], chunk: int = PREFILL_CHUNK) -> Tensor | None:
        """See Target."""
        plan = self._plans[slot]
        if plan is None or not self.reads_prompts:
            return super().prefill(slot, tokens, chunk)
        if self.feature_layers:
            raise UserError(
                f"cache={type(self.method).__name__} does not run all tokens of a prompt by themselves, and this "
                "drafter reads hidden states of all: choose another drafter"
            )
        assert self._prompts is not None
        others = {other: self.committed(other) for other in range(self.slots) if other != slot}
        self._prompts.run(slot, plan.prompt, plan.reading, others, chunk)
        self._slots[slot].committed += tokens
        return None

    def check_contexts(self, contexts: Sequence[int]) -> None:
        """See Target."""
        check_contexts(self.method, contexts)

    def begin_prompt(self, slot: int, tokens: Sequence[int], new: int, contexts: Sequence[int] = ()) -> None:
        """Let the method read the prompt."""
        if self._prompts is not None:
            prompt = Prompt(tokens, 1, new, tuple(contexts))
            self._plans[slot] = _Plan(prompt, self._prompts.read(prompt))

    def end_prompt(self, slot: int) -> None:
        """Apply the method to the prompt."""
        plan = self._plans[slot]
        if plan is not None and self._prompts is not None:
            self._prompts.look_ahead(slot, plan.reading.lookahead, plan.prompt.length)
        super().end_prompt(slot)

    def clear(self, slot: int) -> None:
        """See Target."""
        super().clear(slot)
        self._plans[slot] = None

    def swap(self, one: int, other: int) -> None:
        """See Target."""
        super().swap(one, other)
        self._plans[one] = self._plans[other]

    def _allocate(self, slots: int, capacity: int) -> None:
        super()._allocate(slots, capacity)
        self._plans = [None] * slots
        self._cache = self._compressed
        if isinstance(self.method, PromptMethod):
            self._prompts = Prompts(self._model, self._compressed, self._draft)

    def _run(
        self, slots: Sequence[int], starts: Sequence[int], ids: Tensor, positions: Tensor, allowed: Tensor, logits: bool
    ) -> Pass:
        lower = [0 if plan is None else plan.prompt.saved_positions for plan in (self._plans[slot] for slot in slots)]
        if any(lower):
            positions = positions - torch.tensor(lower, device=positions.device)[:, None]
        self._begin_pass(slots, starts, ids, positions, allowed)
        return super()._run(slots, starts, ids, positions, allowed, logits)

    def _enter(self, slots: Sequence[int], starts: Sequence[int], allowed: Tensor) -> None:
        """The caches know their own places."""

    def _masks(self, slots: Sequence[int], positions: Tensor, allowed: Tensor) -> Tensor | dict[str, Tensor]:
        """A stand-in: the attention reads the pass from the cache."""
        return self._by_layer_type(allowed[:1, None, :1, :1], allowed[:1, None, :1, :1])


class CachedFastTarget(CompressedSlots, FastTarget):
    """The fast path with compressed caches. shape: a model of the decoder's config, whose weights are not read.

    budget, statistics: see CompressedCache. Methods that run prompts themselves need a whole model, see CachedTarget.
    """

    def __init__(
        self,
        decoder: Decoder,
        shape: PreTrainedModel,
        method: CacheMethod,
        budget: CacheBudget | None = None,
        statistics: Statistics | None = None,
    ) -> None:
        super().__init__(decoder)
        self._by_kernels, self._reads_masks = False, True
        self._compress_with(shape, method, budget, statistics)

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
        self._begin_pass(slots, starts, ids, positions, allowed)
        # Single tokens directly after the committed ones.
        single = logits and ids.shape[1] == 1 and all(len(self.depths(slot)) == 1 for slot in slots)
        with torch.no_grad():
            attention = CompressedAttention(self._decoder, self._turns, positions, self._rotates_in_place)
            if single and self.dtype == torch.float32 and self.device.type == "cpu":
                attention = CompressedTokenAttention(self._decoder, self._turns, positions, self._compressed.tree_pass)
            return pass_of(self._outputs(ids, attention, self.feature_layers, logits), *ids.shape)


class CompressedAttention(RotatedHeads):
    """The attention of the layers of a pass over compressed caches, see MaskedAttention."""

    def __init__(self, decoder: Decoder, tables: Sequence[Tensor], positions: Tensor, in_place: bool) -> None:
        super().__init__(decoder, tables, positions, in_place)
        # Keys are stored as transformers has them: of numbers that are rotated together, the first ones come first.
        turned = torch.arange(2 * len(decoder.rotations[0].frequencies), device=positions.device)
        rest = torch.arange(len(turned), decoder.head_size, device=positions.device)
        self._order = torch.cat([turned[::2], turned[1::2], rest])
        windows = {layer.window for layer in decoder.layers}
        self._scorings = {window: Scoring(decoder.scale, window, decoder.score_cap) for window in windows}

    def __call__(self, layer: Layer, cache: CompressedLayer, qkv: Tensor) -> Tensor:
        """Outputs (B * N, H * G * D) of queries, keys and values (B * N, (H * G + 2 * H) * D) before their rotation."""
        queries, handle = self._nodes(cache, self.rotate(layer, qkv.view(len(qkv), -1, self._decoder.head_size)))
        cache.scoring = self._scorings[layer.window]
        return cache.attend(handle, queries, None, None, None).view(len(qkv), -1)

    def _nodes(self, cache: CompressedLayer, qkv: Tensor) -> tuple[Tensor, Handle]:
        """Queries (B, N, H * G, D), and keys and values, of (B * N, heads, D) after their rotation."""
        decoder = self._decoder
        heads, both = decoder.heads, decoder.heads + decoder.kv_heads
        qkv = qkv.unflatten(0, (self._count, -1))
        turned = qkv[:, :, :both].index_select(3, self._order)
        return turned[:, :, :heads], Handle(
            cache, turned[:, :, heads:].transpose(1, 2), qkv[:, :, both:].transpose(1, 2)
        )


class CompressedTokenAttention(CompressedAttention):
    """The same over one new token of each sequence of an engine's pass, by the kernel segmented_token where it can.

    Whether it can depends on a sequence alone, and so do its outputs. In float32 on a CPU.
    """

    def __init__(self, decoder: Decoder, tables: Sequence[Tensor], positions: Tensor, engine: TreePass | None) -> None:
        super().__init__(decoder, tables, positions, in_place=True)
        assert engine is not None
        self._engine = engine
        self._positions: list[int] = positions[:, 0].tolist()
        self._rows = [[table[position] for position in self._positions] for table in tables]
        self._turned = [2 * len(rotation.frequencies) for rotation in decoder.rotations]

    def __call__(self, layer: Layer, cache: CompressedLayer, qkv: Tensor) -> Tensor:
        """See CompressedAttention."""
        heads = qkv.view(len(qkv), -1, self._decoder.head_size)
        normalize(self._decoder, layer, heads)
        cache.scoring = self._scorings[layer.window]
        turned, turns = self._turned[layer.rotation], self._rows[layer.rotation]
        outputs = [
            cache.sequences[slot].attend_token(own, turn, turned, position, cache.scoring)
            for slot, own, turn, position in zip(self._engine.slots, heads, turns, self._positions, strict=True)
        ]
        others = [row for row, output in enumerate(outputs) if output is None]
        if others:
            queries, handle = self._nodes(cache, self.turn(layer, heads))
            attended = cache.attend_trees(self._engine, handle, queries, rows=others)
            for row, output in zip(others, attended, strict=True):
                outputs[row] = output.flatten()
        found = [output for output in outputs if output is not None]
        return found[0][None] if len(found) == 1 else torch.stack(found)
