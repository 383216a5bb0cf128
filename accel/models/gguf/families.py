"""Architectures of llama.cpp by transformers' model_type: names of the tensors, and what their values differ in.

Source: github.com/ggml-org/llama.cpp, whose package `gguf` has the table of names.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from hasten.accel.errors import UserError

_BLOCK = re.compile(r"layers\.(\d+)\.")
_EXPERT = re.compile(r"\.experts\.(\d+)\.")
_ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
_NORMS = ("input_layernorm", "post_attention_layernorm")
_HEAD_NORMS = ("self_attn.q_norm", "self_attn.k_norm")
_GATED = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
_FOUR_NORMS = (*_NORMS, "pre_feedforward_layernorm", "post_feedforward_layernorm")
_OUTER = ("model.embed_tokens", "model.norm", "lm_head")


@dataclass(frozen=True)
class GgufFamily:
    """One architecture. name: llama.cpp's. modules: modules of a block with a weight, as transformers names them.

    experts: those of its experts, without the expert's number. rotates_pairs: whether llama.cpp rotates neighbouring
    """

    name: str
    modules: tuple[str, ...]
    experts: tuple[str, ...] = ()
    rotates_pairs: bool = False
    norm_offset: float = 0.0

    def stored_name(self, name: str, blocks: int) -> str | None:
        """GGUF's name of a tensor with this logical name, None where there is none; experts share a name."""
        module, _, leaf = _EXPERT.sub(".experts.", name).rpartition(".")
        block = _BLOCK.search(module)
        local = "model." + module[block.start() :] if block else _outer(module)
        found = _names(self.name, blocks).get_name(local) if local is not None else None
        return None if found is None else f"{found}.{leaf}"

    def heads(self, name: str, config: Mapping[str, Any]) -> int:
        """Number of heads whose rows a tensor's rows are, where llama.cpp has them in another order; else 0."""
        if not self.rotates_pairs:
            return 0
        if ".self_attn.q_proj." in name:
            return int(config["num_attention_heads"])
        if ".self_attn.k_proj." in name:
            return int(config.get("num_key_value_heads") or config["num_attention_heads"])
        return 0

    def offset(self, name: str) -> float:
        """What llama.cpp's tensor has been increased by."""
        return self.norm_offset if name.endswith("norm.weight") else 0.0

    def logical_names(self, blocks: int, experts: int) -> Iterator[str]:
        """Logical names of all tensors that a model may have, of experts one for all of them with `{}`."""
        for module in _OUTER:
            yield f"{module}.weight"
        for block in range(blocks):
            for module in self.modules:
                for leaf in ("weight", "bias"):
                    yield f"model.layers.{block}.{module}.{leaf}"
            if experts:
                for module in self.experts:
                    yield f"model.layers.{block}.{module}.weight"


_LLAMA = GgufFamily(
    "llama",
    (*_ATTENTION, *_NORMS, *_GATED, "block_sparse_moe.gate"),
    tuple(f"block_sparse_moe.experts.{{}}.{part}" for part in ("w1", "w2", "w3")),
    rotates_pairs=True,
)
_GEMMA_3 = GgufFamily("gemma3", (*_ATTENTION, *_HEAD_NORMS, *_FOUR_NORMS, *_GATED), norm_offset=1.0)
FAMILIES = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "mixtral": _LLAMA,
    "qwen2": GgufFamily("qwen2", (*_ATTENTION, *_NORMS, *_GATED)),
    "qwen3": GgufFamily("qwen3", (*_ATTENTION, *_HEAD_NORMS, *_NORMS, *_GATED)),
    "qwen3_moe": GgufFamily(
        "qwen3moe",
        (*_ATTENTION, *_HEAD_NORMS, *_NORMS, *_GATED, "mlp.gate"),
        tuple(f"mlp.experts.{{}}.{part}" for part in ("gate_proj", "up_proj", "down_proj")),
    ),
    "gemma2": GgufFamily("gemma2", (*_ATTENTION, *_FOUR_NORMS, *_GATED), norm_offset=1.0),
    "gemma3_text": _GEMMA_3,
    "phi3": GgufFamily(
        "phi3", ("self_attn.qkv_proj", "self_attn.o_proj", *_NORMS, "mlp.gate_up_proj", "mlp.down_proj")
    ),
}
# Families of a file's architecture; those of one name read the same tensors.
BY_ARCHITECTURE: dict[str, GgufFamily] = {family.name: family for family in FAMILIES.values()}


def family_of(model_type: object) -> GgufFamily:
    """Architecture of a config's model_type; UserError lists those that can be written."""
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise UserError(
            f"format=gguf cannot write model_type={model_type!r}: "
            f"there are names and metadata for {', '.join(FAMILIES)}"
        )
    return FAMILIES[model_type]


def expert_of(name: str) -> int | None:
    """Number of the expert that a tensor belongs to."""
    match = _EXPERT.search(name)
    return int(match[1]) if match else None


def _outer(module: str) -> str | None:
    """Name under which the table of names has a module outside the blocks."""
    return next((name for name in _OUTER if module.endswith(name.rpartition(".")[2])), None)


@cache
def _names(architecture: str, blocks: int) -> Any:
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    number = next(key for key, name in MODEL_ARCH_NAMES.items() if name == architecture)
    return get_tensor_name_map(number, blocks)
