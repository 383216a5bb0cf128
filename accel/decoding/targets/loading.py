"""Loads checkpoints as targets."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from hasten.accel.cache.base import CacheBudget, CacheMethod
from hasten.accel.cache.full import Full
from hasten.accel.cache.prompts import load_draft
from hasten.accel.cache.statistics import load as load_statistics
from hasten.accel.decoding.targets.base import FAST_PATHS, Target
from hasten.accel.decoding.targets.cached import CachedTarget
from hasten.accel.decoding.targets.families import build_decoder, refusal
from hasten.accel.decoding.targets.families.checkpoint_weights import CheckpointWeights
from hasten.accel.decoding.targets.fast import FastTarget
from hasten.accel.decoding.targets.transformers import TransformersTarget
from hasten.accel.errors import UserError
from hasten.accel.models.checkpoint import Checkpoint


def load_target(
    folder: Path,
    dtype: torch.dtype,
    device: str = "cpu",
    path: str = "auto",
    keeps_hidden: bool = False,
    compiled: bool = False,
    cache: CacheMethod | None = None,
    cache_budget: CacheBudget | None = None,
    cache_statistics: Path | None = None,
) -> Target:
    """The target of a checkpoint's folder, compressed or not. The fast path never dequantizes a compressed weight.

    path: `transformers` runs the transformers model; `fast` is the fast path of some families, UserError for others;
    `llama` is its older name; `auto` takes the fast path where it can. keeps_hidden: whether passes return the last
    hidden states. compiled: whether passes of the fast path are compiled, for every size of a tree, see FastTarget.
    cache: what KV caches keep, on the transformers path; None and Full keep everything. cache_budget: where it has
    one. cache_statistics: file of the method's calibrated statistics; None takes them from each prompt.
    """
    config = AutoConfig.from_pretrained(folder)
    compresses = not isinstance(cache, Full | None)
    reason = "its caches cannot be compressed" if compresses else refusal(config)
    if cache_budget is not None and not compresses:
        raise UserError(f"{cache_budget} needs a method that has a budget: give cache=NAME")
    if path in FAST_PATHS and reason is not None:
        raise UserError(f"path={path} cannot run {folder}: {reason}; give path=transformers or auto")
    if getattr(config, "quantization_config", None) and path != "transformers" and reason is None:
        # torch.compile cannot trace the kernels of packed weights.
        tied, packs = bool(config.tie_word_embeddings), not compiled
        weights = CheckpointWeights(Checkpoint(folder), tied, dtype, torch.device(device), packs)
        return FastTarget(build_decoder(config, weights), compiled)
    if getattr(config, "quantization_config", None) is not None:
        # Registers the loader of packed embeddings and tied pairs; machines of the GPU checks lack what it imports.
        import hasten.accel.models.transformers_loader  # noqa: F401
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    model.to(device)
    if cache is not None and compresses:
        statistics = None if cache_statistics is None else load_statistics(cache, cache_statistics)
        draft = load_draft(cache, dtype, device)
        return CachedTarget(model, cache, cache_budget, keeps_hidden, statistics, draft)
    if path == "transformers" or reason is not None:
        return TransformersTarget(model, keeps_hidden)
    return FastTarget.of(model, compiled)
