"""Chooses the layers' levels: measures each level in each layer, and runs an allocator or a searcher."""

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig

from hasten.accel.cache import levels as cache_levels
from hasten.accel.cache.base import CacheLevel
from hasten.accel.cache.full import Full
from hasten.accel.cache.levels import (
    CacheBytes,
    LevelResult,
    Mix,
    MixResult,
    alone,
    cache_units,
    check_levels,
    level_result,
    quality,
)
from hasten.accel.cache.mixed import Mixed
from hasten.accel.cache.statistics import files_of
from hasten.accel.compression.allocators.base import Unit
from hasten.accel.compression.allocators.budgets import allocate, check_allocator, check_budget
from hasten.accel.compression.allocators.exact import Exact
from hasten.accel.compression.search.base import AllocationMethod, Problem, Searcher
from hasten.accel.compression.search.measurements import Request
from hasten.accel.compression.search.moves import Genome
from hasten.accel.data.parts import Part
from hasten.accel.data.tokens import fingerprint, load_tokens
from hasten.accel.errors import UserError
from hasten.accel.models.checkpoint import Checkpoint, resolve
from hasten.accel.outputs.code_fingerprint import code_fingerprint
from hasten.accel.outputs.resumable import digest, write_whole
from hasten.cluster.programs.cache_mixes import MixInputs, MixOnText, MixResults, measure_mixes
from hasten.cluster.tracking.tracker import Tracker
from hasten.jobs.cli.methods import build, name_of
from hasten.jobs.common import plots
from hasten.jobs.common.arithmetic import resolve_device, resolve_dtype
from hasten.jobs.common.cache_methods import parse_level
from hasten.jobs.common.cache_statistics import chosen_statistics, statistics_fingerprint
from hasten.jobs.common.cluster import worker_resources
from hasten.jobs.common.progress import Progress
from hasten.jobs.common.records import Record
from hasten.jobs.common.tokenizer import begin_of, load_tokenizer, vocabulary_size
from hasten.jobs.search.searching import SavedStates, SearchRun
from hasten.jobs.search_cache.options import SearchCacheConfig

_LOG = logging.getLogger(__name__)
_FULL, _EXACT, _UNIFORM = "full", "exact", "uniform"


def chosen_levels(config: SearchCacheConfig) -> dict[str, CacheLevel]:
    """The levels by name; UserError where they leave no choice, or are none of a single layer."""
    levels = {text: parse_level(text) for text in config.levels}
    check_levels(levels)
    if len(levels) < 2:
        raise UserError(f"levels=[{','.join(levels)}] leave no choice: give two or more")
    return levels


@dataclass(frozen=True)
class Assignment:
    """Names of the layers' levels, by allocator, for one budget; chosen: the name of the allocator that was asked."""

    budget: float
    chosen: str
    by_allocator: Mapping[str, list[str]]

    @property
    def layers(self) -> list[str]:
        """The chosen levels."""
        return self.by_allocator[self.chosen]


class CacheSearch:
    """One run of the job. The constructor writes nothing; UserError if options contradict each other."""

    def __init__(self, config: SearchCacheConfig) -> None:
        self._config = config
        if not config.budget or len(set(config.budget)) < len(config.budget) or min(config.budget) <= 0:
            raise UserError(f"budget={config.budget} is wrong: expected one or more different values above 0")
        self.levels = chosen_levels(config)
        self.model = resolve(config.model).absolute()
        self.output = Path(config.output or Path("runs", "caches", self.model.name)).expanduser().absolute()
        text = AutoConfig.from_pretrained(self.model).get_text_config()
        self._layers = int(text.num_hidden_layers)
        limit, needed = getattr(text, "max_position_embeddings", None), config.context + config.new_tokens
        if limit is not None and needed > limit:
            raise UserError(f"context={config.context} is too long: with new_tokens, {needed} of {limit} positions")
        self._allocator_name = name_of("allocator", str(config.allocator["_target_"]))
        self._allocator: AllocationMethod = build(config.allocator)
        check_allocator(self._allocator.counts_bits, self._allocator_name, CacheBytes(1, 1))
        device = resolve_device(config.device)
        of_model = self.model, resolve_dtype(config.dtype, device), device
        self._tokens = self._load("search", config.sequences)
        if isinstance(self._allocator, Searcher):
            self._allocator = self._allocator.within(self._tokens_to_score)
            self._allocator.check_tokens(self._tokens_to_score)
        unseen = self._load("evaluation", config.evaluation_sequences)
        mixed = Mixed(tuple(self.levels.values()))
        statistics = chosen_statistics(mixed, self.model, config.statistics)
        files = {} if statistics is None else files_of(mixed, statistics)
        self._key = {
            "model": Checkpoint(self.model).fingerprint(),
            "context": config.context,
            "dtype": str(of_model[1]),
            "device": device,
            "torch": torch.__version__,
        }
        calibrated = statistics_fingerprint(mixed, statistics)
        shared = self._key if calibrated is None else {**self._key, "statistics": calibrated}
        self._inputs, self._unseen = (
            MixInputs(
                *of_model,
                tokens,
                config.context,
                digest({**shared, "windows": fingerprint(tokens)}),
                files,
            )
            for tokens in (self._tokens, unseen)
        )
        self._known: dict[tuple[Genome, int], MixResult] = {}
        # Of the tasks of this run.
        self.peak_rss_bytes = 0

    @property
    def _tokens_to_score(self) -> int:
        """Tokens of the search's text as searchers count them: each but the last scores the one behind it."""
        return sum(self._lengths)

    @property
    def _lengths(self) -> list[int]:
        return [self._config.new_tokens + 1] * len(self._tokens)

    def _load(self, role: str, sequences: int) -> Tensor:
        """Windows of a part of the text."""
        config = self._config
        tokenizer = load_tokenizer(self.model, config.template)
        return load_tokens(
            config.source,
            tokenizer,
            sequences,
            config.context + config.new_tokens,
            seed=config.seed,
            vocabulary=vocabulary_size(self.model),
            part=Part(role),
            begin=begin_of(self.model, tokenizer, config.bos),
        )

    def measure_levels(self) -> None:
        """Each level alone in each layer; a finished measurement is a file of the output."""
        folder, names = self.output / "levels", list(self.levels)
        folder.mkdir(parents=True, exist_ok=True)
        files = {
            (layer, name): folder / f"{digest(self._level_key(layer, name))}.json"
            for layer in range(self._layers)
            for name in dict.fromkeys([*names, _FULL])
        }
        missing = [key for key, file in files.items() if not file.exists()]
        tasks: dict[int, list[str]] = {}
        for layer, name in missing:
            tasks.setdefault(layer, []).append(name)
        if len(missing) < len(files):
            _LOG.info("%d of %d levels are in %s already", len(files) - len(missing), len(files), folder)
        windows = range(len(self._tokens))
        work: list[list[MixOnText]] = [
            [(alone(layer, self._level(name), self._layers), number) for name in own for number in windows]
            for layer, own in tasks.items()
        ]
        with Progress("levels", len(files), "level") as progress:
            count = len(files) - len(missing)
            progress.begin(count)

            def done(number: int, found: MixResults) -> None:
                nonlocal count
                layer, own = list(tasks.items())[number]
                self.peak_rss_bytes = max(self.peak_rss_bytes, found.peak_rss_bytes)
                for place, name in enumerate(own):
                    part = found.results[place * len(windows) : (place + 1) * len(windows)]
                    content = json.dumps(asdict(level_result(layer, part)))
                    write_whole(files[layer, name], partial(Path.write_text, data=content))
                count += len(own)
                progress.update(count, f"layer {layer}")

            self._run(self._inputs, work, done)
        results = {key: LevelResult(**json.loads(file.read_text())) for key, file in files.items()}
        self._units = cache_units(
            {(layer, name): result for (layer, name), result in results.items() if name in self.levels},
            self._layers,
            self._config.context,
        )
        full = sum(results[layer, _FULL].held for layer in range(self._layers))
        self._unit = CacheBytes(self._config.context, full)
        for budget in self._config.budget:
            check_budget(self._units, self._unit.limit(budget, self._units), self._unit)

    def assign(self, budget: float, tracker: Tracker) -> Assignment:
        """The levels of a budget: the exact optimum of the errors of single levels, and the allocator's own answer."""
        limit = self._unit.limit(budget, self._units)
        exact = tuple(Exact().choose(self._units, limit))
        answers = {_EXACT: exact}
        if isinstance(self._allocator, Searcher):
            answers[self._allocator_name] = self._searched(self._allocator, budget, limit, exact, tracker)
        else:
            levels = allocate(self._allocator, self._units, limit, self._unit)
            answers[self._allocator_name] = tuple(unit.index(levels[unit.name]) for unit in self._units)
        named = {name: self._names(genome) for name, genome in answers.items()}
        return Assignment(budget, self._allocator_name, named)

    def measured_rows(self, answers: Sequence[Assignment]) -> list[Record]:
        """Every level in all layers, and every assignment, on unseen text; a finished one is a file of the output."""
        rows: list[tuple[Record, Mix]] = []
        for name in dict.fromkeys([_FULL, *self.levels]):
            columns: Record = {"allocator": _UNIFORM, "budget": None, "method": name, "is_chosen": False}
            rows.append((columns, (self._level(name),) * self._layers))
        for answer in answers:
            for allocator, names in answer.by_allocator.items():
                counts = {name: names.count(name) for name in self.levels if name in names}
                columns = {
                    "allocator": allocator,
                    "budget": answer.budget,
                    "method": " ".join(f"{name} ×{count}" for name, count in counts.items()),
                    "is_chosen": allocator == answer.chosen,
                }
                rows.append((columns, tuple(self.levels[name] for name in names)))
        folder = self.output / "mixtures"
        folder.mkdir(parents=True, exist_ok=True)
        files = {mix: folder / f"{digest(self._mix_key(mix))}.json" for _, mix in rows}
        missing = [mix for mix, file in files.items() if not file.exists()]
        windows = range(len(self._unseen.windows))
        with Progress("unseen text", len(files), "mixture") as progress:
            count = len(files) - len(missing)
            progress.begin(count)

            def done(number: int, found: MixResults) -> None:
                nonlocal count
                self.peak_rss_bytes = max(self.peak_rss_bytes, found.peak_rss_bytes)
                values = quality(found.results, self._config.context)
                write_whole(files[missing[number]], partial(Path.write_text, data=json.dumps(values)))
                count += 1
                progress.update(count, f"KL divergence {values['kl_divergence']:.5f}")

            self._run(self._unseen, [[(mix, number) for number in windows] for mix in missing], done)
        return [{**columns, **json.loads(files[mix].read_text())} for columns, mix in rows]

    def level_rows(self) -> list[Record]:
        """Bytes and error of each level alone in each layer."""
        return [
            {"layer": unit.block, "level": choice.level, "bytes": choice.cost, "error": choice.error}
            for unit in self._units
            for choice in unit.choices
        ]

    def figure_rows(self, layers: Sequence[str]) -> list[Record]:
        """Rows of the figure of an assignment."""
        return [
            {"layer": unit.block, "level": name, "bytes": unit.choices[unit.index(name)].cost / self._config.context}
            for unit, name in zip(self._units, layers, strict=True)
        ]

    def _level(self, name: str) -> CacheLevel:
        return self.levels.get(name) or CacheLevel(Full())

    def _names(self, genome: Genome) -> list[str]:
        return [unit.choices[index].level for unit, index in zip(self._units, genome, strict=True)]

    def _mix(self, genome: Genome) -> Mix:
        return tuple(self.levels[name] for name in self._names(genome))

    def _searched(self, searcher: Searcher, budget: float, limit: int, start: Genome, tracker: Tracker) -> Genome:
        """The mixture that a search finds when it starts from the exact optimum."""
        problem = Problem(self._units, limit, self._lengths, self._config.seed, start, self._unit)
        folder = self.output / "searches" / digest(self._search_key(searcher, limit, problem.space.units))
        run = SearchRun(
            self._allocator_name,
            searcher,
            budget,
            problem,
            self._measure,
            SavedStates(folder),
            lambda genome, path: plots.cache_levels(self.figure_rows(self._names(genome)), path),
            tracker,
            "of the full cache" if budget <= 1 else self._unit.name,
        )
        return run.answer().incumbent

    def _measure(self, requests: Sequence[Request]) -> list[list[float]]:
        """Mean divergence of each mixture on each sample."""
        wanted = dict.fromkeys(
            (tuple(genome), number) for genomes, sample in requests for genome in genomes for number, _ in sample.parts
        )
        missing = [pair for pair in wanted if pair not in self._known]
        # Neighbours share a text: a process reads few prompts.
        missing.sort(key=lambda pair: pair[1])
        parts = min(len(missing), 2 * self._config.workers)
        pairs = [missing[len(missing) * part // parts : len(missing) * (part + 1) // parts] for part in range(parts)]

        def done(number: int, found: MixResults) -> None:
            self.peak_rss_bytes = max(self.peak_rss_bytes, found.peak_rss_bytes)
            self._known |= dict(zip(pairs[number], found.results, strict=True))

        self._run(self._inputs, [[(self._mix(genome), number) for genome, number in part] for part in pairs], done)
        return [[self._loss(tuple(genome), sample.parts) for genome in genomes] for genomes, sample in requests]

    def _run(
        self, inputs: MixInputs, work: Sequence[Sequence[MixOnText]], done: Callable[[int, MixResults], None]
    ) -> None:
        if work:
            measure_mixes(inputs, work, self._config.workers, worker_resources(self._config), done)

    def _loss(self, genome: Genome, parts: Sequence[tuple[int, int]]) -> float:
        values = [value for number, used in parts for value in self._known[genome, number].divergences[:used]]
        return math.fsum(values) / len(values)

    def _level_key(self, layer: int, name: str) -> dict[str, Any]:
        """Everything that the measurement of a level depends on."""
        level = self._level(name)
        code = code_fingerprint(level.method, cache_levels)
        return {**self._key, "windows": self._inputs.key, "layer": layer, "level": repr(level), "code": code}

    def _mix_key(self, mix: Mix) -> dict[str, Any]:
        """Everything that the measurement of a mixture on unseen text depends on."""
        code = code_fingerprint([level.method for level in mix], cache_levels)
        return {**self._key, "windows": self._unseen.key, "mix": [repr(level) for level in mix], "code": code}

    def _search_key(self, searcher: Searcher, limit: int, units: Sequence[Unit]) -> dict[str, Any]:
        """Everything that a search depends on."""
        levels = [self.levels[name] for name in self.levels]
        return {
            **self._key,
            "windows": self._inputs.key,
            "code": code_fingerprint(searcher, [level.method for level in levels], cache_levels),
            "allocator": searcher.fingerprint(),
            "limit": limit,
            "levels": [repr(level) for level in levels],
            "errors": [[[choice.level, choice.cost, choice.error] for choice in unit.choices] for unit in units],
            "seed": self._config.seed,
        }
