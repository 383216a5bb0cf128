"""The fast path: decoders as a few fused operations over one pre-allocated cache.

transformers spends half of a small model's step between its operations. Here the weights of a layer are fused (query,
key and value; gate and up), its cache is one tensor, a tree's mask is computed once for all layers of a window, and
weights are stored in the order in which the CPU's matrix product reads them, in bfloat16 where that is exact.
"""

from collections.abc import Mapping, Sequence
from copy import copy
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from hasten.accel.decoding.targets.attention import Attention, CacheAccess, MaskedAttention, Reach, TokenAttention
from hasten.accel.decoding.targets.base import FINAL, Pass, Target
from hasten.accel.decoding.targets.families import FAMILIES, build_decoder, name_of, refusal
from hasten.accel.decoding.targets.families.decoder import Decoder
from hasten.accel.decoding.targets.families.weights import ModelWeights
from hasten.accel.decoding.targets.fused import attends_by_kernels
from hasten.accel.decoding.targets.graphs import (
    Capture,
    CudaGraphs,
    KernelInputs,
    MaskedInputs,
    Outputs,
    RecordedPasses,
    cache_length,
    tree_size,
)
from hasten.accel.decoding.targets.tree_attention import KernelAttention, TreeInputs, TreeShape, pack_tree
from hasten.accel.errors import UserError
from hasten.kernels.token_attention import is_faster


class FastTarget(Target):
    """A decoder of one of the families of `targets.families`.

    compiled: whether passes of trees are compiled: on a GPU as CUDA graphs, on a CPU by torch.compile. Those of a
    decoder that is data-dependent are not. capture: records passes otherwise; None for that choice.
    """

    def __init__(self, decoder: Decoder, compiled: bool = False, capture: Capture | None = None) -> None:
        super().__init__(decoder.vocabulary, decoder.max_length, decoder.device)
        self._decoder, self.dtype = decoder, decoder.dtype
        self._windows = {layer.window for layer in decoder.layers}
        self._turns: list[Tensor] = []
        self._cache: list[Any] = []  # of each layer, as its attention takes it
        compiled = compiled and not decoder.data_dependent
        if compiled and capture is None and self.device.type == "cuda":
            # A small model's pass is mostly the time of kernel launches.
            capture = CudaGraphs()
        traced = compiled and capture is None
        # torch.compile is for a CPU.
        example = torch.empty(0, dtype=self.dtype, device=self.device)
        self._by_kernels = not traced and attends_by_kernels(example, decoder.head_size)
        self._reads_masks = not self._by_kernels
        function = self._kernel_pass if self._by_kernels else self._static_pass
        self._recorded = RecordedPasses(function, capture) if compiled and capture is not None else None
        self._traced: Any = torch.compile(self._static_pass, dynamic=False) if traced else None
        self._rotates_in_place = self.dtype == torch.float32 and not traced

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
        traced = compiled and not FAMILIES[model.config.model_type].data_dependent
        return cls(build_decoder(model.config, ModelWeights(model, packs and not traced)), compiled)

    @property
    def decoder(self) -> Decoder:
        """The model, whose weights targets with other caches can share."""
        return self._decoder

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
        part._decoder, part._cache, part._recorded, part._traced = self._decoder.first_layers(count), [], None, None
        part._slots, part.capacity, part.feature_layers, part.virtual = [], 0, (), None
        return part

    def fill(self, slot: int, count: int, generator: torch.Generator) -> None:
        """Commit `count` tokens with random keys and values to an empty slot, for measurements of speed."""
        decoder = self._decoder
        for number in range(len(decoder.layers)):
            shape = decoder.heads + 2 * decoder.kv_heads, count, decoder.head_size
            self._fill_layer(slot, number, torch.randn(shape, generator=generator).to(self.device, self.dtype))
        self._slots[slot].committed = [0] * count

    def _fill_layer(self, slot: int, layer: int, qkv: Tensor) -> None:
        self._cache[layer][slot, :, : qkv.shape[1]] = qkv[self._decoder.heads :]

    def _allocate(self, slots: int, capacity: int) -> None:
        decoder = self._decoder
        # Keys and values of a layer are in one tensor (slots, 2 * H, capacity, D), so that one write stores both.
        shape = slots, 2 * decoder.kv_heads, capacity, decoder.head_size
        self._cache = [torch.zeros(shape, dtype=self.dtype, device=self.device) for _ in decoder.layers]
        self._tabulate(capacity)
        if self._recorded is not None:
            self._recorded.clear()

    def _tabulate(self, capacity: int) -> None:
        """Cosines and sines of all positions."""
        decoder = self._decoder
        self._turns = [rotation.table(capacity, decoder.head_size, self.device) for rotation in decoder.rotations]

    def _run(
        self, slots: Sequence[int], starts: Sequence[int], ids: Tensor, positions: Tensor, allowed: Tensor, logits: bool
    ) -> Pass:
        if self._by_kernels:
            return self._run_kernels(slots, starts, ids, positions, logits)
        count, width = ids.shape
        first = slots[0]
        # Adjacent slots are a view of the cache, others have to be gathered.
        adjacent = list(slots) == list(range(first, first + count))
        size = self._static_size(width, max(starts)) if logits and adjacent and not self._inserted else None
        if size is not None:
            inputs = self._static_inputs(slots, starts, size, ids, positions, allowed)
            with torch.no_grad():
                run = self._traced if self._recorded is None else self._recorded
                outputs = run(inputs, first, self.feature_layers)
            return pass_of(outputs, count, width)
        start = starts[0] if count == 1 else None
        rows = places = None
        if start is None:
            rows, places = self._to_device(torch.tensor(slots)[:, None]), self._places(starts, width)
        # Only a prompt is run without logits. It is a chain.
        causal = not logits and start == 0 and self._decoder.score_cap is None
        # Single tokens directly after the committed ones attend to all of them, and need no mask.
        single = width == 1 and all(len(self.depths(slot)) == 1 for slot in slots)
        alone = single and count == 1
        # inference_mode skips autograd's bookkeeping for views, which is a good part of a small model's pass.
        with torch.inference_mode():
            total = allowed.shape[-1]
            if single and logits and is_faster(self._cache[0]):
                token = TokenAttention(self._decoder, self._turns, slots, starts)
                return pass_of(self._outputs(ids, token, self.feature_layers), count, width)
            key_positions = None
            if not alone and any(window is not None and window < total for window in self._windows):
                key_positions = self._key_positions(slots, total)
            lowest = min(len(self.committed(slot)) for slot in slots)
            reaches = self._reaches(positions, None if alone else allowed, key_positions, total, lowest, causal)
            access = CacheAccess(first if adjacent else None, list(slots), rows, places, start, total, causal, reaches)
            return pass_of(
                self._outputs(ids, self._masked(positions, access), self.feature_layers, logits), count, width
            )

    def _run_kernels(
        self, slots: Sequence[int], starts: Sequence[int], ids: Tensor, positions: Tensor, logits: bool
    ) -> Pass:
        """See Target._run."""
        count, width = ids.shape
        committed = [len(self.committed(slot)) for slot in slots]
        parents = [self._slots[slot].parents for slot in slots]
        counts = [len(self._slots[slot]) - start for slot, start in zip(slots, starts, strict=True)]
        shape = TreeShape(count, width, max(map(len, parents)))
        recorded = self._recorded if logits and not self._inserted else None
        size, nodes = tree_size(width), tree_size(shape.nodes)
        if recorded is not None and size is not None and nodes is not None:
            shape = TreeShape(count, size, nodes)
            ids, positions = (pad(rows, (0, size - width)) for rows in (ids, positions))
            packed = self._to_device(pack_tree(slots, committed, parents, counts, shape))
            with torch.no_grad():
                return pass_of(recorded(KernelInputs(ids, positions, packed), shape, self.feature_layers), count, width)
        packed = self._to_device(pack_tree(slots, committed, parents, counts, shape))
        # Only a prompt is run without logits. It is a chain.
        prompt = slots[0] if not logits and count == 1 and starts[0] == 0 else None
        with torch.inference_mode():
            inputs = TreeInputs.of(packed, shape)
            attention = KernelAttention(self._decoder, self._turns, positions.view(-1), inputs, prompt)
            return pass_of(self._outputs(ids, attention, self.feature_layers, logits), count, width)

    def _kernel_pass(self, inputs: KernelInputs, shape: TreeShape, feature_layers: tuple[int, ...]) -> Outputs:
        """See `_outputs`."""
        tree = TreeInputs.of(inputs.packed, shape)
        attention = KernelAttention(self._decoder, self._turns, inputs.positions.view(-1), tree)
        return self._outputs(inputs.ids, attention, feature_layers)

    def _static_size(self, width: int, start: int) -> int | None:
        """Nodes of a sequence in a compiled pass over `width` of them; None if it is not compiled."""
        if self._recorded is None:
            return width if self._traced is not None else None
        size = tree_size(width)
        return size if size is not None and start + size <= self.capacity else None

    def _static_inputs(
        self, slots: Sequence[int], starts: Sequence[int], size: int, ids: Tensor, positions: Tensor, allowed: Tensor
    ) -> MaskedInputs:
        """Inputs of a compiled pass: `size` nodes of every sequence, and a rounded length of the cache."""
        # Copies of the first node are written behind the others, where nothing else is, and nobody attends to them.
        more = size - ids.shape[1]
        ids, positions, allowed = (
            torch.cat([nodes, nodes[:, :1].expand(-1, more, *nodes.shape[2:])], 1)
            for nodes in (ids, positions, allowed)
        )
        total = cache_length(max(starts) + size, self.capacity)
        return MaskedInputs(
            ids,
            positions,
            pad(allowed, (0, total - allowed.shape[-1])),
            self._to_device(torch.tensor(slots)[:, None]),
            self._places(starts, size),
            self._key_positions(slots, total),
        )

    def _static_pass(self, inputs: MaskedInputs, first: int, feature_layers: tuple[int, ...]) -> Outputs:
        """See `_outputs`."""
        total = inputs.allowed.shape[-1]
        reaches = self._reaches(inputs.positions, inputs.allowed, inputs.key_positions, total, 0, causal=False)
        access = CacheAccess(first, [], inputs.rows, inputs.places, None, total, False, reaches)
        return self._outputs(inputs.ids, self._masked(inputs.positions, access), feature_layers)

    def _masked(self, positions: Tensor, access: CacheAccess) -> MaskedAttention:
        return MaskedAttention(self._decoder, self._turns, positions, access, self._rotates_in_place)

    def _places(self, starts: Sequence[int], width: int) -> Tensor:
        return self._to_device(torch.tensor(starts)[:, None] + torch.arange(width))

    def _reaches(
        self,
        positions: Tensor,
        allowed: Tensor | None,
        key_positions: Tensor | None,
        total: int,
        lowest: int,
        causal: bool,
    ) -> Mapping[int | None, Reach]:
        """What the new nodes attend to, by the windows of layers.

        allowed: None for a single node that attends to all `total` positions, of which its own is the last. lowest: a
        position that none of the new nodes is before. causal: see CacheAccess.
        """
        reaches: dict[int | None, Reach] = {}
        for window in self._windows:
            if window is None or window >= total:
                if None not in reaches:
                    reaches[None] = Reach(0, None if causal or allowed is None else self._mask(allowed))
                reaches[window] = reaches[None]
                continue
            # Positions before the windows of all new nodes are not read.
            first, mask = max(0, lowest - window + 1), None
            if allowed is not None and key_positions is not None:
                near = positions[:, :, None] - key_positions < window
                mask = self._mask((allowed & near)[..., first:])
            reaches[window] = Reach(first, mask)
        return reaches

    def _mask(self, allowed: Tensor) -> Tensor:
        """Additive mask (B, 1, G * N, L): the G query heads of a KV head are folded into the rows."""
        groups = self._decoder.heads // self._decoder.kv_heads
        mask = torch.zeros(allowed.shape, dtype=self.dtype, device=self.device).masked_fill_(~allowed, -torch.inf)
        return mask[:, None].repeat(1, 1, groups, 1)

    def _outputs(
        self, ids: Tensor, attention: Attention, feature_layers: Sequence[int], logits: bool = True
    ) -> Outputs:
        """Logits, hidden states after the final norm and, if there are any, features of the nodes: (B * N, …) each.

        logits: whether there are logits and hidden states; if not, they have no rows.
        """
        decoder = self._decoder
        x = decoder.embed(ids.view(-1))
        kept: dict[int, Tensor] = {}
        for number, (layer, cache) in enumerate(zip(decoder.layers, self._cache, strict=True)):
            if number in self._inserted:
                x = self._inserted[number].into(x)
            if number in feature_layers:
                kept[number] = x
            added = layer.out(attention(layer, cache, layer.qkv(layer.attention_norm(x))))
            x = x + (added if layer.attention_out_norm is None else layer.attention_out_norm(added))
            added = layer.mlp(layer.mlp_norm(x))
            x = x + (added if layer.mlp_out_norm is None else layer.mlp_out_norm(added))
        kept[FINAL] = decoder.norm(x)
        hidden = kept[FINAL] if logits else kept[FINAL][:0]
        outputs = decoder.logits(hidden) if logits else hidden, hidden
        return (*outputs, torch.cat([kept[layer] for layer in feature_layers], -1)) if feature_layers else outputs

    def _move(self, slot: int, sources: Sequence[int], places: Sequence[int]) -> None:
        for cache in self._cache:
            cache[slot][:, places] = cache[slot][:, sources]

    def _copy_slot(self, source: int, slot: int, length: int) -> None:
        for cache in self._cache:
            cache[slot, :, :length] = cache[source, :, :length]


def pass_of(outputs: Outputs, count: int, width: int) -> Pass:
    """The pass over `count` sequences of `width` nodes whose outputs these are, or those of padding, too."""
    return Pass(*(rows.unflatten(0, (count, len(rows) // count))[:, :width] for rows in outputs))
