"""Evaluation of search candidates on a cluster: evaluators, each with a copy of the model, share the candidates.

The result does not depend on the number of evaluators: a candidate's loss on a sequence has the same bits on every
evaluator, and losses are summed exactly.
"""

import itertools
import math
from collections import deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

from ray import ObjectRef
from ray.actor import ActorHandle
from ray.exceptions import RayError
from torch import Tensor

from hasten.accel.compression.calibration.statistics import split
from hasten.accel.compression.search.candidates import batches
from hasten.accel.compression.search.gradient_scores import Scores
from hasten.accel.compression.search.moves import Genome
from hasten.accel.compression.search.samples import Sample
from hasten.accel.compression.search.sensitivity import Sensitivity
from hasten.cluster.actors.evaluator import Evaluator, EvaluatorSpec
from hasten.cluster.runtime import recovery
from hasten.cluster.runtime.actor_pool import ActorPool, start_actor
from hasten.cluster.runtime.dispatcher import Assignment, Dispatcher, PoolWorkload
from hasten.cluster.runtime.placement import ActorResources


@dataclass(frozen=True)
class _Call:
    """One call: candidates, and the pieces of a sample to measure them on. worker: the evaluator that should run it."""

    worker: int
    genomes: tuple[Genome, ...]
    pieces: list[Sample]

    def submit(self, evaluator: ActorHandle) -> ObjectRef:
        """Start it."""
        reference: ObjectRef = evaluator.losses.remote(self.genomes, _joined(self.pieces))
        return reference


@dataclass(frozen=True)
class _BackwardCall:
    """One call: batches of sequences to measure a candidate's parts of the divergence on; None: gradient scores."""

    worker: int
    genome: Genome | None
    batches: list[list[int]]

    def submit(self, evaluator: ActorHandle) -> ObjectRef:
        """Start it."""
        if self.genome is None:
            scores: ObjectRef = evaluator.gradient_scores.remote(self.batches)
            return scores
        reference: ObjectRef = evaluator.sensitivities.remote(self.genome, self.batches)
        return reference


# What calls return: losses (genomes, parts), or a result for each batch.
_Result = Tensor | list[Sensitivity] | list[Scores]


class _OwnQueues:
    """A queue of call numbers for each evaluator; an idle evaluator takes from the longest queue of the others."""

    def __init__(self, calls: Sequence[_Call | _BackwardCall], count: int) -> None:
        self._queues: list[deque[int]] = [deque() for _ in range(count)]
        for number, call in enumerate(calls):
            self._queues[call.worker].append(number)

    def take(self, worker: int, idle: bool) -> list[int]:
        """The first call of its own queue; an idle evaluator with an empty queue takes the last of the longest one."""
        if self._queues[worker]:
            return [self._queues[worker].popleft()]
        longest = max(self._queues, key=len)
        # The last call, because the first ones share the most prefixes with the owner's cache.
        return [longest.pop()] if idle and longest else []

    def put_back(self, worker: int, keys: Sequence[int]) -> None:
        """Put calls back at the front of the evaluator's queue."""
        self._queues[worker].extendleft(reversed(keys))


class _EvaluateWorkload(PoolWorkload[int, _Result]):
    """Calls by number. Every evaluator has two assignments at once, so that it never waits for the next."""

    depth = 2

    def __init__(self, spec: EvaluatorSpec, workers: int, needs: ActorResources) -> None:
        super().__init__(ActorPool("an evaluator", workers, needs, self._start))
        self._spec, self._needs = spec, needs
        self.calls: Sequence[_Call | _BackwardCall] = ()
        self._batches = recovery.Batches(
            "search.batch", spec.batch, "use a smaller search.sequence_length, or fewer workers on a node"
        )
        self._loaded: set[int] = set()

    def kind(self, worker: int) -> Hashable:
        """Whether the model is loaded. The first call loads it, and is compared with other first calls only."""
        return worker in self._loaded

    def submit(self, worker: int, keys: Sequence[int]) -> ObjectRef:
        """Start a call."""
        (number,) = keys
        return self.calls[number].submit(self.pool.actors[worker])

    def receive(self, assignment: Assignment[int]) -> tuple[Sequence[tuple[int, _Result]], bool]:
        """Results by number."""
        received = super().receive(assignment)
        self._loaded.add(assignment.worker)
        return received

    def recover(self, worker: int, keys: Sequence[int], error: RayError) -> None:
        """Replace an evaluator that was lost or ran out of memory; if an object was lost, only repeat the call."""
        if recovery.is_out_of_memory(error):
            self._batches.halve(worker, self.name)
            self.pool.replace(worker)
        elif not recovery.is_loss(error):
            raise error
        elif recovery.is_actors_own(error):
            self.pool.replace(worker, error)

    def _start(self, index: int, cpus: float) -> ActorHandle:
        self._loaded.discard(index)
        spec = replace(self._spec, batch=self._batches.of(index))
        return start_actor(Evaluator, self._needs.options(cpus, self._spec.threads), spec)


def _joined(pieces: Sequence[Sample]) -> Sample:
    return Sample(tuple(part for piece in pieces for part in piece.parts))


class Evaluators:
    """Several evaluators of one model; they are started at the first use, inside a Ray session.

    Losses are cached by candidate and batch of sequences, also across samples. needs: resources of each evaluator;
    None is spec.threads CPUs. evaluated: number of measurements of a candidate on a batch.
    """

    def __init__(self, spec: EvaluatorSpec, workers: int, needs: ActorResources | None = None) -> None:
        self._spec = spec
        self._count = workers
        self._work = _EvaluateWorkload(spec, workers, needs or ActorResources(spec.threads))
        self._dispatcher = Dispatcher(self._work)
        # Losses of each part of a piece, which is a batch: they depend on the candidate and the piece only.
        self._cached: dict[tuple[Genome, Sample], tuple[float, ...]] = {}
        self.evaluated = 0

    @property
    def restarts(self) -> int:
        """Evaluators that were lost and replaced."""
        return self._work.pool.restarts

    def __call__(self, genomes: Sequence[Genome], sample: Sample) -> list[float]:
        """Mean loss per scored token of every genome."""
        self.prefetch([(genomes, sample)])
        pieces = batches(sample, self._spec.batch)
        length = self._spec.tokens.shape[1]
        scored = sum(min(used, length - 1) for _, used in sample.parts)
        return [
            math.fsum(loss for piece in pieces for loss in self._cached[genome, piece]) / scored for genome in genomes
        ]

    def prefetch(self, measurements: Sequence[tuple[Sequence[Genome], Sample]]) -> None:
        """Measure what is not cached of several (candidates, sample) together: no evaluator is idle between them."""
        missing: dict[Sample, set[Genome]] = {}
        for genomes, sample in measurements:
            for piece in batches(sample, self._spec.batch):
                new = {genome for genome in genomes if (genome, piece) not in self._cached}
                if new:
                    missing.setdefault(piece, set()).update(new)
        calls = [
            _Call(worker, genomes, pieces)
            for worker, items in enumerate(self._shares(missing))
            for genomes, pieces in self._calls(items)
        ]
        for call, losses in zip(calls, self._run(calls), strict=True):
            assert isinstance(losses, Tensor)
            for genome, row in zip(call.genomes, losses.tolist(), strict=True):
                values = iter(row)
                for piece in call.pieces:
                    self._cached[genome, piece] = tuple(itertools.islice(values, len(piece.parts)))
            self.evaluated += len(call.genomes) * len(call.pieces)

    def sensitivities(self, genome: Genome, sequences: Sequence[int]) -> list[Sensitivity]:
        """Each unit's part of a candidate's divergence, for each batch of these sequences; evaluators share them."""
        return [result for result in self._backward(genome, sequences) if isinstance(result, Sensitivity)]

    def gradient_scores(self, sequences: Sequence[int]) -> list[Scores]:
        """Gradient scores of all choices, for each batch of these sequences; evaluators share them."""
        return [result for result in self._backward(None, sequences) if isinstance(result, Scores)]

    def _backward(self, genome: Genome | None, sequences: Sequence[int]) -> list[Sensitivity | Scores]:
        batch = self._spec.batch
        batches = [list(sequences[first : first + batch]) for first in range(0, len(sequences), batch)]
        groups = [batches[part.start : part.stop] for part in split(len(batches), self._count)]
        calls = [_BackwardCall(number, genome, group) for number, group in enumerate(filter(None, groups))]
        measured: list[Sensitivity | Scores] = []
        for results in self._run(calls):
            assert isinstance(results, list)
            measured += results
        return measured

    def close(self) -> dict[str, float]:
        """End the evaluators; returns the sum of their usage, with the largest peak memory."""
        pool = self._work.pool
        usages = recovery.answers([pool.actors[index].usage.remote() for index in pool.alive])
        pool.end()
        self._dispatcher.reset()
        total = {name: sum(usage[name] for usage in usages) for name in (usages[0] if usages else {})}
        if usages:
            total["peak_rss_bytes"] = max(usage["peak_rss_bytes"] for usage in usages)
        return total

    def _shares(self, missing: dict[Sample, set[Genome]]) -> list[list[tuple[tuple[Genome, ...], Sample]]]:
        """(candidates, piece) for each evaluator.

        As many pieces as divide evenly are assigned whole, because all candidates of a piece together share the most
        prefixes. The candidates of the remaining pieces are sorted and divided, so that neighbours, which share
        prefixes, stay together.
        """
        items = [(tuple(sorted(genomes)), piece) for piece, genomes in missing.items()]
        items.sort(key=lambda item: -len(item[0]))
        even = len(items) - len(items) % self._count
        shares = [items[worker : even : self._count] for worker in range(self._count)]
        for genomes, piece in items[even:]:
            for worker, part in enumerate(split(len(genomes), self._count)):
                shares[worker].append((genomes[part.start : part.stop], piece))
        return shares

    def _calls(
        self, items: Sequence[tuple[tuple[Genome, ...], Sample]]
    ) -> list[tuple[tuple[Genome, ...], list[Sample]]]:
        """Join pieces of the same candidates into one call, which saves swaps, if the batches stay the same."""
        calls: list[tuple[tuple[Genome, ...], list[Sample]]] = []
        for genomes, piece in items:
            if calls and calls[-1][0] == genomes:
                pieces = [*calls[-1][1], piece]
                if batches(_joined(pieces), self._spec.batch) == pieces:
                    calls[-1] = genomes, pieces
                    continue
            calls.append((genomes, [piece]))
        return calls

    def _run(self, calls: Sequence[_Call | _BackwardCall]) -> list[_Result]:
        """Results of calls, in the order of the calls."""
        if not calls:
            return []
        self._work.pool.begin()
        self._work.calls = calls
        numbers = range(len(calls))
        results = dict(self._dispatcher.run(numbers, _OwnQueues(calls, self._count)))
        return [results[number] for number in numbers]
