"""The evaluator actor: it measures candidates of a search, and the units' parts of a candidate's divergence."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from hasten.accel.compression.allocators.base import Unit
from hasten.accel.compression.levels.database import LevelDatabase
from hasten.accel.compression.search.candidates import Candidates
from hasten.accel.compression.search.fitness import Fitness
from hasten.accel.compression.search.gradient_scores import GradientScorePass, Scores
from hasten.accel.compression.search.moves import Genome
from hasten.accel.compression.search.samples import Sample
from hasten.accel.compression.search.sensitivity import Sensitivity, SensitivityPass
from hasten.accel.models.architecture import Architecture
from hasten.cluster.runtime.resources import cpu_seconds, peak_rss_bytes, release_memory


@dataclass(frozen=True)
class EvaluatorSpec:
    """Arguments of an evaluator, as picklable values. tokens: (N, T). dtype: of the arithmetic."""

    checkpoint: Path
    levels: Path
    units: tuple[Unit, ...]
    tokens: Tensor
    fitness: Fitness
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    threads: int = 1
    batch: int = 4
    cache_bytes: int = 2**30


class Evaluator:
    """A model in one process whose layers are swapped for each candidate; it is loaded at the first call of `losses`.

    `sensitivities` and `gradient_scores` do not load it: they read one block at a time.
    """

    def __init__(self, spec: EvaluatorSpec) -> None:
        torch.set_num_threads(spec.threads)
        torch.set_grad_enabled(False)
        self._spec = spec
        self._candidates: Candidates | None = None
        self._opened: tuple[Architecture, LevelDatabase] | None = None
        self._cpu_before: float | None = None

    def losses(self, genomes: Sequence[Genome], sample: Sample) -> Tensor:
        """Sum of losses of every genome on every part of the sample, (genomes, parts) float64."""
        return self._loaded().losses(genomes, sample)

    def sensitivities(self, genome: Genome, batches: Sequence[Sequence[int]]) -> list[Sensitivity]:
        """Each unit's part of a candidate's divergence, for each batch of sequences."""
        architecture, database = self._open()
        spec = self._spec
        sensitivity = SensitivityPass(architecture, spec.units, database.weight, spec.tokens, stored=database)
        return sensitivity.measure(genome, batches)

    def gradient_scores(self, batches: Sequence[Sequence[int]]) -> list[Scores]:
        """Gradient scores of all choices, for each batch of sequences."""
        architecture, database = self._open()
        spec = self._spec
        return GradientScorePass(architecture, spec.units, database.weight, spec.tokens).measure(batches)

    def usage(self) -> dict[str, float]:
        """CPU seconds since the model was first opened, peak memory, and time and counts of evaluations and swaps."""
        release_memory()
        candidates = self._candidates
        return {
            "cpu_seconds": 0.0 if self._cpu_before is None else cpu_seconds() - self._cpu_before,
            "peak_rss_bytes": peak_rss_bytes(),
            "seconds": candidates.seconds if candidates else 0.0,
            "swap_seconds": candidates.swap_seconds if candidates else 0.0,
            "block_runs": candidates.block_runs if candidates else 0,
            "swapped": candidates.swapped if candidates else 0,
        }

    def _loaded(self) -> Candidates:
        if self._candidates is None:
            spec = self._spec
            architecture, database = self._open()
            self._candidates = Candidates(
                architecture,
                spec.units,
                database.weight,
                spec.tokens,
                spec.fitness,
                batch=spec.batch,
                cache_bytes=spec.cache_bytes,
                stored=database,
            )
        return self._candidates

    def _open(self) -> tuple[Architecture, LevelDatabase]:
        if self._opened is None:
            spec = self._spec
            checkpoint = LevelDatabase.checkpoint_of(spec.levels, spec.checkpoint)
            architecture = Architecture(checkpoint, spec.dtype, spec.device, as_served=False)
            self._opened = architecture, LevelDatabase.read(spec.levels, architecture)
            self._cpu_before = cpu_seconds()
        return self._opened
