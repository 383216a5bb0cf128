"""A compressed cache as transformers takes it: `past_key_values` of a model whose attention is ours.

    attach(model)  # of attention.py
    cache = CompressedCache(model, method, CacheBudget(0.25))
    model.generate(**inputs, past_key_values=cache)

Layers hand the attention function a handle in place of keys and values, see attention.py.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import gcd
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from hasten.accel.cache.base import CacheBudget, CacheLevel, CacheMethod, Place, check_budget
from hasten.accel.cache.calibrated import LayerTensors
from hasten.accel.cache.prompt.base import PromptMethod
from hasten.accel.cache.rotary import rotary_of
from hasten.accel.cache.segments.base import storage_bytes
from hasten.accel.cache.sentences import sentence_ends
from hasten.accel.cache.sequence import NewTokens, SequenceCache
from hasten.accel.cache.statistics import Statistics, check_layers
from hasten.accel.errors import UserError
from hasten.kernels.attention.contract import Partial, Scoring

# Name of the attention, see attention.py.
IMPLEMENTATION = "hasten_cache"
_KINDS = {"full_attention", "sliding_attention"}
_CHUNKED = "chunked_attention"


@dataclass(frozen=True)
class TreePass:
    """A pass of the decoding engine. slots: sequence of each row. above: see NewTokens, one for each row.

    positions: (N,) int32 of each row. ids: (B, N) of the nodes' tokens; None: not known. The nodes wait until their
    sequence's cache commits.
    """

    slots: Sequence[int]
    above: Sequence[Tensor | None]
    positions: Sequence[Tensor]
    ids: Tensor | None = None


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
        self.sequences = [self.new_sequence() for _ in range(len(key_states))]
        self.is_initialized = True

    @property
    def level(self) -> CacheLevel:
        """The layer's method and budget."""
        return self.owner.levels[self.number]

    def new_sequence(self) -> SequenceCache:
        """An empty cache of a sequence."""
        return SequenceCache(self.level.method)

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
            return self.attend_trees(engine, handle, queries, sinks)
        self.seen += queries.shape[1]
        ends = self.owner.ends_in(self.owner.ids, queries.shape[:2])
        if self.number == len(self.owner.layers) - 1:
            # A pass that the model itself does not begin tells nothing.
            self.owner.ids = None
        outputs = torch.zeros_like(queries)
        passes: dict[int, tuple[Any, NewTokens]] = {}
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
                ends=None if ends is None else ends[row, real],
            )
            passes[row] = real, new
        known = self._of_shared({row: new for row, (_, new) in passes.items()})
        for row, (real, new) in passes.items():
            sequence = self.sequences[row]
            outputs[row, real] = sequence.append(new, self.scoring, sinks, queries.dtype, known.get(row))
            sequence.commit()
            ends_prompt = len(new.queries) > 1
            if ends_prompt:
                self.owner.prompts[self.number, row] = sequence.length
            self.owner.compress(row, self.number, sequence.length - self.owner.prompts.get((self.number, row), 0))
        return outputs

    def attend_trees(
        self,
        engine: TreePass,
        handle: Handle,
        queries: Tensor,
        sinks: Tensor | None = None,
        rows: Sequence[int] | None = None,
    ) -> Tensor:
        """As `attend`, of the nodes of a pass of the decoding engine. rows: of the pass; None for all."""
        ends = self.owner.ends_in(engine.ids, queries.shape[:2])
        passes: dict[int, NewTokens] = {}
        for row in range(len(engine.slots)) if rows is None else rows:
            slot, above, positions = engine.slots[row], engine.above[row], engine.positions[row]
            count = len(positions)
            keys, values, own = handle.keys[row], handle.values[row], queries[row]
            if count < len(own):
                keys, values, own = keys[:, :count], values[:, :count], own[:count]
            passes[slot] = NewTokens(keys, values, own, positions, above, None if ends is None else ends[row, :count])
        known = self._of_shared(passes)
        outputs = []
        for slot, new in passes.items():
            output = self.sequences[slot].append(new, self.scoring, sinks, queries.dtype, known.get(slot))
            # Rows of padding are 0.
            missing = queries.shape[1] - len(output)
            outputs.append(F.pad(output, (0, 0, 0, 0, 0, missing)) if missing else output)
        return outputs[0][None] if len(outputs) == 1 else torch.stack(outputs)

    def _of_shared(self, passes: Mapping[int, NewTokens]) -> dict[int, dict[int, Partial]]:
        """Partial results, by sequence and id of the segment, of segments that several sequences of a pass hold.

        Those of all their queries are one product, in which the order of summation depends on the number of queries.
        """
        method = self.owner.method
        if not isinstance(method, PromptMethod) or method.shared_tokens is None:
            return {}
        holders: dict[int, list[int]] = {}
        segments = {id(segment): segment for row in passes for segment in self.sequences[row].segments}
        for row in passes:
            for segment in self.sequences[row].segments:
                holders.setdefault(id(segment), []).append(row)
        known: dict[int, dict[int, Partial]] = {row: {} for row in passes}
        for key, rows in holders.items():
            if len(rows) < 2:
                continue
            queries, positions = (
                torch.cat([getattr(passes[row], name) for row in rows]) for name in ("queries", "positions")
            )
            parts = segments[key].attend(queries, positions, self.scoring)
            widths = [len(passes[row].queries) for row in rows]
            for row, *own in zip(rows, *(tensor.split(widths) for tensor in parts), strict=True):
                known[row][key] = Partial(*own)
        return known

    def interval(self, row: int) -> int:
        """Committed tokens of a sequence between two compressions."""
        return self.sequences[row].interval or self.level.method.interval

    def end_prompt(self, row: int) -> None:
        """Settle the interval of a sequence: a budget that grows with the text must not change it."""
        sequence = self.sequences[row]
        if sequence.uncompressed() is not None:
            sequence.interval = self.level.method.interval_of(self._budget_tokens(row))

    def place(self, row: int) -> Place:
        """What the method is told of a sequence."""
        length, tokens = self.sequences[row].length, self._budget_tokens(row)
        shared = self.owner.shared.setdefault(row, {})
        rotary = None if self.owner.rotary is None else partial(self.owner.rotary, self.number)
        statistics = None
        if self.owner.statistics is not None and self.owner.statistics[self.number]:
            # They come from a file, and stay where the keys are.
            device = self.sequences[row].device
            statistics = {name: part.to(device) for name, part in self.owner.statistics[self.number].items()}
            self.owner.statistics[self.number] = statistics
        return Place(self.number, len(self.owner.layers), length, tokens, self.scoring, shared, rotary, statistics)

    def _budget_tokens(self, row: int) -> int | None:
        """The budget in tokens of a sequence that is not empty."""
        budget, sequence = self.level.budget, self.sequences[row]
        if budget is None or not budget.in_bytes:
            return None if budget is None else budget.tokens(sequence.length)
        recent = sequence.uncompressed()
        assert recent is not None
        # Of each head: a key, a value, a position, and the summed attention.
        summed = 0 if recent.attention is None else recent.attention.itemsize
        sizes = recent.keys.shape[2] * recent.keys.itemsize, recent.values.shape[2] * recent.values.itemsize
        token = len(recent.keys) * (sum(sizes) + recent.positions.itemsize + summed)
        forgets = self.level.method.forgets_queries
        remembered = 0 if recent.queries is None or forgets else recent.queries.nbytes
        return max(1, (int(budget.value) // len(self.owner.levels) - remembered) // token)

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

    budget: tokens that each layer may hold of a sequence, for methods that have one. statistics: the method's
    calibrated ones; None takes them from each prompt. ends: ids that end a sentence, for methods that read sentences;
    None: those of the tokenizer beside the model's files. UserError for models with layers that have no KV cache, and
    for methods and statistics that the model does not fit.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        method: CacheMethod,
        budget: CacheBudget | None = None,
        statistics: Statistics | None = None,
        ends: Sequence[int] | None = None,
    ) -> None:
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
        count = text.num_hidden_layers
        self.levels = [method.level_of(number, count, budget) for number in range(count)]
        if budget is not None and budget.in_bytes:
            _check_bytes(text, method, int(budget.value), model.dtype)
        self.rotary = rotary_of(model) if any(level.method.needs_rotary for level in self.levels) else None
        self.statistics: list[LayerTensors] | None = None
        if statistics is not None:
            check_layers(statistics, text.num_hidden_layers)
            self.statistics = list(statistics.layers)
        self.tree_pass: TreePass | None = None
        # Ids (B, N) of the pass's tokens, from the model's forward hook of attention.py; None: not known.
        self.ids: Tensor | None = None
        self._ends: Tensor | None = None
        if any(level.method.reads_ends for level in self.levels):
            self._ends = sentence_ends(model) if ends is None else torch.tensor(list(ends), dtype=torch.long)
        # Whether a prompt ran as the method reads it, see prompts.py.
        self.filled = False
        # Committed tokens of each layer and row at the end of the prompt.
        self.prompts: dict[tuple[int, int], int] = {}
        # What the layers of a sequence tell each other, by row.
        self.shared: dict[int, dict[str, Any]] = {}
        super().__init__(layers=[CompressedLayer(self, number) for number in range(count)])

    @property
    def compressed(self) -> Iterator[CompressedLayer]:
        """The layers."""
        return (layer for layer in self.layers if isinstance(layer, CompressedLayer))

    @property
    def nbytes(self) -> int:
        """Bytes held by all sequences in all layers; what they share counts once."""
        sequences = (sequence for layer in self.compressed for sequence in layer.sequences)
        return storage_bytes(tensor for sequence in sequences for tensor in sequence.tensors())

    def ends_in(self, ids: Tensor | None, shape: torch.Size) -> Tensor | None:
        """Which tokens of ids (B, N) end a sentence, bool; None where the method does not ask, or ids are not known."""
        if self._ends is None or ids is None or ids.shape != shape:
            return None
        return torch.isin(ids, self._ends.to(ids.device))

    def compress(self, row: int, number: int | None = None, generated: int = 0) -> None:
        """Apply the methods that are due to a sequence: in layer `number`, or in all layers (None).

        generated: committed tokens behind the prompt; at its end all methods are due. A method that joins layers is
        applied when the last layer asks for it.
        """
        layers = list(self.compressed)
        if self.method.joins_layers and number not in (None, len(layers) - 1):
            return
        chosen = layers if number is None or self.method.joins_layers else layers[number : number + 1]
        if not generated:
            for layer in chosen:
                layer.end_prompt(row)
        due = [layer for layer in chosen if generated % layer.interval(row) == 0]
        if self.method.joins_layers:
            if due:
                self._compress_together(row, layers)
            return
        for layer in due:
            sequence = layer.sequences[row]
            recent = sequence.uncompressed()
            if recent is not None:
                sequence.keep(layer.level.method.compress(sequence.segments, recent, layer.place(row)))

    def interval(self, row: int) -> int:
        """Tokens of a sequence behind the prompt after which some layer is due again."""
        return gcd(*(layer.interval(row) for layer in self.compressed))

    def _compress_together(self, row: int, layers: Sequence[CompressedLayer]) -> None:
        given = []
        for layer in layers:
            recent = layer.sequences[row].uncompressed()
            if recent is None:
                return
            given.append((layer.sequences[row].segments, recent, layer.place(row)))
        for layer, kept in zip(layers, self.method.compress_layers(given), strict=True):
            layer.sequences[row].keep(kept)

    def check_pass(self, width: int) -> None:
        """UserError for a prompt of `width` tokens that the method did not read."""
        if width > 1 and not self.filled and self.tree_pass is None and isinstance(self.method, PromptMethod):
            raise UserError(
                f"cache={type(self.method).__name__} reads prompts before they run: fill the cache with "
                "hasten.accel.cache.prompts.prefill first"
            )


def _check_bytes(config: Any, method: CacheMethod, budget: int, dtype: torch.dtype) -> None:
    """UserError where a budget in bytes holds no token in each layer, or is needed as tokens before these have run.

    config: of the text model.
    """
    if isinstance(method, PromptMethod) and method.drafts and method.selects:
        raise UserError(f"cache={type(method).__name__} chooses tokens before it has keys: give the budget in tokens")
    queries = config.num_attention_heads
    heads = getattr(config, "num_key_value_heads", None) or queries
    size = getattr(config, "head_dim", None) or config.hidden_size // queries
    summed = torch.float32.itemsize if method.sums_attention else 0
    token = heads * (2 * size * dtype.itemsize + torch.int32.itemsize + summed)
    remembered = 0 if method.forgets_queries else method.query_window
    least = config.num_hidden_layers * (token + remembered * queries * size * dtype.itemsize)
    if budget < least:
        raise UserError(
            f"cache_budget_bytes={budget} is too small: a token in each layer, with what cache={type(method).__name__} "
            f"remembers besides, takes {least} bytes"
        )
