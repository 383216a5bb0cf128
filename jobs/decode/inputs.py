"""Inputs of `hasten decode`: models, methods, prompts and earlier results, all checked before anything starts."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hasten.accel.cache.base import CacheBudget, CacheMethod, check_budget
from hasten.accel.cache.full import Full
from hasten.accel.cache.mixed import Mixed
from hasten.accel.cache.prompt.base import Drafting, PromptMethod, takes_contexts
from hasten.accel.cache.prompts import check_contexts
from hasten.accel.decoding.drafters.base import Drafter
from hasten.accel.decoding.sampling import Sampling
from hasten.accel.decoding.targets.base import FAST_PATHS
from hasten.accel.errors import UserError
from hasten.accel.models.checkpoint import Checkpoint
from hasten.cluster.actors.verifier import DecodeSpec, sharing_refusal
from hasten.jobs.cli.methods import build
from hasten.jobs.common.arithmetic import dtype_choices, resolve_device
from hasten.jobs.common.cache_statistics import chosen_statistics, statistics_fingerprint
from hasten.jobs.common.prompts import (
    Prompt,
    check_lengths,
    context_length,
    draft_folder,
    library_prompts,
    load_learned,
    model_folder,
    read_prompts,
    with_draft,
)
from hasten.jobs.common.sizes import parse_bytes
from hasten.jobs.common.target_group import check_target, chosen_division
from hasten.jobs.common.tokenizer import load_tokenizer, vocabulary_size
from hasten.jobs.decode.completions import Completions, Record
from hasten.jobs.decode.draft_length import chosen_draft_length
from hasten.jobs.decode.options import DecodeConfig
from hasten.jobs.decode.stopping import Stopping, chosen_stopping
from hasten.jobs.decode.verification import chosen_verifier, verifier_settings


@dataclass(frozen=True)
class Inputs:
    """Checked inputs. kept: earlier results by id. placement: the drafters'."""

    spec: DecodeSpec
    sampling: Sampling
    stopping: Stopping
    prompts: list[Prompt]
    completions: Completions
    kept: dict[str, Record]
    placement: str

    @property
    def missing(self) -> list[Prompt]:
        """Prompts without a result."""
        return [prompt for prompt in self.prompts if prompt.key not in self.kept]


def prepare(config: DecodeConfig) -> Inputs:
    """Load and check all inputs of a run; UserError if options contradict each other."""
    sampling = Sampling(config.temperature, config.top_k, config.top_p, config.repetition_penalty)
    draft_length = chosen_draft_length(config)
    drafter: Drafter | None = build(config.drafter) if draft_length.max_tokens(config.max_draft_tokens) else None
    verifier = chosen_verifier(config, drafter, sampling)
    division = chosen_division(config.target_group, config.path)
    target = model_folder("target", config.target)
    check_target(target, division)
    draft = None
    if drafter is not None:
        drafter.check_target(target)
        draft = draft_folder(config.draft, drafter, target)
    device = resolve_device(config.device)
    tokenizer, vocabulary = load_tokenizer(target, config.template), vocabulary_size(target)
    stopping = chosen_stopping(config, target, tokenizer, vocabulary)
    cache = chosen_cache(config, target)
    if config.prompts is None:
        check_contexts(cache, ())
        prompts = library_prompts(tokenizer, vocabulary)
    else:
        fields = config.prompt_field, config.id_field
        prompts = read_prompts(
            Path(config.prompts), tokenizer, vocabulary, *fields, config.special_tokens, takes_contexts(cache)
        )
    check_lengths(prompts, config.max_new_tokens, context_length(target))
    dtype, *other_dtypes = dtype_choices(config.dtype, device)
    learned = None
    if config.memory and drafter is not None:
        learned = load_learned(Path(config.memory), config.drafter, vocabulary)
    statistics = chosen_statistics(cache, target, config.cache_statistics)
    spec = DecodeSpec(
        target=target,
        vocabulary=vocabulary,
        verifier=verifier,
        drafter=drafter,
        draft=draft,
        dtype=dtype,
        other_dtypes=tuple(other_dtypes),
        device=device,
        threads=config.threads,
        path=config.path,
        compiled=config.compiled,
        in_flight=config.in_flight,
        prefill_chunk=config.prefill_chunk,
        stop=tuple(sorted(stopping.tokens)),
        stop_strings=() if stopping.strings is None else stopping.strings.strings,
        draft_length=draft_length,
        max_draft_tokens=config.max_draft_tokens,
        memory_bytes=config.memory_bytes,
        learned=learned,
        division=division,
        cache=cache,
        cache_budget=chosen_budget(config),
        cache_statistics=statistics,
    )
    output = Path(config.output) if config.output else Path(str(config.run_dir)) / "completions.jsonl"
    completions = Completions(output, _settings(config, spec, sampling), config.overwrite)
    kept = completions.kept()
    for prompt in prompts:
        if prompt.key in kept and kept[prompt.key].get("prompt_token_ids") != prompt.tokens:
            raise UserError(
                f"{prompt.where}: output={output} has a result of another prompt with the id {prompt.key!r}: "
                "give another output, or overwrite=true to start again"
            )
    keys = {prompt.key for prompt in prompts}
    kept = {key: record for key, record in kept.items() if key in keys}
    return Inputs(spec, sampling, stopping, prompts, completions, kept, _placement(config, spec, sampling))


def chosen_cache(config: DecodeConfig, target: Path) -> CacheMethod:
    """The cache method; UserError where it does not fit the budget, the path or the group."""
    method: CacheMethod = build(config.cache)
    budget = chosen_budget(config)
    if isinstance(method, Full):
        if budget is not None:
            raise UserError(f"{budget} needs a method that has a budget: give cache=NAME")
        return method
    if config.path in FAST_PATHS and isinstance(method, PromptMethod):
        name = type(method).__name__
        raise UserError(f"path={config.path} has no cache={name}, which runs prompts itself: give path=auto")
    if config.target_group.size > 1:
        raise UserError(f"target_group.size={config.target_group.size} has no compressed caches yet: give cache=full")
    check_budget(method, budget)
    return with_draft(method, target)


def cache_draft(spec: DecodeSpec) -> Path | None:
    """Folder of the draft model that the cache asks; None if it asks none, or the target."""
    return Path(spec.cache.draft) if isinstance(spec.cache, Drafting) and spec.cache.draft is not None else None


def chosen_budget(config: DecodeConfig) -> CacheBudget | None:
    """The caches' budget; UserError where it is given twice."""
    if config.cache_budget_bytes is None:
        return None if config.cache_budget is None else CacheBudget(config.cache_budget)
    if config.cache_budget is not None:
        raise UserError(
            f"cache_budget={config.cache_budget:g} and cache_budget_bytes={config.cache_budget_bytes} are two budgets: "
            "give one of them"
        )
    return CacheBudget(parse_bytes("cache_budget_bytes", config.cache_budget_bytes), in_bytes=True)


def _placement(config: DecodeConfig, spec: DecodeSpec, sampling: Sampling) -> str:
    """Placement of the drafters before costs are measured: private, shared, or auto."""
    refusal = sharing_refusal(spec, sampling)
    if refusal is not None and config.placement == "shared":
        raise UserError(refusal)
    alone = spec.drafter is None or (config.placement == "auto" and config.workers == 1)
    return "private" if alone or refusal is not None else config.placement


def _settings(config: DecodeConfig, spec: DecodeSpec, sampling: Sampling) -> dict[str, Any]:
    """Settings that determine a completion, apart from its prompt."""
    return {
        "target": Checkpoint(spec.target).fingerprint()[:16],
        "draft": None if spec.draft is None else Checkpoint(spec.draft).fingerprint()[:16],
        "drafter": None if spec.drafter is None else config.drafter,
        "verifier": verifier_settings(config, spec.verifier),
        **vars(sampling),
        "max_new_tokens": config.max_new_tokens,
        "stop": list(spec.stop),
        "stop_strings": sorted(spec.stop_strings) or None,
        "draft_length": config.draft_length if config.draft_tokens is None else None,
        "draft_tokens": config.draft_tokens,
        "max_draft_tokens": config.max_draft_tokens,
        # If every run chooses the dtype by measurement, it is not a setting.
        "dtype": "auto" if spec.other_dtypes else str(spec.dtype).removeprefix("torch."),
        "path": config.path,
        "cache": _cache_settings(config, spec),
        "cache_draft": None if (folder := cache_draft(spec)) is None else Checkpoint(folder).fingerprint()[:16],
        "seed": config.seed,
    }


def _cache_settings(config: DecodeConfig, spec: DecodeSpec) -> dict[str, Any] | None:
    """Settings of a compressed cache. The method's text holds what it read from files, too.

    Statistics count where they are not the prompt's.
    """
    budget = spec.cache_budget
    if spec.cache is None or isinstance(spec.cache, Full):
        return None
    settings = {**config.cache, "budget": None if budget is None or budget.in_bytes else budget.value}
    calibrated = statistics_fingerprint(spec.cache, spec.cache_statistics)
    if calibrated is not None:
        settings["statistics"] = calibrated
    if isinstance(spec.cache, Mixed):
        settings["layers"] = repr(spec.cache.layers)
    return settings if budget is None or not budget.in_bytes else {**settings, "budget_bytes": int(budget.value)}
