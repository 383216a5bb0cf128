"""Candidates of a search measured on the cluster: on the search's tokens, and in the end on held-out text."""

import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from hasten.jobs.common.schema import SearchConfig

_LOG = logging.getLogger(__name__)


class Measuring:
    """One set of evaluators at a time: two would hold the model twice. Used inside a Ray session.

    database: finished levels. units: what candidates choose for, with errors of their outputs. tokens: (N, T) of the
    search. windows: held-out ones, None where nothing is measured.
    """

    def __init__(
        self, config: SearchConfig, database: Any, units: Sequence[Any], tokens: Any, windows: Any, fitness: Any
    ) -> None:
        from hasten.jobs.common.arithmetic import resolve_device, resolve_dtype

        self.device = resolve_device(config.device)
        self.dtype = resolve_dtype(config.dtype, self.device)
        self._config, self._database, self.units = config, database, list(units)
        self._tokens, self._windows, self._fitness = tokens, windows, fitness
        self._known: list[Any] | None = None
        self._running: tuple[str, Any] | None = None
        self._usage: dict[str, float] = {}

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sequence of the search."""
        return [self._tokens.shape[1]] * len(self._tokens)

    def search(self, genomes: Sequence[Any], sample: Any) -> list[float]:
        """Fitness of candidates on some of the search's tokens."""
        found: list[float] = self._evaluators("search", self._tokens, self._fitness)(genomes, sample)
        return found

    def prefetch(self, lots: Sequence[tuple[Sequence[Any], Any]]) -> None:
        """Measure several lots of candidates, each with its sample, at once; `search` then knows them."""
        self._evaluators("search", self._tokens, self._fitness).prefetch(lots)

    def held_out(self, genome: Any) -> float | None:
        """KL divergence from the original on the held-out text; None where there is none."""
        from hasten.accel.compression.search.evopress import Sample
        from hasten.accel.compression.search.fitness import KL

        if self._windows is None:
            return None
        count, length = self._windows.tokens.shape
        whole = Sample(tuple((number, length) for number in range(count)))
        return float(self._evaluators("held out", self._windows.tokens, KL())([genome], whole)[0])

    def units_with_errors(self) -> list[Any]:
        """The units with the errors that the option `errors` asks for; measured ones are kept beside the levels."""
        from hasten.accel.compression.outputs.resumable import digest
        from hasten.accel.compression.search.errors import with_errors
        from hasten.accel.compression.search.evopress import Sample

        if self._config.errors == "output":
            return self.units
        if self._known is None:
            used = self._tokens[: self._config.search.error_sequences]
            path = self._database.path / "searches" / f"errors-{digest(self._key(used))}.json"
            if path.exists():
                errors = json.loads(path.read_text())
                self._known = [_with(unit, row) for unit, row in zip(self.units, errors, strict=True)]
            else:
                sample = Sample(tuple((number, used.shape[1]) for number in range(len(used))))
                _LOG.info("measuring what each layer costs alone, on %d tokens", sample.tokens)
                scaled = self._config.errors == "kl_scaled"
                self._known = with_errors(self.units, self.search, sample, scaled)
                errors = [[choice.error for choice in unit.choices] for unit in self._known]
                path.parent.mkdir(exist_ok=True)
                self._database.write_json(path, errors)
        return self._known

    def close(self) -> dict[str, float]:
        """End the evaluators; returns what all of them used together, nothing where there were none."""
        if self._running is not None:
            _, evaluators = self._running
            self._running = None
            for name, value in evaluators.close().items():
                if name == "peak_rss_bytes":
                    self._usage[name] = max(self._usage.get(name, 0.0), value)
                else:
                    self._usage[name] = self._usage.get(name, 0.0) + value
        return dict(self._usage)

    def _evaluators(self, what: str, tokens: Any, fitness: Any) -> Any:
        from hasten.cluster.actors.evaluator import EvaluatorSpec
        from hasten.cluster.programs.search import Evaluators
        from hasten.cluster.runtime.placement import ActorResources

        if self._running is None or self._running[0] != what:
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
            needs = ActorResources(config.threads, 1 if self.device == "cuda" else 0)
            self._running = what, Evaluators(spec, config.workers, needs)
        return self._running[1]

    def _key(self, tokens: Any) -> dict[str, Any]:
        """Everything that the errors of the units depend on, besides the levels that they are kept beside."""
        from hasten.accel.data.tokens import fingerprint

        return {
            "errors": self._config.errors,
            "units": [[unit.name, *(choice.level for choice in unit.choices)] for unit in self.units],
            "tokens": fingerprint(tokens),
            "fitness": repr(self._fitness),
            "dtype": str(self.dtype),
        }


def _with(unit: Any, errors: Sequence[float]) -> Any:
    choices = zip(unit.choices, errors, strict=True)
    return replace(unit, choices=tuple(replace(choice, error=error) for choice, error in choices))
