"""Estimate of `hasten train_drafter`."""

from hasten.accel.costs import training
from hasten.accel.costs.estimate import Estimate
from hasten.jobs.dry_run.models import model_of, shapes_of
from hasten.jobs.dry_run.setting import Setting, Shapes
from hasten.jobs.train_drafter.options import TrainDrafterConfig


def shapes(config: TrainDrafterConfig, gpus: int) -> Shapes:
    """Shapes of the target."""
    return shapes_of(model_of("target", config.target, config.dtype, gpus))


def estimate(config: TrainDrafterConfig, setting: Setting) -> Estimate:
    """Cost of running both models over the texts and of training the network."""
    text = config.text
    return training.train_drafter(
        model_of("target", config.target, config.dtype, setting.gpus),
        model_of("draft", config.draft, config.dtype, setting.gpus),
        text.sequences + text.held_out,
        text.sequence_length,
        text.batch,
        config.epochs,
        config.blocks,
        1 - config.mixing,
        setting.rates,
        setting.gpus,
    )
