"""Loads checkpoints as targets."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from hasten.accel.decoding.targets.base import Target
from hasten.accel.decoding.targets.llama import LlamaTarget, refusal
from hasten.accel.decoding.targets.transformers import TransformersTarget
from hasten.accel.errors import UserError


def load_target(
    folder: Path,
    dtype: torch.dtype,
    device: str = "cpu",
    path: str = "auto",
    keeps_hidden: bool = False,
    compiled: bool = False,
) -> Target:
    """The target of a checkpoint's folder, compressed or not.

    path: `transformers` runs the transformers model; `llama` is the fast path of Llama-like models, UserError for
    others; `auto` takes the fast path where it can. keeps_hidden: whether passes return the last hidden states.
    compiled: whether the fast path is compiled by torch, which takes a while for every tree size.
    """
    config = AutoConfig.from_pretrained(folder)
    reason = refusal(config)
    if path == "llama" and reason is not None:
        raise UserError(f"path=llama cannot run {folder}: {reason}; give path=transformers or auto")
    if getattr(config, "quantization_config", None) is not None:
        # Registers the loader of packed embeddings and tied pairs; machines of the GPU checks lack what it imports.
        import hasten.accel.models.transformers_loader  # noqa: F401
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    model.to(device)
    if path == "transformers" or reason is not None:
        return TransformersTarget(model, keeps_hidden)
    return LlamaTarget(model, compiled)
