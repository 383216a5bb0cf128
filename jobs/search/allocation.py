"""A budget of bits spread over a model: levels, allocators, and the checkpoints that come of them."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

from hasten.accel.errors import UserError
from hasten.jobs.levels.run import Building
from hasten.jobs.search.measuring import Measuring
from hasten.jobs.search.options import SearchConfig

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Answer:
    """A finished checkpoint: facts of its layers, and what it was measured to be worth."""

    budget: float
    output: Path
    layers: list[dict[str, Any]]
    metrics: dict[str, Any]


class Search:
    """One run of the job; made before anything is written. UserError where options make no sense together."""

    def __init__(self, config: SearchConfig) -> None:
        from hasten.accel.data.tokens import load_tokens
        from hasten.jobs.cli.methods import build
        from hasten.jobs.common.calibration import original
        from hasten.jobs.common.quality import held_out_windows
        from hasten.jobs.common.tokenizer import load_tokenizer, vocabulary_size

        if not config.budget or len(set(config.budget)) < len(config.budget):
            raise UserError(f"budget={config.budget} is wrong: expected one or more different values")
        self._config = config
        self._name = _method(config.allocator["_target_"])
        self._allocator = build(config.allocator)
        self._compared = self._allocators() if len(config.budget) > 1 else {}
        self._fitness = build(config.fitness)
        # A database that is given counts as it is; the options of `levels` are for one that is made here.
        self._building = None if config.levels else Building(config, None, overwrite=False)
        self._source = self._building.source if self._building else original(config.model)
        tokenizer = load_tokenizer(self._source)
        tokens = config.search
        self._tokens = load_tokens(
            tokens.source,
            tokenizer,
            tokens.sequences,
            tokens.sequence_length,
            "train",
            tokens.seed,
            vocabulary_size(self._source),
        )
        self._windows = held_out_windows(config.evaluation, tokenizer, self._source)
        for allocator in (self._allocator, *self._compared.values()):
            if allocator.needs_evaluation:
                allocator.check_tokens(self._tokens.numel())
        self._architecture, self.database = self._levels()
        self._check_budgets()
        # Choices of the units by allocator and budget, and candidates and seconds of every generation.
        self._genomes: dict[tuple[str, float], tuple[int, ...]] = {}
        self._rates: list[tuple[int, float]] = []

    @property
    def reads(self) -> dict[str, Path]:
        """What actors read, by option."""
        return {"model": self._source} | ({} if self._building else {"levels": self.database.path})

    @property
    def writes(self) -> dict[str, Path]:
        """What is written and then read by actors, by option; levels that are made here go by their model."""
        made = {"output": self._output(self._config.budget[0])}
        return made | ({"levels": self.database.path} if self._building else {})

    def check(self) -> None:
        """UserError for what must be read to be known, before levels are made; inside a Ray session."""
        if self._building:
            self._building.check()

    def prepare(self, tracker: Any) -> None:
        """The levels, made where they are not there yet."""
        from hasten.accel.compression.levels.units import make_units

        if self._building:
            self._building.run(tracker)
        config = self._config
        units = make_units(self.database, config.grouping, config.keep, config.drop)
        self._measuring = Measuring(config, self.database, units, self._tokens, self._windows, self._fitness)

    def allocate(self, tracker: Any) -> None:
        """What every allocator makes of every budget, all of it before the evaluators are needed for other text."""
        for name, allocator in ({self._name: self._allocator} | self._compared).items():
            for budget in self._config.budget:
                self._genomes[name, budget] = self._assign(name, allocator, budget, tracker)

    def answer(self, budget: float, tracker: Any) -> Answer:
        """The checkpoint of one budget, written and measured."""
        from hasten.accel.compression.allocators.base import size
        from hasten.accel.compression.levels.assemble import mixed_output, write_mixed
        from hasten.accel.compression.levels.units import dropped_parts, layer_levels
        from hasten.accel.compression.outputs.resumable import digest
        from hasten.accel.evaluation.sizes import sizes
        from hasten.accel.models.checkpoint import Checkpoint
        from hasten.jobs.common.calibration import open_output
        from hasten.jobs.common.progress import Progress

        output = self._output(budget)
        units = self._measuring.units
        genome = self._genomes[self._name, budget]
        assignment = {unit.name: unit.choices[index].level for unit, index in zip(units, genome, strict=True)}
        levels, dropped = layer_levels(units, assignment), dropped_parts(units, assignment)
        folder = mixed_output(self._architecture, self.database, levels, output, dropped)
        fingerprint = {"levels": digest(self.database.fingerprint), "assignment": digest(assignment)}
        open_output(folder, fingerprint, self._config.overwrite)
        try:
            with Progress(f"write {output.name}", self._architecture.num_blocks, "block") as progress:
                layers = write_mixed(folder, self.database, levels, lambda done: progress.update(done, ""))
        finally:
            folder.release()
        weights = sum(unit.weights for unit in units)
        metrics = {"budget": budget, "budget_bits_per_weight": size(units, genome) / weights}
        metrics |= sizes(Checkpoint(output)).metrics() | self._quality(output)
        tracker.metrics({f"{name}/{budget:g}": value for name, value in metrics.items()})
        return Answer(budget, output, layers, metrics)

    def compare(self, tracker: Any) -> list[dict[str, Any]]:
        """A row for every allocator and budget: bits, and divergence from the original on the held-out text."""
        rows = []
        for name in self._compared:
            for budget in self._config.budget:
                rows.append(self._row(name, budget, self._genomes[name, budget]))
                tracker.metrics({f"{name}/{budget:g}": rows[-1]["kl_divergence"]})
        return rows

    def close(self) -> dict[str, Any]:
        """End what is running; returns what levels and evaluators used together."""
        usage = self._measuring.close()
        made = self._building.metrics() if self._building else {}
        seconds = sum(each for _, each in self._rates)
        return {
            "cpu_seconds": usage.get("cpu_seconds", 0.0) + made.get("cpu_seconds", 0.0),
            "peak_rss_bytes": max(usage.get("peak_rss_bytes", 0), made.get("peak_rss_bytes", 0)),
            "levels_cpu_seconds": made.get("cpu_seconds"),
            "candidates_per_second": sum(count for count, _ in self._rates) / seconds if seconds else None,
            **{f"search_{name}": value for name, value in usage.items()},
        }

    def _levels(self) -> tuple[Any, Any]:
        """The model, and its database, which may still have to be made."""
        from hasten.accel.compression.levels.database import LevelDatabase
        from hasten.accel.models.architecture import Architecture
        from hasten.accel.models.checkpoint import Checkpoint

        architecture = Architecture(Checkpoint(self._source))
        if self._building:
            return architecture, self._building.database
        assert self._config.levels is not None
        return architecture, LevelDatabase.read(Path(self._config.levels).expanduser().absolute(), architecture)

    def _check_budgets(self) -> None:
        """UserError where no mixture of the levels has so many bits per weight; known before there are any."""
        from hasten.accel.compression.allocators.base import check_budget
        from hasten.accel.compression.levels.units import make_units

        config = self._config
        if not self.database.levels and not config.keep:
            raise UserError(
                "bits=[], column_bits=[] and sparsities=[] leave no level: give one or more of them, or keep=true"
            )
        zero_points = [name for name in self.database.levels if name.endswith("a")]
        if zero_points and {"attention", "mlp"} & set(config.drop):
            raise UserError(
                f"drop=[{','.join(config.drop)}] cannot stand next to levels with zero points ({zero_points[0]}): "
                f"transformers reads these only where all layers have equal bits: use symmetric=true, or drop=[block]"
            )
        units = make_units(self.database, config.grouping, config.keep, config.drop, solved=False)
        for budget in config.budget:
            check_budget(units, _bits(units, budget))

    def _allocators(self) -> dict[str, Any]:
        """The allocators to compare by name, the configured one among them."""
        from hasten.jobs.cli.methods import build, method_names

        known = method_names("allocator")
        unknown = [name for name in self._config.compare if name not in known]
        if unknown:
            raise UserError(f"compare={unknown[0]} is no allocator: there are {', '.join(known)}")
        names = self._config.compare or known
        others = {name: build({"_target_": _target(name)}) for name in names if name != self._name}
        return {self._name: self._allocator} | others

    def _row(self, name: str, budget: float, genome: Sequence[int]) -> dict[str, Any]:
        from hasten.accel.compression.allocators.base import size

        units = self._measuring.units
        bits = size(units, genome)
        return {
            "allocator": name,
            "budget": budget,
            "bits_per_weight": bits / sum(unit.weights for unit in units),
            "bytes": bits / 8,
            "kl_divergence": self._measuring.held_out(tuple(genome)),
        }

    def _assign(self, name: str, allocator: Any, budget: float, tracker: Any) -> tuple[int, ...]:
        """Index of the choice of every unit."""
        units = self._measuring.units_with_errors() if allocator.needs_errors else self._measuring.units
        if not allocator.needs_evaluation:
            levels: Mapping[str, str] = allocator.allocate(units, _bits(units, budget))
            return tuple(unit.index(levels[unit.name]) for unit in units)
        from hasten.accel.compression.allocators.exact import Exact

        # The optimum of the additive model joins the first candidates: a search need not find again what is known.
        start = Exact().choose(units, _bits(units, budget))
        found: tuple[int, ...] = self._searched(name, allocator, budget, start, tracker).parent
        return found

    def _searched(self, name: str, allocator: Any, budget: float, start: Sequence[int], tracker: Any) -> Any:
        """Last state of a search, which goes on where an earlier run was stopped."""
        from hasten.accel.compression.outputs.resumable import digest
        from hasten.accel.compression.search.evopress import State
        from hasten.jobs.common.progress import Progress

        # Beside the levels, so that runs with other outputs find it; every generation, so that a search of more
        # generations goes on from one of fewer.
        folder = self.database.path / "searches" / digest(self._key(allocator, budget, start))
        folder.mkdir(parents=True, exist_ok=True)
        finished = [folder / f"{number}.json" for number in range(allocator.generations, -1, -1)]
        known = next((path for path in finished if path.exists()), None)
        state = State.from_json(json.loads(known.read_text())) if known else None
        units = self._measuring.units_with_errors()
        with Progress(f"{name} at {budget:g} bits", allocator.generations, "generation") as progress:
            progress.begin(state.generation if state else 0)
            if state and state.generation:
                _LOG.info("%d generations are finished already", state.generation)
            before = [perf_counter()]

            def after(state: Any, info: Any) -> None:
                self.database.write_json(folder / f"{state.generation}.json", state.to_json())
                seconds = perf_counter() - before[0]
                progress.update(state.generation, f"fitness {state.fitness:.5f}")
                values = {
                    "fitness": state.fitness,
                    "fitness_parent": info.parent_fitness,
                    "tokens": state.tokens,
                    "candidates": state.evaluated,
                    "candidates_per_second": info.evaluated / seconds if seconds else 0.0,
                    "changed": info.changed,
                }
                tracker.metrics({f"{key}/{budget:g}": value for key, value in values.items()}, state.generation)
                if info.changed or not state.generation:
                    self._draw(f"{name}_{budget:g}_generation_{state.generation:04d}.png", state.parent, tracker)
                if state.generation:
                    # The first candidates wait until the evaluators have the model.
                    self._rates.append((info.evaluated, seconds))
                before[0] = perf_counter()

            measuring, seed = self._measuring, self._config.seed
            return allocator.search(
                units,
                _bits(units, budget),
                measuring.search,
                measuring.lengths,
                seed,
                state,
                after,
                start,
                measuring.prefetch,
            )

    def _draw(self, name: str, genome: Sequence[int], tracker: Any) -> None:
        """Heat map of the levels; a generation that changed none has that of the one before."""
        from hasten.accel.compression.allocators.base import left_out
        from hasten.jobs.common.plots import level_map

        units, rows = self._measuring.units, []
        for unit, index, out in zip(units, genome, left_out(units, genome), strict=True):
            bits = unit.choices[index].bits / unit.weights if unit.weights and not out else 0.0
            rows += [{"layer": layer, "block": unit.block, "bits_per_weight": bits} for layer in unit.layers]
        tracker.figure(level_map(rows, tracker.run_dir / "generations" / name))

    def _quality(self, output: Path) -> dict[str, Any]:
        from hasten.jobs.common.quality import measured

        if self._windows is None:
            return {}
        # Their memory is needed for the models to be compared.
        self._measuring.close()
        config, device = self._config, self._measuring.device
        found = measured(output, self._source, self._windows, config.workers, config.threads, device)
        metrics: dict[str, Any] = found.sums.metrics()
        return metrics

    def _output(self, budget: float) -> Path:
        config = self._config
        name = f"{self._source.name}-{self._name}"
        output = Path(config.output or Path("runs", "models", name)).expanduser().absolute()
        if len(config.budget) == 1:
            return output if config.output else output.with_name(f"{output.name}-{budget:g}")
        return output / f"{budget:g}"

    def _key(self, allocator: Any, budget: float, start: Sequence[int]) -> dict[str, Any]:
        """Everything that a search depends on besides the levels that its state is kept beside."""
        from hasten.accel.compression.levels import units
        from hasten.accel.compression.outputs.code_fingerprint import code_fingerprint
        from hasten.accel.compression.search import candidates
        from hasten.accel.data.tokens import fingerprint

        config = self._config
        return {
            "code": code_fingerprint(allocator, self._fitness, units, candidates),
            "budget": budget,
            "allocator": repr(replace(allocator, generations=1)),
            "grouping": config.grouping,
            "keep": config.keep,
            "drop": list(config.drop),
            "start": list(start),
            "fitness": repr(self._fitness),
            "tokens": fingerprint(self._tokens),
            "seed": config.seed,
            "dtype": str(self._measuring.dtype),
        }


def _bits(units: Sequence[Any], budget: float) -> int:
    """Bits of all units together."""
    return int(budget * sum(unit.weights for unit in units))


def _method(target: str) -> str:
    return target.rpartition(".")[2].lower()


def _target(allocator: str) -> str:
    import yaml

    from hasten.jobs.cli.methods import CONF

    settings = yaml.safe_load((CONF / "allocator" / f"{allocator}.yaml").read_text(encoding="utf-8"))
    return str(settings["_target_"])
