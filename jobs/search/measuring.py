"""Measures candidates of a search on the cluster: on the search's tokens, and in the end on held-out text."""

import json
import logging
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from torch import Tensor

from hasten.accel.compression.allocators.base import Unit
from hasten.accel.compression.levels.database import LevelDatabase
from hasten.accel.compression.search import gradient_scores, sensitivity
from hasten.accel.compression.search.errors import with_errors
from hasten.accel.compression.search.fitness import KL, Fitness
from hasten.accel.compression.search.measurements import Request
from hasten.accel.compression.search.moves import Genome, Space
from hasten.accel.compression.search.operating_point import Observation, iterate, observe
from hasten.accel.compression.search.samples import Sample
from hasten.accel.data.tokens import fingerprint
from hasten.accel.evaluation.perplexity import Windows
from hasten.accel.outputs.code_fingerprint import code_fingerprint
from hasten.accel.outputs.resumable import digest
from hasten.cluster.actors.evaluator import EvaluatorSpec
from hasten.cluster.programs.search import Evaluators
from hasten.jobs.common.arithmetic import resolve_device, resolve_dtype
from hasten.jobs.common.cluster import worker_resources
from hasten.jobs.common.progress import Progress
from hasten.jobs.search.options import SearchConfig

_LOG = logging.getLogger(__name__)


class CandidateMeasurer:
    """Measures candidates with one set of evaluators at a time, since two would hold the model twice.

    Used inside a Ray session. database: finished level database. units: the units of a candidate, with output errors.
    tokens: (N, T) of the search. windows: held-out windows, None for no held-out measurement.
    """

    def __init__(
        self,
        config: SearchConfig,
        database: LevelDatabase,
        units: Sequence[Unit],
        tokens: Tensor,
        windows: Windows | None,
        fitness: Fitness,
    ) -> None:
        self.device = resolve_device(config.device)
        self.dtype = resolve_dtype(config.dtype, self.device)
        self._config, self._database, self.units = config, database, list(units)
        self._tokens, self._windows, self._fitness = tokens, windows, fitness
        self._with_errors: dict[int | None, list[Unit]] = {}
        self._running: tuple[str, Evaluators] | None = None
        self._usage: dict[str, float] = {}

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sequence of the search."""
        return [self._tokens.shape[1]] * len(self._tokens)

    def measure(self, requests: Sequence[Request]) -> list[list[float]]:
        """Losses of candidates on samples of the search's tokens, a list per request; requests run in parallel."""
        evaluators = self._evaluators("search", self._tokens, self._fitness)
        evaluators.prefetch(requests)
        return [evaluators(request.genomes, request.sample) for request in requests]

    def held_out(self, genome: Genome) -> float | None:
        """KL divergence from the original on the held-out windows; None if there are none."""
        if self._windows is None:
            return None
        evaluators = self._evaluators("held out", self._windows.tokens, KL())
        return evaluators([genome], _whole(self._windows.tokens))[0]

    def units_with_errors(self, limit: int) -> list[Unit]:
        """The units with errors as the option `errors` says, for a limit of their cost.

        Measurements are saved in the level database, each as soon as it is finished.
        """
        if self._config.errors == "output":
            return self.units
        if self._config.errors == "autoquantize":
            return self._by_gradient_scores()
        # Only errors=gradient depends on the budget.
        key = limit if self._config.errors == "gradient" else None
        if key not in self._with_errors:
            scaled = self._config.errors == "kl_scaled"
            self._with_errors[key] = self._alone(scaled=scaled) if key is None else self._at_operating_point(limit)
        return self._with_errors[key]

    def _alone(self, only: Collection[str] | None = None, scaled: bool = False) -> list[Unit]:
        """Errors of units with all others original; only, scaled: see with_errors."""
        used = self._tokens[: self._config.search.error_sequences]
        key = {"only": None if only is None else sorted(only), "scaled": scaled, "tokens": fingerprint(used)}
        path = self._saved("errors", key)
        if path.exists():
            errors = json.loads(path.read_text())
            return [_with(unit, row) for unit, row in zip(self.units, errors, strict=True)]
        sample = _whole(used)
        _LOG.info("measuring the error of each unit alone, on %d tokens", sample.tokens)
        evaluators = self._evaluators("search", self._tokens, self._fitness)
        measured = with_errors(self.units, evaluators, sample, scaled, only)
        self._database.write_json(path, [[choice.error for choice in unit.choices] for unit in measured])
        return measured

    def _at_operating_point(self, limit: int) -> list[Unit]:
        """Errors at candidates of this cost; those of parts that can be dropped are measured alone."""
        parts = [unit.name for unit in self.units if not unit.layers]
        units = self._alone(parts) if parts else self.units
        start = Space(units, limit).first(1, np.random.default_rng(self._config.seed))[0]
        passes = self._config.search.error_passes
        with Progress("sensitivities", passes, "measurement") as progress:

            def measure(genome: Genome, number: int) -> Observation:
                observation = self._observation(genome, number)
                progress.update(number + 1, f"KL divergence {observation.divergence:.5f}")
                return observation

            return iterate(units, limit, start, passes, measure)

    def _by_gradient_scores(self) -> list[Unit]:
        """Errors by gradient scores at the original; those of parts that can be dropped are measured alone."""
        parts = [unit.name for unit in self.units if not unit.layers]
        units = self._alone(parts) if parts else self.units
        sequences = range(min(self._config.search.error_sequences, len(self._tokens)))
        key = {
            "tokens": fingerprint(self._tokens[list(sequences)]),
            "batch": self._config.search.batch,
            "code": code_fingerprint(gradient_scores),
        }
        path = self._saved("scores", key)
        if path.exists():
            scores = json.loads(path.read_text())
        else:
            measured = self._evaluators("search", self._tokens, self._fitness).gradient_scores(sequences)
            tokens = sum(batch.tokens for batch in measured)
            scores = [
                [
                    math.fsum(batch.values[place][choice] for batch in measured) / tokens
                    for choice in range(len(unit.choices))
                ]
                for place, unit in enumerate(units)
            ]
            self._database.write_json(path, scores)
        return [_with(unit, row) if unit.layers else unit for unit, row in zip(units, scores, strict=True)]

    def _observation(self, genome: Genome, number: int) -> Observation:
        """Measurement `number` of a search's sensitivities; each takes the next sequences."""
        count, available = self._config.search.error_sequences, len(self._tokens)
        sequences = sorted((number * count + place) % available for place in range(min(count, available)))
        path = self._saved(
            "parts",
            {
                "genome": list(genome),
                "tokens": fingerprint(self._tokens[sequences]),
                "batch": self._config.search.batch,
                "code": code_fingerprint(sensitivity),
            },
        )
        if path.exists():
            return Observation.from_json(json.loads(path.read_text()))
        evaluators = self._evaluators("search", self._tokens, self._fitness)
        observation = observe(genome, evaluators.sensitivities(genome, sequences))
        self._database.write_json(path, observation.to_json())
        return observation

    def _saved(self, kind: str, key: Mapping[str, object]) -> Path:
        """File in the level database of measurements of the units with this key; its folder exists."""
        of_units = {
            "units": [[unit.name, *(choice.level for choice in unit.choices)] for unit in self.units],
            "fitness": repr(self._fitness),
            "dtype": str(self.dtype),
        }
        folder = self._database.path / "searches"
        folder.mkdir(exist_ok=True)
        return folder / f"{kind}-{digest(of_units | dict(key))}.json"

    def close(self) -> dict[str, float]:
        """Stop the evaluators; returns the resources that all of them used, empty if there were none."""
        if self._running is not None:
            _, evaluators = self._running
            self._running = None
            for name, value in evaluators.close().items():
                if name == "peak_rss_bytes":
                    self._usage[name] = max(self._usage.get(name, 0.0), value)
                else:
                    self._usage[name] = self._usage.get(name, 0.0) + value
        return dict(self._usage)

    def _evaluators(self, text: str, tokens: Tensor, fitness: Fitness) -> Evaluators:
        """The evaluators for one text, `search` or `held out`; those for the other text are stopped first."""
        if self._running is None or self._running[0] != text:
            self.close()
            config = self._config
            spec = EvaluatorSpec(
                checkpoint=self._database.source,
                levels=self._database.path,
                units=tuple(self.units),
                tokens=tokens,
                fitness=fitness,
                dtype=self.dtype,
                device=self.device,
                threads=config.threads,
                batch=config.search.batch,
            )
            self._running = text, Evaluators(spec, config.workers, worker_resources(config))
        return self._running[1]


def _whole(tokens: Tensor) -> Sample:
    """The sample of all tokens (N, T)."""
    return Sample(tuple((number, tokens.shape[1]) for number in range(len(tokens))))


def _with(unit: Unit, errors: Sequence[float]) -> Unit:
    choices = zip(unit.choices, errors, strict=True)
    return replace(unit, choices=tuple(replace(choice, error=error) for choice, error in choices))
