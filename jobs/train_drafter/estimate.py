"""Cost estimate of `hasten train_drafter`."""

from hasten.accel.costs import training
from hasten.accel.costs.estimate import Estimate
from hasten.jobs.dry_run.models import model_of, shapes_of
from hasten.jobs.dry_run.setting import Setting, Shapes
from hasten.jobs.train_drafter.head import chosen_head
from hasten.jobs.train_drafter.options import TrainDrafterConfig


def shapes(config: TrainDrafterConfig, gpus: int) -> Shapes:
    """Shapes of the target."""
    return shapes_of(model_of("target", config.target, config.dtype, gpus))


def estimate(config: TrainDrafterConfig, setting: Setting) -> Estimate:
    """Cost of running both models on the texts and of training the head."""
    text, head = config.text, chosen_head(config)
    name = config.draft if head.needs_draft_model else config.target
    draft = model_of("draft", name, config.dtype, setting.gpus)
    return training.train_drafter(
        model_of("target", config.target, config.dtype, setting.gpus),
        draft,
        text.sequences + text.held_out,
        text.sequence_length,
        text.batch,
        head.epochs,
        head.parameters(draft.hidden),
        head.examples_per_token,
        setting.rates,
        setting.gpus,
    )
