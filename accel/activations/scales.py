"""The calibrated tensors of a layer's inputs, and of an attention's queries, keys and values."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hasten.accel.activations.description import GLOBAL_SCALE, SCALE
from hasten.accel.activations.observers.base import InputObserver
from hasten.accel.activations.ranges import HeadRanges, InputRange
from hasten.accel.activations.rounding import InputRounding
from hasten.accel.activations.scheme import InputScheme
from hasten.accel.errors import UserError

_FP8_TOP = 448.0
# What shares a scale of keys, of values or of queries.
TENSOR, HEAD = STRATEGIES = ("tensor", "attn_head")


def input_tensors(
    scheme: InputScheme, inputs: InputRange, observer: InputObserver, dtype: torch.dtype, layer: str
) -> dict[str, Tensor]:
    """Tensors to store beside a layer whose inputs are rounded by a scheme; empty where all scales are dynamic.

    dtype: of `input_scale`, which is that of the layer's weight; `input_global_scale` is float32. UserError, which
    names the layer, where its calibration inputs are not finite.
    """
    if not scheme.is_calibrated:
        return {}
    absmax = inputs.absmax
    if not math.isfinite(absmax):
        raise UserError(
            f"inputs of {layer} are not finite on the calibration tokens: a static scale cannot be calibrated; use a "
            "scheme with dynamic scales, or ignore the layer"
        )
    limit = observer.limit(inputs, scheme) if absmax > 0 else 1.0
    if scheme.strategy == "tensor_group":
        # The largest group scale becomes the largest FP8 number.
        scale = torch.tensor([_FP8_TOP * scheme.top / limit], dtype=torch.float32)
        return {GLOBAL_SCALE: scale.masked_fill(scale.isinf(), 1.0)}
    return {SCALE: _positive(torch.tensor([limit / scheme.top]), dtype)}


def stored_inputs(scheme: InputScheme | None, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Names and dtypes of the tensors, of one number each, that input_tensors returns."""
    if scheme is None or not scheme.is_calibrated:
        return {}
    return {GLOBAL_SCALE: torch.float32} if scheme.strategy == "tensor_group" else {SCALE: dtype}


@dataclass(frozen=True)
class AttentionScheme:
    """Keys and values of the cache in FP8 with static scales, and whether queries are, too.

    strategy: `tensor`, one scale for all keys and one for all values, or `attn_head`, one for each KV head (and each
    query head).
    """

    strategy: str = TENSOR
    queries: bool = False

    @property
    def states(self) -> InputScheme:
        """Grid of the keys, values and queries."""
        return InputScheme("float", 8, self.strategy, static=True)

    @property
    def names(self) -> tuple[str, ...]:
        """Tensors of an attention, behind its module's name."""
        return ("k_scale", "v_scale", *(("q_scale",) if self.queries else ()))

    def shapes(self, heads: int, kv_heads: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the tensors of an attention with these numbers of heads, by name."""
        by_head = self.strategy == HEAD
        return {name: (heads if name.startswith("q") else kv_heads, 1, 1) if by_head else (1,) for name in self.names}

    def tensors(self, ranges: HeadRanges, dtype: torch.dtype, attention: str) -> dict[str, Tensor]:
        """Scales of an attention, (1,) or (H, 1, 1); UserError, which names it, where its states are not finite."""
        scales = {}
        for name in self.names:
            absmax = ranges.of(name[0])
            if not bool(torch.isfinite(absmax).all()):
                raise UserError(
                    f"{name[0]} of {attention} is not finite on the calibration tokens: give kv_cache=null, or check "
                    "the weights"
                )
            by_head = absmax[:, None, None] if self.strategy == HEAD else absmax.amax()[None]
            scales[name] = _positive(torch.where(by_head > 0, by_head, 1.0) / _FP8_TOP, dtype)
        return scales

    def rounding(self, scales: Mapping[str, Tensor], name: str) -> InputRounding:
        """Rounding of `q`, `k` or `v` [B, H, T, D] by an attention's tensors."""
        return InputRounding(self.states, scales[f"{name}_scale"])


def _positive(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Scale in the dtype of the checkpoint, whose small numbers may be zero."""
    stored = scale.to(dtype).cpu()
    return stored.masked_fill(stored == 0, torch.finfo(dtype).tiny).contiguous()
