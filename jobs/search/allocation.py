"""Spreads a budget of bits over a model: builds the levels, runs the allocators and writes the checkpoints."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from hasten.accel.compression.allocators.base import cost, left_out, size
from hasten.accel.compression.allocators.budgets import allocate, check_allocator, check_budget
from hasten.accel.compression.allocators.exact import Exact
from hasten.accel.compression.allocators.grouping import mixed_modules
from hasten.accel.compression.levels import units
from hasten.accel.compression.levels.assemble import mixed_gguf, mixed_output, write_mixed
from hasten.accel.compression.levels.database import LevelDatabase
from hasten.accel.compression.levels.units import dropped_parts, layer_levels
from hasten.accel.compression.search import candidates
from hasten.accel.compression.search.base import AllocationMethod, Problem, Searcher
from hasten.accel.compression.search.fitness import Fitness
from hasten.accel.compression.search.moves import Genome
from hasten.accel.data.tokens import fingerprint
from hasten.accel.errors import UserError
from hasten.accel.evaluation.perplexity import Windows
from hasten.accel.evaluation.sizes import sizes
from hasten.accel.models.architecture import Architecture
from hasten.accel.models.checkpoint import Checkpoint
from hasten.accel.outputs.code_fingerprint import code_fingerprint
from hasten.accel.outputs.resumable import digest
from hasten.cluster.tracking.tracker import Tracker
from hasten.jobs.cli.methods import build, method_names, name_of, target_of
from hasten.jobs.common.calibration import open_output, original
from hasten.jobs.common.cluster import worker_resources
from hasten.jobs.common.gguf import gguf_options, levels_of_bits
from hasten.jobs.common.plots import level_map
from hasten.jobs.common.progress import Progress
from hasten.jobs.common.quality import measured
from hasten.jobs.common.schema import FORMATS
from hasten.jobs.common.texts import Texts, recorded_origin
from hasten.jobs.levels.run import DatabaseBuild
from hasten.jobs.search.budget import SearchBudget
from hasten.jobs.search.measuring import CandidateMeasurer
from hasten.jobs.search.options import SearchConfig
from hasten.jobs.search.searching import SavedStates, SearchRun

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class WrittenCheckpoint:
    """A written checkpoint with the facts of its layers and its metrics."""

    budget: float
    output: Path
    layers: list[dict[str, object]]
    metrics: dict[str, object]


class Search:
    """One run of the job. The constructor writes nothing; UserError if options contradict each other."""

    def __init__(self, config: SearchConfig) -> None:
        if not config.budget or len(set(config.budget)) < len(config.budget):
            raise UserError(f"budget={config.budget} is wrong: expected one or more different values")
        self._gguf = gguf_options(config.format, config.gguf, config.head_bits, config.embedding_bits)
        config = with_levels_of_format(config)
        self._config = config
        self._name = name_of("allocator", str(config.allocator["_target_"]))
        self._allocator: AllocationMethod = build(config.allocator)
        self._compared = self._allocators() if len(config.budget) > 1 else {}
        self._fitness: Fitness = build(config.fitness)
        # A given database is used as it is; the options of `levels` apply to one that is built here.
        self._database_build = None if config.levels else DatabaseBuild(config, None, overwrite=False)
        self._source = self._database_build.source if self._database_build else original(config.model)
        self.texts = self._database_build.texts if self._database_build else self._recorded_texts()
        self._tokens: Tensor = self.texts.search(config.search)
        self._windows: Windows | None = self.texts.evaluate(config.evaluation)
        for allocator in (self._allocator, *self._compared.values()):
            if isinstance(allocator, Searcher):
                allocator.check_tokens(self._tokens.numel())
        self._architecture, self.database = self._levels()
        self._budget = SearchBudget.of(config, self._architecture, self.database)
        for name, allocator in ({self._name: self._allocator} | self._compared).items():
            check_allocator(allocator.counts_bits, name, self._budget.unit)
        self._check_budgets()
        # Genomes, which are the indices of the units' choices, by allocator and budget.
        self._genomes: dict[tuple[str, float], Genome] = {}
        self._runs: list[SearchRun] = []

    @property
    def original(self) -> Path:
        """Folder of the checkpoint that is compressed."""
        return self._source

    @property
    def reads(self) -> dict[str, Path]:
        """Paths that actors read, by option."""
        return {"model": self._source} | ({} if self._database_build else {"levels": self.database.path})

    @property
    def writes(self) -> dict[str, Path]:
        """Paths that are written and then read by actors, by option."""
        made = {"output": self._output(self._config.budget[0])}
        return made | ({"levels": self.database.path} if self._database_build else {})

    def check(self) -> None:
        """UserError for damaged weights, before levels are built; inside a Ray session."""
        if self._database_build:
            self._database_build.check()

    def prepare(self, tracker: Tracker) -> None:
        """Build the missing levels."""
        if self._database_build:
            self._database_build.run(tracker)
        config = self._config
        units = self._budget.units(config, self.database)
        self._measurer = CandidateMeasurer(config, self.database, units, self._tokens, self._windows, self._fitness)

    def allocate(self, tracker: Tracker) -> None:
        """Run every allocator at every budget, before the evaluators are needed for the held-out text."""
        for name, allocator in ({self._name: self._allocator} | self._compared).items():
            for budget in self._config.budget:
                self._genomes[name, budget] = self._assign(name, allocator, budget, tracker)

    def write(self, budget: float, tracker: Tracker) -> WrittenCheckpoint:
        """Write and measure the checkpoint of one budget."""
        output = self._output(budget)
        units = self._measurer.units
        genome = self._genomes[self._name, budget]
        assignment = {unit.name: unit.choices[index].level for unit, index in zip(units, genome, strict=True)}
        levels, dropped = layer_levels(units, assignment), dropped_parts(units, assignment)
        mixed = [] if self._gguf else mixed_modules(levels)
        if mixed:
            _LOG.warning(
                "%d modules that vLLM and SGLang fuse (q/k/v, gate/up) have layers of several levels, first %s: these "
                "servers cannot load the checkpoint, transformers can; use grouping=serving for servers",
                len(mixed),
                mixed[0],
            )
        folder = (
            mixed_output(self._architecture, self.database, levels, output, dropped)
            if self._gguf is None
            else mixed_gguf(self._architecture, self.database, levels, output, self._gguf, dropped)
        )
        fingerprint = {"levels": digest(self.database.fingerprint), "assignment": digest(assignment)}
        if self._gguf is not None:
            fingerprint["gguf"] = digest(asdict(self._gguf))
        open_output(folder, fingerprint, self._config.overwrite, self.texts.origin)
        try:
            with Progress(f"write {output.name}", self._architecture.num_blocks, "block") as progress:
                layers = write_mixed(folder, self.database, levels, lambda done: progress.update(done, ""))
        finally:
            folder.release()
        weights = sum(unit.weights for unit in units)
        metrics: dict[str, object] = {"budget": budget, "budget_bits_per_weight": size(units, genome) / weights}
        metrics |= {"mixed_fused_modules": len(mixed), "budget_spent": self._spent(genome)}
        metrics |= sizes(Checkpoint(output)).metrics()
        metrics |= self._quality(output)
        tracker.metrics({f"{name}/{budget:g}": value for name, value in metrics.items()})
        return WrittenCheckpoint(budget, output, layers, metrics)

    def compare(self, tracker: Tracker) -> list[dict[str, object]]:
        """A row for every allocator and budget: bits, and KL divergence from the original on the held-out text."""
        rows = []
        for name in self._compared:
            for budget in self._config.budget:
                rows.append(self._row(name, budget, self._genomes[name, budget]))
                tracker.metrics({f"{name}/{budget:g}": rows[-1]["kl_divergence"]})
        return rows

    def close(self) -> dict[str, Any]:
        """Stop the evaluators; returns the resources used by levels and evaluators together."""
        usage = self._measurer.close()
        made = self._database_build.metrics() if self._database_build else {}
        seconds = sum(run.seconds for run in self._runs)
        return {
            "cpu_seconds": usage.get("cpu_seconds", 0.0) + made.get("cpu_seconds", 0.0),
            "peak_rss_bytes": max(usage.get("peak_rss_bytes", 0), made.get("peak_rss_bytes", 0)),
            "levels_cpu_seconds": made.get("cpu_seconds"),
            "candidates_per_second": sum(run.evaluated for run in self._runs) / seconds if seconds else None,
            **{f"search_{name}": value for name, value in usage.items()},
        }

    def _recorded_texts(self) -> Texts:
        """Texts that by default are parts of the one on which the given levels were calibrated."""
        config = self._config
        assert config.levels is not None
        origin = recorded_origin(Path(config.levels).expanduser())
        texts = Texts(self._source, config.bos, config.template, origin, config.cache_folder)
        if origin is None and None in (config.search.source, config.evaluation.source):
            texts.calibrate(config.calibration, is_needed=False)
        return texts

    def _levels(self) -> tuple[Architecture, LevelDatabase]:
        """The model, and its level database, which may not be built yet."""
        if self._database_build:
            database = self._database_build.database
            return Architecture(database.checkpoint), database
        assert self._config.levels is not None
        path = Path(self._config.levels).expanduser().absolute()
        architecture = Architecture(LevelDatabase.checkpoint_of(path, self._source))
        return architecture, LevelDatabase.read(path, architecture)

    def _check_budgets(self) -> None:
        """UserError if no mixture of the levels fits a budget; works before the levels are built."""
        config = self._config
        if not self.database.levels and not config.keep:
            raise UserError(
                "bits=[], column_bits=[], sparsities=[], schemes=[] and extra_levels=[] leave no level: "
                "give one or more of them, or keep=true"
            )
        zero_points = [name for name in self.database.levels if name.endswith("a")]
        if zero_points and {"attention", "mlp"} & set(config.drop):
            raise UserError(
                f"drop=[{','.join(config.drop)}] cannot stand next to levels with zero points ({zero_points[0]}): "
                f"transformers reads these only where all layers have equal bits: use symmetric=true, or drop=[block]"
            )
        units = self._budget.units(config, self.database, solved=False)
        for budget in config.budget:
            check_budget(units, self._budget.unit.limit(budget, units), self._budget.unit)

    def _allocators(self) -> dict[str, AllocationMethod]:
        """The allocators to compare by name, including the configured one."""
        known = method_names("allocator")
        unknown = [name for name in self._config.compare if name not in known]
        if unknown:
            raise UserError(f"compare={unknown[0]} is no allocator: there are {', '.join(known)}")
        names = self._config.compare or known
        others = {name: build({"_target_": target_of("allocator", name)}) for name in names if name != self._name}
        return {self._name: self._allocator} | others

    def _row(self, name: str, budget: float, genome: Sequence[int]) -> dict[str, object]:
        units = self._measurer.units
        bits = size(units, genome)
        return {
            "allocator": name,
            "budget": budget,
            "bits_per_weight": bits / sum(unit.weights for unit in units),
            "bytes": bits / 8,
            "budget_spent": self._spent(genome),
            "kl_divergence": self._measurer.held_out(tuple(genome)),
        }

    def _assign(self, name: str, allocator: AllocationMethod, budget: float, tracker: Tracker) -> Genome:
        """The genome that an allocator or searcher finds for a budget."""
        if isinstance(allocator, Searcher):
            return self._searched(name, allocator, budget, tracker)
        units = self._measurer.units
        limit = self._budget.unit.limit(budget, units)
        if allocator.needs_errors:
            units = self._measurer.units_with_errors(limit)
        levels = allocate(allocator, units, limit, self._budget.unit)
        return tuple(unit.index(levels[unit.name]) for unit in units)

    def _searched(self, name: str, searcher: Searcher, budget: float, tracker: Tracker) -> Genome:
        """The genome that a search finds when it starts from the exact optimum of the additive errors."""
        unit = self._budget.unit
        limit = unit.limit(budget, self._measurer.units)
        units = self._measurer.units_with_errors(limit)
        start = Exact().choose(units, limit)
        problem = Problem(units, limit, self._measurer.lengths, self._config.seed, start, unit)
        run = SearchRun(
            name,
            searcher,
            budget,
            problem,
            self._measurer.measure,
            SavedStates(self.database.path / "searches" / digest(self._key(searcher, budget, problem))),
            self._draw,
            tracker,
        )
        self._runs.append(run)
        return run.answer().incumbent

    def _draw(self, genome: Genome, path: Path) -> Path:
        """Heat map of a genome's levels; returns path."""
        units, rows = self._measurer.units, []
        for unit, index, out in zip(units, genome, left_out(units, genome), strict=True):
            bits = unit.choices[index].bits / unit.weights if unit.weights and not out else 0.0
            rows += [{"layer": layer, "block": unit.block, "bits_per_weight": bits} for layer in unit.layers]
        return level_map(rows, path)

    def _spent(self, genome: Sequence[int]) -> float:
        """What a genome takes of the budget, in the budget's unit."""
        units = self._measurer.units
        return float(self._budget.unit.amount(cost(units, genome), units))

    def _quality(self, output: Path) -> Mapping[str, object]:
        if self._windows is None:
            return {}
        # Stop the evaluators: the memory is needed for the two models of the evaluation.
        self._measurer.close()
        config, device = self._config, self._measurer.device
        quality = measured(output, self._source, self._windows, config.workers, worker_resources(config), device)
        return quality.sums.metrics()

    def _output(self, budget: float) -> Path:
        config = self._config
        name = f"{self._source.name}-{self._name}"
        output = Path(config.output or Path("runs", "models", name)).expanduser().absolute()
        if len(config.budget) == 1:
            return output if config.output else output.with_name(f"{output.name}-{budget:g}")
        return output / f"{budget:g}"

    def _key(self, searcher: Searcher, budget: float, problem: Problem) -> dict[str, object]:
        """Everything that a search depends on, besides the level database in which its states are saved."""
        config = self._config
        return {
            "code": code_fingerprint(searcher, self._fitness, units, candidates),
            "budget": budget,
            "costs": digest([[choice.cost for choice in unit.choices] for unit in problem.space.units]),
            "allocator": searcher.fingerprint(),
            "grouping": config.grouping,
            "keep": config.keep,
            "drop": list(config.drop),
            "start": problem.start and list(problem.start),
            # Searchers choose among their offspring by them.
            "errors": [[choice.error for choice in unit.choices] for unit in problem.space.units],
            "fitness": repr(self._fitness),
            "tokens": fingerprint(self._tokens),
            "seed": config.seed,
            "dtype": str(self._measurer.dtype),
        }


def with_levels_of_format(config: SearchConfig) -> SearchConfig:
    """The options for the format: llama.cpp fuses no layers, and bits stand for its types where schemes gives none."""
    if config.format != FORMATS[1]:
        return config
    config = replace(config, grouping="none")
    if config.levels:
        return config
    return replace(config, bits=[], schemes=config.schemes or levels_of_bits(config.bits, config.reference))
