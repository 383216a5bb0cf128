"""Loads checkpoints as targets."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from hasten.accel.cache.base import CacheBudget, CacheMethod
from hasten.accel.cache.full import Full
from hasten.accel.cache.prompt.base import PromptMethod
from hasten.accel.cache.prompts import load_draft
from hasten.accel.cache.statistics import Statistics
from hasten.accel.cache.statistics import load as load_statistics
from hasten.accel.decoding.targets.base import FAST_PATHS, Target
from hasten.accel.decoding.targets.cached import CachedFastTarget, CachedTarget
from hasten.accel.decoding.targets.families import build_decoder, refusal
from hasten.accel.decoding.targets.families.checkpoint_weights import CheckpointWeights
from hasten.accel.decoding.targets.families.weights import ModelWeights, WeightSource
from hasten.accel.decoding.targets.fast import FastTarget
from hasten.accel.decoding.targets.transformers import TransformersTarget
from hasten.accel.errors import UserError
from hasten.accel.models.checkpoint import Checkpoint


@dataclass(frozen=True)
class _Caches:
    """See load_target."""

    method: CacheMethod
    budget: CacheBudget | None
    statistics: Statistics | None


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
    cache: what KV caches keep; None and Full keep everything; with it passes are not compiled, and methods that run
    prompts themselves need the transformers path. cache_budget: where it has one. cache_statistics: file of the
    method's calibrated statistics; None takes them from each prompt.
    """
    config = AutoConfig.from_pretrained(folder)
    method = None if cache is None or isinstance(cache, Full) else cache
    reason = refusal(config)
    if isinstance(method, PromptMethod):
        reason = f"cache={type(method).__name__} runs prompts itself"
    if cache_budget is not None and method is None:
        raise UserError(f"{cache_budget} needs a method that has a budget: give cache=NAME")
    statistics = None if cache_statistics is None or method is None else load_statistics(method, cache_statistics)
    caches = None if method is None else _Caches(method, cache_budget, statistics)
    if path in FAST_PATHS and reason is not None:
        raise UserError(f"path={path} cannot run {folder}: {reason}; give path=transformers or auto")
    if getattr(config, "quantization_config", None) and path != "transformers" and reason is None:
        # torch.compile cannot trace the kernels of packed weights.
        tied, packs = bool(config.tie_word_embeddings), not compiled
        weights = CheckpointWeights(Checkpoint(folder), tied, dtype, torch.device(device), packs)
        return _fast(config, weights, compiled, caches)
    if getattr(config, "quantization_config", None) is not None:
        # Registers the loader of packed embeddings and tied pairs; machines of the GPU checks lack what it imports.
        import hasten.accel.models.transformers_loader  # noqa: F401
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    model.to(device)
    if path == "transformers" or reason is not None:
        if caches is None:
            return TransformersTarget(model, keeps_hidden)
        draft = load_draft(caches.method, dtype, device)
        return CachedTarget(model, caches.method, caches.budget, keeps_hidden, caches.statistics, draft)
    if caches is None:
        return FastTarget.of(model, compiled)
    return _fast(config, ModelWeights(model), compiled, caches)


def _fast(config: Any, weights: WeightSource, compiled: bool, caches: _Caches | None) -> Target:
    decoder = build_decoder(config, weights)
    if caches is None:
        return FastTarget(decoder, compiled)
    shape = shape_of(config, decoder.dtype, decoder.device)
    return CachedFastTarget(decoder, shape, caches.method, caches.budget, caches.statistics)


def shape_of(config: Any, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """A model of a config without weights, whose rotary embedding computes on a device."""
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    decoder: Any = model.get_decoder()
    if getattr(decoder, "rotary_emb", None) is not None:
        decoder.rotary_emb = type(decoder.rotary_emb)(config.get_text_config()).to(device)
    return model
