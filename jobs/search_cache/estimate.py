"""Cost estimate of `hasten search_cache`."""

from hasten.accel.compression.search.base import Searcher
from hasten.accel.costs import caches
from hasten.accel.costs.estimate import Estimate
from hasten.jobs.cli.methods import build
from hasten.jobs.dry_run.models import model_of
from hasten.jobs.dry_run.setting import Setting
from hasten.jobs.search_cache.allocation import chosen_levels
from hasten.jobs.search_cache.options import SearchCacheConfig


def estimate(config: SearchCacheConfig, setting: Setting) -> Estimate:
    """Cost of all levels, of the search and of the comparison, as if nothing were measured yet."""
    levels = chosen_levels(config)
    allocator = build(config.allocator)
    available = config.sequences * (config.new_tokens + 1)
    scored = 0
    if isinstance(allocator, Searcher):
        scored = len(config.budget) * allocator.within(available).measured_tokens(available)
    return caches.mixtures(
        caches.MixWork(
            model=model_of("model", config.model, config.dtype, setting.gpus),
            levels=len(levels),
            methods=tuple(level.method for level in levels.values()),
            text=caches.Texts(config.sequences, config.context, config.new_tokens),
            scored=scored,
            mixtures=len(levels) + 2 * len(config.budget),
            unseen=caches.Texts(config.evaluation_sequences, config.context, config.new_tokens),
            workers=config.workers,
            threads=config.threads,
            gpus=setting.gpus,
        ),
        setting.rates,
    )
