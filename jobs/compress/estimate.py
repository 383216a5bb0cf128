"""Cost estimate of `hasten compress`."""

from hasten.accel.costs import compression
from hasten.accel.costs.estimate import Estimate
from hasten.jobs.common.target_group import check_block_options, planned_ranks
from hasten.jobs.compress.options import CompressConfig
from hasten.jobs.compress.run import make_settings
from hasten.jobs.dry_run.calibration import calibration_pass
from hasten.jobs.dry_run.evaluation import quality
from hasten.jobs.dry_run.models import model_of, with_local_arithmetic
from hasten.jobs.dry_run.setting import Setting


def estimate(config: CompressConfig, setting: Setting) -> Estimate:
    """Cost of the calibration pass and of evaluating the checkpoint."""
    model = model_of("model", config.model, config.dtype, setting.gpus)
    settings = make_settings(with_local_arithmetic(config), model.architecture.checkpoint.path)
    check_block_options(config.target_group, calibrates=True)
    ranks = planned_ranks(config.target_group)
    pass_estimate = compression.estimate(
        calibration_pass(config.model, model, settings, config, setting, ranks), setting.rates
    )
    return pass_estimate.joined(quality(config.evaluation, config.workers, config.threads, model, setting, ranks))
