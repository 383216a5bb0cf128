"""The client of a drafter actor: a verifier's connection to it, and a drafter that asks it for drafts."""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
from ray import ObjectRef
from ray.exceptions import GetTimeoutError, RayError
from torch import Tensor

from hasten.accel.decoding.context import Context
from hasten.accel.decoding.drafters.base import Drafter, Models, Outcome
from hasten.accel.decoding.sampling import Sampling
from hasten.accel.decoding.tree import DraftSampling, DraftTree
from hasten.cluster.actors.drafter import Address, Begin, End, Event, Observed, ObservedPrompt, PlainTree
from hasten.cluster.runtime.recovery import is_loss

_LOG = logging.getLogger(__name__)
# A drafter that has not answered for this many seconds is unresponsive; decoding continues without drafts.
PATIENCE_SECONDS = 10.0
# Events are sent with the next request for trees, or separately once there are this many.
_MAX_EVENTS = 256
_RECONNECT_SECONDS = 0.2
# Number of successive replacements that are tried, because the first replacement may be lost, too.
_REPLACEMENTS = 3


@dataclass
class _Sequence:
    """What a drafter instance knows of a sequence.

    connection: number of the instance. sent: number of ids sent to it. awaits_prefill: whether it has the prompt, but
    was not asked to prefill it. tree: the last tree that it proposed.
    """

    key: int
    connection: int = -1
    sent: int = 0
    awaits_prefill: bool = False
    tree: DraftTree | None = None


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
    def observes_prompt(self) -> int:  # type: ignore[override]
        """As the drafter itself."""
        return self._inner.observes_prompt

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

    def observe_prompt(
        self, memory: Connection, context: Context, start: int, top_tokens: Tensor, top_probs: Tensor | None
    ) -> None:
        """Queue what the target says about a part of the prompt; it is sent with the next request for trees."""
        if not memory.is_up():
            return
        if context.state[self].connection != memory.number:
            self._new(context, memory)
            context.state[self].awaits_prefill = True
        ids, probs = _arrays(top_tokens, top_probs)
        assert ids is not None
        memory.send(ObservedPrompt(context.state[self].key, start, ids, probs))

    def prefill(self, contexts: Sequence[Context], memory: Connection, budget: int) -> None:
        """Let the drafter prefill the sequences that it has not prefilled yet, and wait for it."""
        if not memory.is_up():
            return
        keys = []
        for context in contexts:
            sequence: _Sequence = context.state[self]
            if sequence.connection != memory.number:
                self._new(context, memory)
            elif not sequence.awaits_prefill:
                continue
            sequence.awaits_prefill = False
            keys.append(sequence.key)
        if keys:
            memory.prefill(keys, budget)

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
        ids, probs = _arrays(outcome.top_tokens, outcome.top_probs)
        tree = None if outcome.tree is sequence.tree else PlainTree.of(outcome.tree)
        memory.send(Observed(sequence.key, new, tree, list(outcome.path), outcome.token, ids, probs, outcome.ended))

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


def _arrays(top_tokens: Tensor | None, top_probs: Tensor | None) -> tuple[np.ndarray | None, np.ndarray | None]:
    """The target's most probable tokens in int32, and their probabilities, as they are sent."""
    return (
        None if top_tokens is None else top_tokens.numpy().astype(np.int32),
        None if top_probs is None else top_probs.numpy(),
    )
