"""Evaluators on a cluster: each holds the model once, and together they measure the candidates of a search.

What comes back does not depend on how many there are: every candidate's loss on every sequence is the same to the bit
wherever it is made, and they are added up exactly.
"""

import itertools
import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from hasten.accel.compression.allocators.base import Unit
from hasten.accel.compression.calibration.statistics import split
from hasten.accel.compression.search.candidates import batches
from hasten.accel.compression.search.fitness import Fitness
from hasten.accel.compression.search.moves import Genome
from hasten.accel.compression.search.samples import Sample
from hasten.cluster.runtime import recovery
from hasten.cluster.runtime.actor_pool import Crew, wait
from hasten.cluster.runtime.resources import cpu_seconds, peak_rss_bytes, release_memory

# Calls that an evaluator has at once: the next is there when one ends, and the rest are free for others to take.
_AHEAD = 2
# How often it is looked whether a call is late.
_SECONDS_BETWEEN_LOOKS = 0.25


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
    """A model in one process, whose layers change from candidate to candidate; loaded at the first use."""

    def __init__(self, model: Model) -> None:
        torch.set_num_threads(model.threads)
        torch.set_grad_enabled(False)
        self._model = model
        self._candidates: Any = None
        self._cpu_before = cpu_seconds()

    def losses(self, genomes: Sequence[Genome], sample: Sample) -> Tensor:
        """Sum of losses of every genome on every part of the sample, (genomes, parts) float64."""
        found: Tensor = self._loaded().losses(genomes, sample)
        return found

    def usage(self) -> dict[str, float]:
        """CPU seconds since the model was there, peak memory, and what swapping took of the evaluations."""
        release_memory()
        found = self._candidates
        return {
            "cpu_seconds": cpu_seconds() - self._cpu_before if found else 0.0,
            "peak_rss_bytes": peak_rss_bytes(),
            "seconds": found.seconds if found else 0.0,
            "swap_seconds": found.swap_seconds if found else 0.0,
            "block_runs": found.block_runs if found else 0,
            "swapped": found.swapped if found else 0,
        }

    def _loaded(self) -> Any:
        if self._candidates is None:
            from hasten.accel.compression.levels.database import LevelDatabase
            from hasten.accel.compression.search.candidates import Candidates
            from hasten.accel.models.architecture import Architecture
            from hasten.accel.models.checkpoint import Checkpoint

            model = self._model
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
        return self._candidates


@dataclass(frozen=True)
class _Call:
    """Candidates that an evaluator measures on some pieces."""

    worker: int
    genomes: tuple[Genome, ...]
    pieces: list[Sample]


class _Round:
    """Calls at work: each belongs to an evaluator, and those that one has not begun are free for idle ones.

    An idle one also does what another has been at for too long: the first result counts, and both are the same.
    """

    def __init__(self, calls: Sequence[_Call], count: int) -> None:
        self.left = set(range(len(calls)))
        self._queues: list[deque[int]] = [deque() for _ in range(count)]
        for number, call in enumerate(calls):
            self._queues[call.worker].append(number)
        # Who is at a call, by its promise, in the order of asking; and since when each evaluator is at its first one.
        self.running: dict[Any, tuple[int, int]] = {}
        self.since = [perf_counter()] * count

    def next(self, worker: int, idle: bool, pace: Callable[[int], recovery.Pace]) -> int | None:
        """What an evaluator should do next; None where there is nothing. idle: it has nothing to do; pace: of each."""
        if self._queues[worker]:
            return self._queues[worker].popleft()
        if not idle:
            return None
        longest = max(self._queues, key=len)
        if longest:
            # From the end: those that come first there have most in common with what its owner is at.
            return longest.pop()
        now = perf_counter()
        numbers = [number for _, number in self.running.values()]
        late = [number for other, number in self.running.values() if pace(other).is_late(now - self.since[other])]
        # What its owner would come to last.
        return next((number for number in reversed(late) if numbers.count(number) == 1), None)

    def give_back(self, worker: int) -> None:
        """What an evaluator had begun is to be done again, first of all."""
        for reference, (other, number) in reversed(list(self.running.items())):
            if other == worker:
                del self.running[reference]
                if number in self.left and all(number != each for _, each in self.running.values()):
                    self._queues[worker].appendleft(number)


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
        self._crew = Crew("an evaluator", workers, model.threads, gpus, self._start)
        self._batches = recovery.Batches(
            "search.batch", model.batch, "use a smaller search.sequence_length, or fewer workers on a node"
        )
        # An evaluator's first call loads the model: it is compared with other first ones alone.
        self._first, self._later = recovery.Pace(), recovery.Pace()
        self._loaded: set[int] = set()
        # Calls whose result came from another evaluator, which are still at work, and whose they are.
        self._late: dict[Any, int] = {}
        # Losses of the parts of each piece that runs at once: those depend on nothing else.
        self._known: dict[tuple[Genome, Sample], tuple[float, ...]] = {}
        self.evaluated = 0

    @property
    def restarts(self) -> int:
        """Evaluators that were lost and replaced."""
        return self._crew.restarts

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
        usages = recovery.answers([self._crew.actors[index].usage.remote() for index in self._crew.there])
        self._crew.end()
        self._late = {}
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

    def _run(self, calls: Sequence[_Call]) -> list[Tensor]:
        """Results of calls in their order; what a lost evaluator was at is done again."""
        import ray

        if not calls:
            return []
        self._crew.begin()
        results: dict[int, Tensor] = {}
        work = _Round(calls, self._count)
        losses = 0
        while work.left:
            idle = self._send(calls, work)
            ready = wait([self._crew], [*work.running, *self._late], _SECONDS_BETWEEN_LOOKS if idle else None)
            for reference in ready:
                worker, number = work.running.pop(reference, (self._late.pop(reference, -1), -1))
                if number < 0:
                    if worker >= 0:
                        # It comes to its next call only now.
                        work.since[worker] = perf_counter()
                        self._loaded.add(worker)
                    continue
                try:
                    found = recovery.get(reference)
                except ray.exceptions.RayError as error:
                    losses += 1
                    if losses == recovery.ATTEMPTS:
                        raise
                    work.running[reference] = worker, number
                    work.give_back(worker)
                    self._lose(worker, error)
                else:
                    losses = 0
                    now = perf_counter()
                    self._pace(worker).note(now - work.since[worker])
                    self._loaded.add(worker)
                    work.since[worker] = now
                    if number in work.left:
                        work.left.remove(number)
                        results[number] = found
                    self._late |= {other: at for other, (at, same) in work.running.items() if same == number}
                    work.running = {other: at for other, at in work.running.items() if at[1] != number}
        return [results[number] for number in range(len(calls))]

    def _pace(self, worker: int) -> recovery.Pace:
        """Of calls such as the one that an evaluator is at."""
        return self._later if worker in self._loaded else self._first

    def _send(self, calls: Sequence[_Call], work: _Round) -> bool:
        """Give every evaluator what it can take; returns whether one is idle for all that."""
        found = False
        for worker in self._crew.there:
            while True:
                at = sum(other == worker for other, _ in work.running.values())
                at += sum(other == worker for other in self._late.values())
                number = work.next(worker, not at, self._pace) if at < _AHEAD else None
                if number is None:
                    found |= not at
                    break
                if not at:
                    work.since[worker] = perf_counter()
                reference = self._crew.actors[worker].losses.remote(calls[number].genomes, _whole(calls[number].pieces))
                work.running[reference] = worker, number
        return found

    def _lose(self, worker: int, error: Exception) -> None:
        """A successor for an evaluator that is lost or ran out of memory; raises what is neither."""
        if recovery.is_out_of_memory(error):
            self._batches.halve(worker, "an evaluator")
            self._crew.replace(worker)
        elif recovery.is_actors_own(error) and recovery.is_loss(error):
            self._crew.replace(worker, error)
        elif not recovery.is_loss(error):
            recovery.raise_if_refused(error)
            raise error

    def _start(self, index: int, cpus: float) -> Any:
        import ray

        self._loaded.discard(index)
        actor: Any = ray.remote(Evaluator).options(
            num_cpus=cpus,
            num_gpus=self._gpus,
            max_restarts=0,
            runtime_env={"env_vars": {"OMP_NUM_THREADS": str(self._model.threads)}},
        )
        return actor.remote(replace(self._model, batch=self._batches.of(index)))
