"""Cost estimate of `hasten compress`."""

from hasten.accel.costs import compression
from hasten.accel.costs.estimate import Estimate
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
    pass_estimate = compression.estimate(
        calibration_pass(config.model, model, settings, config, setting), setting.rates
    )
    return pass_estimate.joined(quality(config.evaluation, config.workers, config.threads, model, setting))
