"""What every drafter with a draft model shares: the model with a cache of each sequence, and the loop that drafts."""

import weakref
from abc import abstractmethod
from collections.abc import Generator, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from hasten.accel.decoding.context import Context
from hasten.accel.decoding.drafters.base import Drafter, Models
from hasten.accel.decoding.targets.base import Pass, Target
from hasten.accel.decoding.tree import ROOT, DraftSampling, DraftTree

_FIRST_CAPACITY = 1024
TOGETHER = 32  # tokens that a sequence may lag behind to be caught up with in one pass with the others

Growth = Generator[tuple[Sequence[int], Sequence[int]], Tensor, DraftTree]


class SmallModel:
    """A draft model that sequences take turns in; each has a slot, which follows what was committed.

    A slot is free again when its sequence ended, or when nobody holds the sequence's context any more. vocabulary: of
    the model that is drafted for; ids behind it, which a draft model may have rows for, are never drafted. None is the
    draft model's own. last: the latest pass; its rows are the contexts of the call.
    """

    def __init__(self, target: Target, vocabulary: int | None = None) -> None:
        self.target = target
        self._vocabulary = vocabulary
        self._slots: dict[int, int] = {}
        self._finalizers: dict[int, weakref.finalize] = {}
        self.last: Pass | None = None

    @classmethod
    def of(cls, models: Models) -> "SmallModel":
        """UserError where no draft model was given."""
        return cls(models.made_draft(), models.vocabulary)

    def start(self, context: Context, nodes: int) -> Tensor | None:
        """Logits (V,) after the last committed token, with room for `nodes` drafted ones.

        None where the sequence is longer than the draft model's context.
        """
        return self.start_all([context], nodes)[0]

    def start_all(self, contexts: Sequence[Context], nodes: int) -> list[Tensor | None]:
        """What `start` gives for each of several sequences. Those that fit come out of one pass."""
        fits = [len(context.tokens) + nodes <= self.target.max_length for context in contexts]
        running = [context for context, right in zip(contexts, fits, strict=True) if right]
        if not running:
            return [None] * len(contexts)
        # Sequences of one pass are padded to the widest of them, behind the longest.
        padding = max(nodes, TOGETHER) if len(running) > 1 else 0
        capacity = max(len(context.tokens) for context in running) + nodes + padding
        slots = [self._slot(context) for context in running]
        self._make_room(capacity)
        missing = [self._missing(slot, context.tokens) for slot, context in zip(slots, running, strict=True)]
        self.last = self._forward(slots, missing, [range(ROOT, len(chain) - 1) for chain in missing])
        for slot, chain in zip(slots, missing, strict=True):
            self.target.commit(slot, range(len(chain)))
        logits = self.last.logits[..., : self._vocabulary]
        rows = iter([row[len(chain) - 1] for row, chain in zip(logits, missing, strict=True)])
        return [next(rows) if right else None for right in fits]

    def extend(self, context: Context, tokens: Sequence[int], parents: Sequence[int]) -> Tensor:
        """Logits (N, V) after new nodes of the draft; parents count the nodes that were added since `start`."""
        return self.extend_all([context], [tokens], [parents])[0]

    def extend_all(
        self, contexts: Sequence[Context], tokens: Sequence[Sequence[int]], parents: Sequence[Sequence[int]]
    ) -> list[Tensor]:
        """What `extend` gives for each of several sequences, out of one pass."""
        self.last = self._forward([self._slots[id(context)] for context in contexts], tokens, parents)
        logits = self.last.logits[..., : self._vocabulary]
        return [row[: len(new)] for row, new in zip(logits, tokens, strict=True)]

    def probs(self, context: Context, logits: Tensor, path: Sequence[int]) -> Tensor:
        """Distribution (V,) float32 of logits (V,) under the request's sampling; path: drafted ids before this one."""
        return context.sampling.probs(self._penalised(context, logits, path))

    def best(self, context: Context, logits: Tensor, path: Sequence[int]) -> int:
        """The most probable token of logits (V,); path: drafted ids before it."""
        return int(self._penalised(context, logits, path).argmax())

    def level(self, context: Context, logits: Tensor, paths: Sequence[Sequence[int]]) -> Tensor:
        """Distributions (N, V) float32 of logits (N, V), each with its path.

        At temperature 0 they are those of temperature 1 without top-k and top-p, as something must rank the tokens.
        """
        sampling = context.sampling
        if sampling.is_greedy:
            sampling = replace(sampling, temperature=1.0, top_k=0, top_p=1.0)
        if sampling.has_penalty:
            rows = zip(logits, paths, strict=True)
            logits = torch.stack([self._penalised(context, row, path) for row, path in rows])
        return sampling.probs(logits)

    def end(self, context: Context) -> None:
        """The sequence ended; another may have its slot."""
        finalizer = self._finalizers.pop(id(context), None)
        if finalizer is not None:
            finalizer.detach()
        self._release(id(context))

    def _penalised(self, context: Context, logits: Tensor, path: Sequence[int]) -> Tensor:
        if not context.sampling.has_penalty:
            return logits
        return context.sampling.penalised(logits, torch.tensor([*context.tokens, *path], device=logits.device))

    def _missing(self, slot: int, tokens: Sequence[int]) -> list[int]:
        """The end of these tokens (one at least) that the slot, now cut to what is the same, does not hold yet."""
        held = self.target.committed(slot)
        same = min(len(held), len(tokens) - 1)
        if held[:same] != tokens[:same]:  # one comparison in most passes
            same = next((place for place in range(same) if held[place] != tokens[place]), same)
        self.target.cut(slot, same)
        if len(tokens) - same > TOGETHER:
            self.target.prefill(slot, tokens[same:-1])
            same = len(tokens) - 1
        return list(tokens[same:])

    def _forward(self, slots: Sequence[int], tokens: Sequence[Sequence[int]], parents: Sequence[Sequence[int]]) -> Pass:
        # Slots that are neighbours and in order are a view of the caches, others are copied.
        order = sorted(range(len(slots)), key=slots.__getitem__)
        found = self.target.forward(
            [slots[row] for row in order], [tokens[row] for row in order], [parents[row] for row in order]
        )
        if order == list(range(len(slots))):
            return found
        back = sorted(range(len(slots)), key=order.__getitem__)
        return Pass(found.logits[back], found.hidden[back])

    def _slot(self, context: Context) -> int:
        key = id(context)
        if key not in self._slots:
            taken = set(self._slots.values())
            self._slots[key] = next(slot for slot in range(len(taken) + 1) if slot not in taken)
            self._finalizers[key] = weakref.finalize(context, _forget, weakref.ref(self), key)
            self._finalizers[key].atexit = False
        return self._slots[key]

    def _make_room(self, capacity: int) -> None:
        slots = max(1, self.target.slots)
        while slots <= max(self._slots.values()):
            slots *= 2
        if capacity > self.target.capacity or slots > self.target.slots:
            # What the caches held is computed again when the sequences go on: rare, because the room doubles.
            room = max(self.target.capacity, _FIRST_CAPACITY)
            while room < capacity:
                room *= 2
            self.target.reserve(slots, max(capacity, min(room, self.target.max_length)))

    def _release(self, key: int) -> None:
        slot = self._slots.pop(key, None)
        # A slot that was given away before the caches were made is not there yet.
        if slot is not None and slot < self.target.slots:
            self.target.clear(slot)


def _forget(memory: "weakref.ref[SmallModel]", key: int) -> None:
    """Free the slot of a context that is gone without `end`. The memory is held weakly: it may go first."""
    found = memory()
    if found is not None:
        found._finalizers.pop(key, None)
        found._release(key)


class GrowingTree:
    """A draft while it grows. probs: distribution (V,) after ROOT and after each node that the draft model was shown.

    At temperature 0 they are those that `SmallModel.level` gives.
    """

    def __init__(self, context: Context, memory: SmallModel, logits: Tensor) -> None:
        self._context, self._memory = context, memory
        self._tokens: list[int] = []
        self._parents: list[int] = []
        self._paths: dict[int, list[int]] = {ROOT: []}
        self._places = {ROOT: ROOT}  # of the nodes that the draft model was shown, among them
        self.probs = {ROOT: memory.level(context, logits[None], [[]])[0]}

    def __len__(self) -> int:
        return len(self._tokens)

    def add(self, parent: int, token: int) -> int:
        """Index of a new node, the next child of its parent."""
        node = len(self)
        self._tokens.append(token)
        self._parents.append(parent)
        self._paths[node] = [*self._paths[parent], token]
        return node

    def show(self, nodes: Sequence[int]) -> Generator[tuple[Sequence[int], Sequence[int]], Tensor, None]:
        """Show nodes to the draft model, all in one pass, for `probs` to have them; those that it knows are left out.

        The parent of each was shown in an earlier pass.
        """
        new = [node for node in nodes if node not in self.probs]
        if not new:
            return
        logits = yield [self._tokens[node] for node in new], [self._places[self._parents[node]] for node in new]
        rows = self._memory.level(self._context, logits, [self._paths[node] for node in new])
        for node, row in zip(new, rows, strict=True):
            self._places[node] = len(self._places) - 1
            self.probs[node] = row

    def done(
        self, draft_sampling: DraftSampling, counts: Sequence[int] | None = None, nodes: Sequence[int] | None = None
    ) -> DraftTree:
        """The tree; nodes: those of it that are wanted, in the order in which they are, parents first."""
        nodes = range(len(self)) if nodes is None else nodes
        new = {ROOT: ROOT} | {node: index for index, node in enumerate(nodes)}
        probs = {new[parent]: self.probs[parent] for parent in dict.fromkeys(self._parents[node] for node in nodes)}
        return DraftTree(
            [self._tokens[node] for node in nodes],
            [new[self._parents[node]] for node in nodes],
            draft_sampling,
            None if draft_sampling is DraftSampling.DETERMINISTIC else probs,
            counts,
        )


class SmallModelDrafter(Drafter):
    """A drafter that grows its trees with a draft model, those of several sequences in the same passes."""

    needs_draft_model: ClassVar[bool] = True

    def new_memory(self, models: Models) -> SmallModel:
        """The draft model with the caches of the sequences."""
        return SmallModel.of(models)

    def shown(self, budget: int) -> int:
        """Nodes of a tree of this budget that the draft model sees at most."""
        return budget

    @abstractmethod
    def grow(self, context: Context, memory: SmallModel, budget: int, logits: Tensor) -> Growth:
        """Returns the tree, at most `budget` nodes; logits: (V,) after the last committed token.

        Yields (tokens, parents) of nodes that it wants the logits (N, V) of; parents count the nodes yielded so far.
        """

    def propose(self, context: Context, memory: SmallModel, budget: int) -> DraftTree:
        """A tree of the draft model's tokens; none where the sequence is longer than its context."""
        return self.propose_all([context], memory, budget)[0]

    def propose_all(self, contexts: Sequence[Context], memory: SmallModel, budget: int) -> list[DraftTree]:
        """A tree for each; every pass of the draft model is over all sequences whose trees still grow."""
        trees = [DraftTree()] * len(contexts)
        growing: dict[int, Growth] = {}
        for index, logits in enumerate(memory.start_all(contexts, self.shown(budget))):
            if logits is not None:
                growing[index] = self.grow(contexts[index], memory, budget, logits)
        given: dict[int, Tensor] = {}
        while growing:
            wanted = {}
            for index, growth in list(growing.items()):
                try:
                    wanted[index] = growth.send(given[index]) if given else next(growth)
                except StopIteration as stop:
                    trees[index] = stop.value
                    del growing[index]
            if wanted:
                tokens, parents = zip(*wanted.values(), strict=True)
                rows = memory.extend_all([contexts[index] for index in wanted], tokens, parents)
                given = dict(zip(wanted, rows, strict=True))
        return trees

    def end(self, context: Context, memory: Any) -> None:
        """Its cache is free for another sequence."""
        memory.end(context)
