"""Loads checkpoints as targets."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from hasten.accel.cache.base import CacheBudget, CacheMethod
from hasten.accel.cache.full import Full
from hasten.accel.decoding.targets.base import FAST_PATHS, Target
from hasten.accel.decoding.targets.cached import CachedFastTarget, CachedTarget
from hasten.accel.decoding.targets.families import build_decoder, refusal
from hasten.accel.decoding.targets.families.checkpoint_weights import CheckpointWeights
from hasten.accel.decoding.targets.families.weights import ModelWeights, WeightSource
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
    cache_budget: float | None = None,
) -> Target:
    """The target of a checkpoint's folder, compressed or not. The fast path never dequantizes a compressed weight.

    path: `transformers` runs the transformers model; `fast` is the fast path of some families, UserError for others;
    `llama` is its older name; `auto` takes the fast path where it can. keeps_hidden: whether passes return the last
    hidden states. compiled: whether passes of the fast path are compiled, for every size of a tree, see FastTarget.
    cache: what KV caches keep; None and Full keep everything; with it passes are not compiled. cache_budget: see
    CacheBudget.
    """
    config = AutoConfig.from_pretrained(folder)
    reason = refusal(config)
    budget = None if cache_budget is None else CacheBudget(cache_budget)
    method = None if cache is None or isinstance(cache, Full) else (cache, budget)
    if cache_budget is not None and method is None:
        raise UserError(f"cache_budget={cache_budget:g} needs a method that has a budget: give cache=NAME")
    if path in FAST_PATHS and reason is not None:
        raise UserError(f"path={path} cannot run {folder}: {reason}; give path=transformers or auto")
    if getattr(config, "quantization_config", None) and path != "transformers" and reason is None:
        # torch.compile cannot trace the kernels of packed weights.
        tied, packs = bool(config.tie_word_embeddings), not compiled
        weights = CheckpointWeights(Checkpoint(folder), tied, dtype, torch.device(device), packs)
        return _fast(config, weights, compiled, method)
    if getattr(config, "quantization_config", None) is not None:
        # Registers the loader of packed embeddings and tied pairs; machines of the GPU checks lack what it imports.
        import hasten.accel.models.transformers_loader  # noqa: F401
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    model.to(device)
    if path == "transformers" or reason is not None:
        return TransformersTarget(model, keeps_hidden) if method is None else CachedTarget(model, *method, keeps_hidden)
    if method is None:
        return FastTarget.of(model, compiled)
    return _fast(config, ModelWeights(model), compiled, method)


def _fast(
    config: Any, weights: WeightSource, compiled: bool, method: tuple[CacheMethod, CacheBudget | None] | None
) -> Target:
    decoder = build_decoder(config, weights)
    if method is None:
        return FastTarget(decoder, compiled)
    return CachedFastTarget(decoder, shape_of(config, decoder.device), *method)


def shape_of(config: Any, device: torch.device) -> PreTrainedModel:
    """A model of a config without weights, whose rotary embedding computes on a device."""
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    decoder: Any = model.get_decoder()
    if getattr(decoder, "rotary_emb", None) is not None:
        decoder.rotary_emb = type(decoder.rotary_emb)(config.get_text_config()).to(device)
    return model
