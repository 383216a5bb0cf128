"""The transformers model of a checkpoint without its weights.

Parameters are on the meta device. Buffers that no checkpoint stores (rotary frequencies, embedding scales) are computed
by transformers itself.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hasten.accel.errors import UserError
from hasten.accel.models.checkpoint import Checkpoint
from hasten.accel.models.families import family_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Recorder(nn.Module):
    """Replacement of a decoder block that records the keyword arguments of its call."""

    def __init__(self) -> None:
        super().__init__()
        self.arguments: dict[str, object] = {}

    def forward(self, hidden_states: Tensor, **arguments: object) -> Tensor:
        """hidden_states, unchanged."""
        self.arguments = arguments
        return hidden_states

    def take(self) -> dict[str, object]:
        """The recorded arguments, which are then forgotten."""
        arguments, self.arguments = self.arguments, {}
        return arguments


@dataclass
class Skeleton:
    """Parts of a model without weights.

    decoder: transformers' decoder with Recorders for blocks and without its last norm. norm: that norm, or an identity.
    project_out: OPT's projection before the head, else None. tied: whether head and embedding may share a tensor.
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
        # This package reads and unpacks the weights, so transformers must build the plain model.
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


def _compute_buffers(model: "PreTrainedModel", decoder: nn.Module) -> None:
    """Compute the decoder's buffers that are on the meta device."""
    for module in decoder.modules():
        missing = {name: buffer for name, buffer in module._buffers.items() if buffer is not None and buffer.is_meta}
        for name, buffer in missing.items():
            module._buffers[name] = torch.empty_like(buffer, device="cpu")
        if missing:
            # The method by which transformers fills them when it loads a checkpoint.
            with torch.no_grad():
                model._init_weights(module)
