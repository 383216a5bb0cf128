"""Drafters on a cluster: one actor serves several verifiers, and what it learns grows with the traffic of all of them.

What travels: committed and drafted ids, parents, labels, and where a drafter observes the target, the ids and
probabilities of its most probable tokens. Distributions over the vocabulary do not.
"""

import logging
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hasten.accel.decoding.context import Context
from hasten.accel.decoding.drafters.base import Drafter, Models, Outcome
from hasten.accel.decoding.sampling import Sampling
from hasten.accel.decoding.tree import DraftSampling, DraftTree
from hasten.cluster.runtime.recovery import is_loss
from hasten.cluster.runtime.resources import cpu_seconds, peak_rss_bytes, release_memory

_LOG = logging.getLogger(__name__)
# A drafter that has not answered for so many seconds is decoded without until it does.
PATIENCE_SECONDS = 10.0
# What is to be observed is sent with the next proposal, and on its own once there is this much of it.
_EVENTS_AT_MOST = 256
_SECONDS_BETWEEN_TRIES = 0.2
# Of a lost drafter so many successors are looked for, as the first of them may be lost, too.
_SUCCESSORS = 3


class Plain(NamedTuple):
    """A deterministic tree as plain lists."""

    tokens: list[int]
    parents: list[int]
    labels: list[Hashable] | None

    @classmethod
    def of(cls, tree: DraftTree) -> "Plain":
        """The tree without the distributions that it was drawn from."""
        return cls(list(tree.tokens), list(tree.parents), None if tree.labels is None else list(tree.labels))

    def tree(self) -> DraftTree:
        """The tree."""
        return DraftTree(self.tokens, self.parents, labels=self.labels)


class Begin(NamedTuple):
    """A sequence starts, or goes on at a drafter that does not know it. seed: of what the drafter draws."""

    key: int
    tokens: list[int]
    prompt_length: int
    sampling: Sampling
    seed: int


class Observed(NamedTuple):
    """An outcome. new: ids committed since the last message. tree: None where it is the one that was proposed."""

    key: int
    new: list[int]
    tree: Plain | None
    path: list[int]
    token: int
    top_tokens: np.ndarray | None
    top_probs: np.ndarray | None


class End(NamedTuple):
    """A sequence ended."""

    key: int


Event = Begin | Observed | End


class DrafterActor:
    """A drafter with its memory in one process, for the sequences of several verifiers.

    make_memory: a new memory with what was learned before, made at the first use.
    """

    def __init__(self, drafter: Drafter, make_memory: Callable[[], Any]) -> None:
        torch.set_num_threads(1)
        torch.set_grad_enabled(False)
        self._drafter, self._make_memory = drafter, make_memory
        self._memory: Any = None
        self._is_prepared = False
        self._sequences: dict[tuple[str, int], Context] = {}
        self._trees: dict[tuple[str, int], DraftTree] = {}
        self._observed = self._saved_at = 0
        self._saved = time.monotonic()
        self._cpu_before = cpu_seconds()

    def prepare(self) -> None:
        """Return once the memory is there."""
        if not self._is_prepared:
            self._memory = self._make_memory()
            self._is_prepared = True

    def ping(self, payload: Any) -> Any:
        """What it was given, to measure a round trip."""
        return payload

    def serve(self, client: str, events: Sequence[Event], asked: Sequence[tuple[int, list[int]]], budget: int) -> Any:
        """A tree for each asked sequence (its key, and its new ids), after all events in their order."""
        self.prepare()
        for event in events:
            self._apply(client, event)
        contexts = []
        for key, new in asked:
            contexts.append(self._sequences[client, key])
            contexts[-1].tokens += new
        if not contexts:
            return []
        trees = self._drafter.propose_all(contexts, self._memory, budget)
        self._trees |= {(client, key): tree for (key, _), tree in zip(asked, trees, strict=True)}
        return [Plain.of(tree) for tree in trees]

    def forget(self, client: str) -> None:
        """A verifier is gone with all its sequences."""
        for owner, key in list(self._sequences):
            if owner == client:
                self._apply(client, End(key))

    def learned(self) -> dict[str, Tensor]:
        """What the drafter learned so far."""
        self.prepare()
        self._saved, self._saved_at = time.monotonic(), self._observed
        return dict(self._drafter.saved(self._memory))

    def snapshot(self, seconds: float) -> dict[str, Tensor] | None:
        """What was learned, where there is something new and the last time was so long ago."""
        if self._observed == self._saved_at or time.monotonic() - self._saved < seconds:
            return None
        return self.learned()

    def usage(self) -> dict[str, float]:
        """CPU seconds since the start, and peak memory."""
        release_memory()
        return {"cpu_seconds": cpu_seconds() - self._cpu_before, "peak_rss_bytes": peak_rss_bytes()}

    def _apply(self, client: str, event: Event) -> None:
        place = client, event.key
        if isinstance(event, Begin):
            context = Context.start(event.tokens, event.sampling)
            context.prompt_length = event.prompt_length
            context.draft_generator.manual_seed(event.seed)
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
            self._drafter.observe(self._memory, Outcome(context, tree, event.path, event.token, *tops))
            self._observed += 1


@dataclass
class _Sequence:
    """What a verifier knows of a sequence at the drafter: its key, ids sent, the last tree; of which connection."""

    key: int
    connection: int = -1
    sent: int = 0
    tree: DraftTree | None = None


class Address(NamedTuple):
    """Where a drafter is found: its name, and how many it is the successor of."""

    name: str
    number: int = 0

    @property
    def actor(self) -> str:
        """Name in Ray, which a successor cannot have again: processes remember whom they knew by it."""
        return f"{self.name}.{self.number}"


class Connection:
    """A verifier's line to a drafter actor; where that is lost, its successor is looked for.

    A drafter that stands still counts as not there until it has answered, and then as another one, which is told of
    every sequence anew. client: the verifier's name. number: of the drafters found so far. lost: how many were gone.
    """

    def __init__(self, address: Address, client: str) -> None:
        self._address, self._client = address, client
        self._handle: Any = None
        self._late: Any = None
        self._events: list[Event] = []
        self._tried = -_SECONDS_BETWEEN_TRIES
        self._keys = 0
        self.number = -1
        self.lost = 0

    def new_key(self) -> int:
        """A number for a sequence."""
        self._keys += 1
        return self._keys

    def is_up(self) -> bool:
        """Whether there is a drafter as far as is known."""
        import ray

        if self._late is not None:
            if not ray.wait([self._late], timeout=0)[0]:
                return False
            late, self._late = self._late, None
            if self._answer(late) is not None:
                _LOG.info("the drafter answers again")
                # It may have missed that sequences ended.
                self._handle.forget.remote(self._client)
                self.number += 1
                self._events = []
        now = time.monotonic()
        if self._handle is None and now - self._tried >= _SECONDS_BETWEEN_TRIES:
            self._tried = now
            for ahead in range(_SUCCESSORS):
                address = self._address._replace(number=self._address.number + ahead)
                try:
                    self._handle = ray.get_actor(address.actor)
                except ValueError:  # not there yet, or gone already
                    continue
                self._address = address
                self.number += 1
                self._events = []
                break
        return self._handle is not None

    def send(self, event: Event) -> None:
        """Say something with the next call."""
        self._events.append(event)
        if len(self._events) >= _EVENTS_AT_MOST:
            self.flush()

    def flush(self) -> None:
        """Say what is to be said now, and wait for nothing."""
        if self._handle is not None and self._late is None:
            self._handle.serve.remote(self._client, self._events, [], 0)
        self._events = []

    def ask(self, asked: Sequence[tuple[int, list[int]]], budget: int) -> list[Plain] | None:
        """Trees of some sequences; None where the drafter is gone, or stands still."""
        events, self._events = self._events, []
        return self._answer(self._handle.serve.remote(self._client, events, asked, budget))

    def _answer(self, promise: Any) -> list[Plain] | None:
        import ray

        try:
            found: list[Plain] = ray.get(promise, timeout=PATIENCE_SECONDS)
        except ray.exceptions.GetTimeoutError:
            _LOG.warning("the drafter has not answered for %.0f s: without drafts until it does", PATIENCE_SECONDS)
            self._late = promise
            return None
        except ray.exceptions.RayError as error:
            if not is_loss(error):
                raise
            self._handle = None
            self._address = self._address._replace(number=self._address.number + 1)
            self.lost += 1
            self._tried = time.monotonic()
            return None
        return found

    def ping(self, payload: Any) -> float:
        """Seconds of a round trip."""
        import ray

        assert self.is_up()
        started = time.perf_counter()
        ray.get(self._handle.ping.remote(payload))
        return time.perf_counter() - started


class RemoteDrafter(Drafter):
    """Stands in a verifier for a drafter in another process; its memory is the connection.

    All sequences ask in one call a step, which carries what was observed since the last one. While no drafter answers,
    nothing is drafted. Trees come without distributions: only verifiers that do not read them, and deterministic
    drafts, are right.
    """

    is_elsewhere: ClassVar[bool] = True

    def __init__(self, inner: Drafter) -> None:
        self._inner = inner

    @property
    def observes(self) -> int:  # type: ignore[override]
        """As many as the drafter itself."""
        return self._inner.observes

    @property
    def observes_probs(self) -> bool:  # type: ignore[override]
        """As the drafter itself."""
        return self._inner.observes_probs

    def draft_sampling(self, sampling: Sampling) -> DraftSampling:
        """As the drafter itself."""
        return self._inner.draft_sampling(sampling)

    def chains(self) -> bool:
        """As the drafter itself."""
        return self._inner.chains()

    def new_memory(self, models: Models) -> Any:
        """There is none here."""
        raise AssertionError("the memory of a remote drafter is its connection")

    def begin(self, context: Context, memory: Connection) -> None:
        """The drafter hears of a sequence when it is asked about it."""
        context.state[self] = _Sequence(memory.new_key())

    def propose(self, context: Context, memory: Connection, budget: int) -> DraftTree:
        """One of `propose_all`."""
        return self.propose_all([context], memory, budget)[0]

    def propose_all(self, contexts: Sequence[Context], memory: Connection, budget: int) -> list[DraftTree]:
        """Trees of all sequences by one call; empty ones while no drafter answers."""
        nothing = [DraftTree()] * len(contexts)
        if not memory.is_up():
            return nothing
        asked = [(context.state[self].key, self._new(context, memory)) for context in contexts]
        found = memory.ask(asked, budget)
        if found is None:
            return nothing
        trees = [each.tree() for each in found]
        for context, tree in zip(contexts, trees, strict=True):
            context.state[self].tree = tree
        return trees

    def observe(self, memory: Connection, outcome: Outcome) -> None:
        """Noted, and sent with the next proposal."""
        if not memory.is_up():
            return
        sequence = outcome.context.state[self]
        new = self._new(outcome.context, memory)
        tops = [None if top is None else top.numpy() for top in (outcome.top_tokens, outcome.top_probs)]
        tops[0] = None if tops[0] is None else tops[0].astype(np.int32)
        tree = None if outcome.tree is sequence.tree else Plain.of(outcome.tree)
        memory.send(Observed(sequence.key, new, tree, list(outcome.path), outcome.token, *tops))

    def end(self, context: Context, memory: Connection) -> None:
        """Said at once, with what was observed last."""
        memory.send(End(context.state[self].key))
        memory.flush()

    def _new(self, context: Context, memory: Connection) -> list[int]:
        """Ids that the drafter does not know yet; one that does not know the sequence is told all about it."""
        sequence: _Sequence = context.state[self]
        if sequence.connection != memory.number:
            seed = context.draft_generator.initial_seed()
            memory.send(Begin(sequence.key, list(context.tokens), context.prompt_length, context.sampling, seed))
            sequence.connection, sequence.tree = memory.number, None
            sequence.sent = len(context.tokens)
        new = context.tokens[sequence.sent :]
        sequence.sent = len(context.tokens)
        return new


def learns(drafter: Drafter) -> bool:
    """Whether there is something to share: a memory that grows with what is decoded; of a combination, in a member."""
    values = [value if isinstance(value, tuple) else (value,) for value in vars(drafter).values()]
    members = [each for value in values for each in value if isinstance(each, Drafter)]
    if members:
        return any(learns(each) for each in members)
    return drafter.observes > 0 or type(drafter).saved is not Drafter.saved
