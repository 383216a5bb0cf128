"""`hasten levels`: a checkpoint in, a database of all its layers at all levels out."""

from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

from jobs.schema import LevelOptions, LevelsConfig


def run(config: LevelsConfig) -> Path:
    """Quantize every layer of config.model at every level; returns the path of report.json."""
    from cluster.session import session
    from cluster.tracking import Tracker
    from jobs.compose import plain
    from jobs.run import start

    started = perf_counter()
    building = Building(config, Path(config.output) if config.output else None, config.overwrite)
    with session(config.address, config.workers * config.threads):
        building.check()
        run_dir = start(config)
        name = config.tracking.name or f"levels-{run_dir.name}"
        with Tracker(config.tracking.uri, config.tracking.experiment, name, run_dir) as tracker:
            tracker.params(plain(config))
            building.run(tracker)
            metrics = building.metrics() | {"seconds": perf_counter() - started}
            report = {
                "job": "levels",
                "config": plain(config),
                "metrics": metrics,
                "layers": building.facts(),
                "blocks": building.report.blocks,
                "levels": building.database.levels,
                "output": str(building.database.path),
            }
            path = tracker.report(report)
    print(f"levels: {building.database.path}")
    print(
        f"size: {metrics['bytes'] / 2**20:.1f} MiB for {len(building.database.levels)} levels, "
        f"{metrics['bytes_per_weight']:.3f} bytes per weight"
    )
    return path


class Building:
    """A level database between its options and its files; output None is the place that its settings name.

    Made before anything is written: UserError where options make no sense together.
    """

    def __init__(self, config: LevelOptions, output: Path | None, overwrite: bool) -> None:
        from accel.compression.levels.database import LevelDatabase
        from accel.models.checkpoint import Checkpoint, resolve
        from accel.models.families import family_of
        from cluster.calibration_pass import CalibrationPass
        from jobs.calibration import calibration_tokens
        from jobs.tokenizer import load_tokenizer

        # Absolute, as the workers of a cluster have other current folders.
        self.source = resolve(config.model).absolute()
        # Before transformers reads the folder, whose errors are no single lines.
        family_of(Checkpoint(self.source).config.get("model_type"))
        self.settings = _settings(config, self.source, output)
        self.tokenizer = load_tokenizer(self.source)
        tokens = calibration_tokens(config.calibration, self.settings.quantizer, self.tokenizer, self.source)
        gpus = 1 if self.settings.device == "cuda" else 0
        self._pass = CalibrationPass(self.settings, tokens, config.workers, gpus)
        self._overwrite = overwrite
        database = self._pass.task.output
        assert isinstance(database, LevelDatabase)
        self.database = database
        self._fingerprint = self.settings.fingerprint(self._pass.task.checkpoint, tokens)
        database.check(self._fingerprint, overwrite)

    @property
    def report(self) -> Any:
        """What the pass cost."""
        return self._pass.report

    def check(self) -> None:
        """UserError that names a damaged tensor, unless some blocks were finished before; inside a Ray session."""
        if self._overwrite or not self.database.finished:
            self._pass.check_weights()

    def check_budget(self, budget: float) -> None:
        """UserError where no mixture of the levels has so many bits per weight; known before there are any."""
        from accel.compression.allocation.base import check_budget
        from accel.compression.levels.units import planned_units

        units = planned_units(self.database)
        check_budget(units, int(budget * sum(unit.weights for unit in units)))

    def run(self, tracker: Any) -> None:
        """Make the database, or what is missing of it; inside a Ray session."""
        from jobs.calibration import run_pass

        self.database.open(self._fingerprint, self._overwrite)
        run_pass(self._pass, "levels", tracker)

    def facts(self) -> list[dict[str, Any]]:
        """One row for every layer and level."""
        return [row for layer in self._layers() for row in self.database.facts(layer).values()]

    def metrics(self) -> dict[str, Any]:
        """Figures of the database and of what it cost."""
        weights = sum(next(iter(self.database.facts(layer).values()))["weights"] for layer in self._layers())
        return {
            "bytes": self.database.nbytes(),
            "bytes_per_weight": self.database.nbytes() / weights,
            "calibration_seconds": self.report.seconds,
            "cpu_seconds": self.report.cpu_seconds,
            "peak_rss_bytes": self.report.peak_rss_bytes,
            "blocks_resumed": self.report.resumed,
            "calibrator_restarts": self.report.restarts,
        }

    def _layers(self) -> Sequence[str]:
        return [layer.name for groups in self.database.plan for group in groups for layer in group.layers]


def _settings(config: LevelOptions, source: Path, output: Path | None) -> Any:
    from accel.compression.formats.pack_quantized import PackQuantized
    from accel.compression.levels.level import make_schemes
    from accel.compression.quantizers.base import Scheme
    from accel.compression.settings import Settings
    from accel.errors import UserError
    from jobs.arithmetic import resolve_device, resolve_dtype
    from jobs.methods import build

    device = resolve_device(config.device)
    quantizer = build(config.quantizer)
    levels = make_schemes(config.bits, config.group_sizes, config.symmetric)
    if config.reference not in config.bits:
        known = ", ".join(str(bits) for bits in sorted(config.bits))
        raise UserError(f"reference={config.reference} is none of bits={known}")
    name = f"{source.name}-{type(quantizer).__name__.lower()}"
    return Settings(
        checkpoint=source,
        output=(output or Path("runs", "levels", name)).expanduser().absolute(),
        quantizer=quantizer,
        scheme=Scheme(config.reference, max(config.group_sizes), config.symmetric),
        format=PackQuantized(),
        levels=levels,
        ignore=tuple(config.ignore),
        skip_first=config.skip_first,
        skip_last=config.skip_last,
        propagate=config.propagate,
        dtype=resolve_dtype(config.dtype, device),
        device=device,
        threads=config.threads,
        batch=config.calibration.batch,
        shards=config.calibration.shards,
        expert_tokens=config.calibration.expert_tokens,
    )
