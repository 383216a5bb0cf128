"""Llama, and the families that differ from it in their weights or config only: Mistral, Qwen 2, Qwen 3."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from hasten.accel.decoding.targets.families.decoder import Decoder, Layer, Rotation, RowMap, WeightedNorm
from hasten.accel.decoding.targets.families.feed_forward import ACTIVATIONS, Gated
from hasten.accel.decoding.targets.families.weights import Rows, WeightSource
from hasten.accel.decoding.targets.matmul import Norm

# Rotary embeddings whose frequencies do not depend on the length of the sequence.
_ROPES = ("default", "linear", "llama3", "yarn")
FULL, SLIDING = "full_attention", "sliding_attention"


class Llama:
    """Reads a Llama-like model; other families override what they do otherwise. config: of transformers."""

    # Whether the config's layer_types say which layers have windows; if not, its sliding_window is of all layers.
    typed = False
    # Types of layers with a rotary embedding of their own; None: one embedding for all layers.
    rotation_types: Sequence[str | None] = (None,)
    # Whether the config's partial_rotary_factor counts.
    partial_rotary = False
    # See Decoder.
    data_dependent = False

    def __init__(self, config: Any, weights: WeightSource) -> None:
        self.config, self.weights = config, weights
        self.heads, self.kv_heads = int(config.num_attention_heads), int(config.num_key_value_heads)
        self.size = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
        self.rotations = [self._rotation(kind) for kind in self.rotation_types]
        # Rotary pairs (i, i + R / 2) become adjacent, so that a rotation is one complex product. Attention scores do
        # not change, because queries and keys are permuted alike.
        half = len(self.rotations[0].frequencies)
        pairs = torch.arange(2 * half).view(2, half).t().flatten()
        self.head_order = torch.cat([pairs, torch.arange(2 * half, self.size)])

    @classmethod
    def refusal(cls, config: Any) -> str | None:
        """Why the fast path cannot run a model of this config; None if it can."""
        ropes = {rope_of(config, kind).get("rope_type", "default") for kind in cls.rotation_types}
        if not ropes <= set(_ROPES):
            return f"its rotary embedding ({', '.join(sorted(ropes - set(_ROPES)))}) depends on the length"
        if activation_of(config) not in ACTIVATIONS:
            return f"its activation function {activation_of(config)} is none of {', '.join(ACTIVATIONS)}"
        kinds = set(getattr(config, "layer_types", None) or ()) - {FULL, SLIDING} if cls.typed else ()
        return f"it has layers of the type {', '.join(sorted(kinds))}" if kinds else None

    def decoder(self) -> Decoder:
        """The model."""
        config = self.config
        embed, embedding = self.weights.embedding()
        return Decoder(
            layers=[self.layer(index, f"layers.{index}") for index in range(config.num_hidden_layers)],
            embed=self.embed(embed),
            embedding=embedding,
            norm=self.norm("norm"),
            head=self.weights.product([Rows("lm_head")]),
            rotations=self.rotations,
            vocabulary=config.vocab_size,
            max_length=config.max_position_embeddings,
            dtype=self.weights.dtype,
            device=self.weights.device,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_size=self.size,
            scale=self.scale(),
            score_cap=self.score_cap(),
            logit_cap=getattr(config, "final_logit_softcapping", None),
            data_dependent=self.data_dependent,
        )

    def layer(self, index: int, name: str) -> Layer:
        """A layer; name: its prefix."""
        attention = f"{name}.self_attn"
        return Layer(
            attention_norm=self.norm(f"{name}.input_layernorm"),
            qkv=self.weights.product(self.qkv(attention)),
            out=self.weights.product([Rows(f"{attention}.o_proj")]),
            mlp_norm=self.norm(f"{name}.post_attention_layernorm"),
            mlp=self.mlp(index, f"{name}.mlp"),
            query_norm=self.head_norm(f"{attention}.q_norm"),
            key_norm=self.head_norm(f"{attention}.k_norm"),
            window=self.window(index),
            rotation=self.rotation_types.index(self.kind(index)) if len(self.rotations) > 1 else 0,
        )

    def qkv(self, name: str) -> Sequence[Rows]:
        """Queries, keys and values."""
        return [
            Rows(f"{name}.q_proj", self.order_of_heads(self.heads)),
            Rows(f"{name}.k_proj", self.order_of_heads(self.kv_heads)),
            Rows(f"{name}.v_proj"),
        ]

    def order_of_heads(self, heads: int) -> Tensor:
        """Order of the outputs of that number of query or key heads, see `Layer.qkv`."""
        return (torch.arange(heads)[:, None] * self.size + self.head_order).flatten()

    def mlp(self, index: int, name: str) -> RowMap:
        """The feed-forward network of a layer."""
        return self.gated([Rows(f"{name}.gate_proj"), Rows(f"{name}.up_proj")], f"{name}.down_proj")

    def gated(self, gate_up: Sequence[Rows], down: str) -> Gated:
        """A gated network of these linear layers."""
        product = self.weights.product
        return Gated(product(gate_up), product([Rows(down)]), activation_of(self.config))

    def norm(self, name: str, order: Tensor | None = None) -> WeightedNorm:
        """A norm. order: in which its weight is taken; None: as stored."""
        weight = self.weights.tensor(f"{name}.weight")
        return Norm(weight if order is None else weight[order.to(weight.device)], self.config.rms_norm_eps)

    def head_norm(self, name: str) -> WeightedNorm | None:
        """The norm of query or key heads, if the model has one."""
        return self.norm(name, self.head_order) if self.weights.has(f"{name}.weight") else None

    def embed(self, lookup: RowMap) -> RowMap:
        """Input of the first layer by ids, from rows of the embedding by ids."""
        return lookup

    def scale(self) -> float:
        """Factor of attention scores."""
        return float(self.size**-0.5)

    def score_cap(self) -> float | None:
        """Soft cap of attention scores."""
        return None

    def kind(self, index: int) -> str:
        """Type of a layer."""
        return str(self.config.layer_types[index])

    def window(self, index: int) -> int | None:
        """Number of positions that a layer's attention reaches back."""
        window = getattr(self.config, "sliding_window", None)
        return int(window) if window and not (self.typed and self.kind(index) == FULL) else None

    def _rotation(self, kind: str | None) -> Rotation:
        parameters = rope_of(self.config, kind)
        name = parameters.get("rope_type", "default")
        if name != "default":
            frequencies, scale = ROPE_INIT_FUNCTIONS[name](self.config, None, layer_type=kind)
            return Rotation(frequencies.float(), float(scale))
        size = int(self.size * parameters.get("partial_rotary_factor", 1.0)) if self.partial_rotary else self.size
        exponents = torch.arange(0, size, 2, dtype=torch.float32) / size
        return Rotation(1.0 / parameters["rope_theta"] ** exponents, 1.0)


class Qwen(Llama):
    """Qwen 2 and Qwen 3."""

    typed = True


def rope_of(config: Any, kind: str | None) -> Mapping[str, Any]:
    """The config's parameters of the rotary embedding of a type of layers, or of all layers."""
    parameters: Mapping[str, Any] = config.rope_parameters or {}
    return parameters if kind is None else parameters.get(kind) or {}


def activation_of(config: Any) -> str:
    """Name of the activation function."""
    return str(getattr(config, "hidden_act", None) or getattr(config, "hidden_activation", None))
