"""Cost estimate of `hasten cache`."""

from hasten.accel.costs import caches
from hasten.accel.costs.estimate import Estimate
from hasten.jobs.cache.options import CacheConfig
from hasten.jobs.cache.run import TEXT, cache_rows, check_tasks
from hasten.jobs.dry_run.models import model_of
from hasten.jobs.dry_run.setting import Setting

# Tokens of the questions and answers of a recall sample, about.
_ASKED = 32


def estimate(config: CacheConfig, setting: Setting) -> Estimate:
    """Cost of all rows, as if none were measured yet."""
    check_tasks(config)
    recalled = sum(task != TEXT for task in config.tasks) * config.samples
    text = caches.Texts(config.sequences, config.context, config.new_tokens) if TEXT in config.tasks else None
    model = model_of("model", config.model, config.dtype, setting.gpus)
    return caches.estimate(
        caches.CacheWork(
            model=model,
            rows=len(cache_rows(config, model.architecture.checkpoint.path)),
            text=text,
            recalled=recalled,
            context=config.context,
            asked=_ASKED,
            workers=config.workers,
            threads=config.threads,
            gpus=setting.gpus,
        ),
        setting.rates,
    )
