"""Decoding on a cluster: verifiers, each with the target, share the prompts; drafters are theirs or serve them all.

Every prompt ends with exactly one result. Results are streamed as they finish; the prompts of an actor that was lost
start again elsewhere, and give the same tokens where no draft decides them (greedily, or with sample and match), as
everything random in a prompt comes from its own seed. Those prompts an idle verifier also starts where another has been
at them for too long, and the first result counts.
"""

import logging
import time
import uuid
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hasten.accel.decoding.engine import Request, Result
from hasten.accel.decoding.ties import Ties
from hasten.accel.decoding.verifiers.sample_and_match import SampleAndMatch
from hasten.accel.errors import UserError
from hasten.cluster.actors.drafter import PATIENCE_SECONDS, Address, DrafterActor, learns
from hasten.cluster.actors.verifier import OnTokens, Spec, VerifierActor, make_memory, sharing_refusal
from hasten.cluster.runtime import recovery
from hasten.cluster.runtime.actor_pool import Crew, wait
from hasten.cluster.runtime.placement import check, grows, nodes, packs

_LOG = logging.getLogger(__name__)
# Round trips to a shared drafter may take this share of a pass of the target.
_WORTH = 0.2
_SECONDS_BETWEEN_LOOKS = 0.5
# Tokens of the draft that a round trip is timed with, where sizes are measured later.
_DRAFT_TOKENS = 16


@dataclass
class _Lot:
    """Prompts that a verifier works on, by id, and the stream of its results. since: time of the last of them."""

    worker: int
    waiting: dict[str, Request]
    results: Any
    since: float


class Decoders:
    """Several verifiers, and drafters where they are shared; started at the first use, inside a Ray session.

    placement: `shared` drafters are actors of their own, `private` ones live in every verifier; `auto` shares those
    that learn, among two verifiers or more, where a round trip is short against a pass of the target. shared: what it
    is. on_tokens: called with an id and new tokens as they come. gpus: of every verifier. restarts: actors that were
    lost and replaced.
    """

    def __init__(
        self,
        spec: Spec,
        workers: int,
        drafters: int = 1,
        gpus: float = 0,
        placement: str = "auto",
        on_tokens: OnTokens | None = None,
    ) -> None:
        self._spec, self._count, self._gpus, self._on_tokens = spec, workers, gpus, on_tokens
        self._placement = placement if spec.drafter is not None else "private"
        self._drafter_count = drafters
        name = uuid.uuid4().hex
        self._addresses = [Address(f"hasten-drafter-{name}-{number}") for number in range(drafters)]
        self._clients: dict[int, str] = {}
        with_model = spec.drafter is not None and spec.drafter.needs_draft_model
        self._verifiers = Crew("a verifier", workers, spec.threads, gpus, self._start_verifier)
        self._drafters = Crew("a drafter", drafters, 1, gpus if with_model else 0, self._start_drafter)
        self._batches = recovery.Batches(
            "in_flight", spec.in_flight, "use a smaller max_new_tokens, a smaller memory_bytes, or fewer workers"
        )
        self._pace = recovery.Pace()
        # What verifiers are at, among it prompts whose results came from elsewhere.
        self._lots: list[_Lot] = []
        self._learned: list[Mapping[str, Tensor] | None] = [spec.learned] * drafters
        self._looks: dict[int, Any] = {}
        self._looked = 0.0
        self.shared = False

    @property
    def restarts(self) -> int:
        """Actors that were lost and replaced."""
        return self._verifiers.restarts + self._drafters.restarts

    def prepare(self) -> None:
        """Start the actors, load the models, and choose where drafters are; UserError where something is wrong."""
        import ray

        if self._verifiers.actors:
            return
        self._check_resources()
        for attempt in range(1, recovery.ATTEMPTS + 1):
            try:
                self._prepare()
                return
            except ray.exceptions.RayError as error:
                self.close()
                recovery.raise_if_refused(error)
                if attempt == recovery.ATTEMPTS or not (recovery.is_loss(error) or recovery.is_out_of_memory(error)):
                    raise
                if recovery.is_out_of_memory(error):
                    for worker in range(self._count):
                        self._batches.halve(worker, f"verifier {worker}")
                else:
                    _LOG.warning("lost an actor (%s); starting all of them again", recovery.reason(error))
                self._addresses = [each._replace(number=each.number + 1) for each in self._addresses]
            except BaseException:
                self.close()
                raise

    def _prepare(self) -> None:
        maybe = self._placement == "shared" or (
            self._placement == "auto"
            and self._count > 1
            and self._spec.drafter is not None
            and learns(self._spec.drafter)
            and packs(nodes(), self._bundles(shared=True))
        )
        # After a loss the nodes that are left may hold each crew but not both.
        fits = packs(nodes(), self._bundles(maybe)) or grows()
        if maybe:
            self._drafters.begin(fits)
        self._verifiers.begin(fits)
        self._drafters.fill()
        self._verifiers.fill()
        self._all([drafter.prepare.remote() for drafter in self._drafters.actors])
        self._choose_dtype()
        self._all([verifier.loaded.remote() for verifier in self._verifiers.actors])
        self.shared = maybe and (self._placement == "shared" or self._pays())
        if not self.shared:
            self._drafters.end()
        self._all([actor.connect.remote(self._line(worker)) for worker, actor in enumerate(self._verifiers.actors)])

    def _all(self, references: list[Any]) -> list[Any]:
        """Results of calls, in their order."""
        left = list(references)
        while left:
            for reference in wait([self._verifiers, self._drafters], left):
                recovery.get(reference)
                left.remove(reference)
        return [recovery.get(reference) for reference in references]

    def __call__(self, requests: Iterable[Request]) -> Iterator[Result]:
        """One result for every request, which differ in their ids, as they end."""
        import ray

        waiting = deque(requests)
        left = {request.id for request in waiting}
        assert len(left) == len(waiting), "ids differ"
        self.prepare()
        refusals = (sharing_refusal(self._spec, request.sampling) for request in waiting) if self.shared else ()
        refusal = next(filter(None, refusals), None)
        if refusal is not None:
            raise UserError(refusal)
        for lot in self._lots:
            lot.waiting.clear()
        losses = 0
        while left:
            self._send(waiting)
            for lot in self._ready(_SECONDS_BETWEEN_LOOKS):
                try:
                    item = recovery.get(next(lot.results))
                except StopIteration:
                    assert not lot.waiting, lot.waiting
                    self._lots.remove(lot)
                except ray.exceptions.RayError as error:
                    losses += 1
                    if losses == recovery.ATTEMPTS:
                        raise
                    self._lots.remove(lot)
                    waiting.extendleft(reversed([lot.waiting[key] for key in lot.waiting if self._is_alone(key, lot)]))
                    self._lose(lot.worker, error)
                else:
                    if not isinstance(item, Result):
                        if self._on_tokens is not None:
                            self._on_tokens(*item)
                        continue
                    if item.id not in lot.waiting:
                        continue
                    losses = 0
                    now = time.monotonic()
                    self._pace.note(now - lot.since)
                    lot.since = now
                    for each in self._lots:
                        each.waiting.pop(item.id, None)
                    left.remove(item.id)
                    yield item
        # Who is through is free for other things; who is not is left to it.
        until = time.monotonic() + _SECONDS_BETWEEN_LOOKS
        while self._lots and time.monotonic() < until:
            for lot in self._ready(_SECONDS_BETWEEN_LOOKS / 5):
                try:
                    next(lot.results)
                except StopIteration:
                    self._lots.remove(lot)

    def _ready(self, seconds: float) -> list[_Lot]:
        """Lots of which there is something new."""
        import ray

        streams = [lot.results for lot in self._lots]
        first = wait([self._verifiers, self._drafters], streams, seconds)
        self._look_after_drafters()
        ready = ray.wait(streams, num_returns=len(streams), timeout=0)[0] if first else []
        return [lot for lot in self._lots if any(lot.results is each for each in ready)]

    def _is_alone(self, key: str, lot: _Lot) -> bool:
        """Whether no other verifier is at a prompt of a lot."""
        return not any(key in each.waiting for each in self._lots if each is not lot)

    def _lose(self, worker: int, error: Exception) -> None:
        """A successor for a verifier that is lost or ran out of memory; raises what is neither."""
        recovery.raise_if_refused(error)
        if recovery.is_out_of_memory(error):
            self._batches.halve(worker, "a verifier")
        elif not recovery.is_loss(error):
            raise error
        for index in self._drafters.there:
            self._drafters.actors[index].forget.remote(self._clients[worker])
        self._verifiers.replace(worker, None if recovery.is_out_of_memory(error) else error)

    def target_efficiency(self, nodes: int) -> float | None:
        """Of passes with so many drafted tokens a sequence, measured; None where an actor or its memory failed."""
        import ray

        sequences = min(self._batches.of(worker) for worker in range(self._count))
        try:
            return float(recovery.get(self._free().target_efficiency.remote(sequences, nodes)))
        except ray.exceptions.RayError as error:
            _check_lost(error)
            return None

    def ties(self, decoded: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Ties | None:
        """What a reduced type changed of greedily decoded (prompt, tokens); None where an actor or memory failed."""
        import ray

        try:
            found: Ties = recovery.get(self._free().ties.remote(list(decoded)))
        except ray.exceptions.RayError as error:
            _check_lost(error)
            return None
        return found

    @property
    def dtype(self) -> torch.dtype:
        """Type of the arithmetic; chosen once the actors are prepared."""
        return self._spec.dtype

    def learned(self) -> Mapping[str, Tensor]:
        """What drafters learned: the first shared one, or the first verifier's own."""
        import ray

        actor = self._drafters.actors[0] if self.shared else self._free()
        try:
            promise = actor.learned.remote() if actor else None
            # A verifier may be in the middle of something; a drafter that takes so long stands still.
            patience = PATIENCE_SECONDS if self.shared else None
            there = promise is not None and ray.wait([promise], timeout=patience)[0]
            found: Mapping[str, Tensor] = recovery.get(promise) if there else {}
        except ray.exceptions.RayError as error:
            _check_lost(error)
            found = {}
        if not found:
            return self._learned[0] or {}
        self._learned[0] = found
        return found

    def close(self) -> dict[str, float]:
        """End the actors; returns what they used, added up, and the largest peak of memory."""
        crews = (self._verifiers, self._drafters)
        # Some may be lost, or in the middle of something.
        usages = recovery.answers([crew.actors[index].usage.remote() for crew in crews for index in crew.there])
        for crew in crews:
            crew.end()
        self._lots, self._looks = [], {}
        return {
            "cpu_seconds": sum(usage["cpu_seconds"] for usage in usages),
            "peak_rss_bytes": max((usage["peak_rss_bytes"] for usage in usages), default=0),
        }

    def _choose_dtype(self) -> None:
        """Measure the target in every type that may be, once, and take the quickest for all."""
        if not self._spec.other_dtypes:
            return
        dtypes = (self._spec.dtype, *self._spec.other_dtypes)
        rates = {dtype: float(self._all([self._verifiers.actors[0].rate.remote(dtype)])[0]) for dtype in dtypes}
        chosen = max(dtypes, key=lambda dtype: rates[dtype])
        promised = ", ".join(f"{rate:.0f} tokens/s in {_name(dtype)}" for dtype, rate in rates.items())
        _LOG.info("dtype=auto: %s, as passes promise %s", _name(chosen), promised)
        self._spec = replace(self._spec, dtype=chosen, other_dtypes=())
        self._all([verifier.use.remote(chosen) for verifier in self._verifiers.actors])

    def _send(self, waiting: deque[Request]) -> None:
        """Give idle verifiers prompts; lots are large at first, so that slots seldom run empty, and small at last."""
        busy = {lot.worker for lot in self._lots}
        for worker in self._verifiers.there:
            if worker in busy:
                continue
            if waiting:
                most = max(self._spec.in_flight, -(-len(waiting) // (2 * self._count if self._count > 1 else 1)))
                taken = [waiting.popleft() for _ in range(min(most, len(waiting)))]
            else:
                taken = self._late(self._batches.of(worker))
            if taken:
                decode = self._verifiers.actors[worker].decode.options(num_returns="streaming")
                results = decode.remote(taken, self._line(worker), self._on_tokens is not None)
                self._lots.append(_Lot(worker, {request.id: request for request in taken}, results, time.monotonic()))

    def _late(self, most: int) -> list[Request]:
        """Prompts that a verifier has been at for too long, those first that it would come to last."""
        now = time.monotonic()
        for lot in self._lots:
            alone = [request for key, request in lot.waiting.items() if self._is_alone(key, lot)]
            if self._pace.is_late(now - lot.since) and alone and all(map(self._is_repeatable, alone)):
                _LOG.info("a verifier has been decoding for %.0f s: another does the same", now - lot.since)
                return alone[-most:][::-1]
        return []

    def _is_repeatable(self, request: Request) -> bool:
        """Whether a prompt's tokens do not depend on its drafts, which differ between verifiers, and are not shown."""
        verifier = self._spec.verifier
        decided = isinstance(verifier, SampleAndMatch) or (verifier.lossless and request.sampling.is_greedy)
        return (decided or self._spec.drafter is None) and self._on_tokens is None

    def _free(self) -> Any:
        """A verifier that is not in the middle of something, as far as there is one."""
        busy = {lot.worker for lot in self._lots}
        there = sorted(self._verifiers.there, key=lambda worker: (worker in busy, worker))
        if not there:
            self._verifiers.fill()
            there = self._verifiers.there
        return self._verifiers.actors[there[0]]

    def _check_resources(self) -> None:
        """Ray would wait for ever for processors that there are not."""
        shared = self._placement == "shared"
        drafters = f" and drafter_actors={self._drafter_count}" if shared else ""
        check(self._bundles(shared), f"workers={self._count} of threads={self._spec.threads}{drafters}")

    def _bundles(self, shared: bool) -> list[dict[str, float]]:
        """What all actors take, with drafters of their own or shared ones."""
        verifiers = [{"CPU": float(self._spec.threads), "GPU": self._gpus}] * self._count
        drafter = self._spec.drafter
        with_model = drafter is not None and drafter.needs_draft_model
        return verifiers + [{"CPU": 1.0, "GPU": self._gpus * with_model}] * (self._drafter_count * shared)

    def _line(self, worker: int) -> Address | None:
        """Where the drafter of a verifier is."""
        return self._addresses[worker % self._drafter_count] if self.shared else None

    def _pays(self) -> bool:
        spec = self._spec
        nodes = spec.draft_length.max_tokens(spec.max_draft_tokens)
        if spec.draft_length.needs_costs:
            nodes = min(_DRAFT_TOKENS, nodes)
        costs = self._verifiers.actors[0].costs.remote(self._addresses[0], spec.in_flight, nodes)
        trip, one_pass = self._all([costs])[0]
        pays = trip <= _WORTH * one_pass
        _LOG.info(
            "placement=auto: %s, as a round trip takes %.1f ms and a pass of the target %.1f ms (it pays up to %.0f%%)",
            f"{self._drafter_count} shared drafter(s)" if pays else "a drafter in every verifier",
            1e3 * trip,
            1e3 * one_pass,
            100 * _WORTH,
        )
        return pays

    def _start_verifier(self, worker: int, cpus: float) -> Any:
        import ray

        threads = self._spec.threads
        actor = ray.remote(VerifierActor).options(
            num_cpus=cpus,
            num_gpus=self._gpus,
            max_restarts=0,
            runtime_env={"env_vars": {"OMP_NUM_THREADS": str(threads)}},
        )
        # Another name after every loss: what comes late from the old one is not taken for the new one's.
        self._clients[worker] = f"{worker}.{self.restarts}"
        return actor.remote(replace(self._spec, in_flight=self._batches.of(worker)), self._clients[worker])

    def _start_drafter(self, number: int, cpus: float) -> Any:
        import ray

        drafter = self._spec.drafter
        assert drafter is not None
        actor = ray.remote(DrafterActor).options(
            name=self._addresses[number].actor,
            num_cpus=cpus,
            num_gpus=self._gpus if drafter.needs_draft_model else 0,
            max_restarts=0,
            runtime_env={"env_vars": {"OMP_NUM_THREADS": "1"}},
        )
        return actor.remote(drafter, partial(make_memory, self._spec, self._learned[number]))

    def _look_after_drafters(self) -> None:
        """Replace lost drafters, and keep what the others learned from time to time."""
        import ray

        now = time.monotonic()
        if now - self._looked < _SECONDS_BETWEEN_LOOKS:
            return
        self._looked = now
        for number in self._drafters.there:
            look = self._looks.pop(number, None)
            if look is not None:
                if not ray.wait([look], timeout=0)[0]:
                    self._looks[number] = look
                    continue
                try:
                    self._learned[number] = recovery.get(look) or self._learned[number]
                except ray.exceptions.RayError as error:
                    recovery.raise_if_refused(error)
                    if not recovery.is_loss(error):
                        raise
                    address = self._addresses[number]
                    self._addresses[number] = address._replace(number=address.number + 1)
                    self._drafters.replace(number, error)
                    continue
            self._looks[number] = self._drafters.actors[number].snapshot.remote(self._spec.snapshot_seconds)


def _check_lost(error: Exception) -> None:
    """Raise an error that is neither a loss nor a lack of memory of the actor that had a figure."""
    if not (recovery.is_loss(error) or recovery.is_out_of_memory(error)):
        raise error


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
