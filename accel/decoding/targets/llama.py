"""The fast path: Llama-like decoders as a handful of fused operations over one pre-allocated cache.

transformers spends half of a small model's step between its operations. Here the weights of a layer are fused (query,
key and value; gate and up), its cache is one tensor, a tree's mask is made once for all layers, and weights lie in the
order in which the CPU's matrix product reads them, in bfloat16 where that holds their values.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hasten.accel.decoding.targets.base import Pass, Target
from hasten.accel.decoding.targets.matmul import Norm, Weight
from hasten.accel.errors import UserError
from hasten.kernels.skinny_gemm.op import shortened

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
_SHORTEST = 256  # places that a compiled pass reads at least
_ROPES = ("default", "linear", "llama3", "yarn")


@dataclass
class _Layer:
    """Weights of a decoder layer. query_norm and key_norm are Qwen 3's."""

    norm: Norm
    qkv: Weight
    out: Weight
    mlp_norm: Norm
    gate_up: Weight
    down: Weight
    query_norm: Tensor | None
    key_norm: Tensor | None


class _Where(NamedTuple):
    """Where a pass reads and writes.

    slots: that run; first: of them if they are neighbours. rows (B, 1) and places (B, N): of the new nodes.

    start: the first place if there is one slot, which is then written by a copy. total: places that are read.
    """

    first: int | None
    slots: list[int]
    rows: Tensor | None
    places: Tensor | None
    start: int | None
    total: int


def refusal(config: Any) -> str | None:
    """Why a model of this config cannot take the fast path; None where it can."""
    if config.model_type not in FAMILIES:
        return f"model_type {config.model_type} is none of {', '.join(FAMILIES)}"
    if getattr(config, "quantization_config", None):
        return "its weights are quantized"
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        return "it has sliding windows"
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kind = rope.get("rope_type", "default")
    if kind not in _ROPES:
        return f"its rotary embedding {kind} changes with the length"
    if getattr(config, "hidden_act", "silu") != "silu" or getattr(config, "mlp_bias", False):
        return "its feed-forward layers are not Llama's"
    return None


class LlamaTarget(Target):
    """A Llama-like model of transformers whose weights are taken over; the model itself can go."""

    def __init__(self, model: Any, compiled: bool = False) -> None:
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
            short = shortened(self._embedding)
            self._embedding = self._embedding if short is None else short
        self._norm = Norm(model.model.norm.weight.detach(), self._eps)
        # What torch compiles must not call operations that its compiler takes apart.
        self._packs = not compiled
        self._layers = [self._fused_layer(layer) for layer in model.model.layers]
        self._head = Weight(model.get_output_embeddings().weight.detach(), packs=self._packs)
        self._rotary = model.model.rotary_emb
        self._cis = torch.empty(0)
        self._cache: list[Tensor] = []
        # As complex products, which torch's compiler does not take apart, and which only float32 has.
        self._in_place = self.dtype == torch.float32 and not compiled
        self._compiled: Any = None
        if compiled:
            # CUDA graphs where there are such: a small model's pass is mostly the time to launch its kernels.
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

    def _fused_layer(self, layer: Any) -> _Layer:
        attention, mlp = layer.self_attn, layer.mlp
        projections = [attention.q_proj, attention.k_proj, attention.v_proj]
        weights = [each.weight.detach() for each in projections]
        biases = [None if each.bias is None else each.bias.detach() for each in projections]
        # Rotary pairs (i, i + D/2) become neighbours, so that a rotation is one complex product. Scores stay the same.
        weights = [self._paired(weights[0], 0), self._paired(weights[1], 0), weights[2]]
        bias = None
        if all(each is not None for each in biases):
            query, key, value = (torch.as_tensor(each) for each in biases)
            bias = torch.cat([self._paired(query, 0), self._paired(key, 0), value])
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
            query_norm=None if norms[0] is None else self._paired(norms[0].weight.detach(), 0),
            key_norm=None if norms[1] is None else self._paired(norms[1].weight.detach(), 0),
        )

    def _paired(self, weight: Any, dim: int) -> Tensor:
        heads = weight.unflatten(dim, (-1, 2, self._size // 2))
        return heads.transpose(1, 2).flatten(0, 2).contiguous()

    def _allocate(self, slots: int, capacity: int) -> None:
        # Keys and values of a layer lie side by side, (slots, 2 * KV heads, capacity, D): one write puts both in.
        shape = slots, 2 * self._kv_heads, capacity, self._size
        self._cache = [torch.zeros(shape, dtype=self.dtype, device=self.device) for _ in self._layers]
        positions = torch.arange(capacity, device=self.device)[None]
        # float32, because a position times a frequency in bfloat16 is off by whole turns.
        cos, sin = self._rotary(torch.empty(0, dtype=torch.float32, device=self.device), positions)
        half = self._size // 2
        self._cis = torch.stack([cos[0, :, :half], sin[0, :, :half]], -1).float()

    def _run(
        self, slots: Sequence[int], starts: Sequence[int], ids: Tensor, positions: Tensor, allowed: Tensor, logits: bool
    ) -> Pass:
        count, width = ids.shape
        first = slots[0]
        # Neighbouring slots are a view of the cache, others have to be gathered.
        neighbours = list(slots) == list(range(first, first + count))
        compiled = self._compiled is not None and logits and neighbours
        if compiled:
            # As many places as the cache has, or a power of two of them: a shape is compiled once.
            total = min(self.capacity, max(_SHORTEST, 1 << (allowed.shape[-1] - 1).bit_length()))
            allowed = F.pad(allowed, (0, total - allowed.shape[-1]))
        start = starts[0] if count == 1 and not compiled else None
        rows = places = None
        if start is None:
            rows = torch.tensor(slots)[:, None].to(self.device)
            places = (torch.tensor(starts)[:, None] + torch.arange(width)).to(self.device)
        where = _Where(first if neighbours else None, list(slots), rows, places, start, allowed.shape[-1])
        # One token behind what is committed attends to all that lies there; one behind nodes that wait does not.
        alone = count == width == 1 and len(self.depths(slots[0])) == 1
        mask = None if alone and not compiled else self._mask(allowed)
        # Without the books that autograd keeps of views, which are a good part of a small model's pass.
        with torch.no_grad() if compiled else torch.inference_mode():
            forward = self._compiled if compiled and self._compiled is not None else self._layers_of_pass
            hidden = forward(ids, positions, mask, where)
            if not logits:
                return Pass(hidden[:0, None], hidden[:0, None])
            return Pass(*(each.unflatten(0, (count, width)) for each in (self._head(hidden), hidden)))

    def _mask(self, allowed: Tensor) -> Tensor:
        """Additive mask (B, 1, G * N, L): query heads of one key head stand as rows of their own below each other."""
        groups = self._heads // self._kv_heads
        mask = torch.zeros(allowed.shape, dtype=self.dtype, device=self.device).masked_fill_(~allowed, -torch.inf)
        return mask[:, None].repeat(1, 1, groups, 1)

    def _layers_of_pass(self, ids: Tensor, positions: Tensor, mask: Tensor | None, where: "_Where") -> Tensor:
        """Last hidden states (rows, D) of the new nodes, normed."""
        count, width = ids.shape
        rows = count * width
        x = self._embedding[ids.view(-1)].to(self.dtype)
        cis = self._cis[positions.view(-1)][:, None]
        if self._in_place:
            cis = torch.view_as_complex(cis)
        for layer, cache in zip(self._layers, self._cache, strict=True):
            qkv = layer.qkv(layer.norm(x)).view(rows, -1, self._size)
            qkv = self._turned(layer, qkv, cis)
            mixed = self._attention(qkv, cache, count, width, mask, where)
            x = x + layer.out(mixed)
            gate, up = layer.gate_up(layer.mlp_norm(x)).chunk(2, -1)
            x = x + layer.down(F.silu(gate) * up)
        return self._norm(x)

    def _turned(self, layer: _Layer, qkv: Tensor, cis: Tensor) -> Tensor:
        """Queries, keys and values (rows, heads, D), the first two rotated to their positions, in place if may be."""
        heads, both = self._heads, self._heads + self._kv_heads
        if layer.query_norm is not None and layer.key_norm is not None:
            qkv[:, :heads] = F.rms_norm(qkv[:, :heads], (self._size,), layer.query_norm, self._eps)
            qkv[:, heads:both] = F.rms_norm(qkv[:, heads:both], (self._size,), layer.key_norm, self._eps)
        if self._in_place:
            torch.view_as_complex(qkv.view(len(qkv), -1, self._size // 2, 2)).narrow(1, 0, both).mul_(cis)
            return qkv
        cos, sin = cis.unbind(-1)
        one, other = qkv[:, :both].float().unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack([one * cos - other * sin, other * cos + one * sin], -1).flatten(-2).to(qkv.dtype)
        return torch.cat([turned, qkv[:, both:]], 1)

    def _attention(
        self, qkv: Tensor, cache: Tensor, count: int, width: int, mask: Tensor | None, where: "_Where"
    ) -> Tensor:
        """Attention (rows, heads * D) of new nodes, whose keys and values go into the cache first."""
        heads, kv_heads, size = self._heads, self._kv_heads, self._size
        groups = heads // kv_heads
        new = qkv.narrow(1, heads, 2 * kv_heads)
        if where.start is not None and where.first is not None:
            cache.select(0, where.first).narrow(1, where.start, width).copy_(new.transpose(0, 1))
        else:
            cache[where.rows, :, where.places] = new.view(count, width, 2 * kv_heads, size)
        held = cache[where.slots] if where.first is None else cache.narrow(0, where.first, count)
        held = held.narrow(2, 0, where.total)
        keys, values = held.narrow(1, 0, kv_heads), held.narrow(1, kv_heads, kv_heads)
        queries = qkv.narrow(1, 0, heads)
        if width == 1:
            queries = queries.view(count, kv_heads, groups, size)
        else:
            queries = queries.reshape(count, width, kv_heads, groups, size).permute(0, 2, 3, 1, 4)
            queries = queries.reshape(count, kv_heads, groups * width, size)
        mixed = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
        if width > 1:
            mixed = mixed.view(count, kv_heads, groups, width, size).permute(0, 3, 1, 2, 4)
        return mixed.reshape(count * width, heads * size)

    def _move(self, slot: int, sources: Sequence[int], places: Sequence[int]) -> None:
        for cache in self._cache:
            cache[slot][:, places] = cache[slot][:, sources]

    def _copy_slot(self, source: int, slot: int, length: int) -> None:
        for cache in self._cache:
            cache[slot, :, :length] = cache[source, :, :length]
