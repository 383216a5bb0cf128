"""Prompts as a workload: assignments of several prompts to a verifier, and the stream of their results."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from ray.actor import ActorHandle
from ray.exceptions import RayError

from hasten.accel.decoding.engine import Request, Result
from hasten.cluster.actors.drafter import Address
from hasten.cluster.actors.rank_verifier import RankVerifier
from hasten.cluster.actors.verifier import DecodeSpec, OnTokens, VerifierActor
from hasten.cluster.programs.shared_drafters import SharedDrafters
from hasten.cluster.runtime import recovery
from hasten.cluster.runtime.actor_pool import ActorPool, start_actor
from hasten.cluster.runtime.dispatcher import Assignment, PoolWorkload, SharedQueue, all_ready
from hasten.cluster.runtime.group_pool import GroupPool
from hasten.cluster.runtime.placement import ActorResources
from hasten.cluster.runtime.process_group import ProcessGroup


class DecodeWorkload(PoolWorkload[str, Result]):
    """Prompts by id. An assignment is several prompts; its handle is a stream of results and new tokens.

    drafters: the shared drafters; used if `shared` is set. on_tokens: called with a request's id and its new ids.
    """

    def __init__(
        self,
        spec: DecodeSpec,
        count: int,
        needs: ActorResources,
        drafters: SharedDrafters,
        on_tokens: OnTokens | None,
    ) -> None:
        division = spec.division
        super().__init__(
            ActorPool("a verifier", count, needs, self._start)
            if division is None
            else GroupPool("a target group", count, division.size, needs, self._start_group)
        )
        self.spec, self.shared = spec, False
        self._count, self._needs, self._drafters, self._on_tokens = count, needs, drafters, on_tokens
        self._requests: dict[str, Request] = {}
        self._clients: dict[int, str] = {}
        self.batches = recovery.Batches(
            "in_flight", spec.in_flight, "use a smaller max_new_tokens, a smaller memory_bytes, or fewer workers"
        )

    def queue(self, requests: Iterable[Request]) -> SharedQueue[str]:
        """Prompts to decode; assignments are large at first, so that slots are seldom empty, and small at the end."""
        self._requests = {request.id: request for request in requests}
        parts = 2 * self._count if self._count > 1 else 1
        return SharedQueue(self._requests, lambda waiting: max(self.spec.in_flight, -(-waiting // parts)))

    def submit(self, worker: int, keys: Sequence[str]) -> object:
        """Start decoding; returns the stream."""
        decode = self.pool.actors[worker].decode.options(num_returns="streaming")
        requests = [self._requests[key] for key in keys]
        return decode.remote(requests, self.address(worker), self._on_tokens is not None)

    def wait(self, handles: Sequence[object], seconds: float) -> Sequence[object]:
        """Streams with a new item; lost drafters are replaced meanwhile, too."""
        ready = all_ready([self.pool, self._drafters.pool], handles, seconds)
        self._drafters.poll()
        return ready

    def receive(self, assignment: Assignment[str]) -> tuple[Sequence[tuple[str, Result]], bool]:
        """The next result of the stream; none if the next item is new tokens."""
        stream = assignment.handle
        assert isinstance(stream, Iterator)
        try:
            item = recovery.get(next(stream))
        except StopIteration:
            assert not assignment.keys, assignment.keys
            return [], True
        if isinstance(item, Result):
            return [(item.id, item)], False
        if self._on_tokens is not None:
            self._on_tokens(*item)
        return [], False

    def recover(self, worker: int, keys: Sequence[str], error: RayError) -> None:
        """Replace a verifier that was lost or ran out of memory."""
        error = self.pool.cause(error, worker)
        recovery.raise_if_refused(error)
        out_of_memory = recovery.is_out_of_memory(error)
        if out_of_memory:
            self.batches.halve(worker, self.name)
        elif not recovery.is_loss(error):
            raise error
        self._drafters.forget(self._clients[worker])
        # The verifier is replaced even if only an item of the stream was lost: it would be busy with the rest.
        self.pool.replace(worker, None if out_of_memory else error)

    def batch(self, worker: int) -> int:
        """Sequences in flight."""
        return self.batches.of(worker)

    def is_repeatable(self, key: str) -> bool:
        """Whether another verifier decodes the same tokens (they do not depend on drafts), and none were streamed."""
        verifier, greedy = self.spec.verifier, self._requests[key].sampling.is_greedy
        fixed = self.spec.drafter is None or verifier.is_independent_of_drafts(greedy)
        return fixed and self._on_tokens is None

    def address(self, worker: int) -> Address | None:
        """Address of a verifier's shared drafter; None with private drafters."""
        return self._drafters.address(worker) if self.shared else None

    def _start(self, worker: int, cpus: float) -> ActorHandle:
        return start_actor(VerifierActor, self._needs.options(cpus, self.spec.threads), *self._arguments(worker))

    def _start_group(self, worker: int, cpus: float) -> ProcessGroup:
        assert self.spec.division is not None
        arguments, device = self._arguments(worker), self.spec.device
        size, name = self.spec.division.size, self.pool.name
        group = ProcessGroup(RankVerifier, size, self._needs, arguments, device, name, cpus)
        group.watch([rank.follow.remote() for rank in group.ranks[1:]])
        return group

    def _arguments(self, worker: int) -> tuple[DecodeSpec, str]:
        """Arguments of a new verifier's constructor."""
        # A new client name after every loss, so that drafters do not mistake late messages of the old verifier.
        self._clients[worker] = f"{worker}.{self.pool.restarts}"
        return replace(self.spec, in_flight=self.batches.of(worker)), self._clients[worker]
