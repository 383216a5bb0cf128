"""Gemma 2 and the text model of Gemma 3.

A norm multiplies by 1 + weight and is computed in float32. Attention and feed-forward network have a norm on either
side. Embeddings are scaled by the root of their width.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hasten.accel.decoding.targets.families.decoder import Layer, RowMap, WeightedNorm
from hasten.accel.decoding.targets.families.llama import FULL, SLIDING, Llama
from hasten.accel.decoding.targets.matmul import Norm


class OffsetNorm:
    """Root mean square norm in float32 that multiplies by 1 + weight."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        # In bfloat16, 1 + weight would lose most of the weight's digits.
        self._norm = Norm(1.0 + weight.float(), eps)
        self.weight, self.eps = self._norm.weight, eps

    def __call__(self, x: Tensor) -> Tensor:
        """Normalised rows (rows, D), in the dtype of x."""
        return self._norm(x.float()).to(x.dtype)


class Gemma2(Llama):
    """Gemma 2: attention scores and logits have soft caps."""

    typed = True

    @classmethod
    def refusal(cls, config: Any) -> str | None:
        """See Llama."""
        if getattr(config, "use_bidirectional_attention", None):
            return "its attention is bidirectional"
        return super().refusal(config)

    def layer(self, index: int, name: str) -> Layer:
        """See Llama."""
        return replace(
            super().layer(index, name),
            attention_out_norm=self.norm(f"{name}.post_attention_layernorm"),
            mlp_norm=self.norm(f"{name}.pre_feedforward_layernorm"),
            mlp_out_norm=self.norm(f"{name}.post_feedforward_layernorm"),
        )

    def norm(self, name: str, order: Tensor | None = None) -> WeightedNorm:
        """See Llama."""
        weight = self.weights.tensor(f"{name}.weight")
        return OffsetNorm(weight if order is None else weight[order.to(weight.device)], self.config.rms_norm_eps)

    def embed(self, lookup: RowMap) -> RowMap:
        """Scaled rows; transformers rounds the scale to the model's dtype."""
        scale = torch.tensor(self.config.hidden_size**0.5).to(self.weights.dtype).item()
        return lambda ids: lookup(ids) * scale

    def scale(self) -> float:
        """See Llama."""
        return float(self.config.query_pre_attn_scalar**-0.5)

    def score_cap(self) -> float | None:
        """See Llama."""
        cap: float | None = self.config.attn_logit_softcapping
        return cap


class Gemma3(Gemma2):
    """The text model of Gemma 3: layers with windows have a rotary embedding of their own."""

    rotation_types = (FULL, SLIDING)

    def score_cap(self) -> float | None:
        """None: the model has norms of queries and keys instead, and transformers ignores the config's cap."""
        return None
