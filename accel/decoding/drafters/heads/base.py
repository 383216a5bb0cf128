"""Base of drafters with a head on the target: reads its hidden states, and grows trees with the head's network.

Source of dynamic trees: Li et al. 2024, arXiv:2406.16858 (EAGLE-2). Of static ones: Cai et al. 2024, arXiv:2401.10774.
Departs from EAGLE-2: a level expands only nodes that are among the `budget` most probable so far, because no child of
another can be; so the tree is the best one of its width, and levels that cannot change it are not run. Nor are those
that the target reaches too rarely to pay for the time of a level, `min_reach`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from heapq import nlargest
from math import inf, log2
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from hasten.accel.decoding.context import Context
from hasten.accel.decoding.drafters.base import Drafter, Memory, Models
from hasten.accel.decoding.drafters.heads.fast_modules import use_fast_modules
from hasten.accel.decoding.tree import ROOT, DraftTree
from hasten.accel.errors import UserError
from hasten.accel.training.heads.draft_head import (
    CONFIG,
    DraftHead,
    DraftNetwork,
    Frontier,
    TargetFacts,
    TargetWeights,
)
from hasten.accel.training.heads.layouts.loading import load_any_head

TREES = ("dynamic", "static")
# Folder of heads in a target's folder.
HEADS = "heads"
# From so many tokens on, reading them is the work of a prompt, and not of a draft.
_MANY = 16
# Classes of nodes for acceptance estimates: half powers of two of the probability.
_CLASSES = 12


@dataclass(eq=False)
class HeadMemory:
    """A network on the target's device. layers: see `Target.feature_layers`. rates: acceptance by depth and rank.

    cache: what drafters compute from it once.
    """

    network: DraftNetwork
    layers: tuple[int, ...]
    ids: list[int]
    device: torch.device
    rates: Sequence[Sequence[float]] | None = None
    cache: dict[Any, Any] = field(default_factory=dict)


@dataclass
class _SequenceState:
    """pending: features of committed tokens that the network has not read. read: number of tokens that it has read."""

    network: Any
    pending: list[Tensor] = field(default_factory=list)
    read: int = 0


@dataclass
class _Node:
    """A candidate. value: probability of its path. place: (level, row) of it in a frontier, once expanded."""

    token: int
    parent: int
    value: float
    prob: float
    rank: int
    depth: int
    expanded: bool = False


@dataclass(frozen=True)
class HeadDrafter(Drafter):
    """Drafter with a head on the target. Its drafts are deterministic.

    head: folder of the trained head, also in another program's layout; None takes heads/NAME in the target's folder.
    tree: `dynamic` takes the most probable paths by the head's own probabilities, `static` those that were accepted
    most often in training, whatever the head says here. branches: children of a node, at most. width: nodes of a level
    that are expanded, at most. depth: largest depth of a draft; 0 is the head's own. min_reach: a level is drafted only
    if the target reaches it, by the probabilities of the tree, with this probability at least.
    """

    head: str | None = None
    tree: str = "dynamic"
    branches: int = 4
    width: int = 4
    depth: int = 0
    min_reach: float = 0.2
    reads_target: ClassVar[bool] = True
    name: ClassVar[str]
    head_type: ClassVar[type[DraftHead]]

    def __post_init__(self) -> None:
        if self.tree not in TREES:
            raise UserError(f"tree={self.tree} is wrong: expected {' or '.join(TREES)}")
        for name, least in (("branches", 1), ("width", 1), ("depth", 0)):
            if getattr(self, name) < least:
                raise UserError(f"{name}={getattr(self, name)} is wrong: expected {least} or more")
        if not 0 <= self.min_reach <= 1:
            raise UserError(f"min_reach={self.min_reach} is wrong: expected a probability")
        if self.head is not None:
            # The processes that load it have another current folder.
            object.__setattr__(self, "head", str(Path(self.head).expanduser().absolute()))

    def new_memory(self, models: Models) -> HeadMemory:
        """The trained network with the target's embedding; UserError if there is no head, or one for another target."""
        head, network, config = self._loaded(models.target_path)
        if models.target is not None:
            embedding, device = models.target.embedding(), models.target.device
        elif models.target_path is not None:
            embedding, device = TargetWeights.of(models.target_path).embedding, torch.device("cpu")
        else:
            raise UserError(f"drafter {self.name} needs the target: it cannot be used where only a draft model is")
        network.attach(embedding)
        network.to(device).requires_grad_(False)
        use_fast_modules(network)
        layers = head.layers(TargetFacts(**config["target"]))
        return HeadMemory(network, layers, network.vocabulary.ids.tolist(), device, config.get("rates"))

    def check_target(self, target: Path) -> None:
        """UserError if there is no head, or one for another target."""
        self._loaded(target)

    def _loaded(self, target: Path | None) -> tuple[DraftHead, DraftNetwork, dict[str, Any]]:
        """Head, network and config of the head's folder."""
        folder = self.folder(target)
        facts = TargetFacts.of(target) if target is not None else None
        head, network, config = load_any_head(folder, self.head_type, facts)
        if self.tree == "static" and not config.get("rates"):
            raise UserError(f"tree=static needs measured acceptance, which head={folder} lacks: use tree=dynamic")
        return head, network, config

    def folder(self, target: Path | None) -> Path:
        """Folder of the head for a target's folder; UserError if there is none."""
        if self.head is not None:
            return Path(self.head)
        if target is None:
            raise UserError("head=null, and the target has no folder to look for a head in: give drafter.head=PATH")
        folder = target / HEADS / self.name
        if not (folder / CONFIG).is_file():
            raise UserError(
                f"there is no trained head at {folder}: train one with hasten train head={self.head_type.drafter}, and "
                "give drafter.head=PATH"
            )
        return folder

    def target_layers(self, memory: HeadMemory) -> tuple[int, ...]:
        """The layers that the head was trained on."""
        return memory.layers

    def needed_bytes(self, memory: HeadMemory, slots: int, longest: int, budget: int) -> int:
        """Bytes of the network's caches, and of the logits of a level of the trees."""
        logits = min(self.width, budget) * len(memory.ids) * 4
        return slots * (memory.network.state_bytes(longest) + logits)

    def observe_features(self, memory: HeadMemory, context: Context, start: int, features: Tensor) -> None:
        """Keep them until the next draft."""
        state = self._state(memory, context)
        assert start == state.read + sum(map(len, state.pending)), (start, state.read)
        state.pending.append(features)

    def _state(self, memory: HeadMemory, context: Context) -> _SequenceState:
        if self not in context.state:
            context.state[self] = _SequenceState(memory.network.begin())
        state: _SequenceState = context.state[self]
        return state

    def truncate(self, context: Context, length: int) -> None:
        """Heads cannot forget what they have read: only a target's committed tokens reach them, which never change."""
        raise NotImplementedError(f"{self.name} cannot be used inside another drafter's drafts")

    def propose(self, context: Context, memory: Memory, budget: int) -> DraftTree:
        """A tree of at most `budget` tokens."""
        return self.propose_all([context], memory, budget)[0]

    def propose_all(self, contexts: Sequence[Context], memory: HeadMemory, budget: int) -> list[DraftTree]:
        """Trees of all sequences, level by level; a step of the network covers all of them."""
        states = [self._state(memory, context) for context in contexts]
        ready = [index for index, state in enumerate(states) if state.pending]
        trees = [DraftTree()] * len(contexts)
        if not ready:
            return trees
        network_states = [states[index].network for index in ready]
        features = [torch.cat(states[index].pending) for index in ready]
        for index in ready:
            states[index].pending = []
        frontier = self._read(memory, [contexts[index] for index in ready], features)
        growing = [_GrowingTree(self, memory, budget) for _ in ready]
        self._grow(memory, network_states, frontier, growing)
        for index, tree in zip(ready, growing, strict=True):
            trees[index] = tree.done()
        return trees

    def prefill(self, contexts: Sequence[Context], memory: HeadMemory, budget: int) -> None:
        """Read prompts, and what was decoded without drafts, up to the last token, after which is drafted."""
        for context in contexts:
            state = context.state.get(self)
            if not isinstance(state, _SequenceState) or state.network is None:
                continue  # nothing of what was read is kept
            if sum(map(len, state.pending)) >= _MANY:
                features = torch.cat(state.pending)
                state.pending = [features[-1:]]
                self._read(memory, [context], [features[:-1]])

    def _read(self, memory: HeadMemory, contexts: Sequence[Context], features: Sequence[Tensor]) -> Frontier:
        """Let the network read features (N, F * D) of the next tokens of each sequence."""
        states, tokens = [self._state(memory, context) for context in contexts], []
        for context, state, new in zip(contexts, states, features, strict=True):
            known = context.tokens[state.read + 1 : state.read + 1 + len(new)]
            assert len(known) == len(new), (len(known), len(new))
            tokens.append(torch.tensor(known, device=memory.device))
            state.read += len(new)
        dtype = memory.network.dtype
        return memory.network.read([state.network for state in states], [new.to(dtype) for new in features], tokens)

    def _grow(
        self, memory: HeadMemory, states: Sequence[Any], frontier: Frontier, trees: Sequence["_GrowingTree"]
    ) -> None:
        max_depth = min(self.depth or inf, memory.network.max_depth)
        # Tree and node of each row of the frontier.
        rows = [(index, ROOT) for index in range(len(trees))]
        while True:
            log_probs, best = frontier.logits.float().log_softmax(-1).topk(min(self.branches, len(memory.ids)), -1)
            for (index, parent), probs, children in zip(rows, log_probs.exp().tolist(), best.tolist(), strict=True):
                trees[index].add(parent, [memory.ids[child] for child in children], probs)
            if frontier.depth >= max_depth:
                return
            chosen, parents, tokens = [], [], []
            place = {row: number for number, row in enumerate(rows)}
            for index, tree in enumerate(trees):
                for node in tree.to_expand():
                    chosen.append((index, node))
                    parents.append(place[index, tree.nodes[node].parent])
                    tokens.append(tree.nodes[node].token)
            if not chosen:
                return
            frontier = memory.network.step(
                states,
                frontier,
                torch.tensor(parents, device=memory.device),
                torch.tensor(tokens, device=memory.device),
            )
            rows = chosen


class _GrowingTree:
    """Candidates of one sequence's tree, of which the most valuable are drafted."""

    def __init__(self, drafter: HeadDrafter, memory: HeadMemory, budget: int) -> None:
        self.nodes: list[_Node] = []
        self._drafter, self._budget = drafter, budget
        self._rates = memory.rates if drafter.tree == "static" else None
        self._level: list[int] = []

    def add(self, parent: int, tokens: Sequence[int], probs: Sequence[float]) -> None:
        """Add the children of a node, most probable first."""
        above = 1.0 if parent == ROOT else self.nodes[parent].value
        depth = 1 if parent == ROOT else self.nodes[parent].depth + 1
        for rank, (token, prob) in enumerate(zip(tokens, probs, strict=True)):
            if self._rates is not None:
                of_depth = self._rates[min(depth, len(self._rates)) - 1]
                prob = of_depth[rank] if rank < len(of_depth) else 0.0
            if prob > 0:
                self.nodes.append(_Node(token, parent, above * prob, prob, rank, depth))
                self._level.append(len(self.nodes) - 1)

    def to_expand(self) -> list[int]:
        """Nodes of the latest level that the tree would have now, the `width` most valuable; parents of the next.

        None if the next level is reached too rarely.
        """
        best = set(self._best())
        level = [node for node in self._level if node in best]
        self._level = []
        chosen = nlargest(self._drafter.width, level, key=lambda node: self.nodes[node].value)
        reached = sum(self.nodes[node].value for node in chosen)
        return sorted(chosen) if reached >= self._drafter.min_reach else []

    def _best(self) -> list[int]:
        # Of equal values the earlier node, so that parents come before children.
        order = sorted(range(len(self.nodes)), key=lambda node: (-self.nodes[node].value, node))
        return order[: self._budget]

    def done(self) -> DraftTree:
        """The tree of the most valuable nodes, most valuable first."""
        best = self._best()
        new = {ROOT: ROOT} | {node: index for index, node in enumerate(best)}
        nodes = [self.nodes[node] for node in best]
        tokens, parents = [node.token for node in nodes], [new[node.parent] for node in nodes]
        if self._rates is not None:
            labels = [(self._drafter.name, node.depth * 100 + node.rank) for node in nodes]
            return DraftTree(tokens, parents, labels=labels)
        labels = [(self._drafter.name, min(int(-2 * log2(max(node.prob, 1e-9))), _CLASSES)) for node in nodes]
        return DraftTree(tokens, parents, labels=labels, confidences=[node.prob for node in nodes])
