"""The fast path: Llama-like decoders as a few fused operations over one pre-allocated cache.

transformers spends half of a small model's step between its operations. Here the weights of a layer are fused (query,
key and value; gate and up), its cache is one tensor, a tree's mask is computed once for all layers, and weights are
stored in the order in which the CPU's matrix product reads them, in bfloat16 where that is exact.
"""

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hasten.accel.decoding.targets.base import FINAL, Pass, Target
from hasten.accel.decoding.targets.matmul import Norm, Weight
from hasten.accel.errors import UserError
from hasten.kernels.skinny_gemm import exact_bfloat16

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
_MIN_COMPILED_LENGTH = 256  # smallest number of cache positions that a compiled pass reads
_ROPES = ("default", "linear", "llama3", "yarn")


@dataclass
class _Layer:
    """Weights of a decoder layer. query_norm and key_norm: of Qwen 3; None in other families."""

    norm: Norm
    qkv: Weight
    out: Weight
    mlp_norm: Norm
    gate_up: Weight
    down: Weight
    query_norm: Tensor | None
    key_norm: Tensor | None


class _CacheAccess(NamedTuple):
    """Where a pass reads and writes the caches.

    slots: slots of the pass. first: the first slot if they are adjacent, else None. rows (B, 1), places (B, N): slots
    and cache positions of the new nodes; None if start is given. start: first position in the only slot, whose new
    nodes are then written by one copy. total: number of positions that are read. causal: whether the new nodes are the
    first tokens of a sequence, whose attention needs no mask.
    """

    first: int | None
    slots: list[int]
    rows: Tensor | None
    places: Tensor | None
    start: int | None
    total: int
    causal: bool


def refusal(config: Any) -> str | None:
    """Why a model of this config cannot run on the fast path; None if it can."""
    if config.model_type not in FAMILIES:
        return f"model_type {config.model_type} is none of {', '.join(FAMILIES)}"
    if getattr(config, "quantization_config", None):
        return "its weights are quantized"
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        return "it has sliding windows"
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kind = rope.get("rope_type", "default")
    if kind not in _ROPES:
        return f"its rotary embedding ({kind}) depends on the length"
    if getattr(config, "hidden_act", "silu") != "silu" or getattr(config, "mlp_bias", False):
        return "its feed-forward layers are not Llama's"
    return None


class LlamaTarget(Target):
    """A Llama-like model of transformers. The weights are copied or shared; the model object is not needed any more.

    compiled: whether torch compiles passes. packs: whether weights may be packed; if not, products are torch's.
    """

    def __init__(self, model: Any, compiled: bool = False, packs: bool = True) -> None:
        config = model.config
        reason = refusal(config)
        if reason is not None:
            raise UserError(f"path=llama cannot run {getattr(config, '_name_or_path', '') or 'this model'}: {reason}")
        super().__init__(config.vocab_size, config.max_position_embeddings, model.device)
        self.dtype = model.dtype
        self._heads = config.num_attention_heads
        self._kv_heads = config.num_key_value_heads
        self._size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self._eps = config.rms_norm_eps
        self._embedding = model.get_input_embeddings().weight.detach()
        if model.device.type == "cpu":
            short = exact_bfloat16(self._embedding)
            self._embedding = self._embedding if short is None else short
        self._norm = Norm(model.model.norm.weight.detach(), self._eps)
        # torch.compile cannot trace the kernels of packed weights.
        self._packs = packs and not compiled
        self._layers = [self._fused_layer(layer) for layer in model.model.layers]
        self._head = Weight(model.get_output_embeddings().weight.detach(), packs=self._packs)
        self._rotary = model.model.rotary_emb
        self._features: dict[int, Tensor] = {}
        self._cis = torch.empty(0)
        self._cache: list[Tensor] = []
        # Rotations in place are complex products: only float32 has them, and torch.compile generates no code for them.
        self._rotates_in_place = self.dtype == torch.float32 and not compiled
        self._compiled: Any = None
        if compiled:
            # With CUDA graphs on a GPU, because a small model's pass is mostly the time of kernel launches.
            mode = "reduce-overhead" if model.device.type == "cuda" else "default"
            self._compiled = torch.compile(self._layers_of_pass, dynamic=False, mode=mode)

    @property
    def cache_bytes(self) -> int:
        """Bytes of keys and values of all layers."""
        return sum(cache.numel() * cache.element_size() for cache in self._cache)

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's keys and values."""
        return len(self._layers) * 2 * self._kv_heads * self._size * self.dtype.itemsize

    def embedding(self) -> Tensor:
        """The embedding's weight, in bfloat16 where that is exact."""
        return self._embedding

    def first_layers(self, count: int) -> "LlamaTarget":
        """The model of the first `count` layers; it is not compiled."""
        if count > len(self._layers):
            raise UserError(f"a sub-model of {count} layers is wrong: the model has {len(self._layers)}")
        part = copy(self)
        part._layers, part._cache, part._features, part._compiled = self._layers[:count], [], {}, None
        part._slots, part.capacity, part.feature_layers, part.virtual = [], 0, (), None
        return part

    def _fused_layer(self, layer: Any) -> _Layer:
        attention, mlp = layer.self_attn, layer.mlp
        projections = [attention.q_proj, attention.k_proj, attention.v_proj]
        weights = [projection.weight.detach() for projection in projections]
        biases = [None if projection.bias is None else projection.bias.detach() for projection in projections]
        # Rotary pairs (i, i + D/2) become adjacent, so that a rotation is one complex product. Attention scores do not
        # change, because queries and keys are permuted alike.
        weights = [self._interleave(weights[0], 0), self._interleave(weights[1], 0), weights[2]]
        bias = None
        if all(part is not None for part in biases):
            query, key, value = (torch.as_tensor(part) for part in biases)
            bias = torch.cat([self._interleave(query, 0), self._interleave(key, 0), value])
        norms = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
        return _Layer(
            norm=Norm(layer.input_layernorm.weight.detach(), self._eps),
            qkv=Weight(torch.cat(weights), bias, self._packs),
            out=Weight(
                attention.o_proj.weight.detach(),
                None if attention.o_proj.bias is None else attention.o_proj.bias.detach(),
                self._packs,
            ),
            mlp_norm=Norm(layer.post_attention_layernorm.weight.detach(), self._eps),
            gate_up=Weight(torch.cat([mlp.gate_proj.weight.detach(), mlp.up_proj.weight.detach()]), None, self._packs),
            down=Weight(mlp.down_proj.weight.detach(), None, self._packs),
            query_norm=None if norms[0] is None else self._interleave(norms[0].weight.detach(), 0),
            key_norm=None if norms[1] is None else self._interleave(norms[1].weight.detach(), 0),
        )

    def _interleave(self, weight: Any, dim: int) -> Tensor:
        heads = weight.unflatten(dim, (-1, 2, self._size // 2))
        return heads.transpose(1, 2).flatten(0, 2).contiguous()

    def _allocate(self, slots: int, capacity: int) -> None:
        # Keys and values of a layer are in one tensor (slots, 2 * H, capacity, D), so that one write stores both.
        shape = slots, 2 * self._kv_heads, capacity, self._size
        self._cache = [torch.zeros(shape, dtype=self.dtype, device=self.device) for _ in self._layers]
        positions = torch.arange(capacity, device=self.device)[None]
        # float32, because in bfloat16 a position times a frequency is wrong by whole rotations.
        cos, sin = self._rotary(torch.empty(0, dtype=torch.float32, device=self.device), positions)
        half = self._size // 2
        self._cis = torch.stack([cos[0, :, :half], sin[0, :, :half]], -1).float()

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
        causal = not logits and start == 0
        access = _CacheAccess(first if adjacent else None, list(slots), rows, places, start, allowed.shape[-1], causal)
        # A single token directly after the committed ones attends to all of them, and needs no mask.
        alone = count == width == 1 and len(self.depths(slots[0])) == 1
        mask = None if causal or (alone and not compiled) else self._mask(allowed)
        # inference_mode skips autograd's bookkeeping for views, which is a good part of a small model's pass.
        with torch.no_grad() if compiled else torch.inference_mode():
            forward = self._compiled if compiled and self._compiled is not None else self._layers_of_pass
            hidden = forward(ids, positions, mask, access)
            features = None
            if self.feature_layers:
                self._features[FINAL] = hidden
                features = torch.cat([self._features[layer] for layer in self.feature_layers], -1)
                features = features.unflatten(0, (count, width))
                self._features.clear()
            if not logits:
                return Pass(hidden[:0, None], hidden[:0, None], features)
            scores, last = (rows.unflatten(0, (count, width)) for rows in (self._head(hidden), hidden))
            return Pass(scores, last, features)

    def _mask(self, allowed: Tensor) -> Tensor:
        """Additive mask (B, 1, G * N, L): the G query heads of a KV head are folded into the rows."""
        groups = self._heads // self._kv_heads
        mask = torch.zeros(allowed.shape, dtype=self.dtype, device=self.device).masked_fill_(~allowed, -torch.inf)
        return mask[:, None].repeat(1, 1, groups, 1)

    def _layers_of_pass(self, ids: Tensor, positions: Tensor, mask: Tensor | None, access: "_CacheAccess") -> Tensor:
        """Hidden states (B * N, D) of the new nodes after the final norm."""
        count, width = ids.shape
        rows = count * width
        x = self._embedding[ids.view(-1)].to(self.dtype)
        cis = self._cis[positions.view(-1)][:, None]
        if self._rotates_in_place:
            cis = torch.view_as_complex(cis)
        for number, (layer, cache) in enumerate(zip(self._layers, self._cache, strict=True)):
            if number in self._inserted:
                x = self._inserted[number].into(x)
            if number in self.feature_layers:
                self._features[number] = x
            qkv = layer.qkv(layer.norm(x)).view(rows, -1, self._size)
            qkv = self._rotate(layer, qkv, cis)
            attended = self._attention(qkv, cache, count, width, mask, access)
            x = x + layer.out(attended)
            gate, up = layer.gate_up(layer.mlp_norm(x)).chunk(2, -1)
            x = x + layer.down(F.silu(gate) * up)
        return self._norm(x)

    def _rotate(self, layer: _Layer, qkv: Tensor, cis: Tensor) -> Tensor:
        """Queries, keys and values (rows, heads, D) with rotary embedding of queries and keys; in place if possible."""
        heads, both = self._heads, self._heads + self._kv_heads
        if layer.query_norm is not None and layer.key_norm is not None:
            qkv[:, :heads] = F.rms_norm(qkv[:, :heads], (self._size,), layer.query_norm, self._eps)
            qkv[:, heads:both] = F.rms_norm(qkv[:, heads:both], (self._size,), layer.key_norm, self._eps)
        if self._rotates_in_place:
            torch.view_as_complex(qkv.view(len(qkv), -1, self._size // 2, 2)).narrow(1, 0, both).mul_(cis)
            return qkv
        cos, sin = cis.unbind(-1)
        one, other = qkv[:, :both].float().unflatten(-1, (-1, 2)).unbind(-1)
        rotated = torch.stack([one * cos - other * sin, other * cos + one * sin], -1).flatten(-2).to(qkv.dtype)
        return torch.cat([rotated, qkv[:, both:]], 1)

    def _attention(
        self, qkv: Tensor, cache: Tensor, count: int, width: int, mask: Tensor | None, access: "_CacheAccess"
    ) -> Tensor:
        """Write the new nodes' keys and values into the cache; returns their attention outputs (rows, heads * D)."""
        heads, kv_heads, size = self._heads, self._kv_heads, self._size
        groups = heads // kv_heads
        new = qkv.narrow(1, heads, 2 * kv_heads)
        if access.start is not None and access.first is not None:
            cache.select(0, access.first).narrow(1, access.start, width).copy_(new.transpose(0, 1))
        else:
            cache[access.rows, :, access.places] = new.view(count, width, 2 * kv_heads, size)
        cached = cache[access.slots] if access.first is None else cache.narrow(0, access.first, count)
        cached = cached.narrow(2, 0, access.total)
        keys, values = cached.narrow(1, 0, kv_heads), cached.narrow(1, kv_heads, kv_heads)
        queries = qkv.narrow(1, 0, heads)
        if access.causal:  # skips the half of the scores that a mask would remove
            queries = queries.transpose(0, 1)[None]
            attended = F.scaled_dot_product_attention(queries, keys, values, is_causal=True, enable_gqa=groups > 1)
            return attended[0].transpose(0, 1).reshape(width, heads * size)
        if width == 1:
            queries = queries.view(count, kv_heads, groups, size)
        else:
            queries = queries.reshape(count, width, kv_heads, groups, size).permute(0, 2, 3, 1, 4)
            queries = queries.reshape(count, kv_heads, groups * width, size)
        attended = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
        if width > 1:
            attended = attended.view(count, kv_heads, groups, width, size).permute(0, 3, 1, 2, 4)
        return attended.reshape(count * width, heads * size)

    def _move(self, slot: int, sources: Sequence[int], places: Sequence[int]) -> None:
        for cache in self._cache:
            cache[slot][:, places] = cache[slot][:, sources]

    def _copy_slot(self, source: int, slot: int, length: int) -> None:
        for cache in self._cache:
            cache[slot, :, :length] = cache[source, :, :length]
