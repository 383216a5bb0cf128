"""Rotary embeddings of a model, by its own code: caches get rotated keys, and some methods need them as they were."""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hasten.accel.errors import UserError


def rotary_of(model: PreTrainedModel) -> Callable[[int, Tensor, Tensor, bool], Tensor]:
    """Function rotate(layer, keys (H, T, D), positions (H, T), inverse) of a model; UserError where it has none.

    Models apply one rotation to the whole head, or to its first part; the others' keys are not rotated.
    """
    embedding = getattr(model.get_decoder(), "rotary_emb", None)
    apply: Any = getattr(sys.modules[type(model).__module__], "apply_rotary_pos_emb", None)
    types = set(getattr(model.config.get_text_config(), "layer_types", None) or [])
    if embedding is None or apply is None or (len(types) > 1 and hasattr(embedding, "layer_types")):
        raise UserError(
            f"{type(model).__name__} has no rotary embedding that is the same in all layers: choose another cache"
        )

    columns = _columns(embedding, apply)

    def rotate(layer: int, keys: Tensor, positions: Tensor, inverse: bool) -> Tensor:
        with torch.no_grad():
            # Heads are a batch, since each may hold other tokens.
            cosine, sine = embedding(keys, positions.long())
            if inverse:
                # Some rotations also scale, as YaRN's does.
                scale = cosine.square() + sine.square()
                cosine, sine = cosine / scale, -sine / scale
            width = cosine.shape[-1] * columns
            turned, kept = keys[:, None, :, :width], keys[..., width:]
            rotated: Tensor = apply(turned, turned, cosine, sine)[1][:, 0]
        return torch.cat([rotated, kept], -1) if kept.shape[-1] else rotated

    return rotate


def _columns(embedding: Any, apply: Any) -> int:
    """Columns of a head that a column of the cosines is for: 1, or 2 where both halves share it."""
    with torch.no_grad():
        cosine, sine = embedding(torch.zeros(1, 1, 2), torch.zeros(1, 1, dtype=torch.int64))
        for columns in (1, 2):
            probe = torch.zeros(1, 1, 1, cosine.shape[-1] * columns)
            try:
                rotated = apply(probe, probe, cosine, sine)[1]
            except RuntimeError:
                continue
            if rotated.shape == probe.shape:
                return columns
    raise AssertionError((type(embedding), cosine.shape))
