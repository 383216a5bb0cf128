"""The drafter actor and its client: one drafter serves several verifiers, and learns from what all of them decode.

Messages contain committed and drafted ids, parents and labels, and for drafters that observe the target the ids and
probabilities of its most probable tokens. Distributions over the vocabulary are never sent.
"""

import logging
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import ray
import torch
from ray import ObjectRef
from ray.exceptions import GetTimeoutError, RayError
from torch import Tensor

from hasten.accel.decoding.context import Context
from hasten.accel.decoding.drafters.base import Drafter, Models, Outcome
from hasten.accel.decoding.sampling import Sampling
from hasten.accel.decoding.tree import DraftSampling, DraftTree
from hasten.cluster.runtime.recovery import is_loss
from hasten.cluster.runtime.resources import cpu_seconds, peak_rss_bytes, release_memory

_LOG = logging.getLogger(__name__)
# A drafter that has not answered for this many seconds is unresponsive; decoding continues without drafts.
PATIENCE_SECONDS = 10.0
# Events are sent with the next request for trees, or separately once there are this many.
_MAX_EVENTS = 256
_RECONNECT_SECONDS = 0.2
# Share of a drafter's time that snapshots may take.
_SNAPSHOT_SHARE = 0.01
# A whole snapshot is taken once all changes since the last one are this many times its size.
_CHANGED_SHARE = 4
# Number of successive replacements that are tried, because the first replacement may be lost, too.
_REPLACEMENTS = 3


class PlainTree(NamedTuple):
    """A deterministic tree as plain lists."""

    tokens: list[int]
    parents: list[int]
    labels: list[Hashable] | None

    @classmethod
    def of(cls, tree: DraftTree) -> "PlainTree":
        """A plain copy of a tree, without draft_probs."""
        return cls(list(tree.tokens), list(tree.parents), None if tree.labels is None else list(tree.labels))

    def tree(self) -> DraftTree:
        """The tree as a DraftTree."""
        return DraftTree(self.tokens, self.parents, labels=self.labels)


class Begin(NamedTuple):
    """A sequence starts, or continues at a new drafter instance. seed: of the drafter's random numbers."""

    key: int
    tokens: list[int]
    prompt_length: int
    sampling: Sampling
    seed: int


class Observed(NamedTuple):
    """An outcome. new: ids committed since the last message. tree: None if it is the proposed one."""

    key: int
    new: list[int]
    tree: PlainTree | None
    path: list[int]
    token: int
    top_tokens: np.ndarray | None
    top_probs: np.ndarray | None
    ended: bool


class End(NamedTuple):
    """A sequence ended."""

    key: int


Event = Begin | Observed | End


class Snapshot(NamedTuple):
    """What a drafter learned, see `Drafter.changes`. whole: whether it is everything, which replaces earlier ones."""

    whole: bool
    tensors: dict[str, Tensor]


class DrafterActor:
    """A drafter with its memory in one process, for the sequences of several verifiers.

    make_memory: builds the memory, including what was learned before; called at the first use.
    """

    def __init__(self, drafter: Drafter, make_memory: Callable[[], object]) -> None:
        torch.set_num_threads(1)
        torch.set_grad_enabled(False)
        self._drafter, self._make_memory = drafter, make_memory
        self._memory: object = None
        self._is_prepared = False
        self._sequences: dict[tuple[str, int], Context] = {}
        self._trees: dict[tuple[str, int], DraftTree] = {}
        self._observed = self._saved_at = 0
        self._saved = time.monotonic()
        self._whole_bytes = self._changed_bytes = 0
        self._snapshot_cost = 0.0  # CPU seconds of the last snapshot
        self._cpu_before = cpu_seconds()

    def prepare(self) -> None:
        """Build the memory if that has not been done."""
        if not self._is_prepared:
            self._memory = self._make_memory()
            self._is_prepared = True

    def ping(self, payload: object) -> object:
        """Return the payload, to measure a round trip."""
        return payload

    def serve(
        self, client: str, events: Sequence[Event], requests: Sequence[tuple[int, list[int]]], budget: int
    ) -> list[PlainTree]:
        """Apply events in order, then return a tree for each request (key of a sequence, its new ids)."""
        self._apply_all(client, events)
        contexts = []
        for key, new in requests:
            contexts.append(self._sequences[client, key])
            contexts[-1].tokens += new
        if not contexts:
            return []
        trees = self._drafter.propose_all(contexts, self._memory, budget)
        self._trees |= {(client, key): tree for (key, _), tree in zip(requests, trees, strict=True)}
        return [PlainTree.of(tree) for tree in trees]

    def prefill(self, client: str, events: Sequence[Event], keys: Sequence[int], budget: int) -> list[PlainTree]:
        """Apply events in order, then prefill sequences by key; no trees."""
        self._apply_all(client, events)
        self._drafter.prefill([self._sequences[client, key] for key in keys], self._memory, budget)
        return []

    def forget(self, client: str) -> None:
        """Free the sequences of a verifier that was lost."""
        for owner, key in list(self._sequences):
            if owner == client:
                self._apply(client, End(key))

    def learned(self) -> dict[str, Tensor]:
        """What the drafter has learned."""
        self.prepare()
        return dict(self._drafter.saved(self._memory))

    def snapshot(self, seconds: float) -> Snapshot | None:
        """What the drafter has learned since the last snapshot; None without new observations, or if that is not due.

        It is due `seconds` after the last one, and later where snapshots take more than a small share of the CPU time.
        """
        interval = max(seconds, self._snapshot_cost / _SNAPSHOT_SHARE)
        if self._observed == self._saved_at or time.monotonic() - self._saved < interval:
            return None
        started = time.thread_time()
        whole = self._changed_bytes >= _CHANGED_SHARE * self._whole_bytes
        tensors = dict(self._drafter.changes(self._memory, whole))
        size = sum(tensor.nbytes for tensor in tensors.values())
        if whole:
            self._whole_bytes, self._changed_bytes = size, 0
        else:
            self._changed_bytes += size
        self._saved, self._saved_at = time.monotonic(), self._observed
        self._snapshot_cost = time.thread_time() - started
        return Snapshot(whole, tensors)

    def usage(self) -> dict[str, float]:
        """CPU seconds since the actor was created, and peak resident memory in bytes."""
        release_memory()
        return {"cpu_seconds": cpu_seconds() - self._cpu_before, "peak_rss_bytes": peak_rss_bytes()}

    def _apply_all(self, client: str, events: Sequence[Event]) -> None:
        self.prepare()
        for event in events:
            self._apply(client, event)

    def _apply(self, client: str, event: Event) -> None:
        place = client, event.key
        if isinstance(event, Begin):
            context = Context.start(event.tokens, event.sampling)
            context.prompt_length = event.prompt_length
            context.draft_generator.manual_seed(event.seed)
            # Trees are sent without the distributions that drawn tokens would need.
            context.draws = False
            self._sequences[place] = context
            self._drafter.begin(context, self._memory)
        elif isinstance(event, End):
            self._trees.pop(place, None)
            ended = self._sequences.pop(place, None)
            if ended is not None:
                self._drafter.end(ended, self._memory)
        else:
            context = self._sequences[place]
            context.tokens += event.new
            tree = self._trees[place] if event.tree is None else event.tree.tree()
            tops = [
                None if top is None else torch.from_numpy(top.copy()) for top in (event.top_tokens, event.top_probs)
            ]
            if tops[0] is not None:
                tops[0] = tops[0].long()
            outcome = Outcome(context, tree, event.path, event.token, tops[0], tops[1], event.ended)
            self._drafter.observe(self._memory, outcome)
            self._observed += 1


@dataclass
class _Sequence:
    """What a drafter instance knows of a sequence.

    connection: number of the instance. sent: number of ids sent to it. tree: the last tree that it proposed.
    """

    key: int
    connection: int = -1
    sent: int = 0
    tree: DraftTree | None = None


class Address(NamedTuple):
    """Address of a drafter. number: how many instances of this drafter were lost before this one."""

    name: str
    number: int = 0

    @property
    def actor(self) -> str:
        """The actor's name in Ray. Every replacement has a new one, because processes cache the handle of a name."""
        return f"{self.name}.{self.number}"

    def replacement(self, ahead: int = 1) -> "Address":
        """Address of the replacement that is `ahead` instances later."""
        return self._replace(number=self.number + ahead)


class Connection:
    """A verifier's connection to a drafter actor; after a loss it connects to the replacement.

    An unresponsive drafter is treated as lost. When it answers, it counts as a new instance and all contexts are
    resent. client: the verifier's name. number: of the current instance, -1 before the first. lost: instances lost.
    """

    def __init__(self, address: Address, client: str) -> None:
        self._address, self._client = address, client
        self._handle: Any = None
        self._late: ObjectRef | None = None
        self._events: list[Event] = []
        self._tried = -_RECONNECT_SECONDS
        self._keys = 0
        self.number = -1
        self.lost = 0

    def new_key(self) -> int:
        """A new key for a sequence."""
        self._keys += 1
        return self._keys

    def is_up(self) -> bool:
        """Whether there is a drafter that responds; tries to connect to a replacement if not."""
        if self._late is not None:
            if not ray.wait([self._late], timeout=0)[0]:
                return False
            late, self._late = self._late, None
            if self._answer(late) is not None:
                _LOG.info("the drafter responds again; drafting resumes")
                # It may have missed End events.
                self._handle.forget.remote(self._client)
                self.number += 1
                self._events = []
        now = time.monotonic()
        if self._handle is None and now - self._tried >= _RECONNECT_SECONDS:
            self._tried = now
            for ahead in range(_REPLACEMENTS):
                address = self._address.replacement(ahead)
                try:
                    self._handle = ray.get_actor(address.actor)
                except ValueError:  # there is no such actor: it is not started yet, or was lost
                    continue
                self._address = address
                self.number += 1
                self._events = []
                break
        return self._handle is not None

    def send(self, event: Event) -> None:
        """Queue an event; it is sent with the next call."""
        self._events.append(event)
        if len(self._events) >= _MAX_EVENTS:
            self.flush()

    def flush(self) -> None:
        """Send all queued events now, without waiting for an answer."""
        if self._handle is not None and self._late is None:
            self._handle.serve.remote(self._client, self._events, [], 0)
        self._events = []

    def ask(self, requests: Sequence[tuple[int, list[int]]], budget: int) -> list[PlainTree] | None:
        """Trees of some sequences; None if the drafter is lost or unresponsive."""
        events, self._events = self._events, []
        return self._answer(self._handle.serve.remote(self._client, events, requests, budget))

    def _answer(self, call: ObjectRef) -> list[PlainTree] | None:
        try:
            trees: list[PlainTree] = ray.get(call, timeout=PATIENCE_SECONDS)
        except GetTimeoutError:
            _LOG.warning(
                "the drafter has not answered for %.0f s; decoding continues without drafts until it does",
                PATIENCE_SECONDS,
            )
            self._late = call
            return None
        except RayError as error:
            if not is_loss(error):
                raise
            self._handle = None
            self._address = self._address.replacement()
            self.lost += 1
            self._tried = time.monotonic()
            return None
        return trees

    def prefill(self, keys: Sequence[int], budget: int) -> None:
        """Wait until the drafter has processed the queued events and has prefilled some sequences."""
        events, self._events = self._events, []
        self._answer(self._handle.prefill.remote(self._client, events, keys, budget))

    def ping(self, payload: object) -> float:
        """Seconds of a round trip."""
        assert self.is_up()
        started = time.perf_counter()
        ray.get(self._handle.ping.remote(payload))
        return time.perf_counter() - started


class RemoteDrafter(Drafter):
    """Proxy of a drafter in another process; its memory is the connection.

    One call a step requests the trees of all sequences and sends the outcomes since the last call. While no drafter
    responds, drafts are empty. Trees come without distributions, so the drafter proposes its most probable tokens, and
    draws none.
    """

    def __init__(self, inner: Drafter) -> None:
        self._inner = inner

    @property
    def observes(self) -> int:  # type: ignore[override]
        """As the drafter itself."""
        return self._inner.observes

    @property
    def observes_probs(self) -> bool:  # type: ignore[override]
        """As the drafter itself."""
        return self._inner.observes_probs

    @property
    def learns(self) -> bool:
        """As the drafter itself."""
        return self._inner.learns

    def draft_sampling(self, sampling: Sampling) -> DraftSampling:
        """Deterministic at every temperature."""
        return DraftSampling.DETERMINISTIC

    def chains(self) -> bool:
        """As the drafter itself."""
        return self._inner.chains()

    def new_memory(self, models: Models) -> object:
        """Not supported: the memory is in the drafter's process."""
        raise AssertionError("the memory of a remote drafter is its connection")

    def begin(self, context: Context, memory: Connection) -> None:
        """Assign a key; the drafter gets the sequence with the first request for its tree."""
        context.state[self] = _Sequence(memory.new_key())

    def prefill(self, contexts: Sequence[Context], memory: Connection, budget: int) -> None:
        """Let the drafter prefill the sequences that it does not have yet, and wait for it."""
        if not memory.is_up():
            return
        new = [context for context in contexts if context.state[self].connection != memory.number]
        if new:
            for context in new:
                self._new(context, memory)
            memory.prefill([context.state[self].key for context in new], budget)

    def propose(self, context: Context, memory: Connection, budget: int) -> DraftTree:
        """The tree of one sequence, see propose_all."""
        return self.propose_all([context], memory, budget)[0]

    def propose_all(self, contexts: Sequence[Context], memory: Connection, budget: int) -> list[DraftTree]:
        """Trees of all sequences, from one call; empty while no drafter responds."""
        empty = [DraftTree()] * len(contexts)
        if not memory.is_up():
            return empty
        requests = [(context.state[self].key, self._new(context, memory)) for context in contexts]
        plain_trees = memory.ask(requests, budget)
        if plain_trees is None:
            return empty
        trees = [plain.tree() for plain in plain_trees]
        for context, tree in zip(contexts, trees, strict=True):
            context.state[self].tree = tree
        return trees

    def observe(self, memory: Connection, outcome: Outcome) -> None:
        """Queue the outcome; it is sent with the next request for trees."""
        if not memory.is_up():
            return
        sequence = outcome.context.state[self]
        new = self._new(outcome.context, memory)
        tops = [None if top is None else top.numpy() for top in (outcome.top_tokens, outcome.top_probs)]
        tops[0] = None if tops[0] is None else tops[0].astype(np.int32)
        tree = None if outcome.tree is sequence.tree else PlainTree.of(outcome.tree)
        memory.send(
            Observed(sequence.key, new, tree, list(outcome.path), outcome.token, tops[0], tops[1], outcome.ended)
        )

    def end(self, context: Context, memory: Connection) -> None:
        """Send all queued outcomes and the end of the sequence now."""
        memory.send(End(context.state[self].key))
        memory.flush()

    def _new(self, context: Context, memory: Connection) -> list[int]:
        """Ids that the drafter does not have yet; to a new instance a Begin event with the whole sequence is sent."""
        sequence: _Sequence = context.state[self]
        if sequence.connection != memory.number:
            seed = context.draft_generator.initial_seed()
            memory.send(Begin(sequence.key, list(context.tokens), context.prompt_length, context.sampling, seed))
            sequence.connection, sequence.tree = memory.number, None
            sequence.sent = len(context.tokens)
        new = context.tokens[sequence.sent :]
        sequence.sent = len(context.tokens)
        return new
