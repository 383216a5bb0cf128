"""A compressed cache as transformers takes it: `past_key_values` of a model whose attention is ours.

    attach(model)  # of attention.py
    cache = CompressedCache(model, method, CacheBudget(0.25))
    model.generate(**inputs, past_key_values=cache)

Layers hand the attention function a handle in place of keys and values, see attention.py.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from hasten.accel.cache.base import CacheBudget, CacheMethod, Place, check_budget
from hasten.accel.cache.rotary import rotary_of
from hasten.accel.cache.segments.base import storage_bytes
from hasten.accel.cache.sequence import NewTokens, SequenceCache
from hasten.accel.errors import UserError
from hasten.kernels.attention.contract import Scoring

# Name of the attention, see attention.py.
IMPLEMENTATION = "hasten_cache"
_KINDS = {"full_attention", "sliding_attention"}
_CHUNKED = "chunked_attention"


@dataclass(frozen=True)
class TreePass:
    """A pass of the decoding engine. slots: sequence of each row. above: see NewTokens, one for each row, with N rows.

    positions: (N,) of each row. The nodes wait until `CompressedCache.commit`.
    """

    slots: Sequence[int]
    above: Sequence[Tensor]
    positions: Sequence[Tensor]


class Handle:
    """What a layer hands to the attention function: itself and the keys and values (B, H, N, D) of the pass.

    UserError where a model computes with it before its attention: caches of latents do.
    """

    def __init__(self, layer: "CompressedLayer", keys: Tensor, values: Tensor) -> None:
        self.layer, self.keys, self.values = layer, keys, values
        self.dtype, self.device, self.shape = keys.dtype, keys.device, keys.shape

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise UserError(
            "the model computes with what its cache returns before its attention does, as models do that cache latents "
            f"({getattr(func, '__name__', func)}): its cache cannot be compressed"
        )


class CompressedLayer(CacheLayerMixin):
    """Caches of all sequences in one layer. seen: columns of the inputs so far, padding included."""

    is_sliding = False

    def __init__(self, owner: "CompressedCache", number: int) -> None:
        super().__init__()
        self.owner, self.number, self.seen = owner, number, 0
        self.sequences: list[SequenceCache] = []
        self.scoring = Scoring()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """One cache for each sequence of the batch."""
        self.sequences = [SequenceCache(self.owner.method) for _ in range(len(key_states))]
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """A handle in place of keys and values; the attention function stores them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        handle = Handle(self, key_states, value_states)
        return handle, handle

    def attend(
        self, handle: Handle, queries: Tensor, padding: Tensor | None, positions: Tensor | None, sinks: Tensor | None
    ) -> Tensor:
        """Store a pass's keys and values, and attend: output (B, N, H * G, D) of queries (B, N, H * G, D).

        padding: (B, N) bool, False where a token is padding, which is not stored; None: no padding. positions: (B, N).
        """
        engine = self.owner.tree_pass
        if engine is not None:
            return self._attend_trees(engine, handle, queries, sinks)
        self.seen += queries.shape[1]
        outputs = torch.zeros_like(queries)
        for row, sequence in enumerate(self.sequences):
            real = slice(None) if padding is None or bool(padding[row].all()) else padding[row].nonzero()[:, 0]
            own = queries[row, real]
            if not len(own):
                continue
            place = torch.arange(sequence.length, sequence.length + len(own), dtype=torch.int32, device=own.device)
            new = NewTokens(
                handle.keys[row][:, real],
                handle.values[row][:, real],
                own,
                place if positions is None else positions[row, real].int(),
            )
            outputs[row, real] = sequence.append(new, self.scoring, sinks, queries.dtype)
            sequence.commit()
            ends_prompt = len(own) > 1
            if ends_prompt:
                self.owner.prompts[self.number, row] = sequence.length
            if ends_prompt or self.owner.is_due(sequence.length - self.owner.prompts.get((self.number, row), 0)):
                self.owner.compress(row, self.number)
        return outputs

    def _attend_trees(self, engine: TreePass, handle: Handle, queries: Tensor, sinks: Tensor | None) -> Tensor:
        outputs = torch.zeros_like(queries)
        for row, (slot, above, positions) in enumerate(zip(engine.slots, engine.above, engine.positions, strict=True)):
            count = len(above)
            new = NewTokens(
                handle.keys[row, :, :count],
                handle.values[row, :, :count],
                queries[row, :count],
                positions[:count].int(),
                above,
            )
            outputs[row, :count] = self.sequences[slot].append(new, self.scoring, sinks, queries.dtype)
        return outputs

    def place(self, row: int) -> Place:
        """What the method is told of a sequence."""
        length, budget = self.sequences[row].length, self.owner.budget
        tokens = None if budget is None else budget.tokens(length)
        shared = self.owner.shared.setdefault(row, {})
        rotary = None if self.owner.rotary is None else partial(self.owner.rotary, self.number)
        return Place(self.number, len(self.owner.layers), length, tokens, self.scoring, shared, rotary)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns of the padding mask, and the first."""
        return self.seen + query_length, 0

    def get_seq_length(self) -> int:
        """Columns so far, which positions are counted from."""
        return self.seen

    def get_max_length(self) -> int:
        """No limit."""
        return -1

    def reset(self) -> None:
        """Drop all sequences."""
        self.sequences, self.seen, self.is_initialized = [], 0, False

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last tokens of all sequences; ValueError where some of them are compressed already."""
        for sequence in self.sequences:
            sequence.crop(abs(tokens_to_remove))
        self.seen -= abs(tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Beam search: sequence i becomes a copy of sequence beam_idx[i]."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep copies of these sequences."""
        self.sequences = [self.sequences[index].copy() for index in indices.tolist()]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each sequence `repeats` times."""
        self.sequences = [sequence.copy() for sequence in self.sequences for _ in range(repeats)]


class CompressedCache(Cache):
    """Cache of a model that a method keeps small.

    budget: tokens that each layer may hold of a sequence, for methods that have one. UserError for models with layers
    that have no KV cache, and for methods that the model does not fit.
    """

    def __init__(self, model: PreTrainedModel, method: CacheMethod, budget: CacheBudget | None = None) -> None:
        text = model.config.get_text_config()
        unsupported = set(getattr(text, "layer_types", None) or []) - _KINDS
        if _CHUNKED in unsupported:
            raise UserError(
                f"{type(model).__name__} has layers that attend within chunks of {text.attention_chunk_size} tokens, "
                "of which the attention function is not told: its cache cannot be compressed"
            )
        if unsupported:
            raise UserError(
                f"{type(model).__name__} has layers of {', '.join(sorted(unsupported))}: only caches of keys and "
                "values can be compressed"
            )
        check_budget(method, budget)
        self.method, self.budget = method, budget
        self.rotary = rotary_of(model) if method.needs_rotary else None
        self.tree_pass: TreePass | None = None
        # Committed tokens of each layer and row at the end of the prompt.
        self.prompts: dict[tuple[int, int], int] = {}
        # What the layers of a sequence tell each other, by row.
        self.shared: dict[int, dict[str, Any]] = {}
        super().__init__(layers=[CompressedLayer(self, number) for number in range(text.num_hidden_layers)])

    @property
    def compressed(self) -> Iterator[CompressedLayer]:
        """The layers."""
        return (layer for layer in self.layers if isinstance(layer, CompressedLayer))

    @property
    def nbytes(self) -> int:
        """Bytes held by all sequences in all layers; what they share counts once."""
        sequences = (sequence for layer in self.compressed for sequence in layer.sequences)
        return storage_bytes(tensor for sequence in sequences for tensor in sequence.tensors())

    def compress(self, row: int, number: int | None = None) -> None:
        """Apply the method to a sequence: in layer `number`, if it does not join layers, or in all of them (None).

        A method that joins layers is applied when the last layer asks for it.
        """
        layers = list(self.compressed)
        if self.method.joins_layers:
            if number is None or number == len(layers) - 1:
                self._compress_together(row, layers)
            return
        for layer in layers if number is None else layers[number : number + 1]:
            sequence = layer.sequences[row]
            recent = sequence.uncompressed()
            if recent is not None:
                sequence.keep(self.method.compress(sequence.segments, recent, layer.place(row)))

    def _compress_together(self, row: int, layers: Sequence[CompressedLayer]) -> None:
        given = []
        for layer in layers:
            recent = layer.sequences[row].uncompressed()
            if recent is None:
                return
            given.append((layer.sequences[row].segments, recent, layer.place(row)))
        for layer, kept in zip(layers, self.method.compress_layers(given), strict=True):
            layer.sequences[row].keep(kept)

    def is_due(self, generated: int) -> bool:
        """Whether the method is applied when so many tokens behind the prompt are committed."""
        return generated > 0 and generated % self.method.interval == 0
