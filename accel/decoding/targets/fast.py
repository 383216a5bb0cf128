"""The fast path: decoders as a few fused operations over one pre-allocated cache.

transformers spends half of a small model's step between its operations. Here the weights of a layer are fused (query,
key and value; gate and up), its cache is one tensor, a tree's mask is computed once for all layers of a window, and
weights are stored in the order in which the CPU's matrix product reads them, in bfloat16 where that is exact.
"""

from collections.abc import Mapping, Sequence
from copy import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hasten.accel.decoding.targets.attention import CacheAccess, Reach, attend, write
from hasten.accel.decoding.targets.base import FINAL, Pass, Target
from hasten.accel.decoding.targets.families import build_decoder, name_of, refusal
from hasten.accel.decoding.targets.families.decoder import Decoder, Layer
from hasten.accel.decoding.targets.families.weights import ModelWeights
from hasten.accel.errors import UserError

_MIN_COMPILED_LENGTH = 256  # smallest number of cache positions that a compiled pass reads


class FastTarget(Target):
    """A decoder of one of the families of `targets.families`. compiled: whether torch compiles passes."""

    def __init__(self, decoder: Decoder, compiled: bool = False) -> None:
        super().__init__(decoder.vocabulary, decoder.max_length, decoder.device)
        self._decoder, self.dtype = decoder, decoder.dtype
        self._windows = {layer.window for layer in decoder.layers}
        self._features: dict[int, Tensor] = {}
        self._turns: list[Tensor] = []
        self._cache: list[Tensor] = []
        # Rotations in place are complex products: only float32 has them, and torch.compile generates no code for them.
        self._rotates_in_place = self.dtype == torch.float32 and not compiled
        self._compiled: Any = None
        if compiled:
            # With CUDA graphs on a GPU, because a small model's pass is mostly the time of kernel launches.
            mode = "reduce-overhead" if self.device.type == "cuda" else "default"
            self._compiled = torch.compile(self._layers_of_pass, dynamic=False, mode=mode)

    @classmethod
    def of(cls, model: Any, compiled: bool = False, packs: bool = True) -> "FastTarget":
        """The target of a transformers model, whose weights are copied or shared; UserError for others.

        The model object is not needed any more. packs: whether weights may be packed; if not, products are torch's.
        """
        quantized = getattr(model.config, "quantization_config", None)
        reason = "transformers has quantized its weights" if quantized else refusal(model.config)
        if reason is not None:
            raise UserError(f"path=fast cannot run {name_of(model.config)}: {reason}")
        # torch.compile cannot trace the kernels of packed weights.
        return cls(build_decoder(model.config, ModelWeights(model, packs and not compiled)), compiled)

    @property
    def cache_bytes(self) -> int:
        """Bytes of keys and values of all layers."""
        return sum(cache.numel() * cache.element_size() for cache in self._cache)

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's keys and values."""
        decoder = self._decoder
        return len(decoder.layers) * 2 * decoder.kv_heads * decoder.head_size * self.dtype.itemsize

    def embedding(self) -> Tensor:
        """The embedding's weight, in bfloat16 where that is exact; a packed one is dequantized."""
        return self._decoder.embedding()

    def first_layers(self, count: int) -> "FastTarget":
        """The model of the first `count` layers; it is not compiled."""
        if count > len(self._decoder.layers):
            raise UserError(f"a sub-model of {count} layers is wrong: the model has {len(self._decoder.layers)}")
        part = copy(self)
        part._decoder, part._cache, part._features, part._compiled = self._decoder.first_layers(count), [], {}, None
        part._slots, part.capacity, part.feature_layers, part.virtual = [], 0, (), None
        return part

    def _allocate(self, slots: int, capacity: int) -> None:
        decoder = self._decoder
        # Keys and values of a layer are in one tensor (slots, 2 * H, capacity, D), so that one write stores both.
        shape = slots, 2 * decoder.kv_heads, capacity, decoder.head_size
        self._cache = [torch.zeros(shape, dtype=self.dtype, device=self.device) for _ in decoder.layers]
        self._turns = [rotation.table(capacity, decoder.head_size, self.device) for rotation in decoder.rotations]

    def _run(
        self, slots: Sequence[int], starts: Sequence[int], ids: Tensor, positions: Tensor, allowed: Tensor, logits: bool
    ) -> Pass:
        count, width = ids.shape
        first = slots[0]
        # Adjacent slots are a view of the cache, others have to be gathered.
        adjacent = list(slots) == list(range(first, first + count))
        # A compiled pass can neither keep hidden states by the way nor insert any.
        plain = not self.feature_layers and not self._inserted
        compiled = self._compiled is not None and logits and adjacent and plain
        if compiled:
            # The length is rounded up to a power of two, because every shape is compiled once.
            total = min(self.capacity, max(_MIN_COMPILED_LENGTH, 1 << (allowed.shape[-1] - 1).bit_length()))
            allowed = F.pad(allowed, (0, total - allowed.shape[-1]))
        start = starts[0] if count == 1 and not compiled else None
        rows = places = None
        if start is None:
            rows = torch.tensor(slots)[:, None].to(self.device)
            places = (torch.tensor(starts)[:, None] + torch.arange(width)).to(self.device)
        # Only a prompt is run without logits. It is a chain.
        causal = not logits and start == 0 and self._decoder.score_cap is None
        # A single token directly after the committed ones attends to all of them, and needs no mask.
        alone = count == width == 1 and len(self.depths(slots[0])) == 1 and not compiled
        # inference_mode skips autograd's bookkeeping for views, which is a good part of a small model's pass.
        with torch.no_grad() if compiled else torch.inference_mode():
            reaches = self._reaches(slots, positions, allowed, causal, alone, static=compiled)
            access = CacheAccess(
                first if adjacent else None, list(slots), rows, places, start, allowed.shape[-1], causal, reaches
            )
            forward = self._compiled if compiled and self._compiled is not None else self._layers_of_pass
            hidden = forward(ids, positions, access)
            features = None
            if self.feature_layers:
                self._features[FINAL] = hidden
                features = torch.cat([self._features[layer] for layer in self.feature_layers], -1)
                features = features.unflatten(0, (count, width))
                self._features.clear()
            if not logits:
                return Pass(hidden[:0, None], hidden[:0, None], features)
            scores, last = (rows.unflatten(0, (count, width)) for rows in (self._decoder.logits(hidden), hidden))
            return Pass(scores, last, features)

    def _reaches(
        self, slots: Sequence[int], positions: Tensor, allowed: Tensor, causal: bool, alone: bool, static: bool
    ) -> Mapping[int | None, Reach]:
        """What the new nodes attend to, by the windows of layers. static: whether all cache positions must be read."""
        total = allowed.shape[-1]
        reaches: dict[int | None, Reach] = {}
        for window in self._windows:
            if window is None or window >= total:
                reaches[window] = reaches.get(None) or Reach(0, None if causal or alone else self._mask(allowed))
                reaches[None] = reaches[window]
                continue
            # Positions before the windows of all new nodes are not read.
            first = 0 if static else max(0, min(len(self.committed(slot)) for slot in slots) - window + 1)
            mask = None
            if not alone:
                near = positions[:, :, None] - self._key_positions(slots, total) < window
                mask = self._mask((allowed & near)[..., first:])
            reaches[window] = Reach(first, mask)
        return reaches

    def _mask(self, allowed: Tensor) -> Tensor:
        """Additive mask (B, 1, G * N, L): the G query heads of a KV head are folded into the rows."""
        groups = self._decoder.heads // self._decoder.kv_heads
        mask = torch.zeros(allowed.shape, dtype=self.dtype, device=self.device).masked_fill_(~allowed, -torch.inf)
        return mask[:, None].repeat(1, 1, groups, 1)

    def _layers_of_pass(self, ids: Tensor, positions: Tensor, access: CacheAccess) -> Tensor:
        """Hidden states (B * N, D) of the new nodes after the final norm."""
        decoder, count, rows = self._decoder, ids.shape[0], ids.numel()
        heads, kv_heads, size = decoder.heads, decoder.kv_heads, decoder.head_size
        x = decoder.embed(ids.view(-1))
        turns = [table[positions.view(-1)][:, None] for table in self._turns]
        if self._rotates_in_place:
            turns = [torch.view_as_complex(turn) for turn in turns]
        for number, (layer, cache) in enumerate(zip(decoder.layers, self._cache, strict=True)):
            if number in self._inserted:
                x = self._inserted[number].into(x)
            if number in self.feature_layers:
                self._features[number] = x
            qkv = self._rotate(layer, layer.qkv(layer.attention_norm(x)).view(rows, -1, size), turns[layer.rotation])
            write(cache, qkv.narrow(1, heads, 2 * kv_heads), count, access)
            added = layer.out(attend(decoder, qkv.narrow(1, 0, heads), cache, count, layer.window, access))
            x = x + (added if layer.attention_out_norm is None else layer.attention_out_norm(added))
            added = layer.mlp(layer.mlp_norm(x))
            x = x + (added if layer.mlp_out_norm is None else layer.mlp_out_norm(added))
        return decoder.norm(x)

    def _rotate(self, layer: Layer, qkv: Tensor, turns: Tensor) -> Tensor:
        """Queries, keys and values (rows, heads, D) with rotary embedding of queries and keys; in place if possible."""
        heads, size = self._decoder.heads, self._decoder.head_size
        both = heads + self._decoder.kv_heads
        if layer.query_norm is not None and layer.key_norm is not None:
            qkv[:, :heads] = layer.query_norm(qkv[:, :heads])
            qkv[:, heads:both] = layer.key_norm(qkv[:, heads:both])
        if self._rotates_in_place:
            torch.view_as_complex(qkv.view(len(qkv), -1, size // 2, 2)).narrow(1, 0, both).mul_(turns)
            return qkv
        cos, sin = turns.unbind(-1)
        one, other = qkv[:, :both].float().unflatten(-1, (-1, 2)).unbind(-1)
        rotated = torch.stack([one * cos - other * sin, other * cos + one * sin], -1).flatten(-2).to(qkv.dtype)
        return torch.cat([rotated, qkv[:, both:]], 1)

    def _move(self, slot: int, sources: Sequence[int], places: Sequence[int]) -> None:
        for cache in self._cache:
            cache[slot][:, places] = cache[slot][:, sources]

    def _copy_slot(self, source: int, slot: int, length: int) -> None:
        for cache in self._cache:
            cache[slot, :, :length] = cache[source, :, :length]
