"""Tiny configs of any model type of transformers, to try how models of that type run."""

from typing import Any

from hasten.accel.errors import UserError

# Sizes that occur in configs. Heads of 16 columns, so that rotary embeddings have enough frequencies.
_SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "vocab_size_per_layer_input": 96,
    "hidden_size": 64,
    "n_embd": 64,
    "d_model": 64,
    "intermediate_size": 128,
    "ffn_dim": 128,
    "n_inner": 128,
    "decoder_ffn_dim": 128,
    "ffn_hidden_size": 128,
    "num_hidden_layers": 2,
    "num_layers": 2,
    "n_layer": 2,
    "n_layers": 2,
    "decoder_layers": 2,
    "encoder_layers": 2,
    "num_attention_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "n_positions": 64,
    "max_seq_len": 64,
    "max_sequence_length": 64,
    "sliding_window": 8,
    "embedding_size": 64,
    "word_embed_proj_dim": 64,
    "is_decoder": True,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "image_token_id": 5,
    "image_token_index": 5,
    "video_token_id": 6,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_k": 2,
    "moe_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "shared_intermediate_size": 32,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "qk_head_dim": 32,
    "v_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_d_state": 16,
    "mamba_d_ssm": 128,
    "mamba_n_groups": 1,
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "ssm_state_size": 16,
    "state_size": 16,
    "n_groups": 1,
    "num_heads": 8,
    "global_head_dim": 16,
    "num_global_key_value_heads": 2,
    "query_pre_attn_scalar": 16,
    "attention_head_dim": 16,
    "num_kv_shared_layers": 0,
    "hidden_size_per_layer_input": 8,
    "laurel_rank": 8,
}
# Of the sizes of a part that is no text, only these are made smaller.
_VISION: dict[str, Any] = {
    "hidden_size": 32,
    "embed_dim": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "depth": 1,
    "num_attention_heads": 2,
    "num_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
_TYPES: dict[str, dict[str, Any]] = {
    "falcon_h1": {"mamba_n_heads": 8, "mamba_d_head": 16},
    "reformer": {"is_decoder": True},
    "codegen": {"rotary_dim": 8},
    "gptj": {"rotary_dim": 8},
    "dots1": {"n_shared_experts": 1},
    "zaya": {"num_experts_per_tok": 1},
    # It rescales hidden states every six blocks.
    "rwkv": {"num_hidden_layers": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
}


def reduced_config(model_type: str, **changes: Any) -> Any:
    """transformers' config of a tiny model; UserError where transformers has no such type.

    changes: entries of the config of its language model.
    """
    from transformers import CONFIG_MAPPING

    if model_type not in CONFIG_MAPPING:
        raise UserError(f"model type {model_type!r} is unknown to this version of transformers")
    kind = CONFIG_MAPPING[model_type]
    parts = getattr(kind, "sub_configs", None) or {}
    text = next((name for name in ("text_config", "llm_config", "decoder_config") if name in parts), None)
    if text is None:
        return kind(**(_sizes(kind, _SIZES) | _TYPES.get(model_type, {}) | changes))
    values: dict[str, Any] = {}
    for name, part in parts.items():
        if name == text:
            values[name] = _part(part, _SIZES) | changes
        elif name.startswith("vision") or name.startswith("audio"):
            values[name] = _part(part, _VISION)
    known = {key: value for key, value in _SIZES.items() if key.endswith("_token_id") or key == "image_token_index"}
    return kind(**values, **_sizes(kind, known))


def _part(kind: Any, sizes: dict[str, Any]) -> dict[str, Any]:
    from transformers import AutoConfig

    if kind is AutoConfig:
        # Of any type, the one that most models have.
        return {**sizes, "model_type": "llama"} if sizes is _SIZES else {**_VISION, "model_type": "clip_vision_model"}
    return {**_sizes(kind, sizes), "model_type": kind.model_type}


def _sizes(kind: Any, sizes: dict[str, Any]) -> dict[str, Any]:
    """Those of the sizes that a config has."""
    default = kind()
    known = {**dict.fromkeys(dir(kind)), **vars(default)}
    own = {name: value for name, value in sizes.items() if name in known and _can_be_set(kind, name)}
    if "kv_lora_rank" in own:
        # Latent attention derives the size of its heads, and has as many keys as queries.
        own.pop("head_dim", None)
        own["num_key_value_heads"] = own["num_attention_heads"]
    mapped = getattr(kind, "attribute_map", {})
    own = {name: value for name, value in own.items() if mapped.get(name, name) not in own or name not in mapped}
    for name in ("layer_types", "layers_block_type"):
        types = getattr(default, name, None)
        if types and _can_be_set(kind, mapped.get(name, name)):
            # One block of each of two kinds, where there are as many.
            kinds = list(dict.fromkeys(types))
            own[name] = [kinds[0], kinds[min(1, len(kinds) - 1)]]
    rope = getattr(default, "rope_parameters", None) or {}
    rope_keys = {*rope, *(getattr(kind, "ignore_keys_at_rope_validation", None) or ())}
    if "mrope_section" in rope_keys and "hidden_size" in own:
        # Frequencies of time, height and width.
        half = int(own.get("head_dim", 16) * rope.get("partial_rotary_factor", 1.0)) // 2
        section = {"mrope_section": [half - 2 * (3 * half // 8), *[3 * half // 8] * 2]}
        by_kind = {key: value | section for key, value in rope.items() if isinstance(value, dict)}
        own["rope_parameters"] = by_kind or rope | section
    return own


def _can_be_set(kind: Any, name: str) -> bool:
    described = getattr(kind, getattr(kind, "attribute_map", {}).get(name, name), None)
    return not isinstance(described, property) or described.fset is not None
