"""Cost estimate of `hasten pretrain`."""

import torch

from hasten.accel.costs.estimate import Estimate
from hasten.accel.costs.training import Training, pretrain
from hasten.accel.errors import UserError
from hasten.jobs.dry_run.models import model_of, shapes_of
from hasten.jobs.dry_run.setting import Setting, Shapes
from hasten.jobs.pretrain.options import PretrainConfig, RecallTraining
from hasten.jobs.pretrain.recall import check


def shapes(config: PretrainConfig, gpus: int) -> Shapes:
    """Shapes of the first model, which is trained in float32."""
    training = getattr(config, config.models[0])
    if isinstance(training, RecallTraining):
        return shapes_of(model_of("recall.base", training.base, "float32", 0))
    return Shapes(torch.float32, training.hidden_size, training.intermediate_size)


def estimate(config: PretrainConfig, setting: Setting) -> Estimate:
    """Cost of training every model through its stages."""
    trainings = []
    for name in config.models:
        one = getattr(config, name)
        if isinstance(one, RecallTraining):
            trainings.append(_recall(one))
            continue
        if not one.depths:
            raise UserError(f"{name}.depths=[] is wrong: expected stages [layers, tokens], each 1 or more")
        trainings.append(
            Training(
                name=name,
                hidden=one.hidden_size,
                inner=one.intermediate_size,
                attention=one.heads * one.head_dim,
                key_values=one.kv_heads * one.head_dim,
                vocabulary=config.vocab_size,
                stages=[(layers, tokens) for layers, tokens in one.depths],
                batch=one.batch,
                length=one.sequence_length,
            )
        )
    return pretrain(trainings, config.workers, config.threads, setting.rates)


def _recall(config: RecallTraining) -> Training:
    """The fine-tuning as a training of all layers at its longest sequences."""
    check(config)
    model = model_of("recall.base", config.base, "float32", 0)
    length = max(stage[0] for stage in config.stages)
    return Training(
        name="recall",
        hidden=model.hidden,
        inner=model.inner,
        attention=model.attention,
        key_values=model.token_bytes // (2 * model.blocks * model.dtype.itemsize),
        vocabulary=model.vocabulary,
        stages=[(model.blocks, config.batch * sum(stage[2] for stage in config.stages))],
        batch=max(1, config.batch // length),
        length=length,
    )
