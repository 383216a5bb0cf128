"""Tiny random checkpoints of every supported family, saved by transformers itself."""

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import torch

VOCABULARY = 96
WINDOW = 8  # shorter than the tests' sequences, so that a wrong mask shows
SHARD_BYTES = "40KB"

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_TYPES = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": WINDOW, "head_dim": 32}
_EXPERTS = {"num_experts_per_tok": 2, "router_jitter_noise": 0.0}
_MIXTURE = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 16}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "mistral": ("MistralConfig", {"sliding_window": WINDOW}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 32}),
    "gemma2": ("Gemma2Config", {**_TYPES, "query_pre_attn_scalar": 32, "attn_logit_softcapping": 2.0}),
    "gemma3_text": ("Gemma3TextConfig", {**_TYPES, "query_pre_attn_scalar": 32, "final_logit_softcapping": 3.0}),
    "phi3": ("Phi3Config", {"sliding_window": WINDOW}),
    "opt": ("OPTConfig", {"ffn_dim": 128, "word_embed_proj_dim": 64}),
    "mixtral": ("MixtralConfig", {**_EXPERTS, "num_local_experts": 4, "intermediate_size": 32}),
    # The first block is dense, the second a mixture.
    "qwen3_moe": ("Qwen3MoeConfig", {**_MIXTURE, "decoder_sparse_step": 2, "norm_topk_prob": True}),
}


def build(family: str, **changes: Any) -> Any:
    """A random float32 model of the family; equal configs give equal weights."""
    import transformers

    name, own = FAMILIES[family]
    config = getattr(transformers, name)(**{**_COMMON, **own, **changes})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Norms and biases are initialised as constants, and with a deviation of 0.02 blocks have hardly any effect.
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.tie_weights()
    return model


def save(path: Path, family: str, sharded: bool = False, dtype: torch.dtype | None = None, **changes: Any) -> Path:
    """Checkpoint folder of a random model. sharded: in shards of one or a few tensors."""
    model = build(family, **changes)
    if dtype is not None:
        model = model.to(dtype)
    model.save_pretrained(path, max_shard_size=SHARD_BYTES if sharded else "5GB")
    return path


@cache
def tokens(batch: int = 2, length: int = 24) -> torch.Tensor:
    """Token ids [batch, length], the same at every call."""
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(1))


def save_packed(path: Path, source: Path, schemes: list[dict[str, Any]], ignore: list[str]) -> Path:
    """A copy of an unsharded checkpoint whose linear layers compressed-tensors packs.

    schemes: config groups with `targets` and `weights`; the first that has a regex for a module's name wins, then the
    one that targets "Linear". Scales are plain absolute maxima: this is about the format, not about quality.
    """
    from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationConfig
    from safetensors.torch import load_file, save_file

    path.mkdir()
    groups = {f"group_{number}": {"format": "pack-quantized", **scheme} for number, scheme in enumerate(schemes)}
    section = {"quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed"}
    section |= {"config_groups": groups, "ignore": ignore}
    parsed = QuantizationConfig.model_validate(section)
    tensors = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        module = name.removesuffix(".weight")
        scheme = _scheme(parsed, module)
        if tensor.ndim != 2 or "proj" not in name or module in ignore or scheme is None:
            tensors[name] = tensor
            continue
        args = scheme.weights
        groups_of = tensor.unflatten(1, (-1, args.group_size or tensor.shape[1]))
        parts = {"weight": tensor, "weight_scale": groups_of.abs().amax(-1) / (2 ** (args.num_bits - 1) - 0.5)}
        if not args.symmetric:
            parts["weight_zero_point"] = torch.ones_like(parts["weight_scale"], dtype=torch.int8)
        for leaf, part in PackedQuantizationCompressor.compress(parts, scheme).items():
            tensors[f"{module}.{leaf}"] = part
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "quantization_config": section}))
    return path


def _scheme(config: Any, module: str) -> Any:
    schemes = list(config.config_groups.values())
    named = [
        scheme
        for scheme in schemes
        if any(target.startswith("re:") and re.match(target[3:], module) for target in scheme.targets)
    ]
    return next(iter(named + [scheme for scheme in schemes if "Linear" in scheme.targets]), None)
