"""S2D: the first layers of a sorted draft model draft a token, and more of its layers where they are not confident.

Source: Kavehzadeh et al. 2024, arXiv:2407.01955 (S2D).
Departs from it: the confidence is the largest probability of the next token at temperature 1, not that of a drawn
token, so that which sub-model drafts depends on earlier tokens only and its distribution is that of the draft. Every
sub-model has a KV cache of its own and computes its lower layers again: a larger one reads the tokens that it lacks in
one pass when it is asked, which costs about as much as one token.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch

from hasten.accel.decoding.context import Context
from hasten.accel.decoding.drafters.base import Drafter, Memory, Models
from hasten.accel.decoding.drafters.model.base import SmallModel
from hasten.accel.decoding.sampling import Sampling, draw
from hasten.accel.decoding.tree import DraftSampling, DraftTree
from hasten.accel.errors import UserError
from hasten.accel.training.heads.draft_head import CONFIG


class SortedModels:
    """The sub-models of a draft, smallest first. passes: number of tokens that each has drafted."""

    def __init__(self, models: Sequence[SmallModel]) -> None:
        self.models = models
        self.passes = [0] * len(models)


@dataclass
class _Chain(Context):
    """A sequence with a draft below it, which sub-models read as committed. drafted, probs: of the draft."""

    drafted: list[int] = field(default_factory=list)
    probs: list[torch.Tensor] = field(default_factory=list)


@dataclass(frozen=True)
class SortedDrafting(Drafter):
    """Drafter that proposes a chain of at most `length` tokens.

    confidence: largest probability of the next token below which the next larger sub-model drafts it. exits: numbers of
    layers of the sub-models, ascending; () takes those that the draft model was trained with, and the whole model alone
    for one that was not trained by `hasten train head=s2d`.
    """

    length: int = 5
    confidence: float = 0.5
    exits: tuple[int, ...] = ()
    needs_draft_model: ClassVar[bool] = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "exits", tuple(self.exits))
        if self.length < 1:
            raise UserError(f"length={self.length} must be 1 or more")
        if not 0 <= self.confidence <= 1:
            raise UserError(f"confidence={self.confidence} is wrong: expected a probability from 0 to 1")
        if list(self.exits) != sorted(set(self.exits)) or min(self.exits, default=1) < 1:
            raise UserError(f"exits={list(self.exits)} is wrong: expected ascending numbers of layers, 1 or more")

    def draft_sampling(self, sampling: Sampling) -> DraftSampling:
        """Independent draws; deterministic at temperature 0."""
        return DraftSampling.DETERMINISTIC if sampling.is_greedy else DraftSampling.INDEPENDENT

    def chains(self) -> bool:
        """Every draft is a chain."""
        return True

    def new_memory(self, models: Models) -> SortedModels:
        """The sub-models, which share the weights of the draft model."""
        draft = models.load_draft()
        exits = self.exits or _trained_exits(models.draft_path)
        targets = [draft.first_layers(count) for count in exits] or [draft]
        return SortedModels([SmallModel(target, models.vocabulary) for target in targets])

    def reserve(self, memory: SortedModels, slots: int, longest: int, budget: int) -> None:
        """Reserve the caches of all sub-models."""
        for model in memory.models:
            model.reserve(slots, longest, min(budget, self.length))

    def needed_bytes(self, memory: SortedModels, slots: int, longest: int, budget: int) -> int:
        """Bytes of the caches of all sub-models and of their logits."""
        return sum(model.needed_bytes(slots, longest, min(budget, self.length)) for model in memory.models)

    def prefill(self, contexts: Sequence[Context], memory: SortedModels, budget: int) -> None:
        """Prefill all sub-models with prompts."""
        chains = [self._chain(context) for context in contexts]
        for model in memory.models:
            model.prefill(chains, min(budget, self.length))

    def propose(self, context: Context, memory: SortedModels, budget: int) -> DraftTree:
        """A chain; empty if the sequence exceeds the draft model's context length."""
        return self.propose_all([context], memory, budget)[0]

    def propose_all(self, contexts: Sequence[Context], memory: SortedModels, budget: int) -> list[DraftTree]:
        """A chain for each sequence; a pass of a sub-model covers all sequences that it drafts the next token of."""
        count = min(budget, self.length)
        chains = [self._chain(context) for context in contexts]
        growing = [chain for chain in chains if memory.models[0].fits(chain, count)]
        for left in range(count, 0, -1):
            self._grow(growing, memory, left)
        trees = []
        for chain in chains:
            greedy = chain.drafting.is_greedy
            trees.append(DraftTree.chain(chain.drafted, None if greedy else chain.probs))
        return trees

    def _grow(self, growing: Sequence[_Chain], memory: SortedModels, left: int) -> None:
        """Draft the next token of every chain; left: tokens that chains may still grow by."""
        asked = list(growing)
        for number, model in enumerate(memory.models):
            if not asked:
                return
            unsure = []
            for chain, logits in zip(asked, model.start_all(asked, left), strict=True):
                assert logits is not None, "sub-models have one context length"
                is_last = number == len(memory.models) - 1
                if not is_last and float(logits.float().softmax(-1).amax()) < self.confidence:
                    unsure.append(chain)
                    continue
                memory.passes[number] += 1
                if chain.drafting.is_greedy:
                    token = model.best(chain, logits, [])
                else:
                    chain.probs.append(model.probs(chain, logits, []))
                    token = draw(chain.probs[-1], chain.draft_generator)
                chain.drafted.append(token)
                chain.tokens.append(token)
            asked = unsure

    def end(self, context: Context, memory: Memory) -> None:
        """Free the sequence's cache slots."""
        chain = context.state.pop(self, None)
        if chain is not None:
            for model in memory.models:
                model.end(chain)

    def truncate(self, context: Context, length: int) -> None:
        """Nothing: caches are cut to what they have in common with the tokens."""

    def _chain(self, context: Context) -> _Chain:
        """The sequence without a draft, as its sub-models know it."""
        chain: _Chain | None = context.state.get(self)
        if chain is None:
            chain = _Chain([], context.prompt_length, context.sampling, context.generator, context.draft_generator)
            context.state[self] = chain
        chain.sampling, chain.draws = context.sampling, context.draws
        chain.tokens, chain.drafted, chain.probs = list(context.tokens), [], []
        return chain


def _trained_exits(folder: Path | None) -> tuple[int, ...]:
    """Exits in the config that a sorted draft was saved with; none for another draft."""
    path = None if folder is None else folder / CONFIG
    if path is None or not path.is_file():
        return ()
    exits = json.loads(path.read_text()).get("hyper_parameters", {}).get("exits", ())
    return tuple(int(count) for count in exits)
