"""Base of drafters with a draft model: the model with a KV cache for each sequence, and the loop that grows trees."""

import weakref
from abc import abstractmethod
from collections.abc import Generator, Sequence
from dataclasses import replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from hasten.accel.decoding.context import Context
from hasten.accel.decoding.drafters.base import Drafter, Memory, Models
from hasten.accel.decoding.targets.base import COPIES_OF_LOGITS, Pass, Target
from hasten.accel.decoding.tree import ROOT, DraftSampling, DraftTree

_FIRST_CAPACITY = 1024
# A cache that lacks at most this many tokens is brought up to date in the common pass; one that lacks more is
# prefilled on its own.
TOGETHER = 32

Growth = Generator[tuple[Sequence[int], Sequence[int]], Tensor, DraftTree]


class SmallModel:
    """A draft model with a slot of its caches for each sequence.

    A slot becomes free when its sequence ends, or when its context is garbage-collected. vocabulary: size of the
    target's vocabulary, which all logits have; None takes the draft model's. The draft model may have rows for other
    ids: those beyond the target's are never drafted, and those that only the target has get a logit of -inf and are
    read as the id 0. last: the latest pass, one row for each context of the call.
    """

    def __init__(self, target: Target, vocabulary: int | None = None) -> None:
        self.target = target
        self.vocabulary = vocabulary or target.vocabulary
        self._slots: dict[int, int] = {}
        self._finalizers: dict[int, weakref.finalize] = {}
        self.last: Pass | None = None

    @classmethod
    def of(cls, models: Models) -> "SmallModel":
        """The loaded draft model; UserError where none was given."""
        return cls(models.load_draft(), models.vocabulary)

    def reserve(self, slots: int, longest: int, nodes: int) -> None:
        """Allocate caches for `slots` sequences of up to `longest` tokens with `nodes` drafted ones.

        Has no effect if they are that large. Without this they grow with the sequences, by doubling.
        """
        capacity = self._capacity(slots, longest, nodes)
        if slots > self.target.slots or capacity > self.target.capacity:
            self.target.reserve(slots, capacity)

    def needed_bytes(self, slots: int, longest: int, nodes: int) -> int:
        """Bytes of these caches, and of the logits of a pass over all drafted nodes or as many missing tokens."""
        logits = max(nodes + 1, TOGETHER) * self.vocabulary * 4 * COPIES_OF_LOGITS
        return slots * (self._capacity(slots, longest, nodes) * self.target.token_bytes + logits)

    def start(self, context: Context, nodes: int) -> Tensor | None:
        """Logits (V,) after the last committed token; the cache has room for `nodes` drafted tokens.

        None if the sequence with these tokens exceeds the draft model's context length.
        """
        return self.start_all([context], nodes)[0]

    def start_all(self, contexts: Sequence[Context], nodes: int) -> list[Tensor | None]:
        """The result of `start` for each of several sequences, in one pass."""
        fits = [self.fits(context, nodes) for context in contexts]
        running = [context for context, fitting in zip(contexts, fits, strict=True) if fitting]
        if not running:
            return [None] * len(contexts)
        slots = self._assign(running, nodes)
        missing = [self._missing(slot, context.tokens) for slot, context in zip(slots, running, strict=True)]
        self.last = self._forward(slots, missing, [range(ROOT, len(chain) - 1) for chain in missing])
        for slot, chain in zip(slots, missing, strict=True):
            self.target.commit(slot, range(len(chain)))
        logits = self._of_target(self.last.logits)
        rows = iter([row[len(chain) - 1] for row, chain in zip(logits, missing, strict=True)])
        return [next(rows) if fitting else None for fitting in fits]

    def prefill(self, contexts: Sequence[Context], nodes: int) -> None:
        """Bring the caches of sequences that lack many tokens up to date; room is made for `nodes` drafted tokens."""
        running = [context for context in contexts if self.fits(context, nodes)]
        if running:
            for slot, context in zip(self._assign(running, nodes), running, strict=True):
                # Counted first, because to compare the tokens takes longer.
                if len(context.tokens) - len(self.target.committed(slot)) > TOGETHER:
                    self._missing(slot, context.tokens)

    def fits(self, context: Context, nodes: int) -> bool:
        """Whether the sequence and `nodes` drafted tokens are within the draft model's context length."""
        return len(context.tokens) + nodes <= self.target.max_length

    def extend(self, context: Context, tokens: Sequence[int], parents: Sequence[int]) -> Tensor:
        """Logits (N, V) after new nodes of the draft; parents are indices among all nodes added since `start`."""
        return self.extend_all([context], [tokens], [parents])[0]

    def extend_all(
        self, contexts: Sequence[Context], tokens: Sequence[Sequence[int]], parents: Sequence[Sequence[int]]
    ) -> list[Tensor]:
        """The result of `extend` for each of several sequences, in one pass."""
        known = [self._known(new) for new in tokens]
        self.last = self._forward([self._slots[id(context)] for context in contexts], known, parents)
        logits = self._of_target(self.last.logits)
        return [row[: len(new)] for row, new in zip(logits, tokens, strict=True)]

    def probs(self, context: Context, logits: Tensor, path: Sequence[int]) -> Tensor:
        """Distribution (V,) float32 of logits (V,) under the request's sampling; path: drafted ids before this one."""
        return context.sampling.probs(self._penalised(context, logits, path))

    def best(self, context: Context, logits: Tensor, path: Sequence[int]) -> int:
        """The most probable token of logits (V,); path: drafted ids before it."""
        return int(self._penalised(context, logits, path).argmax())

    def level(self, context: Context, logits: Tensor, paths: Sequence[Sequence[int]]) -> Tensor:
        """Distributions (N, V) float32 of logits (N, V); paths: for each row, the drafted ids before it.

        At temperature 0 they are those of temperature 1 without top-k and top-p, because a one-hot cannot rank tokens.
        """
        sampling = context.sampling
        if sampling.is_greedy:
            sampling = replace(sampling, temperature=1.0, top_k=0, top_p=1.0)
        if sampling.has_penalty:
            rows = zip(logits, paths, strict=True)
            logits = torch.stack([self._penalised(context, row, path) for row, path in rows])
        return sampling.probs(logits)

    def end(self, context: Context) -> None:
        """Free the slot of a sequence that has ended."""
        finalizer = self._finalizers.pop(id(context), None)
        if finalizer is not None:
            finalizer.detach()
        self._release(id(context))

    def _penalised(self, context: Context, logits: Tensor, path: Sequence[int]) -> Tensor:
        if not context.sampling.has_penalty:
            return logits
        return context.sampling.penalised(logits, torch.tensor([*context.tokens, *path], device=logits.device))

    def _missing(self, slot: int, tokens: Sequence[int]) -> list[int]:
        """Truncate the slot to its common prefix with `tokens`; returns the tokens after that, at least one.

        If they are many, all but the last are prefilled here.
        """
        cached, tokens = self.target.committed(slot), self._known(tokens)
        common = min(len(cached), len(tokens) - 1)
        if cached[:common] != tokens[:common]:  # one comparison in most passes
            common = next((index for index in range(common) if cached[index] != tokens[index]), common)
        self.target.cut(slot, common)
        if len(tokens) - common > TOGETHER:
            self.target.prefill(slot, tokens[common:-1])
            common = len(tokens) - 1
        return list(tokens[common:])

    def _known(self, tokens: Sequence[int]) -> Sequence[int]:
        """The tokens, with the id 0 in place of those that the draft model has no row for."""
        size = self.target.vocabulary
        if size >= self.vocabulary:
            return tokens
        return [token if token < size else 0 for token in tokens]

    def _of_target(self, logits: Tensor) -> Tensor:
        """Logits (..., V) for the ids of the target's vocabulary."""
        lacking = self.vocabulary - logits.shape[-1]
        return F.pad(logits, (0, lacking), value=-torch.inf) if lacking > 0 else logits[..., : self.vocabulary]

    def _forward(self, slots: Sequence[int], tokens: Sequence[Sequence[int]], parents: Sequence[Sequence[int]]) -> Pass:
        # Adjacent slots in ascending order are a view of the caches; any others have to be copied.
        order = sorted(range(len(slots)), key=slots.__getitem__)
        rows = self.target.forward(
            [slots[row] for row in order], [tokens[row] for row in order], [parents[row] for row in order]
        )
        if order == list(range(len(slots))):
            return rows
        inverse = sorted(range(len(slots)), key=order.__getitem__)
        return Pass(rows.logits[inverse], rows.hidden[inverse])

    def _assign(self, contexts: Sequence[Context], nodes: int) -> list[int]:
        """A slot for each sequence, with room for its tokens and `nodes` more."""
        slots = [self._slot(context) for context in contexts]
        self._make_room(max(len(context.tokens) for context in contexts) + nodes + _padding(len(contexts), nodes))
        return slots

    def _capacity(self, slots: int, longest: int, nodes: int) -> int:
        """Tokens of a slot: sequences that are longer than the draft model's context are not drafted for."""
        return min(longest + nodes, self.target.max_length) + _padding(slots, nodes)

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
            # This empties the caches, which are recomputed at the next use. It is rare, because the capacity doubles.
            doubled = max(self.target.capacity, _FIRST_CAPACITY)
            while doubled < capacity:
                doubled *= 2
            self.target.reserve(slots, max(capacity, min(doubled, self.target.max_length)))

    def _release(self, key: int) -> None:
        slot = self._slots.pop(key, None)
        # A slot may be assigned before the caches are allocated; then there is nothing to clear.
        if slot is not None and slot < self.target.slots:
            self.target.clear(slot)


def _padding(sequences: int, nodes: int) -> int:
    """Cache positions behind a sequence: those of a pass over several are padded to the width of the widest one."""
    return max(nodes, TOGETHER) if sequences > 1 else 0


def _forget(memory: "weakref.ref[SmallModel]", key: int) -> None:
    """Free the slot of a context that was garbage-collected without `end`.

    The reference to the memory is weak, because the memory may be collected first.
    """
    owner = memory()
    if owner is not None:
        owner._finalizers.pop(key, None)
        owner._release(key)


class GrowingTree:
    """A draft tree under construction.

    probs: the draft model's distributions (V,) after ROOT and after each evaluated node, as `SmallModel.level` gives
    them.
    """

    def __init__(self, context: Context, memory: SmallModel, logits: Tensor) -> None:
        self._context, self._memory = context, memory
        self._tokens: list[int] = []
        self._parents: list[int] = []
        self._paths: dict[int, list[int]] = {ROOT: []}
        self._evaluated = {ROOT: ROOT}  # index of each evaluated node among the evaluated ones
        self.probs = {ROOT: memory.level(context, logits[None], [[]])[0]}

    def __len__(self) -> int:
        return len(self._tokens)

    def add(self, parent: int, token: int) -> int:
        """Add a node as the next child of its parent; returns its index."""
        node = len(self)
        self._tokens.append(token)
        self._parents.append(parent)
        self._paths[node] = [*self._paths[parent], token]
        return node

    def evaluate(self, nodes: Sequence[int]) -> Generator[tuple[Sequence[int], Sequence[int]], Tensor, None]:
        """Fill `probs` for nodes, in one pass of the draft model; nodes that are in `probs` already are skipped.

        The parent of each node must have been evaluated in an earlier pass.
        """
        new = [node for node in nodes if node not in self.probs]
        if not new:
            return
        logits = yield [self._tokens[node] for node in new], [self._evaluated[self._parents[node]] for node in new]
        rows = self._memory.level(self._context, logits, [self._paths[node] for node in new])
        for node, row in zip(new, rows, strict=True):
            self._evaluated[node] = len(self._evaluated) - 1
            self.probs[node] = row

    def done(
        self, draft_sampling: DraftSampling, counts: Sequence[int] | None = None, nodes: Sequence[int] | None = None
    ) -> DraftTree:
        """The finished tree. nodes: the nodes to keep, in their new order, parents first; None keeps all."""
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
    """A drafter that grows trees with a draft model; one pass serves the trees of several sequences."""

    needs_draft_model: ClassVar[bool] = True

    def new_memory(self, models: Models) -> SmallModel:
        """The draft model, with no cached sequences."""
        return SmallModel.of(models)

    def max_evaluated(self, budget: int) -> int:
        """Largest number of nodes that the draft model evaluates for a tree of this budget."""
        return budget

    @abstractmethod
    def grow(self, context: Context, memory: SmallModel, budget: int, logits: Tensor) -> Growth:
        """Generator that returns a tree of at most `budget` nodes; logits: (V,) after the last committed token.

        It yields (tokens, parents) of N nodes to evaluate, and is sent their logits (N, V). Parents are indices among
        all nodes yielded so far.
        """

    def reserve(self, memory: SmallModel, slots: int, longest: int, budget: int) -> None:
        """Reserve the draft model's caches."""
        memory.reserve(slots, self.longest_read(longest), self.max_evaluated(budget))

    def needed_bytes(self, memory: SmallModel, slots: int, longest: int, budget: int) -> int:
        """Bytes of the draft model's caches and logits."""
        return memory.needed_bytes(slots, self.longest_read(longest), self.max_evaluated(budget))

    def longest_read(self, longest: int) -> int:
        """Number of tokens that the draft model reads of a sequence of `longest` tokens, at most."""
        return longest

    def prefill(self, contexts: Sequence[Context], memory: SmallModel, budget: int) -> None:
        """Prefill the draft model with prompts, and with tokens that were committed while nothing was drafted."""
        memory.prefill(contexts, self.max_evaluated(budget))

    def propose(self, context: Context, memory: SmallModel, budget: int) -> DraftTree:
        """A tree of the draft model's tokens; empty if the sequence exceeds the draft model's context length."""
        return self.propose_all([context], memory, budget)[0]

    def propose_all(self, contexts: Sequence[Context], memory: SmallModel, budget: int) -> list[DraftTree]:
        """A tree for each sequence; a pass of the draft model covers all sequences whose trees still grow."""
        trees = [DraftTree()] * len(contexts)
        growing: dict[int, Growth] = {}
        for index, logits in enumerate(memory.start_all(contexts, self.max_evaluated(budget))):
            if logits is not None:
                growing[index] = self.grow(contexts[index], memory, budget, logits)
        logits_of: dict[int, Tensor] = {}
        while growing:
            new_nodes = {}
            for index, growth in list(growing.items()):
                try:
                    new_nodes[index] = growth.send(logits_of[index]) if logits_of else next(growth)
                except StopIteration as stop:
                    trees[index] = stop.value
                    del growing[index]
            if new_nodes:
                tokens, parents = zip(*new_nodes.values(), strict=True)
                rows = memory.extend_all([contexts[index] for index in new_nodes], tokens, parents)
                logits_of = dict(zip(new_nodes, rows, strict=True))
        return trees

    def end(self, context: Context, memory: Memory) -> None:
        """Free the sequence's cache slot."""
        memory.end(context)
