"""A draft model as cache methods ask it: what it expects behind a prompt, and what it attends to."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from hasten.accel.cache.attention import attach
from hasten.accel.cache.cache import CompressedCache
from hasten.accel.cache.full import Full
from hasten.accel.cache.segments.base import scores
from hasten.accel.errors import UserError


@dataclass(frozen=True)
class _Observed(Full):
    """Keeps everything, and the last queries."""

    queries: int

    @property
    def query_window(self) -> int:
        """Those that are kept."""
        return self.queries


class DraftModel:
    """A causal LM that answers as prompt.base.Draft says. vocabulary: size of the target's."""

    def __init__(self, model: PreTrainedModel, vocabulary: int) -> None:
        attach(model)
        self._model = model
        config = model.config.get_text_config()
        self._limit = getattr(config, "max_position_embeddings", None)
        # Rows of other ids than the target's are never expected.
        self._vocabulary = min(vocabulary, config.vocab_size)
        self._rows = config.vocab_size
        ends = getattr(model.generation_config, "eos_token_id", None)
        self._ends = frozenset(ends if isinstance(ends, list) else [ends])

    def continuation(self, tokens: Sequence[int], count: int) -> list[int]:
        """See Draft."""
        if self._limit is not None:
            count = min(count, self._limit - len(tokens))
        cache = DynamicCache(config=self._model.config)
        expected: list[int] = []
        new = self._checked(tokens, 1)
        while len(expected) < count and not (expected and expected[-1] in self._ends):
            new = [self._next(new, cache)]
            expected += new
        return expected

    def attention(self, tokens: Sequence[int], window: int, steps: int) -> list[Tensor]:
        """See Draft."""
        cache = CompressedCache(self._model, _Observed(window + steps))
        new = self._checked(tokens, steps)
        for _ in range(steps + 1):
            new = [self._next(new, cache)]
        count = len(tokens)
        layers = []
        for layer in cache.compressed:
            recent = layer.sequences[0].uncompressed()
            assert recent is not None
            assert recent.queries is not None
            # Those of the window and of the steps; a shorter prompt has fewer.
            width = min(window, count) + steps
            queries, total = recent.queries[-width:], recent.keys.shape[1]
            products = scores(queries, recent.keys, layer.scoring).unflatten(1, (-1, width)).flatten(0, 1)
            own = recent.positions[-width:, None]
            seen = recent.positions <= own
            if layer.scoring.window is not None:
                seen &= own - recent.positions < layer.scoring.window
            assert total == count + steps
            layers.append(products.masked_fill_(~seen, -torch.inf).softmax(-1)[..., :count])
        return layers

    def _checked(self, tokens: Sequence[int], new: int) -> list[int]:
        """The tokens, with the id 0 for those that the draft has no row for.

        UserError if there is no room for `new` tokens behind them.
        """
        if self._limit is not None and len(tokens) + new > self._limit:
            raise UserError(
                f"a prompt of {len(tokens)} tokens is too long for the draft model's context of {self._limit}: give "
                "cache.draft=MODEL with a longer one"
            )
        return [token if token < self._rows else 0 for token in tokens]

    def _next(self, tokens: Sequence[int], cache: DynamicCache | CompressedCache) -> int:
        """The most probable token behind new ones."""
        ids = torch.tensor([list(tokens)], device=self._model.device)
        with torch.no_grad():
            logits: Tensor = self._model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[0, -1]
        return int(logits[: self._vocabulary].argmax())
