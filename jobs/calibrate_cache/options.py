"""Options of `hasten calibrate_cache`."""

from dataclasses import dataclass

from hasten.jobs.common.schema import MODEL, SummedTasks, option


@dataclass
class CalibrateCacheConfig(SummedTasks):
    """Take the statistics of KV-cache methods from calibration text, for decode and cache; resumable."""

    model: str = option("embedded:target", f"model whose caches are calibrated: {MODEL}", path="in")
    method: list[str] = option(
        [],
        "methods of conf/cache that have statistics, each with hyper-parameters behind a colon: "
        "[kvquant:bits=2,double_sparsity]; [] is all of them",
    )
    output: str | None = option(
        None,
        "folder of the statistics, a file for each method; null is cache_statistics in the model's own folder, where "
        "decode and cache find them, and runs/cache_statistics/NAME if the model is no folder of yours",
        path="out",
    )
    overwrite: bool = option(False, "calibrate again what an earlier run has calibrated")
