"""A budget of bits spread over a model: levels, allocators, evaluators, and the checkpoints that come of them."""

import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

from accel.errors import UserError
from jobs.levels import Building
from jobs.schema import SearchConfig

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Answer:
    """A finished checkpoint: its levels by layer, facts of its layers, and what it was measured to be worth."""

    budget: float
    output: Path
    levels: Mapping[str, str]
    layers: list[dict[str, Any]]
    metrics: dict[str, Any]


class Search:
    """One run of the job; made before anything is written. UserError where options make no sense together."""

    def __init__(self, config: SearchConfig) -> None:
        from accel.data.tokens import load_tokens
        from accel.evaluation.perplexity import load_windows
        from jobs.methods import build
        from jobs.tokenizer import vocabulary_size

        if not config.budget or len(set(config.budget)) < len(config.budget):
            raise UserError(f"budget={config.budget} is wrong: expected one or more different values")
        self._config = config
        self._allocator = build(config.allocator)
        self._fitness = build(config.fitness)
        levels = Path(config.levels).expanduser().absolute() if config.levels else None
        # A database that is given counts as it is; the options of `levels` are for one that is made here.
        self._given = levels
        self._building = Building(config, None, overwrite=False) if levels is None else None
        self._source = self._building.source if self._building else _source(config)
        tokenizer = self._tokenizer()
        tokens, evaluation = config.search, config.evaluation
        vocabulary = vocabulary_size(self._source)
        self._tokens = load_tokens(
            tokens.source, tokenizer, tokens.sequences, tokens.sequence_length, "train", tokens.seed, vocabulary
        )
        self._windows = None
        if evaluation.sequences:
            self._windows = load_windows(
                evaluation.source,
                tokenizer,
                evaluation.sequences,
                evaluation.sequence_length,
                evaluation.stride,
                vocabulary=vocabulary,
            )
        self._compared = self._allocators() if len(config.budget) > 1 else {}
        for allocator in (self._allocator, *self._compared.values()):
            if allocator.needs_evaluation:
                allocator.check_tokens(self._tokens.numel())
        if self._building:
            for budget in config.budget:
                self._building.check_budget(budget)
        self._evaluators: dict[str, Any] = {}
        self._usage: dict[str, float] = {}

    def _tokenizer(self) -> Any:
        from jobs.tokenizer import load_tokenizer

        return load_tokenizer(self._source)

    def check(self) -> None:
        """UserError for what can be known before levels are made; inside a Ray session."""
        if self._building:
            self._building.check()
        else:
            self._open()

    def prepare(self, tracker: Any) -> None:
        """The levels, made where they are not there yet."""
        if self._building:
            self._building.run(tracker)
            self._open()

    def _open(self) -> None:
        from accel.compression.allocation.base import check_budget
        from accel.compression.levels.database import LevelDatabase
        from accel.compression.levels.units import make_units
        from accel.models.architecture import Architecture
        from accel.models.checkpoint import Checkpoint
        from jobs.arithmetic import resolve_device, resolve_dtype

        self._device = resolve_device(self._config.device)
        self._dtype = resolve_dtype(self._config.dtype, self._device)
        path = self._building.database.path if self._building else self._given
        assert path is not None
        self._architecture = Architecture(Checkpoint(self._source), self._dtype)
        self.database = LevelDatabase.read(path, self._architecture)
        self.units = make_units(self.database, self._config.grouping)
        for budget in self._config.budget:
            check_budget(self.units, self._bits(budget))

    def _bits(self, budget: float) -> int:
        """Bits of all units together."""
        return int(budget * sum(unit.weights for unit in self.units))

    def answer(self, budget: float, tracker: Any) -> Answer:
        """The checkpoint of one budget, written and measured."""
        from accel.compression.levels.assemble import mixed_output, write_mixed
        from accel.compression.levels.units import layer_levels
        from accel.evaluation.sizes import sizes
        from accel.models.checkpoint import Checkpoint
        from jobs.progress import Progress

        output = self._output(budget)
        assignment = self._assign(self._name(), self._allocator, budget, tracker)
        levels = layer_levels(self.units, assignment)
        folder = mixed_output(self._architecture, self.database, levels, output)
        folder.open(self._fingerprint(budget) | {"assignment": _digest(levels)}, self._config.overwrite)
        with Progress(f"write {output.name}", self._architecture.num_blocks, "block") as progress:
            layers = write_mixed(folder, self.database, levels, lambda done: progress.update(done, ""))
        metrics = {"budget": budget, **sizes(Checkpoint(output)).metrics()}
        metrics |= self._measured(output)
        tracker.metrics({f"{name}/{budget:g}": value for name, value in metrics.items()})
        return Answer(budget, output, levels, layers, metrics)

    def compare(self, tracker: Any) -> list[dict[str, Any]]:
        """A row for every allocator and budget: bits, and divergence from the original on the held-out text."""
        found = []
        for name, allocator in self._compared.items():
            found += [(name, budget, self._assign(name, allocator, budget, tracker)) for budget in self._config.budget]
        rows = []
        for name, budget, assignment in found:
            rows.append(self._row(name, budget, assignment))
            tracker.metrics({f"{name}/{budget:g}": rows[-1]["kl_divergence"]})
        return rows

    def _allocators(self) -> dict[str, Any]:
        """The allocators to compare by name, the configured one among them."""
        from jobs.methods import build, method_names

        known = method_names("allocator")
        unknown = [name for name in self._config.compare if name not in known]
        if unknown:
            raise UserError(f"compare={unknown[0]} is no allocator: there are {', '.join(known)}")
        names = self._config.compare or known
        others = {name: build({"_target_": _target(name)}) for name in names if name != self._name()}
        return {self._name(): self._allocator} | others

    def _row(self, name: str, budget: float, assignment: Mapping[str, str]) -> dict[str, Any]:
        from accel.compression.allocation.base import size
        from accel.compression.search.evopress import Sample

        genome = tuple(unit.index(assignment[unit.name]) for unit in self.units)
        bits = size(self.units, genome)
        row = {
            "allocator": name,
            "budget": budget,
            "bits_per_weight": bits / sum(unit.weights for unit in self.units),
            "bytes": bits / 8,
            "kl_divergence": None,
        }
        if self._windows is not None:
            count, length = self._windows.tokens.shape
            sample = Sample(tuple((number, length) for number in range(count)))
            row["kl_divergence"] = self._evaluator("held out")([genome], sample)[0]
        return row

    def _assign(self, name: str, allocator: Any, budget: float, tracker: Any) -> dict[str, str]:
        units = self._with_errors() if self._config.errors == "kl" else self.units
        if not allocator.needs_evaluation:
            found: dict[str, str] = allocator.allocate(units, self._bits(budget))
            return found
        from accel.compression.allocation.exact import Exact

        # The optimum of the additive model joins the first candidates: a search need not find again what is known.
        start = Exact().choose(units, self._bits(budget))
        state = self._searched(name, allocator, budget, start, tracker)
        return {unit.name: unit.choices[index].level for unit, index in zip(self.units, state.parent, strict=True)}

    def _searched(self, name: str, allocator: Any, budget: float, start: Sequence[int], tracker: Any) -> Any:
        """Last state of a search, which goes on where an earlier run was stopped."""
        from accel.compression.search.evopress import State
        from jobs.progress import Progress

        # Beside the levels, so that runs with other outputs find it.
        path = self.database.path / "searches" / f"{_digest(self._fingerprint(budget) | {'start': list(start)})}.json"
        state = State.from_json(json.loads(path.read_text())) if path.exists() else None
        with Progress(f"{name} at {budget:g} bits", allocator.generations, "generation") as progress:
            progress.begin(state.generation if state else 0)
            if state and state.generation:
                _LOG.info("%d generations are finished already", state.generation)
            before = [perf_counter()]

            def after(state: Any, info: Any) -> None:
                _replace(path, json.dumps(state.to_json()))
                seconds, before[0] = perf_counter() - before[0], perf_counter()
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

            return allocator.search(
                self.units,
                self._bits(budget),
                self._evaluator("search"),
                [self._tokens.shape[1]] * len(self._tokens),
                self._config.seed,
                state,
                after,
                start,
            )

    def _with_errors(self) -> list[Any]:
        """Units whose errors are the KL divergence with each of them alone at a level, on the search's tokens."""
        from accel.compression.search.candidates import ORIGINAL
        from accel.compression.search.evopress import Sample

        if not hasattr(self, "_by_kl"):
            sample = Sample(tuple((number, self._tokens.shape[1]) for number in range(len(self._tokens))))
            original = (ORIGINAL,) * len(self.units)
            keys = [(unit, choice) for unit, each in enumerate(self.units) for choice in range(len(each.choices))]
            genomes = [(*original[:unit], choice, *original[unit + 1 :]) for unit, choice in keys]
            losses = dict(zip(keys, self._evaluator("search")(genomes, sample), strict=True))
            self._by_kl = [
                replace(
                    unit,
                    choices=tuple(
                        replace(choice, error=max(0.0, losses[number, index]))
                        for index, choice in enumerate(unit.choices)
                    ),
                )
                for number, unit in enumerate(self.units)
            ]
        return self._by_kl

    def _evaluator(self, what: str) -> Any:
        """Evaluators on the search's tokens with its fitness, or on the held-out ones with the KL divergence."""
        from accel.compression.search.fitness import KL
        from cluster.evaluators import Evaluators, Model

        if what not in self._evaluators:
            self._end_evaluators()
            config = self._config
            held_out = what == "held out"
            assert not held_out or self._windows is not None
            model = Model(
                checkpoint=self._source,
                levels=self.database.path,
                units=tuple(self.units),
                tokens=self._windows.tokens if held_out and self._windows is not None else self._tokens,
                fitness=KL() if held_out else self._fitness,
                dtype=self._dtype,
                device=self._device,
                threads=config.threads,
                batch=config.search.batch,
            )
            self._evaluators[what] = Evaluators(model, config.workers, 1 if self._device == "cuda" else 0)
        return self._evaluators[what]

    def _end_evaluators(self) -> None:
        for name in list(self._evaluators):
            for key, value in self._evaluators.pop(name).close().items():
                if key == "peak_rss_bytes":
                    self._usage[key] = max(self._usage.get(key, 0.0), value)
                else:
                    self._usage[key] = self._usage.get(key, 0.0) + value

    def close(self) -> dict[str, Any]:
        """End what is running; returns what levels and evaluators used together."""
        self._end_evaluators()
        made = self._building.metrics() if self._building else {}
        return {
            "cpu_seconds": self._usage.get("cpu_seconds", 0.0) + made.get("cpu_seconds", 0.0),
            "peak_rss_bytes": max(self._usage.get("peak_rss_bytes", 0), made.get("peak_rss_bytes", 0)),
            "levels_cpu_seconds": made.get("cpu_seconds"),
            **{f"search_{name}": value for name, value in self._usage.items()},
        }

    def _measured(self, output: Path) -> dict[str, Any]:
        from cluster.evaluation import measure
        from jobs.progress import Progress

        if self._windows is None:
            return {}
        self._end_evaluators()
        config = self._config
        with Progress("evaluate", min(config.workers, len(self._windows)), "part") as progress:
            measured = measure(
                output,
                self._source,
                self._windows,
                config.workers,
                config.threads,
                device=self._device,
                gpus=1 if self._device == "cuda" else 0,
                progress=lambda done, total: progress.update(done),
            )
        return measured.sums.metrics()

    def _name(self) -> str:
        return str(self._config.allocator["_target_"]).rpartition(".")[2].lower()

    def _output(self, budget: float) -> Path:
        config = self._config
        name = f"{self._source.name}-{self._name()}"
        output = Path(config.output or Path("runs", "models", name)).expanduser().absolute()
        if len(config.budget) == 1:
            return output if config.output else output.with_name(f"{output.name}-{budget:g}")
        return output / f"{budget:g}"

    def _fingerprint(self, budget: float) -> dict[str, Any]:
        from accel.data.tokens import fingerprint

        content = json.loads((self.database.path / ".hasten" / "fingerprint.json").read_text())
        return {
            "levels": _digest(content),
            "budget": budget,
            "allocator": repr(self._allocator),
            "grouping": self._config.grouping,
            "errors": self._config.errors,
            "fitness": repr(self._fitness),
            "search tokens": fingerprint(self._tokens),
            "seed": self._config.seed,
            "dtype": str(self._dtype),
        }


def _source(config: SearchConfig) -> Path:
    from accel.models.checkpoint import Checkpoint, resolve
    from accel.models.families import family_of

    source = resolve(config.model).absolute()
    family_of(Checkpoint(source).config.get("model_type"))
    return source


def _target(allocator: str) -> str:
    import yaml

    from jobs.methods import CONF

    settings = yaml.safe_load((CONF / "allocator" / f"{allocator}.yaml").read_text(encoding="utf-8"))
    return str(settings["_target_"])


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _replace(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)
