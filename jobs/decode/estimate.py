"""Cost estimate of `hasten decode`."""

from pathlib import Path

from hasten.accel.cache.prompt.base import takes_contexts
from hasten.accel.costs import decoding
from hasten.accel.costs.estimate import Estimate
from hasten.accel.costs.model import Model
from hasten.accel.costs.ranks import Ranks
from hasten.accel.errors import UserError
from hasten.jobs.cli.methods import build
from hasten.jobs.common.prompts import read_prompts
from hasten.jobs.common.target_group import check_options, is_divided, planned_ranks
from hasten.jobs.common.tokenizer import load_tokenizer
from hasten.jobs.decode.draft_length import chosen_draft_length
from hasten.jobs.decode.options import DecodeConfig
from hasten.jobs.dry_run.models import is_fast, model_of, shapes_of
from hasten.jobs.dry_run.setting import Setting, Shapes

# Number, mean length and maximum length, in tokens, of the prompts from the standard library.
_LIBRARY_PROMPTS, _MEAN_PROMPT, _LONGEST_PROMPT = 16, 94, 128


def shapes(config: DecodeConfig, gpus: int) -> Shapes:
    """Shapes of the target."""
    return shapes_of(model_of("target", config.target, config.dtype, gpus))


def estimate(config: DecodeConfig, setting: Setting) -> Estimate:
    """Cost of decoding all prompts, at the tokens per pass that the plan assumes."""
    target = model_of("target", config.target, config.dtype, setting.gpus)
    length = chosen_draft_length(config)
    drafted = length.max_tokens(config.max_draft_tokens)
    drafter = build(config.drafter) if drafted else None
    draft = None
    if drafter is not None and drafter.needs_draft_model:
        if config.draft is None:
            raise UserError(f"drafter={type(drafter).__name__} needs a draft model: give draft=PATH")
        draft = model_of("draft", config.draft, config.dtype, setting.gpus)
    prompts, mean, longest = _prompt_lengths(config, target)
    alone = config.stream
    return decoding.estimate(
        decoding.Decoding(
            target=target,
            prompts=prompts,
            prompt_tokens=mean,
            longest=longest + config.max_new_tokens,
            new_tokens=config.max_new_tokens,
            draft=draft,
            drafted=drafted,
            measures=length.needs_costs,
            in_flight=1 if alone else config.in_flight,
            prefill_chunk=config.prefill_chunk,
            memory_bytes=config.memory_bytes,
            fast=is_fast(config.path, target) and not is_divided(config.target_group),
            workers=1 if alone else config.workers,
            threads=config.threads,
            gpus=setting.gpus,
            tokens_per_pass=setting.tokens_per_pass,
            ranks=_ranks(config, target),
        ),
        setting.rates,
    )


def _ranks(config: DecodeConfig, target: Model) -> Ranks | None:
    """Division of the target; UserError as in a run."""
    check_options(config.target_group, config.path)
    return planned_ranks(config.target_group, target.architecture)


def _prompt_lengths(config: DecodeConfig, target: Model) -> tuple[int, float, int]:
    """Number of prompts, and their mean and maximum length in tokens."""
    if config.prompts is None:
        return _LIBRARY_PROMPTS, _MEAN_PROMPT, _LONGEST_PROMPT
    tokenizer = load_tokenizer(target.architecture.checkpoint.path, config.template)
    prompts = read_prompts(
        Path(config.prompts),
        tokenizer,
        target.vocabulary,
        config.prompt_field,
        config.id_field,
        config.special_tokens,
        takes_contexts(build(config.cache)),
    )
    lengths = [len(prompt.tokens) for prompt in prompts]
    return len(lengths), sum(lengths) / len(lengths), max(lengths)
