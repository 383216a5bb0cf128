"""The supported model families: names and order of their parts.

There are two sets of names. *Local* names are relative to a decoder block as this package builds it, with transformers'
module names and unfused experts: `mlp.experts.3.gate_proj`. *Logical* names are those of the checkpoint, in the form
that other programs read: Mixtral's experts are `block_sparse_moe.experts.3.w1`, whichever form a checkpoint stores.
"""

import re
from dataclasses import dataclass

from hasten.accel.errors import UserError

_ATTENTION = (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("self_attn.o_proj",))
_GATED = (("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",))
_LOCAL_EXPERT = re.compile(r"mlp\.experts\.(\d+)\.(gate_proj|up_proj|down_proj)(\..+)?")
_MODULE_FORM = re.compile(r"(.*\blayers\.\d+\.)mlp\.(.+)")


@dataclass(frozen=True)
class ExpertNames:
    """Logical names in a mixture of experts: its module in the block, and the three projections of an expert."""

    parent: str
    gate: str
    up: str
    down: str


@dataclass(frozen=True)
class Family:
    """One model family.

    inputs: local names of a block's linear layers in execution order, grouped by the input that they read; a block may
    lack some of them. prefixes: possible prefixes of the decoder's tensors in a checkpoint. heads: possible names of
    the output projection. decoder: path of the decoder in the transformers model. norm: its last norm. caps_logits:
    whether the model applies the config's final_logit_softcapping. experts: None for dense families. norms: local names
    of the norms that can take over a scale of their readers' inputs, each with how the names of all its readers begin;
    None derives them, see scale_sites. is_linear_in_up: whether gated networks are linear in their up projection.
    """

    inputs: tuple[tuple[str, ...], ...] = _ATTENTION + _GATED
    prefixes: tuple[str, ...] = ("model.", "")
    heads: tuple[str, ...] = ("lm_head.weight",)
    decoder: str = "model"
    norm: str = "norm"
    caps_logits: bool = True
    experts: ExpertNames | None = None
    norms: tuple[tuple[str, tuple[str, ...]], ...] | None = None
    is_linear_in_up: bool = True

    def logical(self, local: str) -> str:
        """Logical name, relative to the block, of a local name."""
        if self.experts is None:
            return local
        expert = _LOCAL_EXPERT.fullmatch(local)
        if expert:
            number, projection, rest = expert.groups()
            return f"{self.experts.parent}.experts.{number}.{self._projection(projection)}{rest or ''}"
        return f"{self.experts.parent}.{local[4:]}" if local.startswith("mlp.") else local

    def canonical(self, stored: str) -> str:
        """Logical name of a stored name: names in transformers' module form are translated."""
        if self.experts is None or self.experts.parent == "mlp":
            return stored
        match = _MODULE_FORM.fullmatch(stored)
        return f"{match[1]}{self.experts.parent}.{match[2]}" if match else stored

    def fused(self, logical: str) -> list[tuple[str, int, int]] | None:
        """How to split the fused tensor [experts, rows, columns] of this name; None where the name is not of one.

        Each part is (name with `{}` for the expert's number, first row, end row), counted in halves of the rows.
        """
        if self.experts is None:
            return None
        for kind in ("gate_up_proj", "down_proj"):
            head = logical.removesuffix(f".{self.experts.parent}.experts.{kind}")
            if head != logical:
                parent = f"{head}.{self.experts.parent}.experts.{{}}"
                if kind == "down_proj":
                    return [(f"{parent}.{self.experts.down}.weight", 0, 2)]
                # transformers stacks the gate's rows above the up projection's.
                return [(f"{parent}.{self.experts.gate}.weight", 0, 1), (f"{parent}.{self.experts.up}.weight", 1, 2)]
        return None

    def _projection(self, local: str) -> str:
        assert self.experts is not None
        return {"gate_proj": self.experts.gate, "up_proj": self.experts.up, "down_proj": self.experts.down}[local]


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
    "mixtral": Family(experts=ExpertNames("block_sparse_moe", "w1", "w3", "w2")),
    "qwen3_moe": Family(experts=ExpertNames("mlp", "gate_proj", "up_proj", "down_proj")),
}


def family_of(model_type: object) -> Family:
    """Family of a config's model_type; UserError lists the supported ones."""
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise UserError(f"model_type={model_type!r} is not supported: supported are {', '.join(FAMILIES)}")
    return FAMILIES[model_type]
