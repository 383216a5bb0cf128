"""Cost estimate of `hasten replay`."""

from hasten.accel.costs import decoding
from hasten.accel.costs.estimate import DRIVER, Estimate, Process, Step
from hasten.jobs.cli.methods import build
from hasten.jobs.dry_run.models import is_fast, model_of, shapes_of
from hasten.jobs.dry_run.setting import Setting, Shapes
from hasten.jobs.replay.options import ReplayConfig


def shapes(config: ReplayConfig, gpus: int) -> Shapes:
    """Shapes of the draft model, since a replay runs no target."""
    option, name = ("draft", config.draft) if config.draft else ("target", config.target)
    return shapes_of(model_of(option, name, config.dtype, gpus))


def estimate(config: ReplayConfig, setting: Setting) -> Estimate:
    """Cost of drafting along the text at every budget."""
    rates = setting.rates
    base, seconds = {"process": rates.driver_bytes}, 0.0
    phases = {"replay": base}
    steps = config.sequences * (config.sequence_length - config.prompt_length) * len(config.budgets)
    if build(config.drafter).needs_draft_model and config.draft is not None:
        draft = model_of("draft", config.draft, config.dtype, setting.gpus)
        fast, on_device = is_fast(config.path, draft), bool(setting.gpus)
        kept = {**base, "draft model": sum(decoding.weights(draft, fast, on_device).values())}
        phases = {
            "load": {**kept, "model as it is loaded": decoding.loaded_bytes(draft, fast)},
            "replay": {**kept, "draft model's caches": draft.token_bytes * config.sequence_length},
        }
        itemsize = decoding.itemsize_of(draft, fast, on_device)
        for budget in config.budgets:
            one = decoding.pass_work(draft, 1, 1, config.sequence_length, itemsize).seconds(rates)
            seconds += one * min(8, budget) * steps / len(config.budgets)
    seconds += steps * 300 * rates.launch
    process = Process(DRIVER, 1, config.threads, phases, setting.gpus)
    return Estimate((process,), (Step("replay", seconds, seconds),))
