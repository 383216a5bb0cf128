"""Metadata with which llama.cpp builds a model: the keys of its architecture, from transformers' config."""

from typing import TYPE_CHECKING, Any

import numpy as np

from hasten.accel.errors import UserError
from hasten.accel.models.gguf.families import GgufFamily

if TYPE_CHECKING:
    from gguf import GGUFWriter

_ACTIVATIONS = {"gemma2": "gelu_pytorch_tanh", "gemma3": "gelu_pytorch_tanh"}
# Blocks with full attention among those with a window: one in so many, which llama.cpp knows by itself.
_FULL_ATTENTION = {"gemma2": 2, "gemma3": 6}
# Numbers of blocks of the models whose attention llama.cpp scales by another width than that of a head.
_OWN_SCALE = {"gemma2": 46, "gemma3": 62}


def check_config(config: Any, family: GgufFamily) -> None:
    """UserError where llama.cpp would compute something else than transformers from this config."""
    act = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", "silu")
    usual = _ACTIVATIONS.get(family.name, "silu")
    rope = _rope(config)
    kinds = ("default", "linear", "llama3", "yarn")
    for wrong, key, value, right in (
        (act != usual, "hidden_act", act, usual),
        (rope["rope_type"] not in kinds, "rope_type", rope["rope_type"], ", ".join(kinds)),
        (family.name == "qwen3moe" and not config.norm_topk_prob, "norm_topk_prob", False, "true"),
        (family.name.startswith("qwen") and config.use_sliding_window, "use_sliding_window", True, "false"),
        (bool(getattr(config, "mlp_only_layers", None)), "mlp_only_layers", "a list of blocks", "[]"),
    ):
        if wrong:
            raise UserError(
                f"format=gguf cannot write {key}={value} of model_type={config.model_type}: expected {right}"
            )
    scale = getattr(config, "query_pre_attn_scalar", None)
    if scale is not None and scale != _head_dim(config) and config.num_hidden_layers != _OWN_SCALE[family.name]:
        raise UserError(
            f"format=gguf cannot write query_pre_attn_scalar={scale}: expected {_head_dim(config)}, head_dim"
        )
    if family.name in _FULL_ATTENTION:
        every = _FULL_ATTENTION[family.name]
        expected = [
            "full_attention" if (block + 1) % every == 0 else "sliding_attention"
            for block in range(config.num_hidden_layers)
        ]
        if list(config.layer_types) != expected:
            raise UserError(f"format=gguf cannot write layer_types: expected full attention in every {every}th block")


def add_metadata(writer: "GGUFWriter", config: Any, family: GgufFamily, name: str, blocks: int) -> None:
    """Write the keys of the architecture. config: transformers', of the text model. blocks: that are written."""
    head_dim, rope = _head_dim(config), _rope(config)
    writer.add_type("model")
    writer.add_name(name)
    writer.add_quantization_version(2)
    writer.add_block_count(blocks)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    writer.add_rope_dimension_count(int(head_dim * (rope.get("partial_rotary_factor") or 1.0)))
    if rope["rope_type"] in ("linear", "yarn"):
        from gguf import RopeScalingType

        writer.add_rope_scaling_type(RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(float(rope["factor"]))
        if rope.get("original_max_position_embeddings"):
            writer.add_rope_scaling_orig_ctx_len(int(rope["original_max_position_embeddings"]))
    if getattr(config, "sliding_window", None) and family.name in ("gemma2", "gemma3", "phi3"):
        writer.add_sliding_window(config.sliding_window)
    if family.name == "phi3":
        writer.add_rope_scaling_orig_ctx_len(config.original_max_position_embeddings)
    if family.name == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    experts = _experts(config)
    if experts:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        if getattr(config, "moe_intermediate_size", None):
            writer.add_expert_feed_forward_length(config.moe_intermediate_size)


def rope_factors(config: Any) -> np.ndarray | None:
    """Divisors (head size / 2,) of the rotary frequencies that llama.cpp reads as a tensor; None where there are none.

    Source: Dubey et al. 2024, arXiv:2407.21783, whose models stretch long waves by a factor, and not short ones.
    """
    rope = _rope(config)
    if rope["rope_type"] != "llama3":
        return None
    width = int(_head_dim(config) * (rope.get("partial_rotary_factor") or 1.0))
    waves = 2 * np.pi * float(rope["rope_theta"]) ** (np.arange(0, width, 2, dtype=np.float64) / width)
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    # Share of the original frequency: 1 for the shortest waves, 0 for the longest.
    share = np.clip((rope["original_max_position_embeddings"] / waves - low) / (high - low), 0, 1)
    return (1 / ((1 - share) / float(rope["factor"]) + share)).astype(np.float32)


def _rope(config: Any) -> dict[str, Any]:
    parameters: dict[str, Any] = config.rope_parameters
    # Models with two kinds of attention have parameters for each: llama.cpp's keys are those of full attention.
    rope = dict(parameters.get("full_attention", parameters))
    return rope | {"rope_type": rope.get("rope_type") or "default"}


def _head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _experts(config: Any) -> int:
    return int(getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None) or 0)
