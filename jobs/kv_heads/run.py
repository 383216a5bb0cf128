"""`hasten kv_heads`: a checkpoint with fewer heads of keys and values."""

from pathlib import Path
from time import perf_counter

from hasten.accel.compression.kv_heads import checkpoint as kv_heads_checkpoint
from hasten.accel.compression.kv_heads.checkpoint import KVHeadsFolder
from hasten.accel.compression.kv_heads.folding import KVHeads
from hasten.accel.models.architecture import Architecture
from hasten.accel.models.checkpoint import Checkpoint, resolve
from hasten.accel.outputs.code_fingerprint import code_fingerprint
from hasten.accel.outputs.resumable import PROGRESS, digest
from hasten.cluster.programs import cache_calibration
from hasten.cluster.programs.cache_calibration import CacheCalibration, PartSums
from hasten.cluster.runtime.resources import cpu_seconds, peak_rss_bytes
from hasten.cluster.storage.naming import as_given
from hasten.jobs.common.cache_calibration import PARTS, PartFiles, calibration_parts
from hasten.jobs.common.calibration import open_output
from hasten.jobs.common.cluster import cluster_session
from hasten.jobs.common.records import Record
from hasten.jobs.common.run import start, tracked
from hasten.jobs.common.schema import plain
from hasten.jobs.common.texts import print_texts
from hasten.jobs.kv_heads.options import KVHeadsConfig


def run(config: KVHeadsConfig) -> Path:
    """Write the checkpoint; returns the path of report.json."""
    started = perf_counter()
    method = KVHeads(config.group, config.keys)
    model = resolve(config.model).absolute()
    parts = calibration_parts(config, model)
    path = Path(config.output or Path("runs", "kv_heads", f"{model.name}-{config.group}")).expanduser().absolute()
    output = KVHeadsFolder(path, Architecture(Checkpoint(model)), method)
    fingerprint: Record = {
        **parts.origin,
        "group": config.group,
        "keys": config.keys,
        "code": code_fingerprint(method, cache_calibration, kv_heads_checkpoint),
    }
    output.check(fingerprint, config.overwrite)
    with cluster_session(config, config.workers * config.threads, {"model": model}, {}):
        # Nothing was written so far: a mistake in the input leaves no files behind.
        run_dir = start(config)
        with tracked(config, "kv_heads", run_dir) as tracker:
            tracker.params(plain(config))
            cost = PartSums((), 0.0, 0)
            try:
                open_output(output, fingerprint, config.overwrite, parts.texts.origin)
                if not output.is_complete:
                    calibration = CacheCalibration(
                        model, [method], parts.tokens, config.batch, parts.dtype, parts.device
                    )
                    cost = _write(config, calibration, output, digest(fingerprint))
            finally:
                output.release()
            report = {
                "job": "kv_heads",
                "config": plain(config),
                "metrics": {
                    "bytes": sum(file.stat().st_size for file in path.glob("*.safetensors")),
                    "seconds": perf_counter() - started,
                    "cpu_seconds": cost.cpu_seconds + cpu_seconds(),
                    "peak_rss_bytes": max(cost.peak_rss_bytes, peak_rss_bytes()),
                },
                "heads": output.heads,
                **parts.texts.report(model),
                "output": str(path),
            }
            tracker.metrics(report["metrics"])
            written = tracker.report(report)
    print(f"{output.heads} KV heads: {as_given(path)}")
    print_texts(report)
    return written


def _write(config: KVHeadsConfig, calibration: CacheCalibration, output: KVHeadsFolder, key: str) -> PartSums:
    """Compute the missing parts and write the missing blocks; returns what this run's parts cost."""
    parts = PartFiles(output.path / PROGRESS / PARTS, key, calibration)
    cost = parts.compute(config)
    method = calibration.methods[0]
    assert isinstance(method, KVHeads)
    statistics = method.solve(parts.total(0))
    for block, own in enumerate(statistics):
        if not output.is_finished(block):
            output.write_folded(block, own)
    output.finish()
    parts.remove()
    return cost
