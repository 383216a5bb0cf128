"""The supported model families: names and order of their parts."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hasten.accel.models.expert_names import GRANITES, model_types

_ATTENTION = (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("self_attn.o_proj",))
_GATED = (("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",))


@dataclass(frozen=True)
class Family:
    """One model family.

    inputs: local names of a block's linear layers in execution order, grouped by the input that they read; a block may
    lack some of them. prefixes: possible prefixes of the decoder's tensors in a checkpoint. heads: possible names of
    the output projection. decoder: path of the decoder in the transformers model. norm: its last norm. caps_logits:
    whether the model applies the config's final_logit_softcapping.
    """

    inputs: tuple[tuple[str, ...], ...] = _ATTENTION + _GATED
    prefixes: tuple[str, ...] = ("model.", "")
    heads: tuple[str, ...] = ("lm_head.weight",)
    decoder: str = "model"
    norm: str = "norm"
    caps_logits: bool = True


# See initialises_layers and fuses_experts.
_INITIALISED = frozenset(("mamba", "mamba2", "falcon_mamba", "recurrent_gemma"))
_PUBLISHED_FUSED = frozenset(("gpt_oss", "aria", "aria_text")) | GRANITES
_LLAMA = Family()
FAMILIES = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma2": _LLAMA,
    "gemma3_text": _LLAMA,
    # The language model of the multimodal checkpoints; the vision tower lies outside the blocks.
    "gemma3": Family(
        prefixes=("model.language_model.", "language_model.model."),
        heads=("lm_head.weight", "language_model.lm_head.weight"),
        caps_logits=False,
    ),
    "phi3": Family(
        inputs=(("self_attn.qkv_proj",), ("self_attn.o_proj",), ("mlp.gate_up_proj",), ("mlp.down_proj",)),
    ),
    "opt": Family(
        inputs=(_ATTENTION[0], ("self_attn.out_proj",), ("fc1",), ("fc2",)),
        prefixes=("model.decoder.", "decoder."),
        decoder="model.decoder",
        norm="final_layer_norm",
    ),
    "mixtral": _LLAMA,
    "qwen3_moe": _LLAMA,
}


def family_of(model_type: object) -> Family:
    """Family of a config's model_type: that of most models where no other one is listed."""
    return FAMILIES.get(str(model_type), _LLAMA)


def initialises_layers(config: Mapping[str, Any]) -> bool:
    """Whether transformers 5.23 initialises weights of layers of a model that it loads, which packed layers lack."""
    return not _INITIALISED.isdisjoint(model_types(config))


def fuses_experts(config: Mapping[str, Any]) -> bool:
    """Whether transformers 5.23 has no rules for experts of a model that a checkpoint stores one by one."""
    return not _PUBLISHED_FUSED.isdisjoint(model_types(config))
