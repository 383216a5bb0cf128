"""Evaluators on a cluster: each holds the model once, and together they measure the candidates of a search.

The result does not depend on how many there are: every candidate's loss on every sequence is the same to the bit
wherever it is computed, and the losses are added exactly.
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
from hasten.accel.compression.search.moves import Genome
from hasten.accel.compression.search.samples import Sample
from hasten.cluster.actors.evaluator import Evaluator, EvaluatorSpec
from hasten.cluster.runtime import recovery
from hasten.cluster.runtime.actor_pool import ActorPool, start_actor
from hasten.cluster.runtime.dispatcher import Assignment, Dispatcher, PoolWorkload
from hasten.cluster.runtime.placement import ActorResources


@dataclass(frozen=True)
class _Call:
    """Candidates that an evaluator measures on some pieces of a sample. worker: to which it belongs."""

    worker: int
    genomes: tuple[Genome, ...]
    pieces: list[Sample]


class _OwnQueues:
    """Calls by number, a queue for each evaluator; one that has nothing to do takes from the longest of the others."""

    def __init__(self, calls: Sequence[_Call], count: int) -> None:
        self._queues: list[deque[int]] = [deque() for _ in range(count)]
        for number, call in enumerate(calls):
            self._queues[call.worker].append(number)

    def take(self, worker: int, idle: bool) -> list[int]:
        """The first of its own, or the last of another's."""
        if self._queues[worker]:
            return [self._queues[worker].popleft()]
        longest = max(self._queues, key=len)
        # The first calls of a queue have most prefixes in common with what its owner has cached.
        return [longest.pop()] if idle and longest else []

    def put_back(self, worker: int, keys: Sequence[int]) -> None:
        """To the front of the evaluator's own."""
        self._queues[worker].extendleft(reversed(keys))


class _EvaluateWorkload(PoolWorkload[int, Tensor]):
    """Calls by number, of which every evaluator has two at once."""

    depth = 2

    def __init__(self, spec: EvaluatorSpec, workers: int, needs: ActorResources) -> None:
        super().__init__(ActorPool("an evaluator", workers, needs, self._start))
        self._spec, self._needs = spec, needs
        self.calls: Sequence[_Call] = ()
        self._batches = recovery.Batches(
            "search.batch", spec.batch, "use a smaller search.sequence_length, or fewer workers on a node"
        )
        self._loaded: set[int] = set()

    def kind(self, worker: int) -> Hashable:
        """An evaluator's first call loads the model, and is compared with other first ones alone."""
        return worker in self._loaded

    def submit(self, worker: int, keys: Sequence[int]) -> ObjectRef:
        """A call."""
        (number,) = keys
        call = self.calls[number]
        reference: ObjectRef = self.pool.actors[worker].losses.remote(call.genomes, _joined(call.pieces))
        return reference

    def receive(self, assignment: Assignment[int]) -> tuple[Sequence[tuple[int, Tensor]], bool]:
        """Losses, (genomes, parts)."""
        received = super().receive(assignment)
        self._loaded.add(assignment.worker)
        return received

    def recover(self, worker: int, keys: Sequence[int], error: RayError) -> None:
        """Replace an evaluator that was lost or ran out of memory; after other losses its call is made again."""
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
    """Several evaluators of one model; started at the first use, inside a Ray session.

    What was measured once is never measured again, be it on another sample that has the same sequences in it.
    needs: what each evaluator asks the cluster for; None is spec.threads CPUs. evaluated: how often a candidate was
    measured on a batch of sequences.
    """

    def __init__(self, spec: EvaluatorSpec, workers: int, needs: ActorResources | None = None) -> None:
        self._spec = spec
        self._count = workers
        self._work = _EvaluateWorkload(spec, workers, needs or ActorResources(spec.threads))
        self._dispatcher = Dispatcher(self._work)
        # Losses of the parts of each piece that runs at once: those depend on nothing else.
        self._known: dict[tuple[Genome, Sample], tuple[float, ...]] = {}
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
        return [math.fsum(loss for piece in pieces for loss in self._known[each, piece]) / scored for each in genomes]

    def prefetch(self, measurements: Sequence[tuple[Sequence[Genome], Sample]]) -> None:
        """Measure what is not known of several (candidates, sample), all at once: no evaluator waits between them."""
        wanted: dict[Sample, set[Genome]] = {}
        for genomes, sample in measurements:
            for piece in batches(sample, self._spec.batch):
                new = {genome for genome in genomes if (genome, piece) not in self._known}
                if new:
                    wanted.setdefault(piece, set()).update(new)
        calls = [
            _Call(worker, genomes, pieces)
            for worker, items in enumerate(self._shares(wanted))
            for genomes, pieces in self._calls(items)
        ]
        for call, losses in zip(calls, self._run(calls), strict=True):
            for genome, row in zip(call.genomes, losses.tolist(), strict=True):
                values = iter(row)
                for piece in call.pieces:
                    self._known[genome, piece] = tuple(itertools.islice(values, len(piece.parts)))
            self.evaluated += len(call.genomes) * len(call.pieces)

    def close(self) -> dict[str, float]:
        """End the evaluators; returns what they used, added up, and the largest peak of memory."""
        pool = self._work.pool
        usages = recovery.answers([pool.actors[index].usage.remote() for index in pool.alive])
        pool.end()
        self._dispatcher.reset()
        total = {name: sum(usage[name] for usage in usages) for name in (usages[0] if usages else {})}
        if usages:
            total["peak_rss_bytes"] = max(usage["peak_rss_bytes"] for usage in usages)
        return total

    def _shares(self, wanted: dict[Sample, set[Genome]]) -> list[list[tuple[tuple[Genome, ...], Sample]]]:
        """Candidates and pieces for every evaluator.

        Whole pieces as far as they come out even: all candidates together share the most prefixes. The candidates of
        the remaining pieces are divided, sorted, so that neighbours, which share prefixes, stay together.
        """
        items = [(tuple(sorted(genomes)), piece) for piece, genomes in wanted.items()]
        items.sort(key=lambda item: -len(item[0]))
        even = len(items) - len(items) % self._count
        shares = [items[worker : even : self._count] for worker in range(self._count)]
        for genomes, piece in items[even:]:
            for worker, each in enumerate(split(len(genomes), self._count)):
                shares[worker].append((genomes[each.start : each.stop], piece))
        return shares

    def _calls(
        self, items: Sequence[tuple[tuple[Genome, ...], Sample]]
    ) -> list[tuple[tuple[Genome, ...], list[Sample]]]:
        """Pieces of the same candidates in one call, which saves swaps, if they would still run in the same batches."""
        calls: list[tuple[tuple[Genome, ...], list[Sample]]] = []
        for genomes, piece in items:
            if calls and calls[-1][0] == genomes:
                pieces = [*calls[-1][1], piece]
                if batches(_joined(pieces), self._spec.batch) == pieces:
                    calls[-1] = genomes, pieces
                    continue
            calls.append((genomes, [piece]))
        return calls

    def _run(self, calls: Sequence[_Call]) -> list[Tensor]:
        """Results of calls in their order."""
        if not calls:
            return []
        self._work.pool.begin()
        self._work.calls = calls
        numbers = range(len(calls))
        results = dict(self._dispatcher.run(numbers, _OwnQueues(calls, self._count)))
        return [results[number] for number in numbers]
