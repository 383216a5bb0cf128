"""The interface of verifiers: a verifier accepts a path of a draft, and draws the token after it."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from hasten.accel.decoding.context import Context
from hasten.accel.decoding.tree import ROOT, DraftKind, DraftSampling, DraftTree


@dataclass(frozen=True)
class Verdict:
    """path: accepted nodes from the root, each a child of the one before. token: the id after them."""

    path: list[int]
    token: int


class TargetRows:
    """The target's distributions after the last committed token (ROOT) and after every node, computed on demand.

    logits: (N + 1, V); row 0 is after the last committed token, row i + 1 after node i. best: their most probable
    tokens, if known. All results include the context's temperature, top-k, top-p and repetition penalty.
    """

    def __init__(self, logits: Tensor, tree: DraftTree, context: Context, best: Sequence[int] | None = None) -> None:
        assert logits.shape[0] == len(tree) + 1, (logits.shape, len(tree))
        self._logits, self._tree, self._context, self._known = logits, tree, context, best

    @property
    def vocabulary(self) -> int:
        """V."""
        return self._logits.shape[-1]

    @property
    def is_greedy(self) -> bool:
        """Whether every distribution is one-hot."""
        return self._context.sampling.is_greedy

    def probs(self, node: int) -> Tensor:
        """Distribution (V,) float32 of the token after a node, one-hot if greedy."""
        return self._context.sampling.probs(self._penalised(node))

    def best(self, node: int) -> int:
        """The most probable token after a node."""
        if self._context.sampling.has_penalty:
            return _argmax(self._penalised(node)[None])[0]
        return self._best[node + 1]

    @cached_property
    def _best(self) -> Sequence[int]:
        # For all nodes: one operation, one copy from the device.
        return _argmax(self._logits) if self._known is None else self._known

    @cached_property
    def _seen(self) -> Tensor:
        return torch.tensor(self._context.tokens, device=self._logits.device)

    def _penalised(self, node: int) -> Tensor:
        row, sampling = self._logits[node + 1], self._context.sampling
        if not sampling.has_penalty:
            return row
        path = [self._tree.tokens[above] for above in self._tree.path(node)]
        return sampling.penalised(row, torch.cat([self._seen, self._seen.new_tensor(path)]))


def best_of_all(logits: Tensor, contexts: Iterable[Context]) -> list[list[int]] | None:
    """The most probable tokens of logits (B, N, V) of several sequences, in one copy from the device.

    None if no sequence needs them. None, too, on a CPU, which waits for nothing and need not look at padding.
    """
    samplings = [context.sampling for context in contexts]
    if logits.device.type == "cpu" or not any(each.is_greedy and not each.has_penalty for each in samplings):
        return None
    tokens: list[list[int]] = logits.argmax(-1).tolist()
    return tokens


def _argmax(logits: Tensor) -> list[int]:
    """The most probable token of each row (N, V), the first of equal ones."""
    # On a CPU numpy takes a tenth of the time of torch, which over a large vocabulary is a good part of a pass.
    rows = logits.float().numpy() if logits.device.type == "cpu" else logits
    tokens: list[int] = rows.argmax(-1).tolist()
    return tokens


class Verifier(ABC):
    """A rule of acceptance; a frozen dataclass of hyper-parameters.

    lossless: whether the output has the target's own distribution. reads_draft_probs: whether it uses the
    distributions that drafts were drawn from; it is then biased if drawn nodes are dropped by their tokens. If it does
    not, drafters propose their most probable tokens and draw none.
    """

    lossless: ClassVar[bool] = True
    reads_draft_probs: ClassVar[bool] = True

    @abstractmethod
    def refusal(self, draft_sampling: DraftSampling, chains: bool, greedy: bool) -> str | None:
        """Why drafts of this kind would give biased output, and what to use instead; None if the output is unbiased.

        chains: whether every draft is a chain. greedy: whether temperature is 0.
        """

    def refusal_of_any(self, kinds: Iterable[DraftKind], greedy: bool) -> str | None:
        """Why drafts of one of these kinds are refused; None if none is."""
        refusals = (self.refusal(*kind, greedy) for kind in sorted(kinds, key=str))
        return next((refusal for refusal in refusals if refusal is not None), None)

    def is_lossless(self, greedy: bool) -> bool:
        """Whether the output has the target's own distribution; greedy: whether temperature is 0."""
        return self.lossless

    def is_independent_of_drafts(self, greedy: bool) -> bool:
        """Whether the output depends on the target and the generator alone, so that all drafts give the same tokens."""
        return self.lossless and greedy

    @abstractmethod
    def verify(self, tree: DraftTree, rows: TargetRows, generator: torch.Generator) -> Verdict:
        """The accepted path and the token after it; all random numbers come from the generator."""


def descend(tree: DraftTree, choose: Callable[[int], int]) -> Verdict:
    """Accept children as long as the token that `choose` returns after a node is one of them."""
    path: list[int] = []
    node = ROOT
    while True:
        token = choose(node)
        below = [child for child in tree.children.get(node, ()) if tree.tokens[child] == token]
        if not below:
            return Verdict(path, token)
        node = below[0]
        path.append(node)
