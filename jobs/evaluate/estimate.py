"""Cost estimate of `hasten evaluate`."""

from hasten.accel.costs import evaluation
from hasten.accel.costs.estimate import Estimate
from hasten.accel.errors import UserError
from hasten.accel.outputs.resumable import original_of
from hasten.jobs.common.target_group import check_block_options, planned_ranks
from hasten.jobs.dry_run.evaluation import windows
from hasten.jobs.dry_run.models import model_of
from hasten.jobs.dry_run.setting import Setting
from hasten.jobs.evaluate.options import EvaluateConfig


def estimate(config: EvaluateConfig, setting: Setting) -> Estimate:
    """Cost of evaluating the checkpoint; UserError for tasks of lm-eval, which cannot be planned."""
    if config.tasks:
        raise UserError(f"tasks=[{','.join(config.tasks)}] have no plan: lm-eval runs them; leave tasks out")
    model = model_of("model", config.model, config.dtype, setting.gpus)
    folder = model.architecture.checkpoint.path
    recorded = config.original or original_of(folder)
    original = None if recorded is None else model_of("original", str(recorded), config.dtype, setting.gpus)
    check_block_options(config.target_group)
    compared = [model] if original is None else [model, original]
    return evaluation.estimate(
        model,
        windows(config.evaluation),
        setting.rates,
        original=original,
        packed=model.architecture.checkpoint.is_compressed,
        batch=config.batch,
        workers=config.workers,
        threads=config.threads,
        gpus=setting.gpus,
        ranks=planned_ranks(config.target_group, *(one.architecture for one in compared)),
    )
