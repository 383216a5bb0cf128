"""`hasten levels`: compresses all layers of a checkpoint at all levels into a level database."""

import logging
from dataclasses import replace
from math import inf
from pathlib import Path
from time import perf_counter, sleep

from hasten.accel.compression.calibration.expert_tokens import expert_tokens
from hasten.accel.compression.calibration.outer import make_outer_levels
from hasten.accel.compression.calibration.settings import Settings
from hasten.accel.compression.levels.database import LevelDatabase
from hasten.accel.compression.levels.level import make_levels, parse_level
from hasten.accel.compression.levels.schemes import SCHEMES
from hasten.accel.errors import UserError
from hasten.accel.models.architecture import Layer
from hasten.accel.models.checkpoint import Checkpoint
from hasten.accel.outputs.resumable import digest, lasting
from hasten.cluster.programs.calibration import CalibrationPass, PassReport
from hasten.cluster.storage.naming import as_given
from hasten.cluster.tracking.tracker import Tracker
from hasten.jobs.cli.methods import build
from hasten.jobs.common.calibration import (
    calibration_settings,
    log_group_sizes,
    open_output,
    original,
    print_expert_tokens,
    run_pass,
)
from hasten.jobs.common.cluster import cluster_session, worker_resources
from hasten.jobs.common.records import Record
from hasten.jobs.common.run import start, tracked
from hasten.jobs.common.schema import plain
from hasten.jobs.common.texts import Texts, print_texts
from hasten.jobs.levels.options import LevelOptions, LevelsConfig

_LOG = logging.getLogger(__name__)
# Intervals of a run that waits for another one.
_SECONDS_BETWEEN_LINES = 60.0
_SECONDS_BETWEEN_TRIES = 0.5


def run(config: LevelsConfig) -> Path:
    """Compress every layer of config.model at every level; returns the path of report.json."""
    started = perf_counter()
    if not (config.bits or config.column_bits or config.sparsities or config.schemes or config.extra_levels):
        raise UserError(
            "bits=[], column_bits=[], sparsities=[], schemes=[] and extra_levels=[] leave no level: give one or more"
        )
    building = DatabaseBuild(config, Path(config.output) if config.output else None, config.overwrite)
    cpus = config.workers * config.threads
    with cluster_session(config, cpus, {"model": building.source}, {"output": building.database.path}):
        building.check()
        run_dir = start(config)
        with tracked(config, "levels", run_dir) as tracker:
            tracker.params(plain(config))
            building.run(tracker)
            metrics = building.metrics() | {"seconds": perf_counter() - started}
            report = {
                "job": "levels",
                "config": plain(config),
                "metrics": metrics,
                "layers": building.facts(),
                "blocks": building.report.blocks,
                "expert_tokens": building.expert_tokens(),
                "levels": building.database.levels,
                **building.texts.report(building.source),
                "output": str(building.database.path),
            }
            path = tracker.report(report)
    print(f"levels: {as_given(building.database.path)}")
    print(
        f"size: {metrics['bytes'] / 2**20:.1f} MiB for {len(building.database.levels)} levels, "
        f"{metrics['bytes_per_weight']:.3f} bytes per weight"
    )
    print_expert_tokens(report)
    print_texts(report)
    return path


class DatabaseBuild:
    """The build of one level database; output=None is a folder named after its settings.

    The constructor writes nothing; UserError if options contradict each other.
    """

    def __init__(self, config: LevelOptions, output: Path | None, overwrite: bool) -> None:
        self.source = original(config.model)
        self.settings = make_settings(config, self.source, output)
        self.texts = Texts(self.source, config.bos, config.template)
        tokens = self.texts.calibrate(config.calibration, self.settings.needs_tokens)
        self._fingerprint = self.settings.fingerprint(Checkpoint(self.source), tokens)
        if output is None:
            # Databases with other settings are in neighbouring folders.
            name = f"{self.settings.output.name}-{digest(lasting(self._fingerprint))[:8]}"
            self.settings = replace(self.settings, output=self.settings.output.with_name(name))
        self._pass = CalibrationPass(self.settings, tokens, config.workers, worker_resources(config))
        self._overwrite = overwrite
        database = self._pass.task.output
        assert isinstance(database, LevelDatabase)
        self.database = database
        database.check(self._fingerprint, overwrite)

    @property
    def report(self) -> PassReport:
        """Cost of the calibration pass."""
        return self._pass.report

    def check(self) -> None:
        """UserError names a damaged tensor; skipped if an earlier run finished some blocks. Inside a Ray session."""
        if self.database.levels and (self._overwrite or not self.database.finished):
            self._pass.check_weights()

    def run(self, tracker: Tracker) -> None:
        """Build the missing blocks of the database; inside a Ray session."""
        self._wait()
        try:
            open_output(self.database, self._fingerprint, self._overwrite, self.texts.origin)
            if self.database.levels:
                log_group_sizes(self.settings.made, self._pass.task.layer_groups)
                run_pass(self._pass, "levels", tracker)
            else:
                self.database.finish()
        finally:
            self.database.release()

    def _wait(self) -> None:
        """Wait until no other run writes the same database, and lock it; finished blocks of the other run are kept."""
        last_line = -inf
        while not self.database.hold():
            # Release resources that the other run may need.
            self._pass.pause()
            if perf_counter() - last_line >= _SECONDS_BETWEEN_LINES:
                last_line = perf_counter()
                _LOG.info("another run builds levels=%s: waiting for it", self.database.path)
            sleep(_SECONDS_BETWEEN_TRIES)

    def facts(self) -> list[Record]:
        """One row for every layer and level."""
        return [row for layer in self._layers() for row in self.database.facts(layer.name).values()]

    def expert_tokens(self) -> Record | None:
        """Calibration tokens of the experts; None where there are none."""
        return expert_tokens(self.database.layer_groups, self.facts(), self.settings.expert_tokens)

    def metrics(self) -> Record:
        """Metrics of the database and of its calibration pass."""
        weights = sum(layer.rows * layer.columns for layer in self._layers())
        return {
            "bytes": self.database.nbytes(),
            "bytes_per_weight": self.database.nbytes() / weights,
            "calibration_seconds": self.report.seconds,
            "cpu_seconds": self.report.cpu_seconds,
            "peak_rss_bytes": self.report.peak_rss_bytes,
            "blocks_resumed": self.report.resumed,
            "calibrator_restarts": self.report.restarts,
        }

    def _layers(self) -> list[Layer]:
        return [layer for groups in self.database.layer_groups for group in groups for layer in group.layers]


def make_settings(config: LevelOptions, source: Path, output: Path | None) -> Settings:
    """Settings of the calibration pass that builds a level database; output=None is runs/levels/NAME."""
    quantizer = build(config.quantizer)
    levels = make_levels(
        config.bits,
        config.group_sizes,
        config.symmetric,
        config.sparsities,
        config.column_bits,
        config.extra_levels,
        config.schemes,
    )
    outer = make_outer_levels(
        config.head_bits, config.embedding_bits, config.head_group_size, config.embedding_group_size
    )
    if outer and not levels:
        raise UserError("head_bits and embedding_bits need levels of the other layers: give bits, or extra_levels")
    if config.bits and config.reference not in config.bits:
        known = ", ".join(str(bits) for bits in sorted(config.bits))
        raise UserError(f"reference={config.reference} is none of bits={known}")
    # The reference level is the grid of `reference` bits with the smallest group size. Without grids it is the last
    # level: that of schemes, the lowest of sparsities, which fall, or the highest of column_bits, which rise.
    # extra_levels count only if there are no others.
    usual = [level for level in levels if level.name not in config.extra_levels] or levels
    named = [*config.extra_levels, *(SCHEMES[scheme] for scheme in config.schemes)]
    grids = [
        level
        for level in levels
        if (scheme := level.loader_scheme) and scheme.weights.kind == "int" and scheme.weights.bits == config.reference
    ]
    # By descending group size; levels that are named, which come last, count where they are the only ones of these
    # bits.
    usual_grids = [level for level in grids if level.name not in named]
    grid = next(reversed(usual_grids), next(iter(grids), None))
    name = f"{source.name}-{type(quantizer).__name__.lower()}"
    return calibration_settings(
        config,
        source,
        output or Path("runs", "levels", name),
        quantizer=quantizer,
        column_quantizer=build(config.column_quantizer),
        pruner=build(config.pruner),
        # Without any level: one that fits every layer.
        level=grid or (usual[-1] if usual else parse_level("w8")),
        levels=levels,
        outer=outer,
    )
