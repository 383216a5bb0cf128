"""Evaluators on a cluster: each holds the model once, and together they measure the candidates of a search.

What comes back does not depend on how many there are: every candidate's loss on every sequence is the same to the bit
wherever it is made, and they are added up exactly.
"""

import itertools
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from accel.compression.allocation.base import Unit
from accel.compression.search.candidates import batches
from accel.compression.search.evopress import Genome, Sample
from accel.compression.search.fitness import Fitness
from accel.compression.statistics import split
from cluster.resources import cpu_seconds, peak_rss_bytes, release_memory

_LOG = logging.getLogger(__name__)
# Work that failed so often fails for a reason of its own.
_ATTEMPTS = 10


@dataclass(frozen=True)
class Model:
    """What an evaluator is made of, as plain values. tokens: (N, T); dtype: of the arithmetic."""

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
    """A model in one process, whose layers change from candidate to candidate."""

    def __init__(self, model: Model) -> None:
        torch.set_num_threads(model.threads)
        torch.set_grad_enabled(False)
        from accel.compression.levels.database import LevelDatabase
        from accel.compression.search.candidates import Candidates
        from accel.models.architecture import Architecture
        from accel.models.checkpoint import Checkpoint

        architecture = Architecture(Checkpoint(model.checkpoint), model.dtype, model.device)
        database = LevelDatabase.read(model.levels, architecture)
        self._candidates = Candidates(
            architecture,
            model.units,
            database.weight,
            model.tokens,
            model.fitness,
            batch=model.batch,
            cache_bytes=model.cache_bytes,
        )
        self._cpu_before = cpu_seconds()

    def losses(self, genomes: Sequence[Genome], sample: Sample) -> Tensor:
        """Sum of losses of every genome on every part of the sample, (genomes, parts) float64."""
        return self._candidates.losses(genomes, sample)

    def usage(self) -> dict[str, float]:
        """CPU seconds since the model was there, peak memory, and what swapping took of the evaluations."""
        release_memory()
        return {
            "cpu_seconds": cpu_seconds() - self._cpu_before,
            "peak_rss_bytes": peak_rss_bytes(),
            "seconds": self._candidates.seconds,
            "swap_seconds": self._candidates.swap_seconds,
            "block_runs": self._candidates.block_runs,
            "swapped": self._candidates.swapped,
        }


@dataclass(frozen=True)
class _Call:
    """Candidates that an evaluator measures on some pieces."""

    worker: int
    genomes: tuple[Genome, ...]
    pieces: list[Sample]


def _whole(pieces: Sequence[Sample]) -> Sample:
    return Sample(tuple(part for piece in pieces for part in piece.parts))


class Evaluators:
    """Several evaluators of one model; started at the first use, inside a Ray session.

    What was measured once is never measured again, be it on another sample that has the same sequences in it.
    evaluated: how often a candidate was measured on a batch of sequences.
    """

    def __init__(self, model: Model, workers: int, gpus: float = 0) -> None:
        self._model = model
        self._gpus = gpus
        self._count = workers
        self._workers: list[Any] = []
        # Losses of the parts of each piece that runs at once: those depend on nothing else.
        self._known: dict[tuple[Genome, Sample], tuple[float, ...]] = {}
        self.evaluated = self.restarts = 0

    def __call__(self, genomes: Sequence[Genome], sample: Sample) -> list[float]:
        """Mean loss per scored token of every genome."""
        self.prefetch([(genomes, sample)])
        pieces = batches(sample, self._model.batch)
        length = self._model.tokens.shape[1]
        scored = sum(min(used, length - 1) for _, used in sample.parts)
        return [math.fsum(loss for piece in pieces for loss in self._known[each, piece]) / scored for each in genomes]

    def prefetch(self, lots: Sequence[tuple[Sequence[Genome], Sample]]) -> None:
        """Measure what is not known of some candidates on some samples, all at once: no evaluator waits for a lot."""
        wanted: dict[Sample, set[Genome]] = {}
        for genomes, sample in lots:
            for piece in batches(sample, self._model.batch):
                new = {genome for genome in genomes if (genome, piece) not in self._known}
                if new:
                    wanted.setdefault(piece, set()).update(new)
        calls = [
            _Call(worker, genomes, pieces)
            for worker, items in enumerate(self._shares(wanted))
            for genomes, pieces in self._joined(items)
        ]
        for call, losses in zip(calls, self._run(calls), strict=True):
            for genome, row in zip(call.genomes, losses.tolist(), strict=True):
                values = iter(row)
                for piece in call.pieces:
                    self._known[genome, piece] = tuple(itertools.islice(values, len(piece.parts)))
            self.evaluated += len(call.genomes) * len(call.pieces)

    def close(self) -> dict[str, float]:
        """End the evaluators; returns what they used, added up, and the largest peak of memory."""
        import ray

        try:
            usages = ray.get([worker.usage.remote() for worker in self._workers])
        except ray.exceptions.RayError:
            usages = []
        for worker in self._workers:
            ray.kill(worker)
        self._workers = []
        total = {name: sum(usage[name] for usage in usages) for name in (usages[0] if usages else {})}
        if usages:
            total["peak_rss_bytes"] = max(usage["peak_rss_bytes"] for usage in usages)
        return total

    def _shares(self, wanted: dict[Sample, set[Genome]]) -> list[list[tuple[tuple[Genome, ...], Sample]]]:
        """Candidates and pieces for every evaluator.

        Whole pieces as far as they come out even: all candidates together share the most prefixes. The candidates for
        the rest are cut, sorted, so that neighbours, which share prefixes, stay together.
        """
        items = [(tuple(sorted(genomes)), piece) for piece, genomes in wanted.items()]
        items.sort(key=lambda item: -len(item[0]))
        even = len(items) - len(items) % self._count
        shares = [items[worker : even : self._count] for worker in range(self._count)]
        for genomes, piece in items[even:]:
            for worker, each in enumerate(split(len(genomes), self._count)):
                shares[worker].append((genomes[each.start : each.stop], piece))
        return shares

    def _joined(
        self, items: Sequence[tuple[tuple[Genome, ...], Sample]]
    ) -> list[tuple[tuple[Genome, ...], list[Sample]]]:
        """Pieces of the same candidates together, which saves swaps, where they would still run in the same batches."""
        found: list[tuple[tuple[Genome, ...], list[Sample]]] = []
        for genomes, piece in items:
            if found and found[-1][0] == genomes:
                pieces = [*found[-1][1], piece]
                if batches(_whole(pieces), self._model.batch) == pieces:
                    found[-1] = genomes, pieces
                    continue
            found.append((genomes, [piece]))
        return found

    def _run(self, calls: Sequence["_Call"]) -> list[Tensor]:
        """Results of calls in their order; those of a lost evaluator are done again by its successor."""
        import ray

        if not calls:
            return []
        self._workers = self._workers or [self._start() for _ in range(self._count)]
        results: dict[int, Tensor] = {}
        for attempt in range(1, _ATTEMPTS + 1):
            running = {
                self._workers[call.worker].losses.remote(call.genomes, _whole(call.pieces)): number
                for number, call in enumerate(calls)
                if number not in results
            }
            lost = None
            for reference, number in running.items():
                try:
                    results[number] = ray.get(reference)
                except (ray.exceptions.RayActorError, ray.exceptions.ObjectLostError) as error:
                    if getattr(error, "actor_init_failed", False) or attempt == _ATTEMPTS:
                        raise
                    lost = error
            if lost is None:
                break
            _LOG.warning("lost an evaluator (%s); starting another", str(lost).strip().splitlines()[0])
            self._replace_lost()
        return [results[number] for number in range(len(calls))]

    def _start(self) -> Any:
        import ray

        threads = self._model.threads
        actor = ray.remote(Evaluator).options(
            num_cpus=threads,
            num_gpus=self._gpus,
            max_restarts=0,
            runtime_env={"env_vars": {"OMP_NUM_THREADS": str(threads)}},
        )
        return actor.remote(self._model)

    def _replace_lost(self) -> None:
        import ray

        for index, worker in enumerate(self._workers):
            try:
                ray.get(worker.usage.remote())
            except ray.exceptions.RayError:
                ray.kill(worker)
                self._workers[index] = self._start()
                self.restarts += 1
