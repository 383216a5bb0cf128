"""Decoding on a cluster: verifiers, each with the target, share the prompts; drafters are theirs or serve them all.

Every prompt ends with exactly one result. Results are streamed as they finish; the prompts of an actor that was lost
start again elsewhere, and give the same tokens where no draft decides them (greedily, or with sample and match), as
everything random in a prompt comes from its own seed.
"""

import logging
import queue
import statistics
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from accel.decoding.drafters.base import Drafter, Models
from accel.decoding.engine import Engine, Request, Result
from accel.decoding.sampling import Sampling
from accel.decoding.sizing import Adaptive, Costs, Fixed, Policy, expected_rate, measure_costs
from accel.decoding.targets.base import Target
from accel.decoding.ties import Ties, check_ties
from accel.decoding.tree import Draws
from accel.decoding.verifiers.base import Verifier
from accel.errors import UserError
from cluster.drafting import Address, Connection, DrafterActor, RemoteDrafter, learns
from cluster.resources import cpu_seconds, peak_rss_bytes, release_memory

_LOG = logging.getLogger(__name__)
# A prompt whose actors were lost so often in a row, without one result, loses them for a reason of its own.
_ATTEMPTS = 10
# Round trips to a shared drafter may take this share of a pass of the target.
_WORTH = 0.2
_TRIPS = 5
_SECONDS_BETWEEN_LOOKS = 0.5
# Tokens of the draft that a round trip is timed with, where sizes are measured later.
_DRAFT_TOKENS = 16

OnTokens = Callable[[str, list[int]], None]


@dataclass(frozen=True)
class Spec:
    """What verifiers and drafters are made of, as plain values.

    target, draft: checkpoint folders; draft may be None where the drafter needs none. vocabulary: of the target.
    drafter: None decodes plainly. path: see accel.decoding.targets.loading. stop: ids that end a sequence.
    draft_tokens: of every draft; None sizes them by measurement, up to max_draft_tokens. memory_bytes: bound of what
    caches take. other_dtypes: of the arithmetic, too, among which the quickest is chosen. compiled: the fast path is.
    learned: what the drafter learned before. snapshot_seconds: how often a shared drafter's memory is kept, from which
    its successor starts.
    """

    target: Path
    vocabulary: int
    verifier: Verifier
    drafter: Drafter | None = None
    draft: Path | None = None
    dtype: torch.dtype = torch.float32
    other_dtypes: tuple[torch.dtype, ...] = ()
    device: str = "cpu"
    threads: int = 1
    path: str = "auto"
    compiled: bool = False
    in_flight: int = 8
    prefill_chunk: int = 512
    stop: tuple[int, ...] = ()
    draft_tokens: int | None = None
    max_draft_tokens: int = 32
    memory_bytes: int | None = None
    learned: Mapping[str, Tensor] | None = None
    snapshot_seconds: float = 10.0


def make_memory(spec: Spec, learned: Mapping[str, Tensor] | None) -> Any:
    """Memory of the drafter, with what was learned before."""
    from accel.decoding.targets.loading import load_target

    assert spec.drafter is not None
    draft = spec.draft
    hidden = spec.drafter.needs_hidden
    load = None
    if draft is not None:
        load = partial(load_target, draft, spec.dtype, spec.device, spec.path, hidden, spec.compiled)
    memory = spec.drafter.new_memory(Models(spec.vocabulary, load, draft))
    if learned:
        spec.drafter.load(memory, learned)
    return memory


def sharing_refusal(spec: Spec, sampling: Sampling) -> str | None:
    """Why a drafter in another process would be wrong: no distributions travel. None where no verifier reads them."""
    if spec.drafter is None or not spec.verifier.reads_draft_probs:
        return None
    if spec.drafter.draws(sampling) is Draws.DETERMINISTIC:
        return None
    return (
        f"placement=shared does not go with verifier={type(spec.verifier).__name__} and drafts that are drawn, whose "
        "distributions do not travel: use placement=private or verifier=sample_and_match"
    )


class VerifierActor:
    """A target in one process, with a drafter of its own or a line to a shared one. client: its name there."""

    def __init__(self, spec: Spec, client: str) -> None:
        torch.set_num_threads(spec.threads)
        torch.set_grad_enabled(False)
        self._spec, self._client = spec, client
        self._target: Target | None = None
        self._drafter: Drafter | None = None
        self._memory: Any = None
        self._costs: Costs | None = None
        self._policy: Policy | None = None
        self._cpu_before = cpu_seconds()

    def prepare(self) -> Target:
        """The target, loaded at the first call."""
        from accel.decoding.targets.loading import load_target

        if self._target is None:
            spec = self._spec
            self._target = load_target(spec.target, spec.dtype, spec.device, spec.path, compiled=spec.compiled)
            self._cpu_before = cpu_seconds()
        return self._target

    def loaded(self) -> None:
        """Return once the target is there."""
        self.prepare()

    def connect(self, shared: Address | None) -> None:
        """Take the shared drafter that is there, or make one here."""
        if self._spec.drafter is None or self._drafter is not None:
            return
        if shared is None:
            self._drafter, self._memory = self._spec.drafter, make_memory(self._spec, self._spec.learned)
        else:
            self._drafter, self._memory = RemoteDrafter(self._spec.drafter), Connection(shared, self._client)

    def costs(self, shared: Address, sequences: int, nodes: int) -> tuple[float, float]:
        """Median seconds of a round trip to a shared drafter, and of a pass of the target."""
        connection = Connection(shared, self._client)
        payload = [([0] * nodes, [0] * nodes)] * sequences
        trips = [connection.ping(payload) for _ in range(2 * _TRIPS)][_TRIPS:]  # the first ones make the connection
        return statistics.median(trips), self._passes().seconds(nodes + 1, sequences)

    def rate(self, dtype: torch.dtype) -> float:
        """Tokens per second that the target promises in a type, before anything is known of the drafts."""
        self.use(dtype)
        most = 0 if self._spec.drafter is None else self._spec.max_draft_tokens
        return expected_rate(self._passes(), most, self._spec.in_flight)

    def use(self, dtype: torch.dtype) -> None:
        """Decode in this type from now on."""
        if dtype != self._spec.dtype:
            self._spec = replace(self._spec, dtype=dtype)
            self._target = self._costs = None

    def target_efficiency(self, sequences: int, nodes: int) -> float:
        """Time of a pass over one token a sequence as a share of that over so many drafted ones more (MoESD)."""
        return self._passes().efficiency(1 + nodes, sequences)

    def ties(self, decoded: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Ties:
        """What greedy decoding in a reduced type changed of some prompts, by a float32 target that is loaded for it."""
        from accel.decoding.targets.loading import load_target

        spec = self._spec
        exact = load_target(spec.target, torch.float32, spec.device, spec.path)
        return Ties.total(check_ties(exact, prompt, tokens, spec.dtype) for prompt, tokens in decoded)

    def _engine(self, on_tokens: OnTokens | None = None) -> Engine:
        """The decoding loop; what sizing learned goes on from one lot of prompts to the next."""
        spec, target = self._spec, self.prepare()
        self._policy = self._policy or self._make_policy()
        return Engine(
            target,
            self._drafter,
            spec.verifier,
            memory=self._memory,
            policy=self._policy,
            stop=spec.stop,
            in_flight=spec.in_flight,
            prefill_chunk=spec.prefill_chunk,
            memory_bytes=spec.memory_bytes,
            on_tokens=on_tokens,
        )

    def _make_policy(self) -> Policy:
        """How many tokens are drafted; the target's passes are timed where that is to be measured."""
        if self._drafter is None:
            return Fixed(0)
        if self._spec.draft_tokens is not None:
            return Fixed(self._spec.draft_tokens)
        return Adaptive(self._passes(), self._spec.max_draft_tokens)

    def _passes(self) -> Costs:
        """Costs of the target's passes, measured at the first call; what its caches held is gone then."""
        if self._costs is None:
            spec = self._spec
            most = spec.max_draft_tokens if spec.draft_tokens is None else spec.draft_tokens
            widths = [1 << power for power in range((most + 1).bit_length())]
            self._costs = measure_costs(self.prepare(), [*widths, most + 1], spec.in_flight)
        return self._costs

    def decode(self, requests: Sequence[Request], shared: Address | None, stream: bool) -> Iterator[Any]:
        """Results as they end; with stream also (id, new ids) after every pass."""
        self.connect(shared)
        if not stream:
            yield from self._engine().decode(requests)
            return
        # The engine calls back from inside its loop, where a generator cannot yield.
        items: queue.Queue[Any] = queue.Queue()
        engine = self._engine(lambda *new: items.put(new))

        def run() -> None:
            try:
                for result in engine.decode(requests):
                    items.put(result)
                items.put(None)
            except BaseException as error:
                items.put(error)

        threading.Thread(target=run, daemon=True).start()
        while (item := items.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item

    def learned(self) -> dict[str, Tensor]:
        """What the drafter here learned so far; nothing where it is not here."""
        if self._drafter is None or isinstance(self._drafter, RemoteDrafter):
            return {}
        return dict(self._drafter.saved(self._memory))

    def usage(self) -> dict[str, float]:
        """CPU seconds since the target was there, and peak memory."""
        release_memory()
        return {"cpu_seconds": cpu_seconds() - self._cpu_before, "peak_rss_bytes": peak_rss_bytes()}


@dataclass
class _Lot:
    """Prompts that a verifier works on, by id, and the stream of its results."""

    worker: int
    waiting: dict[str, Request]
    results: Any


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
        self._verifiers: list[Any] = []
        self._clients: dict[int, str] = {}
        self._drafters: list[Any] = []
        self._learned: list[Mapping[str, Tensor] | None] = [spec.learned] * drafters
        self._looks: dict[int, Any] = {}
        self._looked = 0.0
        self.shared = False
        self.restarts = 0

    def prepare(self) -> None:
        """Start the actors, load the models, and choose where drafters are; UserError where something is wrong."""
        if self._verifiers:
            return
        self._check_resources()
        try:
            maybe = self._placement == "shared" or (
                self._placement == "auto"
                and self._count > 1
                and self._spec.drafter is not None
                and learns(self._spec.drafter)
                and self._gpus_needed(shared=True) <= _gpus_there()
            )
            if maybe:
                self._drafters = [self._start_drafter(number) for number in range(self._drafter_count)]
            self._verifiers = [self._start_verifier(worker) for worker in range(self._count)]
            _get([drafter.prepare.remote() for drafter in self._drafters])
            self._choose_dtype()
            _get([verifier.loaded.remote() for verifier in self._verifiers])
            self.shared = maybe and (self._placement == "shared" or self._pays())
            if not self.shared:
                _kill(self._drafters)
                self._drafters = []
            _get([verifier.connect.remote(self._line(worker)) for worker, verifier in enumerate(self._verifiers)])
        except BaseException:
            self.close()
            raise

    def __call__(self, requests: Iterable[Request]) -> Iterator[Result]:
        """One result for every request, which differ in their ids, as they end."""
        import ray

        waiting = deque(requests)
        assert len({request.id for request in waiting}) == len(waiting), "ids differ"
        self.prepare()
        refusals = (sharing_refusal(self._spec, request.sampling) for request in waiting) if self.shared else ()
        refusal = next(filter(None, refusals), None)
        if refusal is not None:
            raise UserError(refusal)
        lots: list[_Lot] = []
        lost_in_a_row = 0
        while waiting or lots:
            busy = {lot.worker for lot in lots}
            lots += [self._send(worker, waiting) for worker in range(self._count) if worker not in busy and waiting]
            ready, _ = ray.wait([lot.results for lot in lots], num_returns=1, timeout=_SECONDS_BETWEEN_LOOKS)
            self._look_after_drafters()
            for lot in [lot for lot in lots if any(lot.results is each for each in ready)]:
                try:
                    item = _get(next(lot.results))
                except StopIteration:
                    assert not lot.waiting, lot.waiting
                    lots.remove(lot)
                except (ray.exceptions.RayActorError, ray.exceptions.ObjectLostError) as error:
                    lost_in_a_row += 1
                    if getattr(error, "actor_init_failed", False) or lost_in_a_row == _ATTEMPTS:
                        raise
                    lots.remove(lot)
                    waiting.extendleft(reversed(lot.waiting.values()))
                    self._replace_verifier(lot.worker, error)
                else:
                    if not isinstance(item, Result):
                        if self._on_tokens is not None:
                            self._on_tokens(*item)
                        continue
                    lost_in_a_row = 0
                    del lot.waiting[item.id]
                    yield item

    def target_efficiency(self, nodes: int) -> float | None:
        """Of passes with so many drafted tokens a sequence, measured; None where an actor was lost."""
        import ray

        try:
            return float(_get(self._verifiers[0].target_efficiency.remote(self._spec.in_flight, nodes)))
        except ray.exceptions.RayActorError:
            return None

    def ties(self, decoded: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Ties | None:
        """What a reduced type changed of greedily decoded (prompt, tokens); None where an actor was lost."""
        import ray

        try:
            found: Ties = _get(self._verifiers[0].ties.remote(list(decoded)))
        except ray.exceptions.RayActorError:
            return None
        return found

    @property
    def dtype(self) -> torch.dtype:
        """Type of the arithmetic; chosen once the actors are prepared."""
        return self._spec.dtype

    def learned(self) -> Mapping[str, Tensor]:
        """What drafters learned: the first shared one, or the first verifier's own."""
        import ray

        actors = self._drafters or self._verifiers
        try:
            found: Mapping[str, Tensor] = _get(actors[0].learned.remote())
        except ray.exceptions.RayActorError:
            return self._learned[0] or {}
        self._learned[0] = found
        return found

    def close(self) -> dict[str, float]:
        """End the actors; returns what they used, added up, and the largest peak of memory."""
        import ray

        actors = [*self._verifiers, *self._drafters]
        usages = []
        for actor in actors:
            try:
                usages.append(ray.get(actor.usage.remote(), timeout=10))
            except (ray.exceptions.RayError, TimeoutError):  # lost, or in the middle of something
                continue
        _kill(actors)
        self._verifiers, self._drafters = [], []
        return {
            "cpu_seconds": sum(usage["cpu_seconds"] for usage in usages),
            "peak_rss_bytes": max((usage["peak_rss_bytes"] for usage in usages), default=0),
        }

    def _choose_dtype(self) -> None:
        """Measure the target in every type that may be, once, and take the quickest for all."""
        if not self._spec.other_dtypes:
            return
        dtypes = (self._spec.dtype, *self._spec.other_dtypes)
        rates = {dtype: float(_get(self._verifiers[0].rate.remote(dtype))) for dtype in dtypes}
        chosen = max(dtypes, key=lambda dtype: rates[dtype])
        promised = ", ".join(f"{rate:.0f} tokens/s in {_name(dtype)}" for dtype, rate in rates.items())
        _LOG.info("dtype=auto: %s, as passes promise %s", _name(chosen), promised)
        self._spec = replace(self._spec, dtype=chosen, other_dtypes=())
        _get([verifier.use.remote(chosen) for verifier in self._verifiers])

    def _send(self, worker: int, waiting: deque[Request]) -> _Lot:
        """Give a verifier prompts: large lots at first, so that its slots seldom run empty, and small ones at last."""
        count = max(self._spec.in_flight, -(-len(waiting) // (2 * self._count if self._count > 1 else 1)))
        taken = [waiting.popleft() for _ in range(min(count, len(waiting)))]
        decode = self._verifiers[worker].decode.options(num_returns="streaming")
        results = decode.remote(taken, self._line(worker), self._on_tokens is not None)
        return _Lot(worker, {request.id: request for request in taken}, results)

    def _check_resources(self) -> None:
        """Ray would wait for ever for processors that there are not."""
        import ray

        cpus, has = self._count * self._spec.threads, ray.cluster_resources().get("CPU", 0)
        if cpus > has:
            raise UserError(
                f"workers={self._count} of threads={self._spec.threads} need {cpus} CPUs, and Ray has {has:g}"
            )
        needed, there = self._gpus_needed(self._placement == "shared"), _gpus_there()
        if needed > there:
            raise UserError(f"workers={self._count} need {needed:g} GPUs with their drafters, and Ray has {there:g}")

    def _gpus_needed(self, shared: bool) -> float:
        """Of all actors, with drafters of their own or shared ones."""
        drafter = self._spec.drafter
        with_model = shared and drafter is not None and drafter.needs_draft_model
        return self._gpus * (self._count + (self._drafter_count if with_model else 0))

    def _line(self, worker: int) -> Address | None:
        """Where the drafter of a verifier is."""
        return self._addresses[worker % self._drafter_count] if self.shared else None

    def _pays(self) -> bool:
        spec = self._spec
        nodes = min(_DRAFT_TOKENS, spec.max_draft_tokens) if spec.draft_tokens is None else spec.draft_tokens
        trip, one_pass = _get(self._verifiers[0].costs.remote(self._addresses[0], spec.in_flight, nodes))
        pays = trip <= _WORTH * one_pass
        _LOG.info(
            "placement=auto: %s, as a round trip takes %.1f ms and a pass of the target %.1f ms (it pays up to %.0f%%)",
            f"{self._drafter_count} shared drafter(s)" if pays else "a drafter in every verifier",
            1e3 * trip,
            1e3 * one_pass,
            100 * _WORTH,
        )
        return pays

    def _start_verifier(self, worker: int) -> Any:
        import ray

        threads = self._spec.threads
        actor = ray.remote(VerifierActor).options(
            num_cpus=threads,
            num_gpus=self._gpus,
            max_restarts=0,
            runtime_env={"env_vars": {"OMP_NUM_THREADS": str(threads)}},
        )
        # Another name after every loss: what comes late from the old one is not taken for the new one's.
        self._clients[worker] = f"{worker}.{self.restarts}"
        return actor.remote(self._spec, self._clients[worker])

    def _start_drafter(self, number: int) -> Any:
        import ray

        drafter = self._spec.drafter
        assert drafter is not None
        actor = ray.remote(DrafterActor).options(
            name=self._addresses[number].actor,
            num_cpus=1,
            num_gpus=self._gpus if drafter.needs_draft_model else 0,
            max_restarts=0,
            runtime_env={"env_vars": {"OMP_NUM_THREADS": "1"}},
        )
        return actor.remote(drafter, partial(make_memory, self._spec, self._learned[number]))

    def _replace_verifier(self, worker: int, error: Exception) -> None:
        _LOG.warning("lost a verifier (%s); starting another", str(error).strip().splitlines()[0])
        _kill([self._verifiers[worker]])
        for drafter in self._drafters:
            drafter.forget.remote(self._clients[worker])
        self.restarts += 1
        self._verifiers[worker] = self._start_verifier(worker)

    def _look_after_drafters(self) -> None:
        """Replace lost drafters, and keep what the others learned from time to time."""
        import ray

        now = time.monotonic()
        if now - self._looked < _SECONDS_BETWEEN_LOOKS:
            return
        self._looked = now
        for number, drafter in enumerate(self._drafters):
            look = self._looks.pop(number, None)
            if look is not None:
                if not ray.wait([look], timeout=0)[0]:
                    self._looks[number] = look
                    continue
                try:
                    self._learned[number] = _get(look) or self._learned[number]
                except ray.exceptions.RayActorError as error:
                    if getattr(error, "actor_init_failed", False):
                        raise
                    self._replace_drafter(number, error)
                    continue
            self._looks[number] = drafter.snapshot.remote(self._spec.snapshot_seconds)

    def _replace_drafter(self, number: int, error: Exception) -> None:
        _LOG.warning("lost a drafter (%s); starting another", str(error).strip().splitlines()[0])
        address = self._addresses[number]
        self._addresses[number] = address._replace(number=address.number + 1)
        self._drafters[number] = self._start_drafter(number)
        self.restarts += 1


def _get(reference: Any) -> Any:
    """ray.get, which raises a user's mistake as it was raised."""
    import ray

    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise error.cause from None
        raise


def _gpus_there() -> float:
    import ray

    return float(ray.cluster_resources().get("GPU", 0))


def _kill(actors: Iterable[Any]) -> None:
    import ray

    for actor in actors:
        ray.kill(actor)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
