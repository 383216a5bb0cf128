"""Families of the fast path: each reads its config and named weights into a decoder of the same few operations."""

from typing import Any

from hasten.accel.activations.hadamard import is_online
from hasten.accel.decoding.targets.families.decoder import Decoder
from hasten.accel.decoding.targets.families.gemma import Gemma2, Gemma3
from hasten.accel.decoding.targets.families.llama import Llama, Qwen
from hasten.accel.decoding.targets.families.mixtral import Mixtral, Qwen3Moe
from hasten.accel.decoding.targets.families.phi3 import Phi3
from hasten.accel.decoding.targets.families.weights import WeightSource
from hasten.accel.errors import UserError
from hasten.accel.models.packed import is_packed

# By model_type.
FAMILIES: dict[str, type[Llama]] = {
    "llama": Llama,
    "mistral": Llama,
    "qwen2": Qwen,
    "qwen3": Qwen,
    "gemma2": Gemma2,
    "gemma3_text": Gemma3,
    "phi3": Phi3,
    "mixtral": Mixtral,
    "qwen3_moe": Qwen3Moe,
}


def refusal(config: Any) -> str | None:
    """Why a checkpoint of this config of transformers cannot run on the fast path; None if it can."""
    quantization = getattr(config, "quantization_config", None)
    described = quantization if isinstance(quantization, dict | None) else quantization.to_dict()
    if is_online(described):
        return "inputs of its layers are rotated"
    if described and not is_packed(described):
        return "its weights are quantized, and not only packed integers"
    return _refusal_of_family(config)


def build_decoder(config: Any, weights: WeightSource) -> Decoder:
    """The decoder of a config and its weights; UserError if the fast path cannot run it, whatever its weights."""
    reason = _refusal_of_family(config)
    if reason is not None:
        raise UserError(f"path=fast cannot run {name_of(config)}: {reason}")
    return FAMILIES[config.model_type](config, weights).decoder()


def name_of(config: Any) -> str:
    """What error messages call the model of a config."""
    return getattr(config, "_name_or_path", "") or "this model"


def _refusal_of_family(config: Any) -> str | None:
    family = FAMILIES.get(config.model_type)
    return (
        f"model_type {config.model_type} is none of {', '.join(FAMILIES)}" if family is None else family.refusal(config)
    )
