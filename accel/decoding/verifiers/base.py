"""What a verifier is: it walks down a draft as far as the target agrees, and draws the token after that."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from hasten.accel.decoding.context import Context
from hasten.accel.decoding.tree import ROOT, DraftSampling, DraftTree


@dataclass(frozen=True)
class Verdict:
    """path: accepted nodes from the top, each a child of the one before. token: what follows them, always there."""

    path: list[int]
    token: int


class TargetRows:
    """The target's distribution after the last committed token (ROOT) and after every node, made where it is asked for.

    logits: (N + 1, V), row 0 after the last committed token, row i + 1 after node i. Temperature, top-k, top-p and
    repetition penalty of the context act on all that comes from here.
    """

    def __init__(self, logits: Tensor, tree: DraftTree, context: Context) -> None:
        assert logits.shape[0] == len(tree) + 1, (logits.shape, len(tree))
        self._logits, self._tree, self._context = logits, tree, context

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
            return int(self._penalised(node).argmax())
        return self._best[node + 1]

    @cached_property
    def _best(self) -> list[int]:
        tokens: list[int] = self._logits.argmax(-1).tolist()  # all at once: one op, one copy from the device
        return tokens

    @cached_property
    def _seen(self) -> Tensor:
        return torch.tensor(self._context.tokens, device=self._logits.device)

    def _penalised(self, node: int) -> Tensor:
        row, sampling = self._logits[node + 1], self._context.sampling
        if not sampling.has_penalty:
            return row
        path = [self._tree.tokens[above] for above in self._tree.path(node)]
        return sampling.penalised(row, torch.cat([self._seen, self._seen.new_tensor(path)]))


class Verifier(ABC):
    """A rule of acceptance; a frozen dataclass of hyper-parameters.

    lossless: whether what comes out has the target's own distribution. reads_draft_probs: whether it goes by the
    distributions that drafts were drawn from, and would be biased if drafts were chosen among after they were drawn.
    """

    lossless: ClassVar[bool] = True
    reads_draft_probs: ClassVar[bool] = True

    @abstractmethod
    def refusal(self, draft_sampling: DraftSampling, chains: bool, greedy: bool) -> str | None:
        """Why drafts of this kind would come out biased, and what would be right; None where they do not.

        chains: whether no node has two children.
        """

    def is_independent_of_drafts(self, greedy: bool) -> bool:
        """Whether the tokens depend on the target and the generator alone, so that any drafts give the same ones."""
        return self.lossless and greedy

    @abstractmethod
    def verify(self, tree: DraftTree, rows: TargetRows, generator: torch.Generator) -> Verdict:
        """Accepted path and the token after it. Whatever is drawn comes from the generator."""


def descend(tree: DraftTree, choose: Callable[[int], int]) -> Verdict:
    """Walk down while the token chosen after a node is the token of one of its children."""
    path: list[int] = []
    node = ROOT
    while True:
        token = choose(node)
        below = [child for child in tree.children.get(node, ()) if tree.tokens[child] == token]
        if not below:
            return Verdict(path, token)
        node = below[0]
        path.append(node)
