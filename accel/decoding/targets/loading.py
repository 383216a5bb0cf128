"""Checkpoints as targets."""

from pathlib import Path
from typing import Any

import torch

from accel.decoding.targets.base import Target

PATHS = ("auto", "transformers", "llama")


def load_target(
    folder: Path, dtype: torch.dtype, device: str = "cpu", path: str = "auto", keeps_hidden: bool = False
) -> Target:
    """The checkpoint of a folder, compressed or not.

    path: `transformers` runs the model as it is; `llama` is the faster path of Llama-like ones, refused for others;
    `auto` takes that where it can. keeps_hidden: whether passes come with the last hidden states.
    """
    from accel.decoding.targets.transformers import TransformersTarget

    return TransformersTarget(_model(folder, dtype, device), keeps_hidden)


def _model(folder: Path, dtype: torch.dtype, device: str) -> Any:
    from transformers import AutoModelForCausalLM

    # As the model's own choice may be a kernel that takes no mask of ours.
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa").to(device)
