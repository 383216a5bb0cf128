"""The attention and the mask function that transformers calls for models with a compressed cache.

Importing this module registers them; `attach` makes a model use them. The mask function makes no mask: it hands on the
padding mask, from which the attention knows which tokens to store; causality is known from the order of the tokens.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from hasten.accel.cache.cache import IMPLEMENTATION, CompressedCache, Handle
from hasten.accel.errors import UserError
from hasten.kernels.attention.contract import Scoring


@dataclass(frozen=True)
class DeferredMask:
    """Arguments of a mask that is made only for attention without a compressed cache.

    padding: (B, columns) bool, None where there is none. shape: stands for that of a mask.
    """

    padding: Tensor | None
    arguments: dict[str, Any]

    def dense(self) -> Tensor | None:
        """The mask as torch's own attention takes it."""
        mask: Tensor | None = sdpa_mask(**self.arguments)
        return mask


def attach(model: PreTrainedModel) -> None:
    """Let a model attend to compressed caches; without one it computes as before. UserError where it cannot."""
    model.set_attn_implementation(IMPLEMENTATION)
    if model.config.get_text_config()._attn_implementation != IMPLEMENTATION:
        raise UserError(
            f"{type(model).__name__} does not compute its attention by transformers' attention interface: its cache "
            "cannot be compressed"
        )
    if _tell_ids not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(_tell_ids, with_kwargs=True)


def _tell_ids(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Tell the cache of a pass its tokens' ids: layers see vectors, and some methods read where sentences end."""
    cache = kwargs.get("past_key_values")
    if isinstance(cache, CompressedCache):
        cache.ids = kwargs.get("input_ids", args[0] if args else None)


def deferred_mask(attention_mask: Tensor | None = None, **arguments: Any) -> DeferredMask:
    """Mask function of transformers' interface."""
    return DeferredMask(attention_mask, {"attention_mask": attention_mask, **arguments})


def cached_attention(
    module: nn.Module,
    query: Tensor,
    key: Handle | Tensor,
    value: Handle | Tensor,
    attention_mask: DeferredMask | Tensor | None,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    s_aux: Tensor | None = None,
    position_ids: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention function of transformers' interface: output (B, N, H * G, D) of query (B, H * G, N, D)."""
    if isinstance(key, Tensor) and isinstance(value, Tensor):
        mask = attention_mask.dense() if isinstance(attention_mask, DeferredMask) else attention_mask
        output: Tensor = sdpa_attention_forward(module, query, key, value, mask, scaling=scaling, **kwargs)[0]
        return output, None
    assert isinstance(key, Handle)
    width = query.shape[2]
    padding = attention_mask.padding if isinstance(attention_mask, DeferredMask) else None
    if padding is not None:
        padding = padding[:, -width:].bool()
    if position_ids is not None and (position_ids.ndim != 2 or position_ids.shape[1] != width):
        position_ids = None
    layer = key.layer
    layer.owner.check_pass(width)
    layer.scoring = Scoring(scaling, sliding_window, softcap)
    positions = None if position_ids is None else position_ids.expand(len(query), -1)
    return layer.attend(key, query.transpose(1, 2), padding, positions, s_aux), None


AttentionInterface.register(IMPLEMENTATION, cached_attention)
AttentionMaskInterface.register(IMPLEMENTATION, deferred_mask)
