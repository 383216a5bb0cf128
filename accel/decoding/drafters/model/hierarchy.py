"""Hierarchy: the draft model itself decodes speculatively, with an inner drafter whose trees it verifies.

Source: Zhang et al. 2025, arXiv:2505.22179 (SpecMQuant).
Departs from it: any drafter without a draft model drafts the inner trees, where the paper uses EAGLE-2. The draft model
verifies them by sample and match, so that the chain has the draft model's own distribution.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from hasten.accel.decoding.context import Context
from hasten.accel.decoding.drafters.base import Drafter, Memory, Models, Outcome
from hasten.accel.decoding.drafters.model.base import SmallModel
from hasten.accel.decoding.sampling import Sampling, draw
from hasten.accel.decoding.targets.base import Target
from hasten.accel.decoding.tree import ROOT, DraftSampling, DraftTree
from hasten.accel.decoding.verifiers.base import TargetRows, Verdict, descend
from hasten.accel.errors import UserError


class HierarchyMemory(SmallModel):
    """The draft model, and the inner drafter's memory."""

    def __init__(self, target: Target, inner: Memory, vocabulary: int | None = None) -> None:
        super().__init__(target, vocabulary)
        self.inner = inner

    def catch_up(self, contexts: Sequence[Context], nodes: int) -> list[list[int]]:
        """For each sequence the last tokens that its cache lacks, at least one; reserves room for `nodes` more."""
        slots = self._assign(contexts, nodes)
        return [self._missing(slot, context.tokens) for slot, context in zip(slots, contexts, strict=True)]

    def forward(
        self, contexts: Sequence[Context], chains: Sequence[Sequence[int]], trees: Sequence[DraftTree]
    ) -> list[Tensor]:
        """For each sequence the logits (N + 1, V) after its chain and after every node of the tree below the chain."""
        tokens = [[*chain, *tree.tokens] for chain, tree in zip(chains, trees, strict=True)]
        parents = [
            [*range(ROOT, len(chain) - 1), *(parent + len(chain) for parent in tree.parents)]
            for chain, tree in zip(chains, trees, strict=True)
        ]
        rows = self.extend_all(contexts, tokens, parents)
        return [row[len(chain) - 1 :] for row, chain in zip(rows, chains, strict=True)]

    def keep(self, context: Context, chain: Sequence[int], path: Sequence[int]) -> None:
        """Commit a chain and the accepted nodes of the tree below it."""
        self.target.commit(self._slots[id(context)], [*range(len(chain)), *(node + len(chain) for node in path)])


@dataclass
class _Inner(Context):
    """The inner drafter's context. committed: number of its tokens that are the sequence's; a chain follows them."""

    committed: int = 0


@dataclass
class _Chain:
    """The growing chain of one sequence.

    context: that of the inner drafter: the sequence and the chain so far. missing: tokens that the cache lacks.
    """

    context: _Inner
    missing: list[int]
    tokens: list[int] = field(default_factory=list)
    probs: list[Tensor] = field(default_factory=list)

    @property
    def draft(self) -> DraftTree:
        """The chain as a draft."""
        return DraftTree.chain(self.tokens, None if self.context.sampling.is_greedy else self.probs)


@dataclass(frozen=True)
class Hierarchy(Drafter):
    """Drafter that proposes a chain of at most `length` tokens; the inner `drafter` drafts trees of up to `nodes`."""

    drafter: Drafter
    length: int = 8
    nodes: int = 8
    needs_draft_model: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not isinstance(self.drafter, Drafter):
            raise UserError(f"drafter={self.drafter} must be a drafter")
        for name in ("length", "nodes"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be 1 or more")
        if self.drafter.needs_draft_model:
            raise UserError(f"drafter={self.drafter} needs a draft model itself: choose a drafter without one")

    @property
    def learns(self) -> bool:
        """Whether the inner drafter learns."""
        return self.drafter.learns

    def draft_sampling(self, sampling: Sampling) -> DraftSampling:
        """Independent draws of the draft model; deterministic at temperature 0."""
        return DraftSampling.DETERMINISTIC if sampling.is_greedy else DraftSampling.INDEPENDENT

    def chains(self) -> bool:
        """Every draft is a chain."""
        return True

    def new_memory(self, models: Models) -> HierarchyMemory:
        """The draft model, and the inner drafter's memory."""
        return HierarchyMemory(models.load_draft(), self.drafter.new_memory(models), models.vocabulary)

    def begin(self, context: Context, memory: HierarchyMemory) -> None:
        """Start the sequence in the inner drafter."""
        self.drafter.begin(self._inner(context), memory.inner)

    def reserve(self, memory: HierarchyMemory, slots: int, longest: int, budget: int) -> None:
        """Reserve the draft model's caches, and those of the inner drafter."""
        memory.reserve(slots, longest, self._max_nodes(budget))
        self.drafter.reserve(memory.inner, slots, longest + self.length, self.nodes)

    def needed_bytes(self, memory: HierarchyMemory, slots: int, longest: int, budget: int) -> int:
        """Bytes of the draft model's caches and logits."""
        return memory.needed_bytes(slots, longest, self._max_nodes(budget))

    def prefill(self, contexts: Sequence[Context], memory: HierarchyMemory, budget: int) -> None:
        """Prefill the draft model and the inner drafter."""
        count = min(budget, self.length)
        fitting = [context for context in contexts if memory.fits(context, count)]
        if fitting:
            memory.prefill(fitting, self._max_nodes(budget))
            self.drafter.prefill([self._inner(context) for context in fitting], memory.inner, self.nodes)

    def propose(self, context: Context, memory: HierarchyMemory, budget: int) -> DraftTree:
        """A chain of the draft model's tokens; empty if the sequence exceeds the draft model's context length."""
        return self.propose_all([context], memory, budget)[0]

    def propose_all(self, contexts: Sequence[Context], memory: HierarchyMemory, budget: int) -> list[DraftTree]:
        """A chain for each sequence; a pass of the draft model covers all chains that still grow."""
        count = min(budget, self.length)
        fitting = [context for context in contexts if memory.fits(context, count)]
        if not fitting:
            return [DraftTree()] * len(contexts)
        missing = memory.catch_up(fitting, self._max_nodes(budget))
        chains = {
            id(context): _Chain(self._inner(context), tail) for context, tail in zip(fitting, missing, strict=True)
        }
        growing = fitting
        while growing:
            self._grow(growing, [chains[id(context)] for context in growing], memory, count)
            growing = [context for context in growing if len(chains[id(context)].tokens) < count]
        return [chains[id(context)].draft if id(context) in chains else DraftTree() for context in contexts]

    def end(self, context: Context, memory: HierarchyMemory) -> None:
        """Free the sequence's cache slot, and end it in the inner drafter."""
        memory.end(context)
        inner = context.state.pop(self, None)
        if inner is not None:
            inner.tokens = list(context.tokens)
            self.drafter.end(inner, memory.inner)

    def saved(self, memory: HierarchyMemory) -> Mapping[str, Tensor]:
        """What the inner drafter learned."""
        return self.drafter.saved(memory.inner)

    def changes(self, memory: HierarchyMemory, whole: bool = False) -> Mapping[str, Tensor]:
        """What the inner drafter learned since the last call."""
        return self.drafter.changes(memory.inner, whole)

    def load(self, memory: HierarchyMemory, tensors: Mapping[str, Tensor]) -> None:
        """Load it into the inner drafter's memory."""
        self.drafter.load(memory.inner, tensors)

    def update(self, memory: HierarchyMemory, tensors: Mapping[str, Tensor]) -> None:
        """Update the inner drafter's memory."""
        self.drafter.update(memory.inner, tensors)

    def _grow(self, contexts: Sequence[Context], chains: Sequence[_Chain], memory: HierarchyMemory, count: int) -> None:
        """One pass of the draft model: every chain grows by the accepted nodes of its inner tree, and by one token."""
        trees = self.drafter.propose_all([chain.context for chain in chains], memory.inner, self.nodes)
        fitting = []
        for tree, chain in zip(trees, chains, strict=True):
            # The chain may not exceed `count` tokens: drop nodes that are too deep.
            max_depth = count - len(chain.tokens) - 1
            if max(tree.depths, default=0) > max_depth:
                tree = tree.keep([node for node, depth in enumerate(tree.depths) if depth <= max_depth])
            fitting.append(tree)
        logits = memory.forward(contexts, [chain.missing for chain in chains], fitting)
        for context, chain, tree, scores in zip(contexts, chains, fitting, logits, strict=True):
            verdict = self._verify(tree, TargetRows(scores, tree, chain.context), context, chain)
            memory.keep(context, chain.missing, verdict.path)
            outcome = Outcome(chain.context, tree, verdict.path, verdict.token).with_top_tokens(self.drafter, scores)
            self.drafter.observe(memory.inner, outcome)
            chain.tokens += outcome.committed
            chain.context.tokens += outcome.committed
            chain.missing = [verdict.token]

    def _verify(self, tree: DraftTree, rows: TargetRows, context: Context, chain: _Chain) -> Verdict:
        if rows.is_greedy:
            return descend(tree, rows.best)

        def choose(node: int) -> int:
            chain.probs.append(rows.probs(node))
            return draw(chain.probs[-1], context.draft_generator)

        return descend(tree, choose)

    def _max_nodes(self, budget: int) -> int:
        """Nodes of the chain, and of the inner tree below it, in the draft model's cache."""
        return min(budget, self.length) + self.nodes

    def _inner(self, context: Context) -> _Inner:
        """The inner drafter's context of a sequence, without a chain."""
        inner: _Inner | None = context.state.get(self)
        if inner is None:
            inner = _Inner([], context.prompt_length, context.sampling, context.generator, context.draft_generator)
            context.state[self] = inner
        # The draft model draws its chain's tokens itself, by sample and match, where drawn inner drafts are wasted.
        inner.sampling, inner.draws = context.drafting, False
        tokens, held = context.tokens, inner.tokens
        common = min(len(held), len(tokens))
        common = next((index for index in range(inner.committed, common) if held[index] != tokens[index]), common)
        if common < len(held):
            # The target rejected part of the last chain.
            self.drafter.truncate(inner, common)
            del held[common:]
        held += tokens[common:]
        inner.committed = len(tokens)
        return inner
