"""Cost estimate of `hasten levels`."""

from pathlib import Path

from hasten.accel.costs import compression
from hasten.accel.costs.compression import Pass
from hasten.accel.costs.estimate import Estimate
from hasten.accel.errors import UserError
from hasten.jobs.dry_run.calibration import calibration_pass
from hasten.jobs.dry_run.models import model_of, with_local_arithmetic
from hasten.jobs.dry_run.setting import Setting
from hasten.jobs.levels.options import LevelOptions
from hasten.jobs.levels.run import make_settings


def estimate(config: LevelOptions, setting: Setting) -> Estimate:
    """Cost of the calibration pass."""
    return compression.estimate(levels_pass(config, setting), setting.rates)


def levels_pass(config: LevelOptions, setting: Setting) -> Pass:
    """The calibration pass that makes a level database."""
    model = model_of("model", config.model, config.dtype, setting.gpus)
    if not (config.bits or config.column_bits or config.sparsities or config.schemes or config.extra_levels):
        raise UserError(
            "bits=[], column_bits=[], sparsities=[], schemes=[] and extra_levels=[] leave no level: give one or more"
        )
    settings = make_settings(
        with_local_arithmetic(config), model.architecture.checkpoint.path, Path("runs", "levels", "planned")
    )
    return calibration_pass(config.model, model, settings, config, setting)
