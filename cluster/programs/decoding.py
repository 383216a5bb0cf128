"""Decoding on a cluster: verifiers, each with the target, share the prompts; drafters are private or shared.

Every prompt has exactly one result, and results are streamed as they finish. The prompts of a lost verifier are decoded
again by another one. They give the same tokens if these do not depend on the drafts (greedy decoding, or sample and
match), because all random numbers of a prompt come from its own seed. Such prompts of a straggler are re-executed on an
idle verifier.
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
from hasten.accel.decoding.sampling import Sampling
from hasten.accel.decoding.ties import Ties
from hasten.accel.errors import UserError
from hasten.cluster.actors.verifier import DecodeSpec, OnTokens, make_memory, sharing_refusal
from hasten.cluster.programs.decoding_work import DecodeWorkload
from hasten.cluster.programs.shared_drafters import SharedDrafters
from hasten.cluster.runtime import recovery
from hasten.cluster.runtime.actor_pool import wait_for_all
from hasten.cluster.runtime.dispatcher import Dispatcher
from hasten.cluster.runtime.placement import ActorResources, check, grows, nodes, packs
from hasten.cluster.runtime.process_group import group_needs

_LOG = logging.getLogger(__name__)
T = TypeVar("T")
# placement=auto shares drafters if a round trip takes at most this share of a pass of the target.
_MAX_ROUND_TRIP = 0.2
# Time that a run waits for streams to end after the last result, so that its verifiers are idle afterwards.
_SETTLE_SECONDS = 0.5
# Draft tokens of the timed round trip if the draft length adapts.
_DRAFT_TOKENS = 16


class Decoders:
    """Verifiers, and shared drafters if any; they are started at the first use, inside a Ray session.

    placement: `shared` drafters are separate actors, `private` ones run inside each verifier. `auto` shares drafters
    that learn, if there are two verifiers or more and a round trip is short compared with a pass of the target. needs,
    drafter_needs: resources of each verifier and each shared drafter; None is spec.threads CPUs, and 1 CPU. on_tokens:
    called with a request's id and its new ids after every pass.
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
        # Memories are built from the workload's spec, because _choose_dtype may replace it by one with another dtype.
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
        """Dtype of the arithmetic; chosen once the actors are prepared."""
        return self._work.spec.dtype

    def prepare(self) -> None:
        """Start the actors, load the models, choose dtype and placement; UserError for wrong options or resources."""
        if self._verifiers.actors:
            return
        self._check_resources()
        try:
            recovery.retry(self._prepare, lost=self._restart, out_of_memory=self._restart)
        except BaseException:
            self.close()
            raise

    def __call__(self, requests: Iterable[Request]) -> Iterator[Result]:
        """One result for each request, as they end; the requests' ids must be distinct."""
        requests = list(requests)
        assert len({request.id for request in requests}) == len(requests), "ids must be distinct"
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
        """Measured target efficiency with `nodes` draft tokens a sequence; None if the actor was lost meanwhile."""
        sequences = min(self._work.batches.of(worker) for worker in range(self._count))
        return self._ask(lambda verifier: verifier.target_efficiency.remote(sequences, nodes))

    def ties(self, decoded: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Ties | None:
        """Ties and faults of greedily decoded (prompt, tokens) in a reduced dtype; None if the actor was lost."""
        return self._ask(lambda verifier: verifier.ties.remote(list(decoded)))

    def learned(self) -> Mapping[str, Tensor]:
        """What the drafter learned: that of the first shared one, or of the first verifier's private one."""
        if self.shared:
            return self._drafters.learned()
        return self._ask(lambda verifier: verifier.learned.remote()) or self._work.spec.learned or {}

    def close(self) -> dict[str, float]:
        """End the actors; returns the sum of their CPU seconds and the largest peak memory."""
        pools = (self._verifiers, self._drafters.pool)
        # Lost or busy actors do not answer, and are not counted.
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
            and not spec.drafter.reads_target
            and packs(nodes(), self._bundles(shared=True))
        )
        # After a loss, the remaining nodes may have room for either pool but not for both.
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
            _LOG.warning("lost an actor (%s); restarting all actors", recovery.reason(error))
        self._drafters.renew_addresses()

    def _all(self, calls: Sequence[ObjectRef]) -> Any:
        """Results of calls, in the order of the calls."""
        try:
            wait_for_all([self._verifiers, self._drafters.pool], calls)
        except RayError as error:
            cause = self._verifiers.cause(error)
            recovery.raise_if_refused(cause)
            raise cause from None
        return recovery.get(list(calls))

    def _ask(self, call: Callable[[ActorHandle], "ObjectRef[T]"]) -> T | None:
        """Result of a call to a verifier, preferably an idle one; None if it is lost or out of memory."""
        alive = sorted(self._verifiers.alive, key=lambda worker: (self._dispatcher.is_busy(worker), worker))
        if not alive:
            self._verifiers.fill()
            alive = self._verifiers.alive
        try:
            result: T = recovery.get(call(self._verifiers.actors[alive[0]]))
        except RayError as error:
            recovery.raise_unless_lost(self._verifiers.cause(error, alive[0]))
            return None
        return result

    def _choose_dtype(self) -> None:
        """Measure the target in each allowed dtype on one verifier, and use the fastest on all."""
        spec = self._work.spec
        if not spec.other_dtypes:
            return
        dtypes = (spec.dtype, *spec.other_dtypes)
        rates = {dtype: float(self._all([self._verifiers.actors[0].rate.remote(dtype)])[0]) for dtype in dtypes}
        chosen = max(dtypes, key=lambda dtype: rates[dtype])
        expected = ", ".join(f"{rate:.0f} tokens/s in {_name(dtype)}" for dtype, rate in rates.items())
        _LOG.info("dtype=auto: using %s; expected from timed passes: %s", _name(chosen), expected)
        self._work.spec = replace(spec, dtype=chosen, other_dtypes=())
        self._all([verifier.use.remote(chosen) for verifier in self._verifiers.actors])

    def _check_resources(self) -> None:
        """Raise UserError if the cluster lacks the resources, for which Ray would wait for ever."""
        shared, drafter = self._placement == "shared", self._work.spec.drafter
        if shared and drafter is not None and drafter.reads_target:
            raise UserError(sharing_refusal(self._work.spec, Sampling()) or "")
        drafters = f" and drafter_actors={self._drafter_count}" if shared else ""
        division = self._work.spec.division
        workers = f"workers={self._count} of" + (f" target_group.size={division.size} and" if division else "")
        check(self._bundles(shared), f"{workers} threads={self._work.spec.threads}{drafters}")

    def _bundles(self, shared: bool) -> list[dict[str, float]]:
        """Resources of all actors, with shared or private drafters."""
        division = self._work.spec.division
        needs = self._needs if division is None else group_needs(division.size, self._needs)
        verifiers = [needs.bundle] * self._count
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
            "placement=auto: %s, because a round trip takes %.1f ms and a pass of the target %.1f ms (limit: %.0f%%)",
            f"{self._drafter_count} shared drafter(s)" if pays else "a private drafter in every verifier",
            1e3 * trip,
            1e3 * one_pass,
            100 * _MAX_ROUND_TRIP,
        )
        return pays


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
