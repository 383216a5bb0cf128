"""The drafter actor: one drafter serves several verifiers, and learns from what all of them decode.

Messages contain committed and drafted ids, parents and labels, and for drafters that observe the target the ids and
probabilities of its most probable tokens. Distributions over the vocabulary are never sent.
"""

import time
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hasten.accel.decoding.context import Context
from hasten.accel.decoding.drafters.base import Drafter, Outcome
from hasten.accel.decoding.sampling import Sampling
from hasten.accel.decoding.tree import DraftTree
from hasten.cluster.runtime.resources import cpu_seconds, peak_rss_bytes, release_memory

# Share of a drafter's time that snapshots may take.
_SNAPSHOT_SHARE = 0.01
# A whole snapshot is taken once all changes since the last one are this many times its size.
_CHANGED_SHARE = 4


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


class ObservedPrompt(NamedTuple):
    """The target's most probable tokens after a part of a prompt, see `Drafter.observe_prompt`."""

    key: int
    start: int
    top_tokens: np.ndarray
    top_probs: np.ndarray | None


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


Event = Begin | ObservedPrompt | Observed | End


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
        elif isinstance(event, ObservedPrompt):
            top_tokens, top_probs = _tensors(event)
            assert top_tokens is not None
            self._drafter.observe_prompt(self._memory, self._sequences[place], event.start, top_tokens, top_probs)
        else:
            context = self._sequences[place]
            context.tokens += event.new
            tree = self._trees[place] if event.tree is None else event.tree.tree()
            outcome = Outcome(context, tree, event.path, event.token, *_tensors(event), event.ended)
            self._drafter.observe(self._memory, outcome)
            self._observed += 1


def _tensors(event: ObservedPrompt | Observed) -> tuple[Tensor | None, Tensor | None]:
    """The target's most probable tokens and their probabilities, as a drafter takes them."""
    tops = [None if top is None else torch.from_numpy(top.copy()) for top in (event.top_tokens, event.top_probs)]
    return None if tops[0] is None else tops[0].long(), tops[1]


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
