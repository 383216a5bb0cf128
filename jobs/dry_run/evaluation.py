"""Cost of measuring the quality of a checkpoint."""

import dataclasses

import torch

from hasten.accel.costs import evaluation
from hasten.accel.costs.estimate import Estimate
from hasten.accel.costs.evaluation import Windows
from hasten.accel.costs.model import Model
from hasten.accel.costs.ranks import Ranks
from hasten.jobs.common.schema import Evaluation
from hasten.jobs.dry_run.setting import Setting


def quality(
    options: Evaluation, workers: int, threads: int, model: Model, setting: Setting, ranks: Ranks | None = None
) -> Estimate:
    """Cost of evaluating the compressed checkpoint in float32, next to the original. ranks: of each worker."""
    exact = dataclasses.replace(model, dtype=torch.float32)
    return evaluation.estimate(
        exact,
        windows(options),
        setting.rates,
        original=exact,
        packed=True,
        workers=workers,
        threads=threads,
        gpus=setting.gpus,
        ranks=ranks,
    )


def windows(options: Evaluation) -> Windows:
    """Windows of the evaluation text."""
    length, stride = options.sequence_length, options.stride or options.sequence_length
    return Windows(-(-options.sequences * length // stride), length)
