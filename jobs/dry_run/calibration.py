"""Cost of a calibration pass."""

from hasten.accel.compression.calibration.chunks import check_chunks
from hasten.accel.compression.calibration.layer_groups import common_levels
from hasten.accel.compression.calibration.settings import Settings, all_groups
from hasten.accel.compression.outputs.source import check_source
from hasten.accel.costs.compression import Pass
from hasten.accel.costs.model import Model
from hasten.accel.costs.ranks import Ranks
from hasten.jobs.common.schema import Calibrated
from hasten.jobs.dry_run.setting import Setting


def calibration_pass(
    name: str, model: Model, settings: Settings, config: Calibrated, setting: Setting, ranks: Ranks | None = None
) -> Pass:
    """The pass to estimate; name: the checkpoint's. UserError for settings that the job would refuse.

    ranks: division of every worker; None is one process.
    """
    check_source(model.architecture.checkpoint)
    layer_groups = all_groups(model.architecture, settings)
    sequences = config.calibration.sequences if settings.needs_tokens else 0
    size = 1 if ranks is None else ranks.size
    if sequences:
        check_chunks(min(config.calibration.shards, sequences), config.workers, size)
    return Pass(
        model=model,
        layer_groups=layer_groups,
        methods=[*settings.methods, *([settings.quantizer] if settings.outer else [])],
        sequences=sequences,
        length=config.calibration.sequence_length,
        levels=None if settings.levels is None else common_levels(settings.levels, layer_groups),
        batch=config.calibration.batch,
        shards=config.calibration.shards,
        workers=config.workers * size,
        threads=config.threads,
        gpus=setting.gpus,
        gpu_memory=setting.gpu_memory if setting.gpus else 0,
        nodes=min(setting.nodes, config.workers),
        propagates=config.propagate != "original",
        staged=config.propagate == "sequential",
        ranks=ranks,
        all_experts=config.calibration.all_experts,
        gguf=settings.gguf,
        attention=settings.attention,
        collects=settings.needs_hessian,
        transforms=settings.transforms,
    )
