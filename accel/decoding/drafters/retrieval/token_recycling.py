"""Token Recycling: store the target's most probable successors of every token, and fill a fixed tree from them.

Source: Luo et al. 2024, arXiv:2408.08696.
Departs from it: a token that was never seen has no successors, where the paper's zeros propose the id 0 eight times; of
several nodes with the same token the accepted one is stored; a budget below 80 nodes is spent on the nodes most likely
to be accepted; of a prompt nothing or only the end is learned, because its logits cost more than they gain.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hasten.accel.decoding.context import Context
from hasten.accel.decoding.drafters.base import Drafter, Models, Outcome
from hasten.accel.decoding.drafters.template import Path, by_acceptance
from hasten.accel.decoding.tree import DraftTree
from hasten.accel.errors import UserError

_SUCCESSORS = 8  # successors of a token

# The paper's tree of 80 nodes: number of children of each node, which is a path of ranks from the root.
_CHILDREN: dict[Path, int] = {
    (): 8,
    **{(0,): 8, (1,): 4, (2,): 3, (3,): 2, (4,): 1, (5,): 1, (6,): 1, (7,): 1},
    **{(0, 0): 8, (0, 1): 3, (0, 2): 2, (0, 3): 1, (0, 4): 1, (0, 5): 1, (0, 6): 1, (0, 7): 1},
    **{(1, 0): 2, (1, 1): 1, (2, 0): 1, (3, 0): 1, (4, 0): 1, (5, 0): 1},
    **{(0, 0, 0): 5, (0, 0, 1): 2, (0, 0, 2): 1, (0, 0, 3): 1, (0, 0, 4): 1},
    **{(0, 1, 0): 1, (0, 2, 0): 1, (1, 0, 0): 1, (2, 0, 0): 1, (3, 0, 0): 1},
    **{(0, 0, 0, 0): 3, (0, 0, 0, 1): 1, (0, 0, 0, 2): 1, (0, 0, 1, 0): 1, (0, 1, 0, 0): 1, (1, 0, 0, 0): 1},
    **{(0, 0, 0, 0, 0): 2, (0, 0, 0, 1, 0): 1},
}
TEMPLATE: list[Path] = [(*parent, rank) for parent, count in _CHILDREN.items() for rank in range(count)]

# Acceptance rate of a node by its rank, given that its parent is accepted: between the rates measured on text and on
# greedy output for HumanEval.
_RATES = (0.45, 0.1, 0.04, 0.035, 0.018, 0.015, 0.013, 0.012)
_ORDER = by_acceptance(TEMPLATE, _RATES)


class Adjacency(list[list[int] | None]):
    """The paper's adjacency matrix: V rows of successors, None for a token that has not been seen.

    changed: tokens whose row was stored since the last call of `TokenRecycling.changes`; None before the first.
    """

    changed: set[int] | None = None


@dataclass(frozen=True)
class TokenRecycling(Drafter):
    """Drafter without a model or a corpus; it stores 8 successors of every token and fills a tree of up to 80 nodes.

    Its memory is the paper's adjacency matrix. prompt_tokens: number of tokens at the end of a prompt whose successors
    are stored; they cost the target's output layer for these tokens.
    """

    prompt_tokens: int = 0
    observes: ClassVar[int] = _SUCCESSORS
    observes_probs: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.prompt_tokens < 0:
            raise UserError(f"prompt_tokens={self.prompt_tokens} must be 0 or more")

    @property
    def observes_prompt(self) -> int:  # type: ignore[override]
        """Equal to `prompt_tokens`."""
        return self.prompt_tokens

    def new_memory(self, models: Models) -> Adjacency:
        """A matrix without successors."""
        return Adjacency([None] * models.vocabulary)

    def propose(self, context: Context, memory: Adjacency, budget: int) -> DraftTree:
        """The first nodes of the template; a node of rank r is the r-th most probable successor of its parent."""
        tokens: list[int] = []
        parents: list[int] = []
        labels: list[tuple[str, int, int]] = []
        # Successors and node of ROOT, then of each place of the template.
        rows = [memory[context.tokens[-1]]]
        nodes = [-1]
        for parent, path in _ORDER:
            row = rows[parent + 1]
            if row is None or path[-1] >= len(row):
                rows.append(None)
                nodes.append(-1)
                continue
            token = row[path[-1]]
            rows.append(memory[token])
            parents.append(nodes[parent + 1])
            nodes.append(len(tokens))
            tokens.append(token)
            labels.append(("token_recycling", path[-1], len(path)))
            if len(tokens) == budget:
                break
        return DraftTree(tokens, parents, labels=labels)

    def observe_prompt(
        self, memory: Adjacency, context: Context, start: int, top_tokens: Tensor, top_probs: Tensor | None
    ) -> None:
        """Store the target's most probable successors of the prompt's tokens."""
        rows = top_tokens.tolist()
        tokens = context.tokens[start : start + len(rows)]
        for token, row in zip(tokens, rows, strict=True):
            memory[token] = row
        if memory.changed is not None:
            memory.changed.update(tokens)

    def observe(self, memory: Adjacency, outcome: Outcome) -> None:
        """Store the target's most probable successors of every token of the tree, accepted or not."""
        assert outcome.top_tokens is not None
        rows = outcome.top_tokens.tolist()
        for token, row in zip(outcome.tree.tokens, rows[1:], strict=True):
            memory[token] = row
        # Accepted tokens again: if a token is in several nodes, the accepted one's context is the right one.
        memory[outcome.context.tokens[-1]] = rows[0]
        for node in outcome.decided[1:]:
            memory[outcome.tree.tokens[node]] = rows[node + 1]
        if memory.changed is not None:
            memory.changed.update(outcome.tree.tokens)
            memory.changed.add(outcome.context.tokens[-1])

    def saved(self, memory: Adjacency) -> Mapping[str, Tensor]:
        """The matrix: successors (V, 8) int64, padded with -1."""
        return {"successors": _padded(memory)}

    def changes(self, memory: Adjacency, whole: bool = False) -> Mapping[str, Tensor]:
        """The rows that were stored since the last call: tokens (N,) and their successors (N, 8); or all, as saved."""
        changed, memory.changed = memory.changed, set()
        if whole or changed is None:
            return self.saved(memory)
        tokens = sorted(changed)
        return {
            "tokens": torch.tensor(tokens, dtype=torch.long),
            "successors": _padded(memory[token] for token in tokens),
        }

    def load(self, memory: Adjacency, tensors: Mapping[str, Tensor]) -> None:
        """Restore the matrix."""
        memory[:] = _unpadded(tensors["successors"])

    def update(self, memory: Adjacency, tensors: Mapping[str, Tensor]) -> None:
        """Replace the rows of some tokens."""
        for token, row in zip(tensors["tokens"].tolist(), _unpadded(tensors["successors"]), strict=True):
            memory[token] = row


def _unpadded(successors: Tensor) -> list[list[int] | None]:
    """The rows of `_padded`."""
    return [[token for token in row if token >= 0] or None for row in successors.tolist()]


def _padded(rows: Iterable[list[int] | None]) -> Tensor:
    """Rows of successors (N, 8) int64, padded with -1."""
    padded = [[*(row or []), *[-1] * (_SUCCESSORS - len(row or []))] for row in rows]
    return torch.tensor(padded, dtype=torch.long).view(-1, _SUCCESSORS)
