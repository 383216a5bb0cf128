"""Decoding on a cluster: verifiers, each with the target, share the prompts; drafters are theirs or serve them all.

Every prompt ends with exactly one result. Results are streamed as they finish. The prompts of a lost actor start again
on another one. They give the same tokens where these do not depend on the drafts (greedily, or with sample and match),
as everything random in a prompt comes from its own seed. Such prompts of a straggler are re-executed on an idle
verifier.
"""

import logging
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import torch
from ray import ObjectRef
from ray.actor import ActorHandle
from ray.exceptions import RayError
from torch import Tensor

from hasten.accel.decoding.engine import Request, Result
from hasten.accel.decoding.ties import Ties
from hasten.accel.errors import UserError
from hasten.cluster.actors.verifier import DecodeSpec, OnTokens, make_memory, sharing_refusal
from hasten.cluster.programs.decoding_work import DecodeWorkload
from hasten.cluster.programs.shared_drafters import SharedDrafters
from hasten.cluster.runtime import recovery
from hasten.cluster.runtime.actor_pool import wait_for_all
from hasten.cluster.runtime.dispatcher import Dispatcher
from hasten.cluster.runtime.placement import ActorResources, check, grows, nodes, packs

_LOG = logging.getLogger(__name__)
T = TypeVar("T")
# Drafters are shared where round trips take at most this share of a pass of the target.
_MAX_ROUND_TRIP = 0.2
# How long a run waits for streams to end after the last result, so that its verifiers are free at once.
_SETTLE_SECONDS = 0.5
# Draft tokens of the round trip that is timed, where their number is chosen later.
_DRAFT_TOKENS = 16


class Decoders:
    """Several verifiers, and drafters where they are shared; started at the first use, inside a Ray session.

    placement: `shared` drafters are actors of their own, `private` ones live in every verifier; `auto` shares those
    that learn, among two verifiers or more, where a round trip is short compared with a pass of the target. shared:
    which it is. needs, drafter_needs: what each verifier and each shared drafter asks the cluster for; None is
    spec.threads CPUs, and 1 CPU. on_tokens: called with an id and new tokens as they come.
    """

    def __init__(
        self,
        spec: DecodeSpec,
        workers: int,
        drafters: int = 1,
        needs: ActorResources | None = None,
        drafter_needs: ActorResources | None = None,
        placement: str = "auto",
        on_tokens: OnTokens | None = None,
    ) -> None:
        self._placement = placement if spec.drafter is not None else "private"
        self._count, self._drafter_count = workers, drafters
        self._needs = needs or ActorResources(spec.threads)
        self._drafter_needs = drafter_needs or ActorResources()
        # The workload's spec may be replaced by one with another type; memories of drafters are made from that one.
        self._drafters = SharedDrafters(
            f"hasten-drafter-{uuid.uuid4().hex}",
            spec.drafter,
            drafters,
            self._drafter_needs,
            lambda learned: partial(make_memory, self._work.spec, learned),
            spec.learned,
            spec.snapshot_seconds,
        )
        self._work = DecodeWorkload(spec, workers, self._needs, self._drafters, on_tokens)
        self._verifiers = self._work.pool
        self._dispatcher = Dispatcher(self._work)

    @property
    def shared(self) -> bool:
        """Whether drafters are shared; known once the actors are prepared."""
        return self._work.shared

    @property
    def restarts(self) -> int:
        """Actors that were lost and replaced."""
        return self._verifiers.restarts + self._drafters.pool.restarts

    @property
    def dtype(self) -> torch.dtype:
        """Type of the arithmetic; chosen once the actors are prepared."""
        return self._work.spec.dtype

    def prepare(self) -> None:
        """Start the actors, load the models, and choose where drafters are; UserError where something is wrong."""
        if self._verifiers.actors:
            return
        self._check_resources()
        try:
            recovery.retry(self._prepare, lost=self._restart, out_of_memory=self._restart)
        except BaseException:
            self.close()
            raise

    def __call__(self, requests: Iterable[Request]) -> Iterator[Result]:
        """One result for every request, which differ in their ids, as they end."""
        requests = list(requests)
        assert len({request.id for request in requests}) == len(requests), "ids differ"
        self.prepare()
        spec = self._work.spec
        refusals = (sharing_refusal(spec, request.sampling) for request in requests) if self.shared else ()
        refusal = next(filter(None, refusals), None)
        if refusal is not None:
            raise UserError(refusal)
        queue = self._work.queue(requests)
        for _, result in self._dispatcher.run([request.id for request in requests], queue):
            yield result
        self._dispatcher.settle(_SETTLE_SECONDS)

    def target_efficiency(self, nodes: int) -> float | None:
        """Of passes with so many draft tokens a sequence, measured; None where an actor or its memory failed."""
        sequences = min(self._work.batches.of(worker) for worker in range(self._count))
        return self._ask(lambda verifier: verifier.target_efficiency.remote(sequences, nodes))

    def ties(self, decoded: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Ties | None:
        """What a reduced type changed of greedily decoded (prompt, tokens); None where an actor or memory failed."""
        return self._ask(lambda verifier: verifier.ties.remote(list(decoded)))

    def learned(self) -> Mapping[str, Tensor]:
        """What drafters learned: the first shared one, or the first verifier's own."""
        if self.shared:
            return self._drafters.learned()
        return self._ask(lambda verifier: verifier.learned.remote()) or self._work.spec.learned or {}

    def close(self) -> dict[str, float]:
        """End the actors; returns what they used, added up, and the largest peak of memory."""
        pools = (self._verifiers, self._drafters.pool)
        # Some may be lost or busy.
        usages = recovery.answers([pool.actors[index].usage.remote() for pool in pools for index in pool.alive])
        self._verifiers.end()
        self._drafters.end()
        self._dispatcher.reset()
        return {
            "cpu_seconds": sum(usage["cpu_seconds"] for usage in usages),
            "peak_rss_bytes": max((usage["peak_rss_bytes"] for usage in usages), default=0),
        }

    def _prepare(self) -> None:
        spec = self._work.spec
        maybe_shared = self._placement == "shared" or (
            self._placement == "auto"
            and self._count > 1
            and spec.drafter is not None
            and spec.drafter.learns
            and packs(nodes(), self._bundles(shared=True))
        )
        # After a loss the nodes that are left may hold each pool but not both.
        fits = packs(nodes(), self._bundles(maybe_shared)) or grows()
        if maybe_shared:
            self._drafters.pool.begin(fits)
        self._verifiers.begin(fits)
        self._drafters.pool.fill()
        self._verifiers.fill()
        self._all([drafter.prepare.remote() for drafter in self._drafters.pool.actors])
        self._choose_dtype()
        self._all([verifier.loaded.remote() for verifier in self._verifiers.actors])
        self._work.shared = maybe_shared and (self._placement == "shared" or self._sharing_pays())
        if not self.shared:
            self._drafters.end()
        verifiers = enumerate(self._verifiers.actors)
        self._all([verifier.connect.remote(self._work.address(worker)) for worker, verifier in verifiers])

    def _restart(self, error: BaseException) -> None:
        """End all actors before they are started again."""
        self.close()
        if recovery.is_out_of_memory(error):
            for worker in range(self._count):
                self._work.batches.halve(worker, f"verifier {worker}")
        else:
            _LOG.warning("lost an actor (%s); starting all of them again", recovery.reason(error))
        self._drafters.renew_addresses()

    def _all(self, calls: Sequence[ObjectRef]) -> Any:
        """Results of calls, in their order."""
        wait_for_all([self._verifiers, self._drafters.pool], calls)
        return recovery.get(list(calls))

    def _ask(self, call: Callable[[ActorHandle], "ObjectRef[T]"]) -> T | None:
        """Result of a call of a verifier, an idle one if there is one; None where it is lost or out of memory."""
        alive = sorted(self._verifiers.alive, key=lambda worker: (self._dispatcher.is_busy(worker), worker))
        if not alive:
            self._verifiers.fill()
            alive = self._verifiers.alive
        try:
            result: T = recovery.get(call(self._verifiers.actors[alive[0]]))
        except RayError as error:
            recovery.raise_unless_lost(error)
            return None
        return result

    def _choose_dtype(self) -> None:
        """Measure the target in every type that is allowed, once, and take the fastest for all."""
        spec = self._work.spec
        if not spec.other_dtypes:
            return
        dtypes = (spec.dtype, *spec.other_dtypes)
        rates = {dtype: float(self._all([self._verifiers.actors[0].rate.remote(dtype)])[0]) for dtype in dtypes}
        chosen = max(dtypes, key=lambda dtype: rates[dtype])
        promised = ", ".join(f"{rate:.0f} tokens/s in {_name(dtype)}" for dtype, rate in rates.items())
        _LOG.info("dtype=auto: %s, as passes promise %s", _name(chosen), promised)
        self._work.spec = replace(spec, dtype=chosen, other_dtypes=())
        self._all([verifier.use.remote(chosen) for verifier in self._verifiers.actors])

    def _check_resources(self) -> None:
        """Ray would wait for ever for processors that do not exist."""
        shared = self._placement == "shared"
        drafters = f" and drafter_actors={self._drafter_count}" if shared else ""
        check(self._bundles(shared), f"workers={self._count} of threads={self._work.spec.threads}{drafters}")

    def _bundles(self, shared: bool) -> list[dict[str, float]]:
        """What all actors take, with private drafters or shared ones."""
        verifiers = [self._needs.bundle] * self._count
        return verifiers + [self._drafter_needs.bundle] * (self._drafter_count * shared)

    def _sharing_pays(self) -> bool:
        spec = self._work.spec
        nodes = spec.draft_length.max_tokens(spec.max_draft_tokens)
        if spec.draft_length.needs_costs:
            nodes = min(_DRAFT_TOKENS, nodes)
        costs = self._verifiers.actors[0].costs.remote(self._drafters.address(0), spec.in_flight, nodes)
        trip, one_pass = self._all([costs])[0]
        pays = bool(trip <= _MAX_ROUND_TRIP * one_pass)
        _LOG.info(
            "placement=auto: %s, as a round trip takes %.1f ms and a pass of the target %.1f ms (it pays up to %.0f%%)",
            f"{self._drafter_count} shared drafter(s)" if pays else "a drafter in every verifier",
            1e3 * trip,
            1e3 * one_pass,
            100 * _MAX_ROUND_TRIP,
        )
        return pays


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
