"""Any causal LM of transformers as a target, through public interfaces: 4-D attention mask, position ids, cache."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from hasten.accel.decoding.targets.base import Pass, Target
from hasten.accel.decoding.targets.virtual import entering
from hasten.accel.errors import UserError


@dataclass
class _Place:
    """Where the current pass writes the caches. rows: its slots. starts: first position in each. total: L."""

    slots: int
    capacity: int
    rows: list[int] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    total: int = 0

    def write(self, cache: Tensor, new: Tensor) -> Tensor:
        """Write new keys or values (B, H, N, D); returns those of the pass's slots, (B, H, L, D)."""
        width = new.shape[2]
        for row, start in enumerate(self.starts):
            cache[self.rows[row], :, start : start + width] = new[row]
        first, count = self.rows[0], len(self.rows)
        if self.rows == list(range(first, first + count)):
            return cache[first : first + count, :, : self.total]
        return cache[self.rows, :, : self.total]


class _SlotLayer(CacheLayerMixin):
    """Keys and values of one layer, (slots, H, capacity, D) each, allocated at the first update."""

    is_sliding = False

    def __init__(self, place: _Place) -> None:
        super().__init__()
        self._place = place

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate zeros, because masked positions must still be finite numbers."""
        slots, capacity = self._place.slots, self._place.capacity
        for name, new in (("keys", key_states), ("values", value_states)):
            setattr(self, name, new.new_zeros(slots, new.shape[1], capacity, new.shape[3]))
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Write new keys and values; returns all keys and values of the pass's slots."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        return self._place.write(self.keys, key_states), self._place.write(self.values, value_states)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset. Not used for the mask, which is given."""
        return self._place.total, 0

    def get_seq_length(self) -> int:
        """Largest start position of the current pass."""
        return max(self._place.starts, default=0)

    def get_max_length(self) -> int:
        """The capacity in tokens."""
        return self._place.capacity


def _held_bytes(layers: Sequence[_SlotLayer]) -> int:
    """Bytes of keys and values, whose heads may differ in size."""
    held = [tensor for layer in layers if layer.is_initialized for tensor in (layer.keys, layer.values)]
    return sum(tensor.numel() * tensor.element_size() for tensor in held if tensor is not None)


class TransformersTarget(Target):
    """An unmodified transformers model of any family with a KV cache; it may be compressed, or sharded over devices."""

    def __init__(self, model: PreTrainedModel, keeps_hidden: bool = False) -> None:
        config = model.config.get_text_config()
        limit = getattr(config, "max_position_embeddings", None) or 2**31
        super().__init__(config.vocab_size, limit, model.device)
        self._model = model.eval()
        if model.config._attn_implementation not in ("sdpa", "eager"):
            model.set_attn_implementation("sdpa")  # others do not take a 4-D mask
        self._config = config
        self._keeps_hidden = keeps_hidden
        types = getattr(config, "layer_types", None) or []
        unsupported = set(types) - {"full_attention", "sliding_attention"}
        if unsupported or getattr(config, "is_encoder_decoder", False):
            raise UserError(
                f"{type(model).__name__} has layers without a KV cache ({', '.join(sorted(unsupported))}), whose state "
                "cannot drop rejected drafts: choose a model with attention layers only"
            )
        window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
        self._window = int(window) if window else None
        self._mixed = len(set(types)) > 1
        self._token_bytes: int | None = None

    def embedding(self) -> Tensor:
        """The weight of the model's own embedding."""
        weight: Tensor = self._model.get_input_embeddings().weight.detach()
        return weight

    @property
    def cache_bytes(self) -> int:
        """Bytes of keys and values of all layers."""
        return _held_bytes(self._layers)

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's keys and values, counted in a pass over it: configs name their sizes variously."""
        if self._token_bytes is None:
            layers = [_SlotLayer(_Place(1, 1, [0], [0], 1)) for _ in range(self._config.num_hidden_layers)]
            with torch.no_grad():
                ids = torch.zeros(1, 1, dtype=torch.long, device=self.device)
                mask = torch.ones(1, 1, 1, dtype=torch.bool, device=self.device)
                self._model(
                    input_ids=ids,
                    position_ids=ids,
                    attention_mask=self._by_layer_type(self._mask(mask), self._mask(mask)),
                    past_key_values=Cache(layers=list(layers)),
                    use_cache=True,
                )
            self._token_bytes = _held_bytes(layers)
        return self._token_bytes

    def _allocate(self, slots: int, capacity: int) -> None:
        self._place_of_pass = _Place(slots, capacity)
        self._layers = [_SlotLayer(self._place_of_pass) for _ in range(self._config.num_hidden_layers)]
        self._cache = Cache(layers=list(self._layers))

    def _run(
        self, slots: Sequence[int], starts: Sequence[int], ids: Tensor, positions: Tensor, allowed: Tensor, logits: bool
    ) -> Pass:
        self._enter(slots, starts, allowed)
        inserted = {layer: insertion.into for layer, insertion in self._inserted.items() if layer}
        hooks = entering(self._model.get_decoder().layers, inserted) if inserted else nullcontext()
        with torch.no_grad(), hooks:
            out = self._model(
                **self._inputs(ids),
                position_ids=positions,
                attention_mask=self._masks(slots, positions, allowed),
                past_key_values=self._cache,
                use_cache=True,
                output_hidden_states=self._keeps_hidden or bool(self.feature_layers),
                logits_to_keep=0 if logits else 1,
            )
        hidden = out.hidden_states[-1] if self._keeps_hidden else out.logits[..., :0]
        features = None
        if self.feature_layers:
            # transformers' own list has the embedding at 0, and the state after the final norm at the end.
            features = torch.cat([out.hidden_states[layer] for layer in self.feature_layers], -1)
        return Pass(out.logits, hidden, features)

    def _enter(self, slots: Sequence[int], starts: Sequence[int], allowed: Tensor) -> None:
        """Tell the caches where the pass writes."""
        place = self._place_of_pass
        place.rows, place.starts, place.total = list(slots), list(starts), allowed.shape[-1]

    def _inputs(self, ids: Tensor) -> dict[str, Tensor]:
        """The model's inputs for ids (B, N): their embeddings if virtual ones are among them."""
        if 0 not in self._inserted:
            return {"input_ids": ids}
        return {"inputs_embeds": self._inserted[0].into(self._model.get_input_embeddings()(ids))}

    def _masks(self, slots: Sequence[int], positions: Tensor, allowed: Tensor) -> Tensor | dict[str, Tensor]:
        """The model's attention_mask: one mask, or a mask for each layer type."""
        full = self._mask(allowed)
        if self._window is None:
            return full
        near = positions[:, :, None] - self._key_positions(slots, allowed.shape[-1]) < self._window
        return self._by_layer_type(full, self._mask(allowed & near))

    def _by_layer_type(self, full: Tensor, sliding: Tensor) -> Tensor | dict[str, Tensor]:
        """The model's attention_mask, made of the masks of full and of sliding attention."""
        if self._window is None:
            return full
        types = getattr(self._config, "layer_types", None)
        if types is None:
            return sliding
        return (
            {"full_attention": full, "sliding_attention": sliding}
            if self._mixed
            else (sliding if types[0] == "sliding_attention" else full)
        )

    def _mask(self, allowed: Tensor) -> Tensor:
        """Mask (B, 1, N, L) in the form that the model's attention function takes: bool or additive."""
        if self._model.config._attn_implementation == "sdpa":
            return allowed[:, None]
        dtype = self._model.dtype
        return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill_(
            ~allowed, torch.finfo(dtype).min
        )[:, None]

    def _move(self, slot: int, sources: Sequence[int], places: Sequence[int]) -> None:
        for layer in self._layers:
            for held in (layer.keys, layer.values):
                if held is not None:
                    held[slot][:, places] = held[slot][:, sources]

    def _copy_slot(self, source: int, slot: int, length: int) -> None:
        for layer in self._layers:
            for held in (layer.keys, layer.values):
                if held is not None:
                    held[slot, :, :length] = held[source, :, :length]
