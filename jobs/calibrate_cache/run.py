"""`hasten calibrate_cache`: statistics of KV-cache methods from calibration text."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

from hasten.accel.cache.base import CacheMethod
from hasten.accel.cache.calibrated import Calibrated, settings
from hasten.accel.cache.statistics import FOLDER, file_name, read_layers, write_layers
from hasten.accel.errors import UserError
from hasten.accel.models import embedded
from hasten.accel.models.checkpoint import Checkpoint, resolve
from hasten.accel.outputs.code_fingerprint import code_fingerprint
from hasten.accel.outputs.resumable import digest
from hasten.cluster.programs import cache_calibration
from hasten.cluster.programs.cache_calibration import CacheCalibration, PartSums
from hasten.cluster.runtime.resources import cpu_seconds, peak_rss_bytes
from hasten.cluster.storage.naming import as_given
from hasten.jobs.calibrate_cache.options import CalibrateCacheConfig
from hasten.jobs.cli.methods import method_names
from hasten.jobs.common.cache_calibration import PARTS, PartFiles, calibration_parts
from hasten.jobs.common.cache_methods import parse_method
from hasten.jobs.common.cluster import cluster_session
from hasten.jobs.common.records import Record
from hasten.jobs.common.run import start, tracked
from hasten.jobs.common.schema import plain
from hasten.jobs.common.texts import print_texts

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Wanted:
    """A method to calibrate. name: as it was given. file: of its statistics. key: everything that they depend on."""

    name: str
    method: CacheMethod
    file: Path
    key: str

    @property
    def is_finished(self) -> bool:
        """Whether an earlier run has made the file."""
        try:
            return self.file.is_file() and read_layers(self.file).note.get("key") == self.key
        except UserError:
            return False


def run(config: CalibrateCacheConfig) -> Path:
    """Calibrate every method; returns the path of report.json."""
    started = perf_counter()
    chosen = _methods(config.method)
    model = resolve(config.model).absolute()
    parts = calibration_parts(config, model)
    output = _output(config, model)
    wanted = [_wanted(name, method, output, parts.origin) for name, method in chosen]
    missing = [one for one in wanted if config.overwrite or not one.is_finished]
    cpus = config.workers * config.threads
    with cluster_session(config, cpus, {"model": model}, {}):
        # Nothing was written so far: a mistake in the input leaves no files behind.
        run_dir = start(config)
        with tracked(config, "calibrate_cache", run_dir) as tracker:
            tracker.params(plain(config))
            if len(missing) < len(wanted):
                _LOG.info(
                    "%d of %d methods are calibrated already in %s", len(wanted) - len(missing), len(wanted), output
                )
            cost = PartSums((), 0.0, 0)
            if missing:
                methods = [one.method for one in missing]
                calibration = CacheCalibration(model, methods, parts.tokens, config.batch, parts.dtype, parts.device)
                cost = _calibrate(config, calibration, missing, output, as_given(str(model)))
            rows: list[Record] = [
                {"method": one.name, "file": str(one.file), "bytes": one.file.stat().st_size} for one in wanted
            ]
            report = {
                "job": "calibrate_cache",
                "config": plain(config),
                "metrics": {
                    "bytes": sum(row["bytes"] for row in rows),
                    "seconds": perf_counter() - started,
                    "cpu_seconds": cost.cpu_seconds + cpu_seconds(),
                    "peak_rss_bytes": max(cost.peak_rss_bytes, peak_rss_bytes()),
                },
                "statistics": rows,
                **parts.texts.report(model),
                "output": str(output),
            }
            tracker.metrics(report["metrics"])
            path = tracker.report(report)
    for row in rows:
        print(f"statistics of {row['method']}: {as_given(row['file'])} ({row['bytes'] / 2**10:.0f} KiB)")
    print_texts(report)
    return path


def _methods(names: Sequence[str]) -> list[tuple[str, CacheMethod]]:
    """Methods by name, each kind of statistics once; UserError names one that has none."""
    chosen: dict[str, tuple[str, CacheMethod]] = {}
    for name in names or method_names("cache"):
        method = parse_method(name)
        if isinstance(method, Calibrated):
            chosen.setdefault(file_name(method), (name, method))
        elif names:
            known = [other for other in method_names("cache") if isinstance(parse_method(other), Calibrated)]
            raise UserError(f"method={name} has no calibrated statistics: those that have are {', '.join(known)}")
    return list(chosen.values())


def _output(config: CalibrateCacheConfig, model: Path) -> Path:
    """Folder of the statistics."""
    if config.output is not None:
        return Path(config.output).expanduser().absolute()
    own = Path(config.model).expanduser()
    is_local = own.is_dir() and as_given(str(model)) == str(model)
    if is_local and not embedded.reference(model).startswith("embedded:"):
        return model / FOLDER
    return Path("runs", FOLDER, model.name).absolute()


def _wanted(name: str, method: CacheMethod, output: Path, origin: Record) -> _Wanted:
    code = code_fingerprint(method, cache_calibration)
    return _Wanted(name, method, output / file_name(method), digest({**origin, "method": repr(method), "code": code}))


def _calibrate(
    config: CalibrateCacheConfig, calibration: CacheCalibration, missing: Sequence[_Wanted], output: Path, model: str
) -> PartSums:
    """Compute the missing parts, and write the statistics; returns what this run's parts cost."""
    parts = PartFiles(output / PARTS, digest([one.key for one in missing]), calibration)
    cost = parts.compute(config)
    for place, one in enumerate(missing):
        method = one.method
        assert isinstance(method, Calibrated)
        note = {
            "method": type(method).__name__,
            "settings": dict(settings(method)),
            "checkpoint": model,
            "model": Checkpoint(calibration.model).fingerprint(),
            "source": as_given(config.source),
            "sequences": calibration.sequences,
            "sequence_length": config.sequence_length,
            "key": one.key,
        }
        write_layers(one.file, method.solve(parts.total(place)), note)
    parts.remove()
    return cost
