"""A family's transformers model without its weights.

Everything lies on the meta device, except the buffers that no checkpoint stores (rotary frequencies, embedding
scales): these are computed, by transformers itself.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hasten.accel.errors import UserError
from hasten.accel.models.checkpoint import Checkpoint
from hasten.accel.models.families import family_of


class Recorder(nn.Module):
    """Stands in for a decoder block: keeps the keyword arguments that it is called with."""

    def __init__(self) -> None:
        super().__init__()
        self.arguments: dict[str, Any] = {}

    def forward(self, hidden_states: Tensor, **arguments: Any) -> Tensor:
        """hidden_states as they came."""
        self.arguments = arguments
        return hidden_states

    def take(self) -> dict[str, Any]:
        """The arguments, which are kept no longer."""
        arguments, self.arguments = self.arguments, {}
        return arguments


@dataclass
class Skeleton:
    """Parts of a model: decoder has recorders for blocks and no last norm; the head's own parts stand apart.

    norm may be an identity; project_out, OPT's, may be None; tied says whether head and embedding may share a tensor.
    """

    config: Any
    decoder: Any
    blocks: list[Any]
    norm: nn.Module
    project_out: nn.Module | None
    head: nn.Linear
    tied: bool


def build_skeleton(checkpoint: Checkpoint, dtype: torch.dtype) -> Skeleton:
    """Skeleton for a checkpoint's config; UserError where transformers refuses the config."""
    family = family_of(checkpoint.config.get("model_type"))
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        whole = AutoConfig.from_pretrained(checkpoint.path, trust_remote_code=False)
        config = whole.get_text_config(decoder=True)
        # Weights are read here, packed ones too: the model itself is to be a plain one.
        vars(config).pop("quantization_config", None)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, OSError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"transformers cannot build a model from {checkpoint.path / 'config.json'}: {reason}") from None
    model.eval().requires_grad_(False)
    decoder: Any = model.get_submodule(family.decoder)
    blocks, norm = list(decoder.layers), getattr(decoder, family.norm)
    decoder.layers = nn.ModuleList(Recorder() for _ in blocks)
    setattr(decoder, family.norm, nn.Identity())
    project_out = getattr(decoder, "project_out", None)
    if project_out is not None:
        decoder.project_out = nn.Identity()
    _compute_buffers(model, decoder)
    tied = bool(getattr(whole, "tie_word_embeddings", False))
    return Skeleton(config, decoder, blocks, norm or nn.Identity(), project_out, model.lm_head, tied)


def _compute_buffers(model: Any, decoder: nn.Module) -> None:
    for module in decoder.modules():
        missing = {name: buffer for name, buffer in module._buffers.items() if buffer is not None and buffer.is_meta}
        for name, buffer in missing.items():
            module._buffers[name] = torch.empty_like(buffer, device="cpu")
        if missing:
            # transformers fills them so when it loads a model itself.
            with torch.no_grad():
                model._init_weights(module)
