"""A transformers model as a target whose caches a method keeps small, see accel/cache.

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
from hasten.accel.cache.cache import CompressedCache, TreePass
from hasten.accel.cache.prompt.base import Prompt, PromptMethod, Reading
from hasten.accel.cache.prompts import Prompts, check_contexts
from hasten.accel.cache.statistics import Statistics
from hasten.accel.decoding.targets.base import PREFILL_CHUNK, Pass
from hasten.accel.decoding.targets.transformers import TransformersTarget
from hasten.accel.errors import UserError


@dataclass(frozen=True)
class _Plan:
    """A prompt that the method has read."""

    prompt: Prompt
    reading: Reading


class CachedTarget(TransformersTarget):
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
        self.method, self.budget, self.statistics = method, budget, statistics
        self._draft = draft
        self._prompts: Prompts | None = None
        # Methods that only look ahead let all tokens run as usual.
        self.reads_prompts = isinstance(method, PromptMethod) and method.selects
        # Refuses models and budgets that do not fit before anything is decoded.
        CompressedCache(model, method, budget, statistics)
        attach(model)
        self._ended: list[int | None] = []
        self._plans: list[_Plan | None] = []

    @property
    def cache_bytes(self) -> int:
        """Bytes held by all slots."""
        return self._compressed.nbytes if self._slots else 0

    def prefill(self, slot: int, tokens: Sequence[int], chunk: int = PREFILL_CHUNK) -> Tensor | None:
        """See Target."""
        plan = self._plans[slot]
        if plan is not None and self.reads_prompts:
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
        self._ended[slot] = len(self.committed(slot))
        plan = self._plans[slot]
        if plan is not None and self._prompts is not None:
            self._prompts.look_ahead(slot, plan.reading.lookahead, plan.prompt.length)
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
        self._ended[slot], self._plans[slot] = None, None
        self._compressed.shared.pop(slot, None)
        for layer in self._compressed.compressed:
            layer.sequences[slot] = layer.new_sequence()

    def swap(self, one: int, other: int) -> None:
        """See Target."""
        super().swap(one, other)
        self._ended[one], self._plans[one] = self._ended[other], self._plans[other]
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
