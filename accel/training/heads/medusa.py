"""Medusa: a residual block and an output layer for each depth, all on the target's last hidden state.

Source: Cai et al. 2024, arXiv:2401.10774 (Medusa-1), and its code, github.com/FasterDecoding/Medusa.
Departs from it: each block has its own weights, where the released code repeats one; the output layers draft from a
reduced vocabulary and, with shares_output, are one; the loss is the cross-entropy with the target's own distribution,
where the paper's is that with the text.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hasten.accel.decoding.targets.base import FINAL
from hasten.accel.errors import check_fields
from hasten.accel.training.heads.acceptance import ResBlock
from hasten.accel.training.heads.draft_head import (
    DraftHead,
    DraftNetwork,
    Frontier,
    HeadBatch,
    Loss,
    TargetFacts,
    TargetWeights,
)
from hasten.accel.training.heads.vocabulary import DraftVocabulary
from hasten.accel.training.objectives.by_depth import DepthLoss


class IdentityBlock(ResBlock):
    """A residual block that is the identity at first."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)


class MedusaNetwork(DraftNetwork):
    """Blocks for each depth, and output layers: one for each depth, or a single one."""

    def __init__(self, size: int, vocabulary: DraftVocabulary, depth: int, blocks: int, outputs: int) -> None:
        super().__init__()
        self.vocabulary, self.max_depth = vocabulary, depth
        self.heads = nn.ModuleList(nn.Sequential(*(IdentityBlock(size) for _ in range(blocks))) for _ in range(depth))
        self.outputs = nn.ModuleList(nn.Linear(size, len(vocabulary), bias=False) for _ in range(outputs))

    def logits(self, hidden: Tensor, depth: int) -> Tensor:
        """(…, R) of the draft of this depth, from 1; hidden: (…, D)."""
        output = self.outputs[min(depth, len(self.outputs)) - 1]
        logits: Tensor = output(self.heads[depth - 1](hidden))
        return logits

    def read(self, states: Sequence[Any], features: Sequence[Tensor], tokens: Sequence[Tensor]) -> Frontier:
        """Drafts of depth 1 from the last hidden states."""
        hidden = torch.stack([new[-1] for new in features])
        return Frontier(self.logits(hidden, 1), torch.arange(len(hidden), device=hidden.device), 1, hidden)

    def step(self, states: Sequence[Any], frontier: Frontier, rows: Tensor, tokens: Tensor) -> Frontier:
        """Drafts of the next depth: the same for all nodes of a sequence, whose tokens are not read."""
        depth, sequence = frontier.depth + 1, frontier.sequence[rows]
        logits = self.logits(frontier.carried, depth)
        return Frontier(logits[sequence], sequence, depth, frontier.carried)


@dataclass(frozen=True)
class Medusa(DraftHead):
    """Head with `depth` drafts of `blocks` residual blocks each.

    decay: weight of a depth's loss relative to that of the one before. shares_output: whether one output layer serves
    all depths.
    """

    depth: int = 4
    blocks: int = 1
    decay: float = 0.8
    shares_output: bool = False
    drafter: ClassVar[str] = "medusa"

    def __post_init__(self) -> None:
        check_fields(
            self,
            ("depth", self.depth >= 1, "1 or more"),
            ("blocks", self.blocks >= 1, "1 or more"),
            ("decay", 0 < self.decay <= 1, "above 0 and at most 1"),
        )

    def layers(self, target: TargetFacts) -> tuple[int, ...]:
        """The state that the target's output layer reads."""
        return (FINAL,)

    def build(self, target: TargetFacts, vocabulary: DraftVocabulary) -> MedusaNetwork:
        """The network; its blocks begin as the identity."""
        outputs = 1 if self.shares_output else self.depth
        return MedusaNetwork(target.hidden_size, vocabulary, self.depth, self.blocks, outputs)

    def initialise(self, network: DraftNetwork, weights: TargetWeights) -> None:
        """Output layers begin as the target's rows of the draft's vocabulary."""
        assert isinstance(network, MedusaNetwork)
        for output in network.outputs:
            assert isinstance(output, nn.Linear)
            output.weight.data.copy_(weights.output[network.vocabulary.ids])

    def teacher_forced(self, network: DraftNetwork, batch: HeadBatch) -> list[Tensor]:
        """Every depth from the same states."""
        assert isinstance(network, MedusaNetwork)
        count = batch.tokens.shape[1]
        return [network.logits(batch.features[:, : count - 1 - d], d) for d in range(1, self.depth + 1)]

    def loss(self, network: DraftNetwork, batch: HeadBatch) -> Loss:
        """Sum over depths of decay^(depth - 1) times the cross-entropy."""
        assert isinstance(network, MedusaNetwork)
        total = DepthLoss(network.vocabulary, self.decay)
        for depth in range(1, self.depth + 1):
            targets = batch.at_depth(depth)
            valid = targets.valid
            # Rows that do not count are left out before the output layer, which is most of the work.
            hidden = batch.features[:, : valid.shape[1]][valid]
            total.add(depth, network.logits(hidden, depth), targets)
        return total.loss()
