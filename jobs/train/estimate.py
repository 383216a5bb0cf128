"""Cost estimate of `hasten train`."""

import math

import torch

from hasten.accel.costs import training
from hasten.accel.costs.estimate import Estimate
from hasten.accel.errors import UserError
from hasten.accel.training.data.records import RecordsMeta
from hasten.accel.training.heads.draft_head import DraftHead, TargetFacts
from hasten.accel.training.heads.stored import INT8
from hasten.accel.training.heads.vocabulary import DraftVocabulary
from hasten.jobs.cli.methods import build
from hasten.jobs.dry_run.models import model_of, shapes_of
from hasten.jobs.dry_run.setting import Setting, Shapes
from hasten.jobs.train.options import TrainConfig
from hasten.jobs.train.ranks import in_group

# Share of a packed window that is tokens.
_FILLED = 0.95


def shapes(config: TrainConfig, gpus: int) -> Shapes:
    """Shapes of the target."""
    return shapes_of(model_of("target", config.target, config.dtype, gpus))


def estimate(config: TrainConfig, setting: Setting) -> Estimate:
    """Cost of recording the target and of training the head, if every sequence is as long as it may be."""
    head = build(config.head)
    if not isinstance(head, DraftHead):
        raise UserError(f"the head {type(head).__name__} drafts nothing: train it with hasten train_drafter")
    target = model_of("target", config.target, config.dtype, setting.gpus)
    facts = TargetFacts.of_config(target.architecture.checkpoint.path)
    vocabulary = DraftVocabulary.most_frequent(torch.arange(facts.vocabulary), config.draft_vocabulary)
    with torch.device("meta"):
        network = head.build(facts, vocabulary)
    data, held, train = config.data, config.held_out, config.train
    answers = data.generate and (data.prompt_length or data.source != ["library"])
    prompt = min(data.prompt_length or data.sequence_length, data.sequence_length)
    each = prompt + data.max_new_tokens if answers else data.sequence_length
    held_each = held.prompt_length + held.max_new_tokens if held.generate else data.sequence_length
    recorded = data.sequences * each
    answered = (
        data.sequences * data.max_new_tokens * bool(answers) + held.sequences * held.max_new_tokens * held.generate
    )
    layers = tuple(dict.fromkeys((*head.layers(facts), *data.layers))) or (-1,)
    windows = math.ceil(recorded / (train.window * _FILLED))
    return training.train_head(
        target,
        training.HeadTraining(
            parameters=sum(parameter.numel() for parameter in network.parameters()),
            depth=network.max_depth,
            vocabulary=len(network.vocabulary),
            passes=head.training_passes(train.window),
            target_passes=head.target_passes(network, train.window),
            recorded=recorded + held.sequences * held_each,
            answered=answered,
            in_flight=data.in_flight,
            bytes_per_token=RecordsMeta(layers, data.top, facts.hidden_size, "", "").bytes_per_token(),
            steps=train.steps or max(1, math.ceil(train.epochs * windows / train.batch)),
            batch=train.batch,
            micro_batch=train.micro_batch or train.batch,
            window=train.window,
            measured=held.sequences * (held.max_new_tokens if held.generate else data.sequence_length),
            evaluations=train.evaluations + 1,
            stored=1 if config.store == INT8 else 2,
            ranks=train.ranks if in_group(config) else 0,
            zero=train.zero,
        ),
        config.threads,
        setting.rates,
        setting.gpus,
    )
